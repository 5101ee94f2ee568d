"""What --resume restores besides weights, and which settings may not change under it."""

import contextlib
import math
import os
import random
import signal
import time

import numpy
import torch

from model.checkpoint import CONFIG_FIELDS, FREE_FIELDS
from model.errors import UserError, tell, warn
from model.training import ranks

STEPS_FLAG = "--epochs or --max_steps (in steps)"
SCHEDULE_FLAGS = (STEPS_FLAG, "--max_minutes")
STEP_ROWS_FLAG = "the rows of a step (--batch_size x --accumulation_steps x processes)"
PASSED_ON = 3.0
MEMORY_FLAGS = ("--deepspeed", "--zero_stage", "--offload", "--fsdp", "--gradient_checkpointing")
FREE_FLAGS = (
    "learning_rate", "embedding_rate_factor", "schedule", "decay_share", "weight_decay", "beta1", "beta2", "grad_clip",
    "short_rows", "short_rows_share", "compile", "batch_size", "accumulation_steps", "max_minutes",
)  # fmt: skip
SPLIT_FLAGS = ("--batch_size", "--accumulation_steps", "the number of processes", *MEMORY_FLAGS)


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


def restore_random_states(states, device, seed):
    """Give this rank its own of the random_state of every rank; fresh generators where the ranks were others."""
    if len(states) == ranks.world_size():
        restore_random_state(states[ranks.rank()], device)
    else:
        seed_generators(seed)


def trajectory(trainer, data, identity):
    """({flag: value} that --resume must not change, {flag: value} that changes the course and gets a warning).

    data: fingerprint of the training rows. identity: further {flag: value} that decide what is learned from them.
    """
    settings, config, schedule = trainer.settings, trainer.model.config, trainer.schedule
    rows = settings.batch_size * settings.accumulation_steps * ranks.world_size()
    fixed = {
        "--data_path (its contents)": data,
        "--tokenizer_path (its contents)": trainer.tokenizer_hash,
        "--max_seq_len": config.max_seq_len,
        STEP_ROWS_FLAG: rows,
        **{f"--{name}": getattr(settings, name) for name in ("seed", "optimizer")},
        **{f"the model's {name}": getattr(config, name) for name in CONFIG_FIELDS if name not in FREE_FIELDS},
        **identity,
    }
    free = {f"--{name}": getattr(settings, name) for name in FREE_FLAGS}
    free.update({"--warmup_iters": schedule.warmup_steps, STEPS_FLAG: schedule.total_steps})
    free.update({"--dtype": str(trainer.dtype), "--device": trainer.device.type})
    free.update({f"the model's {name}": getattr(config, name) for name in FREE_FIELDS if name != "max_seq_len"})
    free["the number of processes"] = ranks.world_size()
    if settings.optimizer == "muon":
        free["--muon_learning_rate"] = settings.muon_learning_rate
    chosen = {flag: getattr(settings, flag.removeprefix("--")) for flag in MEMORY_FLAGS}
    free.update({flag: value for flag, value in chosen.items() if value not in (None, False)})  # older states know none
    return fixed, free


def check_trajectory(saved, own):
    """UserError for a changed flag that must not change, a warning for one that bends the course."""
    for changes_meaning, was, now in zip((True, False), saved, own, strict=True):
        for flag in {**was, **now}:  # in order: another --n_heads changes the head size too, and is what to name
            old, new = was.get(flag), now.get(flag)
            if old != new and changes_meaning:
                raise UserError(f"--resume: {flag} was {old} and is {new} now; give the old one or omit --resume")
            if old != new:
                effect = "the run goes on differently than it began"
                if flag in SPLIT_FLAGS:
                    effect = "the same rows in the same order, but rounded differently"
                if flag == STEPS_FLAG:
                    effect = f"the schedule of the earlier steps ended there, so {effect} (--stop_after keeps it)"
                warn(f"--resume: {flag} was {old} and is {new} now; {effect}")


class StopRequest:
    """Context in which the first SIGINT, SIGTERM or SIGHUP only sets `requested`; a second one acts as usual, but not
    while the files are being `saving`. A launcher passes on what its processes have got from the terminal already: within
    PASSED_ON seconds that is the same request."""

    requested, first, saving, previous = False, -math.inf, False, {}

    def __enter__(self):
        self.requested, self.first, self.process = False, -math.inf, os.getpid()
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        wanted = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores one
        self.previous = {number: signal.signal(number, self.note) for number in wanted}
        return self

    def note(self, number, frame):
        if os.getpid() != self.process:
            return  # a process that prepares batches, in its first moment
        if "RANK" in os.environ and time.monotonic() < self.first + PASSED_ON:
            return
        if self.requested and not self.saving:
            self.restore()
            signal.raise_signal(number)
        elif not self.requested:
            self.requested, self.first = True, time.monotonic()
            doing = "saving" if self.saving else "finishing this forward and backward pass, then saving"
            with contextlib.suppress(RuntimeError):  # it came in the middle of another line
                tell(f"{signal.Signals(number).name}: {doing}")

    @contextlib.contextmanager
    def held(self):
        """Within, no signal ends the process: the files are being written."""
        self.saving = True
        try:
            yield
        finally:
            self.saving = False

    def restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception):
        self.restore()
