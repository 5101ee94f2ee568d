"""Checkpoints: `<stage>_<dim>[_moe].pth` (a plain state dict), `.json` beside it (what it is) and `.resume.pth` (how to
go on). A Hugging Face folder is read too, as the weights that it holds.

The three are on the disk completely before the first of them is renamed to its final name. Should the machine stop
between two renames, nothing mixes unnoticed: the .json names the sha256 of its .pth, and the .resume.pth, the first to
be renamed, holds its own copy of the weights, from which --resume mends the others.
"""

import hashlib
import inspect
import json
import platform
import re
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import transformers

from model.convert import fields_of_config, state_of_stock_weights
from model.errors import UserError, warn
from model.files import atomic_files
from model.LMConfig import PRESETS, LMConfig
from model.model import Transformer
from model.stages import STAGES
from model.tokenizer import DEFAULT_TOKENIZER_PATH, load_tokenizer, own_tokenizer, tokenizer_hash

CONFIG_FIELDS = tuple(name for name in inspect.signature(LMConfig).parameters if name != "kwargs")
# May change without changing what a weight means; every other field of a checkpoint is what it is.
FREE_FIELDS = ("max_seq_len", "dropout", "flash_attn", "rope_scaling", "aux_loss_alpha", "seq_aux")


def checkpoint_path(out_dir, stage, config):
    """out_dir/<stage>_<dim>[_moe].pth; `stage` may contain a folder, as in "single_chat/full_sft"."""
    return Path(out_dir) / f"{stage}_{config.dim}{'_moe' if config.use_moe else ''}.pth"


def find_checkpoint(out_dir, stages, config, flag):
    """The checkpoint of the first of `stages` (names of model.stages) that has one of the shape of `config`.

    Raises UserError that names what there is instead, and `flag` as the way to give another.
    """
    paths = [checkpoint_path(out_dir, stage, config) for stage in stages]
    for path in paths:
        if path.is_file():
            return path
    found = {str(other) for path in paths for other in path.parent.glob("*.pth") if other.suffixes == [".pth"]}
    others = f" (there is {', '.join(sorted(found))})" if found else ""
    needs_least = STAGES[stages[-1]]
    command = f"run {needs_least.command} first, or name another with {flag}{others}"
    raise UserError(f"{' or '.join(map(str, paths))}: no such checkpoint; {command}")


def resume_path(path):
    """The training state that belongs to the checkpoint `path`."""
    return Path(path).with_suffix(".resume.pth")


def save_checkpoint(path, model, metadata, training_state=None, weights=None):
    """Write `path` (.pth), the .json beside it and, given a training_state, the .resume.pth, all of them or none.

    weights: the state dict to save (default: the model's).
    metadata: what the .json says besides config, versions and the weights' sha256, which are added here.
    training_state: tensors and plain values only; the weights are added here.
    Raises OSError (a full disk, for one) and then leaves the files of the last good checkpoint as they were.
    """
    path = Path(path)
    weights = {name: tensor.detach().cpu() for name, tensor in (weights or model.state_dict()).items()}
    config = {name: getattr(model.config, name) for name in CONFIG_FIELDS}
    versions = dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)
    with atomic_files() as create:
        training_file = create(resume_path(path)) if training_state is not None else None
        weights_file = create(path, "w+b")
        write_tensors(weights, weights_file)
        weights_file.seek(0)
        sha256 = hashlib.file_digest(weights_file, "sha256").hexdigest()
        if training_file is not None:
            write_tensors({**training_state, "weights": weights, "weights_sha256": sha256}, training_file)
        record = {**metadata, "config": config, "weights_sha256": sha256, "versions": versions}
        json.dump(record, create(path.with_suffix(".json"), "w", encoding="utf-8"), ensure_ascii=False, indent=2)


def write_tensors(value, handle):
    """torch.save, with the operating system's error (a full disk) where torch reports a broken archive instead."""
    try:
        torch.save(value, handle)
        handle.flush()
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read_tensors(path):
    """torch.load on the CPU of nothing but tensors and plain values.

    Raises UserError for a missing, truncated or foreign file, and for a pickle that wants to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types here, from UnpicklingError to struct.error
        unsafe = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) (\S+)", str(error))
        if unsafe:
            raise UserError(f"{path}: refused, loading it would run {unsafe[1]}; use a plain state dict") from None
        raise UserError(f"{path}: not a PyTorch checkpoint, or a truncated one; copy or download it again") from None


def weights_file(path):
    """The file that holds the weights of a checkpoint: `path` itself, or model.safetensors or v1's pytorch_model.bin in
    the Hugging Face folder `path`. Raises UserError for a folder without one."""
    path = Path(path)
    if not path.is_dir():
        return path
    files = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
    for file in files:
        if file.is_file():
            return file
    parts = "; it is in parts, save it again as one file" if any(path.glob("*.index.json")) else ""
    raise UserError(f"{path}: has no {' or '.join(file.name for file in files)}{parts}")


def read_weights(path):
    """The state dict in `path`, a .pth or a Hugging Face folder, under today's names: `_orig_mod.` and `module.`,
    prefixes of torch.compile and DDP, go; the tied output matrix may be left out of a file."""
    file = weights_file(path)
    state = read_safetensors(file) if file.suffix == ".safetensors" else read_tensors(file)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file}: holds no state dict (names and tensors), so it is not a MiniMind checkpoint")
    if "model.embed_tokens.weight" in state and Path(path).is_dir():
        try:
            state = state_of_stock_weights(state, LMConfig(**read_metadata(path)["config"]))
        except ValueError as error:
            raise UserError(f"{file}: {error}") from None
    for name, tensor in state.items():
        if not tensor.is_floating_point() and not tensor.is_complex():  # v1's pos_cis is complex
            raise UserError(f"{file}: {name} holds {tensor.dtype}, no weights; only float formats can be read")
    named = {re.sub(r"^(?:(?:_orig_mod|module)\.)+", "", name): tensor for name, tensor in state.items()}
    if any(".lora_A." in name for name in named):
        way_out = "give it with --lora, beside its base, or merge them: export_model.py --lora FILE --format pth"
        raise UserError(f"{file}: is a LoRA adapter and no whole model; {way_out}")
    embeddings = named.get("tok_embeddings.weight")
    if embeddings is None or embeddings.dim() != 2:
        raise UserError(f"{file}: has no matrix tok_embeddings.weight, so it is not a MiniMind checkpoint")
    output = named.setdefault("output.weight", embeddings)
    if not torch.equal(output, embeddings):
        raise UserError(f"{file}: output.weight differs from tok_embeddings.weight, but MiniMind ties the two")
    return named


def read_safetensors(path):
    """The tensors of a .safetensors file. Raises UserError when it is none."""
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or a truncated one ({error}); copy it again") from None


def read_metadata(path):
    """The .json beside the checkpoint `path` as a dict, {} when there is none; of a Hugging Face folder {"config": fields
    of its config.json}. Raises UserError when it is broken, or describes what MiniMind cannot hold."""
    path = Path(path)
    if path.is_dir():
        return {"config": read_folder_config(path / "config.json")}
    description = path.with_suffix(".json")
    if description == path or not description.exists():
        return {}
    try:
        metadata = json.loads(description.read_text(encoding="utf-8"))
        LMConfig(**metadata["config"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{description}: describes no checkpoint ({error!r}); remove it or restore it") from None
    return metadata


def read_folder_config(path):
    """LMConfig's fields of a Hugging Face config.json. No code that lies beside it is run."""
    if not path.exists():
        raise UserError(f"{path.parent}: has no config.json, so it is not a Hugging Face folder")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(description, dict):
            raise ValueError("not an object")
        return fields_of_config(description, CONFIG_FIELDS)
    except RecursionError:
        raise UserError(f"{path}: not a model's configuration") from None
    except Exception as error:  # transformers' own checks raise classes of theirs
        lines = str(error).strip().splitlines()
        reason = " ".join(line.strip() for line in lines) or type(error).__name__
        raise UserError(f"{path}: {reason}") from None


def load_model(path, **config_overrides):
    """(Transformer in float32 on the CPU, metadata) of a checkpoint, today's or v1's, a .pth or a Hugging Face folder.

    The config comes from the .json beside it, without one from tensor shapes, config_overrides and the presets (shapes
    do not tell the number of heads). Raises UserError when the file is not a checkpoint, or when a flag or the .json
    asks for another shape than the weights have.
    """
    metadata = read_metadata(path)
    state = read_weights(path)
    overrides = {name: value for name, value in config_overrides.items() if value is not None}
    buffers = {name: state.pop(name) for name in list(state) if name.split(".")[-1] in ("mask", "pos_cis")}
    shapes = shape_fields(state, path)
    known = dict(metadata["config"]) if metadata else {**shapes, **head_fields(state, buffers, overrides, path)}
    if known.get("use_moe") and Path(path).is_dir():  # v1 made one shared expert, whatever number its config gave
        known["n_shared_experts"] = shapes.get("n_shared_experts")
    for name, value in shapes.items():  # before a description's numbers decide how much memory to ask for
        if known.get(name) != value:
            raise UserError(f"{path}: has {name} {value}, but its .json says {known.get(name)}; restore or remove that")
    for name, value in overrides.items():
        if name not in FREE_FIELDS and name in known and known[name] != value:
            raise UserError(f"{path}: has {name} {known[name]}, not {value}; leave out or change --{name} or --preset")
    try:
        config = LMConfig(**{**known, **overrides})
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from None
    check_description(path, metadata)
    with torch.device("meta"):  # no random weights, which would only be replaced
        model = Transformer(config)
    load_weights(model, {name: tensor.float().clone() for name, tensor in state.items()}, path, assign=True)
    model.tie_weights()
    return model, metadata


def check_description(path, metadata):
    """Warn when the .json beside the checkpoint `path` was written with other weights."""
    sha256 = metadata.get("weights_sha256")
    if sha256 is not None and sha256 != file_sha256(path):
        warn(f"{path} is not the file its .json describes (changed or half replaced)")


def shape_fields(state, path):
    """The config fields that the shapes of v1's weights tell."""
    width = {name: tuple(tensor.shape) for name, tensor in state.items()}
    layers = {int(match[1]) for match in map(re.compile(r"layers\.(\d+)\.").match, state) if match}
    gate, shared = (f"layers.0.feed_forward.{name}.weight" for name in ("gate", "shared_experts.w1"))
    use_moe = gate in width
    w1 = "layers.0.feed_forward." + ("experts.0." if use_moe else "") + "w1.weight"
    for name in (w1, "layers.0.attention.wq.weight", "layers.0.attention.wk.weight"):
        if name not in width:
            raise UserError(f"{path}: has no tensor {name}, so it is not a MiniMind checkpoint")
    (vocab_size, dim), hidden_dim = width["tok_embeddings.weight"], width[w1][0]
    fields = dict(dim=dim, n_layers=len(layers), vocab_size=vocab_size, hidden_dim=hidden_dim, use_moe=use_moe)
    if use_moe:
        fields.update(n_routed_experts=width[gate][0], n_shared_experts=width.get(shared, (0,))[0] // hidden_dim)
    return fields


def head_fields(state, buffers, overrides, path):
    """Numbers of heads by the RoPE table, the flags or a preset, for weights alone do not tell them."""
    dim, layers = state["tok_embeddings.weight"].shape[1], sum(name.endswith(".attention.wk.weight") for name in state)
    width, kv_width = (state[f"layers.0.attention.{name}.weight"].shape[0] for name in ("wq", "wk"))
    same_shape = [preset for preset in PRESETS.values() if (preset["dim"], preset["n_layers"]) == (dim, layers)]
    preset_heads = same_shape[0].get("n_heads") if same_shape else None
    heads = overrides.get("n_heads") or preset_heads or LMConfig().n_heads
    if "pos_cis" in buffers:
        heads = width // (2 * buffers["pos_cis"].shape[-1])
    if width % heads or kv_width % (width // heads):
        raise UserError(f"{path}: wk has {kv_width} rows, no multiple of wq's {width} / {heads} heads; give --n_heads")
    return {"n_heads": heads, "n_kv_heads": kv_width // (width // heads), "head_dim": width // heads}


def load_weights(model, state, path, assign=False):
    """Copy `state` into `model`, every tensor by name and shape; UserError names the first that does not fit. assign: let
    the tensors themselves become the model's."""
    check_fits(state, {name: tensor.shape for name, tensor in model.state_dict().items()}, path)
    model.load_state_dict(state, strict=True, assign=assign)


def check_fits(state, shapes, path):
    """UserError names the first tensor of `state`, which `path` holds, that does not fit {name: shape} of a model."""
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected = {name: tuple(shape) for name, shape in shapes.items()}
    for name in (*found, *expected):
        if name not in expected:
            raise UserError(f"{path}: tensor {name} {found[name]} has no place in a model of this shape")
        if name not in found:
            raise UserError(f"{path}: tensor {name} {expected[name]} is missing; check --preset and --n_layers")
        if found[name] != expected[name]:
            shapes = f"{found[name]} in the file but {expected[name]} in the model"
            raise UserError(f"{path}: {name} is {shapes}; check --preset, --dim")


def file_sha256(path):
    """sha256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_tokenizer(tokenizer, path, model, metadata):
    """UserError unless `tokenizer` is the one that the checkpoint `path` was trained with, as far as can be known.

    A .pth alone does not say; v1's has as many words as the tokenizer shipped here but other ones, hence a warning.
    """
    if len(tokenizer) != model.config.vocab_size:
        words = model.config.vocab_size
        raise UserError(f"{path}: has {words} words but the tokenizer {len(tokenizer)}; correct --tokenizer_path")
    known, own = metadata.get("tokenizer_hash"), own_tokenizer(path)
    if known is None and own is not None and Path(own) != Path(tokenizer.name_or_path):
        known = tokenizer_hash(load_tokenizer(own))
    if known is None and Path(tokenizer.name_or_path).resolve() == DEFAULT_TOKENIZER_PATH.resolve():
        reason = "cannot tell which tokenizer it was trained with, using the one shipped here"
        warn(f"{path}: {reason}; v1's published weights need v1's own tokenizer folder (--tokenizer_path)")
    if known not in (None, tokenizer_hash(tokenizer)):
        raise UserError(f"{path}: was trained with another tokenizer of the same size; give the right --tokenizer_path")
