"""--dry_run: what it tells, against counts by hand; that it leaves everything as it was."""

import collections
import json
import math
import re

import pytest
import torch
from test_costs import most_held
from test_dpo_train import PAIR
from test_loop import make_trainer, weights

from conftest import CPU_FLAGS, TINY_FLAGS, assert_one_line_error, files, good, run_two_ranks, save_chat
from model.checkpoint import load_model
from model.errors import UserError
from model.training import costs, dry_run
from model.training.resume import random_state


@pytest.fixture
def tokenizer(small_tokenizer):
    return small_tokenizer


@pytest.fixture
def words(tmp_path, small_tokenizer_path):
    return [
        *TINY_FLAGS,
        *CPU_FLAGS,
        "--tokenizer_path",
        small_tokenizer_path,
        "--out_dir",
        tmp_path / "out",
        "--dry_run",
    ]


# ---- numbers


def test_what_it_finds_by_hand(pretrain_csv, tmp_path, tokenizer):
    words = ("--epochs", 5, "--use_moe", "--optimizer", "adamw")
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    found = dry_run.rehearse(run)
    data = run.train_loader.dataset
    numbers = [parameter.numel() for parameter in run.model.parameters()]
    expert = sum(p.numel() for n, p in run.model.named_parameters() if n.startswith("layers.0.feed_forward.experts.0."))
    total = sum(numbers)
    assert found["parameters"] == dict(total=total, working=total - 2 * 2 * expert, trained=total)
    assert found["data"]["train"] == data.num_tokens and found["data"]["learned"] == data.num_tokens - 1
    assert found["data"]["epochs"] == pytest.approx(5) and found["data"]["tokens"] == pytest.approx(5 * data.num_tokens)
    assert found["data"]["per_parameter"] == pytest.approx(5 * data.num_tokens / total)
    assert found["data"]["worth"] == pytest.approx(1 + 15.39 * (1 - math.exp(-4 / 15.39)))
    steps = 5 * math.ceil(len(data) / 4)
    clock = found["time"]
    assert clock["steps"] == clock["total"] == steps
    assert clock["seconds"] == pytest.approx(5 * data.num_tokens / clock["tokens_per_second"][0])
    held = found["memory"]["held"]["adamw"]
    assert held["weights"] == held["gradients"] == 4 * total and held["optimizer"] == 8 * total and not held["copies"]
    assert found["memory"]["own"] == ("adamw", False) and found["memory"]["rows"] == 4
    sums = found["memory"]["table"]
    assert list(sums["adamw", False]) == [2, 4, 8, 16]
    assert sums["muon", False][4] < sums["adamw", False][4] < sums["adamw", False][8]
    assert sums["adamw", True][16] < sums["adamw", False][16]
    assert found["presets"] == {}, "no preset has this vocabulary"


def test_learned_tokens_are_those_with_a_label(sft_csv, tmp_path, tokenizer):
    from test_loop import open_sft_data

    for last_turn_only in (False, True):
        data, _ = open_sft_data(sft_csv, tokenizer, 32, last_turn_only=last_turn_only)
        assert data.num_targets == sum(int((data[row]["labels"] != -100).sum()) for row in range(len(data)))
    run = make_trainer(sft_csv, tmp_path, tokenizer=tokenizer, sft=True)
    assert dry_run.data(run)["learned"] == run.train_loader.dataset.num_targets < run.train_loader.dataset.num_tokens


def test_memory_is_told_of_the_longest_row(sft_csv, tmp_path, tokenizer):
    run = make_trainer(sft_csv, tmp_path, "--max_seq_len", 64, tokenizer=tokenizer, sft=True)
    data = run.train_loader.dataset
    lengths = [data[[row]]["labels"].shape[1] for row in range(len(data))]
    assert lengths[0] < max(lengths) == dry_run.memory(run)["length"]


def test_learned_tokens_of_pairs(tmp_path, tokenizer):
    from model.data.dataset import open_preference_data

    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{**PAIR, "chosen": "面条" * (row + 1)} for row in range(7)]))
    data, _ = open_preference_data(path, tokenizer, 64)
    assert data.num_targets == sum(int((data[row]["labels"] != -100).sum()) for row in range(len(data)))


def test_the_steps_it_measures_are_the_runs_own(pretrain_csv, tmp_path, tokenizer, monkeypatch):
    """Four of train_step, each of the accumulation asked for; only three count."""
    run = make_trainer(pretrain_csv, tmp_path, "--accumulation_steps", 2, tokenizer=tokenizer)
    clock, steps, train_step = iter(range(0, 1000, 10)), [], run.train_step
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: next(clock))
    run.train_step = lambda batches, window: (
        steps.append((len(batches), run.model.training)) or train_step(batches, window)
    )
    run.model.eval()
    _, measured = dry_run.measure(run)
    assert steps == [(2, True)] * 4 and measured["seconds"] == 30 and measured["tokens"] == 3 * 2 * 4 * 32


def test_minutes_tell_how_many_steps_fit(pretrain_csv, tmp_path, tokenizer):
    run = make_trainer(pretrain_csv, tmp_path, "--max_minutes", 1, "--max_steps", 10**6, tokenizer=tokenizer)
    measured = dict(tokens=3 * 4 * 31, seconds=6.0)
    found = dry_run.duration(run, measured)
    step = run.train_loader.dataset.num_tokens / run.steps_per_epoch / (measured["tokens"] / 6)
    assert found["fitting"] == found["steps"] == int(60 / step) and found["seconds"] <= 60
    run.state.step, run.state.train_seconds = 7, 45.0  # of a run that goes on
    assert dry_run.duration(run, measured)["steps"] == int(15 / step)
    assert dry_run.duration(run, dict(measured, seconds=66.0))["steps"] == int(
        15 / (11 * step)
    )  # fewer than three may be left
    run.state.step, run.state.train_seconds = 0, 0.0
    with pytest.raises(
        UserError, match=r"--max_minutes 1: is less than three steps take here, 66 s; give 1.21 or more"
    ):
        dry_run.duration(run, dict(measured, seconds=66.0))


def test_short_rows_have_a_pace_of_their_own(pretrain_csv, tmp_path, tokenizer):
    """A quarter second a step for the first 80 %, half a second for the rest; with less time, 80 % of that."""
    words = ("--max_steps", 100, "--warmup_iters", 0, "--short_rows_share", 0.8, "--short_rows", 8)
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    tokens = run.train_loader.dataset.num_tokens / run.steps_per_epoch
    measured = dict(tokens=4 * tokens, seconds=1.0, whole_rows=dict(tokens=4 * tokens, seconds=2.0))
    assert dry_run.duration(run, measured)["seconds"] == pytest.approx(80 * 0.25 + 20 * 0.5)
    run.state.step = 90
    assert dry_run.duration(run, measured)["seconds"] == pytest.approx(10 * 0.5)
    run = make_trainer(pretrain_csv, tmp_path, *words, "--max_minutes", 0.25, tokenizer=tokenizer)  # 15 s
    found = dry_run.duration(run, measured)
    assert (found["steps"], found["seconds"]) == (48 + 6, 15.0)
    seen, language_model_loss = [], run.loss_function
    run.loss_function = lambda model, batch, items: (
        seen.append(batch["input_ids"].shape[1]) or language_model_loss(model, batch, items)
    )
    found = dry_run.rehearse(run)
    assert seen[:8] == [8] * 4 + [32] * 4 and found["memory"]["length"] == 32
    assert "with rows of 8 tokens" in "".join(dry_run.lines(run, found))


@pytest.mark.parametrize("share, minutes, lengths", [(0.8, 2.7, [8, 32]), (1, 5, [8])])
def test_whole_rows_are_measured_as_such_if_there_will_be_any(
    pretrain_csv, tmp_path, tokenizer, share, minutes, lengths
):
    """Also where the clock alone decides, and 0.8 * seconds / seconds is a little less than 0.8."""
    words = ("--max_minutes", minutes, "--short_rows_share", share, "--short_rows", 8)
    run, seen = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer), []
    measure = run.measure
    run.measure = lambda batch: seen.append(batch["input_ids"].shape[1]) or measure(batch)
    text = "".join(dry_run.lines(run, dry_run.rehearse(run)))
    assert seen == [length for length in lengths for _ in range(4)]
    assert ("with whole ones" in text) == (len(lengths) == 2)


def test_of_a_policy_some_experts_are_at_work_too(run, out, chat_flags, tmp_path, small_tokenizer):
    model, _ = load_model(save_chat(out / "multi_chat/full_sft_32_moe.pth", small_tokenizer, use_moe=True))
    config, sizes = model.config, {name: parameter.numel() for name, parameter in model.named_parameters()}
    expert = sum(size for name, size in sizes.items() if name.startswith("layers.0.feed_forward.experts.0."))
    idle = (config.n_routed_experts - config.num_experts_per_tok) * config.n_layers * expert
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{**PAIR, "chosen": "面条" * (row + 1)} for row in range(20)]))
    text = good(run("5-dpo_train.py", *chat_flags, "--use_moe", "--data_path", pairs, "--dry_run"))
    total = sum(sizes.values())
    assert f"parameters: {total:,}, {total - idle:,} of them at work on a token; all of them train" in text


def test_what_a_row_leaves_is_counted_without_checkpointing_which_stays_on(pretrain_csv, tmp_path, tokenizer):
    plain = make_trainer(pretrain_csv, tmp_path, tokenizer=tokenizer)
    run = make_trainer(pretrain_csv, tmp_path, "--gradient_checkpointing", tokenizer=tokenizer)
    run.model.eval()
    assert costs.counted_activations(run, 0) == costs.counted_activations(plain, 0)
    assert all(layer.gradient_checkpointing for layer in run.model.layers) and not run.model.training


def test_what_is_frozen_beside_the_model_has_no_copy_in_16_bits(pretrain_csv, tmp_path, tokenizer, monkeypatch):
    run = make_trainer(pretrain_csv, tmp_path, "--dtype", "bfloat16", tokenizer=tokenizer)
    monkeypatch.setattr(run, "parameters_beside", 1000, raising=False)
    assert dry_run.memory(run)["held"]["adamw"]["beside"] == 4000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_what_it_counts_is_the_memory_of_the_runs_own_step(pretrain_csv, tmp_path, tokenizer, dtype, dropout):
    """What a step takes besides weights and the optimizer's state, within a fifth."""
    words = ("--dim", 128, "--n_heads", 4, "--n_layers", 3, "--dropout", dropout, "--dtype", dtype, "--batch_size", 16)
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    needs, window = dry_run.memory(run), collections.Counter()
    held = needs["held"]["muon"]
    estimate = needs["table"]["muon", False][16] - held["weights"] - held["optimizer"]
    run.model.train()
    batches, _ = next(run.step_batches())
    run.train_step(batches, window)  # which makes the optimizer's state
    assert estimate == pytest.approx(most_held(lambda: run.train_step(batches, window)), rel=0.2)


def test_other_presets_scale_by_work_and_size(pretrain_csv, tmp_path):
    from model.build import build_model
    from model.data.dataset import open_pretrain_data
    from model.LMConfig import preset_config
    from model.model import Transformer
    from model.settings import ModelSettings, TrainingSettings
    from model.tokenizer import load_tokenizer
    from model.training.loop import Trainer
    from model.training.reports import flops_per_token

    words = load_tokenizer()
    model, _ = build_model(ModelSettings(preset="minimind-tiny", max_seq_len=32), words)
    settings = TrainingSettings(
        out_dir=str(tmp_path), batch_size=2, max_steps=10, device="cpu", dtype="float32", optimizer="adamw"
    )
    data = open_pretrain_data(pretrain_csv, words, 32)
    found = dry_run.rehearse(trainer := Trainer(model, words, *data, settings, stage="pretrain"))
    (other,) = found["presets"].values()
    larger = Transformer(preset_config("minimind-v1-small"))
    assert other["name"] == "minimind-v1-small"
    assert other["work"] == pytest.approx(flops_per_token(larger, 32) / flops_per_token(model, 32))
    assert other["seconds"] == pytest.approx(found["time"]["seconds"] * other["work"])
    size = sum(parameter.numel() for parameter in larger.parameters())
    assert 0.99 * 16 * size < other["bytes"] < 20 * size  # hardly any tokens
    assert any("--preset minimind-v1-small" in line for line in dry_run.lines(trainer, found))


# ---- what stays as it was


@pytest.mark.parametrize("more", [(), ("--optimizer", "muon", "--dropout", 0.1, "--use_moe"), ("--dtype", "float16")])
def test_a_run_after_it_is_the_run_without_it(pretrain_csv, tmp_path, tokenizer, more):
    ends = []
    for rehearsals in (0, 1):
        run = make_trainer(pretrain_csv, tmp_path / str(rehearsals), "--max_steps", 5, *more, tokenizer=tokenizer)
        for _ in range(rehearsals):
            before = weights(run), random_state(run.device)["torch"].clone(), run.train_loader.state_dict()
            dry_run.rehearse(run)
            assert all(torch.equal(one, two) for one, two in zip(before[0].values(), weights(run).values()))
            assert torch.equal(before[1], random_state(run.device)["torch"])
            assert before[2] == run.train_loader.state_dict() and not run.state.step
            assert not any(optimizer.state for optimizer in run.strategy.optimizers)
            assert not files(tmp_path / "1")
        run.train()
        ends.append(weights(run))
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


def test_resumed_it_tells_what_is_left_and_the_run_goes_on_as_without(pretrain_csv, tmp_path, tokenizer, capsys):
    ends = []
    for name in ("plain", "told"):
        words = ("--max_steps", 8)
        make_trainer(pretrain_csv, tmp_path / name, *words, "--stop_after", 3, tokenizer=tokenizer).train()
        run = make_trainer(pretrain_csv, tmp_path / name, *words, tokenizer=tokenizer)
        run.resume()
        if name == "told":
            found = dry_run.rehearse(run)
            assert (found["time"]["steps"], found["time"]["total"]) == (5, 8)
            assert "5 steps left" in "\n".join(dry_run.lines(run, found))
        run.train()
        ends.append(weights(run))
    assert all(torch.equal(one, two) for one, two in zip(ends[0].values(), ends[1].values()))
    run.settings.dry_run = True
    assert run.train() is False and "nothing left to do: step 8/8 is done" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["1-pretrain.py", "3-full_sft.py", "4-lora_sft.py", "5-dpo_train.py"])
def test_every_stage_tells_and_writes_nothing(script, run, words, tmp_path, small_tokenizer, pretrain_csv, sft_csv):
    data = pretrain_csv if script == "1-pretrain.py" else sft_csv
    out = tmp_path / "out"
    if script != "1-pretrain.py":
        save_chat(out / "single_chat/full_sft_32.pth", small_tokenizer)
        words += ["--init_from", out / "single_chat/full_sft_32.pth"]
    if script == "5-dpo_train.py":
        data = tmp_path / "pairs.json"
        data.write_text(json.dumps([{**PAIR, "chosen": "烤鸭、" * (row % 4) + "面条"} for row in range(20)]))
    if script == "4-lora_sft.py":
        (tmp_path / "peft").mkdir()
        words += ["--save_peft", tmp_path / "peft"]
    out.mkdir(exist_ok=True)
    for name in (
        "pretrain_32",
        "single_chat/full_sft_32",
        "lora_sft_32",
        "dpo_32",
    ):  # there already: no --overwrite needed
        (out / f"{name}.resume.pth").parent.mkdir(exist_ok=True)
        (out / f"{name}.resume.pth").write_text("kept")
    before = {name: (out / name).read_bytes() for name in files(out)}
    text = good(run(script, *words, "--data_path", data, "--cache_dir", tmp_path / "cache"))
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    for part in ("parameters: ", "memory, estimated: ", "--gradient_checkpointing", "> ", "tokens/s", "of training"):
        assert part in text
    assert ("a parameter (about 20" in text) == (script == "1-pretrain.py")
    assert (
        text.splitlines()[-1]
        == "dry run: nothing was written but the token cache; the same command without --dry_run starts"
    )
    trained = re.search(r"parameters: (\S+); (.*) train", text)
    assert (trained[2] != "all of them") == (script == "4-lora_sft.py")
    assert ("the frozen reference" in text) == (script == "5-dpo_train.py")


def test_two_ranks_tell_once(words, tmp_path, pretrain_csv):
    text = good(run_two_ranks("1-pretrain.py", *words, "--data_path", pretrain_csv, timeout=400))
    assert text.count("(over 3 steps)") == 1 and not (tmp_path / "out").exists()


def test_without_data_it_is_the_same_line_as_ever(run, words, tmp_path):
    process = run("1-pretrain.py", *words, "--data_path", tmp_path / "none.csv")
    assert_one_line_error(process, "none.csv: no such file", "data_process.py pretrain")


# ---- too little time


@pytest.mark.parametrize("save_interval", [1, 500])
def test_less_time_than_three_steps_is_one_line_and_nothing_is_written(
    pretrain_csv, tmp_path, tokenizer, monkeypatch, save_interval
):
    words = ("--max_minutes", 0.1, "--save_interval", save_interval)
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    slow(monkeypatch, seconds=2.5)
    expected = r"--max_minutes 0.1: is less than three steps take here, 7.5 s; give 0.138 or more"
    with pytest.raises(UserError, match=expected) as caught:
        run.train()
    assert caught.value.exit_code == 1 and run.state.step == 2
    assert not [name for name in files(tmp_path) if not name.endswith(".lock")]


def test_a_run_that_goes_on_may_have_less_left_than_three_steps(pretrain_csv, tmp_path, tokenizer, monkeypatch):
    slow(monkeypatch, seconds=1.9)
    words = ("--max_minutes", 0.06)  # 3.6 s
    assert make_trainer(pretrain_csv, tmp_path, *words, "--stop_after", 1, tokenizer=tokenizer).train() is False
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    run.resume()
    assert run.train() is True and run.state.step >= 2


def test_an_earlier_log_survives_a_run_that_had_too_little_time(pretrain_csv, tmp_path, tokenizer, monkeypatch):
    make_trainer(pretrain_csv, tmp_path, "--max_steps", 2, tokenizer=tokenizer).train()
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    run = make_trainer(pretrain_csv, tmp_path, "--max_minutes", 0.1, "--overwrite", tokenizer=tokenizer)
    slow(monkeypatch, seconds=2.5)
    with pytest.raises(UserError, match="--max_minutes 0.1"):
        run.train()
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def slow(monkeypatch, seconds):
    """Each step takes `seconds` by the loop's clock, which stands still otherwise."""
    from model.training import loop

    now, train_step = [0.0], loop.Trainer.train_step

    def step(self, batches, window):
        now[0] += seconds
        return train_step(self, batches, window)

    monkeypatch.setattr(loop.Trainer, "train_step", step)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
