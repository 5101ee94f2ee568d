"""Values made for the occasion: new ones nearly every time, and those of the test nowhere in training."""

import json
import random

import pytest

from model.demo.files import write_raw_files
from model.demo.values import Values
from model.demo.world import DemoWorld
from model.errors import UserError
from model.evaluation.scoring import score_answer

WORDS = {
    "values": ["李明"],
    "made": {
        "patterns": ["{first}{second}", "{first}{second}{second}"],
        "unseen": ["{first}{second}"],
        "unseen_parts": ["{first}{kept}"],
        "first": "甲乙丙丁戊己庚辛壬癸",
        "second": "子丑寅卯辰巳午未申酉戌亥",
        "kept": "东南西北中",
    },
}


def values(**changes):
    return Values("memory.json: name", {**WORDS, "made": {**WORDS["made"], **changes}}, "甲子、乙东", random.Random(0))


def test_draws_are_of_the_patterns_and_hold_nothing_of_the_test():
    slot, rng = values(), random.Random(1)
    drawn = [slot.draw(rng) for _ in range(4000)]
    made = [value for value in drawn if value != "李明"]
    assert 0.6 < len(made) / len(drawn) < 0.7 and {len(value) for value in made} == {2, 3}
    assert all(value[0] in WORDS["made"]["first"] and set(value[1:]) <= set(WORDS["made"]["second"]) for value in made)
    assert not [value for value in made for unseen in slot.unseen if unseen in value]
    assert len(set(slot.unseen)) == 80 and "甲子" not in slot.unseen
    assert len(set(slot.unseen_parts)) == 40 and "乙东" not in slot.unseen_parts


def test_a_slot_without_parts_draws_from_its_list():
    slot = Values("x", {"values": ["红色", "蓝色"]}, "", random.Random(0))
    assert {slot.draw(random.Random(seed)) for seed in range(20)} == {"红色", "蓝色"}
    assert slot.unseen == slot.unseen_parts == []


def test_a_slot_with_no_more_values_than_are_kept_for_the_test_is_named():
    slot = values(patterns=["{first}{second}"])
    slot.unseen += [first + second for first in WORDS["made"]["first"] for second in WORDS["made"]["second"]]
    with pytest.raises(UserError, match='memory.json: name: "made" gives no more values than the 80'):
        [slot.draw(random.Random(seed)) for seed in range(9)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"unseen": ["{first}{last}"]}, 'memory.json: name: "made" lacks a part of its pattern {first}{last}'),
        ({"second": ""}, 'memory.json: name: "made" lacks a part of its pattern {first}{second}'),
        ({"patterns": []}, 'memory.json: name: "made" has no "patterns"'),
        ({"unseen": ["{first}"]}, 'memory.json: name: "made" gives less than 80 values that are not in the tables'),
    ],
)
def test_faulty_tables_are_named(changes, message):
    with pytest.raises(UserError) as caught:
        values(**changes)
    assert str(caught.value) == message


@pytest.fixture(scope="module")
def world():
    return DemoWorld()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, world):
    """All that training shows, without the numbers of the rows."""
    paths = write_raw_files(tmp_path_factory.mktemp("raw"), world)
    rows = json.loads(paths.pop("dpo").read_text("utf-8"))
    rows += [json.loads(line) for path in paths.values() for line in path.read_text("utf-8").splitlines()]
    return "\n".join(text for row in rows for text in texts_in(row))


def texts_in(value):
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in texts_in(part)]


def value_of(world, row):
    """What a held-out row tells and asks for."""
    known = [value for slot in world.values.values() for value in slot.unseen + slot.unseen_parts]
    return max((value for value in known if f"{value}。" in row["a"]), key=len)


def test_what_the_test_tells_is_in_no_training_file(world, trained):
    names, others = list(world.heldout_names()), list(world.heldout_values())
    assert len(names) == 80 and {row["task"] for row in names} == {"unseen_name"}
    assert {row["task"] for row in others} == {"unseen_number", "unseen_city", "unseen_name_characters"}
    for row in names + others:
        value = value_of(world, row)
        assert row["answer"] == row["a"] and any(value in question for question, _ in row["history"])
        assert value not in trained
    assert len({value_of(world, row) for row in names + others}) == 80 * 3 + 40


def test_unseen_characters_are_in_no_name_of_training(world, trained):
    """Neither in the list nor in what is made; but all of them are known from other words."""
    made = world.memory["name"]["made"]
    kept = set(made["heldout_given"])
    assert not kept & set(made["surname"] + made["given"] + "".join(world.memory["name"]["values"]))
    assert [character for character in kept if character not in trained] == []


def test_most_names_of_training_are_new(world):
    names = [world.values["name"].draw(random.Random(seed)) for seed in range(3000)]
    assert len(set(names)) > 1800


def test_a_part_of_a_value_or_more_than_it_is_wrong(world):
    for row in [*world.heldout_names(), *world.heldout_values()]:
        value = value_of(world, row)
        assert score_answer(row, row["a"])
        for wrong in (value[:-1], value[1:], value + value[-1], value[::-1] if value != value[::-1] else "其他"):
            assert not score_answer(row, row["a"].replace(value, wrong)), (row["a"], wrong)
