"""Flags to a model."""

import shutil

import pytest
import torch

from conftest import TINY, trained_scale
from model.build import build_model, weights_size
from model.checkpoint import file_sha256
from model.errors import UserError
from model.export.card import Card
from model.export.huggingface import write_folder
from model.LMConfig import PRESETS, LMConfig, preset_config
from model.model import Transformer
from model.settings import ModelSettings
from model.tokenizer import load_tokenizer


@pytest.mark.parametrize("preset", PRESETS)
def test_the_size_of_the_weights_is_known_before_they_are_made(preset):
    config = preset_config(preset)
    with torch.device("meta"):
        model = Transformer(config)
    assert weights_size(config) == pytest.approx(4 * sum(p.numel() for p in model.parameters()), rel=1e-3)


def test_training_may_start_from_a_hugging_face_folder_and_one_flag_need_not_fit_the_default_preset(
    tmp_path, tokenizer
):
    model = trained_scale(LMConfig(**TINY, vocab_size=len(tokenizer)))
    write_folder(tmp_path / "hub", model, tokenizer, "llama", "float32", Card("x", {}, "", "mit"))
    started, entry = build_model(ModelSettings(n_heads=4, max_seq_len=48), tokenizer, tmp_path / "hub")
    assert all(torch.equal(one, other) for one, other in zip(started.parameters(), model.parameters()))
    assert started.config.max_seq_len == 48 and started.training
    assert entry == {"file": str(tmp_path / "hub"), "sha256": file_sha256(tmp_path / "hub/model.safetensors")}
    other = shutil.copytree(tmp_path / "hub", tmp_path / "other")
    swapped = (
        (other / "tokenizer.json")
        .read_text("utf-8")
        .replace('"的": ', '"#": ')
        .replace('"是": ', '"的": ')
        .replace('"#": ', '"是": ')
    )
    (other / "tokenizer.json").write_text(swapped, "utf-8")
    with pytest.raises(UserError, match="was trained with another tokenizer of the same size"):
        build_model(ModelSettings(), tokenizer, other)
    build_model(ModelSettings(), load_tokenizer(None, other), other)
    with pytest.raises(UserError, match="has n_heads 4, not 2"):
        build_model(ModelSettings(n_heads=2), tokenizer, tmp_path / "hub")
