"""benchmarks/scale.py against counts by hand."""

import argparse
import runpy

import pytest
import torch

from conftest import ROOT
from model.LMConfig import LMConfig
from model.model import Transformer

SCALE = runpy.run_path(str(ROOT / "benchmarks" / "scale.py"))


def test_state_of_a_rank_by_hand():
    """A million parameters on four ranks, in bytes: 4 a weight, 4 a gradient, 8 both moments, 2 the copy in 16 bits; from stage 1
    on the moved weights once more, divided."""
    totals = [sum(SCALE["memory"](10**6, 10**4, 4, stage).values()) for stage in range(4)]
    assert totals == [18e6, 10e6 + 12e6 / 4, 6e6 + 4e6 / 4 + 12e6 / 4, 4e6 / 4 + 4e6 / 4 + 12e6 / 4 + 2 * 6 * 10**4]
    assert SCALE["memory"](10**6, 10**4, 1, 0)["optimizer"] == 8e6


def test_what_a_block_keeps_grows_with_its_widths_and_is_what_autograd_keeps():
    """Against the tensors that hang in the graph of a block, found by walking it."""
    config = LMConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=100, max_seq_len=64)
    block, ends = SCALE["bytes_per_token"](config)
    model, count = Transformer(LMConfig(**{**config.to_dict(), "n_layers": 1})).train(), SCALE["TOKENS"]
    x = torch.randn(1, count, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = model.layers[0](x, model.rotary_table(count, x.device)[:, None], None, None, None)
    seen, sizes, nodes = set(), {}, [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [other for other, _ in node.next_functions]
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() % count == 0:
                sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    assert block == sum(sizes.values()) / count
    assert ends >= 4 * 100, "the probabilities of all words"
    wider = SCALE["bytes_per_token"](LMConfig(**{**config.to_dict(), "dim": 128, "head_dim": None, "hidden_dim": None}))
    assert wider[0] == pytest.approx(2 * block, rel=0.1)


def test_costs_of_a_run_by_hand():
    """Many tokens on a slow machine, so that rounding leaves enough: of a model of three blocks on one and on four ranks."""
    config = LMConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=100, max_seq_len=64)
    args = argparse.Namespace(
        batch_size=10**6, max_seq_len=64, processes=[1, 4], characters=1.29e9, peak_tflops=1e-3, mfu=0.5
    )
    cost, (block, ends) = SCALE["costs"](args, config), SCALE["bytes_per_token"](config)
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
    assert [SCALE["network"](10**6, stage) for stage in range(4)] == [8e6, 8e6, 8e6, 12e6]
