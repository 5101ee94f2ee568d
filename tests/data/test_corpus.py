"""Text survives the way from raw row to training file byte for byte; rows are filtered and deduplicated as promised."""

import csv
import gzip
import io
import json
import lzma
import random
import signal
import subprocess
import sys

import pytest
from backports import zstd
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.data import corpus
from model.data.conversations import BadRow
from model.data.corpus import Block, convert_block, drop_foreign, process_corpus, read_blocks, rows_of
from model.data.filters import ConversationRules, Dropped, PreferenceRules, PretrainRules, Row, chinese_share
from model.data.rows import iter_records
from model.errors import UserError

some_cases = settings(deadline=None, max_examples=60)
PROSE = st.text(alphabet='天地玄黄宇宙洪荒a1。！？，、；”」 \n"…', max_size=200)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(
    lambda text: not text.isspace()
)
KEEP_ALL = PretrainRules(min_chars=0, max_chars=0, min_chinese=0)
NASTY = [
    '他说："好"。',
    "C:\\新建\\n",
    "一\r二",
    "一\r\n二\n",
    "NA",
    "null",
    "",
    "a,b",
    "👍🏽龙",
    "\x00零",
    '"',
    '""',
    "\ufeff标",
    "一\u2028二",
]


csv.field_size_limit(1 << 28)


def read_csv(data):
    return list(csv.reader(io.StringIO(data.decode("utf-8"), newline="")))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def texts_of(path):
    return [row[0] for row in read_csv(path.read_bytes())[1:]]


# ----------------------------------------------------------------------------------------------- share of Chinese


def share_by_characters(text):
    counted = [char for char in text if not (char.isascii() and not char.isalpha())]
    return sum("\u4000" <= char <= "\u9fff" for char in counted) / max(len(counted), 1)


@some_cases
@given(ANY_TEXT | PROSE)
@example("\u3fff\u4000\u9fff\ua000\U00020000éÀ中")
def test_share_of_chinese_counts_characters(text):
    assert chinese_share(text.encode()) == share_by_characters(text)


@some_cases
@given(
    st.lists(ANY_TEXT | st.text("中a1é。 ", min_size=1, max_size=20), max_size=20),
    st.sampled_from([0.01, 0.3, 0.5, 0.9, 1.0]),
)
def test_the_blockwise_filter_agrees_with_the_share(texts, least):
    dropped = {"min_chinese": 0}
    rows = [Row(0, b"", text.encode()) for text in texts]
    kept = drop_foreign(rows, least, dropped)
    assert kept == [row for row in rows if chinese_share(row.text) >= least]
    assert dropped["min_chinese"] == len(rows) - len(kept)


# ------------------------------------------------------------------------------------------------------ round trip


@some_cases
@given(st.lists(ANY_TEXT, min_size=1, max_size=8))
@example([text for text in NASTY if text])
def test_pretraining_texts_survive_the_csv_file(texts):
    data = b"text\n" + b"".join(KEEP_ALL.convert({"text": text}).payload for text in texts)
    assert read_csv(data) == [["text"]] + [[text] for text in texts]


@some_cases
@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT), max_size=3), ANY_TEXT, ANY_TEXT)
def test_conversations_survive_the_csv_file(history, question, answer):
    rules = ConversationRules(min_chars=0, max_chars=0, min_chinese=0)
    row = rules.convert({"history": [list(pair) for pair in history], "q": question, "a": answer})
    ((history_cell, *texts),) = read_csv(row.payload)
    assert (json.loads(history_cell), texts) == ([list(pair) for pair in history], [question, answer])
    assert row.output == bool(history)


def test_the_projects_reader_gives_the_texts_back(tmp_path):
    texts = [text for text in NASTY if text]
    source = write_jsonl(tmp_path / "raw.jsonl", [{"text": text} for text in texts])
    process_corpus([source], [tmp_path / "out.csv"], KEEP_ALL)
    assert [row["text"] for row in iter_records(tmp_path / "out.csv", ["text"])] == texts


def test_documents_stay_whole_unless_a_limit_drops_them(tmp_path):
    document = '他说："天地玄黄。"宇宙洪荒，日月盈昃。\n' * 9000
    source = write_jsonl(tmp_path / "raw.jsonl", [{"text": document}, {"text": "短文也要留下。"}])
    process_corpus([source], [tmp_path / "out.csv"], PretrainRules())
    assert texts_of(tmp_path / "out.csv") == [document, "短文也要留下。"]
    report = process_corpus([source], [tmp_path / "out.csv"], PretrainRules(max_chars=len(document) - 1))
    assert texts_of(tmp_path / "out.csv") == ["短文也要留下。"] and report.dropped["max_chars"] == 1
    process_corpus([source], [tmp_path / "out.csv"], PretrainRules(max_chars=len(document)))
    assert texts_of(tmp_path / "out.csv") == [document, "短文也要留下。"]


# ---------------------------------------------------------------------------------------------------------- schemas

CONVERSATION = [
    {"from": "human", "value": "你好"},
    {"from": "gpt", "value": "你好！"},
    {"role": "user", "content": "再见"},
]
ANSWERED = [*CONVERSATION, {"role": "assistant", "content": "再见！"}]
HISTORY = [["你好", "你好！"]]


@pytest.mark.parametrize(
    "record, history, question, answer",
    [
        (
            {"instruction": "翻译", "input": "你好", "output": "hello", "history": [], "language": "Chinese"},
            [],
            "翻译\n你好",
            "hello",
        ),
        (
            {"instruction": "", "input": "你是谁", "output": "我是小助手", "history": HISTORY},
            HISTORY,
            "你是谁",
            "我是小助手",
        ),
        ({"instruction": "你是谁", "output": "我", "history": None}, [], "你是谁", "我"),
        ({"q": "你是谁", "a": "我", "history": json.dumps(HISTORY)}, HISTORY, "你是谁", "我"),
        ({"q": "你是谁", "a": "我", "history": ""}, [], "你是谁", "我"),
        ({"question": "你是谁", "answer": "我"}, [], "你是谁", "我"),
        ({"prompt": "你是谁", "response": "我"}, [], "你是谁", "我"),
        ({"conversations": ANSWERED}, HISTORY, "再见", "再见！"),
        (
            {"messages": [{"role": "system", "content": "简短"}, *ANSWERED]},
            [{"role": "system", "content": "简短"}, *HISTORY],
            "再见",
            "再见！",
        ),
    ],
)
def test_conversation_schemas(record, history, question, answer):
    row = ConversationRules(min_chinese=0).convert(record)
    ((cell, *texts),) = read_csv(row.payload)
    assert (json.loads(cell), texts) == (history, [question, answer])


PAIR = {"prompt": "你是谁？", "chosen": "我是小助手。", "rejected": "不知道。"}


@pytest.mark.parametrize(
    "record",
    [
        PAIR,
        {"question": "你是谁？", "chosen": "我是小助手。", "rejected": "不知道。"},
        {"instruction": "你是谁？", "input": "", "output": ["我是小助手。", "不知道。"]},
        {"conversations": [{"from": "human", "value": "你是谁？"}], "chosen": {"from": "gpt", "value": "我是小助手。"},
         "rejected": {"value": "不知道。"}},
        {"chosen": [{"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": "我是小助手。"}],
         "rejected": [{"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": "不知道。"}]},
        {"prompt": [{"role": "user", "content": "你是谁？"}], "chosen": [{"role": "assistant", "content": "我是小助手。"}],
         "rejected": [{"role": "assistant", "content": "不知道。"}]},
    ],
)  # fmt: skip
def test_preference_schemas(record):
    assert json.loads(PreferenceRules().convert(record).payload.removeprefix(b",")) == PAIR


@pytest.mark.parametrize(
    "rules, record, kind",
    [
        (PretrainRules(), {"content": "中文"}, 'no "text" field'),
        (PretrainRules(), {"text": 5}, '"text" is not a text'),
        (ConversationRules(), {"q": "你是谁"}, "no question and answer"),
        (ConversationRules(), {"q": "你", "a": ["我"]}, '"a" is not a text'),
        (ConversationRules(), {"q": "你", "a": "我", "history": "[['甲', '乙']]"}, '"history" is not'),
        (ConversationRules(), {"q": "你", "a": "我", "history": [["甲"]]}, '"history" is not'),
        (ConversationRules(), {"conversations": CONVERSATION}, "does not end with an answer"),
        (ConversationRules(), {"conversations": ANSWERED[1:]}, "does not begin with the user"),
        (ConversationRules(), {"conversations": [{"role": "tool", "content": "x"}]}, "unknown role"),
        (PreferenceRules(), {"prompt": "你", "chosen": "我"}, 'no "rejected" answer'),
        (PreferenceRules(), {"chosen": "我", "rejected": "他"}, 'no "prompt"'),
        (PreferenceRules(), {"chosen": ANSWERED, "rejected": ANSWERED[2:]}, "different prompts"),
    ],
)
def test_unusable_rows_are_bad_with_their_kind(rules, record, kind):
    with pytest.raises(BadRow, match=kind):
        rules.convert(record)


@pytest.mark.parametrize(
    "rules, record, rule",
    [
        (PretrainRules(), {"text": " \n"}, "empty"),
        (PretrainRules(), {"text": "短文"}, "min_chars"),
        (ConversationRules(), {"q": "你是谁", "a": ""}, "empty"),
        (ConversationRules(), {"q": "你是谁", "a": "我", "history": [["", "我"]]}, "empty"),
        (ConversationRules(max_chars=3), {"q": "你是谁啊", "a": "我"}, "max_chars"),
        (ConversationRules(), {"q": "who", "a": "me", "language": "English"}, "language"),
        (PreferenceRules(), {**PAIR, "history": HISTORY}, "history"),
        (PreferenceRules(), {**PAIR, "prompt": CONVERSATION}, "history"),
        (PreferenceRules(), {**PAIR, "rejected": PAIR["chosen"]}, "same_answers"),
    ],
)
def test_filters_name_their_rule(rules, record, rule):
    with pytest.raises(Dropped, match=rule):
        rules.convert(record)


def test_short_questions_and_other_languages_are_kept_when_asked_for():
    assert ConversationRules().convert({"q": "你是谁", "a": "我", "language": "zh"})
    assert ConversationRules(language="any").convert({"q": "who", "a": "me", "language": "English"})


# ---------------------------------------------------------------------------------------------------------- reading


def read_all(path, monkeypatch, block_bytes, block_items=500):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(corpus, "BLOCK_ITEMS", block_items)
    blocks = list(read_blocks(path))
    rows = [(number, json.loads(row)) for block in blocks for number, row in rows_of(block) if row.strip()]
    return rows, [problem for block in blocks for problem in block.problems]


RECORDS = st.lists(
    st.fixed_dictionaries({"text": st.text('[]{}",\\ 中\n', max_size=12), "x": st.lists(st.integers(), max_size=2)})
)


@some_cases
@given(RECORDS, st.sampled_from([None, 2]), st.booleans(), st.integers(1, 9))
def test_json_lists_come_apart_into_numbered_items(tmp_path_factory, records, indent, ascii_only, block_items):
    path = tmp_path_factory.mktemp("list") / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(records, indent=indent, ensure_ascii=ascii_only).encode())
    with pytest.MonkeyPatch.context() as patch:
        rows, problems = read_all(path, patch, 64, block_items)
    assert rows == list(enumerate(records, 1)) and not problems


@some_cases
@given(RECORDS, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.sampled_from([5, 64, 4096]))
def test_lines_come_out_with_their_numbers_at_any_block_size(tmp_path_factory, records, end, last_end, block_bytes):
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    lines = [json.dumps(record) for record in records]
    path.write_bytes(b"\xef\xbb\xbf" + (end + end.join(lines) + end * last_end).encode())
    with pytest.MonkeyPatch.context() as patch:
        rows, problems = read_all(path, patch, block_bytes=max(block_bytes, 8))
    assert rows == list(enumerate(records, 2)) and not problems


def problems_of(path, rules=KEEP_ALL):
    found = []
    for block in read_blocks(path):
        found += [
            (where.removeprefix(f"{path}:"), kind) for where, kind, _ in convert_block(block, rules, False, None).bad
        ]
    return found


def test_bad_lines_are_named_by_line_and_kind_and_stop_nothing(tmp_path):
    rows = [
        b'{"text": "ok"}',
        b'{"text": "\xe4\xb8"}',
        b"",
        b"{text}",
        b"[1]",
        b'"x"',
        b'{"text": "\\ud83d"}',
        b'{"text": "n", "s": NaN}',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(rows) + b"\n")
    assert problems_of(path) == [
        ("2", "not UTF-8"), ("4", "not JSON"), ("5", "not a JSON object"), ("6", "not a JSON object"),
        ("7", "half a surrogate pair in the text"),
    ]  # fmt: skip
    process_corpus([path], [tmp_path / "out.csv"], KEEP_ALL)
    assert texts_of(tmp_path / "out.csv") == ["ok", "n"]
    listed = (tmp_path / "out.bad_lines.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"{path}:{line}" for line in (2, 4, 5, 6, 7)]


def test_bad_items_of_a_list_are_named_and_the_others_kept(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"text": "a"},\n7, "x",\n{"text": "\\ud83d"}, {"no": NaN},\n{"text": "c"}]')
    assert problems_of(path) == [
        (" item 2", "not a JSON object"), (" item 3", "not a JSON object"),
        (" item 4", "half a surrogate pair in the text"), (" item 5", 'no "text" field'),
    ]  # fmt: skip
    report = process_corpus([path], [tmp_path / "out.csv"], KEEP_ALL)
    assert texts_of(tmp_path / "out.csv") == ["a", "c"] and report.rows == 6
    assert (tmp_path / "out.bad_lines.txt").read_text().startswith(f"{path}: item 2: not a JSON object: 7\n")


@pytest.mark.parametrize("end, words", [
    (b'{"text": "br', ":4: .*Unterminated string"), (b'{"text": "b"}', ":4: .*delimiter"), (b'{"text" "b"}]', ":4: .*delimiter"),
    (b'{"text": "\xff"}]', ":4: .*not UTF-8"), (b"1]\n[2]", ":5: .*Extra data"), (b"[" * 100_000, ":1: .*brackets"), (b"1" * 5000 + b"]", ":1: .*digits"),
])  # fmt: skip
def test_a_list_that_is_broken_is_one_error_at_its_line(tmp_path, end, words):
    path = tmp_path / "rows.json"
    path.write_bytes(b'\n[{"text": "a"},\n{"text": "b"},\n' + end)
    with pytest.raises(UserError, match=f"^{path}{words}.*; mend it"):
        process_corpus([path], [tmp_path / "out.csv"], KEEP_ALL)
    assert list(tmp_path.iterdir()) == [path]


def test_an_overlong_line_is_bad_and_the_rest_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST_LINE_BYTES", 1000)
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 64)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b" * 5000}, {"text": "c"}, {"text": "d"}])
    assert problems_of(path) == [("2", "longer than 0 MiB")]
    assert [json.loads(row)["text"] for block in read_blocks(path) for _, row in rows_of(block) if row] == [
        "a",
        "c",
        "d",
    ]
    with open(path, "ab") as handle:
        handle.write(b"e" * 3000)
    assert problems_of(path)[1:] == [("5", "longer than 0 MiB")]


COMPRESSORS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd.compress}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_of_several_members_are_read_and_cut_ones_refused(tmp_path, suffix):
    chance = random.Random(0)
    halves = [
        "".join(json.dumps({"text": f"{part} {chance.random()}"}) + "\n" for _ in range(5000)).encode()
        for part in ("a", "b")
    ]
    data = b"".join(map(COMPRESSORS[suffix], halves))
    path, output = tmp_path / f"rows.jsonl{suffix}", tmp_path / "out.csv"
    path.write_bytes(data)
    seen = []
    assert b"".join(block.data for block in read_blocks(path, seen.append)) == b"".join(halves)
    assert sum(seen) == len(data)
    for length in (len(data) - 9, len(data) // 4):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="damaged or cut"):
            process_corpus([path], [output], KEEP_ALL)
        assert [file.name for file in tmp_path.iterdir()] == [path.name]


# ------------------------------------------------------------------------------------------------------- duplicates


def test_exact_duplicates_go_and_the_first_stays(tmp_path):
    texts = ["天地玄黄宇宙", "日月盈昃辰宿", "天地玄黄宇宙", "寒来暑往秋收", "天地玄黄宇宙。"]
    source = write_jsonl(tmp_path / "raw.jsonl", [{"text": text} for text in texts])
    report = process_corpus([source, source], [tmp_path / "out.csv"], PretrainRules())
    assert texts_of(tmp_path / "out.csv") == [texts[0], texts[1], texts[3], texts[4]]
    assert report.dropped["duplicate"] == 6
    process_corpus([source], [tmp_path / "out.csv"], PretrainRules(), dedup=False)
    assert texts_of(tmp_path / "out.csv") == texts


def test_near_duplicates_go_and_different_texts_stay(tmp_path, monkeypatch):
    chance = random.Random(0)
    originals = ["".join(chance.choices("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏", k=400)) for _ in range(40)]
    changed = [text[:200] + "改" + text[201:] for text in originals]
    halves = [text[:200] + "".join(chance.choices("云腾致雨露结为霜", k=200)) for text in originals]
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 16_000)  # near duplicates in the same and in other blocks
    source = write_jsonl(tmp_path / "raw.jsonl", [{"text": text} for text in originals + changed + halves])
    report = process_corpus([source], [tmp_path / "out.csv"], PretrainRules(), near_threshold=0.8)
    assert texts_of(tmp_path / "out.csv") == originals + halves
    assert report.dropped["near_duplicate"] == 40


# ---------------------------------------------------------------------------------------------------------- the run


def test_the_output_does_not_depend_on_workers_or_blocks(tmp_path, monkeypatch):
    chance = random.Random(0)
    rows = [{"text": "".join(chance.choices('天地玄黄，宇宙。"\nab', k=chance.randint(1, 90)))} for _ in range(3000)]
    source = write_jsonl(tmp_path / "raw.jsonl", rows + rows[::7])
    monkeypatch.setattr(corpus, "PARALLEL_FROM_BYTES", 0)
    results = []
    for workers, block_bytes in ((1, 1 << 20), (3, 9_000), (2, 50_000)):
        monkeypatch.setattr(corpus, "BLOCK_BYTES", block_bytes)
        report = process_corpus(
            [source], [tmp_path / "out.csv"], PretrainRules(max_chars=80), near_threshold=0.8, workers=workers
        )
        results.append((tmp_path / "out.csv").read_bytes())
        assert report.workers == workers
        assert report.rows == report.kept + report.dropped.total() == len(rows) + len(rows[::7])
    assert results[0] == results[1] == results[2]


def test_preferences_become_one_json_list(tmp_path):
    pairs = [{**PAIR, "prompt": f'{number}号，你是谁？\n"\\'} for number in range(5)]
    source = tmp_path / "raw.json"
    source.write_text(json.dumps(pairs, indent=1))
    process_corpus([source], [tmp_path / "out.json"], PreferenceRules())
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == pairs


def test_a_run_without_bad_lines_removes_the_list_of_an_earlier_one(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "天地玄黄宇宙"}])
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    report = process_corpus([good, bad], [tmp_path / "out.csv"], PretrainRules())
    assert report.as_dict()["bad_lines"] == 1 and (tmp_path / "out.bad_lines.txt").exists()
    process_corpus([good], [tmp_path / "out.csv"], PretrainRules())
    assert not (tmp_path / "out.bad_lines.txt").exists()


def test_a_block_without_rows_is_no_trouble():
    result = convert_block(Block("x", "x:", 1, b"\n \n"), PretrainRules(), True, 6)
    assert (result.read, result.blank, len(result.digests), len(result.signatures[0])) == (0, 2, 0, 0)


def test_processes_start_deaf_to_ctrl_c_and_the_parent_does_not_stay_so():
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with corpus.children_without_interrupts():
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stdout == "True\n"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
