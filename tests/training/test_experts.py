"""A mixture of experts in training: the balance loss brings every expert to work, and without it some starve."""

import pytest
import torch
from test_loop import make_trainer, records

FAIR = 1 / 4  # of four experts


@pytest.fixture
def tokenizer(small_tokenizer):
    return small_tokenizer


def over_all_rows(run, hook):
    """Run the model on all training rows while `hook` watches every router."""
    handles = [layer.feed_forward.gate.register_forward_hook(hook) for layer in run.model.layers]
    data = run.train_loader.dataset
    with torch.no_grad():
        run.model.eval()(data[list(range(len(data)))]["input_ids"])
    for handle in handles:
        handle.remove()


def prefer_two_experts(run):
    """Change every router: two experts get logits higher by about 2."""
    means = {}
    over_all_rows(run, lambda gate, inputs, output: means.update({gate: inputs[0].flatten(0, 1).mean(dim=0)}))
    for gate, mean in means.items():
        gate.weight.data[:2] += 2 * mean / mean.dot(mean)


def load_of(run):
    """Share [L, E] of the routing choices over all training rows, counted from the choices themselves."""
    chosen = []
    over_all_rows(run, lambda gate, inputs, output: chosen.append(output[1].flatten()))
    return torch.stack([experts.bincount(minlength=4) / experts.numel() for experts in chosen])


def test_with_the_balance_loss_no_expert_gets_under_half_its_share_without_it_some_do(
    pretrain_csv, tmp_path, tokenizer
):
    """From routers that send nearly all tokens to two experts."""
    words = ("--use_moe", "--max_steps", 150, "--batch_size", 16, "--learning_rate", 1e-2, "--log_interval", 50)
    least = {}
    for alpha in (0.01, 0.0):
        run = make_trainer(pretrain_csv, tmp_path / str(alpha), *words, tokenizer=tokenizer)
        for layer in run.model.layers:
            assert layer.feed_forward.gate.alpha == 0.01  # the default
            layer.feed_forward.gate.alpha = alpha
        prefer_two_experts(run)
        assert load_of(run).min() < FAIR / 2
        run.train()
        load = load_of(run)
        least[alpha] = load.min().item()
        last = [record for record in records(run) if "loss" in record][-1]
        assert last["least_expert_load"] == pytest.approx(least[alpha], abs=0.03)
        assert last["expert_load"] == pytest.approx(load.mean(dim=0).tolist(), abs=0.03)
    assert least[0.01] > FAIR / 2 > least[0.0]
