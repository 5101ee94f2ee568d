"""From an empty folder to a model that answers, in minutes on two CPU cores: what `make quickstart` runs.

Every step is a command of this repository, printed before it runs, so that each can be repeated and changed by hand.
Everything lands in its own folders (dataset/demo, out/quickstart): real data and checkpoints beside them stay untouched.
The last line is one JSON object.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from model.cli import UserError, run_main

DATA, OUT = Path("dataset/demo"), Path("out/quickstart")
MODEL = "--preset minimind-tiny --optimizer muon"
STEPS = f"--eval_interval 1000 --save_interval 1000 --out_dir {OUT}"
# Stage -> its command. Small batches: with few tokens to see, more steps teach more than smoother ones.
STAGES = {
    "pretrain": f"1-pretrain.py --data_path {DATA}/pretrain_data.csv {MODEL} --learning_rate 3e-3 --epochs 1",
    "single": f"3-full_sft.py --data_path {DATA}/sft_data_single.csv {MODEL} --learning_rate 2e-3 --epochs 2",
    "multi": f"3-full_sft.py --multi --data_path {DATA}/sft_data.csv {MODEL} --learning_rate 1.2e-3 --epochs 2",
}
BATCH = {"pretrain": "--batch_size 8 --max_seq_len 256", "single": "--batch_size 32", "multi": "--batch_size 16"}


def run(command):
    """Run one of the repository's scripts; a failed one ends everything with its own message. Returns its seconds."""
    print(f"\n$ python {command}", flush=True)
    began = time.time()
    code = subprocess.call([sys.executable, *shlex.split(command)])
    if code:
        raise UserError(f"stopped: python {command}", exit_code=code if code > 0 else 128 - code)
    return time.time() - began


def accuracy(checkpoint, test):
    """Share of a held-out test's questions that `checkpoint` answers right."""
    command = f"2-eval.py --checkpoint {checkpoint} --prompt_file {DATA}/heldout/{test}.jsonl --json"
    print(f"\n$ python {command}", flush=True)
    process = subprocess.run([sys.executable, *shlex.split(command)], stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise UserError(f"stopped: python {command}", exit_code=process.returncode)
    print("\n".join(process.stdout.splitlines()[-8:-1]), flush=True)
    return json.loads(process.stdout.splitlines()[-1])["accuracy"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    os.chdir(Path(__file__).resolve().parent)
    started = float(os.environ.get("QUICKSTART_STARTED") or time.time())  # make's: the installation counts too

    run(f"data_process.py demo --output_dir {DATA}")
    seconds = {stage: run(f"{command} {BATCH[stage]} {STEPS}") for stage, command in STAGES.items()}
    files = {"pretrain": "pretrain_192", "single": "single_chat/full_sft_192", "multi": "multi_chat/full_sft_192"}
    records = {stage: json.loads((OUT / f"{name}.json").read_text("utf-8")) for stage, name in files.items()}
    tokens = sum(record["tokens_seen"] for record in records.values())

    chat = OUT / f"{files['multi']}.pth"
    single = {test: accuracy(OUT / f"{files['single']}.pth", test) for test in ("facts", "multi_turn")}
    final = {test: accuracy(chat, test) for test in ("facts", "arithmetic", "multi_turn")}
    run(f"2-eval.py --checkpoint {chat} --temperature 0")
    print(f"\nafter single-turn SFT: facts {single['facts']:.1%}, multi-turn {single['multi_turn']:.1%};", end=" ")
    print(f"after multi-turn SFT: facts {final['facts']:.1%}, multi-turn {final['multi_turn']:.1%}")
    print(f"talk to it:  .venv/bin/python 2-eval.py --checkpoint {chat} --interactive\n")
    result = {
        "facts_heldout_accuracy": round(final["facts"], 4),
        "multi_turn_accuracy": round(final["multi_turn"], 4),
        "pretrain_val_bpb": round(records["pretrain"]["validation_bits_per_byte"], 4),
        "seconds_train": round(sum(seconds.values()), 1),
        "seconds_total": round(time.time() - started, 1),
        "tokens_per_second": round(tokens / sum(seconds.values())),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
