"""Rows in: .csv and .jsonl (also .gz, .xz, .zst) as a stream; bad rows are counted and named, never fatal or silent."""

import collections
import csv
import json
import re
import sys

import orjson

from model.errors import UserError
from model.files import open_binary, uncompressed_suffix

LONGEST_FIELD = 1 << 28  # characters; the csv module's default of 131,072 is shorter than many a document
PLACES_KEPT = 10
GIVE_UP_AFTER = 1000  # rows without a single good one: it is the wrong file, not a bad row
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CARRIAGE_RETURN_MARK = "\udc0d"  # a lone surrogate: no decoded text contains it
HALF_A_PAIR = "half a surrogate pair in the text"
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

    def drop(self, reason, place=None):
        """Count a row left out for `reason`; the first few places are remembered."""
        self.dropped[reason] += 1
        places = self.places.setdefault(reason, [])
        if place is not None and len(places) < PLACES_KEPT:
            places.append(place)

    def note(self, what):
        """Count a kept row that was changed, such as a history cut short."""
        self.notes[what] += 1

    def add(self, other):
        """Add the counts of another report, and its places as far as there is room for them."""
        self.rows, self.bytes_read = self.rows + other.rows, self.bytes_read + other.bytes_read
        self.dropped.update(other.dropped)
        self.notes.update(other.notes)
        for reason, places in other.places.items():
            known = self.places.setdefault(reason, [])
            known += places[: PLACES_KEPT - len(known)]

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

    @classmethod
    def from_dict(cls, values):
        """The report that to_dict made `values` of; KeyError, TypeError or ValueError for any others."""
        report = cls()
        report.rows, report.bytes_read, report.places = values["rows"], values["bytes_read"], {**values["places"]}
        report.dropped, report.notes = (collections.Counter({**values[name]}) for name in ("dropped", "notes"))
        counts = [report.rows, report.bytes_read, *report.dropped.values(), *report.notes.values()]
        places = [place for some in report.places.values() for place in [*some]]
        if not all(type(count) is int for count in counts) or not all(type(place) is str for place in places):
            raise ValueError("not a report")
        return report


def parse_json(data):
    """The value of JSON text or its UTF-8 bytes.

    Raises ValueError with a short reason: not JSON, not UTF-8, or half a surrogate pair, which no encoding can hold.
    """
    try:
        return orjson.loads(data)
    except ValueError:
        pass  # of what it refuses, NaN and the like are written by Python's own json and many others: not an error
    try:
        value = json.loads(data if isinstance(data, str) else data.decode("utf-8"))
        whole = can_be_encoded(value)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not whole:
        raise ValueError(HALF_A_PAIR)
    return value


def can_be_encoded(value):
    """Whether a parsed JSON value has no half of a surrogate pair in its texts."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_object(data):
    """The dict that a JSON text or its bytes hold; ValueError with a short reason when it is anything else."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def read_lines(path, report=None):
    """Yield (number, bytes) of every line of a text file, the byte order mark removed; counts report.bytes_read."""
    report = report or RowReport()
    with open_binary(path) as handle:
        for number, line in enumerate(handle, 1):
            report.bytes_read += len(line)
            yield number, line if number > 1 else line.removeprefix(BYTE_ORDER_MARK)


def iter_json_lines(path, report=None):
    """Yield (place, record, problem) for every line of a JSON Lines file that is not blank; counts report.bytes_read.

    place: "file:line". record: the line's dict, or None, and then `problem` is the short reason (else None).
    Raises UserError when there is no such file or it is damaged.
    """
    for number, line in read_lines(path, report):
        if line.strip():
            try:
                found = parse_object(line), None
            except ValueError as error:
                found = None, str(error)
            yield f"{path}:{number}", *found


def iter_json_rows(path, report=None):
    """Yield (place, record, problem) as iter_json_lines does for the rows of a file that is one JSON list ("file: item 3"),
    or that has one JSON object a line. Raises UserError also for a list that is not JSON."""
    with open_binary(path) as handle:
        head = handle.read(1 << 12).removeprefix(BYTE_ORDER_MARK)
        data = head + handle.read() if head.lstrip().startswith(b"[") else None
    if data is None:
        yield from iter_json_lines(path, report)
        return
    for number, item in enumerate(parse_list(path, data), 1):
        problem = None
        if not isinstance(item, dict):
            problem = "not a JSON object"
        elif not can_be_encoded(item):
            problem = HALF_A_PAIR
        yield f"{path}: item {number}", None if problem else item, problem


def parse_list(path, data):
    """The items of one JSON list; UserError naming the line where it is broken or breaks off."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line, reason = data.count(b"\n", 0, error.start) + 1, "not UTF-8"
    except json.JSONDecodeError as error:
        line, reason = error.lineno, f"{error.msg} at column {error.colno}"
    except RecursionError:
        line, reason = 1, "brackets within brackets within brackets"
    except ValueError:  # Python's limit of 4,300 digits
        line, reason = 1, "a number of thousands of digits"
    raise UserError(f"{path}:{line}: the JSON list cannot be read ({reason}); mend it there or fetch the file again")


def iter_records(path, columns, report=None, json_columns=(), alternative=None):
    """Stream the rows of a .csv or .jsonl file as dicts {column: str}.

    columns: names every row must have; others are ignored. json_columns hold JSON (a text cell in .csv, any value in
    .jsonl; an empty cell is None) and come out parsed. alternative: a column that may stand in for all of `columns`
    (in SFT: "conversations"). In .csv a row ends as the header line does, in "\n" or "\r\n"; any other carriage return
    belongs to a value. Bad rows are counted in `report` with file:line (the physical line on which the row begins) and
    skipped; without a report a summary goes to stderr at the end. Raises UserError: no such file, empty file, unknown
    suffix, missing column (naming the columns found), no readable row at all.
    """
    own_report, report = report is None, report or RowReport()
    reader = {".csv": _csv_records, ".jsonl": _jsonl_records}.get(uncompressed_suffix(path))
    if not reader:
        raise UserError(f"{path}: expected a .csv or .jsonl file (also .gz, .xz, .zst)")
    kept = met = 0
    for place, record, problem in reader(path, report, columns, json_columns, alternative):
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
    if own_report and (report.dropped or report.notes):
        print("\n".join(report.summary()), file=sys.stderr)


class _CsvLines:
    """Physical lines for csv.reader, to be read again after a broken row and marked where the csv module would stumble.

    A carriage return outside quotes ends a row for csv.reader, yet csv.writer (before Python 3.13) leaves it unquoted
    when its line end is "\\n"; bytes that aren't UTF-8 must spoil their own row only. Both travel as lone surrogates;
    `marked` says so. `row` holds (number, line) of the current row, `again` those to be read once more.
    """

    def __init__(self, numbered_lines):
        self.numbered_lines, self.line_end = numbered_lines, None
        self.row, self.again, self.marked = [], collections.deque(), False

    def __iter__(self):
        return self

    def __next__(self):
        number, line = self.again.popleft() if self.again else self.decode(*next(self.numbered_lines))
        self.row.append((number, line))
        return line

    def decode(self, number, raw):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError:
            line, self.marked = raw.decode("utf-8", "surrogateescape"), True
        if self.line_end is None:
            self.line_end = "\r\n" if line.endswith("\r\n") else "\n"
        text = line.removesuffix(self.line_end)
        if "\r" in text:
            line, self.marked = text.replace("\r", CARRIAGE_RETURN_MARK) + line[len(text) :], True
        return number, line


def iter_csv_rows(path, report):
    """Yield (place, list of fields, None) or (place, None, problem) for every row, the header included."""
    csv.field_size_limit(LONGEST_FIELD)
    lines = _CsvLines(read_lines(path, report))
    reader = csv.reader(lines, strict=True)
    while True:
        lines.row, lines.marked = [], bool(lines.again)
        fields = problem = None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"broken CSV: {error}"
        place, end = f"{path}:{lines.row[0][0]}", lines.row[-1][1][-3:]
        if problem:
            if end == f'"{CARRIAGE_RETURN_MARK}\n':
                problem = "the row ends in \\r\\n but the header line in \\n"
            # Go on with the second line of this row: an unclosed quote must not swallow the rows behind it.
            lines.again.extendleft(reversed(lines.row[1:]))
        elif lines.marked:
            if any(map(UNDECODED_BYTE.search, fields)):
                problem = "not UTF-8"
            elif end.endswith(f"{CARRIAGE_RETURN_MARK}\n"):
                report.note("rows end in \\r\\n but the header line in \\n: the last value keeps the \\r")
            fields = [field.replace(CARRIAGE_RETURN_MARK, "\r") for field in fields]
        if fields or problem:
            yield place, fields, problem


def _csv_records(path, report, columns, json_columns, alternative):
    rows = iter_csv_rows(path, report)
    _, header, problem = next(rows, (None, [], None))
    if problem:
        raise UserError(f"{path}:1: the header cannot be read ({problem})")
    if not header:
        raise UserError(f"{path}: is empty, it has no rows")
    if alternative in header:
        columns = (alternative,)
    for column in columns:
        if column not in header:
            raise UserError(
                f"{path}: no column {column!r}; columns found: {', '.join(header)}{_way_out(header, columns)}"
            )
    positions = [(column, header.index(column), column in json_columns) for column in columns]
    for place, fields, problem in rows:
        record = {}
        if problem is None and len(fields) != len(header):
            problem = "wrong number of fields"
        if problem is None:
            for column, position, is_json in positions:
                record[column] = fields[position]
                if is_json:
                    try:
                        record[column] = parse_json(fields[position]) if fields[position].strip() else None
                    except ValueError as error:
                        problem = f"{column}: {error}"
        yield place, record, problem


def _jsonl_records(path, report, columns, json_columns, alternative):
    for place, row, problem in iter_json_lines(path, report):
        yield place, *((None, problem) if problem else _select(row, columns, json_columns, alternative))


def _way_out(found, columns):
    """What to do where conversations are wanted and a raw corpus (Alpaca, messages) was found, else ""."""
    raw = "q" in columns and {"instruction", "messages", "output"}.intersection(found)
    return "; raw rows become training rows by: python data_process.py sft --data_path FILE.jsonl" if raw else ""


def _select(row, columns, json_columns, alternative):
    """The wanted fields of a parsed line and None, or what was found instead and what is wrong with it."""
    columns = (alternative,) if alternative in row else columns
    for column in columns:
        if column not in row:
            return f"fields found: {', '.join(row)}{_way_out(row, columns)}", f"no field {column!r}"
        if column not in json_columns and not isinstance(row[column], str):
            return None, f"{column} is not a string"
    return {column: row[column] for column in columns}, None
