"""Files in and out: compressed text is read as a stream, results appear under their final name only when complete."""

import contextlib
import glob
import gzip
import io
import lzma
import os
from pathlib import Path

from model.errors import UserError

COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")


def open_binary(path, raw=None):
    """Open `path` for reading bytes, decompressing .gz, .xz and .zst on the way.

    `raw`: the same file, already open, for a caller who follows its position (progress in compressed bytes).
    Raises UserError when the file does not exist or is a directory.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: is a directory, expected a file")
    if path.suffix == ".gz":
        return gzip.open(raw or path, "rb")
    if path.suffix == ".xz":
        return lzma.open(raw or path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(ZstandardFile(raw or open(path, "rb")), buffer_size=1 << 20)
    return raw or open(path, "rb", buffering=1 << 20)


class ZstandardFile(io.RawIOBase):
    """Decompressed bytes of one or more frames; EOFError when the file breaks off (zstandard's reader takes that for the end)."""

    def __init__(self, source):
        import zstandard

        self.source, self.decompressor = source, zstandard.ZstdDecompressor()
        self.frame, self.compressed, self.decompressed = None, b"", memoryview(b"")

    def readable(self):
        return True

    def close(self):
        self.source.close()
        super().close()

    def readinto(self, target):
        while not self.decompressed:
            self.compressed = self.compressed or self.source.read(1 << 14)
            if not self.compressed:
                if self.frame:
                    raise EOFError("compressed file ended before the end-of-stream marker was reached")
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            self.decompressed = memoryview(self.frame.decompress(self.compressed))
            self.compressed = self.frame.unused_data
            self.frame = None if self.frame.eof else self.frame
        count = min(len(target), len(self.decompressed))
        target[:count] = self.decompressed[:count]
        self.decompressed = self.decompressed[count:]
        return count


def expand_paths(patterns):
    """Turn paths and glob patterns into a sorted list of existing files without repeats; an empty match is an error."""
    paths = []
    for pattern in patterns:
        matches = sorted(glob.glob(str(pattern), recursive=True)) or ([str(pattern)] if Path(pattern).exists() else [])
        if not matches:
            raise UserError(f"{pattern}: no such file")
        paths += [Path(match) for match in matches]
    return list(dict.fromkeys(paths))


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
    """Make a rename inside `directory` durable (POSIX needs an fsync of the directory itself)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
