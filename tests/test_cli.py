"""The shared flags, and how an error reaches the user."""

import argparse
import errno
import re
import subprocess
import sys

import pytest

from conftest import ROOT
from model.build import explicit_fields
from model.cli import add_inference_flags, add_training_flags, from_flags, training_settings
from model.errors import UserError, command_line, run_main, warn
from model.settings import InferenceSettings, ModelSettings, SamplingParameters, TrainingSettings

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
    """Every flag of training and inference is read somewhere in model/ or by the scripts."""
    add_inference_flags(inference := argparse.ArgumentParser())
    paths = [*ROOT.glob("model/**/*.py"), *ROOT.glob("[0-3]-*.py")]
    sources = "".join(path.read_text(encoding="utf-8") for path in paths if path.name not in ("settings.py", "cli.py"))
    for action in {*parser._actions, *inference._actions}:
        name = action.dest
        assert (
            re.search(rf'(args|settings|shape|config|parameters|row)\.{name}\b|"{name}"', sources) or name == "help"
        ), name


def test_help_shows_the_defaults_that_hold(parser):
    help_text = " ".join(parser.format_help().split())
    assert "None" not in help_text and "{default}" not in help_text
    for shown in ("dataset/x.csv", "default: 0.0002", "default: 2;", "default: project", "default: 1337", "5 %"):
        assert shown in help_text


def test_settings_are_made_of_flags_and_keep_the_same_defaults(parser):
    args = parser.parse_args([])
    assert training_settings(args) == TrainingSettings(epochs=2, wandb_project="project")
    assert from_flags(ModelSettings, args) == ModelSettings()
    assert training_settings(parser.parse_args(["--max_steps", "3"])).epochs is None
    add_inference_flags(inference := argparse.ArgumentParser())
    args = inference.parse_args(["--checkpoint", "x.pth", "--temperature", "0"])
    assert from_flags(InferenceSettings, args) == InferenceSettings(checkpoint="x.pth")
    expected = SamplingParameters(temperature=0, top_k=8, max_new_tokens=256, seed=1337)
    assert from_flags(SamplingParameters, args) == expected


@pytest.mark.parametrize(
    "kind, values, flag",
    [
        (TrainingSettings, dict(batch_size=0), "--batch_size: must be at least 1, got 0"),
        (TrainingSettings, dict(learning_rate=float("nan")), "--learning_rate: must be finite"),
        (TrainingSettings, dict(optimizer="sgd"), "--optimizer: choose one of adamw, muon, got 'sgd'"),
        (ModelSettings, dict(dropout=1.0), "--dropout: must be below 1"),
        (InferenceSettings, dict(rope_scaling="ntk"), "--rope_scaling"),
        (SamplingParameters, dict(top_p=0.0), "--top_p"),
    ],
)
def test_values_given_by_hand_keep_the_limits_of_the_flags(kind, values, flag):
    with pytest.raises(UserError, match=flag) as caught:
        kind(**values)
    assert caught.value.exit_code == 2


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
    assert explicit_fields(from_flags(ModelSettings, parser.parse_args([]))) == {}
    given = parser.parse_args(["--dim", "64", "--use_moe", "--dropout", "0"])
    assert explicit_fields(from_flags(ModelSettings, given)) == {"dim": 64, "use_moe": True, "dropout": 0.0}


def test_command_line_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["1-pretrain.py", "--data_path", "my file.csv"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert command_line("--resume") == "python 1-pretrain.py --data_path 'my file.csv' --resume"
    monkeypatch.setattr(sys, "argv", ["1-pretrain.py", "--resume"])
    assert command_line("--resume") == "python 1-pretrain.py --resume"
    for words in (["--stop_after", "3"], ["--stop_after=3"], ["--stop", "3"], ["--overwrite", "--stop", "3"]):
        monkeypatch.setattr(sys, "argv", ["1-pretrain.py", *words, "--seed", "3"])
        assert (
            command_line("--resume", without={"--stop_after": 1, "--overwrite": 0})
            == "python 1-pretrain.py --seed 3 --resume"
        )
    monkeypatch.setattr(sys, "argv", ["1-pretrain.py", "--resume"])
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert command_line() == "torchrun --nproc_per_node 4 1-pretrain.py --resume"
    monkeypatch.setattr(sys, "argv", ["/usr/lib/ipykernel_launcher.py", "-f", "kernel.json"])
    assert "resume()" in command_line("--resume") and "ipykernel" not in command_line("--resume")


def test_a_warning_is_one_line_of_one_rank(monkeypatch, capsys):
    for rank, shown in (("0", "warning: low disk\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        warn("low disk")
        assert capsys.readouterr().err == shown
    monkeypatch.delenv("RANK")
    warn("alone")
    assert capsys.readouterr().err == "warning: alone\n"


def test_importing_the_flags_is_light():
    heavy = "{'torch', 'transformers', 'numpy', 'tokenizers'}"
    program = (
        "import argparse, sys; from model.cli import add_training_flags\n"
        "add_training_flags(argparse.ArgumentParser(), data_path='', learning_rate=1, epochs=1, wandb_project='')\n"
        f"assert not {heavy} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
