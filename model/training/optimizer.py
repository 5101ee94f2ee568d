"""Which optimizer moves which parameter, and how fast in which step."""

import math
import re

import torch

from model.errors import UserError


def build_optimizers(model, settings):
    """A list of optimizers over the trainable parameters: AdamW, or Muon on hidden matrices and AdamW on the rest.

    Only matrices decay, each by learning_rate * weight_decay per step under either optimizer. Muon (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon) orthogonalises updates of linear maps; embeddings, the router and norms are none.
    Every group keeps its peak rate as "initial_lr", as PyTorch's schedulers do. settings: resolved TrainingSettings.
    """
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizers, hidden = [], set()
    if settings.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"--optimizer muon: PyTorch {torch.__version__} has none; use adamw or PyTorch 2.9")
        matrices = [(name, parameter) for name, parameter in parameters if is_hidden_matrix(name, parameter)]
        hidden = {name for name, _ in matrices}
        rate = settings.muon_learning_rate
        decay = settings.weight_decay * settings.learning_rate / rate if rate else 0.0
        optimizers.append(torch.optim.Muon([matrix for _, matrix in matrices], lr=rate, weight_decay=decay))
    rest = [parameter for name, parameter in parameters if name not in hidden]
    groups = [
        {"params": [parameter for parameter in rest if parameter.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [parameter for parameter in rest if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        fused = parameters[0][1].device.type in ("cpu", "cuda")
        optimizers.append(torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=fused))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def is_hidden_matrix(name, parameter):
    """Whether a parameter is a linear map inside a layer, under its own name or under the one that peft gives it
    ("base_model.model.layers.0.attention.wq.lora_A.default.weight")."""
    return parameter.dim() == 2 and bool(re.search(r"(^|\.)layers\.\d+\.", name)) and "gate" not in name.split(".")


def learning_rate_factor(step, total_steps, warmup_steps):
    """Share of the peak learning rate in step `step` (from 0): linear warm-up, then v1's cosine to a tenth,
    0.1 + 0.5 * 0.9 * (1 + cos(pi t / T)) with t and T counted from the end of the warm-up."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def set_learning_rates(optimizers, factor):
    """Every parameter group's rate becomes `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
