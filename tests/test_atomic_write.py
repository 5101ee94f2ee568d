"""A result appears whole or not at all, through links, never in the place of a device; what the dead left goes."""

import errno
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT
from model import files
from model.errors import UserError
from model.files import atomic_folder, atomic_write, refuse_existing


def write(path, data=b"new"):
    with atomic_write(path) as handle:
        handle.write(data)


def test_bytes_are_on_the_disk_before_the_name_is_and_the_name_before_the_end(tmp_path, monkeypatch):
    path, steps = tmp_path / "a", []
    path.write_bytes(b"old")

    def recorded(name, function):
        def call(*arguments):
            directory = name == "fsync" and os.path.isdir(f"/proc/self/fd/{arguments[0]}")
            steps.append((f"{name} of the directory" if directory else name, path.read_bytes()))
            return function(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    write(path)
    assert steps == [("fsync", b"old"), ("replace", b"old"), ("fsync of the directory", b"new")]


def test_the_bytes_are_written_before_they_are_synchronised(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    write(tmp_path / "a", b"four")
    assert sizes[0] == 4


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_earlier_file_alone(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error), atomic_write(tmp_path / "a") as handle:
        handle.write(b"half")
        raise error
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    for target in ("there", "not yet"):
        link = tmp_path / f"link to {target}"
        link.symlink_to(tmp_path / "folder" / target)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/there").write_bytes(b"old")
    for link in tmp_path.glob("link*"):
        write(link)
        assert link.is_symlink() and link.read_bytes() == b"new"
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == ["not yet", "there"]


def test_what_is_no_file_is_refused(tmp_path):
    circle, folder, pipe = tmp_path / "a", tmp_path / "folder", tmp_path / "pipe"
    circle.symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(circle)
    folder.mkdir()
    os.mkfifo(pipe)
    before = set(tmp_path.iterdir())
    for path in (circle, folder, pipe):
        with pytest.raises(UserError, match=f"^{path}: is not a regular file"):
            write(path)
    assert set(tmp_path.iterdir()) == before


def test_what_a_killed_run_left_goes_when_the_file_is_written_again(tmp_path):
    """Only the dead of this host are known to be dead; elsewhere somebody may still be writing."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, day = socket.gethostname(), 24 * 3600
    ages = {
        f"x[1].tmp-{here}-{dead.pid}-1": 0,
        "x[1].tmp-123": day + 60,  # as earlier versions called them
        f"x[1].tmp-elsewhere-{dead.pid}-1": day + 60,
        f"x[1].tmp-elsewhere-{dead.pid}-2": day - 60,
        f"x[1].tmp-{here}-{os.getpid()}-1": 0,
        f"x[1].tmp-{here}-{'9' * 30}-1": 0,
        f"y.tmp-{here}-{dead.pid}-1": day + 60,
    }
    for name, age in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    write(tmp_path / "x[1]")
    assert {file.name for file in tmp_path.iterdir()} == {"x[1]", *list(ages)[3:]}


def test_a_killed_run_names_what_it_writes_after_itself(tmp_path):
    code = "import os, sys; from model.files import atomic_write\nwith atomic_write(sys.argv[1]): os._exit(9)"
    for left in (1, 1, 0):
        if left:
            subprocess.run([sys.executable, "-c", code, tmp_path / "a"])
        else:
            write(tmp_path / "a")
        assert len(list(tmp_path.glob("a.tmp-*"))) == left


def test_leftovers_that_vanish_meanwhile_are_no_trouble(tmp_path, monkeypatch):
    (tmp_path / "a.tmp-1").symlink_to("nowhere")
    monkeypatch.setattr(files, "ABANDONED_AFTER", -1)
    write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_existing_files_are_refused_unless_overwritten(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    refuse_existing([tmp_path / "b"], overwrite=False)
    refuse_existing([tmp_path / "a", tmp_path / "dangling"], overwrite=True)
    for name in ("a", "dangling"):
        with pytest.raises(UserError, match=f"{tmp_path}/{name}: is there already.*--overwrite"):
            refuse_existing([tmp_path / "b", tmp_path / name], overwrite=False)


def fill(path, text):
    with atomic_folder(path) as folder:
        (folder / "a").write_text(text)
        (folder / "b").write_text(text)


def content(path):
    return {file.name: file.read_text() for file in path.iterdir()}


def test_a_folder_is_replaced_whole_and_nothing_else_stays(tmp_path):
    fill(tmp_path / "x", "old")
    (tmp_path / "x/c").write_text("more of the old one")
    fill(tmp_path / "x", "new")
    assert content(tmp_path / "x") == {"a": "new", "b": "new"} and [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EACCES, "no")])
def test_whatever_stops_the_replacement_the_old_folder_stays(tmp_path, monkeypatch, failing, error):
    fill(tmp_path / "x", "old")
    calls, rename = [], Path.rename

    def stop(self, target):
        calls.append(target)
        if len(calls) == failing:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises((KeyboardInterrupt, OSError)):
        fill(tmp_path / "x", "new")
    assert content(tmp_path / "x") == {"a": "old", "b": "old"} and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_kill_9_between_the_two_renames_leaves_both_folders(tmp_path):
    program = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from model.files import atomic_folder
rename = Path.rename
def kill(self, target):
    rename(self, target)
    os.kill(os.getpid(), 9)
with atomic_folder({str(tmp_path / "x")!r}) as folder:
    (folder / "a").write_text("new")
    Path.rename = kill
"""
    fill(tmp_path / "x", "old")
    subprocess.run([sys.executable, "-c", program])
    assert not (tmp_path / "x").exists()
    fill(tmp_path / "x", "newer")  # removes what is unfinished, but not what was whole
    (old,) = tmp_path.glob("x.replaced-*")
    assert content(old) == {"a": "old", "b": "old"} and content(tmp_path / "x") == {"a": "newer", "b": "newer"}


def test_a_full_disk_names_the_file_and_a_missing_place_its_final_name(tmp_path):
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "full")
    assert caught.value.filename == str(tmp_path / "x")
    with pytest.raises(OSError) as caught, atomic_folder(tmp_path / "folder"):
        raise OSError(errno.ENOSPC, "full")
    assert caught.value.filename == str(tmp_path / "folder") and not list(tmp_path.iterdir())
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "x"):
        raise FileNotFoundError(errno.ENOENT, "another's", str(tmp_path / "other"))
    assert caught.value.filename == str(tmp_path / "other")
