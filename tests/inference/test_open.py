"""From settings to an engine: the newest chat model unless told otherwise, in the dtype and the context asked for."""

import pytest
import torch

from conftest import trained_adapter
from model.checkpoint import file_sha256, load_model, save_checkpoint
from model.errors import UserError
from model.export.card import Card
from model.export.huggingface import write_folder
from model.inference.open import open_engine, open_model
from model.LMConfig import LMConfig
from model.model import Transformer
from model.settings import InferenceSettings

SHAPE = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2)


@pytest.fixture
def out_dir(tmp_path, small_tokenizer):
    config = LMConfig(**SHAPE, vocab_size=len(small_tokenizer), max_seq_len=32)
    for name in ("pretrain", "single_chat/full_sft", "multi_chat/full_sft"):
        save_checkpoint(tmp_path / f"{name}_32.pth", Transformer(config), {"stage": name})
    return tmp_path


def opened(out_dir, tokenizer, stages=("multi_chat/full_sft", "single_chat/full_sft"), **given):
    settings = InferenceSettings(out_dir=out_dir, tokenizer_path=tokenizer.name_or_path, device="cpu", **SHAPE, **given)
    return open_engine(settings, stages)


def test_the_first_stage_that_has_a_checkpoint_is_opened(out_dir, small_tokenizer):
    assert opened(out_dir, small_tokenizer)[1] == out_dir / "multi_chat/full_sft_32.pth"
    (out_dir / "multi_chat/full_sft_32.pth").unlink()
    assert opened(out_dir, small_tokenizer)[1] == out_dir / "single_chat/full_sft_32.pth"
    assert opened(out_dir, small_tokenizer, ("pretrain",))[1] == out_dir / "pretrain_32.pth"
    named, path = opened(out_dir, small_tokenizer, checkpoint=out_dir / "pretrain_32.pth")
    assert path == out_dir / "pretrain_32.pth" and named.max_length == 32
    (out_dir / "single_chat/full_sft_32.pth").unlink()
    with pytest.raises(UserError, match="run 3-full_sft.py first, or name another with --checkpoint"):
        opened(out_dir, small_tokenizer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_dtype_asked_for(out_dir, small_tokenizer, dtype):
    engine, _ = opened(out_dir, small_tokenizer, dtype=dtype)
    assert {parameter.dtype for parameter in engine.model.parameters()} == {getattr(torch, dtype)}
    assert f" {dtype} on cpu" in engine.description


def test_positions_are_stretched_by_what_the_context_grew(out_dir, small_tokenizer, capsys):
    engine, _ = opened(out_dir, small_tokenizer, max_seq_len=128, rope_scaling="yarn")
    assert engine.model.config.rope_scaling == {"rope_type": "yarn", "factor": 4.0} and engine.max_length == 128
    assert not capsys.readouterr().err
    assert opened(out_dir, small_tokenizer, max_seq_len=64)[0].model.config.rope_scaling is None
    assert "trained on 32 tokens" in capsys.readouterr().err
    for length in (None, 32):
        with pytest.raises(UserError, match="--rope_scaling needs a --max_seq_len above the trained 32"):
            opened(out_dir, small_tokenizer, max_seq_len=length, rope_scaling="linear")


def test_another_tokenizer_is_refused(out_dir, tokenizer):
    with pytest.raises(UserError, match="400 words but the tokenizer 6400"):
        opened(out_dir, tokenizer)


def test_stretching_a_stretched_model_counts_from_the_trained_length(out_dir, small_tokenizer):
    for kind, more in (("linear", {}), ("yarn", {}), ("yarn", {"original_max_position_embeddings": 32})):
        scaling = {"rope_type": kind, "factor": 2.0, **more}
        model, _ = load_model(out_dir / "pretrain_32.pth", max_seq_len=64, rope_scaling=scaling)
        save_checkpoint(out_dir / "long.pth", model, {})
        engine, _ = opened(
            out_dir, small_tokenizer, checkpoint=out_dir / "long.pth", max_seq_len=256, rope_scaling="linear"
        )
        assert engine.model.config.rope_scaling == {"rope_type": "linear", "factor": 8.0}


def test_a_hugging_face_folder_brings_its_tokenizer_along(out_dir, small_tokenizer, tokenizer):
    model, _ = load_model(out_dir / "pretrain_32.pth")
    write_folder(out_dir / "hub", model, small_tokenizer, "llama", "float32", Card("x", {}, "", "mit"))
    engine, path = open_engine(InferenceSettings(checkpoint=str(out_dir / "hub"), device="cpu"))
    assert len(engine.tokenizer) == len(small_tokenizer) and path == str(out_dir / "hub")
    with pytest.raises(UserError, match="400 words but the tokenizer 6400"):
        opened(out_dir, tokenizer, checkpoint=out_dir / "hub")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_added_to_its_base_wherever_that_lies(out_dir, small_tokenizer, capsys, dtype):
    """The base is found by the adapter's .json; rounding to the dtype comes after the sum."""
    base, other, path = out_dir / "pretrain_32.pth", out_dir / "multi_chat/full_sft_32.pth", out_dir / "lora_x_32.pth"
    matrix, parent = "layers.1.feed_forward.w3", {"file": str(base), "sha256": file_sha256(base)}
    model = load_model(base)[0]
    weights = trained_adapter(model, [matrix])
    save_checkpoint(path, model, {"stage": "lora_x", "lora": {"alpha": 6.0}, "parent": parent}, weights=weights)
    narrow, wide = (tensor.double() for tensor in weights.values())
    exact = {name: tensor.double() for name, tensor in model.state_dict().items()}
    exact[f"{matrix}.weight"] += 6.0 / 4 * wide @ narrow

    engine, name = opened(out_dir, small_tokenizer, lora=path, dtype=dtype)
    assert name == f"{base} with {path}"
    for key, tensor in engine.model.state_dict().items():
        wrong = (tensor - exact[key].to(tensor.dtype)).abs() > 1e-6
        assert wrong.double().mean() < 0.001, key  # a sum in float32 may lie on the other side of a tie
    settings = InferenceSettings(lora=path, tokenizer_path=small_tokenizer.name_or_path, device="cpu")
    assert open_model(settings)[3]["stage"] == "lora_x"

    with pytest.raises(UserError, match=f"{path}: was trained on {base}, and the weights in {other} are not those"):
        opened(out_dir, small_tokenizer, lora=path, checkpoint=other)
    moved = base.rename(out_dir / "moved.pth")
    base.with_suffix(".json").rename(moved.with_suffix(".json"))
    with pytest.raises(UserError, match=f"the weights in {other} are not those; give its base with --checkpoint"):
        opened(out_dir, small_tokenizer, lora=path)
    assert opened(out_dir, small_tokenizer, lora=path, checkpoint=moved)[1] == f"{moved} with {path}"
    assert not capsys.readouterr().err
    opened(out_dir, small_tokenizer, lora=path, force=True)
    assert capsys.readouterr().err.startswith(f"warning: {path}: was trained on {base}")


def test_8_bit_weights_are_for_a_cpu_with_bfloat16(out_dir, small_tokenizer, monkeypatch):
    engine, _ = opened(out_dir, small_tokenizer, dtype="int8")
    assert engine.int8 and engine.model.dtype == torch.bfloat16 and ", int8 on cpu" in engine.description
    monkeypatch.setattr("model.device.multiplies_bfloat16", lambda device: False)
    with pytest.raises(UserError, match="--dtype int8: needs a CPU that multiplies bfloat16"):
        opened(out_dir, small_tokenizer, dtype="int8")
    monkeypatch.setattr("model.inference.open.select_device", lambda name: torch.device("cuda"))
    with pytest.raises(UserError, match="--dtype int8: is for a CPU, not for cuda"):
        opened(out_dir, small_tokenizer, dtype="int8")
