"""Flags to a model."""

import pytest
import torch

from model.build import weights_size
from model.LMConfig import PRESETS, preset_config
from model.model import Transformer


@pytest.mark.parametrize("preset", PRESETS)
def test_the_size_of_the_weights_is_known_before_they_are_made(preset):
    config = preset_config(preset)
    with torch.device("meta"):
        model = Transformer(config)
    assert weights_size(config) == pytest.approx(4 * sum(p.numel() for p in model.parameters()), rel=1e-3)
