"""--engine datatrove keeps the documents that the single process keeps, however it is cut, killed and started again."""

import csv
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import ROOT, assert_one_line_error, good, run_script
from model.data import corpus, deduplication
from model.data.corpus import process_corpus
from model.data.deduplication import are_similar, minhash_signatures, rows_per_band
from model.data.filters import PretrainRules
from model.errors import UserError

datatrove = pytest.importorskip("model.data.datatrove", reason="datatrove is not installed")
COMMON = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法"


def varied(text, changes, chance):
    letters = list(text)
    for _ in range(changes):
        letters[chance.randrange(len(letters))] = chance.choice(COMMON)
    return "".join(letters)


def texts_with_duplicates(count, seed):
    """Texts of which many are copies of earlier ones, or those with up to ten other letters, in chains; and boilerplate."""
    chance, texts = random.Random(seed), []
    frame = "".join(chance.choices(COMMON, k=60))
    for number in range(count):
        kind = chance.random()
        if texts and kind < 0.15:
            texts.append(chance.choice(texts))
        elif texts and kind < 0.6:
            texts.append(varied(chance.choice(texts[-30:]), chance.randint(1, 10), chance))
        elif kind < 0.8:
            texts.append(frame + f"{number}号" + "".join(chance.choices(COMMON, k=chance.randint(5, 30))))
        else:
            texts.append("".join(chance.choices(COMMON, k=chance.randint(3, 200))))
    return texts


def write_inputs(folder, texts, files, seed=0):
    """The texts in order in several files, of which one is empty but for a blank line, with bad lines between them."""
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    edges = sorted(chance.randrange(len(texts) + 1) for _ in range(files - 1))
    paths = [folder / f"{number:02d}.jsonl{'.gz' * (number % 2)}" for number in range(files)]
    for path, begin, end in zip(paths, [0, *edges], [*edges, len(texts)]):
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts[begin:end]]
        rows += ["broken"] * chance.randint(0, 2) + ['{"text": "only English here"}', ""]
        data = "".join(row + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return paths


def engine_words(source, output):
    """The command that processes one file."""
    return ["data_process.py", "pretrain", "--data_path", source, "--output", output, "--engine", "datatrove"]


def documents_of(folder):
    """The texts of all shards, sorted: they are to be equal as a set, and none twice."""
    found = []
    for path in sorted(folder.iterdir()):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found += [json.loads(line)["text"] for line in lines]
    return sorted(found)


def documents_of_csv(path):
    with open(path, newline="", encoding="utf-8") as handle:
        return sorted(row["text"] for row in csv.DictReader(handle))


def expected(texts, dedup, threshold, rules, candidates):
    """What stays, by the rule in words: a text goes if it was there before, or if an earlier one that stayed, among the first
    few with a band of its, is like it."""
    stay, seen, bands_met = [], set(), {}
    for text in texts:
        if len(text) < rules.min_chars or (dedup and text in seen):
            continue
        seen.add(text)
        keep = True
        if threshold:
            payload = f'"{text}"\n'.encode()
            bands, bits = minhash_signatures([payload], rows_per_band(threshold))
            entry = {"bits": bits, "kept": True}
            for band in bands[0].tolist():
                met = bands_met.setdefault(band >> 28, [])
                others = met[:candidates]
                if any(other["kept"] and are_similar(bits, other["bits"], threshold)[0] for other in others):
                    keep = False
            entry["kept"] = keep
            for band in bands[0].tolist():
                bands_met[band >> 28].append(entry)
        if keep:
            stay.append(text)
    return sorted(stay)


@pytest.mark.parametrize("seed, files, tasks, dedup, threshold, candidates", [
    (0, 5, 3, True, 0.8, 32), (1, 4, 1, True, 0.5, 2), (2, 3, 7, True, 0.8, 1), (3, 6, 2, False, 0.7, 2),
    (4, 2, 2, True, None, 32), (5, 3, 2, False, None, 32), (6, 7, 4, True, 0.95, 3), (7, 1, 3, True, 0.6, 3),
])  # fmt: skip
def test_the_same_documents_as_from_one_process(
    tmp_path, monkeypatch, seed, files, tasks, dedup, threshold, candidates
):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 3000)  # many blocks, and several batches in each
    monkeypatch.setattr(deduplication, "DOCUMENTS_AT_ONCE", 7)
    monkeypatch.setattr(deduplication, "CANDIDATES_OF_A_BAND", candidates)
    monkeypatch.setattr(datatrove, "ENTRIES_AT_ONCE", 50)
    texts, rules = texts_with_duplicates(300, seed), PretrainRules()
    inputs = write_inputs(tmp_path / "raw", texts, files, seed)
    single = process_corpus(inputs, [tmp_path / "one.csv"], rules, dedup, threshold)
    job = datatrove.Job(tuple(inputs), tmp_path / "many", rules, tasks, dedup, threshold)
    report = datatrove.run(job, workers=1)
    assert documents_of(tmp_path / "many") == documents_of_csv(tmp_path / "one.csv")
    assert documents_of(tmp_path / "many") == expected(texts, dedup, threshold, rules, candidates)
    same = "rows_read blank_lines dropped documents_kept files_without_rows input_bytes bad_lines".split()
    assert {name: report.as_dict()[name] for name in same} == {name: single.as_dict()[name] for name in same}
    assert {kind: count for kind, (count, _) in report.bad_kinds.items()} == {
        kind: count for kind, (count, _) in single.bad_kinds.items()
    }
    assert report.outputs[str(tmp_path / "many")]["rows"] == single.kept
    bad = [(tmp_path / f"{name}.bad_lines.txt") for name in ("one", "many")]
    assert sorted(bad[0].read_text().splitlines()) == sorted(bad[1].read_text().splitlines()) if bad[0].exists() else 1
    assert {path.name for path in tmp_path.iterdir()} - {path.name for path in bad} == {"raw", "one.csv", "many"}
    assert report.dropped["near_duplicate"] > 9 or threshold in (None, 0.95)


def test_a_chain_keeps_what_is_not_like_the_first(tmp_path):
    """Of A ~ B ~ C, B goes and C, which is like B alone, stays; in whatever tasks they are."""
    chance = random.Random(0)
    first = "".join(chance.choices(COMMON, k=400))
    second = first[:-30] + "".join(chance.choices(COMMON, k=30))
    third = "".join(chance.choices(COMMON, k=60)) + second[60:]
    texts = [first, second, third]
    inputs = []
    for number, text in enumerate(texts):
        inputs += write_inputs(tmp_path / str(number), [text], 1)
    job = datatrove.Job(tuple(inputs), tmp_path / "out", PretrainRules(), 3, near_threshold=0.8)
    datatrove.run(job, workers=1)
    assert documents_of(tmp_path / "out") == sorted([first, third])
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["00000.jsonl.gz", "00002.jsonl.gz"]


def test_hashes_that_differ_in_their_last_bits_are_different():
    hashes = np.array([2**63, 2**63 + 1, 2**63, 5], np.uint64)[:, None]
    arrays = datatrove.by_parts("x", hashes, 1)
    assert arrays["x_rows"].tolist() == [0, 1, 2, 3] and arrays["x_bounds"].tolist() == [0, 4]
    keys = np.array([9, 8, 7, 6], np.uint64)
    assert datatrove.are_first(keys, hashes[:, 0]).tolist() == [False, True, True, True]
    whole = datatrove.by_parts("x", np.random.default_rng(0).integers(0, 2**63, (50, 16), dtype=np.uint64), 7)
    for part in range(7):
        found = whole["x"][whole["x_bounds"][part] : whole["x_bounds"][part + 1]].tolist()
        assert {(number >> 28) % 7 for number in found} == {part}


# Killed and started again


def start_killed(folder, stage, task, flags):
    """data_process.py whose process dies within a task, its work done and the marker not yet there."""
    program = folder / "killed.py"
    program.write_text(
        "import os, runpy, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from model.data import datatrove\n"
        f"real = datatrove.STAGES[{stage!r}]\n"
        "def killed(job, number):\n"
        "    real(job, number)\n"
        f"    if number == {task}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"datatrove.STAGES[{stage!r}] = killed\n"
        f"sys.argv = ['data_process.py', *sys.argv[1:]]\n"
        f"runpy.run_path({str(ROOT / 'data_process.py')!r}, run_name='__main__')\n"
    )
    return subprocess.run([sys.executable, str(program), *map(str, flags)], capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("stage, done", [("convert", {"convert": 2}), ("match", {"convert": 3, "match": 2}),
                                         ("resolve", {"convert": 3, "match": 3}),
                                         ("write", {"convert": 3, "match": 3, "resolve": 1, "write": 2})])  # fmt: skip
def test_a_killed_run_goes_on_with_the_tasks_that_are_missing(tmp_path, stage, done):
    texts = texts_with_duplicates(200, 0)
    inputs = write_inputs(tmp_path / "raw", texts, 3)
    flags = ["pretrain", "--data_path", *inputs, "--near_dedup", "--output", tmp_path / "out", "--engine", "datatrove"]
    flags += ["--tasks", 3]
    process = start_killed(tmp_path, stage, 0 if stage == "resolve" else 2, flags)
    assert process.returncode == -9 and not (tmp_path / "out").exists()
    work = tmp_path / ".out.unfinished"
    markers = {name: len(list((work / f"logs/{name}/completions").glob("*"))) for name in done}
    assert markers == done
    times = {path: path.stat().st_mtime_ns for path in work.glob("logs/*/completions/*")}
    arrays = {path.name: path.stat().st_mtime_ns for path in work.glob("arrays/*-0000[01]-*.npy")}
    other = run_script("data_process.py", *flags[:-1], 2)
    assert_one_line_error(other, work, "unfinished run with other files or flags", "--overwrite")
    assert arrays == {path.name: path.stat().st_mtime_ns for path in work.glob("arrays/*-0000[01]-*.npy")} and times
    (work / "shards").mkdir(exist_ok=True)
    (work / "shards/00002.jsonl.gz.tmp-elsewhere-1-2").touch()
    process = run_script("data_process.py", *flags)
    assert process.returncode == 0, process.stderr
    for name, count in done.items():
        assert f"{name}: {count} of {1 if name == 'resolve' else 3} tasks are done already" in process.stderr
    process_corpus(inputs, [tmp_path / "one.csv"], PretrainRules(), near_threshold=0.8)
    assert documents_of(tmp_path / "out") == documents_of_csv(tmp_path / "one.csv") and not work.exists()


def killed_worker(task):
    if task == 1:
        os.kill(os.getpid(), 9)
    return task


def test_a_worker_that_is_killed_ends_the_run_with_one_line():
    started = time.monotonic()
    with pytest.raises(UserError, match="a worker process was killed"):
        list(corpus.in_processes(killed_worker, range(4), 2))
    assert time.monotonic() - started < 60


def failing_or_slow(task):
    if task == 0:
        raise UserError("as it must be")
    time.sleep(600)


def test_an_error_does_not_wait_for_the_other_tasks():
    with pytest.raises(UserError, match="as it must be"):
        list(corpus.in_processes(failing_or_slow, range(2), 2, wait=False))


def test_several_processes(tmp_path):
    inputs = write_inputs(tmp_path / "raw", texts_with_duplicates(200, 1), 4)
    job = datatrove.Job(tuple(inputs), tmp_path / "out", PretrainRules(), 4, near_threshold=0.8)
    report = datatrove.run(job, workers=2)
    process_corpus(inputs, [tmp_path / "one.csv"], PretrainRules(), near_threshold=0.8)
    assert documents_of(tmp_path / "out") == documents_of_csv(tmp_path / "one.csv") and report.memory.total() > 1e7


# Clusters


def test_two_nodes_of_a_ray_cluster(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    inputs = write_inputs(tmp_path / "raw", texts_with_duplicates(200, 2), 3)
    flags = ["--data_path", *inputs, "--near_dedup", "--output", tmp_path / "out", "--engine", "datatrove"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        environment = {**os.environ, "RAY_ADDRESS": cluster.address}
        ray_flags = ["--executor", "ray", "--tasks", 2, "--task_memory", 1]
        process = run_script("data_process.py", "pretrain", *flags, *ray_flags, env=environment)
        (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
        bad = ["--data_path", tmp_path / "bad.jsonl.gz", "--output", tmp_path / "bad", "--engine", "datatrove"]
        failed = run_script("data_process.py", "pretrain", *bad, *ray_flags, env=environment)
        large = run_script("data_process.py", "pretrain", *bad, *ray_flags, "--task_memory", 9999, env=environment)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, process.stderr
    process_corpus(inputs, [tmp_path / "one.csv"], PretrainRules(), near_threshold=0.8)
    assert documents_of(tmp_path / "out") == documents_of_csv(tmp_path / "one.csv")
    assert_one_line_error(failed, tmp_path / "bad.jsonl.gz", "damaged")
    assert_one_line_error(large, "--task_memory 9999", "no machine")


def test_no_ray_cluster_is_one_line(monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed")

    def init(**options):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError, match="--executor ray: no cluster answers .*nobody there"):
        list(datatrove.on_ray(len, ["a"], 1, None))


SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
folder = os.environ["FAKE_SLURM"]
number = len(os.listdir(folder))
open(os.path.join(folder, f"{{number:02d}}"), "w").write(" ".join(sys.argv[1:-1]) + "\\n" + script)
subprocess.run(["bash", "-n", sys.argv[-1]], check=True)
if "launch_pickled_pipeline" in script:
    for task in range(int(re.search(r"--array=0-(\\d+)", script)[1]) + 1):
        environment = {{**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "here", "SLURM_JOB_ID": "1"}}
        done = subprocess.run(["bash", sys.argv[-1]], env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
print("Submitted batch job", 100 + number)
"""


@pytest.fixture
def slurm(tmp_path):
    """Environment in which sbatch takes scripts that bash can read, runs the tasks at once and leaves a copy of each."""
    programs, scripts = tmp_path / "bin", tmp_path / "scripts"
    scripts.mkdir()
    programs.mkdir()
    (programs / "sbatch").write_text(SBATCH.format(python=sys.executable))
    (programs / "srun").write_text('#!/bin/bash\n[ "$1 $2 $3" = "-l -n 1" ] && shift 3 && exec "$@"\n')
    (programs / "scontrol").write_text("#!/bin/bash\necho here\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "FAKE_SLURM": str(scripts)}


def test_a_chain_of_slurm_jobs(tmp_path, slurm):
    inputs = write_inputs(tmp_path / "raw", texts_with_duplicates(100, 3), 2)
    flags = ["--data_path", *inputs, "--near_dedup", "--output", tmp_path / "out", "--engine", "datatrove"]
    flags += [
        "--executor",
        "slurm",
        "--tasks",
        2,
        "--partition",
        "cpu",
        "--time",
        "1:00:00",
        "--report",
        tmp_path / "r",
    ]
    process = run_script("data_process.py", "pretrain", *flags, env=slurm)
    assert process.returncode == 0 and "submitted" in process.stderr, process.stderr
    process_corpus(inputs, [tmp_path / "one.csv"], PretrainRules(), near_threshold=0.8)
    assert documents_of(tmp_path / "out") == documents_of_csv(tmp_path / "one.csv")
    assert json.loads((tmp_path / "r").read_text())["pretrain"]["documents_kept"] == len(documents_of(tmp_path / "out"))
    jobs = [path.read_text() for path in sorted((tmp_path / "scripts").iterdir())]
    stages = [job for job in jobs if "launch_pickled_pipeline" in job]
    assert [job.split("--job-name=")[1].split()[0] for job in stages] == [
        f"minimind-{stage}" for stage in ("convert", "match", "resolve", "write", "finish")
    ]
    for job in stages:
        assert "--partition=cpu" in job and "--time=1:00:00" in job and "--mem-per-cpu=4G" in job
    assert all("afterok:1" in job.splitlines()[0] for job in stages[1:])
    assert "--array=0-1\n" in stages[0] and "--array=0-0\n" in stages[2]
    before = documents_of(tmp_path / "out")
    local = [*flags[: flags.index("--executor")], "--tasks", 2, "--overwrite"]  # its logs are still there, and no more
    assert run_script("data_process.py", "pretrain", *local, env=slurm).returncode == 0
    assert documents_of(tmp_path / "out") == before


# Bad input


def test_bad_flags(tmp_path, run):
    (source,) = write_inputs(tmp_path / "raw", ["天地玄黄，宇宙洪荒。"], 1)
    words = ["data_process.py", "pretrain", "--data_path", source, "--output", tmp_path / "out"]
    for flags, part in (
        (["--engine", "datatrove", "--tasks", "0"], "--tasks"),
        (["--engine", "datatrove", "--executor", "kubernetes"], "choose from"),
        (["--executor", "ray"], "--executor is for --engine datatrove"),
        (["--tasks", "2"], "--tasks is for --engine datatrove"),
        (["--engine", "datatrove", "--executor", "slurm"], "--partition"),
        (["--engine", "datatrove", "--partition", "cpu"], "--partition is for --executor slurm"),
        (["--engine", "datatrove", "--executor", "ray", "--time", "1:0:0"], "--time is for --executor slurm"),
        (["--engine", "datatrove", "--task_memory", 2], "--task_memory is for --executor slurm or ray"),
    ):
        process = run(*words, *flags)
        assert process.returncode == 2 and part in process.stderr and "Traceback" not in process.stderr
    process = run(*words, "--engine", "datatrove", "--executor", "slurm", "--partition", "cpu")
    assert_one_line_error(process, "no sbatch here")
    assert not (tmp_path / "out").exists()


def test_without_datatrove_the_line_says_what_to_install(tmp_path, run, monkeypatch):
    (source,) = write_inputs(tmp_path / "raw", ["天地玄黄，宇宙洪荒。"], 1)
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    monkeypatch.delitem(sys.modules, "model.data.datatrove")
    words = ["data_process.py", "pretrain", "--data_path", source, "--output_dir", tmp_path]
    assert_one_line_error(run(*words, "--engine", "datatrove"), "datatrove", "is not installed: pip install -r")
    assert "documents kept" in good(run(*words))  # the other road needs none of it


def test_what_is_in_the_output_folder(tmp_path, run):
    (source,) = write_inputs(tmp_path / "raw", ["天地玄黄，宇宙洪荒。"], 1)
    words = engine_words(source, tmp_path / "out")
    good(run(*words))
    before = documents_of(tmp_path / "out")
    assert_one_line_error(run(*words), tmp_path / "out", "is there already", "--overwrite")
    (tmp_path / "out/00009.jsonl.gz").write_bytes(b"of an earlier run with more tasks")
    (tmp_path / "out/.cache").mkdir()
    good(run(*words, "--overwrite"))
    assert documents_of(tmp_path / "out") == before
    again = [*words[:3], tmp_path / "out/00000.jsonl.gz", *words[4:], "--overwrite"]
    assert_one_line_error(run(*again), tmp_path / "out", "where the input lies")
    (tmp_path / "out/my notes.txt").write_text("mine")
    assert_one_line_error(run(*words, "--overwrite"), "holds my notes.txt", "no shard of a corpus")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("a file")
    assert_one_line_error(run(*words, "--overwrite"), "is a file, not a folder")


def test_nothing_kept_and_a_changed_file(tmp_path, run, monkeypatch):
    (source,) = write_inputs(tmp_path / "raw", ["English", "words"], 1)
    words = engine_words(source, tmp_path / "out")
    assert_one_line_error(run(*words), "none of the", "rows read was kept", "--min_chinese")
    assert not (tmp_path / "out").exists()
    inputs = write_inputs(tmp_path / "raw", ["天地玄黄，宇宙洪荒。", "日月盈昃，辰宿列张。"], 1)
    assert_one_line_error(run(*words), "unfinished run with other files or flags")
    resolve = datatrove.STAGES["resolve"]

    def change(job, task):
        resolve(job, task)
        write_inputs(tmp_path / "raw", ["寒来暑往，秋收冬藏。"], 1)

    monkeypatch.setitem(datatrove.STAGES, "resolve", change)
    assert_one_line_error(run(*words, "--overwrite"), inputs[0], "changed during the run", "--overwrite")
    monkeypatch.setitem(datatrove.STAGES, "resolve", resolve)
    good(run(*words, "--overwrite"))
    assert documents_of(tmp_path / "out") == ["寒来暑往，秋收冬藏。"]


def test_a_second_run_on_the_same_output_is_refused(tmp_path, run):
    (source,) = write_inputs(tmp_path / "raw", ["天地玄黄，宇宙洪荒。"], 1)
    words = engine_words(source, tmp_path / "out")
    job = datatrove.Job((source,), tmp_path / "out", PretrainRules(), 1)
    with datatrove.unfinished_run(job, overwrite=False):
        assert_one_line_error(run(*words), tmp_path / "out", "another run is writing it")


def test_training_reads_the_shards(tmp_path, run, tokenizer):
    from model.data.dataset import open_pretrain_data

    texts = sorted(set(texts_with_duplicates(60, 5)))
    inputs = write_inputs(tmp_path / "raw", texts, 3)
    words = ["data_process.py", "pretrain", "--data_path", *inputs, "--output_dir", tmp_path, "--min_chars", 1]
    good(run(*words, "--engine", "datatrove", "--tasks", 3))
    for path in (tmp_path / "pretrain", tmp_path / "pretrain/*.jsonl.gz"):
        train = open_pretrain_data(path, tokenizer, 32, validation_share=0)[0]
        assert train.num_documents == len(texts) and train.report.kept == len(texts)
