"""Rows in: .csv and .jsonl (also .gz, .xz, .zst) as a stream; bad rows are counted and named, never fatal or silent."""

import collections
import csv
import json
import re
import sys
from pathlib import Path

from model.errors import UserError
from model.files import COMPRESSED_SUFFIXES, open_binary

LONGEST_FIELD = 1 << 28  # characters; the csv module's default of 131,072 is shorter than many a document
PLACES_KEPT = 10
GIVE_UP_AFTER = 1000  # rows without a single good one: it is the wrong file, not a bad row
LOOK_AHEAD_BYTES = 1 << 16
ROWS_THAT_PROVE = 8  # as many rows, each ending in a carriage return: that is how lines end, not how values do
CARRIAGE_RETURN_MARK = "\udc0d"  # a lone surrogate: no decoded text contains it
UNDECODED_BYTE = re.compile("[\udc80-\udcff]")


class RowReport:
    """What reading a file kept and left out.

    Attributes: rows (all rows met), kept, bytes_read (decompressed), place ("file:line" of the row handed out last),
    dropped (Counter: reason -> rows left out), places (reason -> the first file:line), notes (Counter: what was
    changed in kept rows).
    """

    def __init__(self):
        self.rows, self.bytes_read, self.place = 0, 0, None
        self.dropped, self.notes, self.places = collections.Counter(), collections.Counter(), {}

    @property
    def kept(self):
        return self.rows - self.dropped.total()

    def drop(self, reason, place=None, count=1):
        """Count `count` rows left out for `reason`; the first few places are remembered."""
        self.dropped[reason] += count
        places = self.places.setdefault(reason, [])
        if place is not None and len(places) < PLACES_KEPT:
            places.append(place)

    def note(self, what, count=1):
        """Count kept rows that were changed, such as a history cut short."""
        if count:
            self.notes[what] += count

    def summary(self):
        """Readable lines: rows kept, then each reason with its count and first places."""
        lines = [f"{self.rows:,} rows read, {self.kept:,} kept"]
        for reason, count in self.dropped.most_common():
            places = self.places.get(reason, [])
            more = ", ..." if places and count > len(places) else ""
            lines.append(f"  left out {count:,}: {reason}" + (f" ({', '.join(places)}{more})" if places else ""))
        return lines + [f"  {what}: {count:,}" for what, count in self.notes.most_common()]

    def to_dict(self):
        """Plain JSON values, so that a token cache can repeat what was left out when it was built."""
        return {name: getattr(self, name) for name in ("rows", "bytes_read", "dropped", "notes", "places")}

    def copy(self):
        """An independent report with the same counts."""
        return RowReport.from_dict(self.to_dict())

    @classmethod
    def from_dict(cls, values):
        report = cls()
        report.rows, report.bytes_read = values["rows"], values["bytes_read"]
        report.dropped.update(values["dropped"])
        report.notes.update(values["notes"])
        report.places = {reason: list(places) for reason, places in values["places"].items()}
        return report


def iter_records(path, columns, report=None, json_columns=(), alternative=None):
    """Stream the rows of a .csv or .jsonl file as dicts {column: str}.

    columns: names every row must have; others are ignored. json_columns hold JSON (a text cell in .csv, any value in
    .jsonl; an empty cell is None) and come out parsed. alternative: a column that may stand in for all of `columns`
    (in SFT: "conversations").
    Bad rows (not JSON, wrong number of fields, broken UTF-8, a value that isn't text) are
    counted in `report` with file:line (the physical line on which the row begins) and skipped; without a report a
    summary goes to stderr at the end. Raises UserError: no such file, empty file, unknown suffix, missing column
    (naming the columns found), no readable row at all.
    """
    own_report = report is None
    report = RowReport() if own_report else report
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in COMPRESSED_SUFFIXES]
    readers = {".csv": _csv_records, ".jsonl": _jsonl_records}
    if not suffixes or suffixes[-1] not in readers:
        raise UserError(f"{path}: expected a .csv or .jsonl file (also .gz, .xz, .zst)")
    kept = met = 0
    with open_binary(path) as handle:
        lines = _raw_lines(path, handle, report)
        for place, record, problem in readers[suffixes[-1]](path, lines, columns, json_columns, alternative):
            met, report.rows, report.place = met + 1, report.rows + 1, place
            if problem is None:
                kept += 1
                yield record
            else:
                report.drop(problem, place)
                if not kept and met == GIVE_UP_AFTER:
                    break
    if not met:
        raise UserError(f"{path}: is empty, it has no rows")
    if not kept:
        found = f"; {record}" if isinstance(record, str) else ""
        raise UserError(
            f"{path}: none of the first {met:,} rows can be used, the last ({place}) because: {problem}{found}"
        )
    if own_report and report.dropped:
        print("\n".join(report.summary()), file=sys.stderr)


def _raw_lines(path, handle, report):
    """Physical lines as bytes, counted in the report; damage to a compressed file becomes a UserError."""
    try:
        for line in handle:
            report.bytes_read += len(line)
            yield line
    except Exception as error:  # zlib, lzma and zstandard have error classes of their own
        if Path(path).suffix not in COMPRESSED_SUFFIXES:
            raise
        raise UserError(f"{path}: the compressed data is damaged or cut ({error}); fetch the file again") from None


class _CsvLines:
    """Physical lines for csv.reader, to be read again after a broken row and marked where the csv module would stumble.

    A carriage return outside quotes ends a row for csv.reader, yet csv.writer (before Python 3.13) leaves it unquoted
    when its line end is "\\n"; bytes that aren't UTF-8 must spoil their own row only. Both travel as lone surrogates;
    `marked` says so. Whether "\\r\\n" ends a line is asked of the header, then of the first rows, then of every row
    with "\\r\\n" behind a closing quote: header and rows may come from different programs.
    """

    def __init__(self, raw_lines):
        self.raw_lines = raw_lines
        self.number, self.row, self.again, self.ahead = 0, [], collections.deque(), collections.deque()
        self.marked = self.ends_with_crlf = False

    def __iter__(self):
        return self

    def __next__(self):
        line = self.again.popleft() if self.again else self.decode(self.next_raw())
        if not line:
            raise StopIteration
        self.number += 1
        self.row.append(line)
        return line

    def next_raw(self):
        return self.ahead.popleft() if self.ahead else next(self.raw_lines, b"")

    def rows_end_with_crlf(self, header):
        """Look ahead: does a row end in a closing quote and "\\r\\n", or do all of many rows end in "\\r\\n"?"""
        size, quotes, ends = 0, header.count(b'"'), []
        while size < LOOK_AHEAD_BYTES and (raw := next(self.raw_lines, b"")):
            self.ahead.append(raw)
            size += len(raw)
            quotes += raw.count(b'"')
            if quotes % 2 == 0:  # not within a value of several lines
                ends.append(raw[-3:])
        return b'"\r\n' in ends or len(ends) >= ROWS_THAT_PROVE and all(end.endswith(b"\r\n") for end in ends)

    def decode(self, raw):
        try:
            line = raw.decode("utf-8-sig" if self.number == 0 else "utf-8")
        except UnicodeDecodeError:
            line, self.marked = raw.decode("utf-8", "surrogateescape"), True
        if self.number == 0:
            self.ends_with_crlf = line.endswith("\r\n") or self.rows_end_with_crlf(raw)
        if "\r" in line:
            end = len(line) - 2 * (self.ends_with_crlf and line.endswith("\r\n"))
            if "\r" in line[:end]:
                line, self.marked = line[:end].replace("\r", CARRIAGE_RETURN_MARK) + line[end:], True
        return line

    def start_row(self):
        """Forget the last row; returns the physical line number on which the next one begins."""
        self.row.clear()
        self.marked = bool(self.again) and self.marked
        return self.number + 1

    def end_with_crlf(self):
        """Whether this row broke at "\\r\\n" behind a closing quote; it is then put back with that as its end."""
        if not self.row or not self.row[-1].endswith(f'"{CARRIAGE_RETURN_MARK}\n'):
            return False
        self.ends_with_crlf = True
        self.number -= len(self.row)
        self.again.extendleft(reversed([*self.row[:-1], self.row[-1][:-2] + "\r\n"]))
        return True

    def read_again(self):
        """Go back to the second line of this row: an unclosed quote must not swallow the rows behind it."""
        self.again.extendleft(reversed(self.row[1:]))
        self.number -= len(self.row) - 1
        self.marked = True


def _csv_rows(path, raw_lines):
    """Yield (place, list of fields, None) or (place, None, problem) for every row, the header included."""
    csv.field_size_limit(LONGEST_FIELD)
    lines = _CsvLines(raw_lines)
    reader = csv.reader(lines, strict=True)
    while True:
        place = f"{path}:{lines.start_row()}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.end_with_crlf():
                continue
            lines.read_again()
            yield place, None, f"broken CSV: {error}"
            continue
        if not fields:
            continue
        if lines.marked:
            if any(map(UNDECODED_BYTE.search, fields)):
                yield place, None, "not UTF-8"
                continue
            fields = [field.replace(CARRIAGE_RETURN_MARK, "\r") for field in fields]
        yield place, fields, None


def _csv_records(path, raw_lines, columns, json_columns, alternative):
    rows = _csv_rows(path, raw_lines)
    _, header, problem = next(rows, (None, [], None))
    if problem:
        raise UserError(f"{path}:1: the header cannot be read ({problem})")
    if not header:
        raise UserError(f"{path}: is empty, it has no rows")
    if alternative in header:
        columns = (alternative,)
    for column in columns:
        if column not in header:
            raise UserError(f"{path}: no column {column!r}; columns found: {', '.join(header)}")
    positions = [(column, header.index(column), column in json_columns) for column in columns]
    for place, fields, problem in rows:
        if problem is None and len(fields) != len(header):
            problem = "wrong number of fields"
        record = {}
        if problem is None:
            for column, position, is_json in positions:
                record[column] = fields[position]
                if is_json:
                    try:
                        record[column] = _parse_json(fields[position]) if fields[position].strip() else None
                    except ValueError as error:
                        problem = f"{column}: {error}"
        yield place, record, problem


def _jsonl_records(path, raw_lines, columns, json_columns, alternative):
    for number, raw in enumerate(raw_lines, 1):
        if not raw.strip():
            continue
        record, problem = None, None
        try:
            row = _parse_json(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            problem = "not UTF-8"
        except ValueError as error:
            problem = str(error)
        else:
            record, problem = _select(row, columns, json_columns, alternative)
        yield f"{path}:{number}", record, problem


def _select(row, columns, json_columns, alternative):
    """The wanted fields of a parsed line and None, or what was found instead and what is wrong with it."""
    if not isinstance(row, dict):
        return None, "not a JSON object"
    columns = (alternative,) if alternative in row else columns
    for column in columns:
        if column not in row:
            return f"fields found: {', '.join(row)}", f"no field {column!r}"
        if column not in json_columns and not isinstance(row[column], str):
            return None, f"{column} is not a string"
    return {column: row[column] for column in columns}, None


def _parse_json(text):
    """json.loads with short ValueErrors; half a surrogate pair is refused too, since no encoding can hold it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair in the text") from None
    return value
