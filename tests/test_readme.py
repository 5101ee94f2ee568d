"""Every command in the READMEs runs, in a copy of the repository and on models and data small enough for a test."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, TINY_FLAGS

SMALL_TRAINING = [*TINY_FLAGS, "--max_steps", "2", "--batch_size", "2", "--accumulation_steps", "1"]
SMALL_TRAINING += ["--dtype", "float32", "--eval_tokens", "64"]
BRIEF = ["--max_new_tokens", "4"]
# What makes a command small: flags appended to it (the last one of a kind counts).
EXTRA = {
    "1-pretrain.py": SMALL_TRAINING,
    "3-full_sft.py": SMALL_TRAINING,
    "4-lora_sft.py": SMALL_TRAINING,
    "5-dpo_train.py": SMALL_TRAINING,
    "0-eval_pretrain.py": BRIEF,
    "2-eval.py": BRIEF,
    "eval_ceval.py": ["--max_seq_len", "256"],  # a question is longer than the test's model was trained on
    "train_tokenizer.py": ["--vocab_size", "600"],
    "benchmarks/training.py": [
        "--presets",
        "minimind-tiny",
        "--steps",
        "1",
        "--batch_size",
        "1",
        "--max_seq_len",
        "16",
    ],
    "benchmarks/decoding.py": ["--preset", "minimind-tiny", "--new_tokens", "3", "--repeats", "1"],
    "benchmarks/lora.py": ["--preset", "minimind-tiny", "--steps", "1", "--batch_size", "1", "--max_seq_len", "16"],
    "benchmarks/ceval.py": ["--presets", "minimind-tiny", "--subjects", "1", "--questions", "4", "--repeats", "1"],
    "benchmarks/exports.py": ["--preset", "minimind-tiny", "--new_tokens", "3", "--requests", "2", "--repeats", "1"],
    "benchmarks/serving.py": ["--preset", "minimind-tiny", "--parts", "http", "--requests", "2", "--repeats", "1"],
    "benchmarks/token_cache.py": ["--megabytes", "1", "--repeats", "1"],
    "benchmarks/data_process.py": ["--megabytes", "1"],
    "benchmarks/context_length.py": ["--tokens", "256"],
    "benchmarks/kill_and_resume.py": ["--kills", "1"],
    "benchmarks/held_out_split.py": ["--documents", "80", "--epochs", "1"],
    "benchmarks/scaling.py": ["--preset", "minimind-tiny", "--steps", "1", "--batch_size", "2", "--max_seq_len", "16"],
}
FIND_CHECKPOINTS = ("0-eval_pretrain.py", "2-eval.py", "eval_ceval.py", "export_model.py")
LEFT_OUT = ("--compile",)  # takes minutes


def commands(name):
    """The command lines of a README's bash blocks, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text("utf-8"), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository's scripts and package beside the raw files that the README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    for name in (*(path.name for path in ROOT.glob("*.py")), "README.md", "model", "images", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "dataset" / "demo_world", folder / "dataset" / "demo_world")
    subprocess.run([sys.executable, "data_process.py", "demo", "--output_dir", "made"], cwd=folder, check=True)
    (folder / "raw").mkdir()
    (folder / "made/raw/demo_pretrain.jsonl").rename(folder / "raw/pretrain.jsonl")
    conversations = [(folder / f"made/raw/demo_sft_{kind}.jsonl").read_text("utf-8") for kind in ("single", "multi")]
    (folder / "raw/sft.jsonl").write_text("".join(conversations), "utf-8")
    (folder / "made/raw/demo_dpo.json").rename(folder / "raw/dpo.json")
    (folder / "ceval").mkdir()
    (folder / "made/ceval-exam").rename(folder / "ceval/ceval-exam")
    return folder


def small(words):
    """`words` of a python command with what would be slow left out and what makes it small added."""
    script, rest = words[0], [word for word in words[1:] if word not in LEFT_OUT]
    return [script, *rest, *EXTRA.get(script, [])]


def test_both_readmes_begin_with_the_two_commands_and_give_the_same_ones():
    chinese, english = commands("README.md"), commands("README_en.md")
    assert chinese[:2] == ["make quickstart", "make test"]
    assert chinese == english


def test_make_targets_exist():
    targets = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text("utf-8")).group(1).split()
    assert {line.split()[1] for line in commands("README.md") if line.startswith("make ")} <= set(targets)
    for target in targets:
        process = subprocess.run(["make", target, "-n"], cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        for path in re.findall(r" (\w[\w/]*\.py)\b", process.stdout):
            assert (ROOT / path).exists(), path


def test_quickstart_goes_all_the_way(tmp_path):
    command = [
        sys.executable,
        "quickstart.py",
        "--data_dir",
        tmp_path / "the data",
        "--out_dir",
        tmp_path / "out of it",
        "--max_steps",
        "2",
    ]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    result = json.loads(process.stdout.splitlines()[-1])
    assert set(result) == {
        "facts_heldout_accuracy",
        "multi_turn_accuracy",
        "identity_accuracy",
        "facts_with_adapter",
        "preference_accuracy",
        "facts_after_dpo",
        "arithmetic_accuracy",
        "unseen_names_accuracy",
        "unseen_values_accuracy",
        "exam_accuracy",
        "pretrain_val_bpb",
        "seconds_train",
        "seconds_total",
        "tokens_per_second",
    }
    assert 0 <= result["facts_heldout_accuracy"] <= 1 and result["pretrain_val_bpb"] > 1
    made = [path.name for path in (tmp_path / "out of it/export").rglob("*") if path.is_file()]
    assert {"chat.gguf", "Modelfile", "model.safetensors"} <= set(made)
    assert "guessing" in (tmp_path / "out of it/ceval/summary.md").read_text("utf-8")


def needs_nothing(line):
    """Whether a command is a benchmark that no other command has to prepare."""
    return line.startswith("python benchmarks/") and not re.search("--(checkpoint|data_path)", line)


def test_every_benchmark_runs(copy):
    for line in filter(needs_nothing, commands("README.md")):
        process = subprocess.run(
            [sys.executable, *small(shlex.split(line)[1:])], cwd=copy, capture_output=True, text=True
        )
        assert process.returncode == 0, f"{line}\n{process.stderr[-2000:]}"
        json.loads(process.stdout.splitlines()[-1])


def test_every_python_command_runs(copy):
    lines = [line for line in commands("README.md") if line.startswith("python ") and not needs_nothing(line)]
    assert len(lines) > 10
    for line in lines:
        words = small(shlex.split(re.sub(r"(out/\S*(?:full_sft|pretrain|dpo|lora_\w+))_512", r"\1_32", line))[1:])
        words = [word.replace("out/quickstart/pretrain_192", "out/pretrain_32") for word in words]
        if "--preset" in words and words[0] == "1-pretrain.py":
            words += ["--out_dir", "out/preset"]  # made as small as the others, it has their name
        interactive = "--interactive" in words
        if words[0] in FIND_CHECKPOINTS and "--checkpoint" not in words:
            words += ["--dim", "32", "--n_layers", "2"]
        if words[0] == "images/draw.py" and words[1] != "model":
            log = {"curves": "pretrain_32", "experts": "pretrain_32_moe"}[words[1]]
            words = words[:2] + ["--logs", f"out/logs/{log}.jsonl", "--output", f"{words[1]}.png"]
        process = subprocess.run(
            [sys.executable, *words],
            cwd=copy,
            capture_output=True,
            text=True,
            input="你好\n/exit\n" if interactive else "",
        )
        assert process.returncode == 0, f"{line}\n{process.stderr[-2000:]}"
        assert "bad line" not in process.stdout, f"{line}\n{process.stdout}"  # a pattern that matches other files too
        if words[0].startswith("benchmarks/"):
            json.loads(process.stdout.splitlines()[-1])


def launches():
    """The lines of the READMEs that start several processes, of one machine and of several."""
    assert blocks("README.md", "torchrun ") == blocks("README_en.md", "torchrun ")
    return blocks("README.md", "torchrun ")


def blocks(name, start):
    """Lines that begin with `start` in the sh blocks of a README, what is continued on the next line put together."""
    text = "\n".join(re.findall(r"```sh\n(.*?)```", (ROOT / name).read_text("utf-8"), re.S)).replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in text.splitlines() if line.startswith(start)]


def test_every_torchrun_line_runs(tmp_path):
    """Each machine as a torchrun of its own; all of them are this one, with one or two processes."""
    for name in (*(path.name for path in ROOT.glob("*.py")), "model", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "dataset" / "demo_world", tmp_path / "dataset" / "demo_world")
    for more in ([], ["--output_dir", "dataset/demo"]):
        subprocess.run([sys.executable, "data_process.py", "demo", *more], cwd=tmp_path, check=True)
    assert launches()
    for line in launches():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            line = re.sub(r"--rdzv_endpoint \S+", f"--rdzv_endpoint 127.0.0.1:{free.getsockname()[1]}", line)
        machines = int((re.search(r"--nnodes (\d+)", line) or [1, 1])[1])
        line = re.sub(r"--nproc_per_node \d+", f"--nproc_per_node {2 if machines == 1 else 1}", line)
        options, script, rest = re.fullmatch(r"torchrun (.*?)(\S+\.py)(.*)", line).groups()
        options += "" if machines > 1 else " --standalone"
        words = [*shlex.split(options), *small([script, *shlex.split(rest)]), "--device", "cpu"]
        words += [] if "--resume" in rest else ["--overwrite"]
        command = [sys.executable, "-m", "torch.distributed.run", *words]
        options = dict(cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started = [subprocess.Popen(command, **options) for _ in range(machines)]
        printed = [process.communicate(timeout=200)[0] for process in started]
        assert not any(process.returncode for process in started), f"{line}\n" + "".join(printed)[-3000:]


def test_every_deepspeed_line_runs(tmp_path):
    for name in (*(path.name for path in ROOT.glob("*.py")), "model", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "dataset" / "demo_world", tmp_path / "dataset" / "demo_world")
    subprocess.run([sys.executable, "data_process.py", "demo"], cwd=tmp_path, check=True)
    (tmp_path / "ds_config.json").write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}')
    for line in blocks("README.md", "deepspeed --num_gpus"):
        launcher, script, rest = re.fullmatch(r"deepspeed (.*?)(\S+\.py)(.*)", line).groups()
        words = [*shlex.split(launcher), *small([script, *shlex.split(rest)]), "--device", "cpu", "--overwrite"]
        command = [str(Path(sys.executable).with_name("deepspeed")), *words]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, f"{line}\n{process.stderr[-3000:]}"


def test_the_notebook_example_runs_and_is_the_same_in_both(copy):
    (chinese,), (english,) = (
        re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf-8"), re.S)
        for name in ("README.md", "README_en.md")
    )
    assert chinese == english and "max_steps=100" in chinese
    program = chinese.replace("max_steps=100", "max_steps=2")
    if not (copy / "dataset/pretrain_data.csv").exists():  # where the commands above run in another process
        shutil.copy(copy / "made/pretrain_data.csv", copy / "dataset")
    process = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True)
    assert process.returncode == 0 and (copy / "out/pretrain_192.pth").exists(), process.stderr[-2000:]


def test_links_and_pictures_exist():
    for name in ("README.md", "README_en.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text("utf-8")):
            assert target.startswith("http") or (ROOT / target).exists(), f"{name}: {target}"


def test_every_flag_that_the_readmes_name_exists():
    places = (ROOT.glob("*.py"), ROOT.glob("model/**/*.py"), ROOT.glob("images/*.py"), ROOT.glob("benchmarks/*.py"))
    sources = "".join(path.read_text("utf-8") for paths in places for path in paths)
    for name in ("README.md", "README_en.md"):
        own = re.sub(r"```sh\n.*?```", "", (ROOT / name).read_text("utf-8"), flags=re.DOTALL)  # without other programs
        for flag in set(re.findall(r"--(\w+)", own)):
            assert flag == "help" or re.search(rf'"--{flag}"|^    {flag}: \w+ = flag\(', sources, re.MULTILINE), (
                f"{name}: --{flag}"
            )
