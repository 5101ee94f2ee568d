"""What a model costs before anything is bought: memory of each rank with ZeRO 0 to 3, hours, network and storage.

    python benchmarks/scale.py                                                         # 26M, 108M and a billion parameters
    python benchmarks/scale.py --shape 2048x24 --vocab_size 32000 --characters 1e12 --processes 8 64 --mfu 0.4
    python benchmarks/scale.py --preset minimind-v1-moe --batch_size 32

Weights, gradients and AdamW's moments follow from the number of parameters (float32, in 16-bit autocast with a copy of 2
bytes each; Rajbhandari et al. 2020, arXiv 1910.02054, section 3). What a token leaves behind for the backward pass is counted
on this machine: one block and the loss run on a few tokens, and all that autograd keeps is added up. Left out: what a kernel
needs for a moment, and fragmentation; allow a tenth more, and at least 1 GB. The last line is JSON.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.cli import positive_int  # noqa: E402
from model.errors import UserError, run_main  # noqa: E402

LETTERS_PER_TOKEN = 1.29  # of prose, by the tokenizer of 6,400 words (README)
UTF8 = 3  # bytes of a Chinese character


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--preset", nargs="+", help="named shapes")
    what.add_argument(
        "--shape", type=dim_and_layers, metavar="DIMxLAYERS", help="any shape, heads of 64 with two for each key head"
    )
    parser.add_argument("--vocab_size", type=positive_int, default=32000, help="of --shape (default: %(default)s)")
    parser.add_argument("--max_seq_len", type=positive_int, default=512, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--batch_size", type=positive_int, default=16, help="rows of a rank (default: %(default)s)")
    parser.add_argument("--processes", type=positive_int, nargs="+", default=[1, 8], help="default: 1 and 8")
    parser.add_argument("--characters", type=float, help="of the corpus (default: 20 tokens for each parameter)")
    parser.add_argument("--peak_tflops", type=float, default=989, help="of one GPU, dense, 16 bits (default: H100's)")
    parser.add_argument("--mfu", type=float, default=0.35, help="the part of it that is reached (default: %(default)s)")
    return parser.parse_args()


def dim_and_layers(text):
    """argparse type: (2048, 24) of "2048x24"."""
    numbers = re.fullmatch(r"(\d+)x(\d+)", text)
    if not numbers:
        raise argparse.ArgumentTypeError(f"expected DIMxLAYERS such as 2048x24, got {text}")
    return tuple(map(int, numbers.groups()))


def shapes(args):
    """{name: LMConfig} of what is asked for."""
    from model.LMConfig import LMConfig, preset_config

    try:
        if args.shape:
            dim, layers = args.shape
            heads = max(2, dim // 64)
            fields = dict(dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=heads // 2)
            return {f"{dim}x{layers}": LMConfig(**fields, vocab_size=args.vocab_size, max_seq_len=args.max_seq_len)}
        names = args.preset or ["minimind-v1-small", "minimind-v1"]
        found = {name: preset_config(name, max_seq_len=args.max_seq_len) for name in names}
        if not args.preset:
            fields = dict(dim=2048, n_layers=20, n_heads=32, n_kv_heads=16, vocab_size=args.vocab_size)
            found["2048x20"] = LMConfig(**fields, max_seq_len=args.max_seq_len)
        return found
    except ValueError as error:
        raise UserError(f"--shape, --preset: {error}", exit_code=2) from None


def costs(args, config):
    """What one shape costs, as main() prints it."""
    from model.training.costs import (
        FLOAT,
        HALF,
        activations,
        bytes_per_token,
        largest_piece,
        memory,
        meta_model,
        network,
    )
    from model.training.reports import count_parameters, flops_per_token

    model = meta_model(config)
    parameters, working = count_parameters(model)
    block, tokens = largest_piece(model), args.batch_size * args.max_seq_len
    kept = activations(config, tokens)
    plain, checkpointed = kept["blocks"] + kept["ends"], kept["inputs"] + kept["block"] + kept["ends"]
    corpus = args.characters / LETTERS_PER_TOKEN if args.characters else 20 * parameters
    seconds = corpus * flops_per_token(model, args.max_seq_len) / (args.peak_tflops * 1e12 * args.mfu)
    ranks = {}
    for processes in args.processes:
        ranks[processes] = dict(hours=round(seconds / 3600 / processes, 2))
        for stage in range(4):
            state = sum(memory(parameters, block, processes, stage).values())
            ranks[processes][f"zero{stage}"] = dict(
                state_gb=gigabytes(state), plain_gb=gigabytes(state + plain),
                checkpointing_gb=gigabytes(state + checkpointed), sent_gb=gigabytes(network(parameters, stage) * (processes > 1)),
            )  # fmt: skip
    storage = dict(
        text=corpus * LETTERS_PER_TOKEN * UTF8, tokens=corpus * (HALF if config.vocab_size <= 1 << 16 else FLOAT),
        checkpoint=FLOAT * parameters, training_state=3 * FLOAT * parameters,
    )  # fmt: skip
    return dict(
        parameters=parameters, working=working, tokens=corpus, kilobytes_per_token_and_block=round(bytes_per_token(config)[0] / 1e3, 1),
        ranks=ranks, storage_gb={name: gigabytes(size) for name, size in storage.items()},
    )  # fmt: skip


def gigabytes(size):
    return round(size / 1e9, 2)


def print_costs(args, name, cost):
    print(f"\n{name}: {cost['parameters']:,} parameters ({cost['working']:,} at work), {cost['tokens']:.3g} tokens")
    print("  storage: " + ", ".join(f"{what} {size:,} GB" for what, size in cost["storage_gb"].items()))
    rows = f"{args.batch_size} x {args.max_seq_len} tokens"
    for processes, ranks in cost["ranks"].items():
        hours = ranks["hours"]
        print(
            f"  {processes} GPUs, {hours:,} hours at {args.mfu:.0%} of {args.peak_tflops:g} TFLOP/s; GB of each rank:"
        )
        print(f"  {'ZeRO':6s}{'state':>10s}{'+ ' + rows:>24s}{'with checkpointing':>22s}{'sent a step':>14s}")
        for stage in range(4):
            values = ranks[f"zero{stage}"]
            columns = zip(("state_gb", "plain_gb", "checkpointing_gb", "sent_gb"), (10, 24, 22, 14))
            print(f"  {stage:<6d}" + "".join(f"{values[column]:>{width},}" for column, width in columns))


def main():
    args = parse_arguments()
    results = {}
    for name, config in shapes(args).items():
        results[name] = costs(args, config)
        print_costs(args, name, results[name])
    print(json.dumps(results))


if __name__ == "__main__":
    run_main(main)
