"""From settings to a configuration and from that to a model, fresh or with the weights of an earlier stage."""

import psutil

from model.checkpoint import check_tokenizer, file_sha256, load_model, weights_file
from model.errors import UserError
from model.LMConfig import PRESETS, preset_config
from model.model import Transformer

DEFAULT_PRESET = "minimind-v1-small"
# What decides which weights exist; a parent checkpoint's values win unless one is given explicitly.
SHAPE_FIELDS = ("dim", "n_layers", "n_heads", "n_kv_heads", "use_moe")


def explicit_fields(shape):
    """{field: value} of the LMConfig fields that ShapeSettings or ModelSettings give besides the preset."""
    names = (*SHAPE_FIELDS, "max_seq_len", "dropout")
    return {name: getattr(shape, name) for name in names if getattr(shape, name, None) is not None}


def requested_config(shape):
    """LMConfig of the preset with the explicit fields put over it. Raises UserError for an impossible shape."""
    preset = shape.preset or DEFAULT_PRESET
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: no such preset; choose one of {', '.join(PRESETS)}", exit_code=2)
    try:
        return preset_config(preset, **explicit_fields(shape))
    except ValueError as error:
        raise UserError(f"--{error}") from None


def required_fields(shape):
    """{field: value} that a checkpoint must have: the explicit ones, and the whole shape of a preset that was given."""
    config, required = requested_config(shape), explicit_fields(shape)
    if shape.preset:
        required.update({name: getattr(config, name) for name in SHAPE_FIELDS})
    return required


def weights_size(config):
    """Bytes of the float32 weights of an LMConfig, nearly (without norms and router)."""
    attention = 2 * config.dim * config.head_dim * (config.n_heads + config.n_kv_heads)
    experts = config.n_routed_experts + config.n_shared_experts if config.use_moe else 1
    layer = attention + 3 * config.dim * config.hidden_dim * experts
    return 4 * (config.n_layers * layer + config.vocab_size * config.dim)


def build_model(settings, tokenizer, parent=None):
    """(model, parent's .json entry or None): fresh from ModelSettings, or the weights of the checkpoint `parent`.

    A fresh model takes its vocabulary size from the tokenizer. A parent's shape wins over the default preset; an
    explicit field or preset that contradicts it raises UserError, as does another tokenizer, and an explicit preset
    with another number of words.
    """
    config, entry = requested_config(settings), None
    if parent is not None:
        required = required_fields(settings)
        if config.use_moe and "n_shared_experts" in PRESETS.get(settings.preset, ()):
            required["n_shared_experts"] = config.n_shared_experts
        model, metadata = load_model(parent, **required)
        check_tokenizer(tokenizer, parent, model, metadata)
        entry = {"file": str(parent), "sha256": file_sha256(weights_file(parent))}
    if settings.preset and config.vocab_size != len(tokenizer):
        raise UserError(
            f"--preset {settings.preset}: has {config.vocab_size} words but the tokenizer {len(tokenizer)}; give its "
            "tokenizer with --tokenizer_path, or the shape by --dim, --n_layers and so on instead of --preset"
        )
    if parent is None:
        config.vocab_size = len(tokenizer)
        needed, there = weights_size(config), psutil.virtual_memory().total
        if needed > there:
            size = f"its weights need {needed / 1e9:,.0f} GB and this machine has {there / 1e9:,.0f}"
            raise UserError(f"--dim, --n_layers: {size}; choose a smaller model")
        model = Transformer(config)
    return model, entry
