"""Files in and out: compressed text is read as a stream, results appear under their final name only when complete."""

import contextlib
import functools
import glob
import gzip
import lzma
import os
import zlib
from pathlib import Path

from model.errors import UserError

try:
    from compression import zstd  # Python 3.14
except ImportError:
    from backports import zstd

open_plain = functools.partial(open, buffering=1 << 20)
DECOMPRESSORS = {".gz": gzip.open, ".xz": lzma.open, ".zst": zstd.open}
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


def expand_paths(patterns):
    """Existing files of paths and glob patterns, each pattern's in order, without repeats; no match is a UserError."""
    paths = {}
    for pattern in map(str, patterns):
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches and not Path(pattern).exists():  # a file's own name may look like a pattern
            raise UserError(f"{pattern}: no such file")
        paths |= dict.fromkeys(map(Path, matches or [pattern]))
    return list(paths)


@contextlib.contextmanager
def atomic_write(path, mode="wb", **open_arguments):
    """Write to a temporary file beside `path`; fsync and rename it to `path` only if the block ends without error.

    A crash, a full disk or Ctrl-C leaves the previous `path` (or none) untouched and removes the temporary file;
    after kill -9 the leftover is named `<name>.tmp-<pid>` and never mistaken for a result.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, mode, **open_arguments) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory):
    """Make a rename inside `directory` durable: POSIX needs an fsync of the directory itself, Windows cannot open one."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
