"""5-dpo_train.py as a user runs it: what it prints and writes, stop and resume, wrong input."""

import json
import re
import signal

import pytest
import torch

from conftest import ROOT, TINY_FLAGS, assert_one_line_error, files, good, run_two_ranks, run_without, save_chat
from model.checkpoint import file_sha256, load_model, read_metadata
from model.tokenizer import tokenizer_hash

PAIR = {"prompt": "北京有什么好吃的？", "chosen": "烤鸭、面条", "rejected": "不知道。"}


@pytest.fixture
def data(tmp_path):
    """23 pairs, in a list."""
    path = tmp_path / "pairs.json"
    rows = [
        {**PAIR, "chosen": "烤鸭、" * (row % 4) + "面条", "rejected": "不知道。" * (row % 3 + 1)} for row in range(23)
    ]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture
def words(chat_flags, data):
    """A command without the number of steps."""
    return ["5-dpo_train.py", *chat_flags, "--data_path", str(data), "--learning_rate", "1e-4"]


def records(out):
    return [json.loads(line) for line in (out / "logs" / "dpo_32.jsonl").read_text().splitlines()]


# ---- the stage


def test_what_it_prints_and_writes(run, words, out, small_tokenizer):
    before = files(out)
    process = run(*words, "--max_steps", 3, "--beta", 0.2, "--sft_weight", 0.1, "--log_interval", 1)
    text, parent = good(process), out / "single_chat" / "full_sft_32.pth"
    assert process.stderr == ""
    assert f"weights, and the reference, from {parent}" in text
    assert (
        "pairs.json: 23 rows read, 23 kept" in text and "length alone: the chosen answer is the longer one in" in text
    )
    assert re.search(r"chosen: <s>user\n北京有什么好吃的？</s>\n<s>assistant\n⟦.*面条</s>⟧\n", text)
    assert re.search(r"rejected: <s>user\n北京有什么好吃的？</s>\n<s>assistant\n⟦不知道。.*</s>⟧\n", text)
    assert "loss before the first step: 0.6931, as it must be (0.6931)" in text
    assert re.search(r"step 3/3 .* margin -?\d\.\d{4}  accuracy [01]\.\d{4}  KL 0\.0\d+  lr", text)
    new = out / "dpo_32.pth"
    assert f"python 2-eval.py --checkpoint {parent} --checkpoint {new} --report {out / 'dpo.md'}" in text
    assert files(out) - before == {
        "dpo_32.pth",
        "dpo_32.json",
        "dpo_32.resume.pth",
        "logs/dpo_32.jsonl",
        "logs/.dpo_32.lock",
    }

    model, metadata = load_model(new)
    weights, old = torch.load(new, weights_only=True), torch.load(parent, weights_only=True)
    assert weights.keys() == old.keys() and not torch.equal(weights["norm.weight"], old["norm.weight"])
    assert weights["output.weight"].data_ptr() == weights["tok_embeddings.weight"].data_ptr()
    assert new.stat().st_size < 1.1 * parent.stat().st_size
    assert metadata["parent"] == {"file": str(parent), "sha256": file_sha256(parent)}
    assert metadata["stage"] == "dpo" and metadata["config"] == read_metadata(parent)["config"]
    assert metadata["tokenizer_hash"] == tokenizer_hash(small_tokenizer) and metadata["pairs_seen"] == 12
    described = metadata["dpo"]
    assert (described["beta"], described["loss_type"], described["sft_weight"]) == (0.2, "sigmoid", 0.1)
    assert 0 < described["longer_is_chosen"]["training"] < 1

    numbers = {"reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "kl"}
    numbers |= {"log_probability_chosen", "log_probability_rejected", "chosen_more_probable"}
    for record in records(out):
        prefix = "validation_" if "validation_loss" in record else ""
        assert {prefix + name for name in numbers} <= record.keys() and not any("bits" in name for name in record)
    assert [record["step"] for record in records(out)] == [0, 1, 2, 3, 3]
    assert {name: records(out)[-1][f"validation_{name}"] for name in numbers} == metadata["validation"]

    questions = out / "questions.txt"
    questions.write_text("你好\n")
    talk = ["2-eval.py", "--out_dir", out, *words[words.index("--tokenizer_path") : words.index("--out_dir")]]
    talk += ["--device", "cpu", "--max_new_tokens", 2, "--prompt", "你好"]
    process = run(*talk, *TINY_FLAGS[:2])
    assert str(new) in good(process) + process.stderr  # the latest stage


def test_the_best_chat_model_is_where_it_starts(run, words, out, small_tokenizer):
    better = save_chat(out / "multi_chat" / "full_sft_32.pth", small_tokenizer, seed=3)
    assert f"the reference, from {better}" in good(run(*words, "--max_steps", 1))


def test_a_stock_llama_may_be_what_it_starts_from(run, words, out, tmp_path, small_tokenizer_path):
    folder = tmp_path / "llama"
    chat = out / "single_chat" / "full_sft_32.pth"
    export = ["--format", "llama", "--output", folder, "--tokenizer_path", small_tokenizer_path]
    good(run("export_model.py", "--checkpoint", chat, *export))
    good(run(*words, "--max_steps", 1, "--init_from", folder))
    ours = torch.load(out / "dpo_32.pth")
    good(run(*words, "--max_steps", 1, "--overwrite"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in torch.load(out / "dpo_32.pth").items())


def test_ipo_starts_at_its_own_loss(run, words):
    assert "first step: 6.2500, as it must be (6.2500)" in good(
        run(*words, "--max_steps", 1, "--loss_type", "ipo", "--beta", 0.2)
    )


def test_experts_and_held_out_pairs_of_their_own(run, words, out, data, small_tokenizer):
    save_chat(out / "single_chat" / "full_sft_32_moe.pth", small_tokenizer, use_moe=True)
    process = run(*words, "--use_moe", "--max_steps", 2, "--validation_path", data)
    text = good(process)
    assert "(23 held-out pairs)" in text and "experts " in text and process.stderr == ""
    model, metadata = load_model(out / "dpo_32_moe.pth")
    assert model.config.use_moe and metadata["stage"] == "dpo"


def test_a_pair_alone_is_learned_without_any_held_out(run, words, data):
    data.write_text(json.dumps([PAIR], ensure_ascii=False), encoding="utf-8")
    text = good(run(*words, "--max_steps", 2))
    assert "step 2/2" in text and "held-out" not in text and "held out" not in text


def test_bad_rows_are_counted_and_named_and_the_run_goes_on(run, words, data):
    bad = [
        7,
        {**PAIR, "chosen": ""},
        {**PAIR, "rejected": PAIR["chosen"]},
        {"prompt": "x"},
        {**PAIR, "chosen": "\ud83d"},
    ]
    data.write_text(json.dumps([PAIR, *bad, PAIR, PAIR]))
    text = good(run(*words, "--max_steps", 1))
    assert "8 rows read, 3 kept" in text
    reasons = ["not a JSON object", 'empty "chosen" answer', "chosen and rejected answer are the same"]
    for place, reason in enumerate([*reasons, 'no "chosen" answer', "half a surrogate pair in the text"], 2):
        assert f"left out 1: {reason} ({data}: item {place})" in text


def test_compiled_training_agrees(run, words, out, traced_only, small_tokenizer):
    save_chat(out / "single_chat" / "full_sft_32.pth", small_tokenizer, n_layers=1)
    losses = []
    for more in ([], ["--compile", "--overwrite"]):
        torch._dynamo.reset()
        good(run(*words, "--n_layers", 1, "--max_steps", 4, "--log_interval", 1, *more))
        losses.append([(record["loss"], record["kl"]) for record in records(out) if "loss" in record])
    assert losses[1] == [pytest.approx(pair, rel=1e-3, abs=1e-5) for pair in losses[0]]
    assert load_model(out / "dpo_32.pth")[1]["step"] == 4


def test_help_needs_no_heavy_import():
    text = run_without({"torch", "transformers", "trl", "numpy"}, "5-dpo_train.py", "--help").stdout
    for flag in ("beta", "loss_type", "sft_weight", "validation_path", "init_from", "resume", "preset"):
        assert f"--{flag}" in text
    assert not re.search(r"--(dropout|multi|lora)", text)


# ---- stop and go on


def test_the_printed_command_goes_on_to_the_weights_of_a_straight_run(run, words, out, tmp_path, small_tokenizer):
    more = ["--max_steps", 6, "--optimizer", "muon", "--accumulation_steps", 2, "--eval_interval", 2]
    text = good(run(*words, *more, "--stop_after", 4))
    assert "talk to it" not in text
    command = re.search(r"stopped and saved at step 4/6; to go on: python (.*)", text)[1]
    assert command.endswith("--resume") and "talk to it" in good(run(*command.split()))
    good(run(*words, *more, "--out_dir", tmp_path / "straight", "--init_from", out / "single_chat/full_sft_32.pth"))
    assert (out / "dpo_32.pth").read_bytes() == (tmp_path / "straight" / "dpo_32.pth").read_bytes()


def test_ctrl_c_saves_and_says_how_to_go_on(run, words, out, monkeypatch):
    from model.training.dpo import PreferenceTrainer

    report = PreferenceTrainer.report

    def report_and_stop(trainer, window):
        report(trainer, window)
        if trainer.state.step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(PreferenceTrainer, "report", report_and_stop)
    process = run(*words, "--max_steps", 1000, "--log_interval", 1)
    text = good(process)
    assert process.stderr.startswith("SIGINT: finishing") and "Traceback" not in process.stderr
    step, command = re.search(r"saved at step (\d+)/1,000; to go on: python (.*)", text).groups()
    assert int(step) in (3, 4) and command.removeprefix(f"{ROOT}/") == " ".join(
        [*words, "--max_steps", "1000", "--log_interval", "1", "--resume"]
    )
    assert load_model(out / "dpo_32.pth")[1]["step"] == int(step)


def test_resume_refuses_another_loss_and_other_weights_to_start_from(run, words, out, small_tokenizer):
    words += ["--max_steps", "4"]
    good(run(*words, "--stop_after", 2))
    before = (out / "dpo_32.pth").read_bytes()
    assert_one_line_error(run(*words, "--resume", "--beta", 0.3), "--resume: --beta was 0.1 and is 0.3 now")
    assert_one_line_error(run(*words, "--resume", "--loss_type", "ipo"), "--loss_type was sigmoid and is ipo now")
    assert_one_line_error(run(*words, "--resume", "--sft_weight", 1), "--sft_weight was 0.0 and is 1.0 now")
    better = save_chat(out / "multi_chat" / "full_sft_32.pth", small_tokenizer, seed=3)
    first = out / "single_chat" / "full_sft_32.pth"
    for more in ([], ["--init_from", better], ["--init_from", out / "dpo_32.pth"]):
        assert_one_line_error(
            run(*words, "--resume", *more), "--resume: --init_from (its contents) was ", "give the old one"
        )
    assert (out / "dpo_32.pth").read_bytes() == before
    assert "step 4/4" in good(run(*words, "--resume", "--init_from", first))


def test_what_is_there_is_not_replaced(run, words, out):
    good(run(*words, "--max_steps", 1))
    before = (out / "dpo_32.pth").read_bytes()
    assert_one_line_error(run(*words, "--max_steps", 2), "dpo_32.pth exists already", "--resume", "--overwrite")
    assert (out / "dpo_32.pth").read_bytes() == before
    good(run(*words, "--max_steps", 2, "--overwrite"))
    assert (out / "dpo_32.pth").read_bytes() != before


def test_two_ranks_run_the_script(run, words, out):
    words += ["--max_steps", "3", "--log_interval", "1"]
    good(run(*words))
    single, log = torch.load(out / "dpo_32.pth"), records(out)
    words[words.index("--batch_size") + 1] = "2"
    process = run_two_ranks(*words, "--overwrite")
    text = good(process)
    assert text.count("model: ") == text.count("loss before the first step") == 1
    assert process.stderr == ""  # of trl's and transformers' warnings too
    for name, tensor in torch.load(out / "dpo_32.pth").items():
        assert torch.allclose(tensor, single[name], atol=2e-5), name
    for ours, theirs in zip(records(out), log, strict=True):
        names = [name for name in theirs if "loss" in name or "reward" in name or "kl" in name]
        assert {name: ours[name] for name in names} == pytest.approx(
            {name: theirs[name] for name in names}, rel=1e-3, abs=1e-5
        )


# ---- wrong input


@pytest.mark.parametrize(
    "content, parts",
    [
        (None, ["no such file", "data_process.py dpo", "--data_path"]),
        ("[]", ["is empty"]),
        ("", ["is empty"]),
        ('[\n{"prompt": "x",\n]', [":3: the JSON list cannot be read", "Expecting property name"]),
        ('{\n"prompt": "x"\n}', ["no row left to learn from", "not JSON"]),
        (json.dumps({"rows": [PAIR]}), ["no row left to learn from", "1 rows read, 0 kept", 'no "chosen" answer']),
        ('[{"prompt": "x", "chosen": "y"}]', ["no row left to learn from", 'no "rejected" answer']),
        ('[{"prompt": "x", "rejected": "y"}]', ["no row left to learn from", 'no "chosen" answer']),
        (
            json.dumps([{**PAIR, "chosen": PAIR["rejected"]}] * 2),
            ["left out 2: chosen and rejected answer are the same"],
        ),
        (json.dumps([{**PAIR, "chosen": " "}]), ['empty "chosen" answer', "item 1"]),
        ("[1, 2, 3]", ["left out 3: not a JSON object"]),
    ],
)
def test_wrong_data_is_one_line_and_writes_nothing(run, words, out, data, content, parts):
    data.unlink() if content is None else data.write_text(content)
    before = files(out)
    assert_one_line_error(run(*words, "--max_steps", 1), data, *parts)
    assert files(out) == before and not [name for name in files(data.parent) if "-dpo-" in name]


def test_wrong_held_out_data_is_one_line(run, words, out, tmp_path):
    before = files(out)
    process = run(*words, "--max_steps", 1, "--validation_path", tmp_path / "none.json")
    assert_one_line_error(process, "none.json: no such file", "--validation_path")
    (tmp_path / "bad.json").write_text("[3]")
    assert_one_line_error(
        run(*words, "--max_steps", 1, "--validation_path", tmp_path / "bad.json"), "bad.json: no row left"
    )
    assert files(out) == before


def test_wrong_flags_are_one_line_and_write_nothing(run, words, out, tmp_path):
    before = files(out)
    for flag, value in (
        ("--beta", 0),
        ("--beta", "nan"),
        ("--sft_weight", -1),
        ("--loss_type", "hinge"),
        ("--dropout", 0.1),
    ):
        process = run(*words, flag, value)
        assert process.returncode == 2 and flag in process.stderr.splitlines()[-1] and "Traceback" not in process.stderr
    assert_one_line_error(run(*words, "--max_seq_len", 8), "no row left", "within --max_seq_len 8")
    assert_one_line_error(run(*words, "--resume"), "--resume", "dpo_32.resume.pth")
    assert_one_line_error(run(*words, "--init_from", tmp_path / "none.pth"), "none.pth", "no such checkpoint")
    assert files(out) == before


def test_no_chat_model_is_one_line(run, words, out):
    (out / "single_chat" / "full_sft_32.pth").unlink()
    process = run(*words, "--max_steps", 1)
    assert_one_line_error(process, "multi_chat/full_sft_32.pth", "run 3-full_sft.py first", "--init_from")
    assert "dpo" not in "".join(files(out))


def test_models_that_it_cannot_train_are_one_line(run, words, out, tmp_path, small_tokenizer, sft_csv):
    path = save_chat(tmp_path / "one.pth", small_tokenizer, use_moe=True, num_experts_per_tok=1)
    process = run(*words, "--max_steps", 1, "--init_from", path)
    assert_one_line_error(process, "--init_from", "2 or more experts", "DPO needs a stock class")
    adapter = ["4-lora_sft.py", *words[1:], "--data_path", sft_csv, "--max_steps", "1"]
    good(run(*adapter))
    process = run(*words, "--max_steps", 1, "--init_from", out / "lora_sft_32.pth")
    assert_one_line_error(process, "lora_sft_32.pth")
    assert "dpo_32.pth" not in files(out)


# ---- its picture


def test_curves_of_its_log_show_accuracy_and_margin(run, words, out, tmp_path):
    good(run(*words, "--max_steps", 3, "--log_interval", 1))
    picture = tmp_path / "curves.png"
    good(run("images/draw.py", "curves", "--logs", out / "logs" / "dpo_32.jsonl", "--output", picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
