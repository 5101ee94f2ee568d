"""Many files read as one: the rows of the shards in order, each shard tokenised once, its split its own."""

import gzip
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rows import write_csv

from conftest import CPU_FLAGS, ROOT, TINY_FLAGS, assert_one_line_error, good, run_two_ranks
from model.data import token_cache
from model.data.dataset import IGNORED, open_preference_data, open_pretrain_data, open_sft_data
from model.data.rows import RowReport
from model.data.shards import JoinedArrays
from model.data.token_cache import PretrainEncoding, data_files, open_token_cache
from model.errors import UserError
from model.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer()


def write_jsonl(path, rows):
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def documents(number, count):
    return [{"text": f"第{number}本书的第{page}页：{'雪山' * (page % 5)}"} for page in range(count)]


@pytest.fixture
def folder(tmp_path):
    """A folder of three shards in different formats, of 7, 1 and 20 documents, and what else may lie in it."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_jsonl(folder / "b.jsonl.gz", documents(1, 1))
    write_csv(folder / "a.csv", ["text"], [[row["text"]] for row in documents(0, 7)])
    write_jsonl(folder / "c.jsonl", documents(2, 20))
    for name in ("notes.txt", "d.jsonl.gz.tmp-host-1-2", "report.json"):
        (folder / name).write_text("not rows")
    (folder / ".work").mkdir()
    return folder


def everything(part):
    """The text of a PretrainDataset, as it is read in a single batch."""
    labels = part[range(len(part))]["labels"].ravel()
    return TOKENIZER.decode([1, *labels[labels != IGNORED].tolist()]).removeprefix("<s>").removesuffix("</s>")


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_joined_arrays_are_the_concatenated_ones(lengths, seed):
    generator = np.random.default_rng(seed)
    arrays = [generator.integers(0, 60_000, length).astype(np.uint16) for length in lengths]
    shifts = generator.integers(0, 9, len(arrays)).tolist()
    joined = JoinedArrays(arrays, shifts)
    plain = [number + shift for array, shift in zip(arrays, shifts) for number in array.tolist()]
    assert len(joined) == len(plain) and np.asarray(joined).tolist() == plain and joined.dtype == np.uint16
    for shape in ((0,), (7,), (2, 3)) if plain else ((0,),):
        positions = generator.integers(0, max(1, len(plain)), shape)
        found = joined[positions]
        assert found.shape == shape and found.dtype == np.uint16
        assert found.ravel().tolist() == [plain[position] for position in positions.ravel()]
    with pytest.raises(IndexError):
        joined[[len(plain)]]


def test_a_folder_a_glob_and_the_joined_rows_mean_the_same(folder, tmp_path):
    rows = [row for number, count in enumerate((7, 1, 20)) for row in documents(number, count)]
    one = open_pretrain_data(write_jsonl(tmp_path / "one.jsonl", rows), TOKENIZER, 16, validation_share=0)[0]
    found = [open_pretrain_data(path, TOKENIZER, 16, validation_share=0)[0] for path in (folder, f"{folder}/[abc].*")]
    for dataset in found:
        assert (len(dataset), dataset.num_tokens) == (len(one), one.num_tokens)
        order = np.random.default_rng(0).permutation(len(one))
        for name, tensor in one[order].items():
            assert torch.equal(dataset[order][name], tensor)
        assert dataset.report.rows == dataset.report.kept == 28
    assert found[0].fingerprint == found[1].fingerprint != one.fingerprint and len(found[0].fingerprint) == 20


def test_the_report_is_the_sum(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "雪"}, {"text": ""}, {"other": 1}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": ""}] * 12 + [{"text": "山"}])
    report = open_pretrain_data(tmp_path, TOKENIZER, 2, validation_share=0)[0].report
    assert (report.rows, report.kept, report.dropped) == (16, 2, {"empty text": 13, "no field 'text'": 1})
    places = [f"{tmp_path}/a.jsonl:2", *(f"{tmp_path}/b.jsonl:{line}" for line in range(1, 10))]
    assert report.places["empty text"] == places
    assert report.bytes_read == sum(path.stat().st_size for path in tmp_path.glob("*.jsonl"))
    total, part = RowReport(), RowReport()
    part.note("x")
    total.add(part)
    total.add(part)
    assert total.notes == {"x": 2} and part.notes == {"x": 1}


def test_one_file_in_a_folder_is_that_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(0, 30))
    alone, within = (open_pretrain_data(place, TOKENIZER, 16)[0] for place in (path, tmp_path))
    assert alone.fingerprint == within.fingerprint and torch.equal(
        alone[range(5)]["labels"], within[range(5)]["labels"]
    )


def test_a_further_shard_is_tokenised_alone_and_moves_no_document(folder, monkeypatch):
    def parts():
        both = open_pretrain_data(folder, TOKENIZER, 8, validation_share=0.2, seed=3)
        return both[0].fingerprint, *(everything(part).split("</s><s>") for part in both)

    fingerprint, train, held_out = parts()
    assert len(held_out) == 1 + 0 + 4 and len(train) == 28 - 5  # a file of one document holds out none
    built, write = [], token_cache._write_arrays
    monkeypatch.setattr(token_cache, "_write_arrays", lambda path, *rest: built.append(path.name) or write(path, *rest))
    write_jsonl(folder / "b2.jsonl", documents(3, 10))
    other, more_train, more_held_out = parts()
    assert built == ["b2.jsonl"] and other != fingerprint
    assert set(train) < set(more_train) and set(held_out) < set(more_held_out) and len(more_held_out) == 7
    os.rename(folder / "b2.jsonl", folder / "d.jsonl")
    assert parts()[0] not in (fingerprint, other)  # the order counts


def test_conversations_and_pairs_from_shards(tmp_path):
    for number in range(3):
        rows = [{"history": [], "q": f"问{number}{row}", "a": "答" * (row + 1)} for row in range(9)]
        write_jsonl(tmp_path / f"sft{number}.jsonl", rows)
        pairs = [{"prompt": f"问{number}{row}", "chosen": "好" * (row + 1), "rejected": "不"} for row in range(9)]
        (tmp_path / f"dpo{number}.json").write_text(json.dumps(pairs))
    for open_data, kind in ((open_sft_data, "sft"), (open_preference_data, "dpo")):
        files = sorted(tmp_path.glob(f"{kind}?.*"))
        joined = open_data(f"{tmp_path}/{kind}*", TOKENIZER, 40, validation_share=0.3)
        single = [open_data(path, TOKENIZER, 40, validation_share=0.3) for path in files]
        for part, pieces in zip(joined, zip(*single)):
            rows = [(piece, row) for piece in pieces for row in range(len(piece))]
            assert len(part) == len(rows) and part.num_tokens == sum(piece.num_tokens for piece in pieces)
            for row, (piece, number) in enumerate(rows):
                expected = piece[[number]]
                assert all(torch.equal(part[[row]][name], expected[name]) for name in expected)
    train, validation = open_preference_data(f"{tmp_path}/dpo[01].json", TOKENIZER, 40, f"{tmp_path}/dpo[2]*")
    assert (len(train), len(validation)) == (18, 9)


def test_workers_get_the_folders_not_the_tokens(folder):
    cache = open_token_cache(folder, TOKENIZER, PretrainEncoding(TOKENIZER))
    packed = pickle.dumps(cache)
    again = pickle.loads(packed)
    assert len(packed) < 1000 and np.array_equal(again.tokens, cache.tokens) and again.fingerprint == cache.fingerprint


@pytest.mark.parametrize("name, problem", [("x/*.gz", "no such file"), ("empty", "no .csv or .jsonl file in this")])
def test_no_shard_is_one_line(tmp_path, run, name, problem):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.txt").write_text("text")
    process = run("1-pretrain.py", "--device", "cpu", "--data_path", tmp_path / name)
    assert_one_line_error(process, tmp_path / name, problem, "data_process.py pretrain", "--data_path")


def test_a_name_that_looks_like_a_pattern(tmp_path):
    odd = write_jsonl(tmp_path / "a[1].jsonl", documents(0, 1))
    write_jsonl(tmp_path / "a1.jsonl", documents(1, 1))
    assert data_files(odd, "pretrain") == [odd]
    (tmp_path / "b[1]").mkdir()
    inner = write_jsonl(tmp_path / "b[1]/x.jsonl", documents(0, 1))
    assert data_files(tmp_path / "b[1]", "pretrain") == [inner]


def test_a_damaged_shard_is_named(folder):
    (folder / "b.jsonl.gz").write_bytes((folder / "b.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(UserError, match="b.jsonl.gz: the compressed data is damaged"):
        open_pretrain_data(folder, TOKENIZER, 8)


COUNT = """
import sys
from model.data import token_cache
from model.tokenizer import load_tokenizer
write = token_cache._write_arrays
def counted(path, *rest):
    print("built", path.name)
    return write(path, *rest)
token_cache._write_arrays = counted
tokenizer = load_tokenizer()
cache = token_cache.open_token_cache(sys.argv[1], tokenizer, token_cache.PretrainEncoding(tokenizer))
print(cache.fingerprint)
"""


def test_two_processes_on_one_folder_build_each_cache_once(tmp_path):
    for number in range(6):
        write_jsonl(tmp_path / f"{number}.jsonl.gz", documents(number, 50))
    options = dict(stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)], **options) for _ in range(2)]
    lines = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and lines[0][-1] == lines[1][-1]
    built = [line for some in lines for line in some[:-1]]
    assert sorted(built) == [f"built {number}.jsonl.gz" for number in range(6)]


NODE = """
import os, runpy, sys
os.chdir(os.path.join(os.path.dirname(__file__), f"node{os.environ['RANK']}"))
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("missing", ["one", "all", "all on both"])
def test_a_shard_that_one_machine_lacks_is_said_once(tmp_path, small_tokenizer_path, missing):
    """Each of two ranks reads a folder of its own, as on two machines without shared storage."""
    for node in range(2):
        (tmp_path / f"node{node}/data").mkdir(parents=True)
        for number in range({"one": 2 - node, "all": 2 - 2 * node, "all on both": 0}[missing]):
            write_jsonl(tmp_path / f"node{node}/data/{number}.jsonl", documents(number, 40))
    (tmp_path / "node.py").write_text(NODE)
    flags = [*TINY_FLAGS, *CPU_FLAGS, "--max_steps", 1, "--tokenizer_path", small_tokenizer_path]
    flags += ["--out_dir", tmp_path / "out"]
    process = run_two_ranks(tmp_path / "node.py", ROOT / "1-pretrain.py", "--data_path", "data/*.jsonl", *flags)
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and len(lines) == 1, process.stderr
    expected = "rank 1 on" if missing == "one" else "data/*.jsonl: no such file"
    assert expected in lines[0] and "--data_path" in lines[0]
    assert not list(tmp_path.glob("out/*.pth"))


def test_adding_a_shard_is_refused_by_resume(folder, tmp_path, run, small_tokenizer_path):
    flags = [*TINY_FLAGS, *CPU_FLAGS, "--max_steps", 2, "--tokenizer_path", small_tokenizer_path]
    flags += ["--out_dir", tmp_path / "out"]
    text = good(run("1-pretrain.py", *flags, "--data_path", folder))
    assert "28 rows read, 28 kept" in text
    write_jsonl(folder / "d.jsonl", documents(3, 10))
    process = run("1-pretrain.py", *flags, "--data_path", folder, "--resume")
    assert_one_line_error(process, "--resume", "--data_path (its contents)")
