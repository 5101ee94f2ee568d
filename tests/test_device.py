"""Which device and number format the flags mean."""

import pytest
import torch

from model import device
from model.device import multiplies_bfloat16, select_dtype
from model.errors import UserError


@pytest.mark.parametrize("flag, code", [("nonsense", 2), ("cuda:99", 1)])
def test_wrong_device_is_one_line(flag, code):
    with pytest.raises(UserError, match=f"--device {flag}") as caught:
        device.select_device(flag)
    assert caught.value.exit_code == code


@pytest.fixture
def two_gpus(monkeypatch):
    """torch finds two GPUs, and four processes of this machine want one each."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.mark.parametrize("flag", ["auto", "cuda"])
def test_more_processes_than_gpus_are_one_line_in_each_of_them(two_gpus, monkeypatch, flag):
    with pytest.raises(UserError, match="--nproc_per_node 4: .* here are 2; start at most 2, or give --device cpu"):
        device.select_device(flag)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.select_device(flag) == torch.device("cuda", 1)


def test_one_device_is_not_for_several_processes(two_gpus, monkeypatch):
    for flag in ("cuda:1", "mps"):
        with pytest.raises(UserError, match=f"--device {flag}: is one device for 4 processes"):
            device.select_device(flag)
    assert device.select_device("cpu") == torch.device("cpu")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert device.select_device("cuda:1") == torch.device("cuda", 1)


def test_dtype_names():
    cpu = torch.device("cpu")
    assert device.select_dtype("float16", cpu) == torch.float16
    assert device.select_dtype("auto", cpu) in (torch.bfloat16, torch.float32)
    with pytest.raises(UserError, match="--dtype int8"):
        device.select_dtype("int8", cpu)


@pytest.mark.parametrize(
    "bfloat16_instructions, tiles, expected",
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_a_cpu_that_only_emulates_bfloat16_takes_float32(monkeypatch, bfloat16_instructions, tiles, expected):
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16_instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert select_dtype("auto", torch.device("cpu")) == expected
    assert select_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16  # asked for, it is given


@pytest.mark.parametrize("capability, expected", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_an_old_gpu_takes_float16(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "T4")
    assert select_dtype("auto", torch.device("cuda", 0)) == expected
    if capability < (8, 0):
        with pytest.raises(UserError, match="T4 has no bfloat16 units; use --dtype float16"):
            select_dtype("bfloat16", torch.device("cuda", 0))


def test_other_processors_and_devices(monkeypatch):
    monkeypatch.setattr(device.platform, "machine", lambda: "aarch64")
    assert multiplies_bfloat16(torch.device("cpu")) is torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert multiplies_bfloat16(torch.device("mps")) is False
