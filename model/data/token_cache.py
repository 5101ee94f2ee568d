"""The token cache: a file is tokenised once, on all cores, into memory-mapped arrays for every later start and rank.

A cache is a folder named <file>-<kind>-<fingerprint>, by default under `.cache` beside the data file. The fingerprint
covers the bytes of the data file, the tokenizer and the format, so a cache is either right or not found. The folder
gets its name only when complete. hashes.json beside it remembers the hash of each data file, so that an unchanged one
is not read again.
"""

import collections
import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from model.data.conversations import BadRow, fit_turns, training_conversation
from model.data.rows import RowReport, iter_records
from model.errors import FULL_DISK, UserError
from model.files import atomic_write, sync_directory
from model.tokenizer import (
    ROLES,
    encode_texts,
    encode_turns,
    join_turns,
    render_conversation,
    tokenizer_hash,
    turn_overheads,
)

FORMAT_VERSION = 2
HASHED_PIECE = 1 << 26  # bytes
FINGERPRINT_DIGITS = 20
BLOCK_CHARACTERS = 1 << 20  # enough texts for every core, yet their encodings stay far below 1 GB
PIECE_CHARACTERS = 1 << 16  # longer documents are encoded in pieces, on several cores,
LONGEST_PIECE = 1 << 20  # cut within a line only where it is longer than this
COARSEST_CLOCK = 2 * 10**9  # nanoseconds between two times of change that a file system can tell apart (FAT)
LEFTOVER_SECONDS = 24 * 3600
NOT_WRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class PretrainEncoding:
    """Rows (text) -> tokens `<s> text </s>` of all documents, and document_ends (where each one ends in tokens)."""

    kind = "pretrain"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.start, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.format = [self.start, self.end]

    def items(self, path, report):
        """Yield (characters, (piece, whether a document begins with it, whether one ends))."""
        for record in iter_records(path, ("text",), report):
            text, start = record["text"], 0
            if not text:
                report.drop("empty text", report.place)
            while start < len(text):
                stop = _piece_end(text, start)
                yield stop - start, (text[start:stop], start == 0, stop == len(text))
                start = stop

    def encode(self, pieces, dtype):
        """(arrays of a block of pieces, rows left out, rows changed); *_ends count from the start of the block."""
        texts, begins, ends = zip(*pieces)
        ids = encode_texts(self.tokenizer, texts)
        sizes = np.fromiter(map(len, ids), np.int64, len(ids)) + begins + ends
        parts = itertools.chain.from_iterable(
            ([self.start] * begin, piece, [self.end] * end) for begin, piece, end in zip(begins, ids, ends)
        )
        tokens = np.fromiter(itertools.chain.from_iterable(parts), dtype, sizes.sum())
        return {"tokens": tokens, "document_ends": np.cumsum(sizes)[np.array(ends)]}, {}, {}


def _piece_end(text, start):
    """Where the piece of a document ends that begins at `start`: behind a newline. Newlines are tokens of their own, so
    the pieces' ids are those of the whole, unless LONGEST_PIECE characters have none."""
    if len(text) - start <= PIECE_CHARACTERS:
        return len(text)
    soon, limit = start + PIECE_CHARACTERS, min(start + LONGEST_PIECE, len(text))
    return text.rfind("\n", start, soon) + 1 or text.find("\n", soon, limit) + 1 or limit


class SFTEncoding:
    """Conversations, as far as they fit into max_seq_len, -> tokens and mask as join_turns gives, row_lengths, row_ends.

    A row of which nothing fits has length 0: the split into training and validation counts it.
    """

    kind = "sft"

    def __init__(self, tokenizer, max_seq_len):
        self.tokenizer, self.max_seq_len = tokenizer, max_seq_len
        self.overhead = turn_overheads(tokenizer)
        turns = [render_conversation(tokenizer, [{"role": role, "content": ""}]) for role in ROLES]
        self.format = [turns, max_seq_len]

    def items(self, path, report):
        """Yield (characters, messages) of each row worth encoding."""
        records = iter_records(path, ("history", "q", "a"), report, ("history", "conversations"), "conversations")
        for record in records:
            try:
                messages = training_conversation(record)
            except BadRow as error:
                report.drop(str(error), report.place)
            else:
                yield sum(len(message["content"]) for message in messages), messages

    def encode(self, conversations, dtype):
        """(arrays of a block of conversations, rows left out, rows changed); *_ends count from the block's start."""
        ids, masks, changed = [], [], collections.Counter()
        for turns in encode_turns(self.tokenizer, conversations):
            fitting, changes = fit_turns(turns, self.overhead, self.max_seq_len)
            row, mask = join_turns(self.tokenizer, fitting)
            ids.append(row)
            masks.append(mask)
            changed.update(changes)
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        ends = np.cumsum(lengths, dtype=np.int64)
        arrays = {
            "tokens": np.fromiter(itertools.chain.from_iterable(ids), dtype, ends[-1]),
            "mask": np.frombuffer(b"".join(masks), np.uint8),
            "row_lengths": lengths,
            "row_ends": ends,
        }
        reason = f"the answer leaves no room for the question within --max_seq_len {self.max_seq_len}"
        left_out = int((lengths == 0).sum())
        return arrays, {reason: left_out} if left_out else {}, changed


class TokenCache:
    """One cache folder, its arrays (those that the encoding names) mapped on first use.

    Also: report (RowReport of the tokenising), fingerprint (hex; the same for the same data, tokenizer and format).
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.fingerprint = self.folder.name.rpartition("-")[2]
        self.description = json.loads((self.folder / "cache.json").read_text())
        self.report = RowReport.from_dict(self.description["report"])

    def __getattr__(self, name):
        arrays = self.__dict__.get("description", {}).get("arrays", {})
        if name not in arrays:
            raise AttributeError(name)
        array = np.memmap(self.folder / f"{name}.bin", dtype=arrays[name]["dtype"], mode="r")
        # A plain array over the same mapped pages: indexing a memmap object costs several times as much.
        setattr(self, name, np.asarray(array))
        return self.__dict__[name]

    def __reduce__(self):
        return TokenCache, (self.folder,)  # a spawned worker maps the files itself instead of receiving them


def open_token_cache(path, tokenizer, encoding, cache_dir=None):
    """The TokenCache of a data file, tokenised now if it is not there yet.

    Any number of processes may call it at once: one reads the file, the others wait for its lock, which the system
    frees when its holder dies. Raises UserError: bad data file, nothing usable in it, cache folder not writable or full.
    """
    path = Path(path)
    cache_dir = Path(cache_dir) if cache_dir else path.parent / ".cache"

    def folder_for(digest):
        return cache_dir / f"{path.name.split('.')[0]}-{encoding.kind}-{fingerprint(digest, path, tokenizer, encoding)}"

    digest = _remembered_hash(path, _stamp(path), cache_dir)
    if digest and _complete(folder_for(digest)):
        return TokenCache(folder_for(digest))
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir):
            stamp = _stamp(path)
            digest = _remembered_hash(path, stamp, cache_dir) or _hash_and_remember(path, stamp, cache_dir)
            folder = folder_for(digest)
            if not _complete(folder):
                _remove_leftovers(cache_dir)
                _build(path, stamp, tokenizer, encoding, folder)
    except OSError as error:
        if error.errno not in FULL_DISK + NOT_WRITABLE:
            raise
        raise UserError(
            f"{cache_dir}: cannot write the token cache ({error.strerror}); "
            "free some space or choose another folder with --cache_dir"
        ) from None
    return TokenCache(folder)


def fingerprint(digest, path, tokenizer, encoding):
    """Hex name of all that decides what a cache holds: the file's bytes and suffixes, the tokenizer, the format."""
    deciding = [FORMAT_VERSION, encoding.kind, encoding.format, [path.suffixes, digest], tokenizer_hash(tokenizer)]
    return hashlib.blake2b(json.dumps(deciding).encode(), digest_size=FINGERPRINT_DIGITS // 2).hexdigest()


# ------------------------------------------------------------------------------------------- the data file's content


def content_hash(path):
    """BLAKE2b over the BLAKE2b of each 64 MB piece of a file; hashing releases the GIL, so all cores take part."""

    def piece(offset):
        digest, end = hashlib.blake2b(), offset + HASHED_PIECE
        with open(path, "rb", buffering=0) as handle:
            handle.seek(offset)
            while handle.tell() < end and (block := handle.read(1 << 20)):
                digest.update(block)
        return digest.digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(piece, range(0, os.path.getsize(path), HASHED_PIECE))
        return hashlib.blake2b(b"".join(digests)).hexdigest()


def _stamp(path):
    """What differs when a file was written to: size, mtime, inode, and ctime, which no program can set back."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the training rows with --data_path")
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]


def _hashes(cache_dir):
    """hashes.json, {path: [stamp, content hash]}; {} when it is missing or damaged."""
    try:
        hashes = json.loads((cache_dir / "hashes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return hashes if isinstance(hashes, dict) else {}


def _remembered_hash(path, stamp, cache_dir):
    match _hashes(cache_dir).get(str(path.resolve())):
        case [known, str(digest)] if known == stamp:
            return digest


def _hash_and_remember(path, stamp, cache_dir):
    """content_hash, remembered unless a second change at the same time of the clock could go unnoticed."""
    settled = abs(time.time_ns() - stamp[1]) > COARSEST_CLOCK
    digest = content_hash(path)
    if settled:
        hashes = json.dumps({**_hashes(cache_dir), str(path.resolve()): [stamp, digest]}, ensure_ascii=False, indent=1)
        with contextlib.suppress(OSError), atomic_write(cache_dir / "hashes.json") as handle:
            handle.write(hashes.encode())
    return digest


# ------------------------------------------------------------------------------------------------ one process builds


def _complete(folder):
    """Whether a cache folder is there with every array at its full length (a hand-made copy may have been cut)."""
    try:
        arrays = json.loads((folder / "cache.json").read_text())["arrays"]
        sizes = {name: (folder / f"{name}.bin").stat().st_size for name in arrays}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return False
    return all(sizes[name] == np.dtype(array["dtype"]).itemsize * array["length"] for name, array in arrays.items())


@contextlib.contextmanager
def _lock(directory):
    """Let one process at a time work in `directory`, as far as it can be locked: network file systems may have no
    locks (at worst two processes do the same work), and a folder of others may hold what is needed already."""
    lock = FileLock(directory / ".lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if os.environ.get("RANK", "0") == "0":
                print(f"waiting for another process that is tokenising into {directory}", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS + NOT_WRITABLE:
            raise
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(cache_dir):
    """Delete the unfinished folders that nobody works on any more."""
    for leftover in cache_dir.glob(f"*-{'[0-9a-f]' * FINGERPRINT_DIGITS}.tmp-*"):
        if _abandoned(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


def _abandoned(folder):
    """Whether the process of this host that its name tells is dead, or nothing was written to it for a day."""
    owner = re.search(rf"\.tmp-{re.escape(socket.gethostname())}-(\d+)-", folder.name)
    try:
        if owner and os.name != "nt":  # where os.kill would end the process
            os.kill(int(owner[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives and is somebody else's
        pass
    newest = max((file.stat().st_mtime for file in [folder, *folder.iterdir()]), default=0)
    return time.time() - newest > LEFTOVER_SECONDS


def _build(path, stamp, tokenizer, encoding, folder):
    """Tokenise `path` into a temporary folder and rename it to `folder`. The caller holds the lock."""
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    owner = f"{socket.gethostname()}-{os.getpid()}"
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-{owner}-", dir=folder.parent))
    try:
        report, arrays = _write_arrays(path, encoding, dtype, temporary)
        description = {"arrays": arrays, "report": report.to_dict()}
        (temporary / "cache.json").write_text(json.dumps(description, ensure_ascii=False, indent=1))
        if _stamp(path) != stamp:
            raise UserError(f"{path}: changed while it was being tokenised; start again when it is complete")
        temporary.chmod(0o755)  # mkdtemp makes it private, yet caches are shared
        sync_directory(temporary)
        if _complete(folder):  # by another process, where locks don't work
            shutil.rmtree(temporary)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # a cut copy
            os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(folder.parent)


def _write_arrays(path, encoding, dtype, folder):
    """Append the arrays of every block to <name>.bin; returns the RowReport and {name: {dtype, length}}."""
    report, arrays, files, num_tokens = RowReport(), {}, {}, 0
    total = os.path.getsize(path) if path.suffix in (".csv", ".jsonl") else None
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, desc=f"tokenising {path.name}", disable=None)
        )
        for block, left_out, changed in _encoded_blocks(encoding, encoding.items(path, report), dtype):
            for name, array in block.items():
                if name not in files:
                    files[name] = stack.enter_context(open(folder / f"{name}.bin", "wb"))
                    arrays[name] = {"dtype": array.dtype.str, "length": 0}
                (array + num_tokens if name.endswith("_ends") else array).tofile(files[name])
                arrays[name]["length"] += len(array)
            num_tokens += len(block["tokens"])
            for reason, count in left_out.items():
                report.drop(reason, count=count)
            for what, count in changed.items():
                report.note(what, count)
            bar.update(report.bytes_read - bar.n)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    if not num_tokens:
        raise UserError(f"{path}: no row left to learn from; " + "; ".join(line.strip() for line in report.summary()))
    return report, arrays


def _encoded_blocks(encoding, items, dtype):
    """Encode blocks of about BLOCK_CHARACTERS, in order. The encoder releases the interpreter: while one thread
    encodes on all cores, another turns ids into arrays and this one reads on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else the library warns of every fork that comes later
    waiting = collections.deque()
    with ThreadPoolExecutor(2) as pool:
        for block in _blocks(items):
            waiting.append(pool.submit(encoding.encode, block, dtype))
            if len(waiting) > 3:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _blocks(items):
    block, characters = [], 0
    for length, item in items:
        block.append(item)
        characters += length
        if characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block
