"""What a training run reports: lines on the terminal, a .jsonl file, Weights & Biases on request."""

import json
import netrc
import os
import sys

from tqdm import tqdm

from model.errors import UserError
from model.files import atomic_write


class RunLog:
    """One run's reports. Only the main rank constructs one with active=True; on the others every call does nothing.

    path: .jsonl file, one object a line, each with its "step". A fresh run (first_step 0) replaces it; a resumed one
    keeps the lines up to its first step, so that no step appears twice after a kill.
    """

    def __init__(self, path, first_step, total_steps, wandb_run=None, active=True):
        self.path, self.active, self.wandb_run = path, active, wandb_run
        self.bar = None
        if not active:
            return
        kept = path.read_text(encoding="utf-8").splitlines() if first_step and path.exists() else []
        with atomic_write(path, "w", encoding="utf-8") as handle:
            handle.writelines(line + "\n" for line in kept if step_of(line) <= first_step)
        # disable=None: no bar where stderr is not a terminal.
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=None, dynamic_ncols=True)

    def advance(self):
        """One optimizer step is done."""
        if self.active:
            self.bar.update()

    def write(self, text, **record):
        """Show `text`, append `record` (with its step) to the file, send its numbers to Weights & Biases."""
        if not self.active:
            return
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")
        if self.wandb_run is not None:
            numbers = {
                name: value for name, value in record.items() if isinstance(value, (int, float)) and name != "step"
            }
            self.wandb_run.log(numbers, step=record["step"])

    def close(self):
        if self.active:
            self.bar.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def step_of(line):
    """The step of one line of the file; a line torn by a kill counts as later than any step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def start_wandb(args, run_name, config):
    """A Weights & Biases run, offline (folder wandb/) when no key is known and WANDB_MODE does not say otherwise."""
    try:
        import wandb
    except ImportError:
        raise UserError("--use_wandb: wandb is not installed; pip install wandb, or leave the flag out") from None
    mode = os.environ.get("WANDB_MODE") or ("online" if knows_wandb_key() else "offline")
    name = args.wandb_run_name or run_name
    return wandb.init(project=args.wandb_project, name=name, config=config, mode=mode)


def knows_wandb_key():
    """Whether `wandb login` was run or WANDB_API_KEY set. (Without a key wandb.init asks, or ends the script.)"""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def duration(seconds):
    """1:02:03 for 3723 seconds."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
