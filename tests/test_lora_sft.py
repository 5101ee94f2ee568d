"""4-lora_sft.py as a user runs it, and --lora in the scripts that run a model: what is printed, written and computed, stop
and resume, wrong input."""

import csv
import hashlib
import json
import re
import shlex

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from conftest import assert_one_line_error, files, good, run_two_ranks, save_chat
from model.checkpoint import load_model
from model.model import Transformer

RANK, ALPHA = 4, 12.0
DENSE = ["attention.wq", "attention.wk", "attention.wv", "attention.wo", *(f"feed_forward.w{n}" for n in (1, 2, 3))]
MATRICES = [f"layers.{layer}.{name}" for layer in range(2) for name in DENSE]
TASKS = ("你好", "北京有什么好吃的？", "上海的")


@pytest.fixture
def base(out):
    """What the adapters stand on."""
    return out / "single_chat" / "full_sft_32.pth"


@pytest.fixture
def words(chat_flags, sft_csv):
    """A command whose adapter says something else than its base."""
    rates = ["--lora_rank", str(RANK), "--lora_alpha", str(ALPHA), "--learning_rate", "1e-2"]
    return ["4-lora_sft.py", *chat_flags, "--data_path", str(sft_csv), *rates, "--max_steps", "12"]


@pytest.fixture
def adapter(run, words, out, base):
    good(run(*words))
    return out / "lora_sft_32.pth"


@pytest.fixture
def experts(run, words, out, small_tokenizer):
    """(base, adapter) of a mixture of experts."""
    path = save_chat(out / "single_chat" / "full_sft_32_moe.pth", small_tokenizer, use_moe=True)
    good(run(*words, "--use_moe"))
    return path, out / "lora_sft_32_moe.pth"


@pytest.fixture
def machine(out, small_tokenizer_path):
    """Flags of a script that runs a model."""
    return ["--tokenizer_path", small_tokenizer_path, "--out_dir", out, "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def talk(run, machine):
    """Greedy answers: (the model that the first line names, the rest)."""

    def talk(*words, script="2-eval.py"):
        prompts = [word for text in TASKS for word in ("--prompt", text)]
        process = run(script, *machine, "--temperature", 0, "--max_new_tokens", 10, *prompts, *words)
        first, rest = good(process).split("\n", 1)
        return first.rsplit(": ", 1)[0], rest

    return talk


@pytest.fixture
def export(run, small_tokenizer_path):
    def export(*words):
        return run("export_model.py", "--tokenizer_path", small_tokenizer_path, *words)

    return export


def described(path):
    return json.loads(path.with_suffix(".json").read_text("utf-8"))


def records(out, name="lora_sft_32"):
    return [json.loads(line) for line in (out / "logs" / f"{name}.jsonl").read_text().splitlines()]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same_tensors(path, other):
    first, second = (torch.load(one, weights_only=True) for one in (path, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def merged(base, adapter):
    """Base + alpha / rank B A in float64, from the files alone."""
    weights = {name: tensor.double() for name, tensor in torch.load(base, weights_only=True).items()}
    parts, lora = torch.load(adapter, weights_only=True), described(adapter)["lora"]
    for name in lora["targets"]:
        narrow, wide = (parts[f"{name}.lora_{part}.weight"].double() for part in "AB")
        change = lora["alpha"] / lora["rank"] * (wide @ narrow)
        assert change.abs().max() > 1e-2, "or nothing could be seen of it"
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + change
    return weights


def save_merged(path, base, adapter):
    """`path`, a checkpoint of merged()."""
    torch.save({name: tensor.float() for name, tensor in merged(base, adapter).items()}, path)
    description = {name: value for name, value in described(base).items() if name != "weights_sha256"}
    path.with_suffix(".json").write_text(json.dumps(description))
    return path


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 43).view(2, 20)).logits.double()


def merged_logits(base, adapter):
    model = Transformer(load_model(base)[0].config).double()
    model.load_state_dict(merged(base, adapter))
    return logits(model)


# ---- the stage


def test_what_it_prints_and_writes(run, words, out, base, machine):
    before, content = files(out), {path: path.read_bytes() for path in (base, base.with_suffix(".json"))}
    process = run(*words, "--lora_name", "law", "--log_interval", 1)
    text, path = good(process), out / "lora_law_32.pth"
    assert process.stderr == "" and f"base {base}, which stays as it is\n" in text
    assert {path: path.read_bytes() for path in content} == content

    old = torch.load(base, weights_only=True)
    shapes = {}
    for name in MATRICES:
        rows, columns = old[f"{name}.weight"].shape
        shapes |= {f"{name}.lora_A.weight": (RANK, columns), f"{name}.lora_B.weight": (rows, RANK)}
    count = sum(rows * columns for rows, columns in shapes.values())
    total = count + sum(tensor.numel() for name, tensor in old.items() if name != "output.weight")
    counts = ", ".join(f"2 {name}" for name in DENSE)
    assert f"adapter on 14 matrices: {counts}\n{count:,} of {total:,} parameters train ({count / total:.2%})\n" in text
    assert "40 rows read, 40 kept" in text and re.search(r"<s>assistant\n⟦.*</s>⟧\n", text)

    weights = torch.load(path, weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    for tensor in weights.values():
        assert type(tensor) is torch.Tensor and tensor.dtype == torch.float32 and not tensor.requires_grad
        assert 0 < tensor.abs().max() < 1
    assert path.stat().st_size < 4 * count + 1000 * len(weights)
    metadata = described(path)
    assert metadata["lora"] == dict(rank=RANK, alpha=ALPHA, dropout=0.0, targets=MATRICES)
    assert metadata["parent"] == {"file": str(base), "sha256": sha256(base)}
    assert metadata["stage"] == "lora_law" and metadata["step"] == 12
    assert metadata["config"] == described(base)["config"] and metadata["weights_sha256"] == sha256(path)
    written = {f"lora_law_32{suffix}" for suffix in (".pth", ".json", ".resume.pth")}
    assert files(out) - before == written | {"logs/lora_law_32.jsonl", "logs/.lora_law_32.lock"}

    log = records(out, "lora_law_32")
    losses = [record["loss"] for record in log if "loss" in record]
    assert len(losses) == 12 and max(losses[-3:]) < 0.7 * min(losses[:3])
    assert log[-1]["validation_loss"] < 0.7 * log[0]["validation_loss"]

    talk, export = re.search(r"talk to it:  python (.*)\nas a whole model:  python (.*)", text).groups()
    assert f"{base} with {path}: " in good(run(*shlex.split(talk), *machine, "--max_new_tokens", 2))
    assert export == f"export_model.py {talk.removeprefix('2-eval.py ')} --format pth"


def test_the_losses_are_those_of_the_base_at_first_and_of_the_merged_model_at_last(
    run, words, out, base, adapter, tmp_path
):
    """Stage 3 measures the same rows, on whole models."""
    other = save_merged(tmp_path / "merged.pth", base, adapter)
    log = records(out)
    for path, loss in ((base, log[0]["validation_loss"]), (other, described(adapter)["validation_loss"])):
        full = ["3-full_sft.py", *words[1 : words.index("--lora_rank")], "--max_steps", 1, "--overwrite"]
        good(run(*full, "--out_dir", tmp_path / "full", "--init_from", path))
        assert records(tmp_path / "full", "single_chat_full_sft_32")[0]["validation_loss"] == pytest.approx(loss, 1e-5)


def test_the_best_chat_model_is_where_it_starts_unless_another_is_named(
    run, words, out, base, adapter, small_tokenizer
):
    assert described(adapter)["parent"]["file"] == str(base)
    better = save_chat(out / "multi_chat" / "full_sft_32.pth", small_tokenizer, seed=3)
    other = save_chat(out / "other.pth", small_tokenizer, seed=4)
    for path, more in ((better, []), (other, ["--init_from", other])):
        assert f"base {path}, which" in good(run(*words, "--overwrite", *more))
        assert described(adapter)["parent"] == {"file": str(path), "sha256": sha256(path)}


def test_every_expert_has_an_adapter_and_the_router_none(experts):
    base, adapter = experts
    old, targets = torch.load(base, weights_only=True), described(adapter)["lora"]["targets"]
    expected = {name for name in old if name.startswith("layers.") and "norm" not in name and ".gate." not in name}
    assert sum(".experts." in name for name in expected) == 2 * 4 * 3
    assert {f"{name}.weight" for name in targets} == expected
    assert merged(base, adapter).keys() == old.keys()  # and each was trained


def test_targets_and_the_last_turn_only(run, words, out, base):
    good(run(*words, "--lora_targets", "wq, layers.1.feed_forward", "--max_steps", 10))
    chosen = ["layers.0.attention.wq", "layers.1.attention.wq", *(f"layers.1.feed_forward.w{n}" for n in (1, 2, 3))]
    path = out / "lora_sft_32.pth"
    assert described(path)["lora"]["targets"] == chosen
    assert {name.rsplit(".", 2)[0] for name in torch.load(path, weights_only=True)} == {*chosen}
    whole = described(path)["supervised_tokens_seen"]
    good(run(*words, "--last_turn_only", "--max_steps", 10, "--overwrite"))
    assert described(path)["supervised_tokens_seen"] < 0.9 * whole  # a third of the rows has two turns


def test_bfloat16_learns_what_float32_does(run, words, out, adapter):
    exact = [record["loss"] for record in records(out) if "loss" in record]
    words[words.index("--dtype") + 1] = "bfloat16"
    good(run(*words, "--overwrite"))
    assert [record["loss"] for record in records(out) if "loss" in record] == pytest.approx(exact, rel=3e-2)


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_compiled_training_agrees(run, words, out, traced_only, small_tokenizer, kind):
    more, name = (["--use_moe"], "lora_sft_32_moe") if kind == "experts" else ([], "lora_sft_32")
    save_chat(
        out / f"multi_chat/full_{name.removeprefix('lora_')}.pth", small_tokenizer, n_layers=1, use_moe=bool(more)
    )
    words[words.index("--n_layers") + 1] = "1"
    losses, names = [], []
    for flags in ([], ["--compile", "--overwrite"]):
        good(run(*words, *more, *flags, "--max_steps", 5, "--log_interval", 1))
        losses.append([record["loss"] for record in records(out, name) if "loss" in record])
        names.append(torch.load(out / f"{name}.pth", weights_only=True).keys())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and names[0] == names[1]


def test_two_ranks_are_one_process_of_twice_the_batch(run, words, out, experts):
    """With experts, some of which have tokens on one rank alone."""
    _, adapter = experts
    words += ["--learning_rate", "1e-3", "--use_moe", "--overwrite", "--log_interval", "1"]
    good(run(*words))
    single, log = torch.load(adapter, weights_only=True), records(out, "lora_sft_32_moe")
    words[words.index("--batch_size") + 1] = "2"
    process = run_two_ranks(*words)
    text = good(process)
    assert text.count("adapter on 38 matrices") == 1 and process.stderr == ""
    double = torch.load(adapter, weights_only=True)
    assert double.keys() == single.keys()
    for name, tensor in single.items():
        assert torch.allclose(double[name], tensor, rtol=0, atol=1e-5), (name, (double[name] - tensor).abs().max())
    for ours, theirs in zip(records(out, "lora_sft_32_moe"), log, strict=True):
        for name in {"loss", "gradient_norm", "validation_loss"} & theirs.keys():  # AdamW does not tell how large it is
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


# ---- stop and go on


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_printed_command_goes_on_to_the_adapter_of_a_straight_run(run, words, out, base, tmp_path, optimizer):
    words += ["--optimizer", optimizer, "--lora_dropout", "0.2", "--accumulation_steps", "2"]
    text = good(run(*words, "--save_peft", tmp_path / "peft", "--stop_after", 5))
    assert "talk to it" not in text and not (tmp_path / "peft").exists()
    command = re.search(r"stopped and saved at step 5/12; to go on: python (.*)", text)[1]
    assert "step 6/12 " in (text := good(run(*shlex.split(command)))) and "talk to it" in text
    assert (tmp_path / "peft" / "adapter_config.json").exists()
    good(run(*words, "--out_dir", tmp_path / "straight", "--init_from", base))
    assert same_tensors(out / "lora_sft_32.pth", tmp_path / "straight" / "lora_sft_32.pth")
    good(run(*words, "--out_dir", tmp_path / "sure", "--init_from", base, "--lora_dropout", 0))
    assert not same_tensors(out / "lora_sft_32.pth", tmp_path / "sure" / "lora_sft_32.pth")


def test_resume_refuses_another_adapter_and_another_base(run, words, out, base, small_tokenizer):
    good(run(*words, "--stop_after", 5))
    before = {name: (out / name).read_bytes() for name in files(out) if name.startswith("lora")}
    for flag, old, new in (
        ("--lora_rank", "4", "8"),
        ("--lora_alpha", "12.0", "4.0"),
        ("--lora_dropout", "0.0", "0.1"),
        ("--lora_targets", "all", "wq"),
    ):
        error = f"--resume: {flag} was {old} and is {new} now; give the old one"
        assert_one_line_error(run(*words, "--resume", flag, new), error)
    assert_one_line_error(run(*words, "--resume", "--last_turn_only"), "--resume: ")
    better = save_chat(out / "multi_chat" / "full_sft_32.pth", small_tokenizer, seed=3)
    for more in ([], ["--init_from", better]):
        process = run(*words, "--resume", *more)
        assert_one_line_error(process, "--init_from", sha256(base), sha256(better), "give the old one")
    assert {name: (out / name).read_bytes() for name in before} == before
    assert "step 12/12" in good(run(*words, "--resume", "--init_from", base))


def test_resume_mends_a_lost_adapter_and_refuses_a_damaged_state(run, words, out, adapter):
    content, state = torch.load(adapter, weights_only=True), out / "lora_sft_32.resume.pth"
    adapter.unlink()
    process = run(*words, "--resume")
    assert (
        "nothing left to do" in good(process)
        and f"warning: {adapter} and its .json are not of step 12" in process.stderr
    )
    mended = torch.load(adapter, weights_only=True)
    assert mended.keys() == content.keys() and all(torch.equal(mended[name], content[name]) for name in content)
    saved, lost = torch.load(state), f"{MATRICES[3]}.lora_B.weight"
    for change in (saved["weights"].pop, lambda name: saved["weights"].update({name: torch.zeros(4, 32)})):
        change(lost)
        torch.save(saved, state)
        assert_one_line_error(run(*words, "--resume"), state, lost)
    assert same_tensors(adapter, adapter)
    state.unlink()
    assert_one_line_error(run(*words, "--resume"), "--resume", state)


# ---- peft


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_peft_reads_what_save_peft_writes(request, run, words, out, base, tmp_path, kind):
    more = []
    if kind == "experts":
        base, more = request.getfixturevalue("experts")[0], ["--use_moe", "--overwrite"]
    text = good(run(*words, *more, "--save_peft", tmp_path / "peft"))
    assert f"{tmp_path / 'peft'} is written, for peft\n" in text
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (RANK, ALPHA, str(base))
    model = PeftModel.from_pretrained(load_model(base)[0], tmp_path / "peft")
    expected = merged_logits(base, out / f"lora_{base.stem.removeprefix('full_')}.pth")
    assert torch.allclose(logits(model.double()), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(load_model(base)[0]), expected, atol=0.1)


# ---- --lora


@pytest.mark.parametrize("script", ["2-eval.py", "0-eval_pretrain.py"])
def test_answers_with_an_adapter_are_those_of_the_merged_model(talk, export, base, adapter, tmp_path, script):
    name, answers = talk("--checkpoint", base, "--lora", adapter, script=script)
    assert name == f"{base} with {adapter}"
    assert talk("--lora", adapter, script=script) == (name, answers)  # the .json names the base
    assert talk("--checkpoint", base, script=script)[1] != answers
    good(export("--lora", adapter, "--format", "pth", "--output", tmp_path / "whole.pth"))
    for path in (tmp_path / "whole.pth", save_merged(tmp_path / "own.pth", base, adapter)):
        assert talk("--checkpoint", path, script=script) == (str(path), answers)


def test_a_report_on_an_adapter_has_its_answers(run, machine, talk, base, adapter, tmp_path, small_tokenizer):
    words = ["2-eval.py", *machine, "--temperature", 0, "--max_new_tokens", 10, "--prompt", TASKS[0], "--lora", adapter]
    good(run(*words, "--report", tmp_path / "with.md"))
    text = (tmp_path / "with.md").read_text("utf-8")
    save_merged(tmp_path / "own.pth", base, adapter)
    good(run(*words[:-2], "--checkpoint", tmp_path / "own.pth", "--report", tmp_path / "own.md"))
    rows = [line for line in text.splitlines() if line.startswith(f"| {TASKS[0]} |")]
    assert len(rows) == 1 and rows[0] in (tmp_path / "own.md").read_text("utf-8")
    assert f"| {base} with {adapter} |" in text.replace("\\_", "_")
    other = save_chat(tmp_path / "other.pth", small_tokenizer, seed=3)
    process = run(*words, "--checkpoint", base, "--checkpoint", other, "--report", tmp_path / "two.md")
    assert_one_line_error(process, adapter, base, other, "--force")
    assert not (tmp_path / "two.md").exists() and not (tmp_path / "two.html").exists()


@pytest.fixture
def exam(run, machine, tmp_path):
    """Sit an exam of six questions: (the line of JSON, rows of answers)."""
    path = tmp_path / "own" / "val" / "zoo_val.csv"
    path.parent.mkdir(parents=True)
    rows = "".join(f"{n},问题{n}？,甲{n},乙{n},丙{n},丁{n},B\n" for n in range(6))
    path.write_text("id,question,A,B,C,D,answer\n" + rows, "utf-8")

    def exam(*words):
        flags = ["--data_dir", tmp_path / "own", "--results_dir", tmp_path / "results", "--max_seq_len", 256, "--json"]
        text = good(run("eval_ceval.py", *machine, *flags, *words))
        with open(tmp_path / "results" / "zoo.csv", encoding="utf-8") as handle:
            answers = [[float(row[f"p_{letter}"]) for letter in "ABCD"] for row in csv.DictReader(handle)]
        return json.loads(text.splitlines()[-1]), answers

    return exam


def test_an_exam_is_of_the_adapter_on_its_base(exam, export, base, adapter, tmp_path):
    plain, plain_answers = exam("--checkpoint", base)
    result, answers = exam("--lora", adapter)
    _, expected = exam("--checkpoint", save_merged(tmp_path / "own.pth", base, adapter))
    assert answers == [pytest.approx(row, rel=1e-3) for row in expected]
    assert answers != [pytest.approx(row, rel=1e-1) for row in plain_answers]
    assert plain["checkpoint_sha256"] == sha256(base) and result["checkpoint"] == f"{base} with {adapter}"
    assert result["checkpoint_sha256"] not in (sha256(base), sha256(adapter)) and result["prompt_format"] == "chat"
    assert exam("--lora", adapter)[0]["checkpoint_sha256"] == result["checkpoint_sha256"]
    scores = ["--format", "llama", "--output", tmp_path / "card", "--scores", tmp_path / "results" / "summary.json"]
    assert_one_line_error(export("--checkpoint", base, *scores), "--scores", "another checkpoint")
    good(export("--lora", adapter, *scores))
    assert result["checkpoint_sha256"] in (tmp_path / "card" / "README.md").read_text("utf-8")


def test_the_exam_of_an_adapter_trained_again_is_another(run, words, exam, adapter):
    before = exam("--lora", adapter)[0]["checkpoint_sha256"]
    good(run(*words, "--overwrite", "--seed", 2))
    assert exam("--lora", adapter)[0]["checkpoint_sha256"] != before


@pytest.mark.parametrize(
    "kind, format",
    [(k, f) for k, own in (("dense", "llama"), ("experts", "granitemoe")) for f in ("pth", "minimind", own)],
)
def test_what_is_exported_is_base_and_adapter_in_one(request, export, base, tmp_path, kind, format):
    adapter = request.getfixturevalue("adapter") if kind == "dense" else None
    base, adapter = (base, adapter) if adapter else request.getfixturevalue("experts")
    target = tmp_path / ("whole.pth" if format == "pth" else "whole")
    text = good(export("--checkpoint", base, "--lora", adapter, "--format", format, "--output", target))
    assert f"{base} with {adapter}: " in text
    model, metadata = load_model(target)
    expected = merged(base, adapter)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor.double(), expected[name], rtol=0, atol=1e-6), name
    if format in ("llama", "granitemoe"):
        stock = AutoModelForCausalLM.from_pretrained(target)
        assert torch.allclose(logits(stock), merged_logits(base, adapter), rtol=0, atol=1e-3)
    if format == "pth":
        assert metadata["stage"] == "lora_sft" and "lora" not in metadata
        both = hashlib.sha256((sha256(base) + sha256(adapter)).encode()).hexdigest()
        assert metadata["parent"] == {"file": f"{base} with {adapter}", "sha256": both}
        assert metadata["weights_sha256"] == sha256(target)


def test_an_export_without_a_name_has_that_of_the_adapter(export, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good(export("--lora", adapter, "--format", "pth"))
    assert (tmp_path / "out" / "export" / "lora_sft_32_pth.pth").exists()


def test_a_base_that_has_moved_is_given_by_hand(talk, run, machine, base, adapter, tmp_path):
    answers = talk("--lora", adapter)[1]
    moved = base.rename(tmp_path / "moved.pth")
    base.with_suffix(".json").rename(moved.with_suffix(".json"))
    assert talk("--lora", adapter, "--checkpoint", moved) == (f"{moved} with {adapter}", answers)
    assert_one_line_error(run("2-eval.py", *machine, "--lora", adapter), "no such checkpoint", "--checkpoint")


def test_a_stock_folder_may_be_the_base(run, words, export, talk, base, adapter, tmp_path):
    answers = talk("--lora", adapter)[1]
    good(export("--checkpoint", base, "--format", "llama", "--output", tmp_path / "llama"))
    assert_one_line_error(run(*words, "--resume", "--init_from", tmp_path / "llama"), "--init_from (its contents)")
    good(run(*words, "--overwrite", "--init_from", tmp_path / "llama"))
    weights = tmp_path / "llama" / "model.safetensors"
    assert described(adapter)["parent"] == {"file": str(tmp_path / "llama"), "sha256": sha256(weights)}
    assert talk("--lora", adapter) == (f"{tmp_path / 'llama'} with {adapter}", answers)


# ---- wrong input


@pytest.mark.parametrize(
    "more, parts, code",
    [
        (["--lora_rank", 0], ["--lora_rank", "at least 1"], 2),
        (["--lora_alpha", 0], ["--lora_alpha"], 2),
        (["--lora_alpha", "inf"], ["--lora_alpha"], 2),
        (["--lora_dropout", 1], ["--lora_dropout"], 2),
        (["--lora_targets", "output"], ["--lora_targets", "'output'", "attention, feed_forward, w1", "or all"], 2),
        (["--lora_targets", "wq,gate"], ["--lora_targets", "'gate'"], 2),
        (["--lora_targets", ""], ["--lora_targets", "''"], 2),
        (["--lora_targets", "nonsense"], ["--lora_targets", "'nonsense'", "or all"], 2),
        (["--lora_targets", "experts"], ["--lora_targets", "'experts'"], 2),
        (["--lora_name", "../x"], ["--lora_name", "'../x'"], 2),
        (["--lora_name", ""], ["--lora_name", "''"], 2),
        (["--resume"], ["--resume", "lora_sft_32.resume.pth"], 1),
        (["--data_path", "none.csv"], ["none.csv: no such file", "--data_path"], 1),
        (["--init_from", "none.pth"], ["none.pth", "no such checkpoint"], 1),
        (["--dim", 48], ["full_sft_48.pth", "no such checkpoint", "run 3-full_sft.py first", "--init_from"], 1),
        (["--use_moe"], ["full_sft_32_moe.pth", "no such checkpoint", "--init_from"], 1),
    ],
)
def test_wrong_flags_are_one_line_and_write_nothing(run, words, out, more, parts, code):
    before = files(out)
    assert_one_line_error(run(*words, *more), *parts, code=code)
    assert files(out) == before


def test_the_router_of_experts_has_no_adapter(run, words, out, experts):
    process = run(*words, "--use_moe", "--overwrite", "--lora_targets", "gate")
    assert_one_line_error(process, "--lora_targets: 'gate'", "experts", "shared_experts", code=2)


def test_no_chat_model_is_one_line(run, words, out, base):
    base.unlink()
    before = files(out)
    process = run(*words)
    assert_one_line_error(process, "multi_chat/full_sft_32.pth or ", "run 3-full_sft.py first", "--init_from")
    assert files(out) == before


def test_what_is_there_is_not_replaced(run, words, adapter):
    before = adapter.read_bytes()
    assert_one_line_error(run(*words, "--seed", 2), f"{adapter} exists already", "--resume", "--overwrite")
    assert adapter.read_bytes() == before
    good(run(*words, "--seed", 2, "--lora_name", "other"))
    assert adapter.read_bytes() == before
    good(run(*words, "--seed", 2, "--overwrite"))
    assert adapter.read_bytes() != before


def test_a_peft_folder_is_not_replaced_and_foreign_files_are_safe(run, words, out, tmp_path):
    folder = tmp_path / "peft"
    good(run(*words, "--save_peft", folder))
    before = (folder / "adapter_model.safetensors").read_bytes()
    more = ["--lora_name", "other", "--seed", 2, "--save_peft", folder]
    process = run(*words, *more)
    assert_one_line_error(process, folder, "--overwrite")
    assert (folder / "adapter_model.safetensors").read_bytes() == before and "step " not in process.stdout
    good(run(*words, *more, "--overwrite"))
    assert (folder / "adapter_model.safetensors").read_bytes() != before
    before = files(out)
    (folder / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path, part in ((folder, "diary.txt"), (tmp_path / "file", "not a folder")):
        process = run(*words, "--lora_name", "third", "--overwrite", "--save_peft", path)
        assert_one_line_error(process, path, part)
        assert "step " not in process.stdout
    assert files(out) == before and (folder / "diary.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_an_adapter_is_refused_on_another_base_unless_forced(
    run, talk, export, machine, base, adapter, tmp_path, small_tokenizer
):
    other, target = save_chat(tmp_path / "other.pth", small_tokenizer, seed=3), tmp_path / "x.pth"
    words = ["--checkpoint", other, "--lora", adapter]
    process = run("2-eval.py", *machine, *words)
    assert_one_line_error(process, f"{adapter}: was trained on {base}, and the weights in {other} are not", "--force")
    assert_one_line_error(export(*words, "--format", "pth", "--output", target), adapter, base, other, "--force")
    assert not target.exists()
    process = export(*words, "--format", "pth", "--output", target, "--force")
    assert (
        good(process)
        and process.stderr == f"warning: {adapter}: was trained on {base}, and the weights in {other} are not those\n"
    )
    own = save_merged(tmp_path / "own.pth", other, adapter)
    assert talk(*words, "--force")[1] == talk("--checkpoint", own)[1] == talk("--checkpoint", target)[1]


def test_an_adapter_of_another_shape_is_refused_also_by_force(run, export, adapter, experts, tmp_path, small_tokenizer):
    wide = save_chat(tmp_path / "wide.pth", small_tokenizer, dim=48)
    words = ["--format", "pth", "--output", tmp_path / "x.pth", "--checkpoint"]
    for other, own, part in (
        (wide, adapter, "layers.0.attention.wq of (32, 32), which is (48, 48)"),
        (experts[0], adapter, "layers.0.feed_forward.w1, which the model does not have"),
        (
            adapter.parent / "single_chat/full_sft_32.pth",
            experts[1],
            "layers.0.feed_forward.experts.0.w1, which the model",
        ),
    ):
        assert_one_line_error(export(*words, other, "--lora", own), own, "was trained on", other)
        assert_one_line_error(export(*words, other, "--lora", own, "--force"), own, part)
    assert not (tmp_path / "x.pth").exists()


DAMAGES = {
    "no description": (lambda path: path.with_suffix(".json").unlink(), ["needs its .json beside it"]),
    "half a description": (lambda path: path.with_suffix(".json").write_text('{"config": '), [".json", "describes no"]),
    "no rank": (lambda path: describe(path, lora=None), ["needs its .json"]),
    "alpha is a text": (lambda path: describe(path, lora={"rank": RANK, "alpha": "12"}), ["needs its .json"]),
    "no base": (lambda path: describe(path, parent=None), ["needs its .json"]),
    "base is a number": (lambda path: describe(path, parent={"file": 7, "sha256": 7}), ["needs its .json"]),
    "no B": (lambda path: change(path, lambda name, tensor: {}), ["not a whole adapter", "lora_B"]),
    "NaN": (lambda path: change(path, lambda name, tensor: {name: tensor * torch.nan}), ["not finite"]),
    "a vector": (lambda path: change(path, lambda name, tensor: {name: tensor[0]}), ["not a whole adapter"]),
    "another rank": (lambda path: change(path, lambda name, tensor: {name: tensor[:, 1:]}), ["layers.1.attention.wv"]),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-500]), ["truncated"]),
    "a text": (lambda path: path.write_text("hello"), ["not a PyTorch checkpoint"]),
    "gone": (lambda path: path.unlink(), ["no such checkpoint"]),
}


def describe(path, **fields):
    path.with_suffix(".json").write_text(json.dumps({**described(path), **fields}))


def change(path, replace):
    """Put what `replace`, given its name and tensor, returns in the place of one lora_B."""
    weights, name = torch.load(path, weights_only=True), "layers.1.attention.wv.lora_B.weight"
    weights |= replace(name, weights.pop(name))
    torch.save(weights, path)
    describe(path, weights_sha256=sha256(path))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_one_line_and_writes_nothing(run, export, adapter, machine, tmp_path, damage):
    apply, parts = DAMAGES[damage]
    apply(adapter)
    before = files(tmp_path)
    process = export("--lora", adapter, "--format", "pth", "--output", tmp_path / "x.pth")
    assert_one_line_error(process, adapter.with_suffix(""), *parts)
    assert process.stderr.count("\n") == 1 and files(tmp_path) == before


def test_adapters_and_whole_models_in_each_others_place_are_one_line(
    run, export, machine, words, base, adapter, exam, tmp_path
):
    before = files(tmp_path)
    flags = ["--data_dir", tmp_path / "own", "--results_dir", tmp_path / "results"]
    for script in ("0-eval_pretrain.py", "2-eval.py", "eval_ceval.py"):
        run_it = [script, *machine, *(flags if script == "eval_ceval.py" else [])]
        assert_one_line_error(
            run(*run_it, "--lora", base), base, "holds no LoRA adapter", "--lora takes", "4-lora_sft.py"
        )
        assert_one_line_error(run(*run_it, "--checkpoint", adapter), adapter, "LoRA adapter", "give it with --lora")
    state = adapter.with_suffix(".resume.pth")
    target = ["--format", "pth", "--output", tmp_path / "x.pth"]
    for lora in (base, state):
        assert_one_line_error(export("--lora", lora, *target), lora, "holds no LoRA adapter")
    assert_one_line_error(export("--checkpoint", adapter, *target), adapter, "LoRA adapter", "give it with --lora")
    process = run(*words, "--lora_name", "second", "--init_from", adapter)
    assert_one_line_error(process, adapter, "LoRA adapter")
    assert files(tmp_path) == before
