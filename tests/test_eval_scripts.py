"""0-eval_pretrain.py and 2-eval.py: they find checkpoints, answer, score, converse, and say clearly what is wrong."""

import gzip
import html
import io
import json
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, assert_one_line_error, run_script, run_without
from model.checkpoint import save_checkpoint
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import tokenizer_hash

SHAPE = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)
COMMON = ("--dim", "32", "--n_layers", "2", "--device", "cpu", "--dtype", "float32", "--max_new_tokens", "12")


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, tokenizer):
    """The checkpoints of all stages, of one tiny random model, and one whose vocabulary is another."""
    folder = tmp_path_factory.mktemp("out")
    torch.manual_seed(0)
    model = Transformer(LMConfig(**SHAPE, vocab_size=len(tokenizer)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    for stage in ("pretrain", "single_chat/full_sft", "multi_chat/full_sft"):
        save_checkpoint(
            folder / f"{stage}_32.pth", model, {"stage": stage, "tokenizer_hash": tokenizer_hash(tokenizer)}
        )
    save_checkpoint(folder / "other_words.pth", Transformer(LMConfig(**SHAPE, vocab_size=100)), {"stage": "pretrain"})
    return folder


@pytest.fixture
def run(run_in_process, monkeypatch, out_dir):
    """run_in_process of a script with the flags in COMMON, and the lines `stdin` typed into it."""

    def call(script, *words, stdin=()):
        lines = iter(stdin)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        monkeypatch.setattr("builtins.input", lambda prompt="": answer_or_raise(next(lines, EOFError())))
        return run_in_process(script, "--out_dir", out_dir, *COMMON, *words)

    return call


def answer_or_raise(line):
    if isinstance(line, BaseException):
        raise line
    return line


def failed(result, *parts, code=1):
    assert result[0] == code and result[2].startswith("error: ") and result[2].count("\n") == 1, result
    for part in parts:
        assert part in result[2], result[2]


def test_the_fixed_questions_get_the_same_answers_every_time(run, out_dir):
    process = run_script("2-eval.py", "--out_dir", out_dir, *COMMON)
    assert process.returncode == 0, process.stderr
    assert process.stdout == run("2-eval.py")[1]
    assert process.stdout.count("\nQ: ") == 8 and "multi_chat" in process.stdout.splitlines()[0]
    assert "context 64 tokens" in process.stdout


def test_openings_and_prompts_are_continued(run):
    code, out, err = run("0-eval_pretrain.py", "--prompt", "长江是", "--prompt", "水")
    assert code == 0 and "\n长江是" in out and "\n水" in out, err
    assert len(run("0-eval_pretrain.py")[1]) > len(out)


@pytest.mark.parametrize("script", ["0-eval_pretrain.py", "2-eval.py"])
def test_help_needs_no_torch(script):
    run_without({"torch", "transformers"}, script, "--help")


def test_a_closed_pipe_ends_the_script_without_a_traceback(out_dir):
    command = [sys.executable, str(ROOT / "0-eval_pretrain.py"), "--out_dir", str(out_dir), *COMMON]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.readline()
        process.stdout.close()
        assert "Traceback" not in process.stderr.read().decode()


def test_the_sampling_flags_reach_the_model(run):
    def answer(*flags):
        code, out, err = run("2-eval.py", "--prompt", "你好", *flags)
        assert code == 0, err
        return out

    assert answer("--temperature", "0") == answer("--temperature", "0", "--seed", "5") == answer("--top_k", "1")
    assert answer("--seed", "1", "--temperature", "2", "--top_k", "0") != answer(
        "--seed", "2", "--temperature", "2", "--top_k", "0"
    )
    assert answer("--temperature", "0") == answer("--top_p", "1e-9")
    assert answer("--temperature", "0", "--repetition_penalty", "1.5") != answer(
        "--temperature", "0", "--repetition_penalty", "1.0"
    )
    assert len(answer("--temperature", "0", "--max_new_tokens", "2")) < len(answer("--temperature", "0"))


def test_the_single_turn_checkpoint_is_taken_when_there_is_no_multi_turn_one(run, out_dir, tmp_path):
    (tmp_path / "single_chat").mkdir()
    for suffix in (".pth", ".json"):
        source = (out_dir / "single_chat/full_sft_32").with_suffix(suffix)
        (tmp_path / "single_chat" / source.name).write_bytes(source.read_bytes())
    code, out, err = run("2-eval.py", "--out_dir", tmp_path, "--prompt", "你好")
    assert code == 0 and "single_chat" in out.splitlines()[0], err


def test_a_file_with_answers_gives_accuracy_by_task_and_json(run, tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"q": "河北的省会是哪里？", "answer": "石家庄", "task": "direct"},
        {"q": "那广东呢？", "history": [["河北的省会是哪里？", "石家庄。"]], "answer": ["广州"], "task": "ellipsis"},
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    code, out, err = run("2-eval.py", "--prompt_file", path, "--json")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result == {"accuracy": 0.0, "questions": 2, "tasks": {"direct": 0.0, "ellipsis": 0.0}}


def test_cloze_rows_give_accuracy(run, tmp_path):
    path = tmp_path / "cloze.jsonl"
    path.write_text(json.dumps({"prompt": "河北的省会是", "answer": "石家庄"}, ensure_ascii=False), encoding="utf-8")
    code, out, err = run("0-eval_pretrain.py", "--prompt_file", path, "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["questions"] == 1, err


def test_a_question_too_long_is_named_after_the_others_are_answered(run, tmp_path):
    path = tmp_path / "questions.jsonl"
    for script, field in (("2-eval.py", "q"), ("0-eval_pretrain.py", "prompt")):
        rows = [{field: "你好"}, {field: "字" * 200}, {field: "再见"}]
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        code, out, err = run(script, "--prompt_file", path)
        assert code == 1 and "(not answered)" in out and out.index("(not answered)") < out.index("再见")
        failed((code, out, err), "1 of 3 questions not answered", f"{path}:2: the prompt has 2", "context only 64")
        path.write_text("\n".join(json.dumps({**row, "answer": "x"}) for row in rows), encoding="utf-8")
        code, out, err = run(script, "--prompt_file", path, "--json")
        assert code == 0 and json.loads(out.splitlines()[-1])["questions"] == 3
        assert f"{path}:2: the prompt has 2" in err and "counted as wrong" in err


def test_histories_are_asked_in_every_form_and_limited(run, monkeypatch, tmp_path):
    seen, path = prompts_seen(monkeypatch), tmp_path / "questions.jsonl"
    pairs = [{"role": "system", "content": "短"}, ["一", "二"], ["三", "四"]]
    for answer in ({}, {"answer": "x"}):
        rows = [{"q": "五", "history": history, **answer} for history in (pairs, json.dumps(pairs), None, "", [])]
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        for limit, asked in ((), "一二三四"), (("--history", 1), "三四"), (("--history", 0), ""):
            seen.clear()
            assert run("2-eval.py", "--prompt_file", path, "--max_new_tokens", "1", *limit)[0] == 0
            with_history = sorted(seen, key=len)[-2:] if answer else seen[:2]
            for text in with_history:
                turns = [turn.split("\n")[1] for turn in text.split("<s>")[1:-1]]
                assert turns == [f"{word}</s>" for word in ("短", *asked, "五")], (limit, turns)


def test_an_answer_that_was_cut_says_where(run):
    assert run("2-eval.py", "--prompt", "你好", "--max_new_tokens", "2")[1].endswith(" …(cut at --max_new_tokens 2)\n")
    long = run("2-eval.py", "--prompt", "字" * 40, "--max_new_tokens", "99")[1]
    assert long.endswith(" …(cut at the context's 64 tokens)\n")


def test_after_quickstart_its_model_is_found_without_flags(monkeypatch, capsys, out_dir, tmp_path):
    def first_line(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, "--out_dir", str(tmp_path), "--prompt", "好", *COMMON[4:], *flags])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        captured = capsys.readouterr()
        return captured.out.splitlines()[0].split(": ")[0] if caught.value.code == 0 else captured.err

    def copy(stage, target):
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".pth", ".json"):
            shutil.copy(out_dir / f"{stage}_32{suffix}", tmp_path / f"{target}_32{suffix}")

    copy("pretrain", "quickstart/pretrain")
    assert first_line("0-eval_pretrain.py") == str(tmp_path / "quickstart/pretrain_32.pth")
    assert "run 3-full_sft.py first" in first_line("2-eval.py")
    copy("single_chat/full_sft", "quickstart/single_chat/full_sft")
    assert first_line("2-eval.py") == str(tmp_path / "quickstart/single_chat/full_sft_32.pth")
    copy("multi_chat/full_sft", "quickstart/multi_chat/full_sft")
    (tmp_path / "quickstart/multi_chat/full_sft_32.resume.pth").touch()
    assert first_line("2-eval.py") == str(tmp_path / "quickstart/multi_chat/full_sft_32.pth")
    assert "no such checkpoint" in first_line("2-eval.py", "--dim", "64"), "a shape that is asked for is not another"
    copy("single_chat/full_sft", "single_chat/full_sft")
    assert first_line("2-eval.py") == str(tmp_path / "single_chat/full_sft_32.pth")


def test_a_pretrained_checkpoint_in_a_chat_gives_a_hint(run, out_dir, tmp_path):
    folder = tmp_path / "with blank"
    folder.mkdir()
    for suffix in (".pth", ".json"):
        shutil.copy(out_dir / f"pretrain_32{suffix}", folder)
    path = folder / "pretrain_32.pth"
    code, out, err = run("2-eval.py", "--checkpoint", path, "--prompt", "好")
    assert code == 0 and f"python 0-eval_pretrain.py --checkpoint '{path}'" in err
    assert "0-eval" not in run("0-eval_pretrain.py", "--checkpoint", path, "--prompt", "好")[2]
    assert "0-eval" not in run("2-eval.py", "--prompt", "好")[2]


def test_a_text_file_of_questions_is_answered_line_by_line(run, tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("\ufeff你好\n\n再见\r\n", encoding="utf-8")
    code, out, err = run("2-eval.py", "--prompt_file", path)
    assert code == 0 and out.count("\nQ: ") == 2 and "\nQ: 你好\n" in out and "\nQ: 再见\n" in out, err


def prompts_seen(monkeypatch):
    """Texts of all prompts that reach the engine."""
    from model.inference.engine import Engine

    seen, add = [], Engine.add

    def record(self, prompt_ids, *more):
        seen.append(self.tokenizer.decode(list(prompt_ids)))
        return add(self, prompt_ids, *more)

    monkeypatch.setattr(Engine, "add", record)
    return seen


def test_a_conversation_remembers_clears_and_leaves_cleanly(run, monkeypatch):
    seen = prompts_seen(monkeypatch)
    code, out, err = run(
        "2-eval.py",
        "--interactive",
        "--max_new_tokens",
        "2",
        stdin=("你好", "", "/clear", "再见", "回来", "/exit", "x"),
    )
    assert code == 0 and len(seen) == 3, err
    assert "你好" not in seen[1] and seen[1].count("<s>user") == 1
    assert seen[2].startswith("<s>user\n再见</s>\n<s>assistant\n") and seen[2].endswith(
        "<s>user\n回来</s>\n<s>assistant\n"
    )
    for leave in (EOFError(), KeyboardInterrupt()):
        assert run("2-eval.py", "--interactive", stdin=(leave,))[0] == 0
    assert run("2-eval.py", "--interactive", stdin=("/help",))[1].count("/clear forgets the conversation, ") == 2


def test_interactive_without_standard_input():
    command = ["sh", "-c", f"exec {shlex.quote(sys.executable)} 2-eval.py --interactive <&-"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert_one_line_error(process, "--interactive: there is no standard input", code=2)


def test_a_huge_seed_and_a_temperature_next_to_nothing(run):
    answers = {run("2-eval.py", "--temperature", value)[1] for value in ("0", "1e-39", "1e-320")}
    assert len(answers) == 1
    assert run("2-eval.py", "--prompt", "好", "--seed", 2**70)[0] == 0


def test_history_zero_forgets_and_the_oldest_turns_go_first(run, monkeypatch):
    seen = prompts_seen(monkeypatch)
    run("2-eval.py", "--interactive", "--history", "0", "--max_new_tokens", "2", stdin=("你好", "再见"))
    assert [text.count("<s>user") for text in seen] == [1, 1]
    seen.clear()
    code, out, err = run(
        "2-eval.py", "--interactive", stdin=("一二三四五六七八九十" * 2, "一二三四五六七八九十" * 2, "再见")
    )
    assert code == 0 and "did not fit the context" in err
    assert seen[2].endswith("<s>user\n再见</s>\n<s>assistant\n")


def test_a_question_too_long_does_not_end_the_conversation(run, monkeypatch):
    seen = prompts_seen(monkeypatch)
    code, out, err = run("2-eval.py", "--interactive", stdin=("字" * 200, "你好"))
    assert code == 1 and "context only 64" in err and seen[-1].count("你好") == 1, "no terminal: the exit code tells"


def test_ctrl_c_during_an_answer_stops_only_the_answer(run, monkeypatch):
    from model.inference.engine import Engine

    step, calls = Engine.step, []

    def interrupted(self):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    seen = prompts_seen(monkeypatch)
    code, out, err = run("2-eval.py", "--interactive", stdin=("你好", "再见"))
    assert code == 0 and "(stopped)" in out and len(calls) > 3 and not calls[0].has_work
    answer = out.split("A: ")[1].split(" (stopped)")[0]
    assert answer and f"<s>assistant\n{answer}</s>\n<s>user\n再见" in seen[1], "as far as it came it was said"


def test_the_system_prompt_of_a_conversation(run, monkeypatch):
    seen = prompts_seen(monkeypatch)
    lines = ("/system  用一句话回答。", "你好", "/clear", "再见", "/system", "回来", "/sytem 是什么", "/clar")
    code, out, err = run("2-eval.py", "--interactive", "--max_new_tokens", "2", stdin=lines)
    assert code == 0 and [text.count("<s>system\n用一句话回答。</s>") for text in seen] == [1, 1, 0, 0], err
    assert "再见" in seen[2] and seen[3].count("/sytem 是什么") == 1 and "(/clar: no such command" in out


def test_bad_input_gets_one_line(run, tmp_path, out_dir):
    for script in ("0-eval_pretrain.py", "2-eval.py"):
        failed(run(script, "--checkpoint", tmp_path / "none.pth"), "none.pth", "no such checkpoint")
        failed(run(script, "--out_dir", tmp_path), "_32.pth", "no such checkpoint")
        failed(run(script, "--preset", "minimind-tiny", "--dim", "192"), "_192.pth", "_32.pth)", "--checkpoint")
        failed(run(script, "--prompt", "  "), "--prompt is empty", code=2)
        failed(run(script, "--prompt", "\udcff"), "not UTF-8", code=2)
        failed(run(script, "--prompt", "字" * 200), "tokens but the context only 64")
        failed(run(script, "--checkpoint", out_dir / "other_words.pth"), "100 words", "tokenizer")
        failed(run(script, "--tokenizer_path", tmp_path), "tokenizer")
        failed(run(script, "--top_p", "0"), "top_p", code=2)
        failed(run(script, "--rope_scaling", "yarn"), "--max_seq_len", code=2)
        failed(run(script, "--device", "cuda:77"), "--device cuda:77")
        for device in ("meta", "xpu", "vulkan", "none"):
            failed(run(script, "--device", device), f"--device {device}: not", "use auto, cpu", code=2)
        failed(run(script, "--max_seq_len", 10**12, "--rope_scaling", "yarn"), f"{10**12}: a request needs ", " GB")
        failed(run(script, "--prompt_file", tmp_path / "none.txt"), "none.txt: no such file")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no question"),
        ("a.txt", b"ok\n\xff\n", "a.txt:2: not UTF-8"),
        ("a.jsonl", b'{"q": "x"}\n{"q": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"question": "x"}\n', 'a.jsonl:1: has no text "q"'),
        ("a.jsonl", b'{"q": "x", "history": ["y"]}\n', "a.jsonl:1"),
        ("a.jsonl", b'{"q": "x", "history": "[[1, 2]]"}\n', "a.jsonl:1"),
        ("a.jsonl", b'{"q": "x", "history": {"y": "z"}}\n', "a.jsonl:1"),
        ("a.jsonl", b'{"q": "x", "history": ' + b"[" * 100_000 + b"}\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"q": "x", "history": "' + b"[" * 100_000 + b'"}\n', "a.jsonl:1"),
        ("a.jsonl", b'{"q": "x", "history": [["\\udc00", "y"]]}\n', "a.jsonl:1: half a surrogate pair"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"q": "x"}\n' * 9, mtime=0)[:-5],
            "a.jsonl.gz: the compressed data is damaged or cut",
        ),
        ("a.jsonl", b'{"q": "x", "answer": 3}\n', "a.jsonl:1"),
    ],
)
def test_broken_question_files_are_named_with_the_line(run, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    failed(run("2-eval.py", "--prompt_file", tmp_path / name), message)


def test_longer_context_by_rope_scaling(run):
    code, out, err = run("2-eval.py", "--max_seq_len", "256", "--rope_scaling", "linear", "--prompt", "字" * 100)
    assert code == 0 and "context 256 tokens" in out, err


def test_wrong_usage_is_exit_code_2(out_dir):
    assert_one_line_error(run_script("2-eval.py", "--prompt", "x", "--interactive"), "not allowed with", code=2)


def test_the_report_on_two_checkpoints(run, out_dir, tmp_path):
    words = ("--report", tmp_path / "r.html", "--dtype", "float32", "--seed", "7")
    pair = [out_dir / f"{name}_chat/full_sft_32.pth" for name in ("single", "multi")]
    several = [word for path in pair for word in ("--checkpoint", path)]
    code, out, err = run("2-eval.py", *several, *words, "--prompt", "你好", "--prompt", "再|见")
    assert code == 0, err
    markdown, page = ((tmp_path / f"r.{suffix}").read_text("utf-8") for suffix in ("md", "html"))
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith(("| 你好", "| 再"))]
    assert [row[0] for row in rows] == ["你好", "再\\|见"] and all(len(row) == 3 and row[1] == row[2] for row in rows)
    alone = run("2-eval.py", "--checkpoint", pair[0], *words[2:], "--prompt", "你好")[1].split("A: ")[1]
    assert html.escape(alone.split(" …(cut")[0].strip()) in page, "in float32 the batch changes nothing"
    assert "| seed | 7 |" in markdown and "| questions | --prompt |" in markdown
    assert all(f'<th scope="col">{path}</th>' in page for path in pair)

    failed(run("2-eval.py", *words), "r.md: is there already; give --overwrite")
    code, out, err = run("2-eval.py", *words, "--overwrite")
    assert code == 0 and (tmp_path / "r.md").read_text("utf-8").count("\n| ") > len(rows) + 20, err
    assert "multi_chat" in out.splitlines()[0] and "fixed list" in (tmp_path / "r.md").read_text("utf-8")


def test_the_report_on_a_file_of_questions(run, tmp_path):
    path = tmp_path / "questions.jsonl"
    row = {"q": "那广东呢？", "history": [["一", "二"], ["三", "四"]], "answer": ["广州"]}
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    code, out, err = run("2-eval.py", "--prompt_file", path, "--report", tmp_path / "r.md", "--history", "1")
    assert code == 0 and "0.0% of 1" in out, err
    markdown = (tmp_path / "r.md").read_text("utf-8")
    assert "| user: 三<br>assistant: 四<br>那广东呢？<br><sub>expected: 广州</sub> |" in markdown


def test_flags_of_the_report_that_do_not_go_together(run, tmp_path, out_dir):
    report, judge = ("--report", tmp_path / "r.md"), ("--judge", "http://127.0.0.1:9/v1")
    for words, *parts in (
        (("--checkpoint", "a", "--checkpoint", "b"), "a second --checkpoint needs --report FILE"),
        (judge, "--judge needs --report"),
        (("--judge_model", "m"), "--judge_model needs --report"),
        (("--overwrite",), "--overwrite needs --report"),
        ((*report, "--interactive"), "--report does not go with --interactive"),
        ((*report, "--json"), "--report does not go with --json"),
        ((*report, "--judge_model", "m"), "--judge URL"),
        ((*report, "--judge", "x", "--judge_model", "m"), "--judge 'x': expected a URL"),
        (("--report", tmp_path / "r.txt"), "r.txt", ".md or .html"),
    ):
        failed(run("2-eval.py", *words), *parts, code=2)
    result = run("2-eval.py", *report, *judge, "--judge_model", "m")
    failed(result, "--judge http://127.0.0.1:9/v1: cannot be reached")
    assert not result[1], "the judge is asked before a model is loaded"
    failed(run("2-eval.py", *report, "--checkpoint", out_dir / "none.pth"), "none.pth: no such checkpoint")
    assert not list(tmp_path.iterdir())
