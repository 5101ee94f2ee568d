"""Is my loss normal? Logs of real runs, thinned to a hundred points, and what they say of a run of the same kind.

A reference, images/reference/*.jsonl, is text: first a line that says which run it was (REQUIRED and more, from the .json of
its checkpoint), then records {"step", "tokens_seen", "loss", "bits_per_byte"} and validations. Each loss is the mean over
the tokens since the record before.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

from model.checkpoint import CONFIG_FIELDS, FREE_FIELDS, read_metadata
from model.errors import UserError, command_line, warn
from model.files import atomic_write
from model.training import ranks
from model.training.reports import read_log, run_name

FOLDER = Path(__file__).resolve().parents[2] / "images" / "reference"
POINTS, VALIDATIONS = 90, 10  # kept of a log, at most
# The context is part of the shape here: the farther a token sees, the lower its loss.
SHAPE = (*(name for name in CONFIG_FIELDS if name not in FREE_FIELDS), "max_seq_len")
REQUIRED = ("stage", "config", "data")
# Settings that bend the curve of the loss.
RECIPE = (
    "optimizer", "learning_rate", "muon_learning_rate", "embedding_rate_factor", "schedule", "decay_share", "weight_decay",
    "beta1", "beta2", "short_rows_share",
)  # fmt: skip
TOLD = (*REQUIRED, "typical", "recipe", "device", "command", "tokenizer_hash", "tokens_seen", "train_seconds")


class Reference:
    """One reference. name: of its file. header: the dict in its first line. tokens [n]: the middle of each record's stretch
    of training; numbers {name: [n]}: its loss, and bits per byte where there are some."""

    def __init__(self, path):
        """Raises UserError for a file that is missing or is none."""
        self.name, self.path = Path(path).stem, path
        try:
            first, *lines = Path(path).read_text(encoding="utf-8").splitlines()
            self.header = checked_header(json.loads(first))
            self.records = [json.loads(line) for line in lines]
            points = [record for record in self.records if "loss" in record]
            ends = np.array([record["tokens_seen"] for record in points], dtype=float)
            names = [name for name in ("loss", "bits_per_byte") if all(name in record for record in points)]
            self.numbers = {name: np.array([record[name] for record in points], dtype=float) for name in names}
            starts = np.append(0.0, ends[:-1])
            if len(points) < 2 or (ends <= starts).any():
                raise ValueError("fewer than two records, or not in order")
            if not all(np.isfinite(numbers).all() for numbers in (ends, *self.numbers.values())):
                raise ValueError("a number that is not finite")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or repr(error)
            raise UserError(
                f"{path}: no reference log ({reason}); python images/draw.py reference makes them"
            ) from None
        self.tokens, self.last = (starts + ends) / 2, ends[-1]

    def at(self, tokens, name="loss"):
        """The number `name` of the reference after so many tokens, between its points on a logarithmic scale of tokens; None
        beyond its end, or where it has none."""
        if name not in self.numbers or not 0 < tokens <= self.last:
            return None
        return float(np.interp(math.log(tokens), np.log(self.tokens), self.numbers[name]))

    def same_kind(self, run):
        """Whether `run`, a dict as REQUIRED, is the same stage of the same shape."""
        shapes = [[one["config"].get(name) for name in SHAPE] for one in (self.header, run)]
        return self.header["stage"] == run["stage"] and shapes[0] == shapes[1]

    def same_data(self, run):
        """Whether it has the same rows too, tokenised by the same tokenizer."""
        return self.header["data"]["fingerprint"] == run["data"]["fingerprint"]


def checked_header(header):
    """`header`, where it says what a reference must. Raises KeyError, TypeError or ValueError otherwise."""
    if not isinstance(header["stage"], str) or not isinstance(header["config"], dict):
        raise ValueError("its first line does not say which run it was")
    if not isinstance(header["data"]["fingerprint"], str):
        raise ValueError("its first line does not say on which data")
    return header


def describe_run(trainer, data):
    """What the .json of a Trainer's checkpoint says for comparison with other runs, as REQUIRED and more."""
    settings, device = trainer.settings, trainer.device
    rows = settings.batch_size * settings.accumulation_steps * ranks.world_size()
    return dict(
        stage=trainer.stage,
        config={name: getattr(trainer.model.config, name) for name in SHAPE},
        data=dict(name=data.cache.name, rows=len(data), fingerprint=data.fingerprint),
        recipe={
            **{f"--{name}": getattr(settings, name) for name in RECIPE},
            "rows a step": rows,
            **({"steps in all": trainer.schedule.total_steps} if trainer.schedule.total_steps < math.inf else {}),
        },
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        command=command_line(without={"--resume": 0, "--overwrite": 0, "--stop_after": 1}),
    )


def find_reference(run, folder=None):
    """The Reference for `run`, a dict as REQUIRED, among the files of `folder`: one of the same kind and data, else one of the
    same kind that is typical (of ordinary text); None when there is neither. A damaged one gets a warning."""
    typical = None
    for path in sorted(Path(folder or FOLDER).glob("*.jsonl")):
        try:
            reference = Reference(path)
        except UserError as error:
            warn(error)
            continue
        if reference.same_kind(run):
            if reference.same_data(run):
                return reference
            typical = typical or (reference if reference.header.get("typical") else None)
    return typical


class Expectation:
    """What is expected of the losses of a run, a dict as REQUIRED, by a reference, if there is one."""

    def __init__(self, run):
        self.reference = find_reference(run)
        self.same_data = self.reference is not None and self.reference.same_data(run)

    def numbers(self, tokens_seen, window_tokens):
        """What a report on the last `window_tokens` of `tokens_seen` adds: {"expected_loss"} on the same data, {"typical_bits_per_byte"}
        on other data, {} without a reference or past its end."""
        if self.reference is None:
            return {}
        name, title = ("loss", "expected_loss") if self.same_data else ("bits_per_byte", "typical_bits_per_byte")
        number = self.reference.at(tokens_seen - window_tokens / 2, name)
        return {} if number is None else {title: number}


def reference_lines(log, typical=False):
    """The lines of a reference of the run that wrote `log` (out/**/logs/<run>.jsonl), whose checkpoint lies where it was
    written. Raises UserError without log or checkpoint, and for an older checkpoint that does not say what is needed."""
    log = Path(log)
    records = read_log(log)
    windows = [record for record in records if "loss" in record and "tokens_seen" in record]
    if len(windows) < 2:
        raise UserError(f"{log}: no training log, or one of fewer than two reports")
    described = described_run(log)
    header = {name: described[name] for name in TOLD if name in described}
    if typical:
        header["typical"] = True
    validations = [record for record in records if "validation_loss" in record]
    kept = np.unique(np.linspace(0, len(validations) - 1, min(VALIDATIONS, len(validations))).round().astype(int))
    shown = [numbers_of(validations[place], "step", "validation_loss", "validation_bits_per_byte") for place in kept]
    points = sorted([*thinned(windows), *shown], key=lambda record: (record["step"], "loss" not in record))
    return [json.dumps(line, ensure_ascii=False) for line in (header, *points)]


def write_reference(log, path, typical=False):
    """Write reference_lines of `log` as the file `path`. Raises what they do."""
    lines = reference_lines(log, typical)
    with atomic_write(path, "w", encoding="utf-8") as handle:
        handle.writelines(f"{line}\n" for line in lines)


def thinned(windows):
    """The reports `windows`, joined to at most POINTS: as many between 1,000 and 2,000 tokens as between 1 and 2 million. A
    joined loss is the mean by tokens."""
    ends = [window["tokens_seen"] for window in windows]
    edges = np.geomspace(ends[0], ends[-1], POINTS) * (1 - 1e-9)
    groups, before = {}, 0
    for window, place in zip(windows, np.searchsorted(edges, ends)):
        groups.setdefault(int(place), []).append((window, window["tokens_seen"] - before))
        before = window["tokens_seen"]
    names = [name for name in ("loss", "bits_per_byte") if name in windows[0]]
    for group in groups.values():
        total = sum(tokens for _, tokens in group)
        means = {name: sum(window[name] * tokens for window, tokens in group) / total for name in names}
        yield numbers_of({**group[-1][0], **means}, "step", "tokens_seen", *names)


def numbers_of(record, *names):
    """Those of `names` that a record has, to five digits."""
    return {
        name: float(f"{record[name]:.5g}") if isinstance(record[name], float) else record[name]
        for name in names
        if name in record
    }


def described_run(log):
    """The .json of the checkpoint whose run wrote `log`: out/single_chat/full_sft_512.json for
    out/logs/single_chat_full_sft_512.jsonl. Raises UserError when there is none, or an older one."""
    log = Path(log)
    out = log.parent.parent
    for path in (*out.glob("*.json"), *out.glob("*/*.json")):
        if run_name(path.relative_to(out)) == log.stem:
            described = read_metadata(path.with_suffix(".pth"))
            if all(name in described for name in REQUIRED):
                return described
    raise UserError(f"{log}: no checkpoint beside it says of which stage, shape and data it is (an older one does not)")
