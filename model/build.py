"""From model flags to a configuration and from that to a model, fresh or with the weights of an earlier stage."""

from pathlib import Path

from model.checkpoint import check_tokenizer, checkpoint_path, file_sha256, load_model
from model.errors import UserError
from model.LMConfig import PRESETS, preset_config
from model.model import Transformer

DEFAULT_PRESET = "minimind-v1-small"
# Flags that decide which weights exist; a parent checkpoint's values win unless one is given explicitly.
SHAPE_FLAGS = ("dim", "n_layers", "n_heads", "n_kv_heads", "use_moe")


def model_overrides(args, names=SHAPE_FLAGS + ("max_seq_len", "dropout")):
    """The model flags given on the command line, as a dict; one that the script does not have is not given."""
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def requested_config(args):
    """LMConfig of --preset with the explicit model flags put over it. Raises UserError for an impossible shape."""
    preset = args.preset or DEFAULT_PRESET
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: no such preset; choose one of {', '.join(PRESETS)}", exit_code=2)
    try:
        return preset_config(preset, **model_overrides(args))
    except ValueError as error:
        raise UserError(f"--{error}") from None


def build_model(args, tokenizer, parent=None):
    """(model, parent's .json entry or None): fresh from the flags, or the weights of `parent` (--init_from).

    A fresh model takes its vocabulary size from the tokenizer. A parent's shape wins over the default preset;
    a model flag or preset that was given and contradicts it raises UserError, as does another tokenizer, and a preset
    that was given but has another number of words.
    """
    config = requested_config(args)
    if parent is None:
        check_preset_words(args, config, len(tokenizer))
        config.vocab_size = len(tokenizer)
        return Transformer(config), None
    asked = model_overrides(args)
    if args.preset:
        asked.update({name: getattr(config, name) for name in SHAPE_FLAGS})
    if config.use_moe and "n_shared_experts" in PRESETS.get(args.preset, ()):
        asked["n_shared_experts"] = config.n_shared_experts
    model, metadata = load_model(parent, **asked)
    check_tokenizer(tokenizer, parent, model, metadata)
    check_preset_words(args, config, len(tokenizer))
    return model, {"file": str(parent), "sha256": file_sha256(parent)}


def check_preset_words(args, config, words):
    """UserError when --preset was given and names a vocabulary of another size than the tokenizer's `words`."""
    if args.preset and config.vocab_size != words:
        raise UserError(
            f"--preset {args.preset}: has {config.vocab_size} words but the tokenizer {words}; give its tokenizer with "
            "--tokenizer_path, or the shape by --dim, --n_layers and so on instead of --preset"
        )


def default_parent(args, stage, script):
    """The checkpoint that an earlier stage wrote for the shape in the flags. Raises UserError when there is none."""
    path = checkpoint_path(args.out_dir, stage, requested_config(args))
    if not path.is_file():
        others = path.parent.glob(f"{Path(stage).name}_*.pth")
        found = sorted(str(other) for other in others if other.suffixes == [".pth"])
        others = f" (there is {', '.join(found)})" if found else ""
        raise UserError(f"{path}: no such checkpoint; run {script} first, or name another with --init_from{others}")
    return path
