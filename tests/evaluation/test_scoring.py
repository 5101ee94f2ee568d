"""Right and wrong replies, decided by hand; the measure over a file; no demo needed for either."""

import json
import shutil
import subprocess
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from model.errors import UserError
from model.evaluation.scoring import measure_accuracy, print_accuracy, score_answer
from model.inference.sampling import SamplingParameters

SYMBOLS = ["H", "He", "C", "Co", "O"]
CAPITALS = ["巴黎", "伦敦", "巴西利亚"]


@pytest.mark.parametrize(
    "row, reply, right",
    [
        # the key is contained; a number elsewhere is no second name
        ({"q": "谁统一了六国？", "answer": "秦始皇"}, "公元前221年，秦始皇统一了六国。", True),
        ({"q": "谁统一了六国？", "answer": "秦始皇"}, "公元前221年，六国统一了。", False),
        ({"q": "谁统一了六国？", "answer": "秦始皇"}, "秦　始 皇", True),
        ({"q": "Capital of France?", "answer": "Paris"}, "The capital of\nFrance is Paris.", True),
        ({"q": "Capital of France?", "answer": "Paris"}, "The Parisian.", False),
        ({"q": "Largest city?", "answer": "New York"}, "It is New  York", True),
        ({"q": "你是谁？", "answer": "我是MiniMind"}, "我是 MiniMind 模型。", True),
        ({"q": "天气怎么样？", "answer": ["雨", "风"]}, "只有风。", False),
        ({"q": "天气怎么样？", "answer": ["雨", "风"]}, "有风也有雨。", True),
        # others
        ({"q": "法国的首都？", "answer": "巴黎", "others": CAPITALS}, "巴黎", True),
        ({"q": "法国的首都？", "answer": "巴黎", "others": CAPITALS}, "巴黎或者伦敦", False),
        ({"q": "氢的元素符号是什么？", "answer": "H", "others": SYMBOLS}, "氢的元素符号是He。", False),
        ({"q": "碳的元素符号是什么？", "answer": "C", "others": SYMBOLS}, "碳的元素符号是Co。", False),
        ({"q": "氦的元素符号是什么？", "answer": "He", "others": SYMBOLS}, "Ｈｅ", True),
        ({"q": "水的化学式？", "answer": "H2O", "others": ["H2O2"]}, "水是H2O。", True),
        ({"q": "水的化学式？", "answer": "H2O", "others": ["H2O2"]}, "水是H2O2。", False),
        ({"q": "水的化学式？", "answer": "H2O"}, "1个水分子写作H2O。", True),
        # part of a longer key, or of what the question is about
        ({"q": "巴西的首都？", "answer": "巴西利亚", "others": ["巴西"]}, "巴西利亚", True),
        (
            {"q": "巴西的首都？", "answer": "巴西利亚", "others": ["巴西"], "entity": "巴西"},
            "巴西的首都是巴西利亚",
            True,
        ),
        ({"q": "北京大学在哪？", "answer": "海淀", "others": ["北京"], "entity": "北京大学"}, "北京大学在海淀", True),
        ({"q": "北京大学在哪？", "answer": "海淀", "others": ["北京"], "entity": "北京大学"}, "在北京的海淀", False),
        ({"q": "北京的简称是什么？", "answer": "京", "others": ["沪"], "entity": "北京"}, "北京的简称是什么？", False),
        # the key is a number: another one is a guess, those of the question are not
        ({"q": "3加5等于多少？", "answer": "8"}, "3加5等于8。", True),
        ({"q": "3加5等于多少？", "answer": "8"}, "8", True),
        ({"q": "3加5等于多少？", "answer": "8"}, "3加5等于8，答案是8。", True),
        ({"q": "3加5等于多少？", "answer": "8"}, "3加5等于18。", False),
        ({"q": "3加5等于多少？", "answer": "8"}, "3加5等于8.5。", False),
        ({"q": "3加5等于多少？", "answer": "8", "one_number": True}, "3加5等于8或者9。", False),
        ({"q": "3加5等于多少？", "answer": "8"}, "等于...8", True),
        ({"q": "5加0等于多少？", "answer": "5"}, "5加0等于5。", True),
        ({"q": "5加0等于多少？", "answer": "5"}, "5", True),
        ({"q": "5加0等于多少？", "answer": "5", "one_number": True}, "5加0等于多少？", False),
        ({"q": "一星期有多少天？", "answer": "7天"}, "一星期有７ 天。", True),
        ({"q": "一星期有多少天？", "answer": "7天", "one_number": True}, "7天或者8天。", False),
        ({"q": "哪天？", "answer": "1949年"}, "1949年10月1日。", True),
        ({"q": "哪里？", "answer": "Paris"}, "It is PARIS.", True),
        ({"q": "多高？", "answer": "8848.86米", "others": ["8848米"]}, "8848.86米", True),
    ],
)
def test_cases(row, reply, right):
    assert score_answer(row, reply) is right


NAMES = st.text(alphabet="京沪粤川湘鄂", min_size=2, max_size=2)


@given(
    NAMES,
    st.lists(NAMES),
    st.text(alphabet="的是在了，。 3８", max_size=6),
    st.text(alphabet="的是在了，。 3８", max_size=6),
)
def test_the_key_alone_is_right_and_beside_another_name_wrong(key, others, before, after):
    row = {"q": "？", "answer": key, "others": others}
    assert score_answer(row, before + key + after)
    for other in set(others) - {key}:
        assert not score_answer(row, f"{before}{key}，{other}{after}") and not score_answer(row, before + other + after)


@given(st.text(max_size=40))
def test_nonsense_never_raises(reply):
    assert score_answer({"q": "法国的首都是哪座城市？", "answer": "巴黎", "entity": "法国"}, reply) == ("巴黎" in reply)


class Answers:
    """An engine that gives the replies it was made with, None: the engine fails; it refuses an empty prompt."""

    def __init__(self, *texts):
        self.texts = texts

    def check_prompt(self, prompt):
        if not prompt:
            raise UserError("the prompt is empty")

    def generate(self, prompts, parameters, on_finish):
        assert all(each.temperature == 0 for each in parameters) and len(parameters) == len(prompts) == len(self.texts)
        failed = dict(text="石家庄", finish_reason="error", error="the output is not finite")
        return [
            types.SimpleNamespace(**failed if text is None else dict(text=text, finish_reason="stop"))
            for text in self.texts
        ]


ROWS = [
    {"q": "河北的省会是哪里？", "answer": "石家庄", "task": "a"},
    {"q": "山东的省会是哪里？", "answer": "济南", "task": "a"},
    {"q": "广东的省会是哪里？", "answer": "广州", "task": "b"},
    {"q": "江苏的省会是哪里？", "answer": "南京", "task": None},
]


def test_accuracy_by_task():
    engine = Answers("省会是石家庄。", "不知道。", "广州。", "南京。")
    rows = [(f"a:{number}", row) for number, row in enumerate(ROWS, 1)]
    result = measure_accuracy(engine, rows, [[1]] * 4, SamplingParameters(temperature=0.7))
    assert result == {"accuracy": 3 / 4, "questions": 4, "tasks": {"a": 0.5, "b": 1.0}}
    result = measure_accuracy(engine, rows, [[1]] * 4, SamplingParameters(), lambda row, text: "省会" in text)
    assert result == {"accuracy": 1 / 4, "questions": 4, "tasks": {"a": 0.5, "b": 0.0}}


def test_a_prompt_that_is_refused_counts_as_wrong_and_a_failing_engine_as_nothing(capsys):
    rows = [(f"a:{number}", row) for number, row in enumerate(ROWS, 1)]
    result = measure_accuracy(Answers("济南。", "广州。", "南京。"), rows, [[], [1], [1], [1]], SamplingParameters())
    assert result == {"accuracy": 3 / 4, "questions": 4, "tasks": {"a": 0.5, "b": 1.0}}
    assert "a:1: the prompt is empty; counted as wrong\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="a:3: the output is not finite"):
        measure_accuracy(Answers("济南。", None, "南京。"), rows, [[], [1], [1], [1]], SamplingParameters())


def test_the_table_of_accuracy(capsys):
    result = {"accuracy": 0.25, "questions": 4, "tasks": {"b": 0.0, "a": 0.5}}
    print_accuracy(result, as_json=True)
    *lines, last = capsys.readouterr().out.splitlines()
    assert (
        lines == ["  50.0%  a", "   0.0%  b", "  25.0%  of 4 questions answered right"] and json.loads(last) == result
    )
    print_accuracy(result, as_json=False)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_scoring_needs_neither_the_demo_nor_its_tables(tmp_path):
    """In a copy of the package without them a file of one's own is read and its replies are judged."""
    shutil.copytree(ROOT / "model", tmp_path / "model", ignore=shutil.ignore_patterns("demo", "__pycache__"))
    (tmp_path / "own.jsonl").write_text(json.dumps(ROWS[0], ensure_ascii=False) + "\n", encoding="utf-8")
    code = """
from model.evaluation.questions import read_questions
from model.evaluation.scoring import score_answer
((_, row),) = read_questions("own.jsonl", "q")
assert score_answer(row, "是石家庄。") and not score_answer(row, "是保定。")
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
