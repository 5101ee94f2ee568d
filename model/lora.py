"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685): beside a frozen matrix W stands a product of two narrow ones, and the
layer computes W x + (alpha / rank) B A x. Training puts them on with peft; afterwards they are added into W, so that a
model with an adapter is as fast as one without.

A file `lora_<name>_<dim>[_moe].pth` holds the adapter alone, under v1's names of the matrices:
<matrix>.lora_A.weight [rank, columns of W] and <matrix>.lora_B.weight [rows of W, rank]. Its .json says rank, alpha, targets
("lora") and file and sha256 of the base ("parent").
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from model.checkpoint import check_description, file_sha256, read_metadata, read_tensors, weights_file
from model.errors import UserError, warn
from model.files import atomic_folder, refuse_foreign

PEFT_NAME = "default"  # under which peft keeps the one adapter that is trained
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
PARTS = (".lora_A.weight", ".lora_B.weight")


def target_matrices(model, targets):
    """Names of the linear layers of a Transformer's blocks that `targets` mean: "all", or names separated by commas, each
    one a part of v1's names: wq, attention, experts, layers.3, layers.0.feed_forward.w1.

    Raises UserError (exit code 2) for a target that matches none.
    """
    matrices = [name for name, layer in model.named_modules() if is_matrix(name, layer)]
    if targets == "all":
        return matrices
    chosen = set()
    for target in (word.strip() for word in targets.split(",")):
        found = {name for name in matrices if target and f".{target}." in f".{name}."}
        if not found:
            known = sorted({part for name in matrices for part in name.split(".")[2:] if not part.isdecimal()})
            way_out = f"choose from {', '.join(known)}, or all"
            raise UserError(f"--lora_targets: {target!r} matches no matrix of the model; {way_out}", exit_code=2)
        chosen |= found
    return [name for name in matrices if name in chosen]


def is_matrix(name, layer):
    """Whether a module is a linear layer within a block. (The output matrix is the embedding too, and the router is no
    nn.Linear.)"""
    return isinstance(layer, nn.Linear) and name.startswith("layers.")


def add_adapter(model, settings):
    """Put a new adapter on `model`, a Transformer, as LoraSettings say, and freeze everything else; returns the names of
    the matrices that have one. B begins at zero, so the model computes what it did before. Raises what target_matrices does.
    """
    matrices = target_matrices(model, settings.lora_targets)
    from peft import inject_adapter_in_model  # takes seconds

    inject_adapter_in_model(peft_config(settings, matrices), model, adapter_name=PEFT_NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return matrices


def peft_config(settings, matrices, **more):
    """peft's LoraConfig of LoraSettings."""
    from peft import LoraConfig

    rates = dict(r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout)
    return LoraConfig(**rates, target_modules=matrices, task_type="CAUSAL_LM", **more)


def describe_adapter(model, matrices):
    """Lines that say on which matrices an adapter is, numbers of layers and experts left out, and how much of all trains."""
    kinds = {}
    for name in matrices:
        kind = ".".join(part for part in name.split(".")[1:] if not part.isdecimal())
        kinds[kind] = kinds.get(kind, 0) + 1
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"adapter on {len(matrices)} matrices: {counts}\n{trained:,} of {total:,} parameters train ({trained / total:.2%})"


def adapter_parameters(model):
    """{name in its file: parameter} of the adapter that add_adapter has put on `model`."""
    return {
        name.replace(f".{PEFT_NAME}.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def adapter_weights(model):
    """The adapter that add_adapter has put on `model`, as its file holds it: {name: tensor}."""
    return {name: parameter.detach() for name, parameter in adapter_parameters(model).items()}


@torch.no_grad()
def load_adapter_weights(model, weights, path):
    """Put `weights`, which `path` holds, into the adapter on `model`. Raises UserError where they do not fit."""
    own = adapter_weights(model)
    for name in {**own, **weights}:
        shapes = [tuple(part[name].shape) if name in part else "missing" for part in (weights, own)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{path}: {name} is {shapes[0]} in the file but {shapes[1]} in the adapter")
    for name, tensor in own.items():
        tensor.copy_(weights[name])


@dataclass
class Adapter:
    """What read_adapter found. weights: {name: float32 tensor}. metadata: the .json beside the file."""

    path: Path
    weights: dict
    metadata: dict

    @property
    def matrices(self):
        """Names of the matrices that it changes."""
        return [name.removesuffix(PARTS[0]) for name in self.weights if name.endswith(PARTS[0])]

    def update(self, matrix):
        """What is added to the weight of `matrix`: (alpha / rank) B A, float32 [rows, columns]."""
        narrow, wide = (self.weights[matrix + part] for part in PARTS)
        return wide @ narrow * (self.metadata["lora"]["alpha"] / narrow.shape[0])


def is_adapter(state):
    """Whether a state dict is an adapter's and not a model's."""
    return isinstance(state, dict) and any(str(name).endswith(PARTS) for name in state)


def read_adapter(path):
    """The Adapter in a .pth and its .json. Raises UserError for a file that holds none, or without its description."""
    path = Path(path)
    state = read_tensors(path)
    if not is_adapter(state):
        raise UserError(
            f"{path}: holds no LoRA adapter; --lora takes what 4-lora_sft.py wrote, out/lora_<name>_<dim>.pth"
        )
    metadata = read_metadata(path)
    check_description(path, metadata)
    lora, base = metadata.get("lora"), metadata.get("parent")
    alpha = lora.get("alpha") if isinstance(lora, dict) else None
    file = base.get("file") if isinstance(base, dict) else None
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or not isinstance(file, str):
        raise UserError(f"{path}: needs its .json beside it, which says rank, alpha and base; copy both files")
    pairs = {name.removesuffix(part) for name in map(str, state) for part in PARTS if name.endswith(part)}
    wanted = {matrix + part for matrix in pairs for part in PARTS}
    matrices = all(isinstance(tensor, torch.Tensor) and tensor.dim() == 2 for tensor in state.values())
    if wanted != state.keys() or not matrices:
        raise UserError(
            f"{path}: is not a whole adapter: for each matrix there must be lora_A and lora_B; copy it again"
        )
    weights = {name: tensor.float() for name, tensor in state.items()}
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise UserError(f"{path}: holds numbers that are not finite; train it again")
    return Adapter(path, weights, metadata)


def check_base(adapter, checkpoint, force=False):
    """Raise UserError unless the weights in `checkpoint` are those that `adapter` was trained on; with force: warn."""
    base = adapter.metadata["parent"]
    if base.get("sha256") == file_sha256(weights_file(checkpoint)):
        return
    problem = f"{adapter.path}: was trained on {base.get('file')}, and the weights in {checkpoint} are not those"
    if not force:
        raise UserError(f"{problem}; give its base with --checkpoint, or --force to try it all the same")
    warn(problem)


@torch.no_grad()
def merged_weights(model, adapter):
    """{name: tensor in the model's own dtype} of the matrices that `adapter` changes, added up in float32.

    Raises UserError for a matrix that the Transformer `model` does not have, or has in another shape.
    """
    layers, merged = {name: layer for name, layer in model.named_modules() if is_matrix(name, layer)}, {}
    for matrix in adapter.matrices:
        if matrix not in layers:
            raise UserError(f"{adapter.path}: changes {matrix}, which the model does not have; it is for another one")
        weight = layers[matrix].weight
        narrow, wide = (adapter.weights[matrix + part] for part in PARTS)
        shape = wide.shape[0], narrow.shape[1]
        if tuple(weight.shape) != shape or wide.shape[1] != narrow.shape[0]:
            raise UserError(f"{adapter.path}: changes {matrix} of {shape}, which is {tuple(weight.shape)} in the model")
        merged[matrix] = (weight.float() + adapter.update(matrix).to(weight.device)).to(weight.dtype)
    return merged


@torch.no_grad()
def merge(model, adapter):
    """Add `adapter` into the weights of the Transformer `model`, for good. Raises what merged_weights does."""
    for matrix, weight in merged_weights(model, adapter).items():
        model.get_submodule(matrix).weight.copy_(weight)


def named(checkpoint, adapter=None):
    """What is shown of a checkpoint and of the adapter file on it, if there is one."""
    return f"{checkpoint} with {adapter}" if adapter else checkpoint


def weights_sha256(checkpoint, adapter=None):
    """Hexadecimal sha256 that names the weights of a checkpoint; with an adapter file on it, that of both files' hashes."""
    digest = file_sha256(weights_file(checkpoint))
    return hashlib.sha256(f"{digest}{file_sha256(adapter)}".encode()).hexdigest() if adapter else digest


def check_peft_folder(path):
    """Raise UserError unless save_peft_folder may write `path`."""
    refuse_foreign(path, PEFT_FILES)


def save_peft_folder(path, weights, settings, matrices, base):
    """Write an adapter's weights, as adapter_weights gives them, as the folder that PeftModel.from_pretrained(base model,
    path) reads, complete or not at all. base: file or folder of the base's weights, which peft's configuration names."""
    weights = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in weights.items()}
    config = peft_config(settings, matrices, base_model_name_or_path=str(base), inference_mode=True)
    with atomic_folder(path) as folder:
        (folder / "adapter_model.safetensors").write_bytes(safetensors.torch.save(weights, {"format": "pt"}))
        config.save_pretrained(folder)
