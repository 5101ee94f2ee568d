"""Samples while it learns: what they show is what the weights say, and training never notices them."""

import json
import re

import pytest
import torch
from test_dry_run import slow
from test_loop import make_trainer, records, weights

from conftest import CPU_FLAGS, TINY_FLAGS, assert_one_line_error, good, run_two_ranks, save_chat, write_csv
from model.data.conversations import message
from model.errors import UserError
from model.inference.engine import Engine
from model.tokenizer import render_conversation
from model.training.samples import Samples, cell, table

WORDS = ["--max_steps", 7, "--log_interval", 1, "--save_interval", 3, "--eval_interval", 4, "--learning_rate", 3e-3]
WORDS += ["--dropout", 0.2, "--max_seq_len", 64]
LESS_WORDS = ["--max_steps", 4, "--log_interval", 1]


@pytest.fixture
def tokenizer(small_tokenizer):
    return small_tokenizer


@pytest.fixture
def prompts(tmp_path):
    (path := tmp_path / "prompts.txt").write_text("北京的\n\n上海有什么好吃的？\n", "utf-8")
    return path


def taken(run):
    """{step: answers} in a run's log."""
    return {record["step"]: record["samples"] for record in records(run) if "samples" in record}


def table_of(run):
    return (run.path.parent / "logs" / f"{run.path.stem}_samples.md").read_text("utf-8")


def losses(run):
    names = ("step", "loss", "gradient_norm", "learning_rate", "tokens_seen", "validation_loss")
    return [[record.get(name) for name in names] for record in records(run) if "samples" not in record]


@torch.no_grad()
def most_probable(model, ids, limit=48):
    """Token by token, the whole text anew for each: no engine, no cache."""
    model.eval()
    answer = []
    while len(answer) < limit and len(ids) + len(answer) < model.config.max_seq_len:
        token = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token == model.config.eos_token_id:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("variant", [[], ["--use_moe"], ["--optimizer", "muon", "--accumulation_steps", 2]])
def test_training_is_the_same_bit_for_bit_with_and_without(sft_csv, tmp_path, tokenizer, prompts, variant):
    runs = []
    for more in ([], ["--sample_interval", 2, "--sample_prompts", prompts]):
        runs.append(
            make_trainer(sft_csv, tmp_path / str(len(more)), *WORDS, *variant, *more, tokenizer=tokenizer, sft=True)
        )
        assert runs[-1].train() and runs[-1].model.training
    plain, sampled = runs
    assert list(taken(sampled)) == [0, 2, 4, 6, 7] and not taken(plain)
    assert losses(plain) == losses(sampled)
    assert all(torch.equal(tensor, weights(sampled)[name]) for name, tensor in weights(plain).items())
    assert [type(module) for module in plain.model.modules()] == [type(module) for module in sampled.model.modules()]


def test_the_answers_are_the_most_probable_tokens_of_the_moment(sft_csv, tmp_path, tokenizer, prompts):
    run = make_trainer(
        sft_csv, tmp_path, *WORDS, "--sample_interval", 100, "--sample_prompts", prompts, tokenizer=tokenizer, sft=True
    )
    started = weights(run)
    run.train()
    finished = weights(run)
    for step, tensors in ((0, started), (7, finished)):
        run.model.load_state_dict(tensors)
        for sample, text in zip(taken(run)[step], ("北京的", "上海有什么好吃的？"), strict=True):
            ids = render_conversation(tokenizer, [message("user", text)], add_generation_prompt=True)[0]
            assert sample == dict(prompt=text, answer=tokenizer.decode(most_probable(run.model, ids)))


def test_pretraining_goes_on_from_openings(run, tmp_path, small_tokenizer_path, pretrain_csv, prompts):
    words = [*TINY_FLAGS, *CPU_FLAGS, "--tokenizer_path", small_tokenizer_path, "--out_dir", tmp_path]
    text = good(run("1-pretrain.py", *words, "--data_path", pretrain_csv, *LESS_WORDS, "--sample_interval", 2))
    log = [json.loads(line) for line in (tmp_path / "logs/pretrain_32.jsonl").read_text("utf-8").splitlines()]
    found = {record["step"]: record["samples"] for record in log if "samples" in record}
    assert list(found) == [0, 2, 4]
    for prompt, answer in ((sample["prompt"], sample["answer"]) for sample in found[4]):
        assert f"  {prompt} → {' '.join(answer.split())}\n" in text
        shown = good(run("0-eval_pretrain.py", "--checkpoint", tmp_path / "pretrain_32.pth", *words[-4:-2], "--temperature", 0,
                         "--max_new_tokens", 48, "--prompt", prompt, "--device", "cpu", "--dtype", "float32"))  # fmt: skip
        assert re.sub(r" …\(cut at .*", "", shown.split("\n\n", 1)[1]).rstrip("\n") == prompt + answer


def test_an_adapter_and_a_policy_answer_as_their_checkpoints_do(run, out, chat_flags, tmp_path, sft_csv, prompts):
    pairs = [dict(prompt=f"第{n}题？", chosen="很好吃。", rejected="面条面条") for n in range(12)]
    (path := tmp_path / "pairs.json").write_text(json.dumps(pairs), "utf-8")
    sampling = ["--sample_interval", 3, "--sample_prompts", prompts, "--learning_rate", 3e-2]
    stages = (
        ("4-lora_sft.py", sft_csv, "lora_sft_32", ["--checkpoint", out / "single_chat/full_sft_32.pth", "--lora"]),
        ("5-dpo_train.py", path, "dpo_32", ["--checkpoint"]),
    )
    for script, data, name, checkpoint in stages:
        good(run(script, *chat_flags, "--data_path", data, *LESS_WORDS, *sampling))
        log = [json.loads(line) for line in (out / f"logs/{name}.jsonl").read_text("utf-8").splitlines()]
        found = {record["step"]: record["samples"] for record in log if "samples" in record}
        last = max(found)
        assert min(found) == 0 and last >= 2
        assert [sample["answer"] for sample in found[0]] != [sample["answer"] for sample in found[last]]
        for sample in found[last]:
            shown = good(run("2-eval.py", *checkpoint, out / f"{name}.pth", *chat_flags[-10:-8], "--temperature", 0, "--prompt",
                             sample["prompt"], "--max_new_tokens", 48, "--device", "cpu", "--dtype", "float32",
                             "--tokenizer_path", chat_flags[chat_flags.index("--tokenizer_path") + 1]))  # fmt: skip
            assert f"A: {sample['answer']}" in shown


def test_the_table_shows_how_answers_grow_and_a_resumed_run_goes_on_with_it(sft_csv, tmp_path, tokenizer, prompts):
    def make(name, *words):
        words = [*WORDS, "--sample_interval", 2, "--sample_prompts", prompts, *words]
        return make_trainer(sft_csv, tmp_path / name, *words, tokenizer=tokenizer, sft=True)

    (straight := make("straight")).train()
    first = make("parts", "--stop_after", 3)
    assert not first.train() and list(taken(first)) == [0, 2]
    log = first.log.path
    with open(log, "a", encoding="utf-8") as handle:  # of steps that a kill undid
        handle.write(json.dumps(dict(step=6, samples=[dict(prompt="北京的", answer="undone")])) + "\n")
    second = make("parts")
    second.resume()
    second.train()
    assert taken(second) == taken(straight) and table_of(second) == table_of(straight)
    sections = table_of(straight).split("\n## ")
    assert [section.split("\n")[0] for section in sections[1:]] == ["北京的", "上海有什么好吃的？"]
    reported = {record["step"]: record["loss"] for record in records(straight) if "loss" in record}
    rows = [line.split(" | ") for line in sections[1].splitlines() if line.startswith("| ") and "step" not in line]
    assert [row[0] for row in rows] == ["| 0", "| 2", "| 4", "| 6", "| 7"]
    assert [row[1] for row in rows] == ["–", *(f"{reported[step]:.4f}" for step in (2, 4, 6, 7))]
    assert rows[-1][2] == f"{cell(taken(straight)[7][0]['answer'])} |"
    again = make("parts")
    again.resume()
    again.train()
    assert table_of(again) == table_of(straight)  # nothing is taken twice


def test_an_earlier_run_keeps_its_table_until_the_first_checkpoint(sft_csv, tmp_path, tokenizer, prompts):
    words = [*WORDS, "--sample_interval", 1, "--sample_prompts", prompts]
    first = make_trainer(sft_csv, tmp_path, *words, tokenizer=tokenizer, sft=True)
    first.train()
    before, seen = table_of(first), []
    second = make_trainer(sft_csv, tmp_path, *words, "--overwrite", "--seed", 2, tokenizer=tokenizer, sft=True)
    save = second.save
    second.save = lambda: (seen.append(table_of(second)), save(), seen.append(table_of(second)))
    second.train()
    assert seen[0] == before and seen[1] != before and "| 2 |" in seen[1] and "| 3 |" not in seen[1]
    assert not list(first.log.path.parent.glob("*.new"))
    # A run that was killed before its first checkpoint has left this; neither a run without samples nor one that goes on
    # takes it for its own.
    before = table_of(second)
    for words in (WORDS, [*WORDS, "--sample_interval", 1, "--sample_prompts", prompts]):
        second.samples.new_table.write_text("another run's")
        third = make_trainer(sft_csv, tmp_path, *words, "--max_steps", 20, "--seed", 2, tokenizer=tokenizer, sft=True)
        third.resume()
        third.train()
        assert table_of(third).startswith(before.rstrip()[:200]) and "another run's" not in table_of(third)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_that_had_too_little_time_leaves_no_table(sft_csv, tmp_path, tokenizer, prompts, monkeypatch, earlier):
    words = [*WORDS, "--sample_interval", 1, "--sample_prompts", prompts]
    if earlier:
        make_trainer(sft_csv, tmp_path, *words, tokenizer=tokenizer, sft=True).train()
    before = {path.name: path.read_bytes() for path in (tmp_path / "logs").glob("*.md*")}
    run = make_trainer(sft_csv, tmp_path, *words, "--max_minutes", 0.1, "--overwrite", tokenizer=tokenizer, sft=True)
    slow(monkeypatch, seconds=2.5)
    with pytest.raises(UserError, match="--max_minutes 0.1"):
        run.train()
    assert {path.name: path.read_bytes() for path in (tmp_path / "logs").glob("*.md*")} == before
    assert len(before) == earlier


def test_cells_of_the_table():
    assert cell("a|b\n<s>c") == "a\\|b &lt;s&gt;c"
    sample = [dict(step=0, samples=[dict(prompt="x|y", answer="# 1\n| 2")])]
    assert table("run", sample).splitlines()[2:] == [
        "## x\\|y",
        "",
        "| step | loss | answer |",
        "|---:|---:|---|",
        "| 0 | – | \\# 1 \\| 2 |",
    ]


def test_a_signal_while_it_answers_loses_no_step(sft_csv, tmp_path, tokenizer, prompts, monkeypatch):
    words = [*WORDS, "--sample_interval", 2, "--sample_prompts", prompts]
    run = make_trainer(sft_csv, tmp_path, *words, tokenizer=tokenizer, sft=True)
    step, calls = Engine.step, []

    def interrupted(engine):
        calls.append(run.state.step)
        if run.state.step == 4 and calls.count(4) == 2:
            run.stop.note(15, None)
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    assert not run.train()
    assert run.state.saved_step == 4 and calls.count(4) == 2 and list(taken(run)) == [0, 2]
    monkeypatch.undo()
    second = make_trainer(sft_csv, tmp_path, *words, tokenizer=tokenizer, sft=True)
    second.resume()
    second.train()
    straight = make_trainer(sft_csv, tmp_path / "straight", *words, tokenizer=tokenizer, sft=True)
    straight.train()
    assert taken(second) == taken(straight)
    assert all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(straight).items())


def test_seconds_of_answering_are_not_training(sft_csv, tmp_path, tokenizer, prompts, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    answer, step = Samples.answer, Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: (clock.__setitem__(0, clock[0] + 100), step(engine))[1])
    words = [*WORDS, "--sample_interval", 1, "--sample_prompts", prompts]
    run = make_trainer(sft_csv, tmp_path, *words, tokenizer=tokenizer, sft=True)
    run.train_step, train_step = (
        lambda *arguments: (clock.__setitem__(0, clock[0] + 1), train_step(*arguments))[1],
        run.train_step,
    )
    assert run.train() and answer is Samples.answer
    assert run.state.train_seconds == 7 and clock[0] > 1000


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("no"), UserError("no room")])
def test_training_goes_on_where_there_is_no_memory_for_answers(
    sft_csv, tmp_path, tokenizer, prompts, monkeypatch, capsys, error
):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(Engine, "step", fail)
    words = [*WORDS, "--sample_interval", 5, "--sample_prompts", prompts]
    run = make_trainer(sft_csv, tmp_path, *words, tokenizer=tokenizer, sft=True)
    assert run.train() and not taken(run)
    assert capsys.readouterr().err.count("no samples (") == 3


def test_compiled_training_answers_too(run, tmp_path, small_tokenizer_path, pretrain_csv, traced_only):
    words = [
        *TINY_FLAGS,
        *CPU_FLAGS,
        "--tokenizer_path",
        small_tokenizer_path,
        "--data_path",
        pretrain_csv,
        *LESS_WORDS,
    ]
    found = []
    for more in ([], ["--compile"]):
        folder = tmp_path / str(len(more))
        good(run("1-pretrain.py", *words, "--out_dir", folder, "--sample_interval", 2, *more))
        log = [json.loads(line) for line in (folder / "logs/pretrain_32.jsonl").read_text("utf-8").splitlines()]
        found.append([record["step"] for record in log if "samples" in record])
    assert found == [[0, 2, 4]] * 2


@pytest.mark.parametrize("more", [[], ["--fsdp"]])
def test_two_processes_answer_once(tmp_path, out, chat_flags, sft_csv, prompts, more):
    words = ["--data_path", sft_csv, *LESS_WORDS, "--sample_interval", 2, "--sample_prompts", prompts]
    process = run_two_ranks("4-lora_sft.py", *chat_flags, "--learning_rate", 3e-2, *words, *more)
    assert good(process).count("step 4/4  samples") == 1
    log = [json.loads(line) for line in (out / "logs/lora_sft_32.jsonl").read_text("utf-8").splitlines()]
    found = {record["step"]: record["samples"] for record in log if "samples" in record}
    assert list(found) == [0, 2, 4] and found[0] != found[4]


def test_a_base_that_has_changed_gives_no_samples(run, out, chat_flags, sft_csv, prompts, small_tokenizer, monkeypatch):
    words = ["--data_path", sft_csv, *LESS_WORDS, "--sample_interval", 2, "--sample_prompts", prompts]
    start = Samples.start

    def replaced(self):
        save_chat(out / "single_chat/full_sft_32.pth", small_tokenizer, seed=3)
        start(self)

    monkeypatch.setattr(Samples, "start", replaced)
    process = run("4-lora_sft.py", *chat_flags, *words)
    assert "full_sft_32.pth has changed since it was read); training goes on" in process.stderr and good(process)


def test_wrong_flags_are_one_line(run, out, chat_flags, tmp_path, sft_csv):
    words = [
        "3-full_sft.py",
        *chat_flags,
        "--data_path",
        write_csv(tmp_path / "a.csv", [dict(history="[]", q="你好", a="好")] * 9),
    ]
    words += ["--init_from", out / "single_chat/full_sft_32.pth", "--overwrite"]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "long.txt").write_text("短\n" + "你好" * 99, "utf-8")
    for more, parts, code in (
        (["--sample_prompts", tmp_path / "empty.txt"], ["--sample_prompts", "--sample_interval"], 2),
        (["--sample_interval", -1], ["--sample_interval", "at least 0"], 2),
        (["--sample_interval", 2, "--sample_prompts", tmp_path / "none.txt"], ["none.txt", "no such file"], 1),
        (["--sample_interval", 2, "--sample_prompts", tmp_path / "empty.txt"], ["empty.txt", "no question"], 1),
        (
            ["--sample_interval", 2, "--sample_prompts", tmp_path / "long.txt"],
            ["long.txt:2", "a row only", "--max_seq_len"],
            1,
        ),
    ):
        assert_one_line_error(run(*words, *more), *parts, code=code)
    assert not (out / "logs").exists()
