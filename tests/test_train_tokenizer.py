"""train_tokenizer.py as a user runs it: formats in, a working folder out, one clear line for bad input."""

import csv
import gzip
import json
import lzma
import random
import shutil

import pytest

from conftest import assert_one_line_error, run_script
from model.data.rows import RowReport
from model.data.tokenizer_training import fair_shares, iter_documents, sample_documents
from model.tokenizer import (
    DEFAULT_TOKENIZER_PATH,
    SPECIAL_TOKENS,
    encode_text,
    load_tokenizer,
    render_conversation,
    token_bytes,
    tokenizer_hash,
)

CHARACTERS = [chr(0x4E00 + index) for index in range(400)]
WORDS = ["".join(random.Random(seed).choices(CHARACTERS, k=2)) for seed in range(300)]


def sentences(count, seed=0):
    chance = random.Random(seed)
    return ["".join(chance.choices(WORDS, k=12)) + "。\n1999年" for _ in range(count)]


def write_jsonl(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def train(*words, **options):
    return run_script("train_tokenizer.py", "--vocab_size", "700", *words, **options)


def printed_number(process, before, after):
    return float(process.stdout.split(before)[1].split(after)[0].replace(",", ""))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trained on all kinds of input at once, bad rows among them -> (finished process, its folder, input folder)."""
    folder = tmp_path_factory.mktemp("text")
    write_jsonl(folder / "a.jsonl.gz", [{"text": text} for text in sentences(150, 1)], gzip.open)
    write_jsonl(
        folder / "b.jsonl.xz",
        [{"history": [[q, a]], "q": q, "a": a} for q, a in zip(sentences(60, 2), sentences(60, 3))],
        lzma.open,
    )
    answer = {"role": "assistant", "content": "好"}
    write_jsonl(
        folder / "c.jsonl",
        [{"conversations": [{"role": "user", "content": text}, answer]} for text in sentences(60, 4)],
    )
    with open(folder / "c.jsonl", "a") as handle:
        handle.write("{broken\n")
    with open(folder / "d.csv", "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle, lineterminator="\n").writerows([["text"], *([text] for text in sentences(80, 5))])
    (folder / "e.txt").write_bytes("\n".join(sentences(40, 6)).encode() + b"\n\xff\xfe bad\n")
    inputs = folder / "*.jsonl*", folder / "d.csv", folder / "e.txt"
    process = train("--data_path", *inputs, "--output_dir", folder / "out")
    assert process.returncode == 0, process.stderr
    return process, folder / "out", folder


def test_folder_is_complete_and_works(trained):
    process, folder, _ = trained
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == 700
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2]
    text = WORDS[0] + WORDS[1] + '😀\n"\\ NA 2026 龘'
    assert tokenizer.decode(encode_text(tokenizer, text)) == text
    assert encode_text(tokenizer, "a\nb") == [token for part in "a\nb" for token in encode_text(tokenizer, part)]
    messages = [{"role": "user", "content": WORDS[0]}, {"role": "assistant", "content": WORDS[1]}]
    assert tokenizer.apply_chat_template(messages)["input_ids"] == render_conversation(tokenizer, messages)[0]
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {file.name for file in folder.iterdir()} == names


def test_it_learned_the_words_and_says_how_well(trained):
    process, folder, _ = trained
    assert printed_number(process, "held-out documents: ", "\n") > 0.9  # a character of this text is 3 bytes
    tokenizer = load_tokenizer(folder)
    for word in ("user", "assistant", "system", "____"):
        assert len(encode_text(tokenizer, word)) == 1
    assert all(len(encode_text(tokenizer, character)) <= 2 for character in CHARACTERS)
    for data in token_bytes(tokenizer):
        assert len(data) <= 1 or not set(data) & set(b"\n0123456789"), data


def test_bad_rows_are_counted_and_named(trained):
    process, _, folder = trained
    assert "Traceback" not in process.stderr
    assert f"{folder / 'c.jsonl'}:61" in process.stderr and "not JSON" in process.stderr
    assert f"{folder / 'e.txt'}:81" in process.stderr and "not UTF-8" in process.stderr


def test_same_seed_same_tokenizer_and_the_sample_is_capped(trained, tmp_path):
    """Every file gets its share, whatever its size."""
    small = write_jsonl(tmp_path / "small.jsonl", [{"text": text} for text in sentences(100, 7)])
    large = write_jsonl(tmp_path / "large.jsonl", [{"text": text} for text in sentences(3000, 8)])
    hashes = []
    for index, seed in enumerate((3, 3, 4)):
        output = tmp_path / str(index)
        process = train("--data_path", small, large, "--max_chars", 12_000, "--seed", seed, "--output_dir", output)
        assert process.returncode == 0, process.stderr
        assert 11_000 < printed_number(process, "training on ", " characters") <= 12_000
        hashes.append(tokenizer_hash(load_tokenizer(output)))
    assert hashes[0] == hashes[1] != hashes[2]


def test_shares_are_fair_and_spread_over_the_file(tmp_path):
    assert fair_shares({"a": 10, "b": 1000, "c": 500}, 210) == {"a": 10, "b": 100, "c": 100}
    assert fair_shares({"a": 10, "b": 20}, 1000) == {"a": 10, "b": 20}
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"{index:05}"} for index in range(2000)])
    sample, held_out = sample_documents([path], None, {str(path): 10_000}, {str(path): 1000}, seed=0)
    rows = sorted(map(int, sample + held_out))
    assert 150 < len(rows) <= 200
    assert rows[0] < 100 and 850 < rows[len(rows) // 2] < 1150 and rows[-1] > 1700
    path = write_jsonl(tmp_path / "long.jsonl", [{"text": "长" * 100}])
    sample, held_out = sample_documents([path], None, {str(path): 100}, {str(path): 99}, seed=0)
    assert sample + held_out == ["长" * 99]


def test_conversations_are_the_texts_of_their_turns(tmp_path):
    pair, system = {"q": "丙", "a": "丁"}, {"role": "system", "content": "简短"}
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [
            {"history": [system, ["甲", "乙"]], **pair},
            {"history": None, **pair},
            {"history": [["甲"]], **pair},
        ],
    )
    report = RowReport()
    assert [text for _, text in iter_documents(path, None, report)] == ["简短\n甲\n乙\n丙\n丁", "丙\n丁"]
    assert report.places == {'"history" is not a list of [question, answer]': [f"{path}:3"]}
    turns = [system, {"from": "human", "value": "甲"}, {"from": "gpt", "value": "乙"}]
    path = write_jsonl(tmp_path / "turns.jsonl", [{"conversations": turns}])
    assert list(iter_documents(path, None, report)) == [(str(path), "简短\n甲\n乙")]


def test_groups_by_field_can_be_left_out(tmp_path):
    rows = [{"text": text, "source": "good"} for text in sentences(200)]
    rows += [{"text": "禁" * 30 + "用" * 30, "source": "bad one"} for _ in range(200)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    by_source = ("--data_path", path, "--group_field", "source", "--exclude_groups", "bad")
    process = train(*by_source, "--output_dir", tmp_path / "out")
    assert "1 groups excluded" in process.stdout
    assert len(encode_text(load_tokenizer(tmp_path / "out"), "禁用")) > 2
    other = "--output_dir", tmp_path / "other"
    assert_one_line_error(train(*by_source, "good", *other), path, "--exclude_groups")
    assert_one_line_error(train("--data_path", path, "--group_field", "origin", *other), path, "no field 'origin'")


@pytest.mark.parametrize(
    "name, content, parts",
    [
        ("missing.jsonl", None, ["no such file"]),
        ("empty.jsonl", b"", ["is empty"]),
        ("empty.txt", b"", ["is empty"]),
        ("other.csv", b"title,body\n1,2\n", ["no column 'text'", "title, body"]),
        ("bad.jsonl", b"nonsense\n", ["not JSON", "bad.jsonl:1"]),
        ("binary.txt", b"\xff\xfe\xff\n", ["no text to train on"]),
        ("picture.png", b"\x89PNG", ["expected a .csv or .jsonl"]),
        ("short.txt", "你好。\n再见。\n".encode(), ["--vocab_size 700", "smaller --vocab_size"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, name, content, parts):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    process = train("--data_path", tmp_path / name, "--output_dir", tmp_path / "out")
    assert_one_line_error(process, *parts)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_there_stays_unless_overwritten(tmp_path):
    """Checkpoints need the one they were trained with; the shipped one is where --output_dir points by default."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in sentences(200)])
    shipped = contents(DEFAULT_TOKENIZER_PATH)
    (tmp_path / "empty.jsonl").touch()  # were it not refused, nothing would come of it
    process = train("--data_path", tmp_path / "empty.jsonl")
    assert_one_line_error(process, DEFAULT_TOKENIZER_PATH / "tokenizer.json", "--overwrite")
    assert contents(DEFAULT_TOKENIZER_PATH) == shipped
    shutil.copytree(DEFAULT_TOKENIZER_PATH, tmp_path / "own")
    own = "--data_path", path, "--output_dir", tmp_path / "own"
    assert_one_line_error(
        train(*own), tmp_path / "own/tokenizer.json", "is there already", "--output_dir", "--overwrite"
    )
    assert contents(tmp_path / "own") == shipped
    assert train(*own, "--overwrite").returncode == 0 and len(load_tokenizer(tmp_path / "own")) == 700


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_wrong_usage():
    assert_one_line_error(run_script("train_tokenizer.py", "--vocab_size", "100"), "--vocab_size 100", code=2)
    assert_one_line_error(run_script("train_tokenizer.py", "--vocab_size", "70000"), "--vocab_size 70000", code=2)


def test_without_arguments_and_data(tmp_path):
    assert_one_line_error(run_script("train_tokenizer.py", cwd=tmp_path), "dataset/pretrain_data.csv", "--data_path")
