"""A run that is far off says so once and names the cause; each cause is provoked for real, and a normal run says nothing."""

import json
import math

import pytest
import torch
from test_loop import make_trainer

from conftest import CPU_FLAGS, PLACES, THINGS, TINY_FLAGS, good, write_csv
from model.checkpoint import load_model, save_checkpoint
from model.data.dataset import open_pretrain_data, open_sft_data, repeated_share
from model.training import watch
from model.training.reports import read_log


@pytest.fixture
def tokenizer(small_tokenizer):
    return small_tokenizer


@pytest.fixture
def flags(small_tokenizer_path):
    return [*TINY_FLAGS, *CPU_FLAGS, "--tokenizer_path", small_tokenizer_path]


def warnings(folder, name="pretrain_32"):
    """What the log says is wrong, in order."""
    lines = (folder / "logs" / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [record["warning"] for record in map(json.loads, lines) if "warning" in record]


def of(run):
    return [record["warning"] for record in read_log(run.log.current) if "warning" in record]


def test_a_normal_run_says_nothing(run, flags, tmp_path, pretrain_csv, sft_csv):
    words = ["--learning_rate", 3e-3, "--epochs", 12, "--log_interval", 2, "--eval_interval", 20, "--out_dir", tmp_path]
    good(run("1-pretrain.py", *flags, *words, "--data_path", pretrain_csv))
    good(run("3-full_sft.py", *flags, *words, "--data_path", sft_csv))
    assert not warnings(tmp_path) and not warnings(tmp_path, "single_chat_full_sft_32")


@pytest.mark.parametrize(
    "rate, said", [(3.0, "--learning_rate 3 is too high"), (1e-7, "--learning_rate 1e-07 is far too low")]
)
def test_a_wrong_rate(run, flags, tmp_path, pretrain_csv, rate, said):
    words = [
        "--learning_rate",
        rate,
        "--max_steps",
        130,
        "--warmup_iters",
        5,
        "--log_interval",
        4,
        "--out_dir",
        tmp_path,
    ]
    text = good(run("1-pretrain.py", *flags, *words, "--data_path", pretrain_csv, "--grad_clip", 0))
    (warning,) = warnings(tmp_path)
    assert said in warning and text.count(f": {warning}\n") == 1


def test_weights_of_another_tokenizer(run, flags, tmp_path, pretrain_csv, sft_csv):
    """The same words under other numbers; the checkpoint lost its .json, which would have told."""
    first = tmp_path / "first"
    words = ["--learning_rate", 1e-2, "--log_interval", 5, "--max_steps", 120]
    good(run("1-pretrain.py", *flags, *words, "--data_path", pretrain_csv, "--out_dir", first))
    own = first / "pretrain_32.pth"
    model, _ = load_model(own)
    turned = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.tok_embeddings.weight.copy_(model.tok_embeddings.weight[turned])
    other = tmp_path / "other.pth"
    save_checkpoint(other, model, {})
    other.with_suffix(".json").unlink()
    for parent, wrong in ((own, False), (other, True)):
        folder = tmp_path / parent.stem
        more = ["--init_from", parent, "--data_path", sft_csv, "--out_dir", folder, "--max_steps", 3]
        good(run("3-full_sft.py", *flags, *more))
        found = warnings(folder, "single_chat_full_sft_32")
        assert len(found) == wrong
    assert f"{other} was trained with another tokenizer" in found[0] and "--tokenizer_path" in found[0]


def test_rows_that_are_copies(run, flags, tmp_path, tokenizer):
    texts = [f"{place}的{thing}很好吃。" for place in PLACES[:5] for thing in THINGS[:2]]
    chance = torch.Generator().manual_seed(0)
    for name, copies in (("once", 1), ("often", 40)):
        rows = [{"text": text} for text in texts for _ in range(copies)]
        rows = [rows[place] for place in torch.randperm(len(rows), generator=chance)]
        path = write_csv(tmp_path / f"{name}.csv", rows)
        words = ["--learning_rate", 1e-2, "--max_steps", 300, "--log_interval", 10, "--out_dir", tmp_path / name]
        good(run("1-pretrain.py", *flags, *words, "--data_path", path, "--max_seq_len", 8))
        found = [warning for warning in warnings(tmp_path / name) if "copies" in warning]
        assert len(found) == (copies > 1)
    data, _ = open_pretrain_data(path, tokenizer, 8)
    assert repeated_share(data) == (390 / 400, 400)
    assert "98% of 400 rows are copies of others" in found[0]


def test_copies_are_counted_by_rows_of_every_kind(tmp_path, tokenizer):
    rows = [dict(history="[]", q=question, a="好") for question in ("一", "二", "一", "三", "一")]
    one, other = write_csv(tmp_path / "a.csv", rows), tmp_path / "b"
    assert repeated_share(open_sft_data(one, tokenizer, 64)[0]) == (2 / 5, 5)
    other.mkdir()
    for name in ("x", "y"):
        write_csv(other / f"{name}.csv", rows)
    assert repeated_share(open_sft_data(other, tokenizer, 64)[0]) == (7 / 10, 10)
    assert repeated_share(open_sft_data(other, tokenizer, 64)[0], most=4) == (1 / 4, 4)


def test_training_far_below_held_out_rows_is_learning_by_heart(tmp_path, tokenizer):
    chance = torch.Generator().manual_seed(0)
    texts = [
        "".join(tokenizer.decode([int(token)]) for token in torch.randint(300, 390, (24,), generator=chance))
        for _ in range(20)
    ]
    path = write_csv(tmp_path / "noise.csv", [{"text": text} for text in texts])
    words = ["--learning_rate", 1e-2, "--epochs", 60, "--eval_interval", 40, "--log_interval", 10]
    run = make_trainer(path, tmp_path, *words, tokenizer=tokenizer)
    run.train()
    (warning,) = of(run)
    assert "by heart" in warning and "--epochs" in warning


def test_rows_without_targets(run, flags, out, chat_flags, tmp_path):
    empty = [dict(history="[]", q=f"问题{n}", a="") for n in range(30)]
    full = [dict(history="[]", q=f"问题{n}", a="好吃") for n in range(10)]
    path = write_csv(tmp_path / "empty.csv", empty + full)
    good(run("3-full_sft.py", *chat_flags, "--init_from", out / "single_chat/full_sft_32.pth", "--overwrite", "--data_path", path,
             "--max_steps", 2))  # fmt: skip
    found = [warning for warning in warnings(out, "single_chat_full_sft_32") if "guessing" not in warning]
    assert len(found) == 1 and found[0].startswith("30 of 40 rows teach nothing and are left out")


def test_answers_that_are_all_but_empty(tmp_path, tokenizer):
    rows = [dict(history="[]", q="面条火锅米粉烤鸭点心" * 12, a="好") for _ in range(20)]
    run = make_trainer(
        write_csv(tmp_path / "a.csv", rows),
        tmp_path,
        "--max_steps",
        3,
        "--max_seq_len",
        160,
        tokenizer=tokenizer,
        sft=True,
    )
    run.train()
    (warning,) = of(run)
    share = run.state.supervised_tokens_seen / run.state.tokens_seen
    assert share < watch.LEAST_TARGETS and warning.startswith(f"only {share:.2%} of the tokens are learned")


# ---- the rules by themselves


def see(run, losses, norms=None, **more):
    """Give a Watch reports with these losses, ten steps apart; what it says."""
    run.log.start(0, 10)
    for number, loss in enumerate(losses):
        run.state.step = 10 * (number + 1)
        norm = norms[number] if norms else 1.0
        run.watch.see(dict(step=run.state.step, loss=loss, bits_per_byte=loss / 2, gradient_norm=norm, **more))
    return of(run)


@pytest.fixture
def watched(sft_csv, tmp_path, tokenizer):
    run = make_trainer(sft_csv, tmp_path, "--max_steps", 9, tokenizer=tokenizer, sft=True)
    run.parent = dict(file="parent.pth")
    run.state.supervised_tokens_seen = run.state.tokens_seen = 10
    return run


def test_a_loss_that_jumps_is_normal_one_that_stays_up_is_not(watched):
    assert not see(watched, [5, 4, 3, 2, 4, 4, 2, 2, 2, 4, 4, 4])
    (warning,) = see(watched, [4, 4, 4, 4])
    assert "has risen from 2.00 to 4.00" in warning


def test_the_first_reports_of_an_easy_batch_are_no_best(watched):
    """The demo's LoRA: its first step meets what the base knows by heart."""
    assert not see(watched, [0.0075, 0.948, 0.888, 0.6, 0.386, 0.25, 0.161, 0.12, 0.092])


def test_a_gradient_that_explodes(watched):
    norms = [1.0] * 8 + [60.0, 1.0, 60.0, 60.0]
    assert not see(watched, [3.0] * 12, norms)
    (warning,) = see(watched, [3.0], [60.0])
    assert "gradient's norm has grown from 1.00 to 60.00" in warning


def test_pairs_have_no_words_to_guess(watched):
    watched.run_name, watched.state.step = "pairs", 1
    watched.watch.see(dict(step=1, loss=math.inf, gradient_norm=1.0))
    assert not watched.watch.said


def test_another_process_than_the_main_one_looks_at_nothing(watched, monkeypatch):
    monkeypatch.setattr(watch.ranks, "is_main", lambda: False)
    assert not see(watched, [2.0] * 5 + [9.0] * 9)
