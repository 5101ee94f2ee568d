"""The demo replaces what it wrote, whatever became of its tables or of an earlier run, and nothing that others wrote."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from model.demo import files as demo_files
from model.demo.files import build_demo
from model.demo.world import DEFAULT_DIRECTORY
from model.errors import UserError


@pytest.fixture
def tables(tmp_path):
    """A copy of the shipped tables."""
    return shutil.copytree(DEFAULT_DIRECTORY, tmp_path / "tables")


@pytest.fixture
def small(monkeypatch):
    """Few texts and conversations: a build takes half the time."""
    monkeypatch.setattr(demo_files.write_raw_files, "__defaults__", (50_000, 1, 50, 50, 50))


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_build_makes_everything_and_says_where_it_is(tmp_path, small):
    made = tmp_path / "made"
    reports = build_demo(made)
    names = {str(path) for path in contents(made)}
    assert {
        "pretrain_data.csv",
        "sft_data_single.csv",
        "sft_data.csv",
        "lora_identity.csv",
        "dpo/train_data.json",
    } <= names
    assert {f"heldout/{name}.jsonl" for name in ("facts", "multi_turn", "identity", "arithmetic", "cloze")} <= names
    assert {"heldout/pretrain.csv", "heldout/dpo.json", "raw/demo_pretrain.jsonl", "raw/demo_dpo.json"} <= names
    assert list(made.glob("ceval-exam/val/demo_*.csv")) and not (made / "raw/demo_unfinished").exists()
    assert [list(report.outputs) for report in reports.values()] == [
        [str(made / "pretrain_data.csv")],
        [str(made / "sft_data_single.csv"), str(made / "sft_data.csv")],
        [str(made / "lora_identity.csv")],
        [str(made / "dpo/train_data.json")],
    ]
    lines = (made / "pretrain_data.csv").read_text("utf-8").count("\n")
    assert lines > reports["pretrain"].outputs[str(made / "pretrain_data.csv")]["rows"] > 100


def test_the_identity_is_one_file_with_every_raw_row_once(tmp_path, small):
    build_demo(tmp_path)
    with open(tmp_path / "lora_identity.csv", encoding="utf-8", newline="") as handle:
        rows = [(json.loads(row["history"]), row["q"], row["a"]) for row in csv.DictReader(handle)]
    raw = map(json.loads, (tmp_path / "raw/demo_sft_identity.jsonl").read_text("utf-8").splitlines())
    expected = []
    for row in raw:
        if (row["history"], row["input"], row["output"]) not in expected:
            expected.append((row["history"], row["input"], row["output"]))
    assert rows == expected and {bool(history) for history, _, _ in rows} == {True, False}
    assert not list(tmp_path.glob("*.bad_lines.txt"))


def test_a_build_of_edited_tables_replaces_the_one_before(tmp_path, tables, small):
    build_demo(tmp_path / "made", tables=tables)
    with open(tables / "countries.csv", "a", encoding="utf-8") as handle:
        handle.write("冰岛,雷克雅未克,欧洲\n")
    build_demo(tmp_path / "made", tables=tables)
    assert "雷克雅未克" in (tmp_path / "made/heldout/facts.jsonl").read_text("utf-8")
    build_demo(tmp_path / "made", seed=1, tables=tables)
    build_demo(tmp_path / "apart", seed=1, tables=tables)
    assert contents(tmp_path / "made") == contents(tmp_path / "apart")


@pytest.mark.parametrize("name", ["sft_data.csv", "lora_identity.csv", "heldout/identity.jsonl", "dpo/train_data.json"])
def test_what_others_wrote_or_changed_stays(tmp_path, small, name):
    own = tmp_path / "made" / name
    own.parent.mkdir(parents=True)
    own.write_bytes(b"my own")
    with pytest.raises(UserError, match="not made by the demo .* --output_dir.* --overwrite") as caught:
        build_demo(tmp_path / "made")
    assert str(own) in str(caught.value) and list(contents(tmp_path / "made").values()) == [b"my own"]
    build_demo(tmp_path / "made", overwrite=True)
    content = own.read_bytes()
    assert content != b"my own"
    own.write_bytes(content[:-2] + b"!\n")  # as long as before, and as old
    copy = (tmp_path / "made/raw/demo_copies" / name).stat()
    os.utime(own, ns=(copy.st_atime_ns, copy.st_mtime_ns))
    before = contents(tmp_path / "made")
    with pytest.raises(UserError, match="changed since"):
        build_demo(tmp_path / "made")
    assert contents(tmp_path / "made") == before
    own.unlink()
    build_demo(tmp_path / "made")
    assert own.read_bytes() == content


def test_a_failed_build_leaves_the_one_before(tmp_path, tables, small, monkeypatch):
    build_demo(tmp_path / "made", tables=tables)
    before = {path: data for path, data in contents(tmp_path / "made").items() if not path.name.startswith("demo_")}

    def fail(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo_files, "process_corpus", fail)
        build_demo(tmp_path / "made", seed=1, tables=tables)
    after = {path: data for path, data in contents(tmp_path / "made").items() if not path.name.startswith("demo_")}
    assert after == before
    build_demo(tmp_path / "made", seed=1, tables=tables)


@pytest.mark.parametrize(
    ("built_before", "step"), [(False, 1), (False, 23), (True, 0), (True, 1), (True, 2), (True, 11)]
)
def test_a_run_killed_while_it_moves_its_files_can_be_repeated(tmp_path, small, monkeypatch, built_before, step):
    """Each of twelve files is written to its place, then its copy is moved: 24 steps. A run after it needs no --overwrite."""
    if built_before:
        build_demo(tmp_path / "made")

    class Killed(BaseException):
        """Like kill -9, it lets nothing be tidied up behind it."""

    steps = []

    def dying(function):
        def call(*arguments, **options):
            # The preferences are the last file to be made: all that follows is moving.
            if steps or (tmp_path / "made/raw/demo_unfinished/dpo/train_data.json").exists():
                steps.append(arguments)
            if len(steps) > step:
                raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(demo_files, "move", dying(demo_files.move))
        patch.setattr(demo_files, "atomic_write", dying(demo_files.atomic_write))
        build_demo(tmp_path / "made", seed=1)
    build_demo(tmp_path / "made", seed=2)
    build_demo(tmp_path / "apart", seed=2)
    assert contents(tmp_path / "made") == contents(tmp_path / "apart")


def test_a_first_build_may_be_killed(tmp_path):
    code = f"from model.demo.files import build_demo; build_demo({str(tmp_path)!r})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "raw/demo_unfinished/heldout/facts.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "sft_data.csv").exists()
    build_demo(tmp_path)
    rows = (tmp_path / "heldout/facts.jsonl").read_text("utf-8").splitlines()
    assert len(rows) > 1000 and json.loads(rows[-1])["q"] and not list(tmp_path.rglob("demo_unfinished"))
