"""A mixture of experts in training: the balance loss keeps every expert at work, and without it some starve."""

import pytest
import torch
from test_loop import make_trainer, records


@pytest.fixture
def tokenizer(small_tokenizer):
    return small_tokenizer


def train(data_path, folder, tokenizer, alpha):
    words = ("--use_moe", "--max_steps", 150, "--batch_size", 16, "--learning_rate", 1e-2, "--log_interval", 50)
    run = make_trainer(data_path, folder, *words, tokenizer=tokenizer)
    for layer in run.model.layers:
        assert layer.feed_forward.gate.alpha == 0.01  # the default
        layer.feed_forward.gate.alpha = alpha
    run.train()
    return run


def load_of(run):
    """Share [L, E] of the routing choices over all training rows, counted by hand."""
    chosen = {layer: [] for layer in range(len(run.model.layers))}
    for number, layer in enumerate(run.model.layers):
        hook = lambda gate, inputs, output, number=number: chosen[number].append(output[1].flatten())  # noqa: E731
        layer.feed_forward.gate.register_forward_hook(hook)
    data = run.train_loader.dataset
    with torch.no_grad():
        run.model.eval()(data[list(range(len(data)))]["input_ids"])
    return torch.stack([torch.cat(experts).bincount(minlength=4) for experts in chosen.values()]).double() / sum(
        len(experts) for experts in chosen[0]
    )


def test_with_the_balance_loss_no_expert_gets_under_half_its_share_without_it_some_do(
    pretrain_csv, tmp_path, tokenizer
):
    fair, least = 1 / 4, {}
    for alpha in (0.01, 0.0):
        run = train(pretrain_csv, tmp_path / str(alpha), tokenizer, alpha)
        load = load_of(run)
        least[alpha] = load.min().item()
        last = [record for record in records(run) if "loss" in record][-1]
        assert last["least_expert_load"] == pytest.approx(least[alpha], abs=0.03)
        assert last["expert_load"] == pytest.approx(load.mean(dim=0).tolist(), abs=0.03)
    assert least[0.01] > fair / 2 > least[0.0]
