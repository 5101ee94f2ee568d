"""The ranks of a run: the same code for one process and under torchrun."""

import datetime
import gc
import os

import torch
import torch.distributed as dist

from model.errors import UserError, say

# How long a rank waits for the others once all have come. One may be at work alone for long, tokenising on a machine of its
# own for one; a process that ends is noticed at once: its connections close, and its launcher ends the rest.
LONGEST_WAIT = datetime.timedelta(minutes=30)


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
    """say, on the main rank alone."""
    if is_main():
        say(text)


def initialise(device, timeout=60):
    """Join the process group when torchrun (or anything else that sets WORLD_SIZE above 1) started several ranks.

    Gradients travel by NCCL where they lie on GPUs; the few numbers that the loop counts with are on the host and go by
    gloo, so that no rank waits for its GPU to learn them. Raises UserError when the others do not come within `timeout`
    seconds, or there is no place to meet them.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        store, rank, size = meet(datetime.timedelta(seconds=timeout))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT)


def meet(timeout):
    """(store, rank, world size) once all ranks have come to the store at MASTER_ADDR and MASTER_PORT; for UserErrors see
    initialise."""
    place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    limit = f"within {timeout.total_seconds():g} s (--rendezvous_timeout)"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        arrivals = [f"arrived/{rank}" for rank in range(size)]
        store.set(arrivals[rank], "")
        store.wait(arrivals, timeout)
    except ValueError as error:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {error}; start with torchrun") from None
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(f"MASTER_PORT: {place} is in use; choose another port") from None
        raise UserError(
            f"no process of rank 0 at {place} {limit}; start it, or see whether a firewall is between"
        ) from None
    except dist.DistStoreError:
        raise UserError(
            f"not all {os.environ['WORLD_SIZE']} processes came to {place} {limit}; start the others"
        ) from None
    store.set_timeout(LONGEST_WAIT)
    return store, rank, size


def shut_down():
    """Leave the process group. DDP with gloo aborts the interpreter at exit in about one run of five unless its
    reducers are collected first, so drop every reference to the wrapped model before."""
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def sum_over_ranks(values):
    """Element-wise float64 sum of a list of numbers over all ranks, as a list of floats."""
    total = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def on_main(action):
    """Run action() on the main rank. Where it raises UserError every rank does, so that none waits for the others; only
    the main one's says why."""
    error = None
    if is_main():
        try:
            action()
        except UserError as problem:
            error = problem
    if any(sum_over_ranks([error is not None])):
        raise error or UserError("")


def gather(value):
    """A list of every rank's `value` (tensors and plain values), on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values
