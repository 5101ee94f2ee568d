"""The exam against a plain implementation: prompts written out by hand, one forward pass a question, plain counting."""

import csv
import json
import math
import random

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import PLACES, THINGS
from model.errors import UserError
from model.evaluation.batches import length_batches
from model.evaluation.bits_per_byte import measure_bits_per_byte, read_texts, windows
from model.evaluation.ceval import (
    BENCHMARKS,
    LETTERS,
    Question,
    Subject,
    encode_prompt,
    letter_ids,
    read_exam,
    read_questions,
    shuffle_options,
    take_exam,
)
from model.evaluation.exam_results import (
    print_result,
    results_folder,
    summarise,
    verdict,
    wilson_interval,
    write_results,
)
from model.evaluation.subjects import CEVAL, CMMLU
from model.LMConfig import LMConfig
from model.model import Transformer

COLUMNS = ("question", "A", "B", "C", "D", "answer")
HEADER = "id,question,A,B,C,D,answer\n"
PLAIN = """<s>下面是逻辑学考试的单项选择题，每题只有一个正确选项，请回答它的字母。
一加一等于几？
A. 一
B. 二
C. 三
D. 四
答案：B

二加二等于几？
A. 4
B. 5
C. 6
D. 7
答案："""
CHAT = """<s>user
下面是逻辑学考试的单项选择题，每题只有一个正确选项，请回答它的字母。
一加一等于几？
A. 一
B. 二
C. 三
D. 四
答案：</s>
<s>assistant
B</s>
<s>user
二加二等于几？
A. 4
B. 5
C. 6
D. 7
答案：</s>
<s>assistant
"""
ONE = Question("一加一等于几？", ("一", "二", "三", "四"), "B", "f:2")
TWO = Question("二加二等于几？", ("4", "5", "6", "7"), "A", "f:3")


def tiny_model(vocab_size, context=512, **fields):
    torch.manual_seed(0)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=context, dropout=0.2)
    model = Transformer(LMConfig(vocab_size=vocab_size, **shape | fields))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def made_up_subjects(examples=3):
    chance = random.Random(0)

    def question(number):
        text = "".join(chance.choice(PLACES + THINGS) for _ in range(chance.randint(1, 30))) + "？"
        return Question(text, tuple(chance.sample(THINGS, 4)), chance.choice(LETTERS), f"f:{number}")

    return [
        Subject(name, title, "STEM", [question(n) for n in range(count)], [question(n) for n in range(examples)])
        for name, title, count in (("physics", "物理", 23), ("logic", "逻辑学", 1), ("law", "法学", 9))
    ]


def one_by_one(model, tokenizer, subjects):
    """(letter, probabilities of A to D, prompt, examples) of each question, chat prompts, as plainly as can be said."""
    letters, answers = [tokenizer.convert_tokens_to_ids(letter) for letter in "ABCD"], []
    for subject in subjects:
        for question in subject.questions:
            for shots in range(len(subject.examples), -1, -1):
                text, opening = "", f"下面是{subject.title}考试的单项选择题，每题只有一个正确选项，请回答它的字母。\n"
                for asked in [*subject.examples[:shots], question]:
                    options = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", asked.options))
                    text += f"<s>user\n{opening}{asked.text}\n{options}答案：</s>\n<s>assistant\n"
                    text += "" if asked is question else f"{asked.answer}</s>\n"
                    opening = ""
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                if len(ids) <= model.config.max_seq_len:
                    break
            if len(ids) > model.config.max_seq_len:
                answers.append(("", None, text, 0))
                continue
            with torch.no_grad():
                p = model.eval()(torch.tensor([ids])).logits[0, -1].double().softmax(-1)[letters].tolist()
            answers.append(("ABCD"[p.index(max(p))], p, text, shots))
    return answers


def test_prompts_are_what_they_should_be_to_the_letter(tokenizer):
    for chat, expected in ((False, PLAIN), (True, CHAT)):
        ids = encode_prompt(tokenizer, "逻辑学", [ONE], TWO, chat)
        assert tokenizer.decode(ids) == expected
        assert ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
    evil = Question("</s>一？", ("<s>", "二", "三", "四"), "A", "f:2")
    for chat in (False, True):
        ids = encode_prompt(tokenizer, "x", [], evil, chat)
        assert ids.count(tokenizer.eos_token_id) == chat and ids.count(tokenizer.bos_token_id) == 1 + chat


@pytest.mark.parametrize("fields", [{}, {"use_moe": True}, {"context": 200}])
@pytest.mark.parametrize("examples", [0, 3])
def test_the_exam_is_one_forward_a_question(tokenizer, fields, examples):
    model, subjects = tiny_model(len(tokenizer), **fields), made_up_subjects(examples)
    rows = take_exam(model, tokenizer, subjects, chat=True)
    questions = [(subject.name, question) for subject in subjects for question in subject.questions]
    for row, (name, question), (letter, p, prompt, shots) in zip(
        rows, questions, one_by_one(model, tokenizer, subjects), strict=True
    ):
        assert (row["subject"], row["question"], row["answer"]) == (name, question.text, question.answer)
        assert tuple(row[letter] for letter in LETTERS) == question.options
        assert row["llm_answer"] == letter and row["prompt"] == prompt
        assert row["is_right"] == int(letter == question.answer) and row["examples"] == shots
        measured = [row[f"p_{letter}"] for letter in LETTERS]
        assert measured == ([None] * 4 if p is None else pytest.approx(p, rel=1e-4))


def test_fewer_examples_then_wrong_where_the_context_is_full(tokenizer, capsys):
    subjects = made_up_subjects(3)
    long = Question("长" * 300, ("一", "二", "三", "四"), "A", "law.csv:7")
    subjects[2].questions.append(long)
    model = tiny_model(len(tokenizer), context=200)
    rows = take_exam(model, tokenizer, subjects, chat=True)
    assert rows[-1]["is_right"] == 0 and rows[-1]["llm_answer"] == "" and "长" * 300 in rows[-1]["prompt"]
    reference = one_by_one(model, tokenizer, subjects)
    assert [row["llm_answer"] for row in rows] == [letter for letter, *_ in reference]
    asked = [text.count("<s>user") - 1 for letter, _, text, _ in reference if letter]
    err = capsys.readouterr().err
    unfit = [q.place for s in subjects for q in s.questions if len("".join([q.text, *q.options])) > 150]
    assert f"{len(unfit)} questions did not fit the context of 200 tokens, counted as wrong: " in err
    assert "law.csv:7" in err
    summary, _ = summarise(rows, subjects)
    assert summary["not_fitting"] == len(unfit) == len(rows) - len(asked) == len(rows) - summary["asked"] > 0
    assert summary["mean_examples"] == pytest.approx(sum(asked) / len(asked)) and 0 < sum(asked) < 3 * len(asked)
    assert summary["with_fewer_examples"] == sum(count < 3 for count in asked) > 0


def test_a_prompt_that_fills_the_context_is_asked(tokenizer):
    short = Question("一？", ("一", "二", "三", "四"), "B", "f:2")
    subject = Subject("x", "x", "other", [ONE, short], [])
    needed = len(encode_prompt(tokenizer, "x", [], ONE, True))
    for context, answered in ((needed, True), (needed - 1, False)):
        rows = take_exam(tiny_model(len(tokenizer), context=context), tokenizer, [subject], chat=True)
        assert bool(rows[0]["llm_answer"]) == answered and rows[1]["llm_answer"]


def test_an_exam_of_which_no_question_fits_has_no_result(tokenizer):
    with pytest.raises(UserError, match="no question fits the model's context of 16 tokens; --max_seq_len"):
        take_exam(tiny_model(len(tokenizer), context=16), tokenizer, made_up_subjects(), chat=True)


def test_weights_that_give_no_number_are_no_answer(tokenizer):
    model = tiny_model(len(tokenizer))
    model.norm.weight.data[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        take_exam(model, tokenizer, made_up_subjects(), chat=True)
    with pytest.raises(UserError, match="not finite"):
        measure_bits_per_byte(model, tokenizer, ["文"])


def test_a_letter_of_two_tokens_is_refused(tokenizer, monkeypatch):
    assert [tokenizer.convert_ids_to_tokens(token_id) for token_id in letter_ids(tokenizer)] == list("ABCD")
    monkeypatch.setattr("model.evaluation.ceval.encode_text", lambda _, text: [1, 2] if text == "C" else [3])
    with pytest.raises(UserError, match="no single token"):
        letter_ids(tokenizer)


def test_shuffled_options_keep_the_right_one_and_depend_on_seed_subject_and_number_alone():
    subjects = made_up_subjects()
    once, again, other = (shuffle_options(subjects, seed) for seed in (1, 1, 2))
    assert once == again != other and shuffle_options(subjects[1:], 1) == once[1:]
    orders = set()
    for before, after in zip(subjects, once):
        assert after.examples == before.examples
        for old, new in zip(before.questions, after.questions, strict=True):
            assert sorted(new.options) == sorted(old.options) and (new.text, new.place) == (old.text, old.place)
            right = old.options["ABCD".index(old.answer)]
            assert new.options["ABCD".index(new.answer)] == right
            orders.add(tuple(old.options.index(option) for option in new.options))
    assert len(orders) > 12, "24 orders, 33 questions"
    twins = [Subject(name, name, "other", [TWO] * 9, []) for name in ("physics", "law")]
    assert len({tuple(subject.questions) for subject in shuffle_options(twins, 1)}) == 2


def test_questions_share_forward_passes_and_their_beginning_is_computed_once(tokenizer):
    model, subjects, passes = tiny_model(len(tokenizer)), made_up_subjects(3)[:1], []
    model.register_forward_pre_hook(lambda _, inputs, options: passes.append(inputs[0].shape), with_kwargs=True)
    rows = take_exam(model, tokenizer, subjects, chat=True)
    prompts = [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in rows]
    assert len(passes) <= 8 < len(prompts) and sum(batch for batch, _ in passes[1:]) == len(prompts)
    assert sum(batch * length for batch, length in passes) < sum(map(len, prompts)) / 2
    assert all(batch * length <= 512 for batch, length in passes)


# reading


def exam_folder(path, subjects=("law", "logic", "zoo", "accountant"), cmmlu=False):
    """Two questions and two examples of each subject, in C-Eval's layout or CMMLU's."""
    for split, ending in (("test", ".csv"), ("dev", ".csv")) if cmmlu else (("val", "_val.csv"), ("dev", "_dev.csv")):
        (path / split).mkdir(parents=True)
        for name in subjects:
            header = ",Question,A,B,C,D,Answer\n" if cmmlu else HEADER
            text = header + f'0,{name} {split}？,NA,null,1.0,\' x\',A\n1,"一\n二, ""三""？",1,2,3,4,D\n'
            (path / split / f"{name}{ending}").write_text(text, encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_subjects_come_in_the_table_s_order_and_cells_as_they_are(tmp_path, name, capsys):
    exam = exam_folder(tmp_path, ("zoo", "virology", "law", "logic", "arts", "ark"), cmmlu=name == "cmmlu")
    subjects = read_exam(BENCHMARKS[name], exam, few_shot=1)
    known = {"ceval": ["logic", "law"], "cmmlu": ["virology", "arts"]}[name]
    others = sorted({"zoo", "virology", "law", "logic", "arts", "ark"} - {*known})
    assert [subject.name for subject in subjects] == known + others
    table = {"ceval": CEVAL, "cmmlu": CMMLU}[name]
    assert subjects[0].title == {"ceval": "逻辑学", "cmmlu": "病毒学"}[name]
    assert [s.category for s in subjects] == {"ceval": ["humanities"] * 2, "cmmlu": ["STEM", "humanities"]}[name] + [
        "other"
    ] * 4
    assert subjects[-1].title == "zoo"
    first, second = subjects[0].questions
    assert first.options == ("NA", "null", "1.0", "' x'") and first.answer == "A"
    assert second.text == '一\n二, "三"？' and second.place.endswith(":3")
    assert [example.text for example in subjects[0].examples] == [f"{known[0]} dev？"]
    count = sum(map(len, table.values()))
    missing, more = capsys.readouterr().err.splitlines()
    assert missing.startswith(f"note: {count - 2} of {BENCHMARKS[name].title}'s {count} subjects are missing: ")
    assert {*missing.split(": ")[-1].split(", ")} == {n for names in table.values() for n in names} - {*known}
    assert more == f"note: the totals have subjects that are not {BENCHMARKS[name].title}'s: {', '.join(others)}"
    chosen = read_exam(BENCHMARKS[name], exam, wanted=["zoo", known[1]])
    assert [subject.name for subject in chosen] == [known[1], "zoo"]
    assert capsys.readouterr().err == "" and chosen[0].examples == []


@pytest.mark.parametrize("name, cmmlu", [("summary", False), ("Summary", True), ("", False), ("", True)])
def test_a_subject_whose_results_would_be_the_summary_or_nameless_is_refused(tmp_path, name, cmmlu):
    benchmark, exam = BENCHMARKS["cmmlu" if cmmlu else "ceval"], exam_folder(tmp_path, ("law", name), cmmlu)
    with pytest.raises(UserError, match=f"{name}{benchmark.questions[1]}: no name for a subject"):
        read_exam(benchmark, exam)
    assert [subject.name for subject in read_exam(benchmark, exam, wanted=["law"])] == ["law"]


def test_an_exam_is_called_by_what_was_asked():
    def name(*names):
        return BENCHMARKS["ceval"].name_of([Subject(each, each, "other", [], []) for each in names], "folder")

    every = [each for names in CEVAL.values() for each in names]
    assert name(*every) == "C-Eval" and name("zoo", "ark") == "folder"
    assert name("law") == "C-Eval, 1 of 52 subjects" and name(*every[1:]) == "C-Eval, 51 of 52 subjects"
    assert name(*every, "zoo") == "C-Eval, 52 of 52 subjects and 1 others"
    assert name("law", "zoo", "ark") == "C-Eval, 1 of 52 subjects and 2 others"


def test_an_exam_of_one_s_own_is_missing_nothing(tmp_path, capsys):
    assert [s.name for s in read_exam(BENCHMARKS["ceval"], exam_folder(tmp_path, ("b", "a")))] == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_the_tables_name_each_subject_once():
    for table, sizes in ((CEVAL, (20, 10, 11, 11)), (CMMLU, (17, 22, 13, 15))):
        assert list(table) == ["STEM", "social science", "humanities", "other"]
        assert tuple(map(len, table.values())) == sizes
        for every in (list, dict.values):
            names = [name for subjects in table.values() for name in every(subjects)]
            assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "f.csv: is empty"),
        (HEADER.encode(), "f.csv: is empty, it has no question"),
        (b"id,question,A,B,C,answer\n0,q,1,2,3,A\n", "f.csv:1: no column 'D'; columns found: id, question, A, B, C"),
        (b"id,question,A,B,C,D\n0,q,1,2,3,4\n", "f.csv:1: no column 'answer'"),
        (b"id,question,A,B,C,D,E,answer\n0,q,1,2,3,4,5,A\n", "f.csv:1: a fifth option, column 'E'"),
        (b"id,question,A,B,C,D,e,answer\n0,q,1,2,3,4,5,A\n", "f.csv:1: a fifth option, column 'e'"),
        (b"id,question,A,B,C,D,answer, F\n0,q,1,2,3,4,A,5\n", "f.csv:1: a fifth option, column ' F'"),
        (b"id,question,A,B,C,D,answer,answer\n0,q,1,2,3,4,A,B\n", "f.csv:1: two columns 'answer'; columns found: id"),
        (HEADER.encode() + b"0,q,1,2,3,4,A\n1,,1,2,3,4,A\n", "f.csv:3: column 'question' is empty"),
        (HEADER.encode() + b"0,q,1,2, ,4,A\n", "f.csv:2: column 'C' is empty"),
        (HEADER.encode() + b"0,q,1,2,3,4,A\n1,q,1,2,3,4,5,A\n", "f.csv:3: has 8 cells but the header 7"),
        (HEADER.encode() + b'0,"q\nq",1,2,3,4,A\n1,q,1,2,3,A\n', "f.csv:4: has 6 cells but the header 7"),
        (HEADER.encode() + b"0,q,1,2,3,4,E\n", "f.csv:2: the answer is 'E', expected one of A, B, C, D"),
        (HEADER.encode() + b"0,q,1,2,3,4,\n", "f.csv:2: the answer is ''"),
        (HEADER.encode() + b"0,q,1,2,3,4,AB\n", "f.csv:2: the answer is 'AB'"),
        (HEADER.encode() + b"0,\xb5\xda,1,2,3,4,A\n", "f.csv:2: not UTF-8"),
        (HEADER.encode() + b'0,"q,1,2,3,4,A\n', "f.csv:2: broken CSV"),
    ],
)
def test_a_file_that_is_no_exam_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "f.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_questions(path, COLUMNS)
    assert str(caught.value).startswith(str(tmp_path / message.split(": ")[0])) and message in str(caught.value)


def test_missing_folders_subjects_and_examples(tmp_path):
    ceval = BENCHMARKS["ceval"]
    with pytest.raises(UserError, match="val: no such folder; unpack ceval-exam.zip .* --data_dir"):
        read_exam(ceval, tmp_path)
    exam = exam_folder(tmp_path)
    with pytest.raises(UserError, match="--subjects 'nonsense': .* has logic, law, accountant, zoo"):
        read_exam(ceval, exam, wanted=["law", "nonsense"])
    with pytest.raises(UserError, match="logic_dev.csv: has 2 examples, fewer than --few_shot 3"):
        read_exam(ceval, exam, few_shot=3)
    (exam / "dev" / "law_dev.csv").unlink()
    assert len(read_exam(ceval, exam)) == 4
    with pytest.raises(UserError, match="law_dev.csv: no such file"):
        read_exam(ceval, exam, few_shot=1)
    for path in (exam / "val").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="has no <subject>_val.csv"):
        read_exam(ceval, exam)


# results


def test_wilson_interval_where_it_has_a_short_form():
    """None right: 0 to z^2 / (n + z^2); half right: 1/2 -+ z / (2 sqrt(n + z^2)); all right mirrors none."""
    assert wilson_interval(0, 10) == pytest.approx((0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((10 / 13.841459, 1), abs=1e-6)
    half = 1.959964 / (2 * math.sqrt(13.841459))
    assert wilson_interval(5, 10) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


@given(st.integers(0, 300), st.integers(1, 300))
def test_wilson_interval_holds_the_shares_that_would_not_reject_the_count(correct, total):
    """Its ends are the shares p at which the count lies exactly 1.96 standard deviations of p from total * p."""
    correct = min(correct, total)
    for p in wilson_interval(correct, total):
        if 1e-9 < p < 1 - 1e-9:
            deviations = abs(correct - total * p) / math.sqrt(total * p * (1 - p))
            assert deviations == pytest.approx(1.959964, abs=1e-5)


def test_verdicts():
    assert verdict(344, 1346) == "not distinguishable from guessing"
    assert verdict(374, 1346) == "better than guessing" and verdict(300, 1346) == "worse than guessing"
    # 1346 * 0.25 = 336.5; one standard deviation of guessing is 15.9 answers
    assert verdict(367, 1346) == verdict(306, 1346) == "not distinguishable from guessing"
    assert verdict(369, 1346) == "better than guessing" and verdict(304, 1346) == "worse than guessing"


def made_up_answers(subjects):
    chance = random.Random(1)
    return [
        {"subject": s.name, "question": q.text, **dict(zip(LETTERS, q.options)), "answer": q.answer, "prompt": "…\n"}
        | {"llm_answer": (letter := chance.choice(LETTERS)), "is_right": int(letter == q.answer)}
        | {f"p_{letter}": chance.random() for letter in LETTERS}
        | {"examples": len(s.examples)}
        for s in subjects
        for q in s.questions
    ]


def test_totals_are_plain_counts(tmp_path, capsys):
    subjects = made_up_subjects()
    subjects = [Subject(s.name, s.title, c, s.questions, []) for s, c in zip(subjects, ("STEM", "humanities", "STEM"))]
    answers = made_up_answers(subjects)
    summary, table = summarise(answers, subjects)
    right = {s.name: sum(a["is_right"] for a in answers if a["subject"] == s.name) for s in subjects}
    assert table.index.tolist() == ["physics", "logic", "law"] and table["correct"].to_dict() == right
    assert table["questions"].tolist() == [23, 1, 9] and table["accuracy"].tolist()[0] == right["physics"] / 23
    assert summary["correct"] == sum(right.values()) and summary["questions"] == 33
    assert summary["accuracy"] == summary["correct"] / 33
    assert list(summary["by_category"]) == ["STEM", "humanities"]
    stem = right["physics"] + right["law"]
    assert summary["by_category"]["STEM"] == {"correct": stem, "questions": 32, "accuracy": stem / 32}
    keys = [answer["answer"] for answer in answers]
    most = max("ABCD", key=keys.count)
    assert (summary["commonest_letter"], summary["commonest_letter_accuracy"]) == (most, keys.count(most) / 33)
    said = [row["llm_answer"] for row in answers]
    assert summary["letters_answered"] == {letter: said.count(letter) for letter in "ABCD"}
    assert json.loads(json.dumps(summary)) == summary

    summary |= {"benchmark": "C-Eval", "checkpoint": "x.pth", "prompt_format": "plain", "few_shot": 2}
    summary["shuffle_options"] = 7
    (tmp_path / "r").mkdir()
    write_results(tmp_path / "r", summary, table, answers)
    names = {"summary.csv", "summary.json", "summary.md", "summary.png", "physics.csv", "logic.csv", "law.csv"}
    assert {path.name for path in (tmp_path / "r").iterdir()} == names
    assert json.loads((tmp_path / "r/summary.json").read_text("utf-8")) == summary
    written = pd.read_csv(tmp_path / "r/summary.csv", index_col="subject")
    assert written["correct"].to_dict() == right and written.loc["law", "name"] == "法学"
    with open(tmp_path / "r/law.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    expected = [
        "question",
        *"ABCD",
        "answer",
        "prompt",
        "llm_answer",
        "is_right",
        "p_A",
        "p_B",
        "p_C",
        "p_D",
        "examples",
    ]
    assert list(rows[0]) == expected and rows[0]["prompt"] == "…\n"
    assert [row["question"] for row in rows] == [q.text for q in subjects[2].questions]
    text = (tmp_path / "r/summary.md").read_text("utf-8")
    assert f"总题数: 33  总正确数: {summary['correct']}  总正确率: {summary['accuracy']:.2%}" in text
    assert "# C-Eval: x.pth\n\n- plain prompts, up to 2 examples, options shuffled by seed 7\n" in text
    assert f"| law | 法学 | STEM | {right['law']}/9 | {right['law'] / 9:.2%} |" in text
    assert f"\n- verdict: {summary['verdict']}\n" in text and "\n- 95 % interval: " in text
    image = (tmp_path / "r/summary.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 5000


def test_results_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    subjects = made_up_subjects()
    answers = made_up_answers(subjects)
    summary, table = summarise(answers, subjects)
    summary |= {"benchmark": "C-Eval", "prompt_format": "plain", "few_shot": 0, "shuffle_options": None}
    summary["checkpoint"] = "first.pth"
    write_results(tmp_path, summary, table, answers)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("model.evaluation.exam_results.draw_chart", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_results(tmp_path, {**summary, "checkpoint": "second.pth"}, table, answers)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    write_results(tmp_path, {**summary, "checkpoint": "second.pth"}, table, answers)
    assert "second.pth" in (tmp_path / "summary.json").read_text("utf-8")


def test_what_was_not_asked_is_wrong_but_no_evidence(tmp_path, capsys):
    """Of 400 questions 100 are asked, with 0 or 2 examples, and 30 are right: 7.5 % of all, 30 % of the asked."""
    questions = [Question("q", tuple("wxyz"), "A", "f:2")] * 400
    subjects = [Subject("law", "法学", "other", questions, questions[:2])]
    answers = [
        dict(subject="law", answer="A", llm_answer=letter, is_right=int(letter == "A"), examples=examples)
        for letter, examples, count in (("A", 2, 30), ("B", 2, 30), ("C", 0, 40), ("", 0, 300))
        for _ in range(count)
    ]
    summary, table = summarise(answers, subjects)
    assert (summary["accuracy"], summary["asked"], summary["not_fitting"]) == (0.075, 100, 300)
    assert summary["by_category"]["other"]["accuracy"] == table["accuracy"]["law"] == 0.075
    # Wilson for 30 of 100: (0.3 + 1.920729 / 100 -+ 1.959964 sqrt(0.0021 + 0.960365 / 10000)) / 1.03841459
    assert summary["interval_95"] == pytest.approx([0.218949, 0.395849], abs=1e-5)
    assert summary["verdict"] == "not distinguishable from guessing"
    assert (summary["mean_examples"], summary["with_fewer_examples"]) == (1.2, 40)
    summary |= {"benchmark": "own", "checkpoint": "x", "prompt_format": "chat", "few_shot": 2, "shuffle_options": None}
    print_result(summary, table)
    write_results(tmp_path, summary, table, answers)
    for text in (capsys.readouterr().out, (tmp_path / "summary.md").read_text("utf-8")):
        assert "总题数: 400  总正确数: 30  总正确率: 7.50%\n" in text
        assert "examples shown: 1.20 in the mean; 40 questions had fewer than 2\n" in text
        assert "not asked, longer than the context, counted as wrong: 300; 30.00% of the 100 asked are right\n" in text
        assert "95 % interval of the 100 asked: 21.89% to 39.58%, guessing" in text
        assert "verdict of the 100 asked: not distinguishable from guessing\n" in text


def test_subjects_of_an_earlier_exam_go_and_nothing_else(tmp_path):
    subjects = made_up_subjects()
    answers = made_up_answers(subjects)
    facts = {"benchmark": "C-Eval", "checkpoint": "x", "prompt_format": "plain", "few_shot": 0, "shuffle_options": None}

    def write(folder, kept):
        rows = [answer for answer in answers if answer["subject"] in kept]
        summary, table = summarise(rows, [subject for subject in subjects if subject.name in kept])
        write_results(folder, facts | summary, table, rows)
        return {path.name for path in folder.iterdir()}

    own = tmp_path / "r"
    own.mkdir()
    for name in ("notes.csv", "law.txt"):
        (own / name).write_text("mine")
    (tmp_path / "outside.csv").write_text("mine")
    summaries = {"summary.csv", "summary.json", "summary.md", "summary.png"}
    every = {"physics.csv", "logic.csv", "law.csv", "notes.csv", "law.txt"} | summaries
    assert write(own, ("physics", "logic", "law")) == every
    for line in ("../outside", "summary", ""):  # as if another program had written there
        with open(own / "summary.csv", "a") as handle:
            handle.write(f"{line},x,x,1,1,1\n")
    assert write(own, ("logic",)) == every - {"physics.csv", "law.csv"} and (tmp_path / "outside.csv").exists()
    (own / "summary.csv").write_text("subject,mark\nnotes,1\n")
    assert write(own, ("law",)) == every - {"physics.csv"}


def test_the_folder_of_results_is_tried_before_and_goes_after_a_failure(tmp_path, monkeypatch):
    exam, new, own = tmp_path / "exam", tmp_path / "a/b", tmp_path / "own"
    for folder in (exam / "val", own):
        folder.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), results_folder(new, exam) as folder:
        assert folder.is_dir() and not [*folder.iterdir()]
        raise KeyboardInterrupt
    assert not new.parent.exists()
    with pytest.raises(ZeroDivisionError), results_folder(own, exam):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), results_folder(new, exam):
        (new.parent / "somebody's").write_text("")
        raise ZeroDivisionError
    assert own.is_dir() and [path.name for path in new.parent.iterdir()] == ["somebody's"]
    with results_folder(new, exam):
        pass
    assert new.is_dir() and not [*new.iterdir()]

    (tmp_path / "link").symlink_to(exam / "val")
    for inside in (exam, exam / "new", tmp_path / "link", tmp_path / "a/../exam/val"):
        with pytest.raises(UserError, match="lies in the exam's folder") as caught, results_folder(inside, exam):
            pass
        assert caught.value.exit_code == 2
    assert not (exam / "new").exists()
    with results_folder(tmp_path / "exam2", exam):
        pass

    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    message = r"--results_dir .*c: cannot be written to \(Permission denied\)"
    with pytest.raises(UserError, match=message), results_folder(tmp_path / "c", exam):
        raise AssertionError("never entered")
    assert not (tmp_path / "c").exists()


# batches and bits per byte


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_batches_hold_each_sequence_once_and_no_more_than_they_may(lengths, most):
    batches = list(length_batches(lengths, most))
    assert sorted(sum(batches, [])) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= most


@given(st.integers(1, 70), st.integers(2, 20))
def test_windows_count_each_token_once_with_half_a_context_before_it(length, context):
    counted = []
    for window, count in windows(list(range(length)), context):
        assert len(window) <= context and window == list(range(window[0], window[0] + len(window)))
        before = len(window) - count
        assert before >= 1 and (window[0] == 0 or before >= context // 2)
        counted += window[before:]
    assert counted == list(range(1, length)), "all but the <s>"


@pytest.mark.parametrize("fields", [{"context": 512}, {"context": 17}, {"context": 512, "use_moe": True}])
def test_bits_per_byte_is_the_sum_over_tokens_one_at_a_time(tokenizer, fields):
    model, context = tiny_model(len(tokenizer), **fields), fields["context"]
    texts = ["长江是中国最长的河。" * 5, "", "é🙂 </s> x", "短"]
    result = measure_bits_per_byte(model, tokenizer, iter(texts))
    bits = tokens = 0
    for text in texts:
        ids = [1, *tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]]
        for place in range(1, len(ids)):
            begin = 0 if place < context else (place - context) // (context // 2) * (context // 2) + context // 2
            with torch.no_grad():
                logits = model.eval()(torch.tensor([ids[begin:place]])).logits[0, -1]
            bits -= float(logits.double().log_softmax(-1)[ids[place]]) / math.log(2)
            tokens += 1
    size = len("".join(texts).encode())
    assert (result["bytes"], result["tokens"]) == (size, tokens)
    assert result["bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_per_token(tokenizer):
    model = tiny_model(len(tokenizer))
    model.norm.weight.data.zero_()
    result = measure_bits_per_byte(model, tokenizer, ["万有引力"] * 600)
    assert result["bits_per_byte"] == pytest.approx(math.log2(6400) * result["tokens"] / (600 * 12), rel=1e-6)


def test_texts_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff一\r\n\n二".encode())
    (tmp_path / "a.csv").write_text('text,x\n"一\n二",3\nNA,4\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "一"}\n{"text": "二"}\n', encoding="utf-8")
    assert list(read_texts(tmp_path / "a.txt")) == ["一\r\n\n二"]
    assert list(read_texts(tmp_path / "a.csv")) == ["一\n二", "NA"]
    assert list(read_texts(tmp_path / "a.jsonl")) == ["一", "二"]
    (tmp_path / "b.md").write_bytes(b"a\n\xff\n")
    with pytest.raises(UserError, match="b.md:2: not UTF-8"):
        list(read_texts(tmp_path / "b.md"))
    with pytest.raises(UserError, match="none.txt: no such file"):
        list(read_texts(tmp_path / "none.txt"))


def test_a_context_of_one_token_predicts_nothing(tokenizer):
    with pytest.raises(UserError, match="at least 2 tokens; give a larger --max_seq_len") as caught:
        measure_bits_per_byte(tiny_model(len(tokenizer), context=1), tokenizer, ["长江是中国最长的河。"])
    assert caught.value.exit_code == 2
    assert measure_bits_per_byte(tiny_model(len(tokenizer), context=2), tokenizer, ["长江"])["bits_per_byte"] > 0


def test_no_text_has_no_bits(tokenizer):
    for texts in ([], ["", ""]):
        with pytest.raises(UserError, match="no text"):
            measure_bits_per_byte(tiny_model(len(tokenizer)), tokenizer, texts)
