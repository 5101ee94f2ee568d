"""Raw corpora -> training files: stream JSON rows, filter, split, remove duplicates, write CSV or JSON atomically.

Input is read in blocks of whole lines; each block is converted on its own (in this process or by a pool of workers) and
the results are merged in input order, so the output does not depend on the number of workers and memory stays flat.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
from tqdm import tqdm

from model.data.deduplication import DuplicateFilter, band_shape, minhash_bands
from model.data.filters import DROP_RULES, BadRow, Dropped, chinese_share
from model.errors import UserError
from model.files import COMPRESSED_SUFFIXES, atomic_write, open_binary

BLOCK_BYTES = 1 << 20
LONGEST_LINE_BYTES = 64 << 20  # a longer "line" is a wrong file; holding it would break the promise of flat memory
PARALLEL_FROM_BYTES = 8 << 20  # below this, starting workers takes longer than the work
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


# -------------------------------------------------------------------------------------------------- reading blocks


class Block(NamedTuple):
    """Some whole rows of one file. `spans` (start, end, line) of the rows in `data`, or None: one row a line.

    `problems` are (line, kind, excerpt) of rows that the reader itself had to give up on. `offset` is where `data` begins
    in an uncompressed file, else None.
    """

    path: str
    first_line: int
    data: bytes
    spans: list | None = None
    problems: tuple = ()
    offset: int | None = None


def read_blocks(path, on_progress=lambda count: None):
    """Yield the Blocks of a JSONL file or a JSON list, decompressing .gz, .xz and .zst.

    `on_progress` gets the number of bytes of the (compressed) file consumed since the last call.
    """
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(open(path, "rb", buffering=BLOCK_BYTES)) if Path(path).is_file() else None
        handle = stack.enter_context(open_binary(path, raw))
        position = 0
        try:
            for block in parse_blocks(str(path), handle):
                yield block if handle is raw else block._replace(offset=None)
                if raw:  # a pipe has no position
                    on_progress(raw.tell() - position)
                    position = raw.tell()
        except Exception as error:  # zlib, lzma and zstandard have error classes of their own
            if Path(path).suffix not in COMPRESSED_SUFFIXES:
                raise
            raise UserError(f"{path}: the compressed data is damaged or cut ({error}); fetch the file again") from None


def parse_blocks(path, handle):
    start = handle.read(BLOCK_BYTES)
    head = start.removeprefix(BYTE_ORDER_MARK)
    if head.lstrip()[:1] == b"[" and not is_line_of_lists(head):
        return list_blocks(path, handle, head)
    return line_blocks(path, handle, head, len(start) - len(head))


def is_line_of_lists(head):
    """Whether a file that begins with "[" is JSONL with a list on each line (and not one list of rows)."""
    first, _, rest = head.lstrip().partition(b"\n")
    try:
        return rest.lstrip()[:1] == b"[" and isinstance(orjson.loads(first), list)
    except ValueError:
        return False


def line_blocks(path, handle, chunk, position):
    """Blocks of whole lines; `position` is where `chunk` begins in what `handle` reads."""
    pending, pending_bytes, line, skipping = [], 0, 1, False
    while chunk:
        cut = chunk.rfind(b"\n") + 1
        if skipping and cut:  # the end of the overlong line
            start = chunk.index(b"\n") + 1
            chunk, position, cut, line, skipping = chunk[start:], position + start, cut - start, line + 1, False
        if cut:
            data = b"".join([*pending, chunk[:cut]])
            yield Block(path, line, data, offset=position - pending_bytes)
            line += data.count(b"\n")
            pending, pending_bytes = [], 0
        if not skipping:
            pending.append(chunk[cut:])
            pending_bytes += len(chunk) - cut
        if pending_bytes > LONGEST_LINE_BYTES:
            yield Block(path, line, b"", problems=((line, too_long(), excerpt(pending[0])),))
            pending, pending_bytes, skipping = [], 0, True
        position += len(chunk)
        chunk = handle.read(BLOCK_BYTES)
    if pending_bytes:
        yield Block(path, line, b"".join(pending), offset=position - pending_bytes)


def too_long():
    return f"longer than {LONGEST_LINE_BYTES >> 20} MiB"


def excerpt(row):
    return row[:200].decode("utf-8", "backslashreplace")


# Strings are skipped as a whole, so brackets inside them do not count; a quote without its partner means that the
# buffer ends inside a string.
LIST_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]|"', re.DOTALL)


def list_blocks(path, handle, buffer):
    """Blocks of the items of one JSON list, found by their brackets without parsing the whole file."""
    line, finished = 1, False
    opening = buffer.index(b"[") + 1
    line += buffer.count(b"\n", 0, opening)
    buffer = buffer[opening:]
    while True:
        spans, problems, consumed, finished = scan_items(buffer, line)
        if finished and buffer[consumed:].strip():
            problems.append((line + buffer.count(b"\n", 0, consumed), "text after the list", excerpt(buffer[consumed:])))
        if spans or problems:
            yield Block(path, line, buffer[:consumed], spans, tuple(problems))
        line += buffer.count(b"\n", 0, consumed)
        buffer = buffer[consumed:]
        chunk = b"" if finished else handle.read(BLOCK_BYTES)
        if not chunk:
            break
        if len(buffer) > LONGEST_LINE_BYTES:
            yield Block(path, line, b"", problems=((line, f"{too_long()}; rest of the list lost", excerpt(buffer)),))
            return
        buffer += chunk
    if not finished:
        rest = buffer.lstrip(b", \t\r\n")
        line += buffer.count(b"\n", 0, len(buffer) - len(rest))
        yield Block(path, line, b"", problems=((line, "the list breaks off here", excerpt(rest)),))


def scan_items(buffer, line):
    """(spans, problems, bytes consumed, whether the list ended) of the complete items at the start of `buffer`."""
    spans, problems, depth, begin, end, counted = [], [], 0, 0, 0, 0
    for token in LIST_TOKEN.finditer(buffer):
        kind = token[0]
        if kind == b'"':
            break
        if kind in (b"{", b"["):
            if depth == 0:
                begin = token.start()
            depth += 1
        elif kind in (b"}", b"]"):
            depth -= 1
            if depth > 0:
                continue
            stop = begin if depth == 0 else token.start()
            between = buffer[end:stop].strip(b", \t\r\n")
            if between:
                place = line + buffer.count(b"\n", counted, buffer.index(between, end))
                problems.append((place, "not a JSON object", excerpt(between)))
            line, counted = line + buffer.count(b"\n", counted, stop), stop
            end = token.end()
            if depth < 0:
                return spans, problems, end, True
            spans.append((begin, end, line))
    return spans, problems, end, False


# ------------------------------------------------------------------------------------------------ converting blocks


@dataclasses.dataclass
class Converted:
    """What one block became. Documents are in input order; `ends` are the ends of their bytes in `payload`."""

    path: str
    read: int = 0
    blank: int = 0
    input_bytes: int = 0
    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    bad: list = dataclasses.field(default_factory=list)
    payload: bytes = b""
    ends: np.ndarray = None
    outputs: np.ndarray = None
    rows: np.ndarray = None
    digests: np.ndarray = None
    bands: np.ndarray = None
    process: tuple = ()


def convert_block(block, rules, dedup, near_bands):
    """Parse and filter the rows of `block`. `near_bands` is (bands, rows per band) of the MinHash signatures or None."""
    result = Converted(block.path, input_bytes=len(block.data), bad=list(block.problems), read=len(block.problems))
    kept = []
    for line, row in rows_of(block):
        if not row or row.isspace():
            result.blank += 1
            continue
        result.read += 1
        try:
            kept.append(rules.convert(parse_row(row)))
        except Dropped as reason:
            result.dropped[str(reason)] += 1
        except BadRow as reason:
            result.bad.append((line, str(reason), excerpt(row)))
        except UnicodeEncodeError:
            result.bad.append((line, "half a surrogate pair in a text", excerpt(row)))
    if rules.min_chinese > 0:
        kept = drop_foreign(kept, rules.min_chinese, result.dropped)
    payloads = [row.payload for row in kept]
    result.payload = b"".join(payloads)
    result.ends = np.cumsum([len(payload) for payload in payloads], dtype=np.int64)
    result.outputs = np.array([row.output for row in kept], dtype=np.int8)
    result.rows = np.array([row.rows for row in kept], dtype=np.int64)
    if dedup:
        digests = b"".join([hashlib.blake2b(payload, digest_size=8).digest() for payload in payloads])
        result.digests = np.frombuffer(digests, dtype=np.uint64)
    if near_bands:
        result.bands = minhash_bands([row.text for row in kept], *near_bands)
    result.process = os.getpid(), peak_memory()
    return result


def drop_foreign(rows, least, dropped):
    """The rows with at least the share `least` of Chinese; their texts are not empty.

    A Chinese character has three bytes, any other at least one: where the share is high enough even if every other byte
    were a letter, as in nearly all Chinese text, a few NumPy passes over the whole block settle it.
    """
    if not rows:
        return rows
    texts = [row.text for row in rows]
    lengths = np.array([len(text) for text in texts])
    starts = np.cumsum(lengths) - lengths
    chinese = np.frombuffer(b"".join(texts), dtype=np.uint8) - np.uint8(0xE4) < 6
    counts = np.add.reduceat(chinese, starts, dtype=np.int32)
    sure = (counts > 0) & (counts >= least * (lengths - 2 * counts))
    kept = [row for row, enough in zip(rows, sure.tolist()) if enough or chinese_share(row.text) >= least]
    dropped["min_chinese"] += len(rows) - len(kept)
    return kept


def rows_of(block):
    """(line number, bytes) of each row of a block."""
    if block.spans is None:
        lines = block.data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        return enumerate(lines, block.first_line)
    return ((line, block.data[start:end]) for start, end, line in block.spans)


def parse_row(row):
    try:
        record = orjson.loads(row)
    except ValueError:
        record = parse_leniently(row)
    if not isinstance(record, dict):
        raise BadRow("not a JSON object")
    return record


def parse_leniently(row):
    """The standard parser for what orjson refuses but Python's own json writes (NaN, large integers)."""
    try:
        return json.loads(row.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRow("invalid UTF-8") from None
    except (ValueError, RecursionError):
        raise BadRow("invalid JSON") from None


def peak_memory():
    """Largest resident memory of this process so far, in bytes."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# -------------------------------------------------------------------------------------------------------- the run


@dataclasses.dataclass
class Report:
    """What a run did: counts of rows, bytes and seconds. `bad_kinds` maps kind -> [count, first "file:line"]."""

    files: int = 0
    rows_read: int = 0
    blank_lines: int = 0
    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    bad_kinds: dict = dataclasses.field(default_factory=dict)
    bad_lines_file: str | None = None
    documents_kept: int = 0
    documents_split: int = 0
    outputs: dict = dataclasses.field(default_factory=dict)
    files_without_rows: list = dataclasses.field(default_factory=list)
    input_bytes: int = 0
    seconds: float = 0.0
    workers: int = 1
    peak_memory_bytes: int = 0

    @property
    def bad_lines(self):
        return sum(count for count, _ in self.bad_kinds.values())

    @property
    def megabytes_per_second(self):
        return self.input_bytes / 1e6 / max(self.seconds, 1e-9)

    def as_dict(self):
        values = {**dataclasses.asdict(self), "dropped": {key: count for key, count in self.dropped.items() if count}}
        return {**values, "bad_lines": self.bad_lines, "megabytes_per_second": round(self.megabytes_per_second, 1)}

    def table(self):
        """The report as lines of text."""
        lines = [("rows read", self.rows_read, f"in {self.files} file{'s' * (self.files != 1)}")]
        lines += [(f"dropped: {key}", self.dropped[key], why) for key, why in DROP_RULES.items() if self.dropped[key]]
        lines += [("bad lines", count, f"{kind}, first at {first}") for kind, (count, first) in self.bad_kinds.items()]
        if self.blank_lines:
            lines.append(("blank lines", self.blank_lines, "skipped"))
        split = f"{self.documents_split:,} of them split at sentence ends" if self.documents_split else ""
        lines.append(("documents kept", self.documents_kept, split))
        for path, written in self.outputs.items():
            size = "left as it was" if written["left_as_it_was"] else f"{written['bytes'] / 1e6:.1f} MB"
            lines.append(("rows written", written["rows"], f"{path}, {size}"))
        text = "\n".join(f"{name:<26}{count:>12,}  {note}".rstrip() for name, count, note in lines)
        if self.bad_lines_file:
            text += f"\nall bad lines: {self.bad_lines_file}"
        text += "".join(f"\nnote: {path} has no rows" for path in self.files_without_rows)
        return text + (
            f"\n{self.input_bytes / 1e6:.1f} MB in {self.seconds:.1f} s = {self.megabytes_per_second:.0f} MB/s, "
            f"{self.workers} worker{'s' * (self.workers != 1)}, peak memory {self.peak_memory_bytes / 1e6:.0f} MB"
        )


def process_corpus(inputs, outputs, rules, dedup=True, near_threshold=None, workers=1, description=None):
    """Convert the files `inputs` to the files `outputs` (one per frame of `rules`) and return the Report.

    near_threshold: Jaccard similarity of character 5-grams above which a document is a near duplicate; None: keep them.
    workers: processes that parse and filter; the output is the same for any number.
    description: label of the progress bar. Unreadable rows go to "<first output>.bad_lines.txt".
    An existing output that no row is for is left as it was: corpora of one kind each are run one after the other.
    Raises UserError when an input cannot be read, nothing is left to write, or the disk is full; `outputs` then stay
    as they were.
    """
    started = time.perf_counter()
    inputs, outputs = [Path(path) for path in inputs], [Path(path) for path in outputs]
    for path in outputs:
        if path.resolve() in {source.resolve() for source in inputs}:
            raise UserError(f"{path}: is both input and output; choose another output")
    size = sum(path.stat().st_size for path in inputs if path.is_file())
    report = Report(files=len(inputs), workers=workers if size >= PARALLEL_FROM_BYTES else 1)
    bad_lines_path = outputs[0].with_suffix(".bad_lines.txt")
    near_bands = band_shape(near_threshold) if near_threshold else None
    try:
        with (
            OutputFiles(outputs, rules.frames, bad_lines_path) as files,
            tqdm(total=size, unit="B", unit_scale=True, desc=description, disable=None) as bar,
        ):
            blocks = (block for path in inputs for block in read_blocks(path, bar.update))
            merge_blocks(convert_all(blocks, rules, dedup, near_bands, report.workers), files, report, dedup, near_bands)
            report.files_without_rows += [str(path) for path in inputs if str(path) not in files.sources]
            refuse_empty_result(report, inputs)
            files.finish()
    except OSError as error:
        raise UserError(f"{error.filename or outputs[0]}: {error.strerror}; nothing was written") from error
    if report.bad_kinds:
        report.bad_lines_file = str(bad_lines_path)
    else:
        bad_lines_path.unlink(missing_ok=True)  # of an earlier run, no longer true
    report.outputs = {str(path): written for path, written in zip(outputs, files.written)}
    report.seconds = time.perf_counter() - started
    return report


class LeaveAsItWas(Exception):
    """Ends atomic_write without a new file."""


class OutputFiles(contextlib.ExitStack):
    """The output files and the list of bad lines, all of which appear when the block ends without error, or none."""

    def __init__(self, paths, frames, bad_lines_path):
        super().__init__()
        self.paths, self.frames, self.bad_lines_path = paths, frames, bad_lines_path
        self.written = [{"rows": 0, "bytes": 0, "left_as_it_was": False} for _ in paths]
        self.sources = set()
        self.bad_lines = None

    def __enter__(self):
        super().__enter__()
        self.handles = [self.enter_context(self.output(*pair)) for pair in zip(self.paths, self.written)]
        for output, (header, _) in enumerate(self.frames):
            self.write(output, header, 0)
        return self

    @contextlib.contextmanager
    def output(self, path, written):
        """atomic_write, but a file without rows replaces no earlier one."""
        with contextlib.suppress(LeaveAsItWas), atomic_write(path) as handle:
            yield handle
            if not written["rows"] and path.exists():
                written.update(bytes=0, left_as_it_was=True)
                raise LeaveAsItWas

    def finish(self):
        for output, (_, footer) in enumerate(self.frames):
            self.write(output, footer, 0)

    def write(self, output, data, rows):
        if rows and not self.written[output]["rows"]:
            data = data[data.startswith(b",") :]  # no comma before the first item of a JSON list
        self.handles[output].write(data)
        self.written[output]["rows"] += rows
        self.written[output]["bytes"] += len(data)

    def write_bad_line(self, where, kind, text):
        if self.bad_lines is None:
            self.bad_lines = self.enter_context(atomic_write(self.bad_lines_path))
        self.bad_lines.write(f"{where}: {kind}: {text}\n".encode())


def convert_all(blocks, rules, dedup, near_bands, workers):
    """Yield the Converted of every block, in order, from `workers` processes."""
    if workers == 1:
        yield from (convert_block(block, rules, dedup, near_bands) for block in blocks)
        return
    # spawn: a forked copy of a process with threads (NumPy's, the progress bar's) may hang.
    context = multiprocessing.get_context("spawn")
    waiting = collections.deque()
    with ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(os.getpid(),)) as pool:
        try:
            for block in blocks:
                waiting.append(submit(pool, block, rules, dedup, near_bands))
                if len(waiting) > 3 * workers:  # bounds memory: the reader waits for the slowest block
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed (out of memory?); try fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


def submit(pool, block, *options):
    """Have a worker convert `block`; what it can read from the file itself need not go through a pipe."""
    if block.offset is None:
        return pool.submit(convert_block, block, *options)
    return pool.submit(read_and_convert, block._replace(data=b""), len(block.data), *options)


def read_and_convert(block, size, *options):
    with open(block.path, "rb", buffering=0) as handle:
        handle.seek(block.offset)
        return convert_block(block._replace(data=handle.read(size)), *options)


def start_worker(parent):
    """Leave Ctrl-C to the parent, and end when the parent is gone, even by kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def merge_blocks(converted, files, report, dedup, near_bands):
    """Write the new documents of every block in order and add everything up in `report`."""
    duplicates, peaks = DuplicateFilter(dedup, near_bands), {}
    for block in converted:
        report.rows_read += block.read
        report.blank_lines += block.blank
        report.input_bytes += block.input_bytes
        report.dropped.update(block.dropped)
        if block.read:
            files.sources.add(block.path)
        for line, kind, text in block.bad:
            where = f"{block.path}:{line}"
            report.bad_kinds.setdefault(kind, [0, where])[0] += 1
            files.write_bad_line(where, kind, text)
        kept = duplicates.keep(block, report.dropped)
        report.documents_kept += int(kept.sum())
        report.documents_split += int((kept & (block.rows > 1)).sum())
        for output in range(len(files.paths)):
            chosen = kept & (block.outputs == output)
            if chosen.any():
                files.write(output, select_payload(block, chosen), int(block.rows[chosen].sum()))
        peaks[block.process[0]] = block.process[1]
    peaks[os.getpid()] = peak_memory()
    report.peak_memory_bytes = sum(peaks.values())


def select_payload(block, chosen):
    """The bytes of the `chosen` documents (bool [documents]) of a Converted block."""
    if chosen.all():
        return block.payload
    starts = np.concatenate([[0], block.ends[:-1]])
    return b"".join([block.payload[start:end] for start, end in zip(starts[chosen], block.ends[chosen])])


def refuse_empty_result(report, inputs):
    if report.documents_kept:
        return
    if not report.rows_read:
        names = f"{inputs[0]}: " + ("" if len(inputs) == 1 else f"and {len(inputs) - 1} more: ")
        raise UserError(f"{names}empty, no rows to read")
    bad = max(report.bad_kinds.items(), key=lambda item: item[1][0], default=("", [0, ""]))
    rule, count = max(report.dropped.items(), key=lambda item: item[1], default=("", 0))
    if bad[1][0] >= count:
        reason = f"{bad[1][0]:,} bad lines: {bad[0]}, first at {bad[1][1]}"
    else:
        reason = f"{count:,} dropped by {rule}: {DROP_RULES[rule]}"
    raise UserError(f"none of the {report.rows_read:,} rows read was kept, nothing written; mostly {reason}")
