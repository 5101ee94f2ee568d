"""What --resume restores besides weights, and which settings may not change under it."""

import random
import signal
import sys

import numpy
import torch

from model.errors import UserError, warn
from model.training import ranks

STEPS_FLAG = "--epochs or --max_steps"


def seed_generators(seed):
    """Start every random generator that training draws from, each rank from its own number."""
    seed += ranks.rank()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device):
    """The state of every random generator that training draws from, as tensors and plain values."""
    name, keys, *position = numpy.random.get_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *position),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def restore_random_state(state, device):
    """Undo what happened to the generators since random_state."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def trajectory(trainer, data, identity):
    """({flag: value} that --resume must not change, {flag: value} that changes the course and gets a warning).

    data: fingerprint of the training rows. identity: further {flag: value} that decide what is learned from them.
    """
    settings, config = trainer.settings, trainer.model.config
    fixed = {
        "--data_path (its contents)": data,
        "--tokenizer_path (its contents)": trainer.tokenizer_hash,
        "--max_seq_len": config.max_seq_len,
        "the number of processes": ranks.world_size(),
        **{f"--{name}": getattr(settings, name) for name in ("batch_size", "accumulation_steps", "seed", "optimizer")},
        **identity,
    }
    free = {f"--{name}": getattr(settings, name) for name in ("learning_rate", "weight_decay", "grad_clip", "compile")}
    free.update({"--warmup_iters": trainer.warmup_steps, STEPS_FLAG: f"{trainer.total_steps} steps"})
    free.update({"--dropout": config.dropout, "--dtype": str(trainer.dtype), "--device": trainer.device.type})
    if settings.optimizer == "muon":
        free["--muon_learning_rate"] = settings.muon_learning_rate
    return fixed, free


def check_trajectory(saved, own):
    """UserError for a changed flag that must not change, a warning for one that bends the course."""
    for changes_meaning, was, now in zip((True, False), saved, own, strict=True):
        for flag in was.keys() | now.keys():
            old, new = was.get(flag), now.get(flag)
            if old != new and changes_meaning:
                raise UserError(f"--resume: {flag} was {old} and is {new} now; give the old one or omit --resume")
            if old != new:
                effect = "the run goes on differently than it began"
                if flag == STEPS_FLAG:
                    effect = f"the schedule of the earlier steps ended there, so {effect} (--stop_after keeps it)"
                warn(f"--resume: {flag} was {old} and is {new} now; {effect}")


class StopRequest:
    """Context in which the first SIGINT or SIGTERM only sets `requested`; a second one acts as usual."""

    requested, previous = False, {}

    def __enter__(self):
        self.requested = False
        self.previous = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.requested = True
        self.restore()
        print(f"{signal.Signals(number).name}: finishing this step, then saving", file=sys.stderr)

    def restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception):
        self.restore()
