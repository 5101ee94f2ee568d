"""Stopping, saving and going on: exactly, whatever comes in between; what --resume and a fresh start refuse."""

import os
import random
import shutil
import signal
import sys
import time

import numpy
import pytest
import torch
from test_loop import make_trainer, records, weights

from model.checkpoint import read_metadata, resume_path
from model.errors import UserError
from model.files import locked
from model.training import ranks, resume
from model.training.loop import language_model_loss
from model.training.optimizer import Schedule
from model.training.resume import StopRequest


class Killed(Exception):
    pass


VARIANTS = {
    "plain": [],
    "accumulation": ["--accumulation_steps", 3],
    "muon and dropout": ["--optimizer", "muon", "--dropout", 0.2],
    "moe": ["--use_moe", "--dtype", "bfloat16"],
    "float16": ["--dtype", "float16"],
    "short rows": ["--short_rows_share", 0.8, "--short_rows", 8],
    "sft": ["--accumulation_steps", 2, "--dropout", 0.1],
}


@pytest.mark.parametrize("variant, killed_after", [("plain", 3), *((name, 6) for name in VARIANTS)])
def test_straight_run_equals_killed_and_resumed_run(request, tmp_path, tokenizer, variant, killed_after):
    data = request.getfixturevalue("sft_csv" if variant == "sft" else "pretrain_csv")
    words = [
        *VARIANTS[variant],
        "--batch_size",
        8,
        "--max_steps",
        9,
        "--save_interval",
        3,
        "--eval_interval",
        4,
        "--log_interval",
        1,
    ]
    common = dict(tokenizer=tokenizer, sft=variant == "sft")
    straight = make_trainer(data, tmp_path / "straight", *words, **common)
    straight.train()
    assert straight.state.step > straight.steps_per_epoch, "must cross an epoch"

    def dies(model, batch, num_items):
        if run.state.step == killed_after + 1:
            raise Killed
        return language_model_loss(model, batch, num_items)

    run = make_trainer(data, tmp_path / "killed", *words, **common, loss_function=dies)
    with pytest.raises(Killed):
        run.train()
    torch.manual_seed(0)
    run = make_trainer(data, tmp_path / "killed", *words, **common)
    run.resume()
    assert run.state.step == killed_after
    run.train()
    assert run.state.step == 9
    assert all(torch.equal(tensor, weights(straight)[name]) for name, tensor in run.model.state_dict().items())
    assert run.path.read_bytes() == straight.path.read_bytes()
    assert run.strategy.scaler.state_dict() == straight.strategy.scaler.state_dict()
    # The log shows every step once, with the same losses.
    shown = [
        [(line["step"], line.get("loss"), line.get("validation_loss")) for line in records(r)] for r in (straight, run)
    ]
    assert sorted(shown[0], key=str) == sorted(shown[1], key=str)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_the_run_can_go_on(pretrain_csv, tmp_path, tokenizer, capsys, number):
    def interrupted(model, batch, num_items):
        if model.training and run.state.step == 4:
            signal.raise_signal(number)
        return language_model_loss(model, batch, num_items)

    straight = make_trainer(pretrain_csv, tmp_path / "straight", "--max_steps", 8, tokenizer=tokenizer)
    straight.train()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = make_trainer(
        pretrain_csv, tmp_path / "stopped", "--max_steps", 8, tokenizer=tokenizer, loss_function=interrupted
    )
    assert run.train() is False and run.state.step == 5
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert "to go on: Trainer.resume(), then Trainer.train()" in capsys.readouterr().out  # not run by a script
    run = make_trainer(pretrain_csv, tmp_path / "stopped", "--max_steps", 8, tokenizer=tokenizer)
    run.resume()
    assert run.state.step == 5 and run.train() is True
    assert run.path.read_bytes() == straight.path.read_bytes()


def test_a_stopped_trainer_goes_on_where_it_is(pretrain_csv, tmp_path, tokenizer):
    def interrupted(model, batch, num_items):
        if model.training and run.state.step == 2 and not run.stop.requested and not saved:
            signal.raise_signal(signal.SIGINT)
        return language_model_loss(model, batch, num_items)

    saved = []
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 6, tokenizer=tokenizer, loss_function=interrupted)
    assert run.train() is False and run.state.step == 3
    saved.append(3)
    run.resume()
    assert run.train() is True and run.state.step == 6


def test_a_second_signal_acts_as_usual(capsys):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested and "SIGINT: finishing" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_a_launcher_passes_on_is_no_second_signal(monkeypatch):
    now = 100.0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)  # from the terminal
        signal.raise_signal(signal.SIGINT)  # from the launcher, which has got it too
        assert stop.requested
        now += 4
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("sft", [False, True])
def test_stop_after_leaves_the_schedule_as_it_is(request, tmp_path, tokenizer, capsys, monkeypatch, sft):
    data = request.getfixturevalue("sft_csv" if sft else "pretrain_csv")
    words = ("--optimizer", "muon", "--dropout", 0.1, "--max_steps", 40, "--eval_interval", 4, "--save_interval", 100)
    straight = make_trainer(data, tmp_path / "straight", *words, tokenizer=tokenizer, sft=sft)
    assert straight.schedule.warmup_steps == 2 and straight.train() is True
    capsys.readouterr()
    for stop in (1, 8, 8, 13):  # within the warm-up, where validation is due, again, within an epoch
        monkeypatch.setattr(sys, "argv", ["1-pretrain.py", "--stop_after", str(stop), "--seed", "1337"])
        run = make_trainer(data, tmp_path / "parts", *words, "--stop_after", stop, tokenizer=tokenizer, sft=sft)
        if stop > 1:
            run.resume()
        assert run.train() is False and run.state.step == stop
        shown = capsys.readouterr()
        assert f"saved at step {stop}/40; to go on: python 1-pretrain.py --seed 1337 --resume\n" in shown.out
        assert not shown.err.count("warning")
    run = make_trainer(data, tmp_path / "parts", *words, "--stop_after", 40, tokenizer=tokenizer, sft=sft)
    run.resume()
    assert run.train() is True
    assert run.path.read_bytes() == straight.path.read_bytes()
    for name in ("validation_loss", "tokens_seen", "supervised_tokens_seen"):
        assert getattr(run.state, name) == getattr(straight.state, name)
    validated = [[line for line in records(each) if "validation_loss" in line] for each in (run, straight)]
    assert validated[0] == validated[1]


@pytest.mark.parametrize(
    "changed, flag",
    [
        (["--batch_size", 2], "--batch_size x --accumulation_steps x processes.* was 4 and is 2"),
        (["--accumulation_steps", 2], "--accumulation_steps"),
        (["--n_heads", 2], "n_heads was 4 and is 2"),
        (["--n_heads", 8, "--n_kv_heads", 4], "n_(kv_)?heads was"),
        (["--seed", 1], "--seed"),
        (["--optimizer", "adamw"], "--optimizer was muon and is adamw"),
        (["--max_seq_len", 16], "--max_seq_len"),
        (["--n_layers", 3], "n_layers was 2 and is 3"),
    ],
)
def test_resume_refuses_flags_that_change_the_meaning(pretrain_csv, tmp_path, tokenizer, changed, flag):
    make_trainer(pretrain_csv, tmp_path, "--max_steps", 2, tokenizer=tokenizer).train()
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 2, *changed, tokenizer=tokenizer)
    with pytest.raises(UserError, match=flag):
        run.resume()


def test_resume_refuses_other_data(pretrain_csv, tmp_path, tokenizer):
    make_trainer(pretrain_csv, tmp_path, "--max_steps", 1, tokenizer=tokenizer).train()
    other = tmp_path / "other.csv"
    other.write_text(pretrain_csv.read_text().replace("北京", "天津"))
    with pytest.raises(UserError, match=r"--data_path \(its contents\) was"):
        make_trainer(other, tmp_path, "--max_steps", 1, tokenizer=tokenizer).resume()


def test_tokenizer_seed_and_identity_are_fixed_and_the_number_of_processes_is_free(
    pretrain_csv, tmp_path, tokenizer, monkeypatch, capsys
):
    run = make_trainer(pretrain_csv, tmp_path, tokenizer=tokenizer)
    saved = resume.trajectory(run, "data", {"--template": "a"})
    monkeypatch.setattr(run, "tokenizer_hash", "other")
    with pytest.raises(UserError, match=r"--tokenizer_path \(its contents\) was .* is other now"):
        resume.check_trajectory(saved, resume.trajectory(run, "data", {"--template": "a"}))
    monkeypatch.undo()
    with pytest.raises(UserError, match="--template was a and is b now"):
        resume.check_trajectory(saved, resume.trajectory(run, "data", {"--template": "b"}))
    monkeypatch.setattr(run.settings, "seed", 1)  # alone: after another split the loader refuses
    with pytest.raises(UserError, match="--seed was 1337 and is 1 now"):
        resume.check_trajectory(saved, resume.trajectory(run, "data", {"--template": "a"}))
    half = make_trainer(pretrain_csv, tmp_path, "--batch_size", 2, tokenizer=tokenizer)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    resume.check_trajectory(saved, resume.trajectory(half, "data", {"--template": "a"}))
    assert "the number of processes was 1 and is 2 now; the same rows in the same order" in capsys.readouterr().err


def test_the_parent_stays_the_one_the_run_began_from(pretrain_csv, tmp_path, tokenizer):
    def again(parent):
        run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 2, tokenizer=tokenizer)
        run.parent = parent
        return run

    began = dict(file="pretrain_32.pth", sha256="0" * 64)
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 2, "--stop_after", 1, tokenizer=tokenizer)
    run.parent = began
    run.train()
    with pytest.raises(UserError, match="the run began from pretrain_32.pth, and b.pth holds others"):
        again(dict(file="b.pth", sha256="1" * 64)).resume()
    for parent in (
        dict(began, file="moved.pth"),
        dict(file="own.pth", sha256=read_metadata(run.path)["weights_sha256"]),
    ):
        again(parent).resume()
    run = again(None)
    run.resume()
    run.train()
    assert read_metadata(run.path)["parent"] == began and read_metadata(run.path)["step"] == 2


def test_resume_warns_of_flags_that_bend_the_course_and_obeys_them(pretrain_csv, tmp_path, tokenizer, capsys):
    make_trainer(pretrain_csv, tmp_path, "--max_steps", 2, tokenizer=tokenizer).train()
    words = ("--max_steps", 4, "--learning_rate", 5e-4, "--weight_decay", 0.3)
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    run.resume()
    warnings = capsys.readouterr().err
    assert all(
        flag in warnings for flag in ("--learning_rate was 0.001 and is 0.0005", "--weight_decay", "--max_steps")
    )
    assert "was 2 and is 4 now; the schedule of the earlier steps ended there" in warnings
    run.train()
    assert run.state.step == 4
    (group,) = run.strategy.optimizers[0].param_groups  # Muon's, at ten times the rate and so a tenth of the decay
    assert group["weight_decay"] == pytest.approx(0.03)
    assert group["lr"] == pytest.approx(5e-3 * Schedule(4, 0).factor(3))


def test_resume_of_a_finished_run_changes_nothing(pretrain_csv, tmp_path, tokenizer, capsys):
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 2, tokenizer=tokenizer)
    run.train()
    content = run.path.read_bytes()
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 2, tokenizer=tokenizer)
    run.resume()
    assert run.train() is True and run.path.read_bytes() == content
    assert "nothing left to do" in capsys.readouterr().out


def test_resume_without_a_state_is_one_line(pretrain_csv, tmp_path, tokenizer):
    with pytest.raises(UserError, match="--resume: there is no .*test_32.resume.pth"):
        make_trainer(pretrain_csv, tmp_path, tokenizer=tokenizer).resume()


@pytest.fixture
def tokenizer(small_tokenizer):
    return small_tokenizer


def contents(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.*") if "logs" not in file.parts
    }


def test_a_finished_checkpoint_is_never_replaced_unasked(pretrain_csv, tmp_path, tokenizer):
    make_trainer(pretrain_csv, tmp_path, "--max_steps", 2, tokenizer=tokenizer).train()
    before, log = contents(tmp_path), (tmp_path / "logs" / "test_32.jsonl").read_bytes()
    words = ("--max_steps", 3, "--seed", 5)
    with pytest.raises(UserError, match="test_32.pth exists already: --resume .* --overwrite"):
        make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer).train()
    assert contents(tmp_path) == before and (tmp_path / "logs" / "test_32.jsonl").read_bytes() == log
    (tmp_path / "test_32.pth").unlink()
    with pytest.raises(UserError, match="resume.pth exists already"):
        make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer).train()


def test_overwrite_keeps_the_old_files_until_the_first_save(pretrain_csv, tmp_path, tokenizer, capsys):
    make_trainer(pretrain_csv, tmp_path, "--max_steps", 2, tokenizer=tokenizer).train()
    before = contents(tmp_path)

    def looks(model, batch, num_items):
        assert contents(tmp_path) == before
        if model.training and run.state.step == stop_at and not run.stop.requested:
            signal.raise_signal(signal.SIGINT)
        return language_model_loss(model, batch, num_items)

    words = ("--overwrite", "--max_steps", 3, "--seed", 5, "--accumulation_steps", 2)
    stop_at = 0
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer, loss_function=looks)
    assert run.train() is False and contents(tmp_path) == before  # nothing was learned, so nothing is replaced
    assert "stopped before the first step was done" in capsys.readouterr().out
    stop_at = None
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer, loss_function=looks)
    assert run.train() is True and contents(tmp_path).keys() == before.keys() and contents(tmp_path) != before


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_a_stop_between_micro_batches_forgets_the_step_begun(request, tmp_path, tokenizer, stage):
    data, sft = request.getfixturevalue(f"{stage}_csv"), stage == "sft"
    words = ("--max_steps", 5, "--accumulation_steps", 3, "--dropout", 0.2, "--batch_size", 3, "--log_interval", 1)
    straight = make_trainer(data, tmp_path / "straight", *words, tokenizer=tokenizer, sft=sft)
    straight.train()
    calls = []

    def interrupted(model, batch, num_items):
        if model.training and run.state.step == 2:
            calls.append(1)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGTERM)
        return language_model_loss(model, batch, num_items)

    folder = tmp_path / "stopped"
    run = make_trainer(data, folder, *words, tokenizer=tokenizer, sft=sft, loss_function=interrupted)
    assert run.train() is False
    assert len(calls) == 2 and run.state.step == 2 == read_metadata(run.path)["step"]
    assert all(parameter.grad is None for parameter in run.model.parameters())
    run = make_trainer(data, folder, *words, tokenizer=tokenizer, sft=sft)
    run.resume()
    assert run.train() is True and run.path.read_bytes() == straight.path.read_bytes()
    steps = [line["step"] for line in records(run) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5]


def test_a_validation_cut_short_is_not_reported(pretrain_csv, tmp_path, tokenizer):
    def interrupted(model, batch, num_items):
        if not model.training and run.state.step == 2:
            signal.raise_signal(signal.SIGINT)
        return language_model_loss(model, batch, num_items)

    words = ("--max_steps", 4, "--eval_interval", 2, "--batch_size", 1)
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer, loss_function=interrupted)
    assert len(run.validation_loader) > 1
    assert run.train() is False
    validated = [line["step"] for line in records(run) if "validation_loss" in line]
    assert validated == [0] and run.state.validation_loss == records(run)[0]["validation_loss"]


def test_a_run_that_is_stopping_validates_no_more(pretrain_csv, tmp_path, tokenizer):
    def interrupted(model, batch, num_items):
        assert model.training or run.state.step == 0
        if run.state.step == 1:
            signal.raise_signal(signal.SIGINT)
        return language_model_loss(model, batch, num_items)

    words = ("--max_steps", 4, "--eval_interval", 2)
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer, loss_function=interrupted)
    assert run.train() is False and run.state.step == 2


def test_the_same_step_may_be_split_otherwise_after_resume(sft_csv, tmp_path, tokenizer, capsys):
    """As on another number of processes: equal rows in every step, equal weights but for rounding."""
    words = ("--max_steps", 12, "--log_interval", 1, "--weight_decay", 0)
    whole = make_trainer(sft_csv, tmp_path / "whole", *words, "--batch_size", 8, tokenizer=tokenizer, sft=True)
    whole.train()
    split = (*words, "--batch_size", 2, "--accumulation_steps", 4)
    run = make_trainer(sft_csv, tmp_path / "run", *split, "--stop_after", 3, tokenizer=tokenizer, sft=True)
    group_size = run.train_loader.sampler.group_size
    run.train()
    run = make_trainer(sft_csv, tmp_path / "run", *words, "--batch_size", 8, tokenizer=tokenizer, sft=True)
    run.resume()
    assert "--batch_size was 2 and is 8 now; the same rows in the same order" in capsys.readouterr().err
    assert run.train_loader.sampler.group_size == group_size == 2
    run.train()
    # The order follows the groups of the run as it began, so the reference is the whole run split as that one was.
    reference = make_trainer(sft_csv, tmp_path / "reference", *split, tokenizer=tokenizer, sft=True)
    reference.train()
    losses = [[line["loss"] for line in records(r) if "loss" in line] for r in (run, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert run.state.tokens_seen == reference.state.tokens_seen


def test_other_ranks_go_on_with_generators_of_their_own(monkeypatch, pretrain_csv, tmp_path, tokenizer):
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 1, tokenizer=tokenizer)
    run.train()
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 1, tokenizer=tokenizer)
    run.resume()
    alike = torch.rand(3)
    saved = torch.load(resume_path(run.path), weights_only=True)
    torch.save({**saved, "random": saved["random"] * 2}, resume_path(run.path))  # as of two ranks
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 1, tokenizer=tokenizer)
    run.resume()
    assert not torch.equal(torch.rand(3), alike)


@pytest.mark.parametrize("torn", [["test_32.pth", "test_32.json"], ["test_32.json"], ["missing"], ["damaged"]])
def test_files_torn_by_a_stop_between_two_renames_are_mended(pretrain_csv, tmp_path, tokenizer, capsys, torn):
    words = ("--max_steps", 6, "--save_interval", 3)
    kept = {}

    def copies(model, batch, num_items):
        if model.training and run.state.step == 3 and not kept:
            kept.update(contents(tmp_path))
        return language_model_loss(model, batch, num_items)

    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer, loss_function=copies)
    run.train()
    complete = contents(tmp_path)
    if torn == ["missing"]:
        (tmp_path / "test_32.json").unlink()
    elif torn == ["damaged"]:
        (tmp_path / "test_32.json").write_text("{")
    else:
        for name in torn:
            (tmp_path / name).write_bytes(kept[name])
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    run.resume()
    assert run.train() is True
    shown = capsys.readouterr()
    assert "mending them" in shown.err and "nothing left to do: step 6/6 is done" in shown.out
    assert (tmp_path / "test_32.pth").read_bytes() == complete["test_32.pth"]
    assert read_metadata(run.path)["step"] == 6 and "mending" not in shown.out


def test_two_runs_do_not_write_one_checkpoint(pretrain_csv, tmp_path, tokenizer):
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 2, tokenizer=tokenizer)
    with locked(tmp_path / "logs" / ".test_32.lock"):
        with pytest.raises(UserError, match="test_32.pth: another run is writing it; choose another --out_dir"):
            run.train()
    assert run.train() is True


def test_infinite_weights_of_the_last_step_are_not_saved(pretrain_csv, tmp_path, tokenizer, monkeypatch):
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 2, "--save_interval", 1, tokenizer=tokenizer)
    step = run.strategy.step

    def last_step_bursts(factor, skip=False):
        step(factor, skip)
        if run.state.step == 1:
            run.model.norm.weight.data[3] = float("nan")

    monkeypatch.setattr(run.strategy, "step", last_step_bursts)
    with pytest.raises(UserError, match="step 2: weights are not finite, not saved .*of step 1 is intact"):
        run.train()
    assert read_metadata(run.path)["step"] == 1


def test_a_full_gpu_is_one_line_with_a_smaller_batch_of_the_same_step(pretrain_csv, tmp_path, tokenizer):
    def full(model, batch, num_items):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    for size, accumulation, way_out in ((6, 5, "--batch_size 3 --accumulation_steps 10"), (1, 5, "--max_seq_len")):
        words = ("--batch_size", size, "--accumulation_steps", accumulation)
        run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer, loss_function=full)
        with pytest.raises(UserError, match=f"too little memory for --batch_size {size} .*{way_out}"):
            run.train()


def test_signals_wait_while_files_are_written(capsys):
    with StopRequest() as stop:
        with stop.held():
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
        assert stop.requested and capsys.readouterr().err.count("SIGINT: saving") == 1
        with pytest.raises(KeyboardInterrupt):  # and no longer
            signal.raise_signal(signal.SIGINT)


def test_a_signal_to_a_process_that_prepares_batches_is_left_to_the_main_one(monkeypatch):
    with StopRequest() as stop:
        main = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: main + 1)
        signal.raise_signal(signal.SIGINT)
        assert not stop.requested


def draws():
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def test_every_generator_goes_on_where_it_was_each_rank_with_its_own(monkeypatch):
    cpu, states, expected = torch.device("cpu"), [], []
    for seed in (1, 2):
        resume.seed_generators(seed)
        states.append(resume.random_state(cpu))
        expected.append(draws())
    assert all(one != other for one, other in zip(*expected))
    resume.restore_random_state(states[0], cpu)
    assert draws() == expected[0]
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        resume.restore_random_states(states, cpu, 0)
        assert draws() == expected[rank]


def test_a_signal_that_the_shell_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def foreign_moments(state):
    moments = state["optimizers"][-1]["state"][0]
    moments["exp_avg"] = torch.zeros(3)


def missing_moment(state):
    del state["optimizers"][-1]["state"][1]["exp_avg_sq"]


def foreign_parameter(state):
    state["optimizers"][0]["state"][10**6] = state["optimizers"][0]["state"][0]


def position_beyond(state):
    state["loader"]["position"] = 10**15


def negative_position(state):
    state["loader"]["position"] = -5


def huge_group(state):
    state["loader"]["group_size"] = 10**30


def text_for_a_number(state):
    state["progress"]["step"] = "many"


def no_random_state(state):
    state["random"] = [{"torch": torch.zeros(3)}]


CRAFTED = [foreign_moments, missing_moment, foreign_parameter, position_beyond, negative_position, huge_group]


@pytest.mark.parametrize("change", [*CRAFTED, text_for_a_number, no_random_state])
def test_a_training_state_that_does_not_fit_is_one_line(pretrain_csv, tmp_path, tokenizer, change):
    make_trainer(pretrain_csv, tmp_path, "--max_steps", 1, tokenizer=tokenizer).train()
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 2, tokenizer=tokenizer)
    state = torch.load(resume_path(run.path), weights_only=True)
    change(state)
    torch.save(state, resume_path(run.path))
    with pytest.raises(UserError, match="test_32.resume.pth: no training state that fits this run"):
        run.resume()


def test_a_validation_cut_short_at_the_last_step_is_made_up_for(pretrain_csv, tmp_path, tokenizer):
    def interrupted(model, batch, num_items):
        if not model.training and run.state.step == 3:
            signal.raise_signal(signal.SIGINT)
        return language_model_loss(model, batch, num_items)

    words = ("--max_steps", 3, "--batch_size", 1)
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer, loss_function=interrupted)
    assert run.train() is True
    assert read_metadata(run.path)["finished"] and read_metadata(run.path)["validation_loss"] is None
    straight = make_trainer(pretrain_csv, tmp_path / "straight", *words, tokenizer=tokenizer)
    straight.train()
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    run.resume()
    assert run.train() is True
    assert read_metadata(run.path)["validation_loss"] == straight.state.validation_loss


@pytest.mark.parametrize("before, after, minutes", [(3, 6, 5), (2, 3, 6)])
def test_a_finished_run_goes_on_when_it_is_made_longer(pretrain_csv, tmp_path, tokenizer, before, after, minutes):
    make_trainer(pretrain_csv, tmp_path, "--max_steps", before, "--max_minutes", 5, tokenizer=tokenizer).train()
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", after, "--max_minutes", minutes, tokenizer=tokenizer)
    run.resume()
    assert run.train() is True and run.state.step == after


def test_a_slow_first_step_does_not_end_a_run_by_time(pretrain_csv, tmp_path, tokenizer):
    def slow_at_first(model, batch, num_items):
        if model.training and run.state.step == 0:
            time.sleep(0.7)
        return language_model_loss(model, batch, num_items)

    words = ("--max_minutes", 0.02)  # 1.2 s
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer, loss_function=slow_at_first)
    assert run.train() is True and run.state.step > 5 and run.state.train_seconds > 1.1


def test_overwrite_keeps_the_log_as_long_as_its_checkpoint(pretrain_csv, tmp_path, tokenizer):
    words = ("--max_steps", 4, "--save_interval", 2, "--log_interval", 1)
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    run.train()
    before, seen = records(run), []

    def looks(model, batch, num_items):
        if model.training:
            seen.append(records(run) == before)
        return language_model_loss(model, batch, num_items)

    run = make_trainer(
        pretrain_csv, tmp_path, *words, "--seed", 4, "--overwrite", tokenizer=tokenizer, loss_function=looks
    )
    run.train()
    assert seen == [True, True, False, False]
    assert [line["step"] for line in records(run) if "loss" in line] == [1, 2, 3, 4] and records(run) != before
    assert [path.name for path in (tmp_path / "logs").glob("*.jsonl*")] == ["test_32.jsonl"]


def test_a_log_that_cannot_be_written_ends_nothing(pretrain_csv, tmp_path, tokenizer, capsys):
    def removes_the_folder(model, batch, num_items):
        if model.training and run.state.step == 1:
            shutil.rmtree(tmp_path / "logs")
            (tmp_path / "logs").write_text("in the way")
        return language_model_loss(model, batch, num_items)

    words = ("--max_steps", 3, "--log_interval", 1)
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer, loss_function=removes_the_folder)
    assert run.train() is True and "this line is not in it" in capsys.readouterr().err


def test_what_fails_on_the_main_rank_ends_all(monkeypatch):
    def fails():
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        ranks.on_main(fails)
    monkeypatch.setattr(ranks, "is_main", lambda: False)
    monkeypatch.setattr(ranks, "sum_over_ranks", lambda values: [1.0])
    with pytest.raises(UserError) as caught:
        ranks.on_main(fails)
    assert str(caught.value) == ""
