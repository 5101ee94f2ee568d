"""Device, number format and ranks: the same code on a laptop, on one GPU and under torchrun."""

import contextlib
import gc
import os
import shutil

import torch
import torch.distributed as dist
from torch import nn

from model.cli import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def select_device(flag="auto"):
    """The torch.device that --device means: "auto" takes CUDA, else Apple's MPS, else the CPU.

    Under torchrun a bare "cuda" becomes this rank's own GPU. Raises UserError for a device that is not there.
    """
    if flag in (None, "auto"):
        flag = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(flag)
    except RuntimeError:
        raise UserError(f"--device {flag}: not a device; use auto, cpu, cuda, cuda:N or mps", exit_code=2) from None
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            found = torch.cuda.device_count() if torch.cuda.is_available() else 0
            raise UserError(f"--device {flag}: {found} CUDA devices found; use --device cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available here; use --device cpu")
    return device


def select_dtype(flag, device):
    """The torch.dtype that --dtype means: "auto" takes bfloat16 where the hardware multiplies it, else float32.

    Raises UserError for bfloat16 on a CUDA device older than Ampere.
    """
    native = False
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu" and torch.backends.mkldnn.is_available():
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if flag in (None, "auto"):
        return torch.bfloat16 if native else torch.float32
    if flag not in DTYPES:
        raise UserError(f"--dtype {flag}: choose one of auto, {', '.join(DTYPES)}", exit_code=2)
    if flag == "bfloat16" and device.type == "cuda" and not native:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--dtype bfloat16: {name} has no bfloat16 units; use --dtype float16")
    return DTYPES[flag]


def check_compiler(device):
    """Raise UserError when torch.compile could not work for `device` here."""
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError("--compile: needs a C++ compiler (apt install g++), found none; or leave the flag out")


def autocast(device, dtype):
    """Context in which matrix products run in `dtype` (a torch.dtype or its name); weights stay as they are."""
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def rank():
    """This process's number among the ranks, 0 when there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """True on the one rank that prints and writes files."""
    return rank() == 0


def print_once(text):
    """print, on the main rank alone."""
    if is_main():
        print(text, flush=True)


def initialise(device):
    """Join the process group when torchrun (or anything else that sets WORLD_SIZE above 1) started several ranks."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def shut_down():
    """Leave the process group. DDP with gloo aborts the interpreter at exit in about one run of five unless its
    reducers are collected first, so drop every reference to the wrapped model before."""
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def sum_over_ranks(values, device):
    """Element-wise float64 sum of a list of numbers over all ranks, as a list of floats."""
    if world_size() == 1:
        return [float(value) for value in values]
    # NCCL reduces only what lies on the GPU; MPS has no float64, and no process groups either.
    total = torch.tensor(values, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
    dist.all_reduce(total)
    return total.tolist()


def gather(value):
    """A list of every rank's `value` (tensors and plain values), on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def wrap(model, device):
    """Average gradients over the ranks with DistributedDataParallel; the model itself when there is one rank."""
    if world_size() == 1:
        return model
    # An expert that no token chose has no gradient; without this DDP would wait for it for ever.
    unused = bool(getattr(model.config, "use_moe", False))
    device_ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, find_unused_parameters=unused)


def without_sync(runner):
    """Context for every micro-batch but the last of a step: gradients stay local, and are averaged once."""
    return runner.no_sync() if world_size() > 1 else contextlib.nullcontext()
