"""Rows in: .csv and .jsonl (also .gz, .xz, .zst) read as a stream; bad rows are counted and named, never fatal, never silent."""

import collections


class RowReport:
    """What reading a file kept and left out. `drop` counts a reason and remembers its first places as file:line.

    Attributes: rows (good rows so far), bytes_read (decompressed), dropped (Counter: reason -> rows), places (reason -> list of str).
    """

    def __init__(self):
        self.rows, self.bytes_read = 0, 0
        self.dropped, self.places = collections.Counter(), {}

    def drop(self, reason, place=None, count=1):
        """Count `count` rows left out for `reason`; `place` is "file:line"."""
        raise NotImplementedError

    def summary(self):
        """Readable lines: rows kept, then for each reason the count and its first places."""
        raise NotImplementedError


def iter_records(path, columns, report=None, json_columns=(), alternative=None):
    """Stream the rows of a .csv or .jsonl file as dicts {column: str}.

    columns: names every row must have; others are ignored. json_columns hold JSON (a text cell in .csv, any value in .jsonl) and
    come out parsed. alternative: one column that may stand in for all of `columns` (for SFT: "conversations").
    Bad rows (not JSON, wrong number of fields, broken UTF-8, a value that isn't text) are counted in `report` with file:line
    (the physical line on which the row begins) and skipped; without a report a summary goes to stderr at the end.
    Raises UserError: no such file, empty file, unknown suffix, missing column (naming the columns found).
    """
    raise NotImplementedError
