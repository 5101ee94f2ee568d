"""What more processes bring: tokens per second of one process and of several that share the rows of a step.

    python benchmarks/scaling.py                                             # 2 processes on 2 CPU cores
    python benchmarks/scaling.py --preset minimind-v1-small --batch_size 64 --processes 8      # on 8 GPUs

On CPUs each process has one thread, and one process with as many threads stands beside them: the same cores, without
messages. A step is what the loop does: forward, backward, gradient norm, fused AdamW, and what the ranks tell each other.
Every second step of several processes leaves that out; the difference of the medians is what DDP costs a step, and what ZeRO 2
does where DeepSpeed is installed, whose steps are measured in a run of their own. The last line is JSON.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from decoding import cpu_name  # noqa: E402

from model.cli import positive_int  # noqa: E402
from model.errors import UserError, run_main  # noqa: E402


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="minimind-tiny", help="default: %(default)s")
    parser.add_argument("--processes", type=positive_int, default=2, help="default: %(default)s")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="rows of a step, all (default: %(default)s)")
    parser.add_argument("--max_seq_len", type=positive_int, default=512, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=10, help="measured steps (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    return parser.parse_args()


def make_step(args):
    """(function step(together), which trains the model by one step of this rank's rows, together: with the other ranks;
    what the last line says of the machine)."""
    import torch

    from model.device import autocast, select_dtype
    from model.LMConfig import preset_config
    from model.model import Transformer
    from model.settings import TrainingSettings
    from model.training import ranks
    from model.training.loop import language_model_loss, start
    from model.training.strategy import DataParallel

    zero = dict(deepspeed="auto", zero_stage=2) if os.environ["MINIMIND_MEASURES"] == "ZeRO 2" else {}
    settings = TrainingSettings(device=args.device, batch_size=args.batch_size, **zero)
    device = start(settings)
    if args.batch_size % ranks.world_size():
        raise UserError(
            f"--batch_size {args.batch_size}: is no multiple of --processes {ranks.world_size()}", exit_code=2
        )
    dtype, rows = select_dtype(args.dtype, device), args.batch_size // ranks.world_size()
    try:
        model = Transformer(preset_config(args.preset, max_seq_len=args.max_seq_len)).to(device).train()
    except ValueError as error:
        raise UserError(f"--preset: {error}", exit_code=2) from None
    strategy, settings = DataParallel, settings.resolved(device, 1)
    if zero:
        from model.training.deepspeed import ZeRO as strategy
    strategy = strategy(model, settings, device, dtype)
    ids = torch.randint(0, model.config.vocab_size, (rows, args.max_seq_len), device=device)
    batch, items = (
        dict(input_ids=ids, labels=ids),
        torch.tensor(float(args.batch_size * args.max_seq_len), device=device),
    )

    def step(together):
        if together:
            ranks.sum_over_ranks([0.0] * 7)  # the loop's counts
        with strategy.micro_batch(last=together):
            with autocast(device, dtype):
                loss, aux_loss = language_model_loss(strategy.runner, batch, items)
            strategy.backward(loss + aux_loss / ranks.world_size())
        norm = strategy.gradient_norm()
        numbers = torch.stack((loss.detach(), norm)).tolist()
        if together:
            ranks.sum_over_ranks(numbers)
        strategy.clip(norm, 1.0)
        strategy.step(1.0)

    return step, {"device": str(device.type), "dtype": str(dtype).removeprefix("torch.")}


def measure(args):
    """One rank's part: take turns with and without the others; the main rank prints its numbers as JSON."""
    step, machine = make_step(args)
    seconds, always = {True: [], False: [0.0]}, os.environ["MINIMIND_MEASURES"] == "ZeRO 2"
    for turn in range(2 * args.steps + 4):
        together = always or turn % 2 == 0
        began = time.perf_counter()
        step(together)
        if turn >= 4:
            seconds[together].append(time.perf_counter() - began)
    if os.environ.get("RANK", "0") == "0":
        print(
            json.dumps(
                {**machine, "together": statistics.median(seconds[True]), "alone": statistics.median(seconds[False])}
            )
        )


def run_ranks(processes, threads, what="DDP"):
    """What `processes` ranks of this script measure, each with so many threads. what: "DDP" or "ZeRO 2"."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MINIMIND_MEASURES": what}
    finished = subprocess.run([*command, *sys.argv], env=environment, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        raise UserError("one of the processes failed; its error stands above")
    return json.loads(finished.stdout.splitlines()[-1])


def main():
    args = parse_arguments()
    if "MINIMIND_MEASURES" in os.environ:
        return measure(args)
    runs = {"1 process": (1, 1), f"{args.processes} processes": (args.processes, 1)}
    results = {name: run_ranks(*run) for name, run in runs.items()}
    if results["1 process"]["device"] == "cpu":
        name = f"1 process, {args.processes} threads"
        results[name] = run_ranks(1, args.processes)
    tokens = args.batch_size * args.max_seq_len
    rates = {name: tokens / result["together"] for name, result in results.items()}
    for name, rate in rates.items():
        print(f"{name:22s} {rate:12,.0f} tokens/s")
    several = results[f"{args.processes} processes"]
    seconds = {"ddp": several["together"]}
    if args.processes > 1 and importlib.util.find_spec("deepspeed"):
        seconds["zero2"] = run_ranks(args.processes, 1, "ZeRO 2")["together"]
    overheads = {}
    for name, whole in seconds.items():
        overhead = whole - several["alone"]
        overheads |= {
            f"{name}_overhead_ms": round(1000 * overhead, 2),
            f"{name}_overhead_share": round(overhead / whole, 4),
        }
        print(f"{name} costs a step {1000 * overhead:.1f} ms of {1000 * whole:.1f}")
    result = {
        "processor": cpu_name(args.processes),
        "preset": args.preset,
        **{name: several[name] for name in ("device", "dtype")},
        "tokens_per_step": tokens,
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        **overheads,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
