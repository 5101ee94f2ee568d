"""The ranks of a run: the same code for one process and under torchrun."""

import datetime
import gc
import os
import socket
import time

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
        store, rank, size = meet(timeout)
        dist.init_process_group(backend(device), store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT)


def backend(device):
    """How ranks talk: of what lies on GPUs by NCCL, of what lies on the host by gloo."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def meet(timeout):
    """(store, rank, world_size) once all ranks have come to the store at MASTER_ADDR and MASTER_PORT, within `timeout` seconds;
    for UserErrors see initialise."""
    size, limit = os.environ["WORLD_SIZE"], f"within {timeout:g} s (--rendezvous_timeout)"
    try:
        address, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["RANK"])
    except (KeyError, ValueError) as error:
        problem = f"MASTER_ADDR, MASTER_PORT or RANK is missing or wrong ({error})"
        raise UserError(f"WORLD_SIZE is {size}, and {problem}; torchrun sets them all") from None
    end, patience = time.monotonic() + timeout, datetime.timedelta(seconds=timeout)
    while rank and not listens(address, port):  # torch itself would try for several times its limit
        if time.monotonic() > end:
            raise UserError(
                f"no process of rank 0 at {address}:{port} {limit}; start it, or look for a firewall between"
            )
        time.sleep(0.2)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=patience))
        arrivals = [f"arrived/{rank}" for rank in range(size)]
        store.set(arrivals[rank], "")
        store.wait(arrivals, patience)
    except dist.DistNetworkError as error:
        if rank == 0 and "EADDRINUSE" in str(error):
            raise UserError(f"MASTER_PORT {port} is in use on this machine; choose another") from None
        raise UserError(f"{address}:{port} is no place where processes meet ({error}); choose another port") from None
    except dist.DistStoreError:
        raise UserError(f"not all {size} processes came to {address}:{port} {limit}; start the others") from None
    store.set_timeout(LONGEST_WAIT)
    return store, rank, size


def listens(address, port):
    """Whether anything accepts connections there."""
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


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


def on_all(action):
    """What action() gives on this rank. Where it raises UserError on one of them every rank does, so that none waits for the
    others; only the first of those says why."""
    result = error = None
    try:
        result = action()
    except UserError as problem:
        error = problem
    failed = sum_over_ranks([error is not None and number == rank() for number in range(world_size())])
    if any(failed):
        raise error if error and not any(failed[: rank()]) else UserError("")
    return result


def on_main(action):
    """on_all of an action of the main rank alone."""
    on_all(lambda: action() if is_main() else None)


def gather(value):
    """A list of every rank's `value` (tensors and plain values), on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def check_same_data(*fingerprints):
    """UserError on every rank, of which the main one says why, unless all of them read the same data."""
    found = gather((socket.gethostname(), fingerprints))
    other = next((number for number, (_, theirs) in enumerate(found) if theirs != found[0][1]), None)
    if other is not None:
        what = f"rank {other} on {found[other][0]} found other rows than rank 0 on {found[0][0]}: files are missing or differ"
        way_out = "put the same ones on every machine, or on storage that all of them share"
        raise UserError(f"--data_path: {what}; {way_out}" if is_main() else "")
