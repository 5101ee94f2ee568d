"""Stages under torchrun: what one process computes, every row once, one writer, clean ends, death and going on."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from conftest import CPU_FLAGS, ROOT, TINY_FLAGS, good, run_two_ranks

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Runs a script of the repository and writes down what this rank did: rows it drew, gradient reductions, files it wrote.
RECORDER = """
import json, os, runpy, sys
sys.path.insert(0, ".")
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from model.data.loader import ResumableSampler

folder, sys.argv[:] = sys.argv[1], sys.argv[2:]
seen = dict(rows=[], reductions=0, written=[])
batches, parallel = ResumableSampler.batches, torch.nn.parallel.DistributedDataParallel

def recorded(sampler):
    for rows in batches(sampler):
        seen["rows"].append((sampler.num_rows, sampler.epoch, rows.tolist()))
        yield rows

def counted(state, bucket):
    seen["reductions"] += 1
    return allreduce_hook(None, bucket)

def watched(model, device_ids, **options):
    wrapped = parallel(model, device_ids, **options)
    wrapped.register_comm_hook(None, counted)
    return wrapped

def written(event, arguments):
    changes = event in ("os.rename", "os.mkdir", "os.remove", "os.truncate")
    if changes or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        seen["written"].append(str(arguments[0]))

ResumableSampler.batches, torch.nn.parallel.DistributedDataParallel = recorded, watched
sys.addaudithook(written)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    text = json.dumps(seen)
    open(f"{folder}/{os.environ['RANK']}.json", "w").write(text)
"""
# Runs a script of which rank 1 fails in its third step.
FAILING = """
import os, runpy, sys
sys.path.insert(0, ".")
from model.errors import UserError
from model.training.loop import Trainer

kind, sys.argv[:] = sys.argv[1], sys.argv[2:]
update = Trainer.update

def fails(trainer, *arguments):
    if trainer.state.step == 2 and os.environ["RANK"] == "1":
        raise UserError("no luck") if kind == "user" else AssertionError("a bug")
    return update(trainer, *arguments)

Trainer.update = fails
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Runs a script again and again, each time in two processes that leave Python as any others do, and prints their exit codes.
TWENTY_RUNS = """
import os, runpy, socket, sys
sys.path.insert(0, ".")
import model.training.loop, model.data.token_cache  # once for all
import torch._dynamo

sys.argv[:] = sys.argv[1:]
codes = []
for number in range(20):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    children = []
    for rank in "01":
        children.append(os.fork())
        if not children[-1]:
            os.environ.update(RANK=rank, LOCAL_RANK=rank)
            os.dup2(2, 1)
            runpy.run_path(sys.argv[0], run_name="__main__")
    codes += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(codes)
"""


@pytest.fixture
def flags(tmp_path, small_tokenizer_path):
    # AdamW: Muon multiplies in bfloat16, which turns another order of additions into another weight.
    common = [*TINY_FLAGS, *CPU_FLAGS, "--learning_rate", "1e-3", "--log_interval", "1", "--optimizer", "adamw"]
    common += ["--embedding_rate_factor", "1"]  # ten times the rate is ten times the rounding
    return [*common, "--tokenizer_path", str(small_tokenizer_path), "--out_dir", str(tmp_path / "out")]


@pytest.fixture
def program(tmp_path):
    """A function that writes a program to a file and returns its path."""

    def write(text):
        (tmp_path / "program.py").write_text(text)
        return tmp_path / "program.py"

    return write


def replaced(words, flag, value):
    """The words of a command with another value of a flag."""
    index = words.index(flag) + 1
    return [*words[:index], str(value), *words[index + 1 :]]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def assert_same_run(out, other, name="pretrain_32", tolerance=1e-5):
    """Two folders hold the same checkpoint and log: losses to 5 digits, weights to 1e-5."""
    logs = []
    for folder in (out, other):
        lines = (folder / "logs" / f"{name.replace('/', '_')}.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    assert len(logs[0]) == len(logs[1]) > 0
    for ours, theirs in zip(*logs):
        for number in {"loss", "validation_loss"} & theirs.keys():
            assert ours[number] == pytest.approx(theirs[number], rel=1e-5), ours["step"]
        for number in {"step", "epoch", "tokens_seen", "learning_rate"} & theirs.keys():
            assert ours[number] == theirs[number]
    ours, theirs = (torch.load(folder / f"{name}.pth", weights_only=True) for folder in (out, other))
    for tensor in theirs:
        torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=0, atol=tolerance, msg=tensor)


# ---- the same run


@pytest.mark.parametrize(
    "script, more", [("1-pretrain.py", []), ("3-full_sft.py", []), ("1-pretrain.py", ["--use_moe"])]
)
def test_two_ranks_are_one_process_and_each_does_its_part_alone(
    run, flags, program, tmp_path, pretrain_csv, sft_csv, script, more
):
    """Accumulation of 3, and 39 or 37 rows: the last micro-batch of four is a small one, and so is the last step."""
    out, alone, name = tmp_path / "out", tmp_path / "alone", "pretrain_32" + "_moe" * len(more)
    words = [script, *flags, *more, "--epochs", 2, "--accumulation_steps", 3, "--data_path", pretrain_csv]
    if script != "1-pretrain.py":
        good(run("1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 1))
        words += ["--data_path", sft_csv, "--init_from", out / "pretrain_32.pth"]
        name = "single_chat/full_sft_32"
    good(run(*replaced(words, "--out_dir", alone)))  # tokenises, too
    recorder = program(RECORDER)
    text = good(run_two_ranks(recorder, tmp_path, *replaced(words, "--batch_size", 2)))
    assert_same_run(out, alone, name)
    rows = re.search(r"a step is 3 x 2 x 2 = 12 rows \(forward passes x rows of each x processes\)", text)
    assert rows and text.count("model: ") == 1

    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    number = max(rows[0] for rows in seen[0]["rows"])
    for epoch in (0, 1):
        drawn = [rows for rank in seen for count, at, rows in rank["rows"] if count == number and at == epoch]
        assert sorted(sum(drawn, [])) == list(range(number))
    steps = json.loads((out / f"{name}.json").read_text())["step"]
    assert steps == 2 * -(-number // 12) and number % 4
    assert [rank["reductions"] for rank in seen] == [steps, steps]  # these gradients fit into one bucket
    own = [[path for path in rank["written"] if str(tmp_path) in path or str(ROOT) in path] for rank in seen]
    assert any(name in path for path in own[0]) and own[1] == []


def test_the_default_step_is_that_of_one_process(run, flags, tmp_path, sft_csv, pretrain_csv):
    good(run("1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 1))
    position = flags.index("--batch_size")
    flags = flags[:position] + flags[position + 2 :]
    words = ["3-full_sft.py", *flags, "--data_path", sft_csv, "--epochs", 3]
    words += ["--init_from", tmp_path / "out/pretrain_32.pth"]
    assert "a step is 1 x 8 = 8 rows" in good(run(*replaced(words, "--out_dir", tmp_path / "alone")))
    assert "a step is 1 x 4 x 2 = 8 rows" in good(run_two_ranks(*words))
    assert_same_run(tmp_path / "out", tmp_path / "alone", "single_chat/full_sft_32")


def test_twenty_runs_in_a_row_end_cleanly(run, flags, program, tmp_path, pretrain_csv):
    words = ["1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 2]
    good(run(*replaced(words, "--out_dir", tmp_path / "alone")))  # tokenises
    command = [sys.executable, program(TWENTY_RUNS), *words, "--overwrite", "--eval_tokens", 31]
    process = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert good(process) == f"{[0] * 40}\n", process.stderr


# ---- stop, death, going on


def start_ranks(words, until):
    """Start a script in two ranks; returns torchrun's process once a line of its output matches `until`."""
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", *map(str, words)]
    options = dict(cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process, seen = subprocess.Popen(command, **options), ""
    for line in process.stdout:
        seen += line
        if re.match(until, line):
            return process
    raise AssertionError(seen + process.stderr.read())


def rank_process(launcher, rank):
    """The process of one rank below a running torchrun."""
    children = psutil.Process(launcher.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(rank))


def test_a_stop_and_the_death_of_a_rank_lose_nothing_and_one_process_goes_on(run, flags, tmp_path, pretrain_csv):
    words = ["1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 400]
    words += ["--save_interval", 20, "--dropout", 0, "--seed", 3]
    good(run(*replaced(words, "--out_dir", tmp_path / "alone")))
    ranks = replaced(words, "--batch_size", 2)

    process = start_ranks(ranks, until="step 30/")
    process.send_signal(signal.SIGTERM)  # as a job scheduler does, to torchrun alone
    text, errors = process.communicate(timeout=60)
    assert errors.count("SIGTERM: finishing") == 1 and "[rank" not in errors, errors
    stopped, way_on = re.search(r"saved at step (\d+)/400; to go on: (.*)", text).groups()
    assert way_on == " ".join(map(str, ["torchrun", "--nproc_per_node", "2", *ranks, "--resume"]))

    process = start_ranks([*ranks, "--resume"], until=f"step {int(stopped) + 30}/")
    rank_process(process, 1).kill()
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - began < 60
    told = re.findall(r"^error: .*", errors, re.MULTILINE)
    assert len(told) == 1 and "another process of this run has ended" in told[0] and told[0].endswith(way_on), errors
    assert "[rank" not in errors and errors.index(told[0]) < errors.index("Traceback")  # which is torchrun's own

    process = run(*words, "--resume")
    assert good(process) and "the number of processes was 2 and is 1 now; the same rows" in process.stderr
    first = int(re.search(r"^step (\d+)/400", process.stdout, re.MULTILINE)[1])
    assert first > int(stopped) and first % 20 == 1
    assert_same_run(tmp_path / "out", tmp_path / "alone", tolerance=1e-4)  # of 400 steps


@pytest.mark.parametrize("kind", ["user", "bug"])
def test_the_error_of_the_rank_that_fails_comes_first_and_alone(flags, program, tmp_path, pretrain_csv, kind):
    words = ["1-pretrain.py", *replaced(flags, "--batch_size", 2), "--data_path", pretrain_csv, "--max_steps", 100]
    process = run_two_ranks(program(FAILING), kind, *words)
    assert process.returncode == 1
    if kind == "user":
        first = next(line for line in process.stderr.splitlines() if "SIGTERM" not in line)
        assert first == "error: no luck" and "[rank" not in process.stderr, process.stderr
        assert process.stderr.count("error: ") == 1
    else:
        assert process.stderr.startswith("[rank1]: Traceback") and "AssertionError: a bug" in process.stderr
        assert "[rank0]" not in process.stderr and "error: " not in process.stderr


@pytest.mark.parametrize("word, part", [("--data_path=none.csv", "none.csv: no such file"), ("--seed=x", "--seed")])
def test_what_both_ranks_meet_one_tells(flags, word, part):
    process = run_two_ranks("1-pretrain.py", *flags, word)
    assert process.returncode == 1
    ours, _, torchruns = process.stderr.partition("Traceback")
    assert ours.count("error: ") == 1 and ours.count("usage: ") == word.startswith("--seed") and part in ours, ours
    assert "ChildFailedError" in torchruns and "[rank" not in process.stderr


# ---- several machines

SRUN = """#!/bin/bash
# Slurm's srun for two machines, both this one.
while [[ $1 == --* ]]; do shift; done
"$@" > first.txt 2>&1 & first=$!
"$@" > second.txt 2>&1 & second=$!
wait $first && wait $second
"""
SCONTROL = """#!/bin/bash
[[ $* == "show hostnames node[1-2]" ]] && echo 127.0.0.1 && sleep 0.2 && echo 127.0.0.1  # a reader may have left by then
"""


def test_the_slurm_script_trains_on_two_machines_as_one_process(run, flags, tmp_path, pretrain_csv):
    words = ["1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 6, "--accumulation_steps", 2]
    good(run(*replaced(words, "--out_dir", tmp_path / "alone")))
    folder, command = tmp_path / "submitted", [Path(sys.executable), "-m", "torch.distributed.run"]
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("1-pretrain.py", "model", "requirements.txt"):
        (folder / name).symlink_to(ROOT / name)
    programs = dict(srun=SRUN, scontrol=SCONTROL, torchrun=f'#!/bin/bash\nexec {" ".join(map(str, command))} "$@"\n')
    for name, text in programs.items():
        (folder / ".venv/bin" / name).write_text(text)
        (folder / ".venv/bin" / name).chmod(0o755)
    (folder / ".venv/bin/activate").write_text(f"PATH={folder / '.venv/bin'}:$PATH\n")
    slurm = dict(SLURM_SUBMIT_DIR=folder, SLURM_JOB_NODELIST="node[1-2]", SLURM_NNODES=2, SLURM_GPUS_ON_NODE=1)
    slurm["SLURM_JOB_ID"] = free_port() - 20000
    process = subprocess.run(
        ["bash", str(ROOT / "docs/slurm_pretrain.sh"), *map(str, replaced(words, "--batch_size", 2)[1:])],
        cwd=tmp_path, env={**ENVIRONMENT, **{name: str(value) for name, value in slurm.items()}},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    texts = [path.read_text() for path in (folder / "first.txt", folder / "second.txt") if path.exists()]
    assert process.returncode == 0, process.stderr + "".join(texts)
    assert sorted(text.count("a step is 2 x 2 x 2 = 8 rows") for text in texts) == [0, 1]
    assert_same_run(tmp_path / "out", tmp_path / "alone")


def test_every_line_of_the_slurm_script_for_slurm_is_an_option_of_sbatch():
    lines = (ROOT / "docs/slurm_pretrain.sh").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").split("=") for line in lines if line.startswith("#SBATCH"))
    assert options["nodes"] == "2" and options["ntasks-per-node"] == "1" and options["signal"].startswith("TERM@")
    assert options.keys() <= {
        "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "output",
    }  # fmt: skip
