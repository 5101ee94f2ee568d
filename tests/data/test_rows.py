"""Rows survive .csv and .jsonl byte for byte; bad ones are counted with the line on which they begin."""

import csv
import gzip
import json
import lzma

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.rows import RowReport, iter_json_lines, iter_json_rows, iter_records, parse_list
from model.errors import UserError

NASTY = [
    "NA",
    "null",
    "nan",
    "None",
    "",
    " ",
    '"',
    '""',
    "\\",
    "\\n",
    "a\nb",
    "\n",
    "\r",
    "a\rb",
    "c\r\nd",
    "e\r",
    ",",
    "😀👩‍👧",
    "\x00",
    "\u2028",
    "\ufeff",
]
texts = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.one_of(st.sampled_from('",\\\r\n\tN'), st.characters(codec="utf-8")), max_size=12),
)


def write_csv(path, header, rows, **dialect):
    with open(path, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle, **{"lineterminator": "\n", **dialect}).writerows([header, *rows])
    return path


def read(path, *arguments, **keywords):
    report = RowReport()
    return list(iter_records(path, *arguments, report=report, **keywords)), report


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=6),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_csv_round_trip(tmp_path_factory, rows, quoting):
    path = write_csv(
        tmp_path_factory.mktemp("csv") / "a.csv", ["id", "text", "q"], [[0, *row] for row in rows], quoting=quoting
    )
    records, report = read(path, ("q", "text"))
    assert [(record["text"], record["q"]) for record in records] == rows
    assert not report.dropped and report.rows == len(rows)


@settings(deadline=None, max_examples=80)
@given(values=st.lists(texts, min_size=1, max_size=6))
def test_one_column_csv_round_trip(tmp_path_factory, values):
    path = write_csv(tmp_path_factory.mktemp("csv") / "a.csv", ["text"], [[value] for value in values])
    assert [record["text"] for record in read(path, ("text",))[0]] == values


@settings(deadline=None, max_examples=80)
@given(values=st.lists(texts, min_size=1, max_size=6), ascii_only=st.booleans())
def test_jsonl_round_trip(tmp_path_factory, values, ascii_only):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": value}, ensure_ascii=ascii_only) + "\n" for value in values), newline="\n"
    )
    assert [record["text"] for record in read(path, ("text",))[0]] == values


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffq,a\r\n1,"x\r\ny"\r\n2,z\r\n'.encode())
    assert read(path, ("q", "a"))[0] == [{"q": "1", "a": "x\r\ny"}, {"q": "2", "a": "z"}]


def test_byte_order_mark_and_upper_case_surrogates_in_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "\\uD83D\\uDE00"}\n{"text": "\\uDE00"}\n{"text": "\\uD83Dx"}\n'
    )
    records, report = read(path, ("text",))
    assert [record["text"] for record in records] == ["a", "😀"]
    assert report.places == {"half a surrogate pair in the text": [f"{path}:3", f"{path}:4"]}


def test_rows_end_as_the_header_does(tmp_path):
    """Rows of a Windows program under a header that ends in a line feed: bad where quoted, else kept and spoken of."""
    path = tmp_path / "a.csv"
    path.write_bytes(b'q,a\n1,x\n2,"x"\r\n3,z\r\n"4","z\r"\n5,"two\r\nlines"\n')
    records, report = read(path, ("q", "a"))
    assert records == [
        {"q": "1", "a": "x"}, {"q": "3", "a": "z\r"}, {"q": "4", "a": "z\r"}, {"q": "5", "a": "two\r\nlines"}
    ]  # fmt: skip
    assert report.places == {"the row ends in \\r\\n but the header line in \\n": [f"{path}:3"]}
    assert list(report.notes.values()) == [1] and "keeps the \\r: 1" in report.summary()[-1]
    path.write_bytes(b'q,a\r\n1,x\n2,"x"\r\n')
    assert read(path, ("q", "a"))[0] == [{"q": "1", "a": "x"}, {"q": "2", "a": "x"}]


def test_a_whole_file_with_other_line_ends_than_its_header_is_one_clear_error(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\n" + b'"x"\r\n' * 1500)
    with pytest.raises(UserError, match=r"header line in \\n"):
        read(path, ("text",))


@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd.compress)])
def test_compressed(tmp_path, suffix, compress):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress('{"text": "雪"}\n'.encode()))
    assert read(path, ("text",))[0] == [{"text": "雪"}]


def test_long_field(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["text"], [["长" * 300_000]])
    assert len(read(path, ("text",))[0][0]["text"]) == 300_000


def test_bad_csv_rows_are_counted_where_they_begin(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'q,a\n1,"two\nlines"\n'  # 2-3
        b"\xff,broken byte\n"  # 4
        b"only one\n"  # 5
        b'2,"a"b\n'  # 6: characters behind a closing quote
        b"\n"
        b'3,"three\nphysical\nlines"\n'  # 8-10
        b"1,2,3\n"  # 11
        b'4,"never closed\n'  # 12: must not swallow what follows
        b"5,kept\n6,kept too\n"
    )
    records, report = read(path, ("q", "a"))
    assert [record["q"] for record in records] == list("1356")
    assert report.places == {
        "not UTF-8": [f"{path}:4"],
        "wrong number of fields": [f"{path}:5", f"{path}:11"],
        "broken CSV: ',' expected after '\"'": [f"{path}:6"],
        "broken CSV: unexpected end of data": [f"{path}:12"],
    }
    assert report.rows == 9 and report.kept == 4 and report.dropped.total() == 5
    assert f"{path}:11" in "\n".join(report.summary())


def test_rows_behind_an_unclosed_quote_are_read_as_they_are(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'q,a\n1,"never closed\n2,a\rb\n3,c\n\xff,d\n4,e\rf\n')
    records, report = read(path, ("q", "a"))
    assert [(record["q"], record["a"]) for record in records] == [("2", "a\rb"), ("3", "c"), ("4", "e\rf")]
    assert report.places["not UTF-8"] == [f"{path}:5"]


def test_bad_jsonl_rows_are_counted_where_they_are(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "good"}',
        b"",
        b'{"text": "cut',
        b'{"text": "\xff"}',
        b"[1]",
        b'"text"',
        b'{"text": 3}',
        b'{"no": ""}',
    ]
    lines += [b'{"text": null}', b'{"text": "\\ud83d"}', b'{"text": "\\uD83D\\uDE00"}', b"[" * 100_000]
    path.write_bytes(b"\n".join(lines))
    records, report = read(path, ("text",))
    assert [record["text"] for record in records] == ["good", "😀"]
    places = {reason: [int(place.rsplit(":", 1)[1]) for place in places] for reason, places in report.places.items()}
    assert places == {
        "not JSON": [3, 12],
        "not UTF-8": [4],
        "not a JSON object": [5, 6],
        "text is not a string": [7, 9],
        "no field 'text'": [8],
        "half a surrogate pair in the text": [10],
    }


def test_json_lines_with_their_places_and_problems(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"q": [NaN, 123456789012345678901234567890]}\n \n[1]\n{"q"\n{"a": "\xff"}\n{"a": "\\ud83d"}'
    )
    (first, record, problem), *others = iter_json_lines(path)
    assert (first, problem) == (f"{path}:1", None) and record["q"][0] != record["q"][0]
    assert [(place.rsplit(":", 1)[1], record, problem) for place, record, problem in others] == [
        ("3", None, "not a JSON object"), ("4", None, "not JSON"), ("5", None, "not UTF-8"),
        ("6", None, "half a surrogate pair in the text"),
    ]  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(values=st.lists(texts, max_size=6), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_a_json_list_and_json_lines_hold_the_same_rows(tmp_path_factory, values, indent, ascii_only):
    path, rows = tmp_path_factory.mktemp("rows") / "a.json", [{"text": value} for value in values]
    path.write_text(" \n" + json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8-sig")
    assert list(iter_json_rows(path)) == [(f"{path}: item {place}", row, None) for place, row in enumerate(rows, 1)]
    path.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), encoding="utf-8-sig")
    assert list(iter_json_rows(path)) == [(f"{path}:{place}", row, None) for place, row in enumerate(rows, 1)]


def test_rows_of_a_json_list_with_their_places_and_problems(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b'[{"a": NaN}, [1],\n null, {"a": ["x", {"b": "\\ud83d"}]}, "\\ud83d\\ude00", {}]'))
    (_, record, _), *others = iter_json_rows(path)
    assert record["a"] != record["a"]
    assert [(place.rsplit(" ", 1)[1], record, problem) for place, record, problem in others] == [
        ("2", None, "not a JSON object"), ("3", None, "not a JSON object"),
        ("4", None, "half a surrogate pair in the text"), ("5", None, "not a JSON object"), ("6", {}, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "data, line, reason",
    [
        (b'[\n{"a": 1},\n{"a": }\n]', 3, "Expecting value at column 7"),
        (b'[{"a": 1},\n', 2, "Expecting value at column 1"),
        (b'[{"a": "x', 1, "Unterminated string"),
        (b'[\n{"a": "\xff"}]', 2, "not UTF-8"),
        (b"[" * 100_000, 1, "brackets within brackets"),
        (b"[" + b"9" * 5000 + b"]", 1, "a number of thousands of digits"),
        (b"[] []", 1, "Extra data"),
    ],
)
def test_a_broken_json_list_names_its_line(tmp_path, data, line, reason):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    for read_list in (lambda: list(iter_json_rows(path)), lambda: parse_list(path, data)):
        with pytest.raises(UserError, match="the JSON list cannot be read") as caught:
            read_list()
        message = str(caught.value)
        assert message.startswith(f"{path}:{line}: ") and reason in message and "\n" not in message


def test_json_columns_and_alternative(tmp_path):
    path = write_csv(
        tmp_path / "a.csv", ["history", "q"], [['[["q", "a"]]', "1"], ["", "2"], ["[", "3"], ['["\\ud800"]', "4"]]
    )
    records, report = read(path, ("history", "q"), json_columns=("history",))
    assert records == [{"history": [["q", "a"]], "q": "1"}, {"history": None, "q": "2"}]
    assert report.places["history: not JSON"] == [f"{path}:4"]
    assert "history: half a surrogate pair in the text" in report.dropped
    path = tmp_path / "b.jsonl"
    path.write_text('{"q": "1"}\n{"conversations": [], "q": 2}\n')
    assert read(path, ("q",), json_columns=("conversations",), alternative="conversations")[0] == [
        {"q": "1"},
        {"conversations": []},
    ]


def test_without_a_report_bad_rows_go_to_stderr(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{\n')
    assert len(list(iter_records(path, ("text",)))) == 1
    assert f"{path}:2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", b"", ["empty"]),
        ("a.csv", b"text\n", ["empty"]),
        ("a.jsonl", b"\n\n", ["empty"]),
        ("a.csv", b"title,body\n1,2\n", ["'text'", "title, body"]),
        ("a.csv", b"\xff\xfe\n1\n", [":1", "not UTF-8"]),
        ("a.jsonl", b'{"title": "x"}\n', ["'text'", "title", ":1"]),
        ("a.jsonl", b"no json\n" * 3, ["not JSON", "first 3 rows"]),
        ("a.jsonl", b"no json\n" * 5000, ["not JSON", "first 1,000 rows"]),
        ("a.txt", b"text\n", [".csv or .jsonl"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 10_000, mtime=0)[:-20], ["compressed"]),
        ("a.jsonl.xz", b'{"text": "x"}\n', ["compressed"]),
        ("a.jsonl.zst", b'{"text": "x"}\n', ["compressed"]),
    ],
)
def test_useless_files_end_in_one_line(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(iter_records(path, ("text",)))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("row", [{"instruction": "q", "output": "a"}, {"messages": [{"role": "user", "content": "q"}]}])
def test_raw_rows_in_the_place_of_conversations_are_sent_to_data_process(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    for path in (tmp_path / "a.jsonl", write_csv(tmp_path / "a.csv", list(row), [["x"] * len(row)])):
        with pytest.raises(UserError, match=f"{path}.* found: {list(row)[0]}.*data_process.py sft --data_path"):
            list(iter_records(path, ("history", "q", "a"), alternative="conversations"))
        with pytest.raises(UserError, match="'text'.* found") as caught:
            list(iter_records(path, ("text",)))
        assert "data_process" not in str(caught.value)


def test_a_bad_row_behind_good_ones_never_ends_a_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 999 + "{\n" + '{"text": "b"}\n' * 9)
    records, report = read(path, ("text",))
    assert len(records) == 1008 and report.places == {"not JSON": [f"{path}:1000"]}


def test_a_report_comes_back_from_its_values_and_from_no_others():
    report = RowReport()
    report.rows, report.bytes_read = 9, 99
    report.drop("empty", "a:1")
    report.note("cut")
    values = json.loads(json.dumps(report.to_dict()))
    assert RowReport.from_dict(values).summary() == report.summary() and RowReport.from_dict(values).kept == 8
    for name, wrong in [("rows", "9"), ("bytes_read", None), ("dropped", {"a": 1.5}), ("notes", ["a"]), ("notes", {"a": True}),
                        ("places", []), ("places", {"a": 5}), ("places", {"a": [5]})]:  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            RowReport.from_dict({**values, name: wrong})
    with pytest.raises(KeyError):
        RowReport.from_dict({})


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list(iter_records(tmp_path / "none.csv", ("text",)))
