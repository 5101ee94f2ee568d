"""eval_ceval.py as a user runs it, and the documented way into lm-evaluation-harness."""

import csv
import functools
import hashlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, assert_one_line_error, run_script, run_without
from model.checkpoint import save_checkpoint
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import tokenizer_hash

SHAPE = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=256)
HEADER = "id,question,A,B,C,D,answer\n"


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("out")
    torch.manual_seed(0)
    model = Transformer(LMConfig(**SHAPE, vocab_size=len(tokenizer)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    for stage in ("pretrain", "multi_chat/full_sft"):
        metadata = {"stage": stage, "tokenizer_hash": tokenizer_hash(tokenizer)}
        save_checkpoint(folder / f"{stage}_32.pth", model, metadata)
    return folder


@pytest.fixture
def exam(tmp_path):
    """Two subjects of C-Eval, 15 and 5 questions, where the script looks for them; B is right in all but three of each,
    whose answers are A, C and D."""
    for split, counts in (("val", (15, 5)), ("dev", (2, 2))):
        for name, count in zip(("logic", "physician"), counts):
            path = tmp_path / f"ceval/ceval-exam/{split}/{name}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            answers = f"BACD{'B' * count}"
            rows = (f"{n},问题{n}？,甲{n},乙{n},丙{n},丁{n},{answers[n]}\n" for n in range(count))
            path.write_text(HEADER + "".join(rows), encoding="utf-8")
    return tmp_path


@pytest.fixture
def run(run_in_process, monkeypatch, out_dir, tmp_path):
    """run_in_process of the script in the folder tmp_path."""
    monkeypatch.chdir(tmp_path)
    machine = ("--device", "cpu", "--dim", "32", "--n_layers", "2")
    return functools.partial(run_in_process, "eval_ceval.py", "--out_dir", out_dir, *machine)


def failed(result, *parts, code=1):
    lines = [line for line in result[2].splitlines() if not line.startswith("note: ")]
    assert result[0] == code and len(lines) == 1 and lines[0].startswith("error: "), result
    for part in parts:
        assert part in lines[0], result[2]


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def test_the_whole_exam(run, exam, out_dir):
    code, out, err = run("--json")
    assert code == 0 and "note: 50 of C-Eval's 52 subjects are missing" in err, err
    result, results = json.loads(out.splitlines()[-1]), exam / "out/ceval"
    rows = rows_of(results / "logic.csv") + rows_of(results / "physician.csv")
    assert len(rows) == result["questions"] == 20
    right = sum(row["llm_answer"] == row["answer"] for row in rows)
    assert right == result["correct"] == sum(int(row["is_right"]) for row in rows)
    assert result["accuracy"] == right / 20 and right > 0
    assert result["interval_95"][0] < right / 20 < result["interval_95"][1]
    assert result["verdict"] == "not distinguishable from guessing" and result["questions_per_second"] > 0
    assert (result["commonest_letter"], result["commonest_letter_accuracy"]) == ("B", 0.7)
    assert [*result["by_category"]] == ["humanities", "other"] and result["benchmark"] == "C-Eval, 2 of 52 subjects"
    assert (result["subjects"], result["subjects_of_benchmark"], result["not_fitting"]) == (2, 52, 0)
    assert (result["prompt_format"], result["few_shot"], result["shuffle_options"]) == ("chat", 0, None)
    weights = (out_dir / "multi_chat/full_sft_32.pth").read_bytes()
    assert result["checkpoint_sha256"] == hashlib.sha256(weights).hexdigest()
    assert {**result["by_category"]["other"]}.keys() == {"correct", "questions", "accuracy"}
    assert result["checkpoint"] == str(out_dir / "multi_chat/full_sft_32.pth")
    for line in (
        f"总题数: 20  总正确数: {right}  总正确率: {right / 20:.2%}",
        "verdict: not distinguishable",
        "逻辑学",
    ):
        assert line in out
    assert json.loads((results / "summary.json").read_text("utf-8")) == result
    for row in rows:
        assert row["prompt"].startswith("<s>user\n下面是") and row["prompt"].endswith("答案：</s>\n<s>assistant\n")
        p = {letter: float(row[f"p_{letter}"]) for letter in "ABCD"}
        assert row["llm_answer"] == max(p, key=p.get) and sum(p.values()) < 1
    assert run("--json")[1].splitlines()[:-2] == out.splitlines()[:-2], "again: replaced, and the same"


def test_the_flags_reach_the_prompts(run, exam, out_dir):
    def prompts(*flags):
        code, out, err = run("--results_dir", exam / "r", *flags)
        assert code == 0, err
        return [row["prompt"] for path in sorted(exam.glob("r/l*.csv")) for row in rows_of(path)]

    pretrained = ("--checkpoint", out_dir / "pretrain_32.pth")
    plain, chat = prompts(*pretrained), prompts()
    assert plain[0].startswith("<s>下面是逻辑学") and plain[0].endswith("D. 丁0\n答案：") and plain[0].count("<s>") == 1
    assert prompts("--prompt_format", "plain") == plain != chat == prompts(*pretrained, "--prompt_format", "chat")
    assert [text.count("<s>user") for text in prompts("--few_shot", "2")] == [3] * 15
    assert prompts("--few_shot", "1", *pretrained)[0].count("答案：B\n\n问题0") == 1
    shuffled = prompts("--shuffle_options", "1")
    assert shuffled == prompts("--shuffle_options", "1") != prompts("--shuffle_options", "2") and shuffled != chat
    assert prompts("--shuffle_options", "0") != chat
    assert (exam / "r/physician.csv").exists()
    assert prompts("--subjects", "logic") == chat and not (exam / "r/physician.csv").exists()
    assert (exam / "r/summary.md").read_text("utf-8").startswith("# C-Eval, 1 of 52 subjects: ")


def test_examples_that_were_not_shown_are_not_claimed(run, exam):
    """In 100 tokens every question fits with one example, none with two."""
    code, out, err = run("--few_shot", "2", "--max_seq_len", "100", "--json")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    rows = [row for name in ("logic", "physician") for row in rows_of(exam / f"out/ceval/{name}.csv")]
    shown = [row["prompt"].count("<s>user") - 1 for row in rows]
    assert shown == [int(row["examples"]) for row in rows] and {*shown} == {1}
    assert result["mean_examples"] == 1 and result["with_fewer_examples"] == 20
    assert "up to 2 examples" in out.splitlines()[0]
    assert "examples shown: 1.00 in the mean; 20 questions had fewer than 2\n" in out


def test_questions_that_were_not_asked_do_not_decide(run, exam):
    path = exam / "ceval/ceval-exam/val/logic_val.csv"
    path.write_text(path.read_text("utf-8").replace("问题9？", "长" * 300), encoding="utf-8")
    code, out, err = run("--json")
    assert code == 0 and "1 questions did not fit the context of 256 tokens, counted as wrong: " in err
    result = json.loads(out.splitlines()[-1])
    assert (result["questions"], result["asked"], result["not_fitting"]) == (20, 19, 1)
    assert "counted as wrong: 1; " in out and "interval of the 19 asked" in out and "verdict of the 19 asked: " in out


def test_float32_is_the_default(run, exam):
    def probabilities(*flags):
        code, out, err = run("--subjects", "logic", *flags)
        assert code == 0, err
        return [row["p_A"] for row in rows_of(exam / "out/ceval/logic.csv")]

    assert probabilities() == probabilities("--dtype", "float32") != probabilities("--dtype", "bfloat16")


def test_an_exam_of_one_s_own_and_cmmlu_s_layout(run, tmp_path):
    (tmp_path / "own/val").mkdir(parents=True)
    (tmp_path / "own/val/zoo_val.csv").write_text(HEADER + "0,谁会飞？,鱼,鸟,牛,马,B\n", encoding="utf-8")
    code, out, err = run("--data_dir", "own", "--json")
    assert code == 0 and err.count("note") == 0 and "zoo" in out, err
    assert json.loads(out.splitlines()[-1])["benchmark"] == "own" and out.startswith("own, ")
    assert json.loads(out.splitlines()[-1])["subjects_of_benchmark"] is None
    assert "下面是zoo考试" in rows_of(tmp_path / "out/ceval/zoo.csv")[0]["prompt"]
    (tmp_path / "cmmlu/test").mkdir(parents=True)
    text = ",Question,A,B,C,D,Answer\n0,谁会飞？,鱼,鸟,牛,马,B\n"
    (tmp_path / "cmmlu/test/virology.csv").write_text(text, encoding="utf-8")
    code, out, err = run("--benchmark", "cmmlu", "--results_dir", "c", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["by_category"].keys() == {"STEM"}, err


def test_bits_per_byte_with_and_without_an_exam(run, tmp_path):
    (tmp_path / "a.txt").write_text("长江是中国最长的河。\n" * 9, encoding="utf-8")
    code, out, err = run("--bpb", "a.txt", "--json")
    assert code == 0 and err == "note: ceval/ceval-exam is not there, so no exam\n"
    result = json.loads(out.splitlines()[-1])
    assert result.keys() == {"checkpoint", "bits_per_byte", "bytes", "tokens"} and result["bytes"] == 9 * 31
    assert f"a.txt: {result['bits_per_byte']:.4f} bits per byte (279 bytes in {result['tokens']} tokens)" in out
    assert not (tmp_path / "out").exists()
    failed(run("--bpb", "a.txt", "--data_dir", "none"), "none/val: no such folder")
    failed(run("--bpb", "b.txt"), "b.txt: no such file")
    failed(run("--bpb", "a.txt", "--max_seq_len", "1"), "at least 2 tokens", code=2)


def test_an_exam_beside_bits_per_byte(run, exam):
    (exam / "a.jsonl").write_text('{"text": "短"}\n', encoding="utf-8")
    code, out, err = run("--bpb", "a.jsonl", "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["bytes"] == 3 and result["questions"] == 20, err


def test_bad_input_gets_one_line_and_leaves_nothing(run, exam, out_dir):
    val = exam / "ceval/ceval-exam/val"
    failed(run("--data_dir", "none"), "none/val: no such folder", "ceval-exam.zip", "--data_dir")
    failed(run("--subjects", "nonsense"), "--subjects 'nonsense'", "has logic, physician", code=2)
    failed(run("--subjects", ""), "--subjects ''", "has logic, physician", code=2)
    failed(run("--bpb", "none.txt", "--data_dir", "ceval/ceval-exam"), "none.txt: no such file")
    failed(run("--results_dir", "ceval/ceval-exam/val"), "--results_dir ceval/ceval-exam/val", "choose another", code=2)
    (exam / "file").write_text("")
    failed(
        run("--results_dir", "file/r", "--checkpoint", "none.pth"),
        "--results_dir file/r: cannot be written to (Not a directory)",
    )
    failed(run("--max_seq_len", "16"), "no question fits the model's context of 16 tokens")
    failed(run("--few_shot", "3"), "logic_dev.csv: has 2 examples, fewer than --few_shot 3")
    (exam / "ceval/ceval-exam/dev/physician_dev.csv").unlink()
    failed(run("--few_shot", "1"), "physician_dev.csv: no such file")
    failed(run("--checkpoint", "none.pth"), "none.pth")
    failed(run("--results_dir", exam / "ceval/ceval-exam/val/logic_val.csv"), "--results_dir", "not a folder", code=2)
    (val / "zoo_val.csv").write_text(HEADER + "0,q,1,2,3,4,A\n1,q,1,2,3,4,E\n")
    failed(run(), "zoo_val.csv:3: the answer is 'E'")
    assert not (exam / "out").exists()


def test_ctrl_c_leaves_earlier_results_as_they_were(run, exam, monkeypatch):
    run()
    before = {path.name: path.read_bytes() for path in (exam / "out/ceval").iterdir()}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("model.evaluation.exam_results.draw_chart", interrupted)
    code, out, err = run("--prompt_format", "plain")
    assert code == 130 and err.splitlines()[-1] == "error: interrupted"
    assert {path.name: path.read_bytes() for path in (exam / "out/ceval").iterdir()} == before


def test_wrong_usage_and_help():
    assert_one_line_error(run_script("eval_ceval.py", "--few_shot", "-1"), "--few_shot", "at least 0", code=2)
    run_without({"torch", "transformers", "pandas", "matplotlib"}, "eval_ceval.py", "--help")


def test_lm_evaluation_harness_asks_the_same(tmp_path, tokenizer):
    """The YAML task on a stock Llama folder: log-probabilities and accuracy of our prompts, by the same stock model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from model.evaluation.ceval import BENCHMARKS, LETTERS, encode_prompt, letter_ids, read_exam

    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, bos_token_id=1, eos_token_id=2)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "llama")
    words = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'llama'},dtype=float32", "--device", "cpu"]
    words += ["--include_path", "benchmarks/lm_eval", "--tasks", "general_knowledge", "--num_fewshot", "2"]
    words += ["--output_path", str(tmp_path / "results"), "--log_samples"]
    process = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    (samples,) = (tmp_path / "results").rglob("samples_*.jsonl")
    theirs = {row["doc"]["id"]: row for row in map(json.loads, samples.read_text("utf-8").splitlines())}

    (subject,) = read_exam(BENCHMARKS["ceval"], ROOT / "benchmarks/lm_eval", few_shot=2)
    assert len(theirs) == len(subject.questions) == 12
    right = 0
    for number, question in enumerate(subject.questions):
        ids = encode_prompt(tokenizer, subject.title, subject.examples, question, chat=False)
        with torch.no_grad():
            p = model(torch.tensor([ids])).logits[0, -1].softmax(-1)[letter_ids(tokenizer)].tolist()
        (scores,) = (theirs[key]["filtered_resps"] for key in theirs if int(key) == number)
        assert [float(score[0]) for score in scores] == pytest.approx([math.log(each) for each in p], abs=1e-3)
        right += question.answer == LETTERS[p.index(max(p))]
    (results,) = (tmp_path / "results").rglob("results_*.json")
    accuracy = json.loads(results.read_text("utf-8"))["results"]["general_knowledge"]["acc,none"]
    assert accuracy == pytest.approx(right / 12)
