"""How gradients are computed, combined over the ranks and applied, and which weights are saved.

The loop asks one object for all that another way of training does differently. DataParallel is plain training, and
DistributedDataParallel where a launcher started several ranks; sharded optimizers or adapters are other classes with
the same methods.
"""

import contextlib
import math

import torch
from torch import nn

from model.checkpoint import load_weights
from model.device import check_compiler
from model.lora import adapter_parameters, load_adapter_weights
from model.training import cpu_kernels, ranks
from model.training.optimizer import build_optimizers, set_learning_rates


class DataParallel:
    """Every rank holds all weights; DDP averages gradients over the ranks.

    model: on `device` already. settings: resolved TrainingSettings. dynamic: row lengths vary from batch to batch, so
    compiled code must serve them all. `runner` is what a loss function calls in training.
    """

    def __init__(self, model, settings, device, dtype, dynamic=False):
        self.model = model
        self.prepare(device, dtype, settings)
        self.optimizers = build_optimizers(model, settings)
        # float16 alone needs scaling: its smallest numbers swallow gradients that bfloat16 keeps.
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        if settings.compile:
            check_compiler(device)
        # Few shapes, as full rows and short ones, are better compiled one by one.
        dynamic = True if dynamic else False if settings.short_rows_share else None
        self.runner = self.make_runner(settings, device, dtype, dynamic)

    def prepare(self, device, dtype, settings):
        """Have the model use what makes training faster or smaller."""
        cpu_kernels.install(self.model, device, dtype, settings.compile)
        if settings.compile:  # made within, the table would be compiled in, and out again
            self.model.rotary_table(self.model.config.max_seq_len, device)
        if settings.gradient_checkpointing:
            checkpoint_layers(self.model)

    def make_runner(self, settings, device, dtype, dynamic):
        """What a loss function calls. dynamic: torch.compile's."""
        runner = self.model
        if ranks.world_size() > 1:
            device_ids = [device.index] if device.type == "cuda" else None
            runner = nn.parallel.DistributedDataParallel(self.model, device_ids, gradient_as_bucket_view=True)
        return torch.compile(runner, dynamic=dynamic) if settings.compile else runner

    def micro_batch(self, last):
        """Context of one forward and backward pass: gradients stay local until the `last` of a step."""
        return contextlib.nullcontext() if last or ranks.world_size() == 1 else self.runner.no_sync()

    def backward(self, loss):
        """Add the gradient of `loss`, this rank's part of the step's loss. (DDP divides the sum by the ranks.)"""
        self.scaler.scale(loss * ranks.world_size()).backward()

    def gradient_norm(self):
        """Norm of the whole step's gradient, a tensor; once, after the last micro-batch."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        return nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def overflowed(self, norm):
        """Whether gradients of norm `norm`, a float, only say that float16's scale is too large: the step is skipped."""
        return self.scaler.is_enabled() and not math.isfinite(norm) and self.scaler.get_scale() >= 1

    def clip(self, norm, limit):
        """Scale the gradient, whose norm the tensor `norm` is, down to `limit`."""
        nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)

    def step(self, factor, skip=False):
        """Apply the gradients at `factor` times the peak learning rates, or `skip` them; then forget them."""
        set_learning_rates(self.optimizers, factor)
        for optimizer in self.optimizers:
            if not skip:  # the scaler would skip only the optimizer whose own gradients overflowed
                self.scaler.step(optimizer)
        self.forget_gradients()
        self.scaler.update()

    def forget_gradients(self):
        """As if backward() had not been called since the last step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    @property
    def learning_rate(self):
        """The rate of the last step, AdamW's where there are two optimizers."""
        return self.optimizers[-1].param_groups[0]["lr"]

    def saved_parameters(self):
        """{name in a checkpoint: parameter}."""
        return self.model.state_dict(keep_vars=True)

    def weights(self):
        """The state dict that a checkpoint holds, on the main rank at least."""
        return {name: parameter.detach() for name, parameter in self.saved_parameters().items()}

    def load_weights(self, weights, path):
        """Put back what weights() gave and `path` holds; UserError names the first tensor that does not fit."""
        load_weights(self.model, weights, path)

    def state_dict(self):
        """Optimizers and scaler as tensors and plain values, on the main rank at least."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"optimizers": optimizers, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        """Undo what happened since state_dict(); rates and decay stay as the settings of this run say.

        Raises ValueError for a state of other parameters: fused optimizers would write beyond its tensors.
        """
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            groups = [dict(group) for group in optimizer.param_groups]
            parameters = [parameter for group in groups for parameter in group["params"]]
            moments = {"momentum_buffer"} if isinstance(optimizer, torch.optim.Muon) else {"exp_avg", "exp_avg_sq"}
            for index, values in saved["state"].items():
                fits = moments == values.keys() - {"step"} and torch.as_tensor(values.get("step", 0)).numel() == 1
                if not fits or any(values[name].shape != parameters[index].shape for name in moments):
                    raise ValueError("the optimizer's state is of another model")
            optimizer.load_state_dict(saved)
            for group, own in zip(optimizer.param_groups, groups):
                group.update(own)
        self.scaler.load_state_dict(state["scaler"])

    def close(self):
        """Let go of what must not outlive the process group."""
        self.runner = None


class LowRankAdapters(DataParallel):
    """Training of the adapters alone that model.lora.add_adapter has put on; they are what a checkpoint holds."""

    def saved_parameters(self):
        return adapter_parameters(self.model)

    def load_weights(self, weights, path):
        load_adapter_weights(self.model, weights, path)


def checkpoint_layers(model):
    """Have the layers of `model`, of transformers, be computed again in the backward pass, so that only what goes into
    each is kept (Chen et al. 2016, arXiv 1604.06174)."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its later name
    enable({"use_reentrant": False})
