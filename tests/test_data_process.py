"""data_process.py as its user meets it: the files it leaves, the table, the one line it says when something is wrong."""

import csv
import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, assert_one_line_error, run_script

TEXTS = [f"第{number}篇：天地玄黄，宇宙洪荒。" for number in range(200)]
CONVERSATIONS = [
    {"id": 1, "instruction": "", "input": "你是谁", "output": "我是小助手。", "history": [], "language": "Chinese"},
    {
        "id": 2,
        "instruction": "翻译成白话",
        "input": "天地玄黄",
        "output": "天是黑的，地是黄的。",
        "history": [["你好", "你好！"]],
    },
    {"id": 3, "instruction": "Hello", "input": "", "output": "Hi", "history": [], "language": "English"},
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    """60 MB: long enough to be interrupted."""
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    line = json.dumps({"text": "天地玄黄，宇宙洪荒。" * 100}, ensure_ascii=False) + "\n"
    path.write_text(line * 20_000, encoding="utf-8")
    return path


def test_pretrain_reads_globs_and_compressed_files_and_reports(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS[:100]])
    half = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[100:])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((half + "broken\n" + '{"text": "short"}\n').encode()))
    process = run_script("data_process.py", "pretrain", "--data_path", tmp_path / "*.jsonl*", "--output_dir", tmp_path / "out",
                         "--report", tmp_path / "report.json")  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert [row["text"] for row in rows_of(tmp_path / "out/pretrain_data.csv")] == TEXTS
    for part in (
        "rows read",
        "202",
        "bad lines",
        f"not JSON, first at {tmp_path}/b.jsonl.gz:101",
        "min_chinese",
        "MB/s",
        "peak memory",
    ):
        assert part in process.stdout
    report = json.loads((tmp_path / "report.json").read_text())["pretrain"]
    assert (report["rows_read"], report["documents_kept"], report["bad_lines"], report["dropped"]) == (
        202,
        200,
        1,
        {"min_chinese": 1},
    )
    assert report["bad_lines_file"] == str(tmp_path / "out/pretrain_data.bad_lines.txt")


def test_sft_goes_to_two_files_and_language_is_a_flag(tmp_path):
    source = write_jsonl(tmp_path / "raw.jsonl", CONVERSATIONS)
    process = run_script("data_process.py", "sft", "--data_path", source, "--output_dir", tmp_path)
    assert process.returncode == 0, process.stderr
    assert rows_of(tmp_path / "sft_data_single.csv") == [{"history": "[]", "q": "你是谁", "a": "我是小助手。"}]
    (multi,) = rows_of(tmp_path / "sft_data.csv")
    assert (json.loads(multi["history"]), multi["q"]) == ([["你好", "你好！"]], "翻译成白话\n天地玄黄")
    process = run_script("data_process.py", "sft", "--data_path", source, "--output_single", tmp_path / "single.csv", "--output_multi",
                         tmp_path / "multi.csv", "--language", "any", "--min_chinese", "0")  # fmt: skip
    assert [row["q"] for row in rows_of(tmp_path / "single.csv")] == ["你是谁", "Hello"], process.stderr


def test_sft_without_conversations_says_that_the_second_file_has_no_rows(tmp_path):
    source = write_jsonl(tmp_path / "raw.jsonl", CONVERSATIONS[:1])
    process = run_script("data_process.py", "sft", "--data_path", source, "--output_dir", tmp_path)
    assert process.returncode == 0 and f"warning: no row is for {tmp_path}/sft_data.csv" in process.stdout
    assert (tmp_path / "sft_data.csv").read_text() == "history,q,a\n"


def test_sft_corpora_of_one_kind_each_are_processed_one_after_the_other(tmp_path):
    for name, rows in (("multi", CONVERSATIONS[1:2]), ("single", CONVERSATIONS[:1])):
        source = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        process = run_script(
            "data_process.py", "sft", "--data_path", source, "--output_dir", tmp_path / "out", "--overwrite"
        )
        assert process.returncode == 0, process.stderr
    assert (
        f"{tmp_path}/out/sft_data.csv: left as it was: no row is for it" in process.stdout
        and "warning" not in process.stdout
    )
    assert [row["q"] for row in rows_of(tmp_path / "out/sft_data.csv")] == ["翻译成白话\n天地玄黄"]
    assert [row["q"] for row in rows_of(tmp_path / "out/sft_data_single.csv")] == ["你是谁"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sft_data.csv", "sft_data_single.csv"]


def test_dpo(tmp_path):
    pairs = [
        {"prompt": "你是谁？", "chosen": "我是小助手。", "rejected": "不知道。"},
        {"prompt": "你好", "chosen": "好", "rejected": "好"},
    ]
    (tmp_path / "raw.json").write_text(json.dumps(pairs))
    process = run_script("data_process.py", "dpo", "--data_path", tmp_path / "raw.json", "--output_dir", tmp_path)
    assert process.returncode == 0 and "same_answers" in process.stdout, process.stderr
    assert json.loads((tmp_path / "dpo/train_data.json").read_text()) == pairs[:1]


def test_flags_decide_what_is_kept(tmp_path):
    source = write_jsonl(
        tmp_path / "raw.jsonl", [{"text": text} for text in ("天地玄黄，宇宙洪荒。" * 3, "天地", "天地", "heaven")]
    )
    process = run_script("data_process.py", "pretrain", "--data_path", source, "--output", tmp_path / "out.csv", "--min_chars", 2,
                         "--max_chars", 10, "--min_chinese", 0, "--no_dedup")  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert [row["text"] for row in rows_of(tmp_path / "out.csv")] == [
        "天地",
        "天地",
        "heaven",
    ] and "longer than --max_chars" in process.stdout
    process = run_script(
        "data_process.py",
        "pretrain",
        "--data_path",
        source,
        "--output",
        tmp_path / "out.csv",
        "--near_dedup",
        "--min_chars",
        2,
        "--overwrite",
    )
    assert [row["text"] for row in rows_of(tmp_path / "out.csv")] == ["天地玄黄，宇宙洪荒。" * 3, "天地"], (
        process.stderr
    )


def test_the_threshold_of_near_duplicates_is_a_flag(tmp_path):
    """Two texts of 596 runs of five characters, of which 491 are common: a Jaccard similarity of 491 / 701 = 0.70."""
    chance = random.Random(0)
    text = "".join(chr(chance.randint(0x4E00, 0x9FA0)) for _ in range(705))
    source = write_jsonl(tmp_path / "raw.jsonl", [{"text": text[:600]}, {"text": text[105:]}, {"text": text[:600]}])
    for flags, kept in (([], 2), (["0.6"], 1), (["0.8"], 2)):
        near = ["--near_dedup", "--near_dedup_threshold", *flags] if flags else []
        process = pretrain(tmp_path, "--data_path", source, "--overwrite", *near)
        assert process.returncode == 0 and len(rows_of(tmp_path / "out.csv")) == kept, process.stderr


def test_demo_builds_the_files_of_every_stage(tmp_path):
    process = run_script("data_process.py", "demo", "--output_dir", tmp_path)
    assert process.returncode == 0, process.stderr
    names = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*")}
    assert {
        "pretrain_data.csv",
        "sft_data_single.csv",
        "sft_data.csv",
        "lora_identity.csv",
        "dpo/train_data.json",
        "heldout/facts.jsonl",
    } <= names
    assert any(name.startswith("ceval-exam/val/") for name in names) and any(
        name.startswith("ceval-exam/dev/") for name in names
    )
    assert "bad lines" not in process.stdout and "dropped: min" not in process.stdout
    assert (tmp_path / "pretrain_data.csv").stat().st_size > 1_500_000


def test_demo_replaces_its_own_files_and_no_others(tmp_path):
    def demo(*flags):
        return run_script("data_process.py", "demo", "--output_dir", tmp_path, *flags)

    own = tmp_path / "sft_data.csv"
    own.write_text("history,q,a\n[],my,own\n")
    assert_one_line_error(demo(), own, "not made by the demo", "--output_dir", "--overwrite")
    assert own.read_text() == "history,q,a\n[],my,own\n" and list(tmp_path.iterdir()) == [own]
    assert demo("--overwrite").returncode == 0 and "my,own" not in own.read_text()
    before = own.read_bytes()
    again = demo("--seed", "1")
    assert again.returncode == 0 and own.read_bytes() != before, again.stderr
    shutil.rmtree(tmp_path / "raw/demo_copies")
    assert_one_line_error(demo(), tmp_path / "pretrain_data.csv", "--overwrite")
    assert demo("--overwrite").returncode == 0
    with open(tmp_path / "heldout/facts.jsonl", "a") as handle:
        handle.write("{}\n")
    assert_one_line_error(demo(), tmp_path / "heldout/facts.jsonl", "changed since")


def test_demo_in_its_usual_place_fills_the_exams_usual_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = subprocess.run([sys.executable, ROOT / "data_process.py", "demo", "--output_dir", "./dataset/"])
    assert (
        process.returncode == 0
        and list(tmp_path.glob("ceval/ceval-exam/val/*.csv"))
        and not (tmp_path / "dataset/ceval-exam").exists()
    )


# -------------------------------------------------------------------------------------------------------- bad input


def pretrain(tmp_path, *flags, **options):
    return run_script("data_process.py", "pretrain", "--output", tmp_path / "out.csv", *flags, **options)


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_what_is_there_is_replaced_only_when_asked_for(tmp_path):
    source, out = write_jsonl(tmp_path / "raw.jsonl", CONVERSATIONS), tmp_path / "out"
    (tmp_path / "raw.json").write_text(
        json.dumps([{"prompt": "你是谁？", "chosen": "我是小助手。", "rejected": "不知道。"}])
    )
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS[:9]])
    for kind, data_path, name in (
        ("pretrain", texts, "pretrain_data.csv"),
        ("sft", source, "sft_data.csv"),
        ("dpo", tmp_path / "raw.json", "dpo/train_data.json"),
    ):
        for report in ([], ["--report", out / "my report"]):
            own = Path(report[1]) if report else out / name
            own.parent.mkdir(parents=True, exist_ok=True)
            own.write_text("my own")
            before = contents(tmp_path)
            command = "data_process.py", kind, "--data_path", data_path, "--output_dir", out, *report
            assert_one_line_error(run_script(*command), own, "is there already", "--overwrite")
            assert contents(tmp_path) == before
            process = run_script(*command, "--overwrite")
            assert process.returncode == 0 and "my own" not in own.read_text(), process.stderr
            shutil.rmtree(out)


@pytest.mark.parametrize("name", ["x.csv.gz", "x.jsonl", "x", "x.bad_lines.txt", "x.csv/"])
def test_an_output_is_called_what_it_is(tmp_path, name):
    source = write_jsonl(tmp_path / "raw.jsonl", [{"text": text} for text in TEXTS])
    output = f"{tmp_path}/out/{name}"
    process = run_script("data_process.py", "pretrain", "--data_path", source, "--output", output)
    if name == "x.csv/":  # as good as without the slash
        assert process.returncode == 0 and len(rows_of(tmp_path / "out/x.csv")) == 200
        return
    assert_one_line_error(process, output, "must end in .csv")
    assert [file.name for file in tmp_path.iterdir()] == ["raw.jsonl"]
    process = run_script("data_process.py", "dpo", "--data_path", source, "--output", tmp_path / "x.csv")
    assert_one_line_error(process, tmp_path / "x.csv", "must end in .json")


def test_links_lead_to_what_is_written_and_never_to_an_input(tmp_path):
    source = write_jsonl(tmp_path / "raw.csv", [{"text": text} for text in TEXTS])
    (tmp_path / "out.csv").symlink_to(source)
    (tmp_path / "same.csv").symlink_to(tmp_path / "out.csv")
    before = contents(tmp_path)
    for flags in (["--overwrite"], ["--report", source, "--overwrite", "--output", tmp_path / "new.csv"]):
        process = run_script(
            "data_process.py", "pretrain", "--data_path", source, "--output", tmp_path / "out.csv", *flags
        )
        assert_one_line_error(process, "both input and output")
    outputs = "--output_single", tmp_path / "out.csv", "--output_multi", tmp_path / "same.csv", "--overwrite"
    other = write_jsonl(tmp_path / "sft.jsonl", CONVERSATIONS)
    process = run_script("data_process.py", "sft", "--data_path", other, *outputs)
    assert_one_line_error(process, "two different outputs")
    other.unlink()
    assert contents(tmp_path) == before


def test_half_a_surrogate_pair_anywhere_is_a_bad_row(tmp_path):
    """In every field of every kind of row, as a line or in a list; also within a history that is JSON in JSON."""
    half = "天\ud83d"
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    good = {"q": "你是谁", "a": "我是小助手。"}
    sft = [
        {**good, "q": half},
        {**good, "a": half},
        {**good, "history": [[half, "好"]]},
        {**good, "history": [["好", half]]},
        {**good, "history": json.dumps([[half, "好"]])},
        {**good, "history": json.dumps([[half, "好"]], ensure_ascii=False)},
        {**good, "history": [{"role": "system", "content": half}]},
        {**good, "system": half},
        {"instruction": half, "input": "好", "output": "好"},
        {"instruction": "好", "input": half, "output": "好"},
        {"instruction": "好", "output": half},
        {"conversations": [*turns, {"role": half, "content": "好"}]},
        {"conversations": [{"role": "user", "content": half}, turns[1]]},
        {"messages": [turns[0], {"from": "gpt", "value": half}]},
        {**good, half: "好"},
        {**good, "language": half},
    ]
    pair = {"prompt": "你是谁？", "chosen": "我是小助手。", "rejected": "不知道。"}
    dpo = [{**pair, field: half} for field in (*pair, "system", "history", "other", half)]
    dpo += [
        {**pair, "prompt": [{"role": "user", "content": half}]},
        {**pair, "chosen": [turns[0], {"role": "assistant", "content": half}]},
        {**pair, "rejected": {"value": half}},
        {**pair, "history": [[half, "好"]]},
        {"instruction": "好", "output": ["好", half]},
    ]
    for kind, rows, fine in (
        ("sft", sft, good),
        ("dpo", dpo, pair),
        ("pretrain", [{"text": half * 9}], {"text": TEXTS[0]}),
    ):
        lines, items = write_lines(tmp_path / f"{kind}.jsonl", [*rows, fine]), tmp_path / f"{kind}.json"
        items.write_text(json.dumps([*rows, fine]))
        for path, place in ((lines, ":"), (items, ": item ")):
            out = tmp_path / f"{kind} of {path.suffix}"
            process = run_script(
                "data_process.py", kind, "--data_path", path, "--output_dir", out, "--report", out / "report"
            )
            assert process.returncode == 0, process.stderr
            report = json.loads((out / "report").read_text())[kind]
            assert (report["bad_lines"], report["documents_kept"]) == (len(rows), 1)
            (listed,) = out.rglob("*.bad_lines.txt")
            assert [line.split(f"{place}")[1].split(":")[0] for line in listed.read_text().splitlines()] == [
                str(number) for number in range(1, len(rows) + 1)
            ]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_wrong_input_gets_one_line_and_leaves_nothing(tmp_path):
    empty, english = (
        tmp_path / "empty.jsonl",
        write_jsonl(tmp_path / "english.jsonl", [{"text": "heaven and earth"}] * 3),
    )
    empty.touch()
    not_text = tmp_path / "binary.jsonl"
    not_text.write_bytes("中文\n".encode("gbk") * 3)
    assert_one_line_error(
        pretrain(tmp_path, "--data_path", tmp_path / "none.jsonl"), tmp_path / "none.jsonl", "no such file"
    )
    assert_one_line_error(pretrain(tmp_path, "--data_path", tmp_path), "is a directory")
    assert_one_line_error(pretrain(tmp_path, "--data_path", empty), empty, "empty")
    assert_one_line_error(pretrain(tmp_path, "--data_path", english), "none of the 3 rows", "--min_chinese")
    assert_one_line_error(pretrain(tmp_path, "--data_path", not_text), "not UTF-8", f"{not_text}:1")
    assert_one_line_error(
        run_script("data_process.py", "pretrain", "--data_path", english, "--output", english), "both input and output"
    )
    both = "--output_single", tmp_path / "a.csv", "--output_multi", tmp_path / "a.csv"
    assert_one_line_error(
        run_script("data_process.py", "sft", "--data_path", english, *both), tmp_path / "a.csv", "two different outputs"
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["binary.jsonl", "empty.jsonl", "english.jsonl"]


@pytest.mark.parametrize("flags", [[], ["pretrain"], ["other"], ["pretrain", "--data_path", "x", "--workers", "0"],
                                   ["sft", "--data_path", "x", "--min_chinese", "2"],
                                   ["dpo", "--data_path", "x", "--min_chars", "9", "--max_chars", "3"],
                                   ["pretrain", "--data_path", "x", "--min_chars", "9", "--max_chars", "3"]])  # fmt: skip
def test_wrong_usage_is_code_2(flags):
    assert_one_line_error(run_script("data_process.py", *flags), code=2)


def test_an_empty_file_among_others_is_named(tmp_path):
    full = write_jsonl(tmp_path / "full[1].jsonl", [{"text": TEXTS[0]}])  # no glob, though it looks like one
    (tmp_path / "empty.jsonl").touch()
    process = pretrain(tmp_path, "--data_path", full, tmp_path / "empty.jsonl")
    assert process.returncode == 0 and f"note: {tmp_path}/empty.jsonl has no rows" in process.stdout
    assert process.stdout.count("has no rows") == 1


def test_a_full_disk_leaves_the_earlier_file(tmp_path, large_file):
    (tmp_path / "out.csv").write_text("text\nearlier\n")
    process = pretrain(tmp_path, "--data_path", large_file, "--no_dedup", "--overwrite",
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 22, 1 << 22)))  # fmt: skip
    assert_one_line_error(process, tmp_path / "out.csv", "nothing was written")
    assert [file.name for file in tmp_path.iterdir()] == ["out.csv"]
    assert (tmp_path / "out.csv").read_text() == "text\nearlier\n"


def start(tmp_path, large_file):
    """A run with workers that has written part of its result."""
    command = [sys.executable, ROOT / "data_process.py", "pretrain", "--no_dedup", "--workers", "2", "--output", tmp_path / "out.csv",
               "--data_path", large_file]  # fmt: skip
    # A suite started in the background inherits "ignore Ctrl-C"; a terminal's children do not.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed
    )
    for _ in range(2000):
        if any(file.stat().st_size > 1 << 20 for file in tmp_path.glob("out.csv.tmp-*")):
            return process
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    raise AssertionError("nothing was written in time")


def members(group):
    """Ids of the living processes of a process group."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            if (
                entry.isdigit()
                and os.getpgid(int(entry)) == group
                and open(f"/proc/{entry}/stat").read().split()[2] != "Z"
            ):
                found.append(int(entry))
        except OSError:
            continue
    return found


def test_kill_leaves_no_result_and_no_process(tmp_path, large_file):
    process = start(tmp_path, large_file)
    assert len(members(process.pid)) >= 3  # itself and two workers
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not (tmp_path / "out.csv").exists()
    deadline = time.time() + 10
    while members(process.pid) and time.time() < deadline:
        time.sleep(0.1)
    assert not members(process.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing_and_says_so_in_one_line(tmp_path, large_file, number):
    process = start(tmp_path, large_file)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C reaches the workers too
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.strip().splitlines() == ["error: interrupted"]
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_defaults_and_needs_no_torch():
    process = run_script("data_process.py", "pretrain", "--help")
    assert process.returncode == 0 and "0: no limit (default: 0)" in process.stdout
    code = "import sys; import data_process; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
