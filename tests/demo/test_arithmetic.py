"""Sums are worked out rightly, each step in the words of the one before, and none that is held out is ever practised."""

import json
import re

import pytest

from model.demo.arithmetic import all_problems, needs_steps, operands, steps
from model.demo.files import write_raw_files
from model.demo.world import DEFAULT_DIRECTORY, DemoWorld
from model.evaluation.scoring import score_answer

NUMERALS = "零一二三四五六七八九"


@pytest.fixture(scope="module")
def world():
    return DemoWorld()


@pytest.fixture(scope="module")
def problems():
    return list(all_problems(json.loads((DEFAULT_DIRECTORY / "arithmetic.json").read_text("utf-8"))))


@pytest.mark.parametrize(
    "task, a, b, expected",
    [
        ("addition", 42, 35, "二加五写七；四加三写七；"),
        ("addition", 47, 38, "七加八写五进一；四加三加一写八；"),
        ("addition", 95, 5, "五加五写零进一；九加零加一写零进一；"),
        ("subtraction", 52, 38, "二减八写四借一；五减三减一写一；"),
        ("subtraction", 47, 45, "七减五写二；四减四写零；"),
        ("multiplication", 23, 3, "三乘三得九；二乘三得六；"),
        ("multiplication", 47, 6, "七乘六得四二；四乘六得二四，加四得二八；"),
    ],
)
def test_steps_by_hand(task, a, b, expected):
    assert steps(task, a, b) == expected


def number(numerals):
    return int("".join(str(NUMERALS.index(numeral)) for numeral in numerals))


def read_column(sentence):
    """(what a column says is written, carried or borrowed) of an addition or subtraction, after checking its arithmetic."""
    parsed = re.fullmatch(r"(.)([加减])(.)(?:([加减])一)?写(.)([进借]一)?", sentence)
    left, sign, right, more, digit, rest = parsed.groups()
    assert more in (None, sign) and (rest or "进借"[sign == "减"])[0] == "进借"[sign == "减"]
    direction = 1 if sign == "加" else -1
    total = number(left) + direction * (number(right) + bool(more))
    assert total == number(digit) + direction * 10 * bool(rest)
    return number(digit), bool(rest), bool(more)


def test_every_step_is_right_and_together_they_give_the_result(problems):
    """Read back as text: every line is true, takes up what the line before carried, and the digits are those of the result."""
    for problem in problems:
        *columns, nothing = problem["steps"].split("；")
        assert nothing == "" and bool(columns) == (problem["a"] > 9 or problem["b"] > 9)
        if problem["task"] != "multiplication" and columns:
            (units, carried, before), (tens, on, taken) = map(read_column, columns)
            assert not before and carried == taken
            if problem["task"] == "addition":
                assert units + 10 * tens + 100 * on == problem["a"] + problem["b"] == problem["c"]
            else:
                assert not on and units + 10 * tens == problem["a"] - problem["b"] == problem["c"]
        elif columns:
            products = [re.fullmatch("(.)乘(.)得(.+?)(?:，加(.)得(.+))?", column).groups() for column in columns]
            assert all(number(left) * number(right) == number(product) for left, right, product, _, _ in products)
            (_, _, units, _, _), (_, _, tens, added, total) = products
            carried = number(added) if added else 0
            assert carried == number(units) // 10 and (not added or number(tens) + carried == number(total))
            assert number(total or tens) * 10 + number(units) % 10 == problem["a"] * problem["b"] == problem["c"]


def test_held_out_sums_are_hard_ones_of_every_kind(world):
    tasks = [problem["task"] for problem in world.heldout_problems]
    assert {task: tasks.count(task) for task in set(tasks)} == dict.fromkeys(
        ("addition", "subtraction", "multiplication"), 100
    )
    for problem in world.heldout_problems:
        assert problem["a"] >= 10 and problem["b"] >= (2 if problem["task"] == "multiplication" else 10)
        assert needs_steps(problem)
    easy = [problem for problem in world.problems if problem["a"] < 10 and problem["b"] < 10]
    assert len(easy) == 100 + 55 + 100  # all that the steps consist of is practised


def test_held_out_numbers_are_never_calculated_with_in_training(tmp_path, world):
    """In no file, no order and no kind of sum."""
    text = "\n".join(path.read_text("utf-8") for path in write_raw_files(tmp_path, world).values())
    trained = {frozenset(map(int, pair)) for pair in re.findall(r"(\d+) ?[加减乘+×*x-] ?(\d+)", text)}
    assert len(trained) > 3000 and trained == trained & {operands(problem) for problem in world.problems}
    assert not trained & {operands(problem) for problem in world.heldout_problems}


def test_only_the_result_counts_and_the_steps_are_no_guesses(world):
    for row in world.heldout_arithmetic():
        assert row["a"].count("；") == 2 and score_answer(row, row["a"])
        assert not score_answer(row, row["a"].replace(f"是{row['answer']}。", f"是{int(row['answer']) + 1}。"))
        assert not score_answer(row, row["a"] + f"也许是{int(row['answer']) + 1000}。")
