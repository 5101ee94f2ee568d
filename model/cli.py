"""Command lines: flags made of the dataclasses in model/settings.py, and back. Imports nothing heavy."""

import model.errors  # noqa: F401  # before all else: from here on Ctrl-C ends a script with one line

# isort: split
import argparse
import dataclasses
import sys

from model.errors import first_to_fail
from model.settings import (
    DataSettings,
    InferenceSettings,
    ModelSettings,
    SamplingParameters,
    TrainingSettings,
    violation,
)


class ScriptParser(argparse.ArgumentParser):
    """An ArgumentParser that tells wrong usage once, however many processes a launcher has given it to."""

    def error(self, message):
        if not first_to_fail():
            sys.exit(2)
        super().error(message)


def script_parser(description):
    """A ScriptParser whose --help begins with a script's docstring as it stands."""
    return ScriptParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_flags(parser, settings, title, leave_out=(), **defaults):
    """A flag for each field of the dataclass `settings` but those in `leave_out`, in a group `title`; `defaults` replace the
    class's own."""
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(settings):
        if not field.metadata or field.name in leave_out:
            continue
        default, kind = defaults.get(field.name, field.default), field.metadata["kind"]
        limits = dict(field.metadata["limits"])
        options = {name: limits.pop(name) for name in ("choices", "metavar") if name in limits}
        if "alone" in limits:
            options.update(nargs="?", const=limits.pop("alone"))
        unset = limits.pop("unset", None)
        shown = str(unset if default is None else default)
        options["help"] = field.metadata["help"].replace("{default}", shown).replace("%", "%%")
        if kind is bool:
            options["action"] = "store_true"
        else:
            options["type"] = checked(kind, limits)
        group.add_argument(f"--{field.name}", default=default, **options)


def checked(kind, limits):
    """argparse type: a value of `kind`, or the one `word`, within `limits` (see violation)."""

    def parse(text):
        value = text if text == limits.get("word") else kind(text)
        if problem := violation(value, **limits):
            raise argparse.ArgumentTypeError(f"{problem}, got {text}")
        return value

    parse.__name__ = f"{limits['word']} or {kind.__name__}" if "word" in limits else kind.__name__
    return parse


positive_int = checked(int, {"least": 1})
non_negative_int = checked(int, {"least": 0})


def add_training_flags(parser, epochs, model=ModelSettings, leave_out=(), **defaults):
    """The flags of a training stage, with its defaults. model: the dataclass of those that say which model. leave_out:
    TrainingSettings' fields that the stage does not know."""
    add_flags(parser, model, "model")
    add_flags(parser, DataSettings, "data and checkpoints", **defaults)
    add_flags(parser, TrainingSettings, "training", leave_out, epochs=epochs, **defaults)
    parser.add_argument("--local-rank", dest="local_rank", type=non_negative_int, help=argparse.SUPPRESS)
    if "deepspeed" not in leave_out:  # DeepSpeed's own scripts take the file so, beside --deepspeed
        parser.add_argument("--deepspeed_config", help=argparse.SUPPRESS)
    parser.set_defaults(epochs=None, stage_epochs=epochs)


def training_settings(args):
    """TrainingSettings of the parsed flags; the stage's own number of epochs holds unless another flag says how long."""
    if getattr(args, "deepspeed_config", None):
        args.deepspeed = args.deepspeed_config
    if args.epochs is None and args.max_steps is None and args.max_minutes is None:
        args.epochs = args.stage_epochs
    return from_flags(TrainingSettings, args)


def add_inference_flags(parser):
    """The flags of a script that runs a trained model: which one, where, how it picks tokens."""
    add_flags(parser, InferenceSettings, "checkpoint and machine")
    add_flags(parser, SamplingParameters, "sampling", temperature=0.7, top_k=8, max_new_tokens=256, seed=1337)


def from_flags(settings, args):
    """The dataclass `settings` filled with the parsed flags; fields that are no flag of the script keep their default."""
    names = [field.name for field in dataclasses.fields(settings) if hasattr(args, field.name)]
    return settings(**{name: getattr(args, name) for name in names})
