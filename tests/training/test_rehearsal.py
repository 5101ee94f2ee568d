"""Steps that are only tried, also those that an error breaks off."""

import pytest
import torch
from test_loop import make_trainer, weights

from model.training.rehearsal import unchanged


@pytest.fixture
def tokenizer(small_tokenizer):
    return small_tokenizer


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("part", ["backward", "unscaled", "stepped"])
def test_a_step_that_breaks_off_leaves_nothing(pretrain_csv, tmp_path, tokenizer, dtype, part):
    """As a GPU that is full does it: gradients are there, or are unscaled already, or have moved the weights."""
    words = ("--dtype", dtype, "--max_steps", 3)
    run = make_trainer(pretrain_csv, tmp_path / "tried", *words, tokenizer=tokenizer)
    run.model.eval()
    before, rates = weights(run), [group["lr"] for group in run.strategy.optimizers[0].param_groups]
    with pytest.raises(torch.OutOfMemoryError), unchanged(run):
        run.model.train()
        batches = [run.train_loader.dataset[[0, 1]]]
        run.accumulate(batches, [1.0], run.measure(batches[0])[0])
        if part != "backward":
            run.strategy.gradient_norm()
        if part == "stepped":
            run.strategy.step(0.5)
        raise torch.OutOfMemoryError
    assert all(torch.equal(one, two) for one, two in zip(before.values(), weights(run).values()))
    assert all(parameter.grad is None for parameter in run.model.parameters()) and not run.model.training
    assert rates == [group["lr"] for group in run.strategy.optimizers[0].param_groups]
    assert not any(optimizer.state for optimizer in run.strategy.optimizers)
    assert run.train() is True
    other = make_trainer(pretrain_csv, tmp_path / "straight", *words, tokenizer=tokenizer)
    other.train()
    assert all(torch.equal(one, two) for one, two in zip(weights(run).values(), weights(other).values()))
