"""The shared flags, and how an error reaches the user."""

import argparse
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT, assert_one_line_error, run_script
from model import errors
from model.build import explicit_fields
from model.cli import add_inference_flags, add_training_flags, from_flags, training_settings
from model.errors import UserError, command_line, run_main, tell, warn
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
    add_training_flags(parser, data_path="dataset/x.csv", epochs=2, wandb_project="project")
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
        (UserError("a.csv: no column text"), 1, "a.csv: no column text"),
        (UserError("--preset x", exit_code=2), 2, "--preset x"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x.pth"), 1, "out/x.pth: No space left on device"),
        (OSError(errno.EACCES, "Permission denied", "out"), 1, "out: Permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), 1, "x" * 300 + ": File name too long"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "a"), 1, "a: Too many levels of symbolic links"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "Too many open files"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), 1, "a -> b: Invalid cross-device link"),
        (MemoryError(), 1, "out of memory; end other programs, or choose a smaller model, batch or context"),
        (ModuleNotFoundError("no", name="torch"), 1, "torch is not installed: source .venv/bin/activate"),
        (ModuleNotFoundError("no", name="backports"), 1, "backports.zstd is not installed"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_user_can_cause_is_one_line(capsys, error, code, line):
    got, text = outcome(capsys, raising(error))
    assert got == code and text.startswith(f"error: {line}") and text.count("\n") == 1


def test_memory_that_torch_cannot_get_is_one_line(capsys):
    code, text = outcome(capsys, lambda: torch.empty(1 << 58))
    assert code == 1 and text.startswith("error: out of memory") and text.count("\n") == 1


def test_success_is_0_and_a_bug_keeps_its_traceback(capsys):
    assert outcome(capsys, lambda: None) == (0, "")
    assert outcome(capsys, lambda: 3) == (3, "")
    assert outcome(capsys, raising(SystemExit(2))) == (2, "")
    for bug in (ZeroDivisionError(), OSError("no errno"), ModuleNotFoundError("no", name="model.absent"), TypeError()):
        with pytest.raises(type(bug)):
            run_main(raising(bug))


def test_an_error_that_compiled_code_makes_of_ctrl_c_is_ctrl_c(capsys):
    def main():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("PytorchStreamWriter failed")

    assert outcome(capsys, main) == (130, "error: interrupted\n")


def test_a_user_error_made_of_ctrl_c_keeps_its_line_and_code(capsys):
    def main():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise UserError("stopped; go on with x", exit_code=3)

    assert outcome(capsys, main) == (3, "error: stopped; go on with x\n")


# ---- a script as a process: what it shows before its main() runs, on odd terminals, with nobody reading


@pytest.fixture
def repository(tmp_path):
    """A copy of errors.py's neighbourhood: a script counts as one of the repository's when it lies beside model/."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "model" / name, folder)
    (folder / "cli.py").write_text("import model.errors")
    shutil.copy(ROOT / "requirements.txt", tmp_path)

    def start(body, first="", python=(), env=None, prepare=lambda: None, **options):
        def fresh():  # a shell that runs the tests in the background has SIGINT ignored
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            prepare()

        text = f"import model.cli\nimport sys, time\nfrom model.errors import run_main\n{first}\n"
        (tmp_path / "script.py").write_text(f"{text}def main():\n    {body}\nrun_main(main)\n", "utf-8")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        command = [sys.executable, *python, str(tmp_path / "script.py")]
        environment.update(env or {})
        return subprocess.Popen(command, text=True, env=environment, preexec_fn=fresh, **pipes)

    return start


@pytest.mark.parametrize("where", ["importing", "main"])
def test_two_quick_ctrl_c_are_one_line(repository, tmp_path, where):
    (tmp_path / "heavy.py").write_text("import sys, time\nprint('here', flush=True)\ntime.sleep(30)")
    first = "import heavy" if where == "importing" else ""
    process = repository("print('here', flush=True); time.sleep(30)", first)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert errors == "error: interrupted\n" and process.returncode in (130, -signal.SIGINT)


def test_an_interrupt_that_a_module_would_swallow_while_it_is_imported_ends_the_script(repository, tmp_path):
    swallow = "import time\ntry:\n    print('here', flush=True); time.sleep(30)\nexcept BaseException: pass\n"
    (tmp_path / "heavy.py").write_text(swallow)
    process = repository("time.sleep(30)", "import heavy")
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "error: interrupted\n" and process.returncode == 130


def test_an_interrupt_before_main_and_one_as_python_ends_leave_no_traceback(repository):
    process = repository("pass", "raise KeyboardInterrupt")
    assert process.communicate(timeout=20)[1] == "error: interrupted\n" and process.returncode == 130
    interrupt = "import atexit\ndef late(): raise KeyboardInterrupt\natexit.register(late)"
    process = repository("print('done')", interrupt)
    assert process.communicate(timeout=20) == ("done\n", "") and process.returncode == 0


def test_ctrl_c_again_while_python_clears_up_does_not_kill_the_script(repository):
    slow = "class Slow:\n    def __del__(self, sleep=time.sleep): sleep(1)\nsys.slow = Slow()"
    process = repository("print('here', flush=True); time.sleep(30)", slow)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "error: interrupted\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "" and process.returncode == 130


def test_other_programs_keep_their_own_hooks():
    program = "import signal, sys, model.errors\n"
    program += "assert sys.excepthook is sys.__excepthook__ and sys.unraisablehook is sys.__unraisablehook__\n"
    program += "assert signal.getsignal(signal.SIGINT) is not model.errors.interrupt\n"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_ctrl_c_is_taken_care_of_before_the_slower_imports():
    program = (
        "import sys, model.cli; names = list(sys.modules); assert names.index('model.errors') < names.index('argparse')"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_ctrl_c_that_the_shell_had_ignored_stays_ignored(repository):
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    process = repository("print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)", "import signal", prepare=ignore)
    assert process.communicate(timeout=20)[0] == "True\n"


@pytest.mark.parametrize("script", ["1-pretrain.py", "train_tokenizer.py", "eval_ceval.py", "quickstart.py"])
def test_without_the_environment_a_script_says_how_to_enter_it(script):
    process = subprocess.run([sys.executable, "-S", script], cwd=ROOT, capture_output=True, text=True)
    assert_one_line_error(process, "is not installed: source .venv/bin/activate, or make quickstart first")


@pytest.mark.parametrize("encoding, shown", [("ascii", b"??x?"), ("gbk", "长江x?".encode("gbk")), ("utf-8", b"")])
def test_what_the_terminal_cannot_show_is_a_question_mark(repository, encoding, shown):
    process = repository("print('长江x\\udcff')", env={"PYTHONIOENCODING": encoding})
    process.wait(timeout=20)
    assert process.returncode == 0, process.stderr.read()
    assert process.stdout.buffer.read().strip() == (shown or "长江x?".encode())


def test_help_of_every_script_on_an_ascii_terminal():
    for script in sorted(ROOT.glob("*.py")):
        environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
        process = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, env=environment)
        assert process.returncode == 0 and b"usage" in process.stdout, (script, process.stderr[-500:])


def test_a_reader_that_has_left_is_no_error_and_a_full_disk_is_one_line(repository):
    # Noticed at the end, in the middle of what is printed, and at every print.
    for body, python in (("print('x')", ()), ("print('x' * 200_000)", ()), ("print('x')", ["-u"])):
        process = repository(f"time.sleep(0.2); {body}", python=python)
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(timeout=20) == 1
    process = repository("print('x')", stdout=open("/dev/full", "w"))
    assert process.communicate(timeout=20)[1] == "error: No space left on device\n" and process.returncode == 1


def test_an_error_is_told_although_nobody_reads_the_output(repository):
    process = repository("time.sleep(0.2); print('x'); raise PermissionError(13, 'Permission denied', 'out')")
    process.stdout.close()
    assert process.stderr.read() == "error: out: Permission denied\n" and process.wait(timeout=20) == 1


def test_closed_outputs_do_not_lend_their_number_to_a_file(repository, tmp_path):
    close = lambda: (os.close(1), os.close(2))  # noqa: E731
    body = f"file = open({str(tmp_path / 'file')!r}, 'w'); print('x'); print('y', file=sys.stderr); file.write('z')"
    process = repository(f"{body}; return file.fileno() < 3", prepare=close)
    assert process.wait(timeout=20) == 0 and (tmp_path / "file").read_text() == "z"


def test_a_terminal_that_is_gone_does_not_end_what_tells_it_something(monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    tell("SIGHUP: saving")


def test_places_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    reasons = {
        "file/x": "Not a directory",
        "loop/x": "Too many levels of symbolic links",
        "数" * 100: "File name too long",
    }
    for name, reason in reasons.items():
        process = run_script("data_process.py", "demo", "--output_dir", tmp_path / name)
        assert_one_line_error(process, name, reason)


def test_every_fixed_flag_exists_with_help(parser):
    described = {action.dest: action.help for action in parser._actions}
    assert set(FIXED_FLAGS) <= described.keys()
    assert all(described.values())
    parser.format_help()  # a stray % in a help text would raise


@pytest.mark.parametrize(
    "words, file",
    [
        ([], None),
        (["--deepspeed", "--batch_size", "4"], "auto"),
        (["--deepspeed", "my.json"], "my.json"),
        (["--deepspeed", "--deepspeed_config", "my.json"], "my.json"),  # as DeepSpeed's own scripts take it
        (["--deepspeed_config", "my.json", "--deepspeed"], "my.json"),
    ],
)
def test_deepspeed_takes_a_file_or_none(parser, words, file):
    assert training_settings(parser.parse_args(words)).deepspeed == file


def test_no_flag_that_does_nothing(parser):
    """Every flag of training and inference is read somewhere in model/ or by the scripts."""
    add_inference_flags(inference := argparse.ArgumentParser())
    paths = [*ROOT.glob("model/**/*.py"), *ROOT.glob("[0-3]-*.py")]
    sources = "".join(path.read_text(encoding="utf-8") for path in paths if path.name not in ("settings.py", "cli.py"))
    for action in {*parser._actions, *inference._actions}:
        name = action.dest
        if name not in ("help", "deepspeed_config"):  # cli.py makes a --deepspeed of that
            assert re.search(rf'(args|settings|shape|config|parameters|row)\.{name}\b|"{name}"', sources), name


def test_help_shows_the_defaults_that_hold(parser):
    help_text = " ".join(parser.format_help().split())
    assert "None" not in help_text and "{default}" not in help_text
    for shown in ("dataset/x.csv", "default: 0.3 / --dim", "default: 2;", "default: project", "default: 1337", "5 %"):
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
        (TrainingSettings, dict(optimizer="sgd"), "--optimizer: choose one of muon, adamw, got 'sgd'"),
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
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert command_line() == "torchrun --nproc_per_node 4 1-pretrain.py --resume"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert command_line() == "torchrun --nproc_per_node 2 --nnodes 2 ... 1-pretrain.py --resume"
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


def test_of_processes_that_fail_together_the_first_tells(monkeypatch, tmp_path, capsys):
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    for rank, shown in (("1", "error: no room\n"), ("0", "")):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        errors.tell_error("no room")
        assert capsys.readouterr().err == shown
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "0" / "error.json"))
    assert errors.first_to_fail()  # nothing can be noted: it is told


def test_another_launcher_has_time_to_end_the_rest(monkeypatch):
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert errors.first_to_fail()
    assert waited == [errors.OTHERS_END_WITHIN]


def test_a_lost_process_is_one_line_with_the_way_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["1-pretrain.py", "--overwrite"])
    for name, message in (
        ("DistBackendError", "NCCL error"),
        ("RuntimeError", "[/src/gloo/transport/tcp/pair.cc:5] Connection closed by peer"),
    ):
        line, code = errors.describe(type(name, (RuntimeError,), {})(message))
        assert code == 1 and "another process of this run has ended" in line
        assert line.endswith("python 1-pretrain.py --resume")
    assert errors.describe(RuntimeError("a bug")) == (None, 1)


def test_importing_the_flags_is_light():
    heavy = "{'torch', 'transformers', 'numpy', 'tokenizers'}"
    program = (
        "import argparse, sys; from model.cli import add_training_flags\n"
        "add_training_flags(argparse.ArgumentParser(), data_path='', learning_rate=1, epochs=1, wandb_project='')\n"
        f"assert not {heavy} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
