"""DeepSpeed's configuration: what the flags make of it, what a file may say beside them, and what is refused."""

import json

import pytest
import torch

from model.errors import UserError
from model.settings import TrainingSettings
from model.training.deepspeed_config import make_config

FLAGS = dict(deepspeed="auto", batch_size=4, accumulation_steps=3, grad_clip=1.0)


def config(given=None, tmp_path=None, kind="cpu", dtype=torch.float32, **flags):
    """make_config on two processes; given: what a file says."""
    if given is not None:
        path = tmp_path / "ds_config.json"
        path.write_text(given if isinstance(given, str) else json.dumps(given))
        flags["deepspeed"] = str(path)
    device = torch.device(kind)
    return make_config(TrainingSettings(**{**FLAGS, **flags}).resolved(device, 2), device, dtype, 2)


def test_without_a_file_the_flags_make_one():
    made = config()
    assert made["train_micro_batch_size_per_gpu"] == 4 and made["gradient_clipping"] == 1.0
    assert made["zero_optimization"]["stage"] == 2 and not made["zero_optimization"]["overlap_comm"]
    assert config(kind="cuda")["zero_optimization"]["overlap_comm"]
    assert [config(zero_stage=stage)["zero_optimization"]["stage"] for stage in range(4)] == [0, 1, 2, 3]
    # The loop divides by what a whole step holds: DeepSpeed must not divide by the number of forward passes once more.
    assert not {"gradient_accumulation_steps", "train_batch_size", "optimizer", "scheduler"} & made.keys()


def test_offload_moves_what_a_stage_divides(tmp_path):
    second, third = (config(zero_stage=stage, offload=True, kind="cuda")["zero_optimization"] for stage in (2, 3))
    place = {"device": "cpu", "pin_memory": True}
    assert second["offload_optimizer"] == place and "offload_param" not in second
    assert third["offload_optimizer"] == third["offload_param"] == place
    given = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}}
    made = config(given, tmp_path, offload=True, kind="cuda")["zero_optimization"]
    assert made == given["zero_optimization"]  # how, a file may say


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_was_made_is_a_file_that_fits(tmp_path, dtype, stage):
    made = config(zero_stage=stage, dtype=dtype, offload=stage > 0)
    assert config(json.dumps(made), tmp_path, dtype=dtype) == made


def test_a_file_decides_the_rest(tmp_path):
    given = {
        "train_batch_size": 24, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 3,
        "gradient_clipping": 1, "bf16": {"enabled": True}, "fp16": {"enabled": False, "loss_scale": 0},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": "auto"},
        "wall_clock_breakdown": True,
    }  # fmt: skip
    made = config(given, tmp_path, dtype=torch.bfloat16)
    assert made["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 1000} and made["wall_clock_breakdown"]
    assert not {"bf16", "fp16", "train_batch_size", "gradient_accumulation_steps"} & made.keys()
    assert config({}, tmp_path)["zero_optimization"] == {"stage": 0}  # as DeepSpeed reads it
    assert config({}, tmp_path, zero_stage=1)["zero_optimization"] == {"stage": 1}
    autocast = {"torch_autocast": {"enabled": True, "dtype": "torch.float16"}}
    assert "torch_autocast" not in config(autocast, tmp_path, dtype=torch.float16)


@pytest.mark.parametrize(
    "given, flags, parts",
    [
        ({"train_batch_size": 8}, {}, ["train_batch_size is 8", "--accumulation_steps x processes is 24"]),
        ({"train_micro_batch_size_per_gpu": 2}, {}, ["train_micro_batch_size_per_gpu is 2", "--batch_size is 4"]),
        ({"gradient_accumulation_steps": 1}, {}, ["gradient_accumulation_steps is 1", "--accumulation_steps is 3"]),
        ({"gradient_clipping": 0.5}, {}, ["gradient_clipping is 0.5", "--grad_clip is 1.0"]),
        ({"gradient_allreduce_op": "sum"}, {}, ["gradient_allreduce_op is sum"]),
        ({"managed_gradient_accumulation": False}, {}, ["managed_gradient_accumulation is False"]),
        ({"optimizer": {"type": "Adam"}}, {}, ["optimizer is what --optimizer, --learning_rate"]),
        ({"scheduler": {"type": "WarmupLR"}}, {}, ["scheduler is what --warmup_iters"]),
        ({"bf16": {"enabled": True}}, {}, ["bf16 is enabled for bfloat16", "--dtype is float32"]),
        ({"fp16": {"enabled": True}}, {"dtype": torch.bfloat16}, ["fp16 is enabled", "--dtype is bfloat16"]),
        ({"torch_autocast": {"enabled": True}}, {}, ["torch_autocast is enabled for bfloat16"]),
        ({"zero_optimization": {"stage": 1}}, {"zero_stage": 2}, ["stage is 1, and --zero_stage 2"]),
        ({"zero_optimization": {"stage": 4}}, {}, ["stage is 4", "0, 1, 2 and 3"]),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            {},
            ["offload_param.device is 'nvme'"],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
            {"offload": True},
            ["offload_optimizer.device is 'none'", "--offload means cpu"],
        ),
    ],
)
def test_a_file_that_says_otherwise_is_refused_by_name(tmp_path, given, flags, parts):
    with pytest.raises(UserError) as caught:
        config(given, tmp_path, **flags)
    for part in (*parts, "ds_config.json", "leave it out of the file"):
        assert part in str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", '{"zero_optimization": 2}', '"auto"', "\x00"])
def test_no_configuration(tmp_path, text):
    with pytest.raises(UserError, match=r"ds_config\.json: .*JSON"):
        config(text, tmp_path)


def test_no_such_file():
    with pytest.raises(UserError, match="nothing.json: no such file; without one"):
        config(deepspeed="nothing.json")


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(zero_stage=3, compile=True), "--compile: ZeRO stage 3"),
        (dict(optimizer="muon"), "--optimizer muon: ZeRO stage 2"),
        (dict(zero_stage=0, offload=True), "--offload: ZeRO stage 0"),
        (dict(deepspeed=None, zero_stage=2), "--zero_stage: .*--deepspeed"),
        (dict(deepspeed=None, offload=True), "--offload: .*--deepspeed"),
        (dict(fsdp=True), "--fsdp, --deepspeed: .*choose one"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        config(**flags)
    assert caught.value.exit_code == 2


def test_a_file_of_stage_0_has_nothing_to_offload(tmp_path):
    with pytest.raises(UserError, match="--offload: ZeRO stage 0"):
        config({"zero_optimization": {"stage": 0}}, tmp_path, offload=True)
    config(zero_stage=0, optimizer="muon"), config(zero_stage=2, compile=True)  # which are right
