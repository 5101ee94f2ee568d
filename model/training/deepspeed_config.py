"""DeepSpeed's configuration: made of the flags, or read from a file that must not say otherwise. Imports nothing heavy."""

import json
from pathlib import Path

from model.errors import UserError

WRITTEN = "auto"  # --deepspeed without a file
FORMATS = {"bf16": "bfloat16", "fp16": "float16", "torch_autocast": "bfloat16"}  # section -> --dtype it stands for
OFFLOADS = ("offload_optimizer", "offload_param")
BUCKET = 50_000_000  # numbers that travel together; DeepSpeed's own 500 million take gigabytes beside a small model


def make_config(settings, device, dtype, world_size):
    """DeepSpeed's configuration for the flags, a dict: what the --deepspeed file says, without one what serves here.

    settings: resolved TrainingSettings; device, dtype: torch's. Raises UserError for a file that cannot be read or says
    otherwise than the flags, and for flags that do not go together.
    """
    given = {} if settings.deepspeed == WRITTEN else read_config(settings.deepspeed)
    check_numbers(given, settings, world_size)
    check_formats(given, settings, dtype)
    zero = dict(given.get("zero_optimization", {}))
    if settings.deepspeed == WRITTEN:
        zero = {"stage": 2, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        zero["overlap_comm"] = device.type == "cuda"
    zero["stage"] = choose_stage(given, settings)
    if settings.offload:
        for name in OFFLOADS if zero["stage"] == 3 else OFFLOADS[:1]:
            zero[name] = {"device": "cpu", "pin_memory": device.type == "cuda", **zero.get(name, {})}
    # The loop accumulates, divides by what a whole step holds, and multiplies in --dtype: none of it is DeepSpeed's.
    loops = ("train_batch_size", "gradient_accumulation_steps", *FORMATS)
    return {
        **{name: value for name, value in given.items() if name not in loops},
        "train_micro_batch_size_per_gpu": settings.batch_size,
        "gradient_clipping": settings.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would have to be compiled first
        "steps_per_print": None,
    }


def read_config(path):
    """The dict in a DeepSpeed configuration file, without what is "auto". Raises UserError."""
    try:
        config = without_auto(json.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(
            f"--deepspeed {path}: no such file; without one there is a configuration for the flags"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--deepspeed {path}: not JSON ({error})") from None
    sections = isinstance(config, dict) and [config.get(name, {}) for name in ("zero_optimization", *FORMATS)]
    if not sections or not all(isinstance(section, dict) for section in sections):
        raise UserError(f"--deepspeed {path}: is JSON, but no configuration of DeepSpeed")
    return config


def without_auto(value):
    """`value` without entries that are "auto": other trainers that read such files put the flags' values there."""
    if not isinstance(value, dict):
        return value
    return {name: without_auto(part) for name, part in value.items() if part != "auto"}


def check_numbers(given, settings, world_size):
    """UserError where the file says otherwise than flags do, or what they alone say."""
    rows = settings.batch_size * settings.accumulation_steps * world_size
    expected = {
        "train_batch_size": (rows, "--batch_size x --accumulation_steps x processes"),
        "train_micro_batch_size_per_gpu": (settings.batch_size, "--batch_size"),
        "gradient_accumulation_steps": (settings.accumulation_steps, "--accumulation_steps"),
        "gradient_clipping": (settings.grad_clip, "--grad_clip"),
        "gradient_allreduce_op": ("mean", "what the loss is divided for"),
        "managed_gradient_accumulation": (True, "what the loop expects"),
    }
    for name, (value, flags) in expected.items():
        if given.get(name, value) != value:
            raise contradiction(settings, name, f"is {given[name]}, and {flags} is {value}")
    flags = {
        "optimizer": "--optimizer, --learning_rate and --weight_decay",
        "scheduler": "--warmup_iters and --max_steps",
    }
    for name in given.keys() & flags.keys():
        raise contradiction(settings, name, f"is what {flags[name]} say")


def check_formats(given, settings, dtype):
    """UserError where the file enables another number format than --dtype. (What it enables is done as in plain training:
    autocast over float32 weights.)"""
    own = str(dtype).removeprefix("torch.")
    for section, named in FORMATS.items():
        if given.get(section, {}).get("enabled"):
            named = str(given[section].get("dtype", named)).removeprefix("torch.")
            if named != own:
                raise contradiction(settings, section, f"is enabled for {named}, and --dtype is {own}")


def choose_stage(given, settings):
    """The ZeRO stage that file and flags ask for. Raises UserError where they differ or cannot work in it."""
    zero = given.get("zero_optimization", {})
    stage = zero.get("stage", 2 if settings.deepspeed == WRITTEN else 0)
    if settings.zero_stage is not None:
        if zero.get("stage", settings.zero_stage) != settings.zero_stage:
            raise contradiction(
                settings, "zero_optimization.stage", f"is {stage}, and --zero_stage {settings.zero_stage}"
            )
        stage = settings.zero_stage
    if stage not in (0, 1, 2, 3):
        raise contradiction(settings, "zero_optimization.stage", f"is {stage!r}, and there are 0, 1, 2 and 3")
    for name in OFFLOADS:
        device = (zero.get(name) or {}).get("device", "cpu")
        if device != "cpu" and (settings.offload or device != "none"):
            meant = "--offload means cpu" if settings.offload else "cpu is what there is"
            raise contradiction(settings, f"zero_optimization.{name}.device", f"is {device!r}, and {meant}")
    for flag, wrong, problem in (
        ("--offload", settings.offload and stage == 0, "divides nothing that could be moved; use 1, 2 or 3"),
        ("--compile", settings.compile and stage == 3, "cannot compile weights that come and go; leave it out"),
        ("--optimizer muon", settings.optimizer == "muon" and stage > 0, "cuts the whole matrices it needs; use 0"),
    ):
        if wrong:
            raise UserError(f"{flag}: ZeRO stage {stage} (--zero_stage) {problem}", exit_code=2)
    return stage


def contradiction(settings, name, problem):
    """UserError on `name` in the file."""
    return UserError(f"--deepspeed {settings.deepspeed}: {name} {problem}; leave it out of the file", exit_code=2)
