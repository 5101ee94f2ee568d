"""--batch_size auto: the search against a GPU made of a number, and what it must leave as it was."""

import random

import pytest
import torch
from test_loop import arguments, make_trainer, weights

from conftest import CPU_FLAGS, TINY_FLAGS, assert_one_line_error, good
from model.cli import training_settings
from model.errors import UserError
from model.settings import TrainingSettings
from model.training import batch_size, ranks
from model.training.batch_size import largest_divisor, largest_that_fits

CUDA = torch.device("cuda")


@pytest.fixture
def tokenizer(small_tokenizer):
    return small_tokenizer


def gpu_of(limit, tried=None):
    """try_rows of a GPU that has room for `limit` rows."""

    def try_rows(rows):
        if tried is not None:
            tried.append(rows)
        if rows > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1000 * rows

    return try_rows


def test_the_search_finds_what_fits_with_a_notch_left_for_any_limit():
    chance = random.Random(0)
    cases = [(limit, most) for limit in range(40) for most in (1, 2, 7, 8, 64)]
    cases += [(chance.randrange(10**4), chance.randrange(1, 10**4)) for _ in range(500)]
    for limit, most in cases:
        tried = []
        found = largest_that_fits(gpu_of(limit, tried), most)
        assert max(tried) <= most and len(tried) <= 2 + most.bit_length() + 3
        if limit >= most:
            assert found == most
        elif limit == 0:
            assert found == 0 and tried == [1]
        else:
            notch = max(1, 2 ** (limit.bit_length() - 1) // 8)
            assert 1 <= found <= limit and found >= 0.7 * limit - 2
            assert found == 1 or found + notch <= limit, "nothing is left for fragments"


def test_another_error_is_not_taken_for_a_full_gpu():
    def broken(rows):
        raise RuntimeError("another one")

    with pytest.raises(RuntimeError, match="another one"):
        largest_that_fits(broken, 8)


def test_the_largest_divisor():
    for number in range(1, 70):
        for most in range(1, 80):
            expected = max(part for part in range(1, most + 1) if number % part == 0)
            assert largest_divisor(number, most) == expected


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Settings are resolved as on a GPU, of which `limit` rows are what fits; each trial really runs."""
    resolved, trial = TrainingSettings.resolved, batch_size.Trial.__call__

    def use(limit):
        def call(self, rows):
            peak = trial(self, rows)
            return gpu_of(limit)(rows) and peak

        monkeypatch.setattr(TrainingSettings, "resolved", lambda self, device, *more: resolved(self, CUDA, *more))
        monkeypatch.setattr(batch_size.Trial, "__call__", call)

    return use


@pytest.mark.parametrize(
    "more", [(), ("--optimizer", "muon", "--dtype", "bfloat16"), ("--use_moe", "--dropout", "0.1")]
)
@pytest.mark.parametrize("sft", [False, True])
def test_a_run_of_auto_is_the_run_of_the_number_it_found(
    sft, more, sft_csv, pretrain_csv, tmp_path, tokenizer, as_on_a_gpu, capsys
):
    words, data = ("--max_steps", 2, *more), sft_csv if sft else pretrain_csv
    as_on_a_gpu(limit=20)
    run = make_trainer(data, tmp_path / "auto", *words, "--batch_size", "auto", tokenizer=tokenizer, sft=sft)
    assert (run.settings.batch_size, run.settings.accumulation_steps) == (16, 4)  # 64 rows as ever
    assert "16 rows a forward pass, --accumulation_steps 4; at most" in capsys.readouterr().out
    run.train()
    numbers = ("--batch_size", 16, "--accumulation_steps", 4)
    other = make_trainer(data, tmp_path / "given", *words, *numbers, tokenizer=tokenizer, sft=sft)
    other.train()
    for (name, one), two in zip(weights(run).items(), weights(other).values()):
        assert torch.equal(one, two), name
    assert run.state.validation_loss == other.state.validation_loss
    states = [torch.load(trainer.path.with_suffix(".resume.pth")) for trainer in (run, other)]
    for one, two in zip(*(state["optimizers"][0]["state"].values() for state in states)):
        assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(two[name])) for name in one)
    assert torch.equal(*(state["random"][0]["torch"] for state in states))


def test_accumulation_that_is_given_stays_and_the_batch_is_what_fits(pretrain_csv, tmp_path, tokenizer, as_on_a_gpu):
    as_on_a_gpu(limit=20)
    words = ("--batch_size", "auto", "--accumulation_steps", 3)
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    found = largest_that_fits(gpu_of(20), len(run.train_loader.dataset))
    assert (run.settings.batch_size, run.settings.accumulation_steps) == (found, 3)


def test_all_ranks_take_the_smallest(pretrain_csv, tmp_path, tokenizer, as_on_a_gpu, monkeypatch):
    as_on_a_gpu(limit=64)
    gather = ranks.gather
    monkeypatch.setattr(batch_size.ranks, "gather", lambda value: [*gather(value), 9] if value == 64 else gather(value))
    run = make_trainer(pretrain_csv, tmp_path, "--batch_size", "auto", tokenizer=tokenizer)
    assert (run.settings.batch_size, run.settings.accumulation_steps) == (8, 8)


def test_no_room_for_one_row_is_one_line(pretrain_csv, tmp_path, tokenizer, as_on_a_gpu):
    as_on_a_gpu(limit=0)
    with pytest.raises(UserError, match="--batch_size auto: .* too little memory for one row; try --gradient_check"):
        make_trainer(pretrain_csv, tmp_path, "--batch_size", "auto", tokenizer=tokenizer)


def test_trials_take_the_longest_rows(sft_csv, tmp_path, tokenizer):
    run = make_trainer(sft_csv, tmp_path, "--max_seq_len", 128, tokenizer=tokenizer, sft=True)
    data, seen = run.train_loader.dataset, []
    run.loss_function = lambda model, batch, items: seen.append(batch) or (model(**batch).loss, 0.0)
    batch_size.Trial(run, data)(3)
    assert len(seen) == 3, "two to learn from, one to validate"
    lengths = [
        batch["attention_mask"].sum(dim=1).tolist() if "attention_mask" in batch else [batch["input_ids"].shape[1]] * 3
        for batch in seen
    ]
    assert lengths == [sorted(data.lengths.tolist())[::-1][:3]] * 3


def test_resume_goes_on_with_the_size_that_the_run_began_with(pretrain_csv, tmp_path, tokenizer, as_on_a_gpu, capsys):
    words = ("--max_steps", 4, "--batch_size", "auto")
    as_on_a_gpu(limit=20)
    make_trainer(pretrain_csv, tmp_path, *words, "--stop_after", 2, tokenizer=tokenizer).train()
    as_on_a_gpu(limit=5)  # another card
    run = make_trainer(pretrain_csv, tmp_path, *words, tokenizer=tokenizer)
    assert (run.settings.batch_size, run.settings.accumulation_steps) == (16, 4)
    run.resume()
    assert run.train() is True and "warning" not in capsys.readouterr().err
    over = make_trainer(pretrain_csv, tmp_path, *words, "--overwrite", tokenizer=tokenizer)
    assert over.settings.batch_size == 4


def test_on_a_cpu_it_is_the_default_and_says_so(run, tmp_path, small_tokenizer_path, pretrain_csv):
    words = ["1-pretrain.py", *TINY_FLAGS, *CPU_FLAGS[:-2], "--tokenizer_path", small_tokenizer_path, "--max_steps", 1]
    words += ["--out_dir", tmp_path, "--data_path", pretrain_csv, "--batch_size", "auto"]
    text = good(run(*words))
    assert text.count("--batch_size auto: nothing tells what fits on a CPU; it takes the default, 8 rows") == 1
    assert "a step is 1 x 8 = 8 rows" in text
    assert_one_line_error(run(*words, "--deepspeed"), "--batch_size auto", "--deepspeed", "give a number", code=2)
    assert_one_line_error(run(*words, "--fsdp"), "--batch_size auto", "give a number", code=2)


def test_what_is_no_batch_size_is_told_as_ever(capsys):
    assert training_settings(arguments("--batch_size", "auto")).batch_size == "auto"
    assert training_settings(arguments("--batch_size", "12")).batch_size == 12
    for wrong, told in (("0", "must be at least 1, got 0"), ("many", "invalid auto or int value: 'many'")):
        with pytest.raises(SystemExit) as caught:
            arguments("--batch_size", wrong)
        assert caught.value.code == 2 and f"argument --batch_size: {told}" in capsys.readouterr().err
    with pytest.raises(UserError, match="--batch_size: must be auto or a number of at least 1, got 'many'"):
        TrainingSettings(batch_size="many")


def test_sizes_that_stay_open_on_a_gpu():
    def sizes(kind, number, **given):
        settings = TrainingSettings(batch_size="auto", **given).resolved(torch.device(kind), number)
        return settings.batch_size, settings.accumulation_steps

    assert sizes("cuda", 1) == ("auto", None) and sizes("cuda", 3, accumulation_steps=2) == ("auto", 2)
    assert sizes("cpu", 2) == (4, 1) and sizes("mps", 1, accumulation_steps=2) == (8, 2)
    with pytest.raises(UserError, match="64 rows .* shared evenly by 3 processes"):
        sizes("cuda", 3)
