"""The token cache: a file is tokenised once, on all cores, into memory-mapped arrays for every later start and rank.

A cache is a folder <file>-<kind>-<fingerprint>, by default under `.cache` beside the data file, named so only when
complete. The fingerprint covers the bytes of the data file, the tokenizer and the format: a cache is either right or
not found. hashes.json beside it remembers the hash of each data file, so that an unchanged one is not read again.
A cache that no run has opened for a month goes when another of the same file name and kind is built.
"""

import collections
import contextlib
import glob
import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from filelock import Timeout
from tqdm import tqdm

from model.data.conversations import BadRow, fit_turns, training_conversation, training_preference
from model.data.rows import RowReport, iter_json_rows, iter_records
from model.data.shards import JoinedCaches
from model.errors import FULL_DISK, UserError, tell
from model.files import NOT_WRITABLE, atomic_write, expand_paths, locked, remove_abandoned, sync_directory, unfinished
from model.tokenizer import ROLES, encode_texts, join_turns, render_conversation, tokenizer_hash

FORMAT_VERSION = 3
FINGERPRINT_DIGITS = 20
UNUSED_DAYS = 30
LONGEST_STEM = 100  # bytes of the data file's name in the cache's, which has about 100 more while it is built
ANY_FINGERPRINT = "[0-9a-f]" * FINGERPRINT_DIGITS  # as a glob
BLOCK_CHARACTERS = 1 << 20  # enough texts for every core, yet their encodings stay far below 1 GB
PIECE_CHARACTERS = 1 << 16  # longer documents are encoded in pieces, on several cores,
LONGEST_PIECE = 1 << 20  # cut within a line only where it is longer than this
COARSEST_CLOCK = 2 * 10**9  # nanoseconds between two times of change that a file system can tell apart (FAT)
UNUSABLE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError, RecursionError)


class PretrainEncoding:
    """Rows (text) -> tokens `<s> text </s>` of all documents, and document_ends (where each one ends in tokens)."""

    kind, names, suffixes = "pretrain", ("tokens", "document_ends"), (".csv", ".jsonl")

    def __init__(self, tokenizer):
        self.start, self.end = self.format = [tokenizer.bos_token_id, tokenizer.eos_token_id]

    def items(self, path, report):
        """Yield ((whether a document begins here, whether it ends), [piece of text]).

        Pieces end behind a newline: as newlines are tokens of their own, the ids are those of the whole document.
        """
        for record in iter_records(path, ("text",), report):
            text, start = record["text"], 0
            if not text:
                report.drop("empty text", report.place)
            while start < len(text):
                soon, limit, stop = start + PIECE_CHARACTERS, start + LONGEST_PIECE, len(text)
                if soon < stop:
                    stop = text.rfind("\n", start, soon) + 1 or text.find("\n", soon, limit) + 1 or min(limit, stop)
                yield (start == 0, stop == len(text)), [text[start:stop]]
                start = stop

    def arrays(self, items, encoded, dtype, report):
        """{name: array} of a block of items and their texts' ids; *_ends count from the start of the block."""
        tokens, document_ends = [], []
        for (begins, ends), ids in zip(items, encoded):
            tokens += [self.start] * begins + ids + [self.end] * ends
            document_ends += [len(tokens)] * ends
        return {"tokens": np.fromiter(tokens, dtype), "document_ends": np.array(document_ends, np.int64)}


class SFTEncoding:
    """Conversations, as far as they fit into max_seq_len, -> tokens and mask of join_turns, row_lengths, row_ends. A
    row of which nothing fits has length 0: the split into training and validation counts it."""

    kind, names, suffixes = "sft", ("tokens", "mask", "row_lengths", "row_ends"), (".csv", ".jsonl")

    def __init__(self, tokenizer, max_seq_len):
        self.tokenizer, self.max_seq_len = tokenizer, max_seq_len
        empty = {role: render_conversation(tokenizer, [{"role": role, "content": ""}])[0] for role in ROLES}
        self.overhead = {role: len(ids) for role, ids in empty.items()}
        self.format = [empty, max_seq_len]

    def items(self, path, report):
        """Yield ([role of each turn], [content of each turn]) of each row worth encoding."""
        json_columns = "history", "conversations"
        for record in iter_records(path, ("history", "q", "a"), report, json_columns, alternative="conversations"):
            try:
                messages = training_conversation(record)
            except BadRow as error:
                report.drop(str(error), report.place)
            else:
                yield [turn["role"] for turn in messages], [turn["content"] for turn in messages]

    def arrays(self, items, encoded, dtype, report):
        """As in PretrainEncoding; the texts of each item are as many as its roles."""
        contents, tokens, mask, lengths = iter(encoded), [], bytearray(), []
        for roles in items:
            turns, changes = fit_turns(list(zip(roles, contents)), self.overhead, self.max_seq_len)
            row_tokens, row_mask = join_turns(self.tokenizer, turns)
            tokens += row_tokens
            mask += row_mask
            lengths.append(len(row_tokens))
            report.notes.update(changes)
            if not turns:
                report.drop(f"the answer leaves no room for the question within --max_seq_len {self.max_seq_len}")
        arrays = {"tokens": np.fromiter(tokens, dtype), "mask": np.array(mask, np.uint8)}
        return {**arrays, "row_lengths": np.array(lengths, np.int32), "row_ends": np.cumsum(lengths, dtype=np.int64)}


class PreferenceEncoding(SFTEncoding):
    """Pairs of answers to one prompt -> tokens and mask of join_turns, of the whole conversation with the chosen answer and
    of that with the rejected one behind it, chosen_lengths, rejected_lengths, row_ends. Both see the same prompt, cut where
    the longer of the two answers leaves it no room. A row of which nothing fits has lengths 0."""

    kind, names = "dpo", ("tokens", "mask", "chosen_lengths", "rejected_lengths", "row_ends")
    suffixes = (".json", ".jsonl")

    def items(self, path, report):
        """Yield ((place, [role of each turn of the prompt]), [their contents, chosen answer, rejected answer])."""
        met = 0
        for place, record, problem in iter_json_rows(path, report):
            report.rows, report.place, met = report.rows + 1, place, met + 1
            try:
                if problem:
                    raise BadRow(problem)
                messages, *answers = training_preference(record)
            except BadRow as error:
                report.drop(str(error), place)
            else:
                yield (place, [turn["role"] for turn in messages]), [turn["content"] for turn in messages] + answers
        if not met:
            raise UserError(f"{path}: is empty, it has no rows")

    def arrays(self, items, encoded, dtype, report):
        contents, tokens, mask, lengths, row_ends = iter(encoded), [], bytearray(), [], []
        for place, roles in items:
            prompt, answers = list(zip(roles, contents)), [next(contents), next(contents)]
            turns, changes = fit_turns([*prompt, ("assistant", max(answers, key=len))], self.overhead, self.max_seq_len)
            if not turns:
                report.drop(f"an answer leaves no room for the question within --max_seq_len {self.max_seq_len}", place)
            pair = [join_turns(self.tokenizer, [*turns[:-1], ("assistant", answer)]) for answer in answers if turns]
            for row_tokens, row_mask in pair:
                tokens += row_tokens
                mask += row_mask
            lengths.append([len(row_tokens) for row_tokens, _ in pair] or [0, 0])
            row_ends.append(len(tokens))
            report.notes.update(changes)
        arrays = {"tokens": np.fromiter(tokens, dtype), "mask": np.array(mask, np.uint8)}
        chosen, rejected = np.array(lengths, np.int32).reshape(-1, 2).T
        arrays.update(chosen_lengths=chosen.copy(), rejected_lengths=rejected.copy())
        return {**arrays, "row_ends": np.array(row_ends, np.int64)}


ENCODINGS = {encoding.kind: encoding for encoding in (PretrainEncoding, SFTEncoding, PreferenceEncoding)}
DTYPES = {np.dtype(kind).str for kind in (np.uint8, np.uint16, np.uint32, np.int32, np.int64)}


class TokenCache:
    """One cache folder: the arrays that the encoding names, mapped; report (RowReport of the tokenising); counts (list: the
    documents or rows of each file, here one); fingerprint (hex; the same for the same data, tokenizer and format); name (the
    file's, without suffix). Raises one of UNUSABLE for a folder that is none."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.name, kind, self.fingerprint = self.folder.name.rsplit("-", 2)
        description = json.loads((self.folder / "cache.json").read_text(encoding="utf-8"))
        self.report = RowReport.from_dict(description["report"])
        self.names = ENCODINGS[kind].names
        for name in self.names:
            array = description["arrays"][name]
            if array["dtype"] not in DTYPES:
                raise ValueError(f"{name}: not an array of integers")
            mapped = np.memmap(self.folder / f"{name}.bin", array["dtype"], mode="r")
            if len(mapped) != array["length"]:
                raise ValueError(f"{name}: cut, or described wrongly")
            setattr(self, name, np.asarray(mapped))  # a memmap object costs several times as much to index
        self.counts = [len(getattr(self, self.names[-1]))]
        with contextlib.suppress(OSError):  # in a folder of somebody else
            os.utime(self.folder / "cache.json")  # it is in use

    def __reduce__(self):
        return TokenCache, (self.folder,)  # a spawned worker maps the files itself instead of receiving them


def data_files(path, kind, flag="--data_path"):
    """The files of a `kind` ("pretrain", "sft" or "dpo") that `path` names: one file, a folder of them or a glob pattern;
    sorted by name. Raises UserError, saying how to make one, when there is none."""
    try:
        files = expand_paths([path], ENCODINGS[kind].suffixes)
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: {'is no file' if file.exists() else 'no such file'}")
    except UserError as error:
        make = f"python data_process.py {kind} (of a raw corpus) or python data_process.py demo"
        raise UserError(f"{error}; make it with {make}, or name another with {flag}") from None
    return files


def open_token_cache(path, tokenizer, encoding, cache_dir=None):
    """The TokenCache of a data file, or the JoinedCaches of all files that `path` names (see data_files). A file is
    tokenised now if it has none yet: one that joins a folder, without the others.

    Of processes that call it at once one reads a file; the others wait for its lock, which the system frees when its
    holder dies. Raises UserError: bad data file, nothing usable in it, cache folder not writable or full.
    """
    words = tokenizer_hash(tokenizer)
    files = data_files(path, encoding.kind)
    caches = [
        _open_cache(file, tokenizer, words, encoding, Path(cache_dir or file.parent / ".cache")) for file in files
    ]
    return caches[0] if len(caches) == 1 else JoinedCaches(caches)


def _open_cache(path, tokenizer, words, encoding, cache_dir):
    """The TokenCache of one file; `words` is the tokenizer_hash."""

    def folder(digest):
        deciding = [FORMAT_VERSION, encoding.kind, encoding.format, path.suffixes, digest, words]
        fingerprint = hashlib.blake2b(json.dumps(deciding).encode(), digest_size=FINGERPRINT_DIGITS // 2).hexdigest()
        stem = os.fsencode(path.name.split(".")[0])[:LONGEST_STEM].decode("utf-8", "ignore")
        return cache_dir / f"{stem}-{encoding.kind}-{fingerprint}"

    _, digest = content_hash(path, cache_dir, read=False)
    if digest and (cache := _finished(folder(digest))):
        return cache
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir):
            stamp, digest = content_hash(path, cache_dir)
            return _finished(folder(digest)) or _build(path, stamp, tokenizer, encoding, folder(digest))
    except OSError as error:
        if error.errno not in FULL_DISK + NOT_WRITABLE or str(error.filename) == str(path):
            raise
        way_out = "free some space or choose another folder with --cache_dir"
        raise UserError(f"{cache_dir}: cannot write the token cache ({error.strerror}); {way_out}") from None


def content_hash(path, cache_dir, read=True):
    """(stamp, hash of the bytes) of a data file. The stamp differs once the file was written to: size, mtime, inode and
    ctime, which no program can set back. A hash that no file in cache_dir remembers for it is None unless `read`."""
    status, key, memory = path.stat(), str(path.resolve()), cache_dir / "hashes.json"
    stamp = [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]
    try:
        hashes = dict(json.loads(memory.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        hashes = {}  # none yet, or damaged
    match hashes.get(key):
        case [known, str(digest)] if known == stamp:
            return stamp, digest
    if not read:
        return stamp, None
    settled = abs(time.time_ns() - status.st_mtime_ns) > COARSEST_CLOCK  # a next change would have another mtime
    with open(path, "rb") as handle:
        digest = hashlib.file_digest(handle, "blake2b").hexdigest()
    if settled:
        with contextlib.suppress(OSError, UserError), atomic_write(memory) as handle:
            handle.write(json.dumps({**hashes, key: [stamp, digest]}, indent=1).encode())
    return stamp, digest


def _finished(folder):
    """The TokenCache in `folder`, None unless it is there with every array in full (a hand-made copy may be cut)."""
    try:
        return TokenCache(folder)
    except UNUSABLE:
        return None


@contextlib.contextmanager
def _lock(directory):
    """A context for one process at a time; where there are no locks, at worst two processes do the same work."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(directory / ".lock", timeout=2))  # ranks that only look are quicker
        except Timeout:
            tell(f"waiting for another process that is tokenising into {directory}")
            stack.enter_context(locked(directory / ".lock"))
        yield


def _build(path, stamp, tokenizer, encoding, folder):
    """Tokenise `path` into a temporary folder and rename it to `folder`. The caller holds the lock."""
    remove_abandoned(folder.parent, f"*-{ANY_FINGERPRINT}.tmp-*")
    temporary = unfinished(folder)
    temporary.mkdir()
    try:
        description = _write_arrays(path, tokenizer, encoding, temporary)
        (temporary / "cache.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
        if content_hash(path, folder.parent, read=False)[0] != stamp:
            raise UserError(f"{path}: changed while it was being tokenised; start again when it is complete")
        sync_directory(temporary)
        if not _finished(folder):  # by another process, where locks don't work
            shutil.rmtree(folder, ignore_errors=True)  # a cut copy
            os.rename(temporary, folder)
            sync_directory(folder.parent)
        _remove_unused(folder)
        return TokenCache(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_unused(folder):
    """Remove the caches of the same file name and kind, of earlier contents for one, that no run has opened for long.
    (Who has one open all that time keeps what it has mapped; who needs one after all tokenises its file again.)"""
    siblings = f"{glob.escape(folder.name.rpartition('-')[0])}-{ANY_FINGERPRINT}"
    for other in folder.parent.glob(siblings):
        with contextlib.suppress(OSError):
            if time.time() - (other / "cache.json").stat().st_mtime > UNUSED_DAYS * 24 * 3600:
                shutil.rmtree(other)
                tell(f"{other}: no run has opened this token cache for {UNUSED_DAYS} days; removed")


def _write_arrays(path, tokenizer, encoding, folder):
    """Append the arrays of every block to <name>.bin; returns what cache.json says of them and of the rows."""
    report, arrays, num_tokens = RowReport(), {}, 0
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    total = os.path.getsize(path) if path.suffix in (".csv", ".jsonl") else None
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"tokenising {path.name}", disable=None) as bar:
        for items, encoded in _encoded_blocks(tokenizer, encoding.items(path, report)):
            block = encoding.arrays(items, encoded, dtype, report)
            for name, array in block.items():
                written = arrays.setdefault(name, {"dtype": array.dtype.str, "length": 0})
                written["length"] += len(array)
                with open(folder / f"{name}.bin", "ab") as file:
                    # Not array.tofile, whose error of a full disk says neither disk nor file.
                    file.write((array + num_tokens if name.endswith("_ends") else array).data)
            num_tokens += len(block["tokens"])
            bar.update(report.bytes_read - bar.n)
    for name in arrays:
        with open(folder / f"{name}.bin", "ab") as file:
            os.fsync(file.fileno())
    if not num_tokens:
        raise UserError(f"{path}: no row left to learn from; " + "; ".join(line.strip() for line in report.summary()))
    return {"arrays": arrays, "report": report.to_dict()}


def _encoded_blocks(tokenizer, items):
    """Yield (items, ids of their texts) by blocks of about BLOCK_CHARACTERS, in order. The encoder releases the
    interpreter: while it works on all cores, this thread turns ids into arrays and reads on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else the library warns of every fork that comes later
    waiting = collections.deque()
    with ThreadPoolExecutor(2) as encoder:
        for block, texts in _blocks(items):
            waiting.append((block, encoder.submit(encode_texts, tokenizer, texts)))
            if len(waiting) > 3:
                block, encoded = waiting.popleft()
                yield block, encoded.result()
        yield from ((block, encoded.result()) for block, encoded in waiting)


def _blocks(items):
    block, texts, characters = [], [], 0
    for item, contents in items:
        block.append(item)
        texts += contents
        characters += sum(map(len, contents))
        if characters >= BLOCK_CHARACTERS:
            yield block, texts
            block, texts, characters = [], [], 0
    if block:
        yield block, texts
