"""The loop: gradients, schedule, optimizer groups, precision, non-finite numbers, exact resume, reports."""

import argparse
import collections
import dataclasses
import json
import math
import os
import re
import runpy
import sys
import time
import types

import pytest
import torch

from conftest import ROOT, TINY_FLAGS
from model.build import build_model
from model.cli import add_training_flags, from_flags, training_settings
from model.data.dataset import open_pretrain_data, open_sft_data
from model.errors import UserError
from model.settings import ModelSettings, TrainingSettings
from model.training import loop, ranks, reports
from model.training.loop import Trainer, language_model_loss, measure, start
from model.training.optimizer import Schedule, build_optimizers, is_hidden_matrix, make_schedule
from model.training.reports import RunLog


@pytest.fixture
def tokenizer(small_tokenizer):
    return small_tokenizer


def arguments(*words):
    parser = argparse.ArgumentParser()
    add_training_flags(parser, data_path="unused", learning_rate=1e-3, epochs=1, wandb_project="test")
    return parser.parse_args(
        [*TINY_FLAGS, "--device", "cpu", "--dtype", "float32", "--batch_size", "4", *map(str, words)]
    )


def make_model(tokenizer, *words):
    """(model, resolved TrainingSettings) of flags."""
    args = arguments(*words)
    settings = training_settings(args)
    place = start(settings)
    return build_model(from_flags(ModelSettings, args), tokenizer)[0], settings.resolved(place, 1)


def make_trainer(data_path, out_dir, *words, tokenizer, loss_function=language_model_loss, sft=False):
    model, settings = make_model(tokenizer, "--out_dir", out_dir, *words)
    open_data = open_sft_data if sft else open_pretrain_data
    options = dict(seed=settings.seed, validation_share=0.1)
    train, validation = open_data(data_path, tokenizer, model.config.max_seq_len, **options)
    names = dict(stage="test", loss_function=loss_function)
    return Trainer(model, tokenizer, train, validation, settings, **names)


def records(run):
    lines = (run.path.parent / "logs" / f"{run.path.stem}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(run):
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


# ---- gradients


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("split", [[4, 4, 4], [5, 5, 2], [1] * 12])
def test_gradients_do_not_depend_on_the_split_into_micro_batches(sft_csv, tmp_path, tokenizer, moe, split):
    run = make_trainer(sft_csv, tmp_path, *(["--use_moe"] if moe else []), tokenizer=tokenizer, sft=True)
    data = run.train_loader.dataset

    def gradients(sizes):
        batches, first = [], 0
        for size in sizes:
            batches.append(data[list(range(first, first + size))])
            first += size
        counts = [measure(batch, run.byte_lengths) for batch in batches]
        rows, items = sum(count[1] for count in counts), sum(count[0] for count in counts)
        run.model.zero_grad()
        loss = run.accumulate(batches, [count[1] / rows for count in counts], items)
        return {name: parameter.grad.clone() for name, parameter in run.model.named_parameters()}, loss

    whole, whole_loss = gradients([12])
    parts, parts_loss = gradients(split)
    assert torch.allclose(whole_loss, parts_loss, rtol=1e-5)
    for name, gradient in whole.items():
        assert torch.allclose(gradient, parts[name], rtol=1e-3, atol=2e-6 * gradient.abs().max().item() + 1e-8), name
    if moe:
        assert whole["layers.0.feed_forward.gate.weight"].abs().sum() > 0


def test_balance_loss_reaches_the_router(sft_csv, tmp_path, tokenizer):
    def without_cross_entropy(model, batch, num_items):
        loss, aux_loss = language_model_loss(model, batch, num_items)
        return loss.detach(), aux_loss

    run = make_trainer(
        sft_csv, tmp_path, "--use_moe", tokenizer=tokenizer, sft=True, loss_function=without_cross_entropy
    )
    batch = run.train_loader.dataset[[0, 1, 2]]
    run.accumulate([batch], [1.0], measure(batch, run.byte_lengths)[0])
    assert all(layer.feed_forward.gate.weight.grad.abs().sum() > 0 for layer in run.model.layers)


@pytest.mark.parametrize("moe", [False, True])
def test_the_gradient_is_that_of_cross_entropy_plus_balance_loss(sft_csv, tmp_path, tokenizer, moe):
    """Against plain autograd on the logits and the router's probabilities, written out here."""
    run = make_trainer(sft_csv, tmp_path, *(["--use_moe"] if moe else []), tokenizer=tokenizer, sft=True)
    batch = run.train_loader.dataset[list(range(6))]
    items, rows, *_ = measure(batch, run.byte_lengths)
    routed = []
    for layer in run.model.layers if moe else ():
        gate = layer.feed_forward.gate
        gate.register_forward_hook(lambda gate, inputs, output: routed.append((gate, inputs[0], output[1])))
    output = run.model(batch["input_ids"], attention_mask=batch["attention_mask"])
    targets = batch["labels"][:, 1:]
    expected = (
        torch.nn.functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), targets, reduction="sum") / items
    )
    for gate, x, experts in routed:
        mask = batch["attention_mask"].float()
        probability = (torch.einsum("btc,ec->bte", x, gate.weight).softmax(-1) * mask[..., None]).sum(1)
        probability = probability / mask.sum(1, keepdim=True)
        chosen = torch.nn.functional.one_hot(experts.view(*mask.shape, -1), 4).sum(2) * mask[..., None]
        load = chosen.sum(1) / mask.sum(1, keepdim=True) * 4 / 2  # four experts, two of them chosen
        expected = expected + 0.01 * (load * probability).sum(1).mean()
    gradients = torch.autograd.grad(expected, list(run.model.parameters()), allow_unused=True)
    run.accumulate([batch], [1.0], items)
    for (name, parameter), gradient in zip(run.model.named_parameters(), gradients):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_batch_that_only_keeps_a_rank_in_step_counts_nothing(sft_csv, tmp_path, tokenizer):
    run = make_trainer(sft_csv, tmp_path, tokenizer=tokenizer, sft=True)
    batch = run.train_loader.dataset[[0]]
    assert all(measure(batch, run.byte_lengths))
    batch["labels"].fill_(-100)
    assert run.measure(batch) == (0, 0, 0, 0, batch["labels"].shape[1])


def test_the_remainder_of_an_epoch_is_a_smaller_step(pretrain_csv, tmp_path, tokenizer):
    seen = []

    def spy(model, batch, num_items):
        if model.training:
            seen.append((len(batch["input_ids"]), float(num_items)))
        return language_model_loss(model, batch, num_items)

    run = make_trainer(
        pretrain_csv, tmp_path, "--accumulation_steps", 5, "--epochs", 2, tokenizer=tokenizer, loss_function=spy
    )
    rows, batches = len(run.train_loader.dataset), len(run.train_loader)
    assert batches % 5 and rows % 4  # or this test shows nothing
    run.train()
    assert run.state.step == 2 * math.ceil(batches / 5)
    assert sum(size for size, _ in seen) == 2 * rows
    # Every supervised target was counted in exactly one step of each epoch.
    firsts = [seen[index] for epoch in (0, batches) for index in range(epoch, epoch + batches, 5)]
    assert sum(items for _, items in firsts) == 2 * run.train_loader.dataset.num_targets
    assert run.state.progress()["supervised_tokens_seen"] == 2 * run.train_loader.dataset.num_targets


def test_a_step_weights_micro_batches_by_their_rows_and_the_clock_says_what_is_left(
    pretrain_csv, tmp_path, tokenizer, monkeypatch
):
    """With a second rank that holds the same: two micro-batches of three rows and one, after a step of 8 s and three of 2 s."""
    run, seen = make_trainer(pretrain_csv, tmp_path, "--accumulation_steps", 2, tokenizer=tokenizer), {}
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "sum_over_ranks", lambda values: [2.0 * value for value in values])
    monkeypatch.setattr(run, "accumulate", lambda batches, shares, items: seen.update(shares=shares, items=items) or 0)
    monkeypatch.setattr(run, "update", lambda loss, factor: (0.0, 0.0))
    note = types.SimpleNamespace(
        factor=lambda *where: seen.update(factor=where),
        is_over=lambda *where: seen.update(is_over=where),
        progress=lambda *where: 0.5,
    )
    monkeypatch.setattr(run, "schedule", note)
    run.state.step, run.state.train_seconds, run.state.steady_from = 4, 14.0, 8.0  # the first step took 8 s
    data = run.train_loader.dataset
    run.train_step([data[[0, 1, 2]], data[[3]]], collections.Counter())
    assert seen["shares"] == [3 / 8, 1 / 8] and seen["factor"] == (4, 14.0)
    assert seen["is_over"] == (5, 16.0, 2.0)


# ---- schedule and optimizers


def test_schedule_is_the_cosine_to_a_tenth_after_a_linear_warmup():
    total, warmup, peak = 110, 10, 2e-4
    schedule = Schedule(total, warmup, decay="cosine")
    rates = [peak * schedule.factor(step) for step in range(total)]
    assert rates[0] == pytest.approx(peak / 11) and rates[9] == pytest.approx(peak * 10 / 11)
    for step in range(warmup, total):
        t, T = step - warmup, total - warmup
        assert rates[step] == pytest.approx(peak / 10 + 0.5 * (peak - peak / 10) * (1 + math.cos(math.pi * t / T)))
    assert rates[warmup] == pytest.approx(peak) and rates[60] == pytest.approx(0.55 * peak)
    assert schedule.factor(total) == pytest.approx(0.1)
    assert schedule.factor(10 * total) == pytest.approx(0.1)
    assert Schedule(10, 0).factor(0) == 1.0


def test_schedule_falls_in_a_line_to_zero_in_the_share_that_is_for_it():
    whole, half, never = (Schedule(110, 10, decay_share=share) for share in (1.0, 0.5, 0.0))
    warming = [step / 11 for step in range(1, 11)]
    assert [whole.factor(step) for step in range(111)] == pytest.approx([*warming, *(1 - t / 100 for t in range(101))])
    steady = [1.0] * 50
    falling = [1 - t / 50 for t in range(51)]
    assert [half.factor(step) for step in range(111)] == pytest.approx([*warming, *steady, *falling])
    assert [never.factor(step) for step in range(10, 110)] == [1.0] * 100
    late_cosine = Schedule(110, 10, decay="cosine", decay_share=0.5)
    assert [late_cosine.factor(step) for step in (59, 60, 85, 110)] == pytest.approx([1.0, 1.0, 0.55, 0.1])
    assert Schedule(math.inf, 0, 100.0, decay_share=0.25).factor(7, 90.0) == pytest.approx(0.4)


def test_the_flags_of_the_schedule_reach_it():
    settings = TrainingSettings(max_steps=100, warmup_iters=0, decay_share=0.5, schedule="cosine")
    schedule = make_schedule(settings.resolved(torch.device("cpu"), 1), 1000)
    assert [schedule.factor(step) for step in (0, 50)] == [1, 1]
    assert schedule.factor(75) == pytest.approx(0.55) and schedule.factor(100) == pytest.approx(0.1)


def test_schedule_by_time_warms_up_then_follows_the_clock():
    settings = TrainingSettings(max_minutes=10, schedule="cosine").resolved(torch.device("cpu"), 1)
    schedule = make_schedule(settings, steps_per_epoch=1000)
    assert schedule.total_steps == math.inf and schedule.seconds == 600
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * seconds / 600)) for seconds in range(0, 601)]
    assert schedule.factor(0, 0.0) == pytest.approx(1 / 101)  # of a hundred steps ...
    assert schedule.factor(9, 15.0) == pytest.approx(0.5)  # ... or of 5 % of the time, 30 s, what goes faster
    assert schedule.factor(50, 1.0) == pytest.approx(51 / 101)
    assert schedule.factor(9, 30.0) == pytest.approx(cosine[30]) and schedule.factor(100, 3) == pytest.approx(cosine[3])
    assert schedule.factor(10**6, 300) == pytest.approx(0.55) and schedule.factor(7, 600) == pytest.approx(0.1)
    assert not schedule.is_over(0, 0.0, 0.0) and not schedule.is_over(10, 500, 50) and not schedule.is_over(2, 599, 1)
    assert schedule.is_over(10, 546, 55) and schedule.is_over(3, 601, 0)  # another step of 55 s would end too late
    both = make_schedule(TrainingSettings(max_minutes=10, max_steps=100, warmup_iters=3, schedule="cosine"), 1000)
    assert both.factor(51, 60) == Schedule(100, 3, decay="cosine").factor(51) and both.factor(4, 300) == pytest.approx(
        0.55
    )
    assert both.factor(1, 60.0) == 0.5  # --warmup_iters is in steps
    assert both.is_over(100, 1, 0) and both.is_over(99, 599, 2)
    assert make_schedule(TrainingSettings(max_minutes=10, epochs=2), 30).total_steps == 60
    assert [make_schedule(TrainingSettings(epochs=1), steps).warmup_steps for steps in (100, 10**5)] == [5, 100]


def test_max_minutes_ends_within_the_time_and_resumes_its_clock(pretrain_csv, tmp_path, tokenizer):
    words = ("--max_minutes", 0.025, "--log_interval", 1)
    run = make_trainer(pretrain_csv, tmp_path, *words, "--stop_after", 5, tokenizer=tokenizer)
    assert run.train() is False
    begun = run.state.train_seconds
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    run.resume()
    assert run.state.train_seconds == begun
    assert run.train() is True
    assert 1.2 < run.state.train_seconds < 1.6 and run.state.step > 10
    rates = [line["learning_rate"] for line in records(run) if "learning_rate" in line]
    assert len(rates) == run.state.step and rates[-1] < 0.12 * 1e-3 and max(rates) > 0.9e-3
    assert "validation_loss" in records(run)[-1]
    again = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    again.resume()
    assert again.train() is True and again.state.step == run.state.step


def test_every_optimizer_follows_the_schedule_and_the_log_says_its_rate(pretrain_csv, tmp_path, tokenizer):
    words = ("--optimizer", "muon", "--max_steps", 6, "--warmup_iters", 2, "--learning_rate", 1e-3, "--log_interval", 1)
    run, rates = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer), []
    for optimizer in run.strategy.optimizers:
        step = optimizer.step

        def note(*positional, optimizer=optimizer, step=step, **named):
            rates.append([group["lr"] for group in optimizer.param_groups])
            return step(*positional, **named)

        optimizer.step = note
    run.train()
    factors = [Schedule(6, 2).factor(step) for step in range(6)]
    assert [rate for (rate,) in rates[0::2]] == pytest.approx([1e-2 * factor for factor in factors])  # Muon's
    for matrices_and_vectors, embedding, factor in zip(*zip(*rates[1::2]), factors):
        assert (matrices_and_vectors, embedding) == pytest.approx((1e-3 * factor, 1e-2 * factor))
    logged = [record["learning_rate"] for record in records(run) if "learning_rate" in record]
    assert logged == pytest.approx([1e-3 * factor for factor in factors])


def test_the_logged_loss_is_the_mean_over_the_targets_of_all_its_steps(sft_csv, tmp_path, tokenizer):
    seen = []

    def spy(model, batch, num_items):
        loss, aux_loss = language_model_loss(model, batch, num_items)
        if model.training:
            targets = batch["labels"][:, 1:]
            size = sum(len(tokenizer.convert_ids_to_tokens(int(t))) for t in targets[targets > 2])
            seen.append((loss.item() * num_items.item(), int((targets >= 0).sum()), size))
        return loss, aux_loss

    words = ("--max_steps", 4, "--log_interval", 4, "--accumulation_steps", 2)
    run = make_trainer(sft_csv, tmp_path, *words, tokenizer=tokenizer, sft=True, loss_function=spy)
    run.train()
    nats, items, size = (sum(column) for column in zip(*seen[2:]))  # the first step has a line of its own
    last = [record for record in records(run) if "loss" in record][-1]
    assert last["step"] == 4 and last["loss"] == pytest.approx(nats / items, rel=1e-4)
    assert last["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)


@pytest.mark.parametrize("words", [[], ["--use_moe"]])
def test_only_matrices_decay_and_every_parameter_is_optimised_once(tokenizer, words):
    for kind in ("adamw", "muon"):
        model, settings = make_model(tokenizer, "--optimizer", kind, "--weight_decay", 0.1, *words)
        optimizers = build_optimizers(model, settings)
        assert len(optimizers) == (2 if kind == "muon" else 1)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        seen = []
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    seen.append(names[id(parameter)])
                    decay = group["lr"] * group["weight_decay"]
                    assert decay == pytest.approx(settings.learning_rate * 0.1 if parameter.dim() == 2 else 0), seen[-1]
        assert sorted(seen) == sorted(names.values())
        if kind == "muon":
            muon = {names[id(parameter)] for parameter in optimizers[0].param_groups[0]["params"]}
            assert all(name.startswith("layers.") and "gate" not in name and "norm" not in name for name in muon)
            assert optimizers[0].param_groups[0]["lr"] == pytest.approx(10 * settings.learning_rate)


@pytest.mark.parametrize(
    "name, shape, hidden",
    [
        ("layers.3.attention.wq.weight", (4, 4), True),
        ("layers.0.feed_forward.experts.1.w2.weight", (4, 4), True),
        ("base_model.model.layers.0.attention.wq.lora_A.default.weight", (2, 4), True),
        ("base_model.model.layers.7.feed_forward.experts.1.w2.lora_B.default.weight", (4, 2), True),
        ("base_model.model.layers.0.feed_forward.gate.lora_A.default.weight", (2, 4), False),
        ("layers.0.feed_forward.gate.weight", (4, 4), False),
        ("layers.0.attention_norm.weight", (4,), False),
        ("tok_embeddings.weight", (4, 4), False),
        ("base_model.model.output.lora_A.default.weight", (2, 4), False),
    ],
)
def test_muon_takes_the_linear_maps_of_the_layers_under_peft_names_too(name, shape, hidden):
    assert is_hidden_matrix(name, torch.nn.Parameter(torch.zeros(shape))) is hidden


def test_adamw_is_the_one_written_out(tokenizer):
    words = ("--learning_rate", 0.01, "--weight_decay", 0.1, "--beta1", 0.8, "--beta2", 0.98, "--optimizer", "adamw")
    model, settings = make_model(tokenizer, *words, "--embedding_rate_factor", 4)
    (optimizer,) = build_optimizers(model, settings)
    parameters = matrix, vector, embedding = (
        model.layers[0].attention.wq.weight,
        model.norm.weight,
        model.tok_embeddings.weight,
    )
    assert model.output.weight is embedding
    expected, moments = [parameter.detach().clone() for parameter in parameters], [[0.0, 0.0] for _ in parameters]
    for step in (1, 2, 3):
        # Rate of the update, and what a step takes off: 0.01 * 0.1 of any matrix, whatever its rate.
        for index, (parameter, rate, decay) in enumerate(zip(parameters, (0.01, 0.01, 0.04), (0.001, 0.0, 0.001))):
            gradient = parameter.grad = torch.randn_like(parameter)
            first, second = moments[index]
            first, second = 0.8 * first + 0.2 * gradient, 0.98 * second + 0.02 * gradient**2
            moments[index] = first, second
            change = first / (1 - 0.8**step) / ((second / (1 - 0.98**step)).sqrt() + 1e-8)
            expected[index] = expected[index] * (1 - decay) - rate * change
        optimizer.step()
    for parameter, wanted in zip(parameters, expected):
        assert torch.allclose(parameter, wanted, atol=1e-6)


def test_beta1_is_muons_momentum_too(tokenizer):
    model, settings = make_model(tokenizer, "--optimizer", "muon", "--beta1", 0.7, "--beta2", 0.6)
    muon, adamw = build_optimizers(model, settings)
    assert [group["momentum"] for group in muon.param_groups] == [0.7]
    assert {group["betas"] for group in adamw.param_groups} == {(0.7, 0.6)}


def test_muon_missing_is_one_line(monkeypatch, tokenizer):
    monkeypatch.delattr(torch.optim, "Muon")
    model, settings = make_model(tokenizer, "--optimizer", "muon")
    with pytest.raises(UserError, match="--optimizer muon"):
        build_optimizers(model, settings)


def test_frozen_parameters_are_left_alone(tokenizer):
    model, settings = make_model(tokenizer)
    model.tok_embeddings.weight.requires_grad_(False)
    optimizers = build_optimizers(model, settings)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert groups and all(model.tok_embeddings.weight is not p for group in groups for p in group["params"])


def test_without_a_choice_muon_works_and_with_deepspeed_adamw(monkeypatch):
    open_choice, device = TrainingSettings(learning_rate=3e-3), torch.device("cpu")
    assert open_choice.resolved(device, 1).optimizer == "muon"
    assert dataclasses.replace(open_choice, deepspeed="auto").resolved(device, 1).optimizer == "adamw"
    for dim, rate in ((192, 1.5625e-3), (512, 5.859e-4)):  # the wider, the slower
        assert TrainingSettings().resolved(device, 1, dim).learning_rate == pytest.approx(rate, rel=1e-3)
        assert TrainingSettings().resolved(device, 1, dim).muon_learning_rate == pytest.approx(10 * rate, rel=1e-3)
    resolved = open_choice.resolved(device, 1, 192)
    assert resolved.muon_learning_rate == pytest.approx(3e-2)
    monkeypatch.setattr(sys, "argv", ["3-full_sft.py"])
    args = runpy.run_path(ROOT / "3-full_sft.py")["parse_arguments"]()
    assert training_settings(args).resolved(device, 1, 512).learning_rate == pytest.approx(4.883e-4, rel=1e-3)


def test_flags_that_would_do_nothing_are_refused():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for given, device, line in (
        (dict(muon_learning_rate=0.1, optimizer="adamw"), cpu, "--muon_learning_rate: the optimizer is adamw"),
        (dict(muon_learning_rate=0.1, deepspeed="auto"), gpu, "--muon_learning_rate: the optimizer is adamw"),
        (dict(short_rows=64, short_rows_share=None), gpu, "--short_rows: there are none"),
        (dict(short_rows=64, short_rows_share=0.0), cpu, "--short_rows: there are none"),
    ):
        with pytest.raises(UserError, match=line) as caught:
            TrainingSettings(**given).resolved(device, 1)
        assert caught.value.exit_code == 2
    assert TrainingSettings(short_rows=64, short_rows_share=None).resolved(cpu, 1).short_rows == 64


@pytest.mark.parametrize(
    "max_seq_len, length", [(512, 128), (510, 102), (250, 50), (9, None), (15, 3), (251, None), (2, None)]
)
def test_unless_told_otherwise_short_rows_are_the_largest_part_up_to_a_quarter(max_seq_len, length):
    assert loop.short_rows(TrainingSettings(short_rows_share=0.5), max_seq_len) == length
    assert loop.short_rows(TrainingSettings(), max_seq_len) is None


def test_short_rows_hold_the_same_tokens_until_their_share_is_over(pretrain_csv, tmp_path, tokenizer):
    seen = []

    def spy(model, batch, num_items):
        if model.training:
            seen.append((batch["input_ids"].clone(), batch["labels"].clone()))
        return language_model_loss(model, batch, num_items)

    def run(*words):
        seen.clear()
        words = ("--max_steps", 8, "--warmup_iters", 0, *words)
        trainer = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer, loss_function=spy)
        trainer.train()
        return trainer, list(seen)

    whole, rows = run("--out_dir", tmp_path / "whole")
    short, pieces = run("--short_rows_share", 0.5, "--out_dir", tmp_path / "short")
    assert [ids.shape[1] for ids, _ in pieces] == [8] * 4 + [32] * 4 and {ids.shape[1] for ids, _ in rows} == {32}
    for (ids, labels), (whole_ids, whole_labels) in zip(pieces, rows):
        assert torch.equal(ids.flatten(), whole_ids.flatten()) and (labels[:, 0] == -100).all()
        assert torch.equal(labels[:, 1:], whole_labels.reshape(labels.shape)[:, 1:])
    assert short.state.tokens_seen == whole.state.tokens_seen
    # The first token of each piece has nothing before it and is no target.
    assert short.state.supervised_tokens_seen == sum(int((labels[:, 1:] != -100).sum()) for _, labels in pieces)
    with pytest.raises(UserError, match="--short_rows: 7 is no part of the 32 of --max_seq_len"):
        make_trainer(pretrain_csv, tmp_path, "--short_rows", 7, "--short_rows_share", 1, tokenizer=tokenizer)
    for kind, share in (("cpu", 0.8), ("cuda", 0.0)):
        assert TrainingSettings(short_rows_share=None).resolved(torch.device(kind), 1).short_rows_share == share


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_lowers_the_validation_loss(pretrain_csv, tmp_path, tokenizer, kind):
    words = ("--optimizer", kind, "--learning_rate", 5e-3, "--epochs", 4)
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    run.train()
    losses = [record["validation_loss"] for record in records(run) if "validation_loss" in record]
    assert len(losses) == 2 and losses[-1] < 0.8 * losses[0]


def test_gradient_norm_is_clipped(pretrain_csv, tmp_path, tokenizer):
    applied = []
    run = make_trainer(pretrain_csv, tmp_path, "--grad_clip", 0.01, "--max_steps", 3, tokenizer=tokenizer)
    step = run.strategy.optimizers[0].step

    def note(*positional, **named):
        applied.append(torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()]).item())
        return step(*positional, **named)

    run.strategy.optimizers[0].step = note
    run.train()
    assert applied == pytest.approx([0.01] * 3, rel=1e-3)
    assert records(run)[-1].get("gradient_norm", 1) > 0.01  # what is reported is the norm before


# ---- precision


def test_the_gradient_norm_of_float16_is_unscaled_under_every_optimizer(pretrain_csv, tmp_path, tokenizer):
    norms = []
    for words in ([], ["--dtype", "float16"], ["--dtype", "float16", "--optimizer", "muon"]):
        run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
        batch = run.train_loader.dataset[[0, 1, 2, 3]]
        run.accumulate([batch], [1.0], measure(batch, run.byte_lengths)[0])
        norms.append(run.strategy.gradient_norm().item())
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=1e-2)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_does_what_it_says(pretrain_csv, tmp_path, tokenizer, name):
    kinds = set()
    words = ("--dtype", name, "--max_steps", 4, "--learning_rate", 5e-3)
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    hook = run.model.layers[0].attention.wq.register_forward_hook(
        lambda module, inputs, output: kinds.add(output.dtype)
    )
    run.train()
    hook.remove()
    assert kinds == {getattr(torch, name)}
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    assert run.strategy.scaler.is_enabled() == (name == "float16")
    losses = [record["loss"] for record in records(run) if "loss" in record]
    assert losses[-1] < losses[0]


def test_validation_in_bfloat16_agrees_with_float32(pretrain_csv, tmp_path, tokenizer):
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 12, "--learning_rate", 5e-3, tokenizer=tokenizer)
    run.train()
    exact = run.state.progress()["validation_loss"]
    run.dtype = torch.bfloat16
    run.validate()
    assert run.state.progress()["validation_loss"] == pytest.approx(exact, rel=2e-3)


def test_eval_tokens_bounds_what_a_validation_reads(pretrain_csv, tmp_path, tokenizer, capsys):
    run = make_trainer(pretrain_csv, tmp_path, "--batch_size", 1, "--eval_tokens", 40, tokenizer=tokenizer)
    total = run.validation_loader.dataset.num_targets
    assert total > 2 * 62
    run.validate()
    (read,) = re.findall(r"\((\d+) held-out tokens\)", capsys.readouterr().out)
    assert 40 <= int(read) < 40 + 31  # a row has 31 targets
    run.settings.eval_tokens = 0
    run.validate()
    assert f"({total:,} held-out tokens)" in capsys.readouterr().out


def test_every_validation_reads_the_same_rows_and_ranks_share_them(
    pretrain_csv, tmp_path, tokenizer, monkeypatch, capsys
):
    run = make_trainer(pretrain_csv, tmp_path, "--batch_size", 1, "--eval_tokens", 62, tokenizer=tokenizer)
    run.validate()
    first = run.state.validation_loss
    run.validate()
    assert run.state.validation_loss == first
    capsys.readouterr()
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "sum_over_ranks", lambda values: [2.0 * value for value in values])
    run.validate()
    assert "(62 held-out tokens)" in capsys.readouterr().out  # a row of 31 targets on each


def test_bits_per_byte_count_the_bytes_of_the_targets(pretrain_csv, tmp_path, tokenizer):
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 1, tokenizer=tokenizer)
    run.train()
    data = run.validation_loader.dataset
    nats = size = items = 0
    run.model.eval()
    for index in range(len(data)):
        row = data[index]
        with torch.no_grad():
            logits = run.model(row["input_ids"][None]).logits[0].log_softmax(-1)
        for position in range(1, len(row["labels"])):
            target = int(row["labels"][position])
            if target >= 0:
                nats -= logits[position - 1, target].item()
                items += 1
                if target not in tokenizer.all_special_ids:
                    token = tokenizer.convert_ids_to_tokens(target)
                    size += len(token)  # byte-level: one character per byte
    assert run.state.progress()["validation_loss"] == pytest.approx(nats / items, rel=1e-4)
    assert run.state.progress()["validation_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)


# ---- what must not reach the weights


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_numbers_stop_before_the_weights_change(pretrain_csv, tmp_path, tokenizer, where):
    calls = []

    def poisoned(model, batch, num_items):
        loss, aux_loss = language_model_loss(model, batch, num_items)
        if model.training:
            calls.append(1)
            if len(calls) == 6:
                weight = model.layers[0].attention.wq.weight
                # sqrt at zero: a finite loss whose gradient is infinite.
                loss = loss * math.nan if where == "loss" else loss + (weight * 0).abs().sqrt().sum()
        return loss, aux_loss

    words = ("--max_steps", 9, "--save_interval", 2)
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer, loss_function=poisoned)
    before = {}
    step = run.strategy.optimizers[-1].step

    def note(*positional, **named):
        result = step(*positional, **named)
        before.update(weights(run))
        return result

    run.strategy.optimizers[-1].step = note
    with pytest.raises(UserError, match=r"step 6: (loss|gradient norm) is nan.*of step 4 is intact"):
        run.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    again = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    again.resume()
    assert again.state.step == 4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_skips_overflows_but_not_for_ever(pretrain_csv, tmp_path, tokenizer, optimizer):
    def overflowing(model, batch, num_items):
        loss, aux_loss = language_model_loss(model, batch, num_items)
        return loss + (model.layers[0].attention.wq.weight * 0).abs().sqrt().sum(), aux_loss

    words = ("--dtype", "float16", "--epochs", 9, "--optimizer", optimizer)
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer, loss_function=overflowing)
    before = weights(run)
    with pytest.raises(UserError, match="gradient norm is nan"):
        run.train()
    assert 10 < run.state.step < 30  # 65536 halves 16 times before it falls below 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


# ---- reports


def test_log_has_what_the_run_is_watched_by(pretrain_csv, tmp_path, tokenizer):
    words = ("--use_moe", "--max_steps", 6, "--log_interval", 2, "--eval_interval", 3)
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    run.train()
    lines = records(run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 4, 6]
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 3, 6]
    for line in steps:
        assert len(line["expert_load"]) == 4 and sum(line["expert_load"]) == pytest.approx(1, abs=1e-3)
        assert 0 <= line["least_expert_load"] <= min(line["expert_load"])
        assert {"bits_per_byte", "learning_rate", "gradient_norm", "tokens_per_second", "tokens_seen"} <= line.keys()
    assert steps[-1]["seconds_left"] == 0 and steps[-1]["tokens_seen"] == 6 * 4 * 32
    assert lines[-1]["validation_bits_per_byte"] == run.state.progress()["validation_bits_per_byte"]


def test_speed_and_time_left_by_a_clock_of_one_second_a_look(pretrain_csv, tmp_path, tokenizer, monkeypatch):
    seconds = iter(range(10**6))
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 4, "--log_interval", 4, tokenizer=tokenizer)
    run.train()
    last = [line for line in records(run) if "loss" in line][-1]
    assert last["tokens_per_second"] == 4 * 32 and run.state.train_seconds == 4  # one second each


def test_mfu_is_per_rank_and_time_left_goes_by_the_steps_after_the_first(
    pretrain_csv, tmp_path, tokenizer, monkeypatch
):
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 10, tokenizer=tokenizer)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    run.peak_flops, run.state.step, run.state.steady_since = 1e9, 5, time.perf_counter() - 8
    run.report(dict(nats=6.0, items=3, size=2, tokens=100, flops=1e9, seconds=2.0))
    (record,) = records(run)
    assert record["mfu"] == 0.25 and record["tokens_per_second"] == 50 and record["loss"] == 2
    assert record["seconds_left"] == pytest.approx(10, abs=0.5)  # four steps in 8 s, five to come


def test_a_resumed_log_keeps_whole_lines_up_to_its_step_and_a_fresh_one_none(tmp_path):
    log = RunLog(tmp_path / "run.jsonl")
    for first_step, kept in ((2, [0, 1, 2, 2]), (0, [])):
        lines = [json.dumps(dict(step=step)) for step in (0, 1, 2, 2, 3)]
        log.path.write_text("\n".join([*lines, '{"step": 1, "lo']))
        log.start(first_step, 4)
        log.keep()
        log.close()
        assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == kept


def test_mfu_is_what_the_tokens_cost_by_the_peak(pretrain_csv, tmp_path, tokenizer):
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 3, "--accumulation_steps", 2, tokenizer=tokenizer)
    run.peak_flops = 1e9
    run.train()
    last = [record for record in records(run) if "loss" in record][-1]
    assert last["mfu"] == pytest.approx(last["tokens_per_second"] * reports.flops_per_token(run.model, 32) / 1e9)
    assert "mfu" not in records(make_and_train(pretrain_csv, tmp_path / "cpu", tokenizer))[-2]


def make_and_train(data_path, out_dir, tokenizer):
    run = make_trainer(data_path, out_dir, "--max_steps", 1, tokenizer=tokenizer)
    run.train()
    return run


def test_mfu_formula(tokenizer):
    model, _ = make_model(tokenizer, "--use_moe")
    total, active = reports.count_parameters(model)
    expert = sum(p.numel() for p in model.layers[0].feed_forward.experts[0].parameters())
    assert total - active == 2 * 2 * expert  # two of four experts idle, in two layers
    assert reports.flops_per_token(model, 16) == 6 * active + 12 * 2 * 32 * 16


@pytest.mark.parametrize(
    "name, bfloat16, float16",
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 989e12),
        ("NVIDIA H100 PCIe", 756e12, 756e12),
        ("NVIDIA H200", 989e12, 989e12),
        ("NVIDIA GH200 480GB", 989e12, 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA RTX A1000", None, None),
        ("NVIDIA RTX A4000", None, None),
        ("NVIDIA RTX A6000", 154.8e12, 154.8e12),
        ("NVIDIA A10", 125e12, 125e12),
        ("NVIDIA A10G", 70e12, 70e12),
        ("NVIDIA A40", 149.7e12, 149.7e12),
        ("NVIDIA L4", 121e12, 121e12),
        ("NVIDIA L40", 181e12, 181e12),
        ("NVIDIA L40S", 362e12, 362e12),
        ("NVIDIA T400 4GB", None, None),
        ("Tesla T4", None, 65e12),
        ("Tesla V100-SXM2-16GB", None, 125e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 4080 SUPER", None, None),
        ("NVIDIA GeForce GTX 1080", None, None),
    ],
)
def test_peaks_are_those_of_the_named_device_and_dtype(monkeypatch, name, bfloat16, float16):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    assert reports.peak_flops(cuda, torch.bfloat16) == bfloat16
    assert reports.peak_flops(cuda, torch.float16) == float16
    assert reports.peak_flops(cuda, torch.float32) is None
    assert reports.peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_epochs_and_max_steps(pretrain_csv, tmp_path, tokenizer):
    def total(*words):
        run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
        return run.schedule.total_steps, run.steps_per_epoch

    steps, per_epoch = total()
    assert steps == per_epoch  # the stage's default, here 1
    assert total("--epochs", 3)[0] == 3 * per_epoch
    assert total("--max_steps", 5 * per_epoch)[0] == 5 * per_epoch
    assert total("--epochs", 1, "--max_steps", 5 * per_epoch)[0] == per_epoch
    assert total("--epochs", 1, "--max_steps", 1)[0] == 1


def test_an_open_batch_size_is_shared_by_all_ranks():
    def sizes(kind, ranks, **given):
        settings = TrainingSettings(**given).resolved(torch.device(kind), ranks)
        return settings.batch_size, settings.accumulation_steps

    assert sizes("cpu", 1) == (8, 1) and sizes("cpu", 4) == (2, 1)
    assert sizes("cuda", 1) == (64, 1) and sizes("cuda", 2) == (32, 1) and sizes("cuda", 64) == (1, 1)
    assert sizes("cpu", 2, accumulation_steps=3) == (4, 3)
    assert sizes("cuda", 3, batch_size=20) == (20, 1)  # what is given is each process's own
    for kind, number, rows in (("cpu", 16, 8), ("cuda", 3, 64)):
        with pytest.raises(UserError, match=f"{rows} rows .* shared evenly by {number} processes; give --batch_size"):
            sizes(kind, number)
    assert sizes("cpu", 1, batch_size=3) == (3, 1) and sizes("cpu", 1, accumulation_steps=2) == (8, 2)


def test_wandb_missing_is_one_line(pretrain_csv, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = make_trainer(pretrain_csv, tmp_path, "--use_wandb", "--max_steps", 1, tokenizer=tokenizer)
    with pytest.raises(UserError, match="--use_wandb: wandb is not installed"):
        run.train()


def test_wandb_gets_the_numbers_and_is_offline_without_a_key(pretrain_csv, tmp_path, tokenizer, monkeypatch):
    class Run:
        logged, finished = [], False

        def log(self, numbers, step):
            self.logged.append((step, numbers))

        def finish(self):
            Run.finished = True

    class Wandb:
        Error = RuntimeError

        @staticmethod
        def login(prompt):
            assert prompt is False
            return "WANDB_API_KEY" in os.environ

        @staticmethod
        def init(**options):
            Wandb.options = options
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    words = ("--use_wandb", "--wandb_project", "p", "--wandb_run_name", "r", "--max_steps", 2)
    make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer).train()
    assert (Wandb.options["project"], Wandb.options["name"], Wandb.options["mode"]) == ("p", "r", "offline")
    assert [step for step, _ in Run.logged] == [0, 1, 2, 2] and Run.finished
    assert "loss" in Run.logged[1][1]
    monkeypatch.setenv("WANDB_API_KEY", "x")
    make_trainer(pretrain_csv, tmp_path / "again", *words, tokenizer=tokenizer).train()
    assert Wandb.options["mode"] == "online"
