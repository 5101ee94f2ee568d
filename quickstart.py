"""From an empty folder to a model that answers, in minutes on two CPU cores: what `make quickstart` runs.

Every step is a command of this repository, printed before it runs, so that each can be repeated and changed by hand.
Everything lands in its own folders (dataset/demo, out/quickstart): real data and checkpoints beside them stay untouched.
The last line is one JSON object.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from model.cli import positive_int, script_parser
from model.errors import UserError, run_main
from model.stages import STAGES

MODEL = "--preset minimind-tiny --optimizer muon"
# Stage -> what it is trained with. Small batches: with few tokens to see, more steps teach more than smoother ones. The
# last round learns slower, so that it forgets less of what the one before taught.
RECIPE = {
    "pretrain": "--learning_rate 3e-3 --epochs 1 --batch_size 8",
    "single_chat/full_sft": "--learning_rate 2e-3 --epochs 2 --batch_size 32",
    "multi_chat/full_sft": "--learning_rate 1.2e-3 --max_steps 460 --batch_size 16",
}


def run(command, stdout=None):
    """Run one of the repository's scripts; a failed one ends everything with its own message. Returns what it printed
    into `stdout`."""
    print(f"\n$ python {command}", flush=True)
    process = subprocess.run([sys.executable, *shlex.split(command)], stdout=stdout, text=True)
    if code := process.returncode:
        raise UserError(f"stopped: python {command}", exit_code=code if code > 0 else 128 - code)
    return process.stdout


def quoted(path):
    """A path as a word of a command, blanks and Windows' separators included."""
    return shlex.quote(path.as_posix())


def accuracy(checkpoint, test, max_steps):
    """Share of the held-out questions in the file `test` that `checkpoint` answers right; of 20 of them if max_steps."""
    if max_steps:
        few = test.with_name(f"few_{test.name}")
        few.write_text("".join(test.read_text("utf-8").splitlines(keepends=True)[:20]), "utf-8")
        test = few
    command = f"2-eval.py --checkpoint {quoted(checkpoint)} --prompt_file {quoted(test)} --json --max_new_tokens 48"
    *table, result = run(command, subprocess.PIPE).splitlines()
    print("\n".join(table), flush=True)
    return json.loads(result)["accuracy"]


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--data_dir", type=Path, default=Path("dataset/demo"), help="default: %(default)s")
    parser.add_argument("--out_dir", type=Path, default=Path("out/quickstart"), help="default: %(default)s")
    few = "stop each stage early and ask 20 questions a test: does every command work?"
    parser.add_argument("--max_steps", type=positive_int, help=few)
    args = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent)
    started = float(os.environ.get("QUICKSTART_STARTED") or time.time())  # make's: the installation counts too
    stop = f" --max_steps {args.max_steps}" if args.max_steps else ""

    run(f"data_process.py demo --output_dir {quoted(args.data_dir)}")
    began = time.time()
    for name, flags in RECIPE.items():
        data_path = quoted(args.data_dir / Path(STAGES[name].data_path).name)
        saving = f"--out_dir {quoted(args.out_dir)} --eval_interval 1000 --save_interval 1000"
        run(f"{STAGES[name].command} --data_path {data_path} {MODEL} {flags} {saving}{stop}")
    seconds = time.time() - began
    paths = {name: args.out_dir / f"{name}_192.pth" for name in RECIPE}
    records = {name: json.loads(path.with_suffix(".json").read_text("utf-8")) for name, path in paths.items()}
    tokens = sum(record["tokens_seen"] for record in records.values())
    _, single, chat = paths.values()

    tests = {name: args.data_dir / "heldout" / f"{name}.jsonl" for name in ("facts", "arithmetic", "multi_turn")}
    before = {name: accuracy(single, test, args.max_steps) for name, test in tests.items()}
    after = {name: accuracy(chat, test, args.max_steps) for name, test in tests.items()}
    run(f"2-eval.py --checkpoint {quoted(chat)} --temperature 0 --max_new_tokens 48")
    print(f"\n{'held-out accuracy':20s}{'single-turn SFT':>18s}{'multi-turn SFT':>18s}")
    for name in tests:
        print(f"{name:20s}{before[name]:18.1%}{after[name]:18.1%}")
    print(f"talk to it:  .venv/bin/python 2-eval.py --checkpoint {quoted(chat)} --interactive\n")
    result = {
        "facts_heldout_accuracy": round(after["facts"], 4),
        "multi_turn_accuracy": round(after["multi_turn"], 4),
        "pretrain_val_bpb": round(records["pretrain"]["validation_bits_per_byte"], 4),
        "seconds_train": round(seconds, 1),
        "seconds_total": round(time.time() - started, 1),
        "tokens_per_second": round(tokens / seconds),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
