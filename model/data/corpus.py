"""Raw corpora -> training files: stream JSON rows, filter, remove duplicates, write CSV or JSON atomically.

Input is read in blocks of whole lines; each block is converted on its own (in this process or by a pool of workers) and
the results are merged in input order, so the output does not depend on the number of workers and memory stays flat.
(Only a file that is one JSON list is read as a whole.)
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from tqdm import tqdm

from model.data.conversations import BadRow
from model.data.deduplication import DuplicateFilter, minhash_signatures, rows_per_band
from model.data.filters import DROP_RULES, Dropped, chinese_share
from model.data.rows import BYTE_ORDER_MARK, RowReport, parse_list, parse_object
from model.errors import UserError
from model.files import atomic_write, open_binary, refuse_existing
from model.memory import peak_memory

BLOCK_BYTES = 1 << 20
BLOCK_ITEMS = 500  # of a JSON list
LONGEST_LINE_BYTES = 64 << 20  # a longer "line" is a wrong file; holding it would break the promise of flat memory
PARALLEL_FROM_BYTES = 8 << 20  # below this, starting workers takes longer than the work


class Block(NamedTuple):
    """Some whole rows of one file as JSON lines, the first of which is at f"{place}{first}".

    `problems` are (where, kind, excerpt) of rows that the reader itself had to give up on.
    """

    path: str
    place: str
    first: int
    data: bytes
    problems: tuple = ()


def read_blocks(path, on_progress=lambda count: None):
    """Yield the Blocks of a JSONL file or a JSON list, decompressing .gz, .xz and .zst.

    `on_progress` gets the number of bytes of the (compressed) file consumed since the last call.
    """
    with open_binary(path) as handle:
        head = handle.read(BLOCK_BYTES).removeprefix(BYTE_ORDER_MARK)
        is_list, position, is_pipe = head.lstrip().startswith(b"["), 0, not Path(path).is_file()
        for block in list_blocks(str(path), head + handle.read()) if is_list else line_blocks(str(path), handle, head):
            yield block
            if not is_pipe:  # which has no position
                on_progress(-position + (position := os.lseek(handle.fileno(), 0, os.SEEK_CUR)))


def line_blocks(path, handle, chunk):
    line = 1
    while chunk:
        if not chunk.endswith(b"\n"):
            chunk += handle.readline(LONGEST_LINE_BYTES)
        problems, whole = (), chunk.rfind(b"\n") + 1
        if len(chunk) - whole >= LONGEST_LINE_BYTES:
            chunk, rest = chunk[:whole], chunk[whole:]
            overlong = line + chunk.count(b"\n")
            problems = ((f"{path}:{overlong}", f"longer than {LONGEST_LINE_BYTES >> 20} MiB", excerpt(rest)),)
            while rest and not rest.endswith(b"\n"):
                rest = handle.readline(BLOCK_BYTES)
        yield Block(path, f"{path}:", line, chunk, problems)
        line += chunk.count(b"\n") + len(problems)
        chunk = handle.read(BLOCK_BYTES)


def excerpt(row):
    return row[:200].decode("utf-8", "backslashreplace")


def list_blocks(path, data):
    items = parse_list(path, data)
    for start in range(0, len(items), BLOCK_ITEMS):
        lines = (json.dumps(item, ensure_ascii=False) for item in items[start : start + BLOCK_ITEMS])
        # Half a surrogate pair becomes the JSON escape that it came from, to be found where rows are parsed.
        yield Block(path, f"{path}: item ", start + 1, "\n".join(lines).encode("utf-8", "backslashreplace"))


class Converted(NamedTuple):
    """What one block became: its kept documents in input order, which output each goes to, what to find duplicates by.

    `dropped` counts rows by rule, `bad` has (where, kind, excerpt) of unreadable ones, `memory` is {process id: bytes}.
    """

    path: str
    input_bytes: int
    read: int
    blank: int
    dropped: collections.Counter
    bad: list
    payloads: list
    outputs: np.ndarray
    digests: np.ndarray | None
    signatures: tuple | None
    memory: dict


def convert_block(block, rules, dedup, near_rows):
    """Parse and filter the rows of `block`. `near_rows` are the values in a band of the MinHash signatures, or None."""
    kept, dropped, bad = [], collections.Counter(), list(block.problems)
    read, blank = len(bad), 0
    for number, row in rows_of(block):
        if not row.strip():
            blank += 1
            continue
        read += 1
        try:
            kept.append(rules.convert(parse_object(row)))
        except Dropped as reason:
            dropped[str(reason)] += 1
        except (BadRow, ValueError) as reason:
            bad.append((f"{block.place}{number}", str(reason), excerpt(row)))
    if rules.min_chinese > 0:
        kept = drop_foreign(kept, rules.min_chinese, dropped)
    payloads, outputs = [row.payload for row in kept], np.array([row.output for row in kept], dtype=np.int8)
    digests = signatures = None
    if dedup:
        joined = b"".join([hashlib.blake2b(payload, digest_size=8).digest() for payload in payloads])
        digests = np.frombuffer(joined, dtype=np.uint64)
    if near_rows:
        signatures = minhash_signatures([row.text for row in kept], near_rows)
    memory = {os.getpid(): peak_memory()}
    counts = read, blank, dropped, bad
    return Converted(block.path, len(block.data), *counts, payloads, outputs, digests, signatures, memory)


def rows_of(block):
    """(number, bytes) of each row of a block."""
    return enumerate(block.data.removesuffix(b"\n").split(b"\n") if block.data else [], block.first)


def drop_foreign(rows, least, dropped):
    """The rows with at least the share `least` of Chinese; their texts are not empty.

    A Chinese character has three bytes, any other at least one: where the share is high enough even if every other byte
    were a letter, as in nearly all Chinese text, a few NumPy passes over the whole block settle it.
    """
    if not rows:
        return rows
    texts = [row.text for row in rows]
    lengths = np.array([len(text) for text in texts])
    chinese = np.frombuffer(b"".join(texts), dtype=np.uint8) - np.uint8(0xE4) < 6
    counts = np.add.reduceat(chinese, np.cumsum(lengths) - lengths, dtype=np.int32)
    sure = (counts > 0) & (counts >= least * (lengths - 2 * counts))
    kept = [row for row, enough in zip(rows, sure.tolist()) if enough or chinese_share(row.text) >= least]
    dropped["min_chinese"] += len(rows) - len(kept)
    return kept


class CorpusReport(RowReport):
    """A RowReport of a run, with its files and what it took. Whatever is not dropped by a rule is a bad line."""

    def __init__(self, inputs, outputs, workers):
        super().__init__()
        self.rows_of_input = {str(path): 0 for path in inputs}
        self.outputs = {str(path): {"rows": 0, "bytes": 0, "left_as_it_was": False} for path in outputs}
        self.blank_lines, self.bad_lines_file = 0, None
        self.workers, self.seconds, self.memory = workers, 0.0, collections.Counter()  # process id -> bytes

    @property
    def bad_kinds(self):
        """{kind: [count, "file:line" of the first]}"""
        return {kind: [self.dropped[kind], places[0]] for kind, places in self.places.items() if kind not in DROP_RULES}

    def as_dict(self):
        """What --report writes."""
        return {
            "files": len(self.rows_of_input),
            "rows_read": self.rows,
            "blank_lines": self.blank_lines,
            "dropped": {rule: self.dropped[rule] for rule in DROP_RULES if self.dropped[rule]},
            "bad_kinds": self.bad_kinds,
            "bad_lines_file": self.bad_lines_file,
            "documents_kept": self.kept,
            "outputs": self.outputs,
            "files_without_rows": [path for path, rows in self.rows_of_input.items() if not rows],
            "input_bytes": self.bytes_read,
            "seconds": self.seconds,
            "workers": self.workers,
            "peak_memory_bytes": self.memory.total(),
            "bad_lines": sum(count for count, _ in self.bad_kinds.values()),
            "megabytes_per_second": round(self.bytes_read / 1e6 / max(self.seconds, 1e-9), 1),
        }

    def table(self):
        """The report as lines of text."""
        values = self.as_dict()
        lines = [("rows read", self.rows, f"in {values['files']} file{'s' * (values['files'] != 1)}")]
        lines += [(f"dropped: {key}", self.dropped[key], why) for key, why in DROP_RULES.items() if self.dropped[key]]
        lines += [("bad lines", count, f"{kind}, first at {first}") for kind, (count, first) in self.bad_kinds.items()]
        if self.blank_lines:
            lines.append(("blank lines", self.blank_lines, "skipped"))
        lines.append(("documents kept", self.kept, ""))
        for path, written in self.outputs.items():
            size = "left as it was" if written["left_as_it_was"] else f"{written['bytes'] / 1e6:.1f} MB"
            lines.append(("rows written", written["rows"], f"{path}, {size}"))
        table = [f"{name:<26}{count:>12,}  {note}".rstrip() for name, count, note in lines]
        if self.bad_lines_file:
            table.append(f"all bad lines: {self.bad_lines_file}")
        table += [f"note: {path} has no rows" for path in values["files_without_rows"]]
        speed = f"{self.bytes_read / 1e6:.1f} MB in {self.seconds:.1f} s = {values['megabytes_per_second']:.0f} MB/s"
        workers = f"{self.workers} worker{'s' * (self.workers != 1)}"
        return "\n".join([*table, f"{speed}, {workers}, peak memory {values['peak_memory_bytes'] / 1e6:.0f} MB"])

    def refuse_empty_result(self):
        """Raise UserError, saying why, when no row was kept."""
        if self.kept:
            return
        if not self.rows:
            first, *others = self.rows_of_input
            raise UserError(f"{first}: {f'and {len(others)} more: ' if others else ''}empty, no rows to read")
        ((reason, count),) = self.dropped.most_common(1)
        if reason in DROP_RULES:
            cause = f"{count:,} dropped by {reason}: {DROP_RULES[reason]}"
        else:
            cause = f"{count:,} bad lines: {reason}, first at {self.places[reason][0]}"
        raise UserError(f"none of the {self.rows:,} rows read was kept, nothing written; mostly {cause}")


def check_outputs(inputs, outputs, suffix, report=None, overwrite=False):
    """Raise UserError for `outputs` or a file for the `report` that must not be written: an input, two in
    one place, another name than *`suffix`, and what is there already, unless `overwrite`."""
    written = [*outputs, report] if report else outputs
    sources, targets = (list(map(os.path.realpath, paths)) for paths in (inputs, written))
    for path, target in zip(written, targets):
        if target in sources:
            raise UserError(f"{path}: is both input and output; choose another output")
        if targets.count(target) > 1:
            raise UserError(f"{path}: is given for two different outputs; choose another for one of them")
    for path in outputs:
        if Path(path).suffix != suffix:
            raise UserError(f"{path}: the name must end in {suffix}, which is what will be in it")
    refuse_existing(written, overwrite)


def process_corpus(inputs, outputs, rules, dedup=True, near_threshold=None, workers=1, description=None):
    """Convert the files `inputs` to the files `outputs` (one per frame of `rules`) and return the CorpusReport.

    near_threshold: Jaccard similarity of character 5-grams above which a document is a near duplicate; None: keep them.
    workers: processes that parse and filter; the output is the same for any number.
    description: label of the progress bar. Unreadable rows go to "<first output>.bad_lines.txt".
    Existing outputs are replaced (check_outputs asks first); one that no row is for is left as it was: corpora of one
    kind each are run one after the other.
    Raises UserError when an input cannot be read, nothing is left to write, or the disk is full; `outputs` then stay
    as they were.
    """
    started = time.perf_counter()
    inputs, outputs = list(map(Path, inputs)), list(map(Path, outputs))
    size = sum(path.stat().st_size for path in inputs if path.is_file())
    report = CorpusReport(inputs, outputs, workers if size >= PARALLEL_FROM_BYTES else 1)
    bad_lines_path = outputs[0].with_suffix(".bad_lines.txt")
    near_rows = rows_per_band(near_threshold) if near_threshold else None
    convert = functools.partial(convert_block, rules=rules, dedup=dedup, near_rows=near_rows)
    duplicates = DuplicateFilter(dedup, near_threshold)
    try:
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=size, unit="B", unit_scale=True, desc=description, disable=None))
            blocks = (block for path in inputs for block in read_blocks(path, bar.update))
            bad_lines = stack.enter_context(atomic_write(bad_lines_path))
            written = report.outputs.values()
            files = [stack.enter_context(output_file(*file)) for file in zip(outputs, rules.frames, written)]
            for block in in_processes(convert, blocks, report.workers):
                merge_block(block, duplicates.keep(block, report.dropped), files, bad_lines, report)
            report.refuse_empty_result()
    except OSError as error:
        raise UserError(f"{error.filename or outputs[0]}: {error.strerror}; nothing was written") from error
    if report.bad_kinds:
        report.bad_lines_file = str(bad_lines_path)
    else:
        bad_lines_path.unlink()
    report.seconds = time.perf_counter() - started
    return report


class LeaveAsItWas(Exception):
    """Ends atomic_write without a new file."""


@contextlib.contextmanager
def output_file(path, frame, written):
    """(handle, written) of atomic_write within a `frame`, (header, footer); completes `written`. A file without rows
    replaces no earlier one."""
    header, footer = frame
    with contextlib.suppress(LeaveAsItWas), atomic_write(path) as handle:
        handle.write(header)
        yield handle, written
        written["left_as_it_was"] = not written["rows"] and path.exists()
        if written["left_as_it_was"]:
            raise LeaveAsItWas
        handle.write(footer)
        written["bytes"] = handle.tell()


def in_processes(function, items, workers, wait=True):
    """Yield function(item) of every item, in order, from `workers` processes. UserError when one of them is killed.
    wait: whether Ctrl-C and errors wait for the items that are being worked on; else, for long ones, the processes end."""
    if workers == 1:
        yield from map(function, items)
        return
    # spawn: a forked copy of a process with threads (NumPy's, the progress bar's) may hang.
    context, waiting = multiprocessing.get_context("spawn"), collections.deque()
    with ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(os.getpid(),)) as pool:
        try:
            for item in items:
                with children_without_interrupts():  # the pool starts its processes here
                    waiting.append(pool.submit(function, item))
                if len(waiting) > 3 * workers:  # bounds memory: the reader waits for the slowest item
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed (out of memory?); try fewer --workers") from None
        finally:
            if waiting and not wait:
                for process in multiprocessing.active_children():
                    process.terminate()
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def children_without_interrupts():
    """Processes started in this block inherit a blocked Ctrl-C: none dies noisily while it still imports."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(parent):
    """Leave Ctrl-C to the parent, and end when the parent is gone, even by kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent and psutil.pid_exists(parent):  # the second is for Windows
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def merge_block(block, kept, files, bad_lines, report):
    """Write the documents `kept` (bool [n]) of a Converted block to `files` (handle, counts) and add everything up in
    `report`."""
    report.rows += block.read
    report.rows_of_input[block.path] += block.read
    report.blank_lines += block.blank
    report.bytes_read += block.input_bytes
    report.dropped.update(block.dropped)
    report.memory |= block.memory  # the larger of two counts
    report.memory |= {os.getpid(): peak_memory()}
    for where, kind, text in block.bad:
        report.drop(kind, where)
        bad_lines.write(f"{where}: {kind}: {text}\n".encode())
    for number, (handle, written) in enumerate(files):
        chosen = kept & (block.outputs == number)
        if chosen.any():
            data = b"".join(itertools.compress(block.payloads, chosen.tolist()))
            handle.write(data if written["rows"] else data.removeprefix(b","))  # a JSON list begins without one
            written["rows"] += int(chosen.sum())
