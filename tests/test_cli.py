"""The shared flags, and how an error reaches the user."""

import argparse
import errno
import subprocess
import sys

import pytest

from conftest import ROOT
from model.build import model_overrides
from model.cli import add_model_flags, add_training_flags, command_line
from model.errors import UserError, run_main

# Names that users and other programs rely on.
FIXED_FLAGS = """
    preset dim n_layers n_heads n_kv_heads max_seq_len use_moe data_path tokenizer_path out_dir init_from resume
    epochs max_steps batch_size accumulation_steps learning_rate warmup_iters weight_decay grad_clip optimizer
    seed device dtype compile num_workers log_interval eval_interval save_interval use_wandb wandb_project
    wandb_run_name
""".split()


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    add_training_flags(parser, data_path="dataset/x.csv", learning_rate=2e-4, epochs=2, wandb_project="project")
    return parser


def outcome(capsys, main):
    with pytest.raises(SystemExit) as caught:
        run_main(main)
    return caught.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("a.csv: no column text"), 1, "error: a.csv: no column text\n"),
        (UserError("--preset x", exit_code=2), 2, "error: --preset x\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x.pth"),
            1,
            "error: out/x.pth: No space left on device\n",
        ),
        (OSError(errno.EACCES, "Permission denied", "out"), 1, "error: out: Permission denied\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_what_a_user_can_mend_is_one_line(capsys, error, code, line):
    assert outcome(capsys, raising(error)) == (code, line)


def test_success_is_0_and_a_bug_keeps_its_traceback(capsys):
    assert outcome(capsys, lambda: None) == (0, "")
    assert outcome(capsys, lambda: 3) == (3, "")
    for bug in (ZeroDivisionError(), OSError(errno.EBADF, "Bad file descriptor")):
        with pytest.raises(type(bug)):
            run_main(raising(bug))


def test_every_fixed_flag_exists_with_help(parser):
    described = {action.dest: action.help for action in parser._actions}
    assert set(FIXED_FLAGS) <= described.keys()
    assert all(described.values())
    parser.format_help()  # a stray % in a help text would raise


def test_no_flag_that_does_nothing(parser):
    """Every flag that is declared is read somewhere in model/ (add_model_flags' through model_overrides)."""
    sources = "".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("model/**/*.py"), *ROOT.glob("[13]-*.py")])
    names = {action.dest for action in parser._actions} - {"help", *model_overrides(parser.parse_args(["--dim", "1"]))}
    for name in names - {"n_layers", "n_heads", "n_kv_heads", "use_moe", "max_seq_len", "dropout"}:
        assert f"args.{name}" in sources or f'"{name}"' in sources, name


@pytest.mark.parametrize(
    "words",
    [
        ["--batch_size", "0"],
        ["--max_steps", "-3"],
        ["--dim", "1.5"],
        ["--learning_rate", "nan"],
        ["--learning_rate", "-1"],
        ["--grad_clip", "inf"],
        ["--warmup_iters", "-1"],
        ["--dtype", "int8"],
        ["--optimizer", "sgd"],
        ["--no_such_flag"],
    ],
)
def test_wrong_usage_is_2_and_names_the_flag(parser, capsys, words):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(words)
    assert caught.value.code == 2 and words[0] in capsys.readouterr().err


def test_only_flags_that_were_given_override_the_preset(parser):
    assert model_overrides(parser.parse_args([])) == {}
    given = parser.parse_args(["--dim", "64", "--use_moe", "--dropout", "0"])
    assert model_overrides(given) == {"dim": 64, "use_moe": True, "dropout": 0.0}


def test_command_line_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["1-pretrain.py", "--data_path", "my file.csv"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert command_line("--resume") == "python 1-pretrain.py --data_path 'my file.csv' --resume"
    monkeypatch.setattr(sys, "argv", ["1-pretrain.py", "--resume"])
    assert command_line("--resume") == "python 1-pretrain.py --resume"
    for words in (["--stop_after", "3"], ["--stop_after=3"], ["--stop", "3"]):
        monkeypatch.setattr(sys, "argv", ["1-pretrain.py", *words, "--seed", "3"])
        assert command_line("--resume", without="--stop_after") == "python 1-pretrain.py --seed 3 --resume"
    monkeypatch.setattr(sys, "argv", ["1-pretrain.py", "--resume"])
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert command_line() == "torchrun --nproc_per_node 4 1-pretrain.py --resume"


def test_importing_the_flags_is_light():
    heavy = "{'torch', 'transformers', 'numpy', 'tokenizers'}"
    program = (
        "import argparse, sys; from model.cli import add_training_flags\n"
        "add_training_flags(argparse.ArgumentParser(), data_path='', learning_rate=1, epochs=1, wandb_project='')\n"
        f"assert not {heavy} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
