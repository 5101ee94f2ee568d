"""Files in and out: compressed text is read as a stream, results appear under their final name only when complete."""

import contextlib
import errno
import functools
import glob
import gzip
import lzma
import os
import re
import shutil
import socket
import time
import zlib
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from model.errors import UserError

try:
    from compression import zstd  # Python 3.14
except ImportError:
    from backports import zstd

open_plain = functools.partial(open, buffering=1 << 20)
DECOMPRESSORS = {".gz": gzip.open, ".xz": lzma.open, ".zst": zstd.open}
NOT_WRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.ELOOP)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
ABANDONED_AFTER = 24 * 3600  # seconds without a write
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstd.ZstdError)


@contextlib.contextmanager
def open_binary(path):
    """Open `path` for reading bytes in a with block, decompressing .gz, .xz and .zst on the way.

    Raises UserError when the file does not exist or is a directory, and in the block when it is damaged or cut.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: is a directory, expected a file")
    try:
        with DECOMPRESSORS.get(path.suffix, open_plain)(path, "rb") as handle:
            yield handle
    except DAMAGED as error:
        raise UserError(f"{path}: the compressed data is damaged or cut ({error}); fetch the file again") from None


def uncompressed_suffix(path):
    """The suffix that tells the format: ".csv" for a.csv and a.csv.gz, "" for none."""
    return next((suffix for suffix in reversed(Path(path).suffixes) if suffix not in DECOMPRESSORS), "")


def expand_paths(patterns, suffixes=()):
    """Existing files of paths and glob patterns, each pattern's in order, without repeats; no match is a UserError.
    suffixes: a folder among them stands for its files with one of these, also compressed ones (without any: for itself).
    """
    paths = {}
    for pattern in map(str, patterns):
        # A file's own name may look like a pattern.
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"{pattern}: no such file")
        for path in map(Path, matches):
            paths |= dict.fromkeys(files_within(path, suffixes) if suffixes and path.is_dir() else [path])
    return list(paths)


def files_within(folder, suffixes):
    """The files of `folder` whose uncompressed_suffix is one of `suffixes`, sorted by name; UserError when there is none."""
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and uncompressed_suffix(path) in suffixes]
    if not found:
        raise UserError(f"{folder}: no {' or '.join(suffixes)} file in this folder")
    return found


def refuse_existing(paths, overwrite, flag="--overwrite"):
    """Raise UserError for the first of `paths` that is there already, unless `overwrite`, which `flag` would set."""
    for path in paths:
        if not overwrite and os.path.lexists(path):
            raise UserError(f"{path}: is there already; give {flag} to replace it, or choose another output")


@contextlib.contextmanager
def atomic_files():
    """A context that gives create(path, mode, **open_arguments) -> handle: each handle writes to a temporary file beside
    `path`. If the block ends without error all of them are fsynced, and only then renamed, in the order of creation.

    A crash, a full disk or Ctrl-C before that leaves the previous files (or none) untouched and removes the temporary
    ones (between two renames it leaves some new and some old ones: the caller says how that is noticed); what
    kill -9 leaves is never mistaken for a result, and goes when the same file is written again. A link stays one: the
    file it points to is replaced. Raises UserError for a path that is no file: a folder, a device, links in a circle.
    """
    created = []

    def create(path, mode="wb", **open_arguments):
        target = Path(os.path.realpath(path))
        if target.is_symlink() or (target.exists() and not target.is_file()):
            raise UserError(
                f"{path}: is not a regular file (a folder, a device, links in a circle); choose another name"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent, f"{glob.escape(target.name)}.tmp-*")
        temporary = unfinished(target)
        try:
            created.append((open(temporary, mode, **open_arguments), temporary, target))
        except OSError as error:
            raise named(error, target, temporary)
        return created[-1][0]

    try:
        yield create
        for handle, *_ in created:
            handle.flush()
            os.fsync(handle.fileno())
            handle.close()
        for _, temporary, path in created:
            os.replace(temporary, path)
    except BaseException as error:
        for handle, temporary, _ in created:
            with contextlib.suppress(OSError):  # a full disk again, while the buffer is flushed
                handle.close()
            temporary.unlink(missing_ok=True)
        raise named(error, created[0][2] if created else None)
    for directory in {path.parent for *_, path in created}:
        sync_directory(directory)


def named(error, path, temporary=None):
    """`error` itself; an OSError without a name, as a full disk gives, or with that of `temporary` now names `path`."""
    if isinstance(error, OSError) and path is not None and error.filename in (None, str(temporary)):
        error.filename = str(path)
    return error


@contextlib.contextmanager
def atomic_write(path, mode="wb", **open_arguments):
    """atomic_files for a single file: yields its handle."""
    with atomic_files() as create:
        yield create(path, mode, **open_arguments)


def refuse_foreign(path, names):
    """Raise UserError unless the folder `path`, which is to be replaced, is absent or holds nothing but files of these
    `names`."""
    path = Path(path)
    if path.is_dir():
        for found in sorted(path.iterdir()):
            if found.name not in names or not found.is_file():
                raise UserError(f"{path}: holds {found.name}, which is not of an export; choose another output")
    elif os.path.lexists(path):
        raise UserError(f"{path}: is a file, not a folder; choose another output")


@contextlib.contextmanager
def atomic_folder(path):
    """A context that gives a new folder, a Path, to write files into. If the block ends without error they are fsynced and
    the folder becomes `path`, in the place of one that is there: see refuse_foreign. Otherwise it goes.

    kill -9 between the two renames that replace a folder leaves the new one unfinished and the old one under the name
    `path`.replaced-...; nothing removes that."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent, f"{glob.escape(target.name)}.tmp-*")
    folder = unfinished(target)
    folder.mkdir()
    try:
        yield folder
        for file in folder.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        replace_folder(folder, target)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise named(error, target)


def replace_folder(folder, target):
    """Rename the complete `folder` to `target`, in the place of a folder that is there: that one goes last of all, or is
    back if something fails."""
    previous = target.with_name(unfinished(target).name.replace(".tmp-", ".replaced-"))
    sync_directory(folder)
    try:
        if target.exists():
            target.rename(previous)
        folder.rename(target)
    except BaseException:
        if previous.exists() and not target.exists():
            previous.rename(target)
        raise
    sync_directory(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


@contextlib.contextmanager
def locked(path, timeout=-1):
    """A context for one process at a time, by a lock on the file `path` that the system frees when its holder dies.

    Raises filelock.Timeout when another process still holds it after `timeout` seconds (-1: waits for ever). Where the
    file system has no locks (some network ones), or nothing may be written, there is nothing to hold.
    """
    lock = FileLock(path)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=timeout)
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in NO_LOCKS + NOT_WRITABLE:
            raise
    try:
        yield
    finally:
        lock.release()


def unfinished(path):
    """Where to write what becomes `path` once it is complete: a name that tells which process of which host does so."""
    return path.with_name(f"{path.name}.tmp-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}")


def remove_abandoned(directory, pattern):
    """Remove the `unfinished` files and folders that match the glob and that nobody will complete: their process was
    of this host and is dead, or (another host cannot be asked) nobody has written to them for a day."""
    for path in directory.glob(pattern):
        owner = re.search(rf"\.tmp-{re.escape(socket.gethostname())}-(\d{{1,9}})-", path.name)
        with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
            last_write = max(file.stat().st_mtime for file in [path, *(path.iterdir() if path.is_dir() else ())])
            if (owner and not psutil.pid_exists(int(owner[1]))) or time.time() - last_write > ABANDONED_AFTER:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def sync_directory(directory):
    """Make a rename inside `directory` durable: POSIX needs an fsync of the directory itself, Windows cannot open one."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
