"""An exam as a notebook gives it: settings, a model, a summary that says which weights answered what."""

import hashlib

import pytest

from model.errors import UserError
from model.evaluation.exam import exam_directory, exam_subjects, sit_exam
from model.LMConfig import LMConfig
from model.model import Transformer
from model.settings import ExamSettings


@pytest.fixture
def exam(tmp_path):
    """A folder with two subjects of C-Eval and one that is not, four questions and one example each."""
    for split in ("val", "dev"):
        (tmp_path / split).mkdir()
        for name in ("law", "logic", "zoo"):
            rows = (f"{n},问{n}？,{n}甲,{n}乙,{n}丙,{n}丁,{answer}\n" for n, answer in enumerate("ABBD"))
            text = "id,question,A,B,C,D,answer\n" + "".join(rows)
            (tmp_path / split / f"{name}_{split}.csv").write_text(text, encoding="utf-8")
    return tmp_path


def test_the_summary_says_what_was_asked_how_and_of_which_weights(exam, tokenizer, capsys):
    shape = dict(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, max_seq_len=256)
    model, weights = Transformer(LMConfig(**shape, vocab_size=len(tokenizer))), b"of a folder"
    (exam / "folder").mkdir()
    (exam / "folder/model.safetensors").write_bytes(weights)
    settings = ExamSettings(data_dir=str(exam), subjects="zoo,law", few_shot=1, shuffle_options=3)
    subjects = exam_subjects(settings)
    summary, table, answers = sit_exam(model, tokenizer, subjects, settings, exam / "folder", "multi_chat/full_sft")
    expected = {
        "benchmark": "C-Eval, 1 of 52 subjects and 1 others",
        "subjects": 2,
        "subjects_of_benchmark": 52,
        "checkpoint": str(exam / "folder"),
        "checkpoint_sha256": hashlib.sha256(weights).hexdigest(),
        "prompt_format": "chat",
        "few_shot": 1,
        "shuffle_options": 3,
        "mean_examples": 1.0,
        "questions": 8,
        "correct": sum(row["is_right"] for row in answers),
    }
    assert summary | expected == summary and summary["questions_per_second"] > 0
    assert table.index.tolist() == ["law", "zoo"] and len(answers) == 8
    right = {f"{n}{option}" for n, option in zip(range(4), "甲乙乙丁")}
    assert {row[row["answer"]] for row in answers} == right and "".join(row["answer"] for row in answers) != 2 * "ABBD"
    title = f"{expected['benchmark']}, {exam / 'folder'}, chat prompts, up to 1 examples, options shuffled by seed 3"
    assert capsys.readouterr().out == f"{title}, context 256 tokens\n"


@pytest.mark.parametrize(
    "asked, stage, prompt",
    [("auto", "pretrain", "<s>下面"), ("auto", None, "<s>user"), ("chat", "pretrain", "<s>user")]
    + [("plain", "multi_chat/full_sft", "<s>下面"), ("auto", "dpo", "<s>user")],
)
def test_the_stage_decides_on_the_prompts_unless_the_settings_do(exam, tokenizer, asked, stage, prompt):
    model = Transformer(LMConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=len(tokenizer)))
    (exam / "x.pth").write_bytes(b"")
    settings = ExamSettings(data_dir=str(exam), subjects="zoo", prompt_format=asked)
    summary, _, answers = sit_exam(model, tokenizer, exam_subjects(settings), settings, exam / "x.pth", stage)
    assert all(row["prompt"].startswith(prompt) for row in answers)
    assert summary["benchmark"] == str(exam) and summary["subjects_of_benchmark"] is None


def test_the_benchmark_s_own_folder_and_all_subjects_are_the_default(exam):
    assert str(exam_directory(ExamSettings())) == "ceval/ceval-exam"
    assert str(exam_directory(ExamSettings(benchmark="cmmlu"))) == "cmmlu"
    assert [subject.name for subject in exam_subjects(ExamSettings(data_dir=str(exam)))] == ["logic", "law", "zoo"]
    with pytest.raises(UserError, match="--subjects ''"):
        exam_subjects(ExamSettings(data_dir=str(exam), subjects=""))
