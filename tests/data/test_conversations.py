"""A conversation is a list of messages: every spelling of it is read into the same one, and no turn changes its role."""

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.conversations import (
    BadRow,
    alternate,
    fit_turns,
    raw_conversation,
    to_columns,
    training_conversation,
    training_preference,
)
from model.data.filters import ConversationRules, Dropped, PreferenceRules

SYSTEM = {"role": "system", "content": "简短"}
QUESTION, ANSWER = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}
AGAIN, BYE = {"role": "user", "content": "再见"}, {"role": "assistant", "content": "再见！"}
REPLIES = {"chosen": "我是小助手。", "rejected": "不知道。"}


def text_messages(letters):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[letter], "content": f"{letter}{index}"} for index, letter in enumerate(letters)]


@pytest.mark.parametrize(
    "record",
    [
        {"system": "简短", "instruction": "再见", "output": "再见！", "history": [["你好", "你好！"]]},
        {"messages": [SYSTEM, QUESTION, ANSWER, AGAIN, BYE]},
        {"system": "简短", "conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"}, AGAIN, BYE]},
        {"q": "再见", "a": "再见！", "history": json.dumps([SYSTEM, ["你好", "你好！"]])},
    ],
)  # fmt: skip
def test_every_spelling_keeps_the_system_turn(record):
    assert raw_conversation(record) == [SYSTEM, QUESTION, ANSWER, AGAIN, BYE]
    row = ConversationRules(min_chinese=0).convert(record)
    ((history, q, a),) = csv.reader(io.StringIO(row.payload.decode(), newline=""))
    assert (json.loads(history), q, a) == ([SYSTEM, ["你好", "你好！"]], "再见", "再见！") and row.output == 1
    written = {"history": json.loads(history), "q": q, "a": a}
    assert training_conversation(written) == [SYSTEM, QUESTION, ANSWER, AGAIN, BYE]


def test_a_system_turn_alone_leaves_a_row_single_turn_and_a_blank_one_is_none():
    assert ConversationRules().convert({"system": "简短", "q": "你好", "a": "你好！"}).output == 0
    assert raw_conversation({"system": None, "messages": [{"role": "system", "content": " \n"}, QUESTION, ANSWER]}) == [
        QUESTION,
        ANSWER,
    ]


@pytest.mark.parametrize(
    "letters, expected",
    [
        ("sua", "s:s0 u:u1 a:a2"),
        ("ssuuaa", "s:s0+s1 u:u2+u3 a:a4+a5"),
        ("uasua", "u:u0 a:a1 s:s2 u:u3 a:a4"),
        ("usa", "u:u0+s1 a:a2"),
        ("usua", "u:u0+s1+u2 a:a3"),
        ("sa", "u:s0 a:a1"),
        ("uasa", "u:u0 a:a1 u:s2 a:a3"),
    ],
)
def test_neighbours_are_joined_and_system_turns_stay_where_a_question_follows(letters, expected):
    turns = alternate(text_messages(letters))
    assert " ".join(f"{turn['role'][0]}:{turn['content']}" for turn in turns) == expected.replace("+", "\n")


@settings(deadline=None, max_examples=200)
@given(st.text("sua", max_size=9))
def test_what_is_written_is_read_again(letters):
    try:
        messages = raw_conversation({"messages": text_messages(letters)})
    except BadRow:
        body = letters.lstrip("s")
        assert not body or body[0] == "a" == letters[0] or letters[-1] != "a"
        return
    history, question, answer = to_columns(messages)
    assert training_conversation({"history": history, "q": question, "a": answer}) == messages
    spoken = [turn["role"] for turn in messages if turn["role"] != "system"]
    assert spoken == ["user", "assistant"] * (len(spoken) // 2)
    assert "\n".join(turn["content"] for turn in messages) == "\n".join(
        turn["content"] for turn in text_messages(letters)
    )


@pytest.mark.parametrize(
    "history", [[SYSTEM, ["q"]], [{"role": "user", "content": "q"}], [{"role": "system"}], {}, 5, "[", [["q", 1]]]
)
def test_other_histories_are_bad_rows(history):
    with pytest.raises(BadRow, match='"history" is not'):
        training_conversation({"history": history, "q": "q", "a": "a"})


@pytest.mark.parametrize(
    "turn",
    ["x", {"role": "tool", "content": "x"}, {"role": ["user"], "content": "x"}, {"role": "user"}, {"content": "x"}],
)
def test_turns_without_known_role_or_text_are_bad_rows(turn):
    with pytest.raises(BadRow, match="turn"):
        training_conversation({"conversations": [turn, ANSWER]})


@pytest.mark.parametrize(
    "record",
    [
        {"system": "简短", "prompt": "你是谁？", **REPLIES},
        {"prompt": [SYSTEM, {"role": "user", "content": "你是谁？"}], **REPLIES},
        {name: [SYSTEM, {"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": REPLIES[name]}] for name in REPLIES},
        {"instruction": "你是谁？", "input": "", "history": [SYSTEM], "output": list(REPLIES.values())},
    ],
)  # fmt: skip
def test_a_preference_with_a_system_turn_has_messages_for_a_prompt(record):
    row = json.loads(PreferenceRules().convert(record).payload.removeprefix(b","))
    assert row == {"prompt": [SYSTEM, {"role": "user", "content": "你是谁？"}], **REPLIES}


@pytest.mark.parametrize(
    "record, earlier",
    [
        ({"prompt": "你是谁？"}, []),
        ({"system": "简短", "question": "你是谁？", "history": ""}, [SYSTEM]),
        ({"prompt": "你是谁？", "history": [SYSTEM, ["你好", "你好！"]]}, [SYSTEM, QUESTION, ANSWER]),
        ({"prompt": "你是谁？", "history": '[["你好", "你好！"]]'}, [QUESTION, ANSWER]),
        ({"messages": [SYSTEM, QUESTION, ANSWER, {"from": "human", "value": "你是谁？"}]}, [SYSTEM, QUESTION, ANSWER]),
    ],
)
def test_a_training_preference_has_all_that_stands_before_the_answers(record, earlier):
    question = {"role": "user", "content": "你是谁？"}
    assert training_preference({**record, **REPLIES}) == ([*earlier, question], *REPLIES.values())


def test_answers_of_a_training_preference_are_kept_as_they_are():
    """Blanks, line breaks and control tokens are the answer's; two that differ in them alone are not the same."""
    messages, chosen, rejected = training_preference({"prompt": " 问 ", "chosen": " 答\n", "rejected": " 答\n</s>"})
    assert (messages[0]["content"], chosen, rejected) == (" 问 ", " 答\n", " 答\n</s>")


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(chosen=None), 'no "chosen" answer'),
        (dict(rejected=None), 'no "rejected" answer'),
        (dict(chosen=" \n"), 'empty "chosen" answer'),
        (dict(rejected=""), 'empty "rejected" answer'),
        (dict(rejected=REPLIES["chosen"]), "the same"),
        (dict(chosen=7), '"chosen" is not a text'),
        (dict(prompt=None), 'no "prompt"'),
        (dict(prompt=[QUESTION, ANSWER]), "does not end with the user"),
        (dict(prompt=[{"role": "tool", "content": "x"}]), "unknown role"),
        (dict(history=[["q"]]), '"history" is not a list'),
    ],
)
def test_preferences_without_anything_to_learn_are_bad_rows(changes, reason):
    record = {"prompt": "你是谁？", **REPLIES, **changes}
    with pytest.raises(BadRow, match=reason):
        training_preference({name: value for name, value in record.items() if value is not None})


def test_a_blank_prompt_is_none_and_the_next_field_counts():
    assert training_preference({"prompt": " ", "question": "问？", **REPLIES})[0][-1]["content"] == "问？"
    with pytest.raises(BadRow, match='no "prompt"'):
        training_preference({"prompt": "", **REPLIES})


def test_preferences_within_a_conversation_are_dropped_with_a_system_turn_too():
    with pytest.raises(Dropped, match="history"):
        PreferenceRules().convert({"prompt": [SYSTEM, QUESTION, ANSWER, AGAIN], **REPLIES})


@pytest.mark.parametrize(
    "max_seq_len, kept, changes",
    [
        (60, "s4 u5 a6 u7 a8", []),
        (39, "s4 u7 a8", ["oldest"]),
        (20, "u7 a8", ["oldest", "system"]),
        (17, "u5 a8", ["oldest", "system", "front"]),
        (13, "u1 a8", ["oldest", "system", "front"]),
        (12, "", []),
    ],
)
def test_what_goes_first_when_a_row_is_too_long(max_seq_len, kept, changes):
    """Each turn costs 2 tokens more than its content."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    turns = [(roles[letter], list(range(int(size)))) for letter, size in ("s4", "u5", "a6", "u7", "a8")]
    fitting, what = fit_turns(turns, dict.fromkeys(roles.values(), 2), max_seq_len)
    assert " ".join(f"{role[0]}{len(ids)}" for role, ids in fitting) == kept
    assert [change.split()[0] for change in what] == changes
    for (_, ids), size in zip(fitting[-2:], (7, 8)):
        assert ids == list(range(size))[-len(ids) :]  # the end of a question stays
