"""The token cache holds the file's tokens, is found again only for the same bytes and tokenizer, is never half."""

import errno
import hashlib
import json
import os
import pickle
import resource
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rows import texts, write_csv

from conftest import ROOT
from model.data import token_cache
from model.data.rows import RowReport
from model.data.token_cache import PreferenceEncoding, PretrainEncoding, SFTEncoding, open_token_cache
from model.errors import UserError
from model.tokenizer import encode_text, load_tokenizer

TOKENIZER = load_tokenizer()


def open_pretrain(path, cache_dir=None):
    return open_token_cache(path, TOKENIZER, PretrainEncoding(TOKENIZER), cache_dir)


def entries(cache_dir):
    return [entry for entry in cache_dir.iterdir() if entry.name not in (".lock", "hashes.json")]


def settled(path):
    """The file as if written an hour ago: only then is its hash remembered."""
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    return path


def documents(cache):
    return [piece.tolist() for piece in np.split(np.asarray(cache.tokens), cache.document_ends[:-1])]


@settings(deadline=None, max_examples=30)
@given(values=st.lists(texts.filter(bool), min_size=1, max_size=5))
def test_round_trip(tmp_path_factory, values):
    path = write_csv(tmp_path_factory.mktemp("cache") / "a.csv", ["text"], [[value] for value in values])
    cache = open_pretrain(path)
    assert cache.tokens.dtype == np.uint16
    assert documents(cache) == [[1, *encode_text(TOKENIZER, value), 2] for value in values]
    assert [TOKENIZER.decode(ids[1:-1], clean_up_tokenization_spaces=False) for ids in documents(cache)] == values


def test_many_blocks_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr("model.data.token_cache.BLOCK_CHARACTERS", 50)
    values = [f"第{number}句" * (number % 7 + 1) for number in range(500)]
    cache = open_pretrain(write_csv(tmp_path / "a.csv", ["text"], [[value] for value in values]))
    assert documents(cache) == [[1, *encode_text(TOKENIZER, value), 2] for value in values]


LONG = st.lists(st.sampled_from(["雪", "\n", "ab ", "7", "。", "\n\n"]), min_size=1, max_size=60).map("".join)


@settings(deadline=None, max_examples=60)
@given(values=st.lists(LONG, min_size=1, max_size=4))
def test_long_documents_are_encoded_in_pieces_and_stay_whole(tmp_path_factory, values):
    path = write_csv(tmp_path_factory.mktemp("long") / "a.csv", ["text"], [[value] for value in values])
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("BLOCK_CHARACTERS", 16), ("PIECE_CHARACTERS", 8), ("LONGEST_PIECE", 400)):
            patch.setattr(f"model.data.token_cache.{name}", size)
        assert documents(open_pretrain(path)) == [[1, *encode_text(TOKENIZER, value), 2] for value in values]


def test_only_lines_longer_than_the_longest_piece_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("model.data.token_cache.PIECE_CHARACTERS", 4)
    monkeypatch.setattr("model.data.token_cache.LONGEST_PIECE", 10)
    line = "informationinformation"
    cache = open_pretrain(write_csv(tmp_path / "a.csv", ["text"], [[f"ab\n{line}"]]))
    pieces = "ab\n", line[:10], line[10:20], line[20:]
    assert documents(cache) == [[1, *(token for piece in pieces for token in encode_text(TOKENIZER, piece)), 2]]
    monkeypatch.setattr("model.data.token_cache.LONGEST_PIECE", 25)
    cache = open_pretrain(write_csv(tmp_path / "b.csv", ["text"], [[f"{line}\nab"]]))
    assert documents(cache) == [[1, *encode_text(TOKENIZER, f"{line}\nab"), 2]]
    pieces = ["很短\n", "很长很长很长很长很长", "的一行\n", "雪"]
    monkeypatch.setattr("model.data.token_cache.LONGEST_PIECE", 10)
    path = write_csv(tmp_path / "c.csv", ["text"], [["".join(pieces)]])
    assert [piece for _, (piece,) in PretrainEncoding(TOKENIZER).items(path, RowReport())] == pieces


def test_the_hash_is_remembered_while_the_file_stays_as_it_is(tmp_path, monkeypatch):
    path, hashed, digest = settled(write_csv(tmp_path / "a.csv", ["text"], [["雪"]])), [], hashlib.file_digest
    monkeypatch.setattr("hashlib.file_digest", lambda *arguments: hashed.append(1) or digest(*arguments))
    memory = tmp_path / ".cache/hashes.json"
    folders = [open_pretrain(path).folder for _ in range(3)]
    assert len(hashed) == 1 and len(set(folders)) == 1
    for damage in ("", "[1]", "5", "{", '{"a": 1}', json.dumps({str(path): 3}), json.dumps({str(path): [[1], "x"]})):
        memory.write_text(damage)
        hashed.clear()
        assert [open_pretrain(path).folder for _ in range(2)] == folders[:2] and len(hashed) == 1
    memory.unlink()
    memory.mkdir()
    assert open_pretrain(path).folder == folders[0]
    memory.rmdir()
    assert open_pretrain(path).folder == folders[0]
    other = settled(write_csv(tmp_path / "b.csv", ["text"], [["山"]]))
    assert open_pretrain(other).folder != folders[0]
    hashed.clear()
    assert open_pretrain(path).folder == folders[0] and open_pretrain(other) and not hashed
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    os.utime(other, ns=times)
    os.replace(other, path)  # same size and mtime, another inode
    assert open_pretrain(path).folder != folders[0] and len(hashed) == 1
    path.write_bytes(path.read_bytes().replace("山".encode(), "雪".encode()))
    os.utime(path, ns=times)  # the same inode too
    assert open_pretrain(path).folder == folders[0] and len(hashed) == 2


def test_the_hash_of_a_file_written_just_now_is_not_remembered(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["text"], [["雪"]])
    open_pretrain(path)
    assert not (tmp_path / ".cache/hashes.json").exists()


def test_a_cache_in_a_folder_that_cannot_be_locked_is_used(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "a.csv", ["text"], [["雪"]])
    first = open_pretrain(path).folder

    def denied(*arguments, **named):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", denied)
    monkeypatch.setattr("os.utime", denied)  # it cannot be marked as used either
    assert open_pretrain(path).folder == first


def test_compressed_and_plain_files_hold_the_same_tokens(tmp_path):
    import gzip

    plain = tmp_path / "a.jsonl"
    plain.write_text('{"text": "雪"}\n')
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    assert documents(open_pretrain(plain)) == documents(open_pretrain(packed))


def test_large_vocabulary_takes_four_bytes(tmp_path):
    class Large(type(TOKENIZER)):
        def __len__(self):
            return 70_000

    tokenizer = Large(
        tokenizer_object=TOKENIZER.backend_tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    path = write_csv(tmp_path / "a.csv", ["text"], [["雪"]])
    assert open_token_cache(path, tokenizer, PretrainEncoding(tokenizer)).tokens.dtype == np.uint32


def test_fingerprint_is_of_content_not_of_time_or_size(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["text"], [["aaaa"]])
    first, stat = open_pretrain(path).folder, path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert open_pretrain(path).folder == first
    path.write_bytes(path.read_bytes().replace(b"aaaa", b"bbbb"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_pretrain(path).folder != first
    assert documents(open_pretrain(path))[0][1:-1] == encode_text(TOKENIZER, "bbbb")


def test_another_tokenizer_with_the_same_control_tokens_finds_no_cache(tmp_path, small_tokenizer):
    path = write_csv(tmp_path / "a.csv", ["text"], [["北京"]])
    assert PretrainEncoding(small_tokenizer).format == PretrainEncoding(TOKENIZER).format
    first, other = open_pretrain(path), open_token_cache(path, small_tokenizer, PretrainEncoding(small_tokenizer))
    assert other.fingerprint != first.fingerprint
    assert [documents(cache)[0][1:-1] for cache in (first, other)] == [
        encode_text(tokenizer, "北京") for tokenizer in (TOKENIZER, small_tokenizer)
    ]


def test_a_cache_of_another_format_is_not_found(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "a.csv", ["text"], [["雪"]])
    first = open_pretrain(path).folder
    monkeypatch.setattr("model.data.token_cache.FORMAT_VERSION", token_cache.FORMAT_VERSION - 1)
    assert open_pretrain(path).folder != first


def test_the_kind_of_file_decides_how_it_is_read(tmp_path):
    """The same bytes, as .csv and as .jsonl."""
    for name in ("a.csv", "a.jsonl"):
        (tmp_path / name).write_text('{"text": "雪"}\n')
    assert documents(open_pretrain(tmp_path / "a.jsonl")) == [[1, *encode_text(TOKENIZER, "雪"), 2]]
    with pytest.raises(UserError, match="a.csv: no column 'text'"):
        open_pretrain(tmp_path / "a.csv")


def test_a_hit_reads_nothing_but_the_cache(tmp_path, monkeypatch):
    path = settled(write_csv(tmp_path / "a.csv", ["text"], [["雪"], [""]]))
    first = open_pretrain(path)
    monkeypatch.setattr("model.data.token_cache._build", lambda *arguments: pytest.fail("built twice"))
    monkeypatch.setattr("hashlib.file_digest", lambda *arguments: pytest.fail("hashed twice"))
    monkeypatch.setattr(
        "model.data.token_cache._lock", lambda *arguments: pytest.fail("a read-only folder cannot be locked")
    )
    again = open_pretrain(path)
    assert documents(again) == documents(first)
    assert again.report.dropped == {"empty text": 1} and again.report.places["empty text"] == [f"{path}:3"]


def test_a_cut_cache_is_built_again(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["text"], [["雪山"]])
    folder = open_pretrain(path).folder
    expected = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(expected[:-2])
    assert documents(open_pretrain(path)) and (folder / "tokens.bin").read_bytes() == expected


def cache_description(folder, change):
    """Write cache.json anew after `change` has been at what it holds."""
    values = json.loads((folder / "cache.json").read_text())
    changed = change(values)
    (folder / "cache.json").write_text(changed if isinstance(changed, str) else json.dumps(values))


CRAFTED = {
    "no array": lambda values: values["arrays"].pop("document_ends"),
    "no arrays": lambda values: values.pop("arrays"),
    "arrays a list": lambda values: values.update(arrays=[1]),
    "array a number": lambda values: values["arrays"].update(tokens=5),
    "too short": lambda values: values["arrays"]["tokens"].update(length=3),
    "too long": lambda values: values["arrays"]["tokens"].update(length=5),
    "huge": lambda values: values["arrays"]["tokens"].update(length=10**30),
    "negative": lambda values: values["arrays"]["tokens"].update(length=-4),
    "a shape": lambda values: values["arrays"]["tokens"].update(length=[2, 2]),
    "pointers": lambda values: values["arrays"]["document_ends"].update(dtype="|O"),
    "numbers with a point": lambda values: values["arrays"]["document_ends"].update(dtype="<f8"),
    "no dtype": lambda values: values["arrays"]["tokens"].update(dtype=["u2"]),
    "no report": lambda values: values.pop("report"),
    "report of nothing": lambda values: values.update(report=None),
    "rows of text": lambda values: values["report"].update(rows="two"),
    "count of nothing": lambda values: values["report"].update(dropped={"empty": None}),
    "dropped a list": lambda values: values["report"].update(dropped=["x"]),
    "places a list": lambda values: values["report"].update(places=[["x", "y"]]),
    "place a number": lambda values: values["report"].update(places={"empty": [5]}),
    "a list": lambda values: "[]",
    "a number": lambda values: "5",
    "nested": lambda values: "[" * 100_000,
    "digits": lambda values: "1" * 5000,
    "cut": lambda values: '{"arrays"',
    "not UTF-8": lambda values: "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
}


@pytest.mark.parametrize("change", CRAFTED.values(), ids=CRAFTED)
def test_a_cache_that_is_described_wrongly_is_built_again(tmp_path, change):
    path = write_csv(tmp_path / "a.csv", ["text"], [["雪"], ["ab"]])
    folder, expected = open_pretrain(path).folder, documents(open_pretrain(path))
    before = (folder / "cache.json").read_bytes()
    cache_description(folder, change)
    assert documents(open_pretrain(path)) == expected
    assert (folder / "cache.json").read_bytes() == before


@pytest.mark.parametrize("name", ["cache.json", "tokens.bin"])
def test_a_folder_in_the_place_of_a_file_is_no_cache(tmp_path, name):
    path = write_csv(tmp_path / "a.csv", ["text"], [["雪"]])
    folder = open_pretrain(path).folder
    (folder / name).unlink()
    (folder / name).mkdir()
    assert documents(open_pretrain(path)) == [[1, *encode_text(TOKENIZER, "雪"), 2]]


def test_a_long_name_is_shortened_for_the_cache(tmp_path):
    path = write_csv(tmp_path / f"{'雪' * 80}.csv", ["text"], [["雪"]])
    folder = open_pretrain(path).folder
    assert folder.name.startswith("雪" * 33 + "-pretrain-") and open_pretrain(path).folder == folder


def test_caches_that_nobody_has_opened_for_a_month_go(tmp_path, capsys):
    """Of the same file name and kind only; a run that opens one, even without tokenising, keeps it another month."""
    month, cache_dir = 30 * 24 * 3600, tmp_path / ".cache"

    def build(name, text):
        (tmp_path / name).unlink(missing_ok=True)
        return open_pretrain(write_csv(tmp_path / name, ["text"], [[text]])).folder

    def aged(folder, seconds):
        os.utime(folder / "cache.json", (time.time() - seconds, time.time() - seconds))
        return folder

    old = aged(build("a[1].csv", "一"), month + 60)
    young = aged(build("a[1].csv", "二"), month - 60)
    assert set(entries(cache_dir)) == {young}  # the second removed the first
    assert f"{old}: no run has opened this token cache for 30 days; removed" in capsys.readouterr().err
    other, longer = aged(build("a1.csv", "三"), month + 60), aged(build("a[1]-b.csv", "四"), month + 60)
    (cache_dir / f"a[1]-pretrain-{'x' * 20}").mkdir()
    aged(young, month + 60)
    write_csv(tmp_path / "a[1].csv", ["text"], [["二"]])
    assert open_pretrain(tmp_path / "a[1].csv").folder == young
    new = build("a[1].csv", "五")
    assert set(entries(cache_dir)) == {young, other, longer, new, cache_dir / f"a[1]-pretrain-{'x' * 20}"}


def test_workers_get_the_folder_not_the_tokens(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["text"], [["雪" * 5000]])
    cache = open_pretrain(path)
    packed = pickle.dumps(cache)
    assert len(packed) < 500 and documents(pickle.loads(packed)) == documents(cache)


@pytest.mark.parametrize("name", ["none.csv", "folder.csv", "circle.csv"])
@pytest.mark.parametrize(
    "encoding", [PretrainEncoding(TOKENIZER), SFTEncoding(TOKENIZER, 64), PreferenceEncoding(TOKENIZER, 64)]
)
def test_a_data_file_that_is_not_there_is_to_be_made(tmp_path, name, encoding):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "circle.csv").symlink_to("circle.csv")
    problem = "no .* file in this folder" if name == "folder.csv" else "no such file"
    make = f"make it with python data_process.py {encoding.kind} .*python data_process.py demo, .*--data_path"
    with pytest.raises(UserError, match=f"^{tmp_path}/{name}: {problem}; {make}"):
        open_token_cache(tmp_path / name, TOKENIZER, encoding)


def test_nothing_usable_and_nothing_left_behind(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["text"], [[""], [""]])
    with pytest.raises(UserError, match="no row left to learn from.*empty text"):
        open_pretrain(path)
    path = write_csv(
        tmp_path / "b.csv", ["history", "q", "a"], [["[]", "q", " "], ["{}", "q", "a"], ["[[1, 2]]", "q", "a"]]
    )
    with pytest.raises(UserError, match="no row left to learn from"):
        open_token_cache(path, TOKENIZER, SFTEncoding(TOKENIZER, 64))
    assert entries(tmp_path / ".cache") == []


@pytest.mark.parametrize("code, word", [(28, "No space left"), (30, "Read-only"), (13, "Permission")])
def test_a_folder_that_cannot_be_written_ends_in_one_line(tmp_path, monkeypatch, code, word):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    path = write_csv(tmp_path / "a.csv", ["text"], [["雪"]])
    monkeypatch.setattr("model.data.token_cache._write_arrays", fail)
    with pytest.raises(UserError, match=f"{word}.*--cache_dir"):
        open_pretrain(path, tmp_path / "elsewhere")
    assert entries(tmp_path / "elsewhere") == []


def test_a_full_disk_while_tokenising_ends_in_one_line(tmp_path):
    """A limit of the size of files stands for the end of the disk."""
    path = write_csv(tmp_path / "a.csv", ["text"], [[f"{number}山高水长"] for number in range(40_000)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
    try:
        with pytest.raises(UserError, match="cannot write the token cache.*free some space"):
            open_pretrain(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert entries(tmp_path / ".cache") == []


def test_a_file_that_changes_while_another_process_is_waited_for(tmp_path, monkeypatch):
    path, lock = write_csv(tmp_path / "a.csv", ["text"], [["雪"]]), token_cache._lock
    first = open_pretrain(path).folder
    write_csv(path, ["text"], [["山"]])

    def waiting(directory):
        write_csv(path, ["text"], [["雪"]])
        return lock(directory)

    monkeypatch.setattr("model.data.token_cache._lock", waiting)
    assert open_pretrain(path).folder == first and documents(open_pretrain(path))[0][1:-1] == encode_text(
        TOKENIZER, "雪"
    )


@pytest.mark.parametrize("circle", [True, False])
def test_a_cache_folder_that_cannot_be_one_ends_in_one_line(tmp_path, circle):
    path, cache_dir = write_csv(tmp_path / "a.csv", ["text"], [["雪"]]), tmp_path / "cache"
    cache_dir.symlink_to(cache_dir) if circle else cache_dir.touch()
    for place in (cache_dir, cache_dir / "within"):
        with pytest.raises(UserError, match=f"^{place}: cannot write the token cache .*--cache_dir"):
            open_pretrain(path, place)


def test_a_file_that_changes_meanwhile_is_refused(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "a.csv", ["text"], [["雪"]])
    arrays = PretrainEncoding.arrays

    def append_and_go_on(*arguments):
        with open(path, "a") as handle:
            handle.write("more\n")
        return arrays(*arguments)

    monkeypatch.setattr(PretrainEncoding, "arrays", append_and_go_on)
    with pytest.raises(UserError, match="changed while"):
        open_pretrain(path)
    assert entries(tmp_path / ".cache") == []


BUILD = """
import os, sys, time
from model.data import token_cache
from model.tokenizer import load_tokenizer
step, path, go = sys.argv[1:]
module, _, name = step.rpartition(".")
module = sys.modules[module] if module else token_cache
function = getattr(module, name)
def held(*arguments):
    result = function(*arguments)
    print("held", flush=True)
    while not os.path.exists(go):
        time.sleep(0.02)
    return result
setattr(module, name, held)
tokenizer = load_tokenizer()
encoding = token_cache.PretrainEncoding(tokenizer)
print(token_cache.open_token_cache(path, tokenizer, encoding).tokens.tolist(), flush=True)
"""


@pytest.fixture
def start_build():
    processes = []

    def start(step, path, go, output):
        """A process that tokenises `path` and, behind the function `step` in it, waits until `go` exists."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", BUILD, step, str(path), str(go)]
        with open(output, "w") as handle:
            processes.append(subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT, env=environment))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def wait_for(condition, processes):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path, start_build):
    path, go = write_csv(tmp_path / "a.csv", ["text"], [["雪"]]), tmp_path / "go"
    outputs = [tmp_path / "0", tmp_path / "1"]
    processes = [start_build("_write_arrays", path, go, output) for output in outputs]
    wait_for(lambda: sorted(output.read_text()[:7] for output in outputs) == ["held\n", "waiting"], processes)
    go.touch()
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert {output.read_text().splitlines()[-1] for output in outputs} == {str([1, *encode_text(TOKENIZER, "雪"), 2])}
    assert sum("held" in output.read_text() for output in outputs) == 1


def test_a_killed_build_leaves_nothing_that_looks_usable_and_no_stale_lock(tmp_path, start_build):
    path, output = write_csv(tmp_path / "a.csv", ["text"], [["雪"]]), tmp_path / "0"
    process = start_build("_write_arrays", path, tmp_path / "never", output)
    wait_for(lambda: output.read_text() == "held\n", [process])
    process.kill()
    process.wait()
    leftovers = entries(tmp_path / ".cache")
    assert len(leftovers) == 1 and ".tmp-" in leftovers[0].name
    cache = open_pretrain(path)
    assert documents(cache) == [[1, *encode_text(TOKENIZER, "雪"), 2]]
    assert entries(tmp_path / ".cache") == [cache.folder]


def test_leftovers_of_others_stay_for_a_day(tmp_path):
    """Only the dead of this host are known to be dead; elsewhere a build may still be going on."""
    path, cache_dir = write_csv(tmp_path / "a.csv", ["text"], [["雪"]]), tmp_path / ".cache"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = socket.gethostname()
    names = [
        f"{here}-{dead.pid}-x",
        f"{here}-{os.getpid()}-x",
        f"elsewhere-{dead.pid}-x",
        "older_format",
        "elsewhere-1-old",
    ]
    dying, living, elsewhere, unknown, old = (cache_dir / f"b-sft-{'0' * 20}.tmp-{name}" for name in names)
    mine = cache_dir / "notes.tmp-old"
    for folder in (dying, living, elsewhere, unknown, old, mine):
        folder.mkdir(parents=True)
        (folder / "tokens.bin").touch()
    for file in (old / "tokens.bin", old, mine / "tokens.bin", mine):
        os.utime(file, (time.time() - 90_000, time.time() - 90_000))
    cache = open_pretrain(path)
    assert set(entries(cache_dir)) == {living, elsewhere, unknown, mine, cache.folder}


def test_of_processes_that_start_together_one_reads_the_file(tmp_path, start_build):
    path, go = settled(write_csv(tmp_path / "a.csv", ["text"], [["雪"]])), tmp_path / "go"
    outputs = [tmp_path / str(rank) for rank in range(3)]
    processes = [start_build("hashlib.file_digest", path, go, output) for output in outputs]
    wait_for(
        lambda: sorted(output.read_text()[:7] for output in outputs) == ["held\n", "waiting", "waiting"], processes
    )
    go.touch()
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert sum("held" in output.read_text() for output in outputs) == 1


def test_without_working_locks_the_first_to_finish_wins(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "no locks")

    path = write_csv(tmp_path / "a.csv", ["text"], [["雪"]])
    write, other, inodes = token_cache._write_arrays, [], []

    def write_after_another(*arguments):
        monkeypatch.setattr("model.data.token_cache._write_arrays", write)
        other.append(open_pretrain(path).folder)
        inodes.append(other[0].stat().st_ino)
        return write(*arguments)

    monkeypatch.setattr("fcntl.flock", no_locks)
    monkeypatch.setattr("model.data.token_cache._write_arrays", write_after_another)
    assert [open_pretrain(path).folder] == other == entries(tmp_path / ".cache")
    assert [other[0].stat().st_ino] == inodes  # what others may have mapped already is not replaced


def test_sft_cache_by_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"history": [["问", "答"], ["又", " "]], "q": "q", "a": "a"},
        {"history": [], "q": "q", "a": ""},
        {
            "conversations": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "</s>"},
                {"role": "user", "content": "x"},
            ]
        },
        {"conversations": [{"role": "user", "content": "hi"}]},
        {"conversations": [{"role": "robot", "content": "hi"}]},
        {"conversations": [{"role": "user"}]},
        {"conversations": "hi"},
        {"history": [["a", "b", "c"]], "q": "q", "a": "a"},
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    cache = open_token_cache(path, TOKENIZER, SFTEncoding(TOKENIZER, 64))
    turns = [
        "user\n问",
        "assistant\n答",
        "user\n又",
        "assistant\n ",
        "user\nq",
        "assistant\na",
        "user\nhi",
        "assistant\n</s>",
    ]
    text = "".join(f"<s>{turn}</s>\n" for turn in turns)
    assert TOKENIZER.decode(cache.tokens) == text and (cache.tokens == 2).sum() == 8
    assert TOKENIZER.decode(cache.tokens[cache.mask == 1]) == "答</s>"
    assert TOKENIZER.decode(cache.tokens[cache.mask == 2]) == "a</s></s></s>"
    assert np.cumsum(cache.row_lengths).tolist() == cache.row_ends.tolist()
    assert TOKENIZER.decode(cache.tokens[cache.row_ends[0] :]) == "<s>user\nhi</s>\n<s>assistant\n</s></s>\n"
    assert cache.report.dropped.total() == 6 and cache.report.kept == 2
    lines = {place.rsplit(":", 1)[1] for places in cache.report.places.values() for place in places}
    assert lines == {"2", "4", "5", "6", "7", "8"}


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_preference_cache_by_rows(tmp_path, monkeypatch, block):
    monkeypatch.setattr("model.data.token_cache.BLOCK_CHARACTERS", block)
    path = tmp_path / "a.json"
    pair = {"chosen": "好的", "rejected": "不"}
    rows = [
        {"prompt": "问", "history": [["早", "早！"]], **pair},
        {"prompt": "问", "chosen": "好"},
        "text",
        {"prompt": "问", "chosen": "长" * 200, "rejected": "短"},
        {"prompt": "问", "chosen": "好", "rejected": "好"},
        {"prompt": "又问", "chosen": "</s>", "rejected": " "},
        {"prompt": "又问", "chosen": "</s>", "rejected": "x"},
    ]
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    cache = open_token_cache(path, TOKENIZER, PreferenceEncoding(TOKENIZER, 64))
    first = "<s>user\n早</s>\n<s>assistant\n早！</s>\n<s>user\n问</s>\n<s>assistant\n"
    second = "<s>user\n又问</s>\n<s>assistant\n"
    text = f"{first}好的</s>\n{first}不</s>\n{second}</s></s>\n{second}x</s>\n"
    assert TOKENIZER.decode(cache.tokens) == text
    assert TOKENIZER.decode(cache.tokens[cache.mask == 2]) == "好的</s>不</s></s></s>x</s>"
    assert TOKENIZER.decode(cache.tokens[cache.mask == 1]) == "早！</s>" * 2  # learned in stage 3, not here
    lengths = cache.chosen_lengths + cache.rejected_lengths
    assert np.cumsum(lengths).tolist() == cache.row_ends.tolist() and lengths[1] == 0 and len(lengths) == 3
    assert cache.chosen_lengths[2] > cache.rejected_lengths[2] and cache.report.kept == 2 and cache.report.rows == 7
    assert {reason: [place.removeprefix(f"{path}: item ") for place in places]
            for reason, places in cache.report.places.items()} == {
        'no "rejected" answer': ["2"],
        "not a JSON object": ["3"],
        "an answer leaves no room for the question within --max_seq_len 64": ["4"],
        "chosen and rejected answer are the same": ["5"],
        'empty "rejected" answer': ["6"],
    }  # fmt: skip


@pytest.mark.parametrize("content", ["", "[]", " \n[ ]\n"])
def test_a_preference_file_without_rows_is_empty(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match="a.json: is empty, it has no rows"):
        open_token_cache(path, TOKENIZER, PreferenceEncoding(TOKENIZER, 64))
    assert entries(tmp_path / ".cache") == []
