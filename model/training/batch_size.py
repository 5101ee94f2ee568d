"""--batch_size auto: the most rows of a forward pass that a GPU has room for, found by trying."""

import dataclasses
import gc

import numpy as np
import torch

from model.checkpoint import read_tensors, resume_path
from model.device import autocast, peak_memory
from model.errors import UserError
from model.settings import AUTO, ROWS_OF_A_STEP
from model.training import ranks, resume
from model.training.rehearsal import renew_scaler, unchanged

NOTCHES = 8  # between a number of rows and twice as many


def largest_that_fits(try_rows, most):
    """The most rows, up to `most`, for which try_rows(rows) does not raise torch.OutOfMemoryError, less one notch where it
    did for more: memory that is cut into pieces holds less in its third hour. 0 where not even one row fits.

    Doubles from one row on, then halves the stretch between what fits and what does not, to an eighth of what fits.
    """

    def fits(rows):
        try:
            try_rows(rows)
        except torch.OutOfMemoryError:
            return False
        return True

    if not fits(1):
        return 0
    good = 1
    while good < most and fits(min(2 * good, most)):
        good = min(2 * good, most)
    if good == most:
        return most
    notch = max(1, good // NOTCHES)
    bad = min(2 * good, most)
    while bad - good > notch:
        middle = good + max(notch, (bad - good) // 2 // notch * notch)
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return max(1, good - notch)


def largest_divisor(number, most):
    """The largest divisor of `number` that is not above `most`."""
    return next(part for part in range(min(number, most), 0, -1) if number % part == 0)


class Trial:
    """Training on the GPU for as long as it takes to see what it holds: calling it with a number of rows runs two passes
    forward and backward on the longest rows there are, an optimizer step that moves nothing, and a validation pass.

    Returns the most bytes that were held; raises torch.OutOfMemoryError. No rank waits for another.
    """

    def __init__(self, trainer, dataset):
        self.trainer, self.dataset = trainer, dataset
        lengths = np.zeros(len(dataset)) if dataset.lengths is None else np.asarray(dataset.lengths)
        self.longest_first = np.argsort(-lengths, kind="stable")

    def __call__(self, rows):
        trainer, strategy = self.trainer, self.trainer.strategy
        self.free()
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)
        batch = trainer.to_device(self.dataset[np.resize(self.longest_first, rows).tolist()])
        one = torch.ones((), device=trainer.device)
        trainer.model.train()
        for _ in range(2):  # the second beside the gradients of the first
            with strategy.micro_batch(last=False):
                with autocast(trainer.device, trainer.dtype):
                    loss, aux_loss = trainer.loss_function(strategy.runner, batch, one)
                strategy.backward((loss + aux_loss) / rows)
        norm = strategy.gradient_norm()
        strategy.step(0.0, skip=strategy.overflowed(float(norm)))
        trainer.model.eval()
        with torch.no_grad(), autocast(trainer.device, trainer.dtype):
            trainer.loss_function(trainer.model, batch, one)
        return peak_memory(trainer.device)

    def free(self):
        """Give back what the last trial has left, also one that ran out of memory."""
        self.trainer.strategy.forget_gradients()
        renew_scaler(self.trainer)
        gc.collect()
        if self.trainer.device.type == "cuda":
            torch.cuda.empty_cache()


def choose(trainer, asked, train):
    """trainer.settings with a number in the place of "auto" of the settings `asked`, the same on all ranks; prints which.

    train: the rows. A run that has begun goes on as it did. Where --accumulation_steps is open a step keeps its rows, 64
    over all ranks, so that no result depends on the card. Raises UserError where not even one row fits.
    """
    settings = trainer.settings
    began = None if settings.overwrite else as_it_began(trainer, asked)
    if began:
        rows, accumulation = began
        way_out = " (--overwrite starts over, and looks anew)" if settings.dry_run else ""
        ranks.print_once(f"--batch_size auto: {rows}, as {resume_path(trainer.path)} began{way_out}")
        return dataclasses.replace(settings, batch_size=rows, accumulation_steps=accumulation)
    if settings.batch_size != AUTO:
        kind = {"cpu": "a CPU", "mps": "MPS"}[trainer.device.type]
        ranks.print_once(
            f"--batch_size auto: nothing tells what fits on {kind}; it takes the default, {settings.batch_size} rows"
        )
        return settings
    ranks.print_once("--batch_size auto: trying what fits")
    trial, most = Trial(trainer, train), -(-len(train) // ranks.world_size())
    if settings.accumulation_steps is None:
        most = ROWS_OF_A_STEP // ranks.world_size()
    with unchanged(trainer):
        fitting = min(ranks.gather(largest_that_fits(trial, most)))
        if not fitting:
            raise UserError(
                f"--batch_size auto: {trainer.device} has too little memory for one row; try "
                "--gradient_checkpointing, a shorter --max_seq_len or a smaller --preset"
            )
        rows = largest_divisor(most, fitting) if settings.accumulation_steps is None else fitting
        peak = max(ranks.gather(trial(rows)))
        trial.free()
    for mode in (False, True):  # what a preference loss has noted
        trainer.model.train(mode)
        trainer.further_numbers()
    forget_trials(trainer)
    accumulation = settings.accumulation_steps or most // rows
    ranks.print_once(
        f"--batch_size auto: {rows} rows a forward pass, --accumulation_steps {accumulation}; at most {peak / 1e9:.1f} GB "
        f"at once{memory_of(trainer.device)}"
    )
    return dataclasses.replace(settings, batch_size=rows, accumulation_steps=accumulation)


def memory_of(device):
    """ " of 79.1 GB", where the device tells."""
    return f" of {torch.cuda.mem_get_info(device)[1] / 1e9:.1f} GB" if device.type == "cuda" else ""


def forget_trials(trainer):
    """The run's own peak counts from here, and its compiled code is made for its own batches alone."""
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(trainer.device)
    if trainer.settings.compile:
        torch.compiler.reset()


def as_it_began(trainer, asked):
    """(batch size, accumulation steps) of the run whose training state is there, for this number of ranks; None without one,
    or where it does not say (Trainer.resume tells what is wrong with it)."""
    path = resume_path(trainer.path)
    if not path.is_file():
        return None
    try:
        fixed, free = read_tensors(path)["trajectory"]
        rows, batch_size = fixed[resume.STEP_ROWS_FLAG], free["--batch_size"]
        if asked.accumulation_steps is not None:
            return batch_size, asked.accumulation_steps
        own, rest = divmod(rows, ranks.world_size())
        return None if rest else (size := largest_divisor(own, batch_size), own // size)
    except (UserError, KeyError, TypeError, ValueError):
        return None
