"""The token cache: a file is tokenised once, on all cores, into memory-mapped arrays for every later start and rank.

A cache is a folder named <file>-<kind>-<fingerprint>, by default under `.cache` beside the data file. The fingerprint
covers the bytes of the data file, the tokenizer and the format, so a cache is either right or not found. The folder
gets its name only when complete.
"""

import collections
import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from model.data.rows import RowReport, iter_records
from model.errors import FULL_DISK, UserError
from model.files import sync_directory
from model.tokenizer import ROLES, encode_texts, render_conversation, tokenizer_hash

FORMAT_VERSION = 1
HASHED_PIECE = 1 << 26  # bytes
FINGERPRINT_DIGITS = 20
BLOCK_CHARACTERS = 1 << 20  # enough texts for every core, yet their encodings stay far below 1 GB
SYSTEM, USER, ASSISTANT = range(len(ROLES))
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
        """Yield (characters, text) of each row worth encoding."""
        for record in iter_records(path, ("text",), report):
            if record["text"]:
                yield len(record["text"]), record["text"]
            else:
                report.drop("empty text", report.place)

    def encode(self, texts, dtype):
        """Arrays of a block of texts; those named *_ends count from the start of the block."""
        ids = encode_texts(self.tokenizer, texts)
        ends = np.cumsum(np.fromiter(map(len, ids), np.int64, len(ids)) + 2)
        pieces = itertools.chain.from_iterable(([self.start], piece, [self.end]) for piece in ids)
        tokens = np.fromiter(itertools.chain.from_iterable(pieces), dtype, ends[-1])
        return {"tokens": tokens, "document_ends": ends}


class SFTEncoding:
    """Conversations -> tokens as render_conversation gives, turn_ends (in tokens), turn_roles, row_ends (in turns).

    Kept by turns, each header, content, </s>, tail, so that one cache serves every --max_seq_len and --last_turn_only.
    """

    kind = "sft"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.headers, self.tails = [], []
        for role in ROLES:
            ids, _ = render_conversation(tokenizer, [{"role": role, "content": ""}])
            stop = len(ids) - ids[::-1].index(tokenizer.eos_token_id) - 1
            self.headers.append(ids[:stop])
            self.tails.append(ids[stop:])
        self.format = [self.headers, self.tails]

    def items(self, path, report):
        """Yield (characters, [(role number, content), ...]) of each row worth encoding."""
        records = iter_records(path, ("history", "q", "a"), report, ("history", "conversations"), "conversations")
        for record in records:
            try:
                turns = _turns(record)
            except ValueError as error:
                report.drop(str(error), report.place)
            else:
                yield sum(len(content) for _, content in turns), turns

    def encode(self, conversations, dtype):
        """Arrays of a block of conversations; those named *_ends count from the start of the block."""
        turns = list(itertools.chain.from_iterable(conversations))
        ids = encode_texts(self.tokenizer, [content for _, content in turns])
        roles = np.fromiter((role for role, _ in turns), np.uint8, len(turns))
        around = np.array([len(header) + len(tail) for header, tail in zip(self.headers, self.tails)])
        ends = np.cumsum(np.fromiter(map(len, ids), np.int64, len(ids)) + around[roles])
        pieces = itertools.chain.from_iterable(
            (self.headers[role], piece, self.tails[role]) for (role, _), piece in zip(turns, ids)
        )
        return {
            "tokens": np.fromiter(itertools.chain.from_iterable(pieces), dtype, ends[-1]),
            "turn_ends": ends,
            "turn_roles": roles,
            "row_ends": np.cumsum(np.fromiter(map(len, conversations), np.int64, len(conversations))),
        }


def _turns(record):
    """[(role number, content), ...] of a row up to its last answer; ValueError when there is nothing to learn."""
    if "conversations" in record:
        messages = record["conversations"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError("conversations is not a list of {role, content}")
        turns = [(message.get("role"), message.get("content")) for message in messages]
        if not all(role in ROLES and isinstance(content, str) for role, content in turns):
            raise ValueError(f"conversations: every turn needs a role ({', '.join(ROLES)}) and a content that is text")
        turns = [(ROLES.index(role), content) for role, content in turns]
    else:
        pairs = [] if record["history"] is None else record["history"]
        if not isinstance(pairs, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
        ):
            raise ValueError("history is not a list of [question, answer]")
        pairs = [*pairs, (record["q"], record["a"])]
        turns = [turn for question, answer in pairs for turn in ((USER, question), (ASSISTANT, answer))]
    while turns and turns[-1][0] != ASSISTANT:
        turns.pop()
    if not turns:
        raise ValueError("no answer to learn from")
    if not turns[-1][1].strip():
        raise ValueError("empty answer")
    return turns


class TokenCache:
    """One cache folder, its arrays (tokens, document_ends or turn_ends, turn_roles, row_ends) mapped on first use.

    Also: report (RowReport of the tokenising), header_lengths ([roles] tokens before a turn's content), tail_length
    (tokens behind </s>).
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.description = json.loads((self.folder / "cache.json").read_text())
        self.report = RowReport.from_dict(self.description["report"])
        self.header_lengths = np.array(self.description.get("header_lengths", []), dtype=np.int64)
        self.tail_length = self.description.get("tail_length", 0)

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

    def turn_start(self, turn):
        """Position in tokens at which a turn begins."""
        return int(self.turn_ends[turn - 1]) if turn else 0


def open_token_cache(path, tokenizer, encoding, cache_dir=None):
    """The TokenCache of a data file, tokenised now if it is not there yet.

    Any number of processes may call it at once: one works, the others wait for its lock, which the system frees when
    its holder dies. Raises UserError: bad data file, nothing usable in it, cache folder not writable or full.
    """
    path = Path(path)
    cache_dir = Path(cache_dir) if cache_dir else path.parent / ".cache"
    folder = cache_dir / f"{path.name.split('.')[0]}-{encoding.kind}-{fingerprint(path, tokenizer, encoding)}"
    if _complete(folder):
        return TokenCache(folder)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir) as alone:
            if not _complete(folder):
                if alone:
                    _remove_leftovers(folder)
                _build(path, tokenizer, encoding, folder)
    except OSError as error:
        if error.errno not in FULL_DISK + NOT_WRITABLE:
            raise
        raise UserError(
            f"{cache_dir}: cannot write the token cache ({error.strerror}); "
            "free some space or choose another folder with --cache_dir"
        ) from None
    return TokenCache(folder)


def fingerprint(path, tokenizer, encoding):
    """Hex name of all that decides what a cache holds: the file's bytes and suffixes, the tokenizer, the format."""
    data = [path.suffixes, content_hash(path)]
    deciding = [FORMAT_VERSION, encoding.kind, encoding.format, data, tokenizer_hash(tokenizer)]
    return hashlib.blake2b(json.dumps(deciding).encode(), digest_size=FINGERPRINT_DIGITS // 2).hexdigest()


def content_hash(path):
    """BLAKE2b over the BLAKE2b of each 64 MB piece of a file; hashing releases the GIL, so all cores take part."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give the training rows with --data_path")

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
    """Let one process at a time work in `directory`; gives whether that is certain.

    The system frees the lock when its holder dies, so the file may stay. (NFS cannot lock the directory itself.)"""
    with open(directory / ".lock", "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if os.environ.get("RANK", "0") == "0":
                print(f"waiting for another process that is tokenising into {directory}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:  # some network file systems: at worst two processes do the same work
                raise
            yield False
            return
        yield True


def _remove_leftovers(folder):
    """Delete what killed processes left in the cache folder, and a cut copy of the cache to be built."""
    for leftover in [folder, *folder.parent.glob(f"*-{'[0-9a-f]' * FINGERPRINT_DIGITS}.tmp-*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _build(path, tokenizer, encoding, folder):
    """Tokenise `path` into a temporary folder and rename it to `folder`. The caller holds the lock."""
    before = os.stat(path)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        report, lengths = _write_arrays(path, encoding, dtype, temporary)
        description = {"arrays": lengths, "report": report.to_dict()}
        if encoding.kind == "sft":
            description |= {
                "header_lengths": [len(header) for header in encoding.headers],
                "tail_length": len(encoding.tails[0]) - 1,
            }
        (temporary / "cache.json").write_text(json.dumps(description, ensure_ascii=False, indent=1))
        after = os.stat(path)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise UserError(f"{path}: changed while it was being tokenised; start again when it is complete")
        temporary.chmod(0o755)  # mkdtemp makes it private, yet caches are shared
        sync_directory(temporary)
        if _complete(folder):  # by another process, where locks don't work
            shutil.rmtree(temporary)
        else:
            os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(folder.parent)


def _write_arrays(path, encoding, dtype, folder):
    """Append the arrays of every block to <name>.bin; returns the RowReport and {name: {dtype, length}}."""
    report, arrays, totals, files = RowReport(), {}, collections.Counter(), {}
    total = os.path.getsize(path) if path.suffix in (".csv", ".jsonl") else None
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, desc=f"tokenising {path.name}", disable=None)
        )
        for block in _encoded_blocks(encoding, encoding.items(path, report), dtype):
            for name, array in block.items():
                if name not in files:
                    files[name] = stack.enter_context(open(folder / f"{name}.bin", "wb"))
                    arrays[name] = {"dtype": array.dtype.str, "length": 0}
                if name.endswith("_ends"):
                    array = array + totals[name]
                    totals[name] = array[-1]
                array.tofile(files[name])
                arrays[name]["length"] += len(array)
            bar.update(report.bytes_read - bar.n)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    if not arrays:
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
