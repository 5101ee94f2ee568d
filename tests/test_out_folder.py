"""out/ is there in a clone, with one file that says what the stages write; git ignores what they write."""

import shutil
import subprocess

import pytest

from conftest import ROOT


def test_git_keeps_the_explanation_and_ignores_everything_else():
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a git working tree")
    made = ["out/pretrain_512.pth", "out/logs/pretrain_512.jsonl", "out/quickstart/README.md", "out/.hidden"]
    made += ["raw/sft.jsonl"]  # the corpora of README.md
    process = subprocess.run(["git", "check-ignore", *made, "out/README.md"], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.split() == made
    text = (ROOT / "out" / "README.md").read_text("utf-8")
    for name in (
        "`pretrain_<dim>",
        "`single_chat/full_sft_<dim>",
        "`multi_chat/full_sft_<dim>",
        "`lora_<name>_<dim>",
        "`dpo_<dim>",
        ".resume.pth",
        "`logs/",
    ):
        assert name in text


def test_make_clean_leaves_the_explanation(tmp_path):
    for name in ("Makefile", "requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    files = [
        "out/README.md",
        "out/pretrain_512.pth",
        "out/.hidden",
        "out/quickstart/README.md",
        "dataset/own.csv",
        ".venv/x",
    ]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def clean():
        process = subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return [name for name in files if (tmp_path / name).exists()]

    assert clean() == ["out/README.md", "dataset/own.csv"]
    shutil.rmtree(tmp_path / "out")
    assert clean() == ["dataset/own.csv"]
