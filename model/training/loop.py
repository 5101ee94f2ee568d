"""The one training loop: every stage hands it rows, parameters and a loss.

A step draws all its micro-batches first and counts their supervised targets over all ranks, so that each micro-batch is
divided by the count of the whole step: gradients do not depend on how a step is split (Hugging Face, "Gradient
accumulation", 2024).
"""

import collections
import contextlib
import dataclasses
import math
import os
import time
from pathlib import Path

import torch
from filelock import Timeout

from model.checkpoint import (
    checkpoint_path,
    file_sha256,
    read_metadata,
    read_tensors,
    resume_path,
    save_checkpoint,
)
from model.data.dataset import cut_rows, token_byte_lengths
from model.data.loader import BatchLoader, ResumableSampler
from model.device import autocast, peak_memory, select_device, select_dtype
from model.errors import FULL_DISK, UserError, command_line, warn
from model.files import locked
from model.settings import AUTO
from model.tokenizer import tokenizer_hash
from model.training import batch_size, dry_run, ranks, resume
from model.training.optimizer import make_schedule
from model.training.reference import Expectation, describe_run
from model.training.reports import (
    RunLog,
    flops_per_token,
    mean_loss,
    peak_flops,
    run_name,
    start_wandb,
    step_line,
    validation_line,
)
from model.training.samples import Samples
from model.training.strategy import DataParallel
from model.training.watch import Watch


def start(settings):
    """Join the ranks and seed the random generators; returns the torch.device to train on."""
    if settings.local_rank is not None:  # from an older launcher than torchrun, which says it by the environment
        os.environ.setdefault("LOCAL_RANK", str(settings.local_rank))
    if "LOCAL_SIZE" in os.environ:  # from DeepSpeed's launcher, under its own name
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    device = select_device(settings.device)
    ranks.initialise(device, settings.rendezvous_timeout)
    if settings.deepspeed is not None:
        from model.training import deepspeed

        resolved = settings.resolved(device, ranks.world_size())
        deepspeed.check(resolved, device, select_dtype(settings.dtype, device), ranks.world_size())
    if settings.fsdp and ranks.world_size() == 1:
        way_out = "start several: torchrun --nproc_per_node N ..., or leave it out"
        raise UserError(f"--fsdp: divides the work of several processes, and this is one; {way_out}", exit_code=2)
    resume.seed_generators(settings.seed)
    return device


def working_by(settings, device, dtype, strategy):
    """The class `strategy`, and where --deepspeed or --fsdp asks for it one that works so and saves what `strategy` does."""
    if settings.deepspeed is not None:
        from model.training.deepspeed import strategy_class

        engine = strategy_class(settings, device, dtype)
    elif settings.fsdp:
        from model.training.fsdp import FullySharded as engine
    else:
        return strategy
    return type(engine.__name__, (engine, strategy), {})


def language_model_loss(model, batch, num_items):
    """Next-token cross-entropy of one micro-batch summed and divided by `num_items`, and the MoE balance loss (mean
    over rows). Any stage may put its own function with these arguments and results in its place."""
    output = model(**batch, num_items_in_batch=num_items, padding_side="right", return_logits=False)
    return output.loss, output.aux_loss


def measure(batch, byte_lengths):
    """(supervised targets, rows, real tokens, UTF-8 bytes of the targets, T) of a micro-batch on the CPU."""
    targets = batch["labels"][:, 1:]
    supervised = targets != -100
    if not supervised.any():
        return 0, 0, 0, 0, targets.shape[1] + 1  # a rank without rows, which keeps step
    mask = batch.get("attention_mask")
    tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
    size = int(byte_lengths[targets[supervised]].sum())
    return int(supervised.sum()), len(targets), tokens, size, targets.shape[1] + 1


def short_rows(settings, max_seq_len):
    """Tokens of the rows in the first part of a run, None where there is no such part. UserError for no divisor of
    max_seq_len."""
    if not settings.short_rows_share:
        return None
    parts = [part for part in range(2, max_seq_len // 4 + 1) if max_seq_len % part == 0]
    length = settings.short_rows or max(parts, default=None)
    if length is None:
        return None
    if max_seq_len % length:
        problem = f"{length} is no part of the {max_seq_len} of --max_seq_len; give a divisor, or --short_rows_share 0"
        raise UserError(f"--short_rows: {problem}", exit_code=2)
    return length


@dataclasses.dataclass
class RunState:
    """Where a run stands. The fields named in SAVED are what a checkpoint tells, the others concern this process."""

    SAVED = (
        "step",
        "finished",
        "tokens_seen",
        "supervised_tokens_seen",
        "train_seconds",
        "validation_loss",
        "validation_bits_per_byte",
        "validation",
    )

    step: int = 0  # optimizer steps done
    finished: bool = False  # whether the last of them was the last of the schedule
    tokens_seen: int = 0
    supervised_tokens_seen: int = 0
    train_seconds: float = 0.0
    validation_loss: float | None = None
    validation_bits_per_byte: float | None = None
    validation: dict = dataclasses.field(default_factory=dict)  # further_numbers of it
    first_step: int = 0
    saved_step: int | None = None
    stopping: bool = False
    gradient_norm: float = 0.0  # of the last step, before clipping
    steady_since: float | None = None  # when the first step of this process was over, which may hold compilation
    steady_from: float = 0.0  # train_seconds then

    def progress(self):
        """What a checkpoint tells, as a dict."""
        return {name: getattr(self, name) for name in self.SAVED}


class Trainer:
    """Trains `model` in place and keeps its checkpoint and logs.

    model: on its device already. train, validation: datasets (see model.data.dataset; validation may be empty).
    settings: TrainingSettings. stage: the checkpoint's name without dim, such as "single_chat/full_sft". parent:
    {"file", "sha256"} of the weights it starts from. identity: further {flag: value} that decide what is learned from
    the data. metadata: what its .json says besides. loss_function: see language_model_loss. strategy: class of the object
    that owns gradients and optimizers (see model.training.strategy).
    """

    items_seen = "supervised_tokens_seen"  # what the .json calls the number of items that losses were divided by
    parameters_beside = 0  # frozen ones that the loss needs besides the model's

    def __init__(
        self, model, tokenizer, train, validation, settings, *, stage, parent=None, identity=None, metadata=None,
        loss_function=language_model_loss, strategy=DataParallel,
    ):  # fmt: skip
        self.model, self.stage, self.parent, self.loss_function = model, stage, parent, loss_function
        ranks.check_same_data(train.fingerprint, validation.fingerprint)
        self.metadata = metadata or {}
        self.device, self.dtype = model.device, select_dtype(settings.dtype, model.device)
        asked = settings
        self.settings = settings.resolved(self.device, ranks.world_size(), model.config.dim)
        self.path = checkpoint_path(settings.out_dir, stage, model.config)
        strategy = working_by(self.settings, self.device, self.dtype, strategy)
        self.strategy = strategy(model, self.settings, self.device, self.dtype, dynamic=train.lengths is not None)
        if asked.batch_size == AUTO:
            self.settings = batch_size.choose(self, asked, train)
        self.train_loader, self.validation_loader = self.make_loader(train), self.make_loader(validation)
        self.validation_start = self.validation_loader.state_dict()
        self.peak_flops = peak_flops(self.device, self.dtype)
        self.byte_lengths, self.tokenizer_hash = token_byte_lengths(tokenizer), tokenizer_hash(tokenizer)
        self.schedule = make_schedule(self.settings, self.steps_per_epoch)
        self.short_rows = short_rows(self.settings, model.config.max_seq_len)
        self.trajectory = resume.trajectory(self, train.fingerprint, identity or {})
        self.run_name = run_name(self.path.relative_to(settings.out_dir))
        self.log = RunLog(Path(settings.out_dir) / "logs" / f"{self.run_name}.jsonl", active=ranks.is_main())
        self.stop, self.state, self.torn = resume.StopRequest(), RunState(), None
        self.samples, self.described = Samples(self, tokenizer), describe_run(self, train)
        self.expectation = Expectation(self.described)
        self.watch = Watch(self, train, self.expectation)

    def make_loader(self, dataset):
        """Batches of the dataset's rows for this rank, in an order that depends on the seed alone."""
        size, seed = self.settings.batch_size, self.settings.seed
        sampler = ResumableSampler(len(dataset), size, seed, ranks.rank(), ranks.world_size(), dataset.lengths)
        return BatchLoader(dataset, sampler, self.settings.num_workers, pin_memory=self.device.type == "cuda")

    @property
    def steps_per_epoch(self):
        return math.ceil(len(self.train_loader) / self.settings.accumulation_steps)

    @property
    def rows_are_short(self):
        """Whether the next step cuts its rows. Every rank asks, for in a run by the clock they follow one."""
        if self.short_rows is None:
            return False
        seconds = self.state.train_seconds
        if self.schedule.seconds < math.inf:
            seconds = ranks.sum_over_ranks([seconds])[0] / ranks.world_size()
        return self.schedule.progress(self.state.step, seconds) < self.settings.short_rows_share

    @property
    def stop_is_due(self):
        """Whether stop_after asks for no further step."""
        return self.settings.stop_after is not None and self.state.step >= self.settings.stop_after

    def describe(self):
        """One line: rows, what a step is, how many of them."""
        settings, train, validation = self.settings, self.train_loader.dataset, self.validation_loader.dataset
        total = f"{self.schedule.total_steps:,} in all" if self.schedule.total_steps < math.inf else "as many as fit"
        parts = {"forward passes": settings.accumulation_steps, "rows of each": settings.batch_size}
        if ranks.world_size() > 1:
            parts["processes"] = ranks.world_size()
        rows, numbers = math.prod(parts.values()), " x ".join(map(str, parts.values()))
        limit = f", at most {settings.max_minutes:g} minutes of training" if settings.max_minutes else ""
        return (
            f"data: {len(train):,} rows to train on, {len(validation):,} to validate; a step is {numbers} = {rows} rows "
            f"({' x '.join(parts)}) of up to {self.model.config.max_seq_len} tokens, {self.steps_per_epoch:,} steps an "
            f"epoch, {total}{limit}"
        )

    def measure(self, batch):
        """What the function measure gives, the first number being that by which the loss is divided. A stage whose loss is
        not of tokens counts something else, and no bytes."""
        return measure(batch, self.byte_lengths)

    def flops_per_token(self, length):
        """Operations of a step for one token in a row of `length` tokens."""
        return flops_per_token(self.model, length)

    def further_numbers(self):
        """{name: number} on the batches since the last call, over all ranks, besides the loss: for reports and, while
        self.model is in evaluation mode, for validations."""
        return {}

    def resume(self):
        """Go back to the last saved step: weights, optimizer, scaler, random generators, position in the data.

        Raises UserError when there is no saved state, or when a flag was changed under which it would mean something
        else.
        """
        path = resume_path(self.path)
        if self.settings.overwrite:
            raise UserError("--resume goes on where --overwrite starts over: leave one of them out", exit_code=2)
        if not path.is_file():
            raise UserError(f"--resume: there is no {path} to go on from; leave out --resume to start from step 0")
        saved = read_tensors(path)
        try:
            resume.check_trajectory(saved["trajectory"], self.trajectory)
            self.check_parent(saved)
            self.strategy.load_weights(saved["weights"], path)
            self.strategy.load_state_dict(saved)
            self.train_loader.load_state_dict(saved["loader"])
            resume.restore_random_states(saved["random"], self.device, self.settings.seed + saved["progress"]["step"])
            self.state = RunState(**saved["progress"], saved_step=int(saved["progress"]["step"]))
            before, now = saved["trajectory"][1], self.trajectory[1]
            self.state.finished &= all(before[flag] == now[flag] for flag in resume.SCHEDULE_FLAGS)
            self.parent = saved["parent"]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            raise UserError(f"{path}: no training state that fits this run ({error!r}); omit --resume") from None
        self.torn = saved["weights_sha256"]

    def mend(self):
        """Write the checkpoint again, from which this run goes on, where the machine stopped between two renames of its
        last save: beside the training state lie older weights, or an older description."""
        sha256, self.torn = self.torn, None
        try:
            whole = file_sha256(self.path) == read_metadata(self.path).get("weights_sha256") == sha256
        except (OSError, UserError):  # missing, or damaged
            whole = False
        if any(ranks.sum_over_ranks([ranks.is_main() and not whole])):
            warn(f"{self.path} and its .json are not of step {self.state.step:,}, where this run goes on; mending them")
            self.save()

    def check_parent(self, saved):
        """UserError when the run began from other weights than --init_from gives now."""
        began, now = saved["parent"], self.parent
        if now and now["sha256"] not in (saved["weights_sha256"], began and began["sha256"]):
            began_from = f"from {began['file']}" if began else "from random weights"
            what = f"--resume: the run began {began_from}, and {now['file']} holds others (now)"
            raise UserError(f"{what}; give the old ones with --init_from, or --init_from {self.path}")

    def train(self):
        """Train up to the last step, saving on the way; returns whether it was reached, False after --stop_after steps,
        SIGINT, SIGTERM or SIGHUP. With --dry_run it tells what that would need instead, and writes nothing.

        Raises UserError for a checkpoint that would be replaced without --overwrite, another run that writes the same
        one, --max_minutes too short for three steps, a loss that is not finite (before it reaches the weights), and a GPU or
        a disk that is full.
        """
        if self.settings.dry_run:
            dry_run.tell(self)
            return False
        state = self.state
        for path in (self.path, resume_path(self.path)):
            if path.exists() and state.saved_step is None and not self.settings.overwrite:
                raise UserError(f"{path} exists already: --resume goes on with it, --overwrite starts over")
        with self.alone(), contextlib.closing(self.log), self.stop:
            wandb = start_wandb(self.settings, self.run_name) if self.settings.use_wandb and ranks.is_main() else None
            self.log.start(state.step, self.schedule.total_steps, wandb)
            self.samples.start()
            state.first_step, state.steady_since, state.stopping = state.step, None, False
            self.model.train()
            try:
                if self.torn:
                    self.mend()
                if state.saved_step is None:
                    if len(self.validation_loader):
                        ranks.print_once("validating once before the first step")
                    self.validate()
                if self.settings.compile:
                    ranks.print_once("compiling: the first step may take a minute, the first of a new shape too")
                if state.finished and state.validation_loss is None and len(self.validation_loader):
                    self.validate()  # which a signal had cut short
                    self.save()
                self.samples.take_if_due()
                if state.step >= self.schedule.total_steps or state.finished:
                    ranks.print_once(f"nothing left to do: {self.step_of_total} is done")
                else:
                    state.stopping = self.stop_is_due
                    if not state.stopping:
                        self.run_steps()
            except torch.OutOfMemoryError:
                raise UserError(self.out_of_memory()) from None
        if state.stopping and state.saved_step is None:
            ranks.print_once(f"stopped before the first step was done: nothing to save; again: {command_line()}")
        elif state.stopping:
            left_out = {"--overwrite": 0, **({"--stop_after": 1} if self.stop_is_due else {})}
            way_on = command_line("--resume", without=left_out)
            ranks.print_once(f"stopped and saved at {self.step_of_total}; to go on: {way_on}")
        return not state.stopping

    @contextlib.contextmanager
    def alone(self):
        """A context in which no other run writes this checkpoint. Raises UserError when one does already."""
        with contextlib.ExitStack() as stack:

            def lock():
                try:
                    lock_path = self.log.path.with_name(f".{self.run_name}.lock")
                    stack.enter_context(locked(lock_path, timeout=0))
                except Timeout:
                    raise UserError(f"{self.path}: another run is writing it; choose another --out_dir") from None

            ranks.on_main(lock)
            yield

    def close(self):
        """Leave the process group, if there is one; nothing can be trained or asked of other ranks afterwards."""
        self.strategy.close()
        ranks.shut_down()

    def run_steps(self):
        """From the current step to the last one, with reports, validation and saves where they are due."""
        settings, state = self.settings, self.state
        window, clock = collections.Counter(), time.perf_counter()
        for batches, before in self.step_batches():
            if not self.train_step(batches, window):
                self.leave(before, window)
                return
            took = time.perf_counter() - clock
            window["seconds"] += took
            if not (settings.compile and state.step == state.first_step + 1):  # compilation is no training
                state.train_seconds += took
            if state.step == 2 and not state.first_step and settings.max_minutes is not None:
                try:  # before anything is saved
                    self.check_minutes(state.train_seconds + took)
                except UserError:
                    self.log.discard()
                    self.samples.discard()
                    raise
            self.log.advance()
            done = state.finished or state.stopping or self.stop_is_due
            if state.step % settings.log_interval == 0 or done or state.step == state.first_step + 1:
                self.report(window)
                window.clear()
            if (state.step % settings.eval_interval == 0 and not state.stopping) or state.finished:
                self.validate()
            too_early = state.step == 1 and settings.max_minutes is not None  # see check_minutes
            if done or (state.step % settings.save_interval == 0 and not too_early):
                self.save()
            self.samples.take_if_due()
            if done:
                state.stopping = not state.finished
                return
            clock = time.perf_counter()
            state.steady_since = state.steady_since or clock

    def check_minutes(self, seconds):
        """UserError where three steps of a run that begins, which take `seconds` here, do not fit into --max_minutes."""
        seconds = ranks.sum_over_ranks([seconds])[0] / ranks.world_size()  # all ranks follow one clock
        if seconds > self.schedule.seconds:
            given, least = self.settings.max_minutes, math.ceil(1100 * seconds / 60) / 1000
            problem = f"is less than three steps take here, {seconds:.3g} s"
            way_out = f"give {least:g} or more, or choose a smaller --preset or --accumulation_steps"
            raise UserError(f"--max_minutes {given:g}: {problem}; {way_out}")

    def leave(self, before, window):
        """Go back to the start of a step that a request to stop has broken off, and save there."""
        state = self.state
        state.stopping = True
        self.strategy.forget_gradients()
        self.train_loader.load_state_dict(before["loader"])
        resume.restore_random_state(before["random"], self.device)
        if window["seconds"]:
            self.report(window)
        if state.step not in (state.first_step, state.saved_step):
            self.save()

    def step_batches(self):
        """The micro-batches of each optimizer step, epoch after epoch (what remains of one is a smaller step), each with
        loader and random generators as they were before."""
        while True:
            batches, before = [], self.position()
            for batch in self.train_loader:
                batches.append(batch)
                if len(batches) == self.settings.accumulation_steps:
                    yield batches, before
                    batches, before = [], self.position()
            if batches:
                yield batches, before

    def position(self):
        """Where data and random generators stand."""
        return {"loader": self.train_loader.state_dict(), "random": resume.random_state(self.device)}

    def train_step(self, batches, window):
        """One optimizer step over `batches`, as if they were one large batch; adds its numbers to `window`. Returns
        False, and has changed nothing but gradients, when it was asked to stop before the step could be completed."""
        state = self.state
        if self.rows_are_short:
            batches = [cut_rows(batch, self.short_rows) for batch in batches]
        counts = [self.measure(batch) for batch in batches]
        flops = 0  # counted only where they become an MFU: the parameters are walked through for every micro-batch
        if self.peak_flops:
            flops = sum(tokens * self.flops_per_token(length) for _, _, tokens, _, length in counts)
        sums = [sum(column) for column in zip(*counts)][:4] + [flops, state.train_seconds, self.stop.requested]
        items, rows, tokens, size, flops, seconds, stops = ranks.sum_over_ranks(sums)
        seconds /= ranks.world_size()  # all ranks follow one clock
        if state.step <= state.first_step + 1:
            state.steady_from = seconds  # the first step of a process is slower, by minutes where it is compiled
        pace = (seconds - state.steady_from) / max(1, state.step - state.first_step - 1)
        loss = None if stops else self.accumulate(batches, [count[1] / rows for count in counts], items)
        if loss is None:
            return False
        loss, state.gradient_norm = self.update(loss, self.schedule.factor(state.step, seconds))
        state.step += 1
        state.finished = self.schedule.is_over(state.step, seconds + pace, pace)
        state.tokens_seen += int(tokens)
        state.supervised_tokens_seen += int(items)
        window.update(nats=loss * items, items=items, size=size, tokens=tokens, flops=flops)
        return True

    def accumulate(self, batches, shares, items):
        """Forward and backward of every micro-batch; returns this rank's part of the step's loss, a tensor, or None when
        a request to stop came in between (a launcher waits for seconds only, and a step can be long).

        shares: each micro-batch's part of the rows of the whole step, by which its balance loss counts.
        """
        total = torch.zeros((), device=self.device)
        # A tensor, for a number would be compiled into the graph; filled on the device, for a copy would wait for it.
        num_items = torch.full((), items, dtype=torch.float32, device=self.device)
        for index, (batch, share) in enumerate(zip(batches, shares)):
            if index and any(ranks.sum_over_ranks([self.stop.requested])):
                return None
            with self.strategy.micro_batch(last=index == len(batches) - 1):
                with autocast(self.device, self.dtype):
                    loss, aux_loss = self.loss_function(self.strategy.runner, self.to_device(batch), num_items)
                self.strategy.backward(loss + aux_loss * share)
            total += loss.detach()
        return total

    def to_device(self, batch):
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def update(self, loss, factor):
        """Clip and apply the gradients at `factor` times the peak rates unless something is not finite; returns (loss
        over all ranks, gradient norm)."""
        norm = self.strategy.gradient_norm()
        loss, norm_value = torch.stack((loss, norm)).tolist()  # the only wait for the device in a step
        loss, stops = ranks.sum_over_ranks([loss, self.stop.requested])
        self.state.stopping = stops > 0
        # With float16 an infinite gradient is how the scaler learns that its scale is too large: it skips this step.
        overflowed = self.strategy.overflowed(norm_value)
        if not math.isfinite(loss) or not (math.isfinite(norm_value) or overflowed):
            raise UserError(self.divergence(loss, norm_value))
        if self.settings.grad_clip and norm_value > self.settings.grad_clip and not overflowed:
            self.strategy.clip(norm, self.settings.grad_clip)
        self.strategy.step(factor, skip=overflowed)
        return loss, norm_value

    def divergence(self, loss, norm):
        """The error line for a loss or gradient that is not finite."""
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        what = f"step {self.state.step + 1}: {what}; stopped before it reached the weights"
        return f"{what} ({self.kept(self.state.saved_step)}); try a lower --learning_rate"

    def kept(self, step):
        """What there is after a failure when `step` was saved last."""
        return f"{self.path} of step {step} is intact" if step else "nothing was saved yet"

    def out_of_memory(self):
        """The error line for a GPU that is full."""
        rows, accumulation = self.settings.batch_size, self.settings.accumulation_steps
        way_out = "a shorter --max_seq_len or a smaller --preset"
        if rows > 1:
            half = next(part for part in range(rows // 2, 0, -1) if rows % part == 0)
            way_out = f"--batch_size {half} --accumulation_steps {accumulation * rows // half}, the same rows a step"
        kept = self.kept(self.state.saved_step)
        return f"{self.device} has too little memory for --batch_size {rows} ({kept}); try {way_out}"

    def report(self, window):
        """One line and one record on the steps since the last report."""
        state, load = self.state, self.expert_load()
        loss, bits_per_byte = mean_loss(window)
        record = dict(step=state.step, epoch=round(state.step / self.steps_per_epoch, 4), loss=loss)
        record.update(self.further_numbers())
        if bits_per_byte is not None:
            record["bits_per_byte"] = bits_per_byte
        record.update(self.expectation.numbers(state.tokens_seen, window["tokens"]))
        record["learning_rate"] = self.strategy.learning_rate
        record.update(gradient_norm=state.gradient_norm, tokens_per_second=window["tokens"] / window["seconds"])
        record.update(tokens_seen=state.tokens_seen)
        if self.peak_flops:
            record["mfu"] = window["flops"] / window["seconds"] / self.peak_flops / ranks.world_size()
        if state.steady_since:
            steady = (time.perf_counter() - state.steady_since) / (state.step - state.first_step - 1)
            left = min(steady * (self.schedule.total_steps - state.step), self.schedule.seconds - state.train_seconds)
            record["seconds_left"] = max(0.0, round(left, 1))
        if load is not None:
            record["expert_load"] = [round(share, 4) for share in load.mean(dim=0).tolist()]
            record["least_expert_load"] = round(load.min().item(), 4)  # what starves in one layer hides in the mean
        self.log.write(step_line(record, self.step_of_total), **record)
        self.watch.see(record)

    def expert_load(self):
        """Share [L, E] of the last micro-batch's routing choices that each expert got in each layer, over all ranks; None
        when dense."""
        load = self.model.expert_load()
        if load is None:
            return None
        return torch.tensor(ranks.sum_over_ranks(load.flatten().tolist())).view_as(load) / ranks.world_size()

    @torch.no_grad()
    def validate(self):
        """Mean loss and bits per byte over the same --eval_tokens held-out targets each time, into state and log; nothing
        of one that a request to stop has cut short."""
        if not len(self.validation_loader):
            return
        self.model.eval()
        self.validation_loader.load_state_dict(self.validation_start)
        wanted = self.settings.eval_tokens or math.inf
        sums, state = dict(nats=0.0, items=0, size=0), self.state
        one = torch.ones((), device=self.device)
        for batch in self.validation_loader:
            items, _, _, size, _ = self.measure(batch)
            with autocast(self.device, self.dtype):
                sums["nats"] += float(self.loss_function(self.model, self.to_device(batch), one)[0])
            sums["items"], sums["size"] = sums["items"] + items, sums["size"] + size
            # All ranks stop at the same batch: where weights are divided, none can go on without the others.
            items, stops = ranks.sum_over_ranks([sums["items"], self.stop.requested])
            if items >= wanted or stops:
                break
        further = self.further_numbers()
        self.model.train()
        *totals, stops = ranks.sum_over_ranks([*sums.values(), self.stop.requested])
        if stops:
            if state.finished:  # what it had before is of other weights
                state.validation_loss = state.validation_bits_per_byte = None
                state.validation = {}
            return
        sums = dict(zip(sums, totals))
        loss, bits_per_byte = state.validation_loss, state.validation_bits_per_byte = mean_loss(sums)
        state.validation = further
        record = dict(step=state.step, validation_loss=loss)
        if bits_per_byte is not None:
            record["validation_bits_per_byte"] = bits_per_byte
        record.update((f"validation_{name}", number) for name, number in further.items())
        self.log.write(validation_line(record, self.step_of_total, int(sums["items"])), **record)
        self.watch.see_validation(record)

    @property
    def step_of_total(self):
        total = self.schedule.total_steps
        return f"step {self.state.step:,}" + (f"/{total:,}" if total < math.inf else "")

    def save(self):
        """Write checkpoint, description and training state. A full disk ends the run, as do weights that became infinite
        in the last step; the files of the last save stay intact."""
        states = ranks.gather(resume.random_state(self.device))
        state, weights, training_state = self.state, self.strategy.weights(), self.strategy.state_dict()
        previous, state.saved_step = state.saved_step, state.step
        training_state.update(progress=state.progress(), parent=self.parent, random=states, trajectory=self.trajectory)
        training_state["loader"] = self.train_loader.state_dict()
        ranks.on_main(lambda: self.write(weights, training_state, previous))

    def write(self, weights, training_state, previous):
        """Write the three files of a checkpoint; `previous` is the step that the present ones are of."""
        state, total_steps = self.state, self.schedule.total_steps
        if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
            kept = self.kept(previous)
            raise UserError(
                f"step {state.step}: weights are not finite, not saved ({kept}); try a lower --learning_rate"
            )
        metadata = {**self.described, "parent": self.parent, "tokenizer_hash": self.tokenizer_hash, **state.progress()}
        metadata[self.items_seen] = metadata.pop("supervised_tokens_seen")
        if not state.validation:
            del metadata["validation"]
        metadata.update(self.metadata)
        metadata["total_steps"] = total_steps if total_steps < math.inf else None
        metadata["peak_memory_bytes"] = peak_memory(self.device)
        try:
            with self.stop.held():
                save_checkpoint(self.path, self.model, metadata, training_state, weights)
            self.log.keep()
            self.samples.keep()
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            way_on = f" and go on with: {command_line('--resume', without={'--overwrite': 0})}" if previous else ""
            what = f"{self.path}: {error.strerror} while saving step {state.step}"
            raise UserError(f"{what} ({self.kept(previous)}); free some space{way_on}") from None
