"""Which optimizer moves which parameter, and how fast in which step."""

import dataclasses
import math
import re

import torch

from model.errors import UserError

WARMUP_SHARE = 0.05
# Of Muon: three learned as well as five on a CPU, where five are a fifth of a small model's step (docs/recipe.md).
NEWTON_SCHULZ_STEPS = 3


def build_optimizers(model, settings):
    """A list of optimizers over the trainable parameters: AdamW, or Muon on hidden matrices and AdamW on the rest.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) orthogonalises updates of linear maps; embeddings, the
    router and norms are none. The embedding has a rate of its own: of its rows a step moves only those whose word it met.
    Only matrices decay, each by learning_rate * weight_decay per step under either optimizer. Every group keeps its peak
    rate as "initial_lr", as PyTorch's schedulers do. settings: resolved TrainingSettings.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    optimizers, hidden = [], set()
    if settings.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"--optimizer muon: PyTorch {torch.__version__} has none; use adamw or PyTorch 2.9")
        hidden = {name for name, parameter in parameters.items() if is_hidden_matrix(name, parameter)}
    if hidden:
        rate = settings.muon_learning_rate
        options = dict(lr=rate, weight_decay=decay_for(rate, settings), momentum=settings.beta1)
        matrices = [parameter for name, parameter in parameters.items() if name in hidden]
        optimizers.append(torch.optim.Muon(matrices, ns_steps=NEWTON_SCHULZ_STEPS, **options))
    groups = {"matrices": [], "vectors": [], "embeddings": []}
    for name, parameter in parameters.items():
        if name not in hidden:
            kind = "vectors" if parameter.dim() < 2 else "embeddings" if id(parameter) in embeddings else "matrices"
            groups[kind].append(parameter)
    rates = dict.fromkeys(groups, settings.learning_rate)
    rates["embeddings"] *= settings.embedding_rate_factor
    decays = {kind: decay_for(rate, settings) for kind, rate in rates.items()}
    decays["vectors"] = 0.0
    groups = [
        {"params": members, "lr": rates[kind], "weight_decay": decays[kind]}
        for kind, members in groups.items()
        if members
    ]
    if groups:
        fused = next(iter(parameters.values())).device.type in ("cpu", "cuda")
        optimizers.append(torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), fused=fused))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def decay_for(rate, settings):
    """The optimizer's weight decay with which a matrix of this rate shrinks as one of --learning_rate does."""
    return settings.weight_decay * settings.learning_rate / rate if rate else 0.0


def is_hidden_matrix(name, parameter):
    """Whether a parameter is a linear map inside a layer, under its own name, the one that peft gives it
    ("base_model.model.layers.0.attention.wq.lora_A.default.weight") or a stock class's. (Experts that a stock class joins in
    one tensor are none.)"""
    router = {"gate", "router"} & set(name.split("."))
    return parameter.dim() == 2 and bool(re.search(r"(^|\.)layers\.\d+\.", name)) and not router


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long a run is and how fast it learns at each moment: by steps, by seconds of training, or what ends first.

    total_steps and seconds may be infinite, not both. The warm-up ends after warmup_steps, or warmup_seconds if sooner.
    decay: "linear" or "cosine", in the last decay_share of what follows it.
    """

    total_steps: float
    warmup_steps: int
    seconds: float = math.inf
    warmup_seconds: float = math.inf
    decay: str = "linear"
    decay_share: float = 1.0

    def factor(self, step, elapsed=0.0):
        """Share of the peak learning rate in step `step` (from 0), `elapsed` seconds into the run: linear warm-up, the peak,
        then with p the share done of the decay: 1 - p (Bergsma et al. 2025, arXiv 2502.15938), or v1's cosine to a tenth,
        0.1 + 0.5 * 0.9 * (1 + cos(pi p))."""
        if step < self.warmup_steps and elapsed < self.warmup_seconds:
            return max((step + 1) / (self.warmup_steps + 1), elapsed / self.warmup_seconds)
        left = 1 - self.progress(step, elapsed)
        if left >= self.decay_share:
            return 1.0
        done = 1 - left / self.decay_share
        return 1 - done if self.decay == "linear" else 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    def progress(self, step, elapsed=0.0):
        """Share done of the steps after the warm-up, or of the seconds where that is more."""
        steps = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return min(1.0, max(steps, elapsed / self.seconds))

    def is_over(self, step, elapsed, pace):
        """Whether nothing is left to do after `step` steps in `elapsed` seconds: a further one, of `pace` seconds, would
        not fit."""
        return step >= self.total_steps or elapsed + pace > self.seconds


def make_schedule(settings, steps_per_epoch):
    """The Schedule of resolved TrainingSettings: epochs, max_steps and max_minutes as far as given, one epoch if none."""
    seconds = math.inf if settings.max_minutes is None else 60 * settings.max_minutes
    epochs, total_steps = settings.epochs, settings.max_steps or math.inf
    if total_steps == seconds == math.inf:
        epochs = epochs or 1
    if epochs is not None:
        total_steps = min(total_steps, epochs * steps_per_epoch)
    options = dict(decay=settings.schedule, decay_share=settings.decay_share)
    if settings.warmup_iters is not None:
        return Schedule(total_steps, settings.warmup_iters, seconds, **options)
    return Schedule(total_steps, min(2000, total_steps) // 20, seconds, WARMUP_SHARE * seconds, **options)


def set_learning_rates(optimizers, factor):
    """Every parameter group's rate becomes `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
