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
from pathlib import Path

import torch
import torch.distributed as dist

from model.checkpoint import check_fits
from model.errors import UserError
from model.model import MOEFeedForward
from model.training import ranks
from model.training.optimizer import set_learning_rates
from model.training.strategy import DataParallel

FILE = "--deepspeed"
WRITTEN = "auto"  # --deepspeed without a file
MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # numbers that travel together; DeepSpeed's own 500 million take gigabytes beside a small model
# Section of a file that names a number format -> the --dtype it stands for; torch_autocast says it itself.
FORMATS = {"bf16": "bfloat16", "fp16": "float16"}


def make_config(settings, device, dtype, world_size):
    """DeepSpeed's configuration for the flags, a dict: that of the --deepspeed file, without one a good one.

    settings: resolved TrainingSettings; device, dtype: torch's. Raises UserError for a file that cannot be read or says
    otherwise than the flags, and for flags that do not go together.
    """
    given = {} if settings.deepspeed == WRITTEN else read_config(settings.deepspeed)
    check_numbers(given, settings, world_size)
    stage = check_stage(given, settings)
    zero = {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if stage:
        zero["overlap_comm"] = device.type == "cuda"
    zero = {**(zero if settings.deepspeed == WRITTEN else {}), **given.get("zero_optimization", {}), "stage": stage}
    if settings.offload:
        place = {"device": "cpu", "pin_memory": device.type == "cuda"}
        for name in ("offload_optimizer", "offload_param")[: 2 if stage == 3 else 1]:
            zero[name] = {**place, **zero.get(name, {})}
    config = {**without_formats(given, settings, dtype, stage), "zero_optimization": zero}
    config.update(
        train_micro_batch_size_per_gpu=settings.batch_size,
        gradient_clipping=settings.grad_clip,
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,  # it would have to be compiled first
        steps_per_print=None,
    )
    for name in ("train_batch_size", "gradient_accumulation_steps"):
        config.pop(name, None)  # the loop itself divides by what a whole step holds
    return config


def read_config(path):
    """The dict in a DeepSpeed configuration file, without what is "auto". Raises UserError."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        way_out = "without a file --deepspeed makes a configuration for the flags"
        raise UserError(f"{FILE} {path}: no such file; {way_out}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{FILE} {path}: not JSON ({error})") from None
    config = without_auto(config)
    sections = ("zero_optimization", "torch_autocast", *FORMATS)
    if not isinstance(config, dict) or not all(isinstance(config.get(name, {}), dict) for name in sections):
        raise UserError(f"{FILE} {path}: no configuration of DeepSpeed: expected an object of objects and numbers")
    return config


def without_auto(value):
    """`value` without entries that are "auto", which trainers that read such files put the flags' values for."""
    if not isinstance(value, dict):
        return value
    return {name: without_auto(part) for name, part in value.items() if part != "auto"}


def check_numbers(given, settings, world_size):
    """UserError where the file says otherwise than the flags or what is theirs alone."""
    rows = settings.batch_size * settings.accumulation_steps * world_size
    expected = {
        "train_batch_size": (rows, "--batch_size x --accumulation_steps x processes"),
        "train_micro_batch_size_per_gpu": (settings.batch_size, "--batch_size"),
        "gradient_accumulation_steps": (settings.accumulation_steps, "--accumulation_steps"),
        "gradient_clipping": (settings.grad_clip, "--grad_clip"),
        "gradient_allreduce_op": ("mean", "the loop's division"),
        "managed_gradient_accumulation": (True, "the loop's accumulation"),
    }
    for name, (value, flags) in expected.items():
        if given.get(name, value) != value:
            raise contradiction(settings, name, f"is {given[name]}, and {flags} is {value}")
    for name, flags in (("optimizer", "--optimizer, --learning_rate and --weight_decay"), ("scheduler", "--warmup_iters")):
        if name in given:
            raise contradiction(settings, name, f"is what {flags} say")


def check_stage(given, settings):
    """The ZeRO stage that file and flags ask for together. Raises UserError where they do not fit."""
    zero = given.get("zero_optimization", {})
    stage = zero.get("stage", 2 if settings.deepspeed == WRITTEN else 0)
    if settings.zero_stage is not None:
        if "stage" in zero and stage != settings.zero_stage:
            raise contradiction(settings, "zero_optimization.stage", f"is {stage}, and --zero_stage {settings.zero_stage}")
        stage = settings.zero_stage
    if stage not in (0, 1, 2, 3):
        raise contradiction(settings, "zero_optimization.stage", f"is {stage!r}, which is none of 0, 1, 2, 3")
    if settings.offload and any(part.get("device", "cpu") != "cpu" for part in offloads(zero)):
        raise contradiction(settings, "zero_optimization.offload_*.device", "is not cpu, which --offload means")
    for flag, wrong, problem in (
        ("--offload", settings.offload and stage == 0, "has nothing to move; --zero_stage 1, 2 and 3 have"),
        ("--compile", settings.compile and stage == 3, "cannot compile weights that come and go; leave it out"),
        (
            "--optimizer muon",
            settings.optimizer == "muon" and stage > 0,
            "cuts matrices into pieces, and Muon needs whole ones; use --zero_stage 0 or --optimizer adamw",
        ),
    ):
        if wrong:
            raise UserError(f"{flag}: ZeRO stage {stage} {problem}", exit_code=2)
    return stage


def offloads(zero):
    return [zero[name] for name in ("offload_optimizer", "offload_param") if isinstance(zero.get(name), dict)]


def without_formats(given, settings, dtype, stage):
    """`given` without sections that only say what the loop does anyway, autocast over float32 weights. What stays are bf16
    and fp16: weights in 16 bits beside float32 ones in the optimizer. Raises UserError where one contradicts --dtype."""
    own, config = str(dtype).removeprefix("torch."), dict(given)
    autocast = config.pop("torch_autocast", {})
    for name in (*FORMATS, "torch_autocast"):
        section = given.get(name, {})
        if not section.get("enabled"):
            config.pop(name, None)
            continue
        stands_for = FORMATS.get(name) or str(autocast.get("dtype", "bfloat16")).removeprefix("torch.")
        if stands_for != own:
            raise contradiction(settings, name, f"is enabled, and --dtype is {own}")
        if name in FORMATS and stage == 0:
            raise contradiction(settings, name, f"serves ZeRO stages 1 to 3; in stage 0 --dtype {own} is enough")
    return config


def contradiction(settings, name, problem):
    """UserError on `name` in the file."""
    return UserError(f"{FILE} {settings.deepspeed}: {name} {problem}; leave it out of the file", exit_code=2)


def check(settings, device, dtype, world_size):
    """UserError for --deepspeed where it could not work, before anything is read; arguments as of make_config."""
    make_config(settings, device, dtype, world_size)
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("--deepspeed: DeepSpeed is not installed: pip install deepspeed (on Linux), or leave the flag out")


def import_deepspeed(device):
    """The package deepspeed, set up for `device` and quiet."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else a CPU beside a GPU would not be taken
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")  # for what it calls
    import deepspeed  # takes seconds

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":  # a faster all-reduce that would be compiled first, for minutes; it goes by gloo without
        getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    return deepspeed


class DeepSpeed(DataParallel):
    """ZeRO stage 0: DeepSpeed averages gradients over the ranks, all else is DataParallel's."""

    def make_runner(self, settings, device, dtype, dynamic):
        config = make_config(settings, device, dtype, ranks.world_size())
        ranks.print_once(f"DeepSpeed: {json.dumps(config)}")
        self.deepspeed = import_deepspeed(device)
        if not dist.is_initialized():  # one process, which no launcher has started
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.deepspeed.init_distributed()
        if dtype != torch.float32:  # the engine switches off the loop's autocast on its way to the model
            self.model.forward = torch.autocast(device.type, dtype)(self.model.forward)
        self.before_engine()
        try:
            self.engine = self.deepspeed.initialize(
                model=self.model, optimizer=self.optimizers[-1], config=config, dist_init_required=False
            )[0]
        except (ValueError, AssertionError, TypeError, KeyError) as error:
            if settings.deepspeed == WRITTEN:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{FILE} {settings.deepspeed}: DeepSpeed does not take it: {reason}") from None
        if settings.compile:
            self.engine.compile(compile_kwargs={"dynamic": dynamic})
        return self.engine

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
        if dtype == torch.float16:
            self.partitioned.loss_scaler = self.make_scaler()
        return self.engine

    def make_scaler(self):
        """DeepSpeed's loss scaler that does as the GradScaler of plain training."""
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

        start = self.scaler.state_dict()
        return DynamicLossScaler(
            start["scale"], start["growth_interval"], min_scale=0.5, delayed_shift=1,
            consecutive_hysteresis=False, raise_error_at_min_scale=False,
        )  # fmt: skip

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
        return norm / self.partitioned.loss_scale

    def overflowed(self, norm):
        return self.scaler.is_enabled() and norm == torch.inf and self.partitioned.loss_scale >= 1

    def clip(self, norm, limit):
        pass  # step() does, to gradient_clipping of the configuration

    def step(self, factor, skip=False):
        set_learning_rates(self.optimizers, factor)
        self.engine.step()  # which skips gradients that are not finite by itself

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
            state[index] = {"step": step, **moments}
        scaler, own = self.scaler.state_dict(), self.partitioned.loss_scaler
        if scaler:
            scaler.update(scale=own.cur_scale, _growth_tracker=own.cur_iter - own.last_overflow_iter - 1)
        return {"optimizers": [{"state": state, "param_groups": self.groups}], "scaler": scaler}

    def load_state_dict(self, state):
        (optimizer,) = state["optimizers"]
        if optimizer["state"]:  # none where float16 has skipped every step
            self.check_moments(optimizer["state"])
            for values in self.optimizers[0].state.values():
                values["step"].fill_(float(optimizer["state"][0]["step"]))
            for index, parameter in enumerate(self.parameters):
                for name in MOMENTS:
                    self.put(parameter, optimizer["state"][index][name], name)
        if self.scaler.is_enabled():
            own = self.partitioned.loss_scaler
            own.cur_scale, own.last_overflow_iter = state["scaler"]["scale"], -1
            own.cur_iter = state["scaler"]["_growth_tracker"]

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
