"""Question files: what can be asked comes out as it was written, everything else is one line that names the place."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import UserError
from model.evaluation.questions import answer_each, check_prompts, read_questions

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(
    st.lists(st.fixed_dictionaries({"q": TEXTS}, optional={"answer": TEXTS | st.lists(TEXTS, min_size=1)}), min_size=1)
)
def test_rows_come_back_as_they_were_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("questions") / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + b"\n\n".join(json.dumps(row).encode() for row in rows)))
    assert read_questions(path, "q") == [(f"{path}:{2 * index + 1}", row) for index, row in enumerate(rows)]


def test_a_text_file_is_one_question_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff你好 \r\n\n  再见".encode())
    assert read_questions(path, "prompt") == [(f"{path}:1", {"prompt": "你好"}), (f"{path}:3", {"prompt": "再见"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.jsonl: no question in it"),
        (b'{"q": "x"}\n\xff\n', "a.jsonl:2: not UTF-8; convert the file"),
        (b'{"q": "x"}\n\n{"q": \n', "a.jsonl:3: not JSON; expected one object a line"),
        (b"[" * 100_000, "a.jsonl:1: not JSON"),
        (b'["q"]\n', "a.jsonl:1: not a JSON object"),
        (b'{"q": "\\ud800"}\n', "a.jsonl:1: half a surrogate pair"),
        (b'{"question": "x"}\n', 'a.jsonl:1: has no text "q"'),
        (b'{"q": " "}\n', 'a.jsonl:1: has no text "q"'),
        (b'{"q": "x", "history": ["y"]}\n', 'a.jsonl:1: "history" must be'),
        (b'{"q": "x", "history": [["y", 1]]}\n', 'a.jsonl:1: "history" must be'),
        (b'{"q": "x", "answer": 3}\n', 'a.jsonl:1: "answer" must be'),
        (b'{"q": "x", "answer": []}\n', 'a.jsonl:1: "answer" must be'),
        (b'{"q": "x", "answer": ["y", " "]}\n', 'a.jsonl:1: "answer" must be'),
        (b'{"q": "x", "answer": null}\n', 'a.jsonl:1: "answer" must be'),
        (b'{"q": "x", "answer": "y", "others": "z"}\n', 'a.jsonl:1: "others" must be'),
        (b'{"q": "x", "answer": "y", "task": ["z"]}\n', 'a.jsonl:1: "task" must be text'),
        (b'{"q": "x", "answer": "y", "entity": 1}\n', 'a.jsonl:1: "entity" must be text'),
    ],
)
def test_a_bad_row_is_named(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_questions(path, "q")
    assert message in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 1


def test_a_damaged_or_foreign_file_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"q": "x"}\n' * 1000, mtime=0)[:-9])
    with pytest.raises(UserError, match="a.jsonl.gz: the compressed data is damaged or cut"):
        read_questions(path, "q")
    (tmp_path / "a.txt").write_bytes("好\n".encode() + "好\n".encode("gbk"))
    with pytest.raises(UserError, match="a.txt:2: not UTF-8"):
        read_questions(tmp_path / "a.txt", "q")
    with pytest.raises(UserError, match="none.txt: no such file"):
        read_questions(tmp_path / "none.txt", "q")


@pytest.mark.parametrize("text", [" \n", "\udcff"])
def test_a_prompt_that_cannot_be_asked_is_wrong_usage(text):
    with pytest.raises(UserError, match="--prompt") as caught:
        check_prompts(["好", text])
    assert caught.value.exit_code == 2


def test_a_question_that_fails_is_told_after_the_others_are_answered(capsys):
    asked = []

    def answer(row):
        asked.append(row["q"])
        if row["q"].startswith("bad"):
            raise UserError(f"{row['q']} is too long", exit_code=2)

    answer_each([("a:1", {"q": "one"}), ("a:2", {"q": "two"})], answer)
    with pytest.raises(UserError, match="^2 of 4 questions not answered; a:2: bad2 is too long$") as caught:
        answer_each([(f"a:{n}", {"q": q}) for n, q in enumerate(("one", "bad2", "bad3", "four"), 1)], answer)
    with pytest.raises(UserError, match="^--prompt: bad is too long$"):
        answer_each([("--prompt", {"q": "bad"})], answer)
    asked.pop()
    assert asked == ["one", "two", "one", "bad2", "bad3", "four"] and caught.value.exit_code == 2
    assert capsys.readouterr().out == "(not answered)\n" * 3
