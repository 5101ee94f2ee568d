"""How fast a recipe learns: bits per byte of held-out text after so many seconds of training.

    python benchmarks/recipe.py --data_path corpus.jsonl                       # the original's recipe against the defaults
    python benchmarks/recipe.py --data_path corpus.jsonl --search --seconds 34 # each choice of the defaults undone, alone
    python benchmarks/recipe.py --data_path sft.jsonl --search --stage single_chat/full_sft --init_from pretrain_256.pth

The first trains one model by the original's recipe, written as flags of 1-pretrain.py (ORIGINAL, below), for --seconds, and
the same one by the defaults for a sixteenth of that. It differs from the original in one thing that helps it: its rows are
packed, where the original's were padded to 512 tokens. --search trains once for each row of its table and each of --seeds,
--jobs at a time with an equal share of the cores each, so equally disturbed ones. Seconds are those that --max_minutes
counts: without start-up and validation. The last line is JSON.
"""

import argparse
import concurrent.futures
import json
import os
import runpy
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from decoding import cpu_name  # noqa: E402

from model.cli import positive_int  # noqa: E402
from model.errors import UserError, run_main  # noqa: E402
from model.settings import RATE_TIMES_WIDTH, SFT_RATE_TIMES_WIDTH  # noqa: E402
from model.stages import STAGES  # noqa: E402

ORIGINAL = (
    "--dtype float32 --optimizer adamw --learning_rate 2e-4 --embedding_rate_factor 1 --beta2 0.999 --weight_decay 0 "
    "--schedule cosine --warmup_iters 0 --batch_size 8 --accumulation_steps 1 --short_rows_share 0"
)
# What is tried -> what it changes in the defaults: flags, with {half} and {double} the default rate and {adamw} 1 / dim, or
# after "try" one of the ALTERNATIVES, which are worth no flag.
SEARCH = {
    "pretrain": {
        "defaults": "",
        "the original's": ORIGINAL,
        # The road from the one to the other, each with what those above it changed.
        "+ bfloat16": ORIGINAL.replace("--dtype float32 ", ""),
        "+ the default's rate, warm-up, weight decay, beta2": "--optimizer adamw --embedding_rate_factor 1 "
        "--schedule cosine --short_rows_share 0",
        "+ Muon": "--embedding_rate_factor 1 --schedule cosine --short_rows_share 0",
        "+ linear to zero": "--embedding_rate_factor 1 --short_rows_share 0",
        "+ embedding ten times as fast": "--short_rows_share 0",
        # Each alone.
        "AdamW, tuned": "--optimizer adamw --learning_rate {adamw} --embedding_rate_factor 1.5 --batch_size 4",
        "rates halved": "--learning_rate {half}",
        "rates doubled": "--learning_rate {double}",
        "embedding as slow as the rest": "--embedding_rate_factor 1",
        "embedding twice as fast": "--embedding_rate_factor 20",
        "cosine to a tenth": "--schedule cosine",
        "steady, then linear in the last 40 %": "--decay_share 0.4",
        "no decay": "--decay_share 0",
        "no warm-up": "--warmup_iters 0",
        "4 rows": "--batch_size 4",
        "16 rows": "--batch_size 16",
        "short rows for half of the run": "--short_rows_share 0.5",
        "beta1 0.95": "--beta1 0.95",
        "beta2 0.99": "--beta2 0.99",
        "no weight decay": "--weight_decay 0",
        "no clipping": "--grad_clip 0",
        "z-loss of 1e-4": "try z_loss",
        "zeros in wo and w2": "try zero_init",
        "average of the last weights": "try average",
        "short documents first": "try short_first",
    },
    "single_chat/full_sft": {
        "defaults": "",
        "the original's": "--optimizer adamw --learning_rate 1e-4 --embedding_rate_factor 1 --weight_decay 0 "
        "--schedule cosine --warmup_iters 0 --dtype float32",
        "rates halved": "--learning_rate {half}",
        "rates doubled": "--learning_rate {double}",
        "AdamW": "--optimizer adamw",
        "embedding as slow as the rest": "--embedding_rate_factor 1",
        "embedding ten times as fast": "--embedding_rate_factor 10",
        "4 rows": "--batch_size 4",
        "16 rows": "--batch_size 16",
        "cosine to a tenth": "--schedule cosine",
        "no decay": "--decay_share 0",
    },
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="training rows of the stage; one in a hundred is held out")
    parser.add_argument("--seconds", type=float, default=540.0, help="of training (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=16.0, help="the defaults get --seconds / RATIO (default: 16)")
    parser.add_argument("--dim", type=positive_int, default=256, help="default: %(default)s")
    parser.add_argument("--n_layers", type=positive_int, default=6, help="default: %(default)s")
    parser.add_argument(
        "--eval_tokens", type=positive_int, default=100_000, help="held-out tokens (default: %(default)s)"
    )
    parser.add_argument("--search", action="store_true", help="the table instead of the comparison")
    parser.add_argument(
        "--padding", action="store_true", help="how much of fine-tuning's batches is padding; no training"
    )
    parser.add_argument("--stage", choices=SEARCH, default="pretrain", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows of the table, by any part of their names")
    parser.add_argument("--init_from", help="weights to start from, which --stage single_chat/full_sft needs")
    parser.add_argument("--seeds", type=positive_int, default=3, help="runs of each row (default: %(default)s)")
    parser.add_argument("--jobs", type=positive_int, default=2, help="runs at a time (default: %(default)s)")
    return parser.parse_args()


# ---- one run


def train(args, changes, limit, seed, out_dir, threads=None):
    """Train once, within `limit`, a flag, in a process of its own; returns {bits_per_byte, tokens, steps, seconds}."""
    script = STAGES[args.stage].command
    command = f"{script} --data_path {shlex.quote(args.data_path)} {limit} --seed {seed} "
    command += f"--eval_tokens {args.eval_tokens} --eval_interval 1000000 --save_interval 1000000 --out_dir {out_dir} "
    shape = f"--dim {args.dim} --n_layers {args.n_layers}"
    command += f"--init_from {shlex.quote(args.init_from)}" if args.init_from else shape
    _, _, name = changes.partition("try ")
    command = f"benchmarks/recipe.py try {name} {command}" if name else f"{command} {changes}"
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    words = [sys.executable, *shlex.split(command)]
    process = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if process.returncode:
        line = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"python {command}: {line.removeprefix('error: ')}")
    (path,) = (path for path in Path(out_dir).rglob("*.json"))
    record = json.loads(path.read_text("utf-8"))
    result = dict(bits_per_byte=record["validation_bits_per_byte"], tokens=record["tokens_seen"], steps=record["step"])
    return {**result, "seconds": round(record["train_seconds"], 1)}


def minutes(seconds):
    return f"--max_minutes {seconds / 60}"


def run_changed(name, script, *words):
    """Run a stage's script in this process, its Trainer changed by one of the ALTERNATIVES before it trains."""
    from model.training.loop import Trainer

    plain_train = Trainer.train

    def changed_train(trainer):
        ALTERNATIVES[name](trainer)
        return plain_train(trainer)

    Trainer.train = changed_train
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


# ---- what was tried and is worth no flag


def z_loss(trainer):
    """1e-4 times the mean square of log Z keeps logits small (Chowdhery et al. 2022, arXiv 2204.02311, section 5)."""

    def loss_function(model, batch, num_items):
        output = model(**batch, num_items_in_batch=num_items, padding_side="right")
        log_z = output.logits[:, :-1].float().logsumexp(dim=-1)[batch["labels"][:, 1:] != -100]
        penalty = 1e-4 * log_z.square().sum() / num_items if model.training else 0.0
        return output.loss + penalty, output.aux_loss

    trainer.loss_function = loss_function


def zero_init(trainer):
    """Layers begin as if they were not there."""
    for layer in trainer.model.layers:
        layer.attention.wo.weight.data.zero_()
        layer.feed_forward.w2.weight.data.zero_()


def average(trainer):
    """Validate the running mean of the weights of the last half, each step counting for a fiftieth."""
    import torch

    weights, mean, step, validate = list(trainer.model.parameters()), [], trainer.strategy.step, trainer.validate

    def averaging_step(factor, skip=False):
        step(factor, skip)
        if trainer.schedule.progress(trainer.state.step, trainer.state.train_seconds) > 0.5:
            if not mean:
                mean.extend(weight.detach().clone() for weight in weights)
            torch._foreach_lerp_(mean, [weight.detach() for weight in weights], 0.02)

    def validate_mean():
        for weight, value in zip(weights, mean):
            weight.data.copy_(value)
        validate()

    trainer.strategy.step, trainer.validate = averaging_step, validate_mean


def short_first(trainer):
    """Rows in order of the mean length of the documents they hold."""
    import numpy as np

    loader = trainer.train_loader
    ends = loader.dataset.cache.document_ends
    stop = int(loader.dataset.cache.tokens[int(ends[-1]) - 1])
    documents = np.array(
        [int((loader.dataset[[row]]["input_ids"] == stop).sum()) for row in range(len(loader.dataset))]
    )
    generator = np.random.default_rng(trainer.settings.seed)
    order = np.argsort(-documents + generator.random(len(documents)), kind="stable")
    loader.sampler.order = lambda epoch: order


ALTERNATIVES = {function.__name__: function for function in (z_loss, zero_init, average, short_first)}


# ---- tables


def padding(args):
    """Share of padding in the batches of a fine-tuning stage as they are made, of rows of like length, and of rows in random
    order: what packing several conversations into a row could save."""
    import numpy as np

    from model.data.dataset import open_sft_data
    from model.data.loader import ResumableSampler
    from model.tokenizer import load_tokenizer

    rows, _ = open_sft_data(args.data_path, load_tokenizer(None, args.init_from), max_seq_len=512)
    result = {"rows": len(rows), "tokens_per_row": round(float(rows.lengths.mean()), 1)}
    for size in (8, 16, 64):
        batches = list(ResumableSampler(len(rows), size, lengths=rows.lengths).batches())
        order = np.random.default_rng(0).permutation(len(rows))
        random = np.array_split(order, len(batches))
        widths = [sum(rows[batch]["input_ids"].numel() for batch in some) for some in (batches, random)]
        like, mixed = (1 - rows.num_tokens / width for width in widths)
        print(f"batches of {size:2d} rows: {like:.1%} padding; in random order {mixed:.1%}")
        result[f"padding_{size}"], result[f"padding_random_{size}"] = round(like, 4), round(mixed, 4)
    return result


def search(args):
    """The table of SEARCH[args.stage], printed; returns it as {row: numbers}."""
    rate = (RATE_TIMES_WIDTH if args.stage == "pretrain" else SFT_RATE_TIMES_WIDTH) / args.dim
    wanted = {
        name: changes.format(half=f"{rate / 2:.2g}", double=f"{2 * rate:.2g}", adamw=f"{1 / args.dim:.2g}")
        for name, changes in SEARCH[args.stage].items()
        if not args.only or any(part in name for part in args.only)
    }
    if not wanted:
        raise UserError(f"--only: no row of that name; there are {', '.join(SEARCH[args.stage])}", exit_code=2)
    seeds = range(1, args.seeds + 1)
    threads = max(1, (os.cpu_count() or 1) // args.jobs) if args.jobs > 1 else None
    table = {}
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        first = pool.submit(
            train, args, "", "--max_steps 1", 1, f"{folder}/first", threads
        )  # which makes the token cache
        first.result()
        runs = {
            name: [
                pool.submit(train, args, changes, minutes(args.seconds), seed, f"{folder}/{index}-{seed}", threads)
                for seed in seeds
            ]
            for index, (name, changes) in enumerate(wanted.items())
        }
        print(
            "| what is changed | flags | tokens | bits per byte | against the first | each seed |\n|---|---|---:|---:|---:|---|"
        )
        for name, futures in runs.items():
            results = [future.result() for future in futures]
            bits = [round(result["bits_per_byte"], 4) for result in results]
            tokens = round(statistics.mean(result["tokens"] for result in results))
            table[name] = dict(flags=wanted[name], tokens=tokens, bits_per_byte=bits)
            # A seed decides too which documents are held out, so runs of the same seed are what can be compared.
            against = [own - first for own, first in zip(bits, next(iter(table.values()))["bits_per_byte"])]
            flags, each = f"`{wanted[name]}`" if wanted[name] else "", ", ".join(f"{value:+.3f}" for value in against)
            numbers = f"{tokens:,} | {statistics.mean(bits):.3f} | {statistics.mean(against):+.3f} | {each}"
            print(f"| {name} | {flags} | {numbers} |", flush=True)
    return dict(stage=args.stage, seconds=args.seconds, seeds=args.seeds, jobs=args.jobs, table=table)


def compare(args):
    """The original's recipe for --seconds, the defaults for a part of that."""
    result = dict(seconds=args.seconds, ratio=args.ratio)
    with tempfile.TemporaryDirectory() as folder:
        train(args, "", "--max_steps 1", 1, f"{folder}/first")  # which makes the token cache
        recipes = {"defaults": ("", args.seconds / args.ratio), "original": (ORIGINAL, args.seconds)}
        for name, (changes, seconds) in recipes.items():
            result[name] = train(args, changes, minutes(seconds), 1, f"{folder}/{name}")
            numbers = "{seconds:,.1f} s  {steps:,} steps  {tokens:,} tokens  {bits_per_byte:.4f} bits per byte"
            print(f"{name:10s} {numbers.format(**result[name])}", flush=True)
    result["reached"] = result["defaults"]["bits_per_byte"] <= result["original"]["bits_per_byte"]
    return result


def main():
    args = parse_arguments()
    if args.stage != "pretrain" and not args.init_from and not args.padding:
        raise UserError("--stage single_chat/full_sft: needs --init_from, a pretrained checkpoint", exit_code=2)
    result = padding(args) if args.padding else search(args) if args.search else compare(args)
    import torch

    shape = dict(dim=args.dim, n_layers=args.n_layers)
    print(json.dumps({"device": cpu_name(torch.get_num_threads()), **shape, **result}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["try"]:
        run_changed(*sys.argv[2:])
    else:
        run_main(main)
