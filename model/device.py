"""Device and number format: the same code on a laptop, on one GPU and under torchrun."""

import contextlib
import os
import platform
import shutil

import torch

from model import memory
from model.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def select_device(flag="auto"):
    """The torch.device that --device means: "auto" takes CUDA, else Apple's MPS, else the CPU.

    Under torchrun a bare "cuda" becomes this rank's own GPU. Raises UserError for a device that is not there, or not one for
    each process of this machine.
    """
    if flag in (None, "auto"):
        flag = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(flag)
    except RuntimeError:
        raise UserError(f"--device {flag}: not a device; use auto, cpu, cuda, cuda:N or mps", exit_code=2) from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {flag}: not supported; use auto, cpu, cuda, cuda:N or mps", exit_code=2)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > 1 and (device.type == "mps" or (device.type == "cuda" and device.index is not None)):
        raise UserError(f"--device {flag}: is one device for {processes} processes; use --device cuda or --device cpu")
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if 0 < found < processes:
            way_out = f"start at most {found}, or give --device cpu"
            raise UserError(
                f"--nproc_per_node {processes}: a process needs a GPU of its own, here are {found}; {way_out}"
            )
        if index >= found:
            raise UserError(f"--device {flag}: {found} CUDA devices found; use --device cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available here; use --device cpu")
    return device


def select_dtype(flag, device):
    """The torch.dtype that --dtype means: "auto" takes bfloat16 where the hardware multiplies it, else float16 on CUDA
    and float32 elsewhere.

    Raises UserError for bfloat16 on a CUDA device older than Ampere.
    """
    native = multiplies_bfloat16(device)
    if flag in (None, "auto"):
        return torch.bfloat16 if native else torch.float16 if device.type == "cuda" else torch.float32
    if flag not in DTYPES:
        raise UserError(f"--dtype {flag}: choose one of auto, {', '.join(DTYPES)}", exit_code=2)
    if flag == "bfloat16" and device.type == "cuda" and not native:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--dtype bfloat16: {name} has no bfloat16 units; use --dtype float16")
    return DTYPES[flag]


def multiplies_bfloat16(device):
    """Whether `device` has units for bfloat16. A CPU without them emulates it, several times slower than float32: oneDNN
    offers bfloat16 on any x86 with AVX-512, so there the instructions themselves are asked for."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_int8(device):
    """Raise UserError when weights of 8 bits could not be multiplied, or not faster, on `device`."""
    if device.type != "cpu":
        raise UserError(
            f"--dtype int8: is for a CPU, not for {device.type}; use --dtype auto, or --device cpu", exit_code=2
        )
    if not multiplies_bfloat16(device):
        raise UserError("--dtype int8: needs a CPU that multiplies bfloat16, this one does not; use --dtype float32")


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


def peak_memory(device):
    """Most bytes held at once so far: by torch on a CUDA device, else by the whole process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory.peak_memory()
