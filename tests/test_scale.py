"""benchmarks/scale.py against counts by hand."""

import argparse
import runpy

import pytest

from conftest import ROOT
from model.LMConfig import LMConfig
from model.model import Transformer
from model.training import costs

SCALE = runpy.run_path(str(ROOT / "benchmarks" / "scale.py"))


def test_costs_of_a_run_by_hand():
    """Many tokens on a slow machine, so that rounding leaves enough: of a model of three blocks on one and on four ranks."""
    config = LMConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=100, max_seq_len=64)
    args = argparse.Namespace(
        batch_size=10**6, max_seq_len=64, processes=[1, 4], characters=1.29e9, peak_tflops=1e-3, mfu=0.5
    )
    cost, (block, ends) = SCALE["costs"](args, config), costs.bytes_per_token(config)
    parameters = sum(parameter.numel() for parameter in Transformer(config).parameters())
    assert cost["parameters"] == parameters and cost["tokens"] == pytest.approx(1e9)
    operations = 1e9 * (6 * parameters + 12 * 3 * 64 * 64)
    for processes in (1, 4):
        assert cost["ranks"][processes]["hours"] == pytest.approx(operations / 0.5e9 / 3600 / processes, rel=1e-3)
        stage = cost["ranks"][processes]["zero0"]
        assert stage["plain_gb"] - stage["state_gb"] == pytest.approx(64e6 * (3 * block + ends) / 1e9, abs=0.02)
        checkpointed = 64e6 * (3 * 4 * 64 + block + ends) / 1e9
        assert stage["checkpointing_gb"] - stage["state_gb"] == pytest.approx(checkpointed, abs=0.02)
    assert cost["storage_gb"]["text"] == pytest.approx(1.29 * 3) and cost["storage_gb"]["tokens"] == 2.0
    assert [costs.network(10**6, stage) for stage in range(4)] == [8e6, 8e6, 8e6, 12e6]
