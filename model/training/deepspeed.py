"""Training by DeepSpeed: the same steps, with what they need in memory divided among the ranks (ZeRO; Rajbhandari et al.
2020, arXiv 1910.02054).

Order, loss, schedule and number formats stay the loop's. DeepSpeed adds up gradients, keeps each rank's part of what a
stage divides, and brings weights together where they are needed. Checkpoints and training states are DataParallel's:
either goes on with the other's, with any number of processes.
"""

import contextlib
import importlib.util
import json
import logging
import os
import warnings

import torch
import torch.distributed as dist

from model.checkpoint import check_fits
from model.errors import UserError
from model.model import MOEFeedForward
from model.training import ranks
from model.training.deepspeed_config import WRITTEN, make_config
from model.training.optimizer import set_learning_rates
from model.training.strategy import DataParallel

MOMENTS = ("exp_avg", "exp_avg_sq")


def check(settings, device, dtype, world_size):
    """UserError where --deepspeed could not work, before anything is read; arguments as of make_config."""
    make_config(settings, device, dtype, world_size)
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "--deepspeed: DeepSpeed is not installed: pip install deepspeed (on Linux), or leave the flag out"
        )


def start_deepspeed(device):
    """The package deepspeed, quiet and with a process group, also where no launcher has started this process."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else a CPU beside a GPU would not be taken
    os.environ.setdefault("LOCAL_RANK", "0")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")  # for what it calls
    import deepspeed  # takes seconds

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":  # a faster all-reduce that would be compiled first, for minutes; without, it goes by gloo
        getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        dist.init_process_group(ranks.backend(device), store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed()
    return deepspeed


class DeepSpeed(DataParallel):
    """ZeRO stage 0: DeepSpeed averages gradients over the ranks, all else is DataParallel's."""

    def make_runner(self, settings, device, dtype, dynamic):
        config = make_config(settings, device, dtype, ranks.world_size())
        ranks.print_once(f"DeepSpeed: {json.dumps(config)}")
        self.deepspeed = start_deepspeed(device)
        if dtype != torch.float32:  # the engine switches off the loop's autocast on its way to the model
            self.model.forward = torch.autocast(device.type, dtype)(self.model.forward)
        if settings.compile:
            self.model.compile(dynamic=dynamic)
        self.before_engine()
        self.engine = self.make_engine(config, settings)
        return self.engine

    def make_engine(self, config, settings):
        """DeepSpeed's engine around model and optimizer. Raises UserError where it refuses what is in a file."""
        options = dict(model=self.model, optimizer=self.optimizers[-1], config=config, dist_init_required=False)
        try:
            return self.deepspeed.initialize(**options)[0]
        except (ValueError, AssertionError, TypeError, KeyError) as error:
            if settings.deepspeed == WRITTEN:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"--deepspeed {settings.deepspeed}: DeepSpeed does not take it: {reason}") from None

    def before_engine(self):
        """What must be known or done while the model is still in one piece."""

    def micro_batch(self, last):
        self.engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss):
        """As DataParallel's: the engine, too, divides the sum over the ranks by their number."""
        self.engine.backward(self.scaler.scale(loss * ranks.world_size()))

    def close(self):
        self.engine.destroy()
        self.engine = self.runner = self.optimizers = None


class ZeRO(DeepSpeed):
    """Stages 1 to 3: each rank holds its part of optimizer state, gradients, weights; self.optimizers[0] works on that
    part. Every method that gathers or scatters is one of all ranks."""

    def make_runner(self, settings, device, dtype, dynamic):
        super().make_runner(settings, device, dtype, dynamic)
        self.partitioned = self.engine.optimizer
        self.make_moments()
        self.probe = torch.optim.SGD([torch.zeros((), device=device, requires_grad=True)])
        self.scaler.scale(torch.zeros((), device=device))  # from now on it knows its device
        self.use_scale()
        return self.engine

    def use_scale(self):
        """Have DeepSpeed multiply losses by the scaler's number and divide gradients by it in its step."""
        if self.scaler.is_enabled():
            self.partitioned.loss_scale = self.scaler.get_scale()

    def make_moments(self):
        """AdamW's state as before its first step, which would make it too late: DeepSpeed looks for it once."""
        partitioned, third = self.partitioned, hasattr(self.partitioned, "fp32_partitioned_groups_flat")
        for part in partitioned.fp32_partitioned_groups_flat if third else partitioned.single_partition_of_fp32_groups:
            step = torch.zeros((), device=part.device)
            self.optimizers[0].state[part] = {"step": step, **{name: torch.zeros_like(part) for name in MOMENTS}}
        if not third:
            partitioned._lazy_init_hp_params_optimizer_state()

    def before_engine(self):
        self.groups = self.optimizers[0].state_dict()["param_groups"]
        self.parameters = [parameter for group in self.optimizers[0].param_groups for parameter in group["params"]]
        mixtures = {type(module) for module in self.model.modules() if isinstance(module, MOEFeedForward)}
        if mixtures:  # as one piece: which experts a rank calls, in which order, is not the same on all
            self.deepspeed.utils.set_z3_leaf_modules(self.model, list(mixtures))

    def backward(self, loss):
        self.engine.backward(loss * ranks.world_size())  # and scales it

    def gradient_norm(self):
        if hasattr(self.partitioned, "scaled_global_norm"):
            norms = [self.partitioned.scaled_global_norm()]
        else:  # stage 3 has a norm for each of its groups
            norms = self.partitioned._get_norm_groups()
        norms = torch.stack([torch.as_tensor(norm) for norm in norms])
        # DeepSpeed gives -1 for a norm that is not finite.
        norm = torch.where((norms < 0).any(), torch.inf, torch.linalg.vector_norm(norms))
        (only,) = self.probe.param_groups[0]["params"]
        only.grad = norm.to(only.device, only.dtype)
        self.scaler.unscale_(self.probe)  # what it must know of the gradients, their norm tells
        return only.grad

    def clip(self, norm, limit):
        pass  # step() does, to gradient_clipping of the configuration

    def step(self, factor, skip=False):
        set_learning_rates(self.optimizers, factor)
        self.engine.step()  # which skips gradients that are not finite by itself
        self.scaler.update()
        self.use_scale()

    def forget_gradients(self):
        self.partitioned.zero_grad()

    def weights(self):
        saved, whole = self.saved_parameters(), {}
        for parameter in saved.values():
            if parameter not in whole:  # tied ones once
                whole[parameter] = self.gathered(self.deepspeed.utils.safe_get_full_fp32_param(parameter))
        return {name: whole[parameter] for name, parameter in saved.items() if ranks.is_main()}

    def gathered(self, tensor):
        """The copy that the main rank keeps on the CPU, None on others."""
        return tensor.to("cpu", copy=True) if ranks.is_main() else None

    def load_weights(self, weights, path):
        saved = self.saved_parameters()
        check_fits(weights, {name: getattr(p, "ds_shape", p.shape) for name, p in saved.items()}, path)
        for name, parameter in saved.items():
            self.put(parameter, weights[name])
            with self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(weights[name])

    def put(self, parameter, whole, moment=None):
        """Copy this rank's part of `whole` into the float32 weight of a parameter, or into a moment of its optimizer."""
        utils = self.deepspeed.utils
        if not hasattr(parameter, "ds_tensor"):
            where = () if moment is None else (moment,)
            put = utils.safe_set_full_fp32_param if moment is None else utils.safe_set_full_optimizer_state
            put(parameter, whole.to(parameter.device, torch.float32), *where)
            return
        size = parameter.ds_tensor.numel()
        part = torch.zeros(size)  # the last rank's ends in padding
        own = whole.flatten()[ranks.rank() * size : (ranks.rank() + 1) * size]
        part[: own.numel()] = own
        if moment is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, moment)

    def state_dict(self):
        """What DataParallel's is: of whole parameters."""
        state, step = {}, next(iter(self.optimizers[0].state.values()))["step"].cpu()
        for index, parameter in enumerate(self.parameters):
            get = self.deepspeed.utils.safe_get_full_optimizer_state
            moments = {name: self.gathered(get(parameter, name)) for name in MOMENTS}
            state[index] = {"step": step.clone(), **moments}  # each its own, for optimizers count it up in place
        return {"optimizers": [{"state": state, "param_groups": self.groups}], "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        (optimizer,) = state["optimizers"]
        if optimizer["state"]:  # none where float16 has skipped every step
            self.check_moments(optimizer["state"])
            for values in self.optimizers[0].state.values():
                values["step"].fill_(float(optimizer["state"][0]["step"]))
            for index, parameter in enumerate(self.parameters):
                for name in MOMENTS:
                    self.put(parameter, optimizer["state"][index][name], name)
        self.scaler.load_state_dict(state["scaler"])
        self.use_scale()

    def check_moments(self, state):
        """ValueError for a state of other parameters, as DataParallel's."""
        for index, parameter in enumerate(self.parameters):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if any(state[index][name].shape != shape for name in MOMENTS):
                raise ValueError("the optimizer's state is of another model")


def strategy_class(settings, device, dtype):
    """DeepSpeed or ZeRO, as resolved TrainingSettings ask for."""
    config = make_config(settings, device, dtype, ranks.world_size())
    return ZeRO if config["zero_optimization"]["stage"] else DeepSpeed
