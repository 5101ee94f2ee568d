"""--dry_run: what a run would need, told before it starts. Three steps are done as the run would do them, and undone."""

import collections
import dataclasses
import datetime
import math
import time

import numpy as np
import torch

from model.device import peak_memory
from model.errors import UserError
from model.LMConfig import preset_config
from model.training import costs, cpu_kernels, ranks
from model.training.rehearsal import unchanged
from model.training.reports import count_parameters, flops_per_token, whole_size

MEASURED = 3  # steps
OPTIMIZERS = ("adamw", "muon")


def rehearse(trainer):
    """What the run of `trainer` needs, as plain values: {"parameters", "memory", "data", "time", "presets"}. Every rank must
    call it. Nothing is written, and the trainer stands where it stood (see rehearsal.unchanged).

    Raises UserError where --max_minutes is less than the time of three steps.
    """
    with unchanged(trainer):
        most, measured = measure(trainer)
        if trainer.rows_are_short and trainer.settings.short_rows_share < 1:
            most, measured["whole_rows"] = measure(trainer, whole_rows=True)
        found = dict(parameters=parameters(trainer), memory={**memory(trainer), "measured": most}, data=data(trainer))
        found["time"] = duration(trainer, measured)
        found["data"].update(repetition(found))
        found["presets"] = other_presets(trainer, found)
    return found


def measure(trainer, whole_rows=False):
    """(most bytes held at once, {"tokens", "seconds"} of three steps after those that warm up), as Trainer.run_steps counts:
    with preparing the batches, without validation and saves. whole_rows: of those that a run with short rows ends with."""
    settings, state, position = trainer.settings, trainer.state, trainer.train_loader.state_dict()
    warm_up = 2 if settings.compile else 1
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    short_rows = trainer.short_rows
    trainer.state = dataclasses.replace(state, first_step=state.step)
    trainer.short_rows = None if whole_rows else short_rows
    trainer.model.train()
    window, seconds = collections.Counter(), 0.0
    try:
        clock = time.perf_counter()
        for done, (batches, _) in enumerate(trainer.step_batches(), start=1):
            if done == warm_up + 1:
                window.clear()
            trainer.train_step(batches, window)
            if done > warm_up:
                seconds += time.perf_counter() - clock
            if done == warm_up + MEASURED:
                break
            clock = time.perf_counter()
        trainer.further_numbers()  # what a preference loss has noted
    finally:
        trainer.state, trainer.short_rows = state, short_rows
        trainer.train_loader.load_state_dict(position)
    seconds = ranks.sum_over_ranks([seconds])[0] / ranks.world_size()  # all ranks tell the same
    return peak_memory(trainer.device), {"tokens": int(window["tokens"]), "seconds": seconds}


def first_whole_step(schedule, share):
    """The step with which the last part of a run begins, the one of whole rows."""
    return schedule.warmup_steps + math.ceil(share * (schedule.total_steps - schedule.warmup_steps))


def parameters(trainer):
    """{"total", "working" (on one token), "trained"}."""
    total = sum(whole_size(parameter) for parameter in trainer.model.parameters())
    own, working = count_parameters(costs.meta_model(trainer.model.config))  # a stock class names experts otherwise
    trained = sum(whole_size(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad)
    return {"total": total, "working": total - (own - working), "trained": trained}


def kernels(trainer):
    """Arguments of costs.bytes_per_token that make it count what this run computes with."""

    def prepare(model):
        cpu_kernels.install(model, trainer.device, trainer.dtype, trainer.settings.compile)

    return dict(dtype=trainer.dtype, prepare=prepare)


def memory(trainer):
    """Bytes of one rank: what is held once with each optimizer, what a row leaves behind for the backward pass, and the sums in
    a table {(optimizer, checkpointing): {rows of a forward pass: bytes}}; "own": the key of this run, its rows."""
    settings, config, dataset = trainer.settings, trainer.model.config, trainer.train_loader.dataset
    count, copies = parameters(trainer), 0 if trainer.dtype == torch.float32 else costs.HALF
    longest = 0 if dataset.lengths is None else int(np.argmax(dataset.lengths))
    labels, stage = dataset[[longest]]["labels"], zero_stage(trainer)
    kept = costs.activations(config, labels.numel(), length=labels.shape[1], **kernels(trainer))
    if not stage:  # else weights come and go
        more = costs.counted_activations(trainer, longest) / (kept["blocks"] + kept["ends"])
        kept = {name: size if name == "inputs" else more * size for name, size in kept.items()}
    held = {}
    for optimizer in OPTIMIZERS:
        state, block = costs.optimizer_state(trainer.model, optimizer), costs.largest_piece(trainer.model)
        held[optimizer] = costs.memory(
            count["total"], block, ranks.world_size(), stage, count["trained"], state, copies
        )
        if settings.offload:  # to the host
            held[optimizer]["optimizer"] = 0
        held[optimizer]["beside"] = costs.FLOAT * trainer.parameters_beside  # autocast keeps no copy of what is frozen
    size, tokens = settings.batch_size, labels.numel()
    table = {
        (optimizer, checkpointing): {
            rows: sum_of(trainer, held[optimizer], kept, config, rows, tokens, checkpointing)
            for rows in sorted({max(1, size // 2), size, 2 * size, 4 * size})
        }
        for optimizer in OPTIMIZERS
        for checkpointing in (False, True)
    }
    own = (settings.optimizer, settings.gradient_checkpointing)
    return dict(length=labels.shape[1], tokens=tokens, held=held, kept=kept, table=table, own=own, rows=size)


def sum_of(trainer, held, kept, config, rows, tokens, checkpointing):
    """costs.peak of `rows` rows that leave `kept` each."""
    chunk = cpu_kernels.CHUNK.get(trainer.device.type) if getattr(trainer.model, "training_loss_kernel", None) else None
    loss = costs.of_the_loss(config, rows * tokens, chunk)
    kept = {name: rows * size for name, size in kept.items()}
    return costs.peak(held, kept, loss, checkpointing, trainer.settings.accumulation_steps > 1)


def zero_stage(trainer):
    """Which ZeRO stage divides the memory: 0 for none; FSDP does what stage 3 does."""
    settings = trainer.settings
    if settings.deepspeed is None:
        return 3 if settings.fsdp else 0
    from model.training.deepspeed_config import make_config

    config = make_config(settings, trainer.device, trainer.dtype, ranks.world_size())
    return config["zero_optimization"]["stage"]


def data(trainer):
    """Tokens to train on and to validate, and how many of those are learned."""
    train, validation = trainer.train_loader.dataset, trainer.validation_loader.dataset
    return {"train": train.num_tokens, "learned": train.num_targets, "validation": validation.num_tokens}


def duration(trainer, measured):
    """Pace, steps that are left, seconds that they take; with --max_minutes how many fit into what is left of them."""
    schedule, state, share = trainer.schedule, trainer.state, trainer.settings.short_rows_share
    tokens_of_step = trainer.train_loader.dataset.num_tokens / trainer.steps_per_epoch
    paces = [part["tokens"] / part["seconds"] for part in (measured, measured.get("whole_rows", measured))]
    steps = [tokens_of_step / pace for pace in paces]  # seconds of one with short rows, of one with whole ones
    found = {"tokens_per_second": paces, "seconds_per_step": steps, "tokens_of_step": tokens_of_step}
    left, seconds = schedule.total_steps - state.step, math.inf
    if left < math.inf:
        short = min(left, max(0, first_whole_step(schedule, share) - state.step))
        seconds = short * steps[0] + (left - short) * steps[1]
    if schedule.seconds < math.inf:
        if not state.step:
            trainer.check_minutes(measured["seconds"] * 3 / MEASURED)
        there = max(0.0, schedule.seconds - state.train_seconds)
        if seconds > there:
            short = min(there, max(0.0, share * schedule.seconds - state.train_seconds))
            left, seconds = int(short / steps[0] + (there - short) / steps[1]), there
        found["fitting"] = left
    return {**found, "steps": left, "total": state.step + left, "seconds": seconds}


def repetition(found):
    """Epochs and tokens of the whole run, tokens for each parameter, and what its epochs are worth in fresh data."""
    tokens = found["time"]["total"] * found["time"]["tokens_of_step"]
    epochs = tokens / found["data"]["train"]
    share = tokens / found["parameters"]["total"]
    return {"tokens": round(tokens), "epochs": epochs, "per_parameter": share, "worth": costs.worth(epochs)}


def other_presets(trainer, found):
    """{"smaller", "larger": {"name", "work" (times this run's), "seconds", "bytes"}} of the presets next to this model in
    the operations of a token, with the same rows and steps: an estimate by formula."""
    config, needs, options = trainer.model.config, found["memory"], kernels(trainer)
    optimizer, checkpointing = needs["own"]
    length, tokens, total = needs["length"], needs["tokens"], found["parameters"]["total"]
    flops, counted = flops_per_token(costs.meta_model(config), length), {}
    by_formula = costs.activations(config, tokens, length=length, **options)
    for side, name in costs.neighbours(config).items():
        other = preset_config(name, max_seq_len=config.max_seq_len)
        model = costs.meta_model(other)
        work = flops_per_token(model, length) / flops
        growth = count_parameters(model)[0] / total
        kept = costs.activations(other, tokens, length=length, **options)
        kept = {name: size * needs["kept"][name] / by_formula[name] for name, size in kept.items()}
        held = {name: growth * size for name, size in needs["held"][optimizer].items()}
        size = sum_of(trainer, held, kept, other, needs["rows"], tokens, checkpointing)
        counted[side] = dict(name=name, work=work, seconds=work * found["time"]["seconds"], bytes=size)
    return counted


def amount(size):
    """Bytes for people: 1.2 GB, 34 MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def clock_time(seconds):
    return str(datetime.timedelta(seconds=round(seconds)))


def lines(trainer, found):
    """The lines of text that say what rehearse has `found`."""
    return [
        *parameter_lines(found["parameters"]),
        *memory_lines(trainer, found["memory"]),
        *data_lines(trainer, found["data"]),
        *time_lines(trainer, found["time"]),
        *preset_lines(found["presets"]),
        "dry run: nothing was written but the token cache; the same command without --dry_run starts",
    ]


def parameter_lines(count):
    working = f", {count['working']:,} of them at work on a token" if count["working"] != count["total"] else ""
    trained = "all of them" if count["trained"] == count["total"] else f"{count['trained']:,}"
    return [f"parameters: {count['total']:,}{working}; {trained} train"]


def memory_lines(trainer, found):
    own = found["held"][found["own"][0]]
    parts = {"weights": "weights", "copies": f"copies in {str(trainer.dtype).removeprefix('torch.')}"}
    parts.update(gradients="gradients", beside="the frozen reference")
    once = ", ".join(f"{title} {amount(own[name])}" for name, title in parts.items() if own[name])
    states = ", ".join(f"{name} {amount(found['held'][name]['optimizer'])}" for name in OPTIMIZERS)
    kept = found["kept"]
    row, less = (amount(kept[part] + kept["ends"]) for part in ("blocks", "inputs"))
    yield f"memory, estimated: {once}; optimizer: {states}"
    yield (
        f"  a row of {found['length']} tokens leaves {row} for the backward pass, with --gradient_checkpointing {less}; in all:"
    )
    yield f"  {'--batch_size':46s}" + "".join(f"{size:>12,}" for size in found["table"][found["own"]])
    for (optimizer, checkpointing), sums in found["table"].items():
        title = f"--optimizer {optimizer}" + " --gradient_checkpointing" * checkpointing
        cells = ""
        for size, needed in sums.items():
            here = (optimizer, checkpointing) == found["own"] and size == found["rows"]
            cells += f"{'> ' * here + amount(needed):>12s}"
        yield f"  {title:46s}{cells}"
    where = "on the GPU" if trainer.device.type == "cuda" else "by the whole process, Python and torch with it"
    yield f"  > is this run; at most {amount(found['measured'])} held {where} in the steps below"


def data_lines(trainer, found):
    learned = f", {found['learned']:,} of them learned" if found["learned"] < found["train"] - 1 else ""
    yield f"data: {found['train']:,} tokens to train on{learned}, {found['validation']:,} to validate"
    text = f"  the whole run: {found['epochs']:.2f} epochs, {found['tokens']:,} tokens, {found['per_parameter']:.2f} a parameter"
    if trainer.parent is None:
        text += f" (about {costs.BEST_TOKENS} make the most of an amount of computing: Hoffmann et al. 2022, arXiv 2203.15556)"
    yield text
    if trainer.parent is None and found["epochs"] > 1:
        worth = f"{found['worth']:.2f} of fresh data; up to 4 are nearly as good as fresh ones"
        yield f"  {found['epochs']:.2f} epochs over the same text are worth {worth} (Muennighoff et al. 2023, arXiv 2305.16264)"


def time_lines(trainer, found):
    state, total, minutes = trainer.state, trainer.schedule.total_steps, trainer.settings.max_minutes
    paces = zip(found["tokens_per_second"], found["seconds_per_step"])
    first, whole = (f"{pace:,.0f} tokens/s, {step:.2f} s a step" for pace, step in paces)
    parts = first if first == whole else f"{first} with rows of {trainer.short_rows} tokens; {whole} with whole ones"
    yield f"time: {parts} (over {MEASURED} steps)"
    left = f"{found['steps']:,} steps" + (" left" if state.step else "")
    yield f"  {left}: {clock_time(found['seconds'])} of training, without validation and saves"
    if minutes is not None and found["fitting"] < total - state.step:
        yield f"  --max_minutes {minutes:g} ends it there" + (f", before step {total:,}" if total < math.inf else "")


def preset_lines(found):
    for side, other in found.items():
        yield (
            f"next {side} preset, estimated: --preset {other['name']}, {other['work']:.2g} times the work: "
            f"{clock_time(other['seconds'])}, {amount(other['bytes'])}"
        )


def tell(trainer):
    """rehearse, printed by the main rank; a GPU that is full is told as in training."""
    if trainer.state.finished or trainer.state.step >= trainer.schedule.total_steps:
        ranks.print_once(f"dry run: nothing left to do: {trainer.step_of_total} is done")
        return
    ranks.print_once(f"dry run: measuring {MEASURED} steps")
    try:
        found = rehearse(trainer)
    except torch.OutOfMemoryError:
        raise UserError(trainer.out_of_memory()) from None
    for line in lines(trainer, found):
        ranks.print_once(line)
