"""quickstart.py stopped in every way and started again, with stand-ins for the scripts it runs."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT

# Trains six steps and saves each. While the file "block" names it, it waits after its third step, or before its first.
STAGE = """
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
names = {"1": "pretrain", "3": "single_chat/full_sft", "4": "lora_identity", "5": "dpo"}
name = "multi_chat/full_sft" if "--multi" in words else names[sys.argv[0][0]]
path = pathlib.Path(words[words.index("--out_dir") + 1], name + "_192.json")
assert pathlib.Path(words[words.index("--data_path") + 1]).exists()
assert not path.exists() or "--resume" in words or "--overwrite" in words, "refused"
step = json.loads(path.read_text())["step"] if "--resume" in words else 0
stops, began = [], time.time()
def stop(number, frame):
    stops.append(number)
    if len(stops) > 1:
        os._exit(1)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, stop)
def log(text):
    with open("log", "a") as handle:
        print(name, text, file=handle)
def save():
    path.parent.mkdir(parents=True, exist_ok=True)
    record = dict(step=step, total_steps=6, tokens_seen=10 * step, train_seconds=float(step), when=time.time_ns())
    record.update(validation_loss=1.0, validation_bits_per_byte=1.0)
    record.update(validation={"reward_accuracy": 0.75, "chosen_more_probable": 0.5}, dpo={"longer_is_chosen": {"held_out": 0.5}})
    path.write_text(json.dumps(record))
log(f"from {step}" + "".join(f" {word}" for word in words if word in ("--resume", "--overwrite")))
while not stops and step < 6:
    block = pathlib.Path("block").read_text() if pathlib.Path("block").exists() else ""
    if block == f"{name} {step}":
        log(f"waits {os.getpid()}")
        while not stops and time.time() < began + 15:
            time.sleep(0.01)
        time.sleep(0.4)  # saving takes its time
        break
    step += 1
    save()
    if step == 6:
        break
if step:
    save()
log(f"to {step}")
"""
DATA = """
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
for name in ("heldout", "dpo"):
    (folder / name).mkdir(parents=True, exist_ok=True)
for name in ("pretrain_data.csv", "sft_data_single.csv", "sft_data.csv", "lora_identity.csv", "dpo/train_data.json"):
    (folder / name).write_text(pathlib.Path("source").read_text())
for name in ("facts", "arithmetic", "multi_turn", "identity", "unseen_names", "unseen_values"):
    (folder / "heldout" / f"{name}.jsonl").write_text("{}")
"""


@pytest.fixture
def folder(tmp_path):
    """quickstart.py and what it imports, beside the stand-ins."""
    shutil.copy(ROOT / "quickstart.py", tmp_path)
    shutil.copytree(
        ROOT / "model", tmp_path / "model", ignore=shutil.ignore_patterns("minimind_tokenizer", "__pycache__")
    )
    scripts = dict.fromkeys(("1-pretrain.py", "3-full_sft.py", "4-lora_sft.py", "5-dpo_train.py"), STAGE)
    scripts["data_process.py"] = DATA
    scripts |= dict.fromkeys(("2-eval.py", "eval_ceval.py"), 'print(\'{"accuracy": 0.5, "verdict": "so"}\')')
    for name, text in {**scripts, "export_model.py": "", "source": "x"}.items():
        (tmp_path / name).write_text(text, "utf-8")
    yield tmp_path
    while STARTED:
        STARTED.pop().kill()


STARTED = []


def start(folder, *words, script="quickstart.py", prepare=lambda: None, **options):
    def fresh():  # a shell that runs the tests in the background has signals ignored
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        prepare()

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    (folder / "log").unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, script, *words], cwd=folder, text=True, preexec_fn=fresh, **pipes)
    STARTED.append(process)
    return process


def log(folder):
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


def start_and_wait(folder, place, **options):
    """Start quickstart and return it once the stage waits at `place`, and that stage's process id."""
    (folder / "block").write_text(place)
    process = start(folder, **options)
    for _ in range(1000):
        waiting = [line.split()[-1] for line in log(folder) if "waits" in line]
        if waiting:
            (folder / "block").unlink()
            return process, int(waiting[0])
        time.sleep(0.01)
    raise AssertionError(log(folder))


def finish(folder, *words):
    """Run quickstart to its end: (its last line, what the stages did)."""
    process = start(folder, *words)
    text, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    return json.loads(text.splitlines()[-1]), log(folder)


WHOLE = ["pretrain from 0", "pretrain to 6", "single_chat/full_sft from 0", "single_chat/full_sft to 6"]
WHOLE += ["multi_chat/full_sft from 0", "multi_chat/full_sft to 6"]
WHOLE += ["lora_identity from 0", "lora_identity to 6", "dpo from 0", "dpo to 6"]
REST = ["single_chat/full_sft from 3 --resume", "single_chat/full_sft to 6", *WHOLE[4:]]
OVER = [line.replace("from 0", "from 0 --overwrite") for line in WHOLE]
WAY_ON = "error: stopped; to go on where it was: make quickstart"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_the_stage_saves_and_the_next_start_goes_on(folder, number):
    process, _ = start_and_wait(folder, "single_chat/full_sft 3")
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number and errors.splitlines() == [WAY_ON]
    assert log(folder)[-1] == "single_chat/full_sft to 3"
    result, done = finish(folder)
    assert done == REST and not (folder / "out/quickstart/quickstart.json").exists()
    assert result["seconds_train"] == 30 and result["tokens_per_second"] == 10


def test_ctrl_c_in_a_terminal_reaches_the_stage_once(folder):
    terminal, inside = pty.openpty()
    process, _ = start_and_wait(
        folder, "single_chat/full_sft 3", stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
        prepare=lambda: os.close(os.open(os.ttyname(inside), os.O_RDWR)),
    )  # fmt: skip
    os.write(terminal, b"\x03")
    assert process.wait(timeout=20) == 130
    assert log(folder)[-1] == "single_chat/full_sft to 3"  # a second signal would have ended it
    assert WAY_ON in os.read(terminal, 10_000).decode()
    assert finish(folder)[1] == REST


def test_a_second_signal_is_passed_on_too(folder):
    process, _ = start_and_wait(folder, "single_chat/full_sft 3")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert process.wait(timeout=20) == 130 and "to 3" not in log(folder)[-1]


def test_a_signal_that_comes_while_a_stage_is_being_started_reaches_it(folder):
    slow = "import runpy, subprocess, time; popen = subprocess.Popen\n"
    slow += "subprocess.Popen = lambda *words, **options: (popen(*words, **options), time.sleep(1))[0]\n"
    (folder / "slow.py").write_text(slow + "runpy.run_path('quickstart.py', run_name='__main__')\n", "utf-8")
    process, _ = start_and_wait(folder, "pretrain 0", script="slow.py")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130 and log(folder)[-1] == "pretrain to 0"


def test_kill_9_and_a_stage_stopped_alone_go_on_too(folder):
    process, stage = start_and_wait(folder, "single_chat/full_sft 3")
    process.kill()
    os.kill(stage, signal.SIGKILL)
    process.communicate()
    process, stage = start_and_wait(folder, "multi_chat/full_sft 3")
    assert log(folder)[:2] == REST[:2]
    os.kill(stage, signal.SIGINT)
    assert process.communicate(timeout=20)[1].splitlines() == [WAY_ON] and process.returncode == 1
    assert finish(folder)[1] == ["multi_chat/full_sft from 3 --resume", "multi_chat/full_sft to 6", *WHOLE[6:]]


def test_a_stage_whose_last_validation_was_cut_short_makes_up_for_it(folder):
    process, _ = start_and_wait(folder, "single_chat/full_sft 3")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    (path,) = folder.glob("out/quickstart/single_chat/*.json")
    record = {**json.loads(path.read_text()), "step": 6, "validation_loss": None, "validation_bits_per_byte": None}
    path.write_text(json.dumps(record))
    assert finish(folder)[1] == ["single_chat/full_sft from 6 --resume", "single_chat/full_sft to 6", *WHOLE[4:]]


def test_a_finished_one_starts_over_and_its_checkpoints_do_not_count_as_new(folder):
    assert finish(folder)[1] == WHOLE
    process, _ = start_and_wait(folder, "pretrain 0")  # before the first save has replaced the old checkpoint
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert log(folder) == [
        "pretrain from 0 --overwrite",
        f"pretrain waits {log(folder)[1].split()[-1]}",
        "pretrain to 0",
    ]
    assert finish(folder)[1] == OVER


@pytest.mark.parametrize("change", ["recipe", "data", "damaged"])
def test_another_recipe_other_data_or_a_damaged_state_start_over(folder, change):
    process, _ = start_and_wait(folder, "single_chat/full_sft 3")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    if change == "data":
        (folder / "source").write_text("y")
    if change == "damaged":
        (folder / "out/quickstart/quickstart.json").write_text("[1,")
    assert finish(folder, *(["--max_steps", "9"] if change == "recipe" else []))[1] == [*OVER[:4], *WHOLE[4:]]


def test_seconds_of_all_starts_are_counted_and_none_between_them(folder):
    began = time.time()
    process, _ = start_and_wait(folder, "single_chat/full_sft 3")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    first = time.time() - began
    time.sleep(1)
    began = time.time()
    total = finish(folder)[0]["seconds_total"]
    assert 1.4 < total < first + time.time() - began  # 1 s before the signal, 0.4 s to save


def test_a_failed_stage_ends_it_with_its_exit_code_and_the_way_on(folder):
    (folder / "3-full_sft.py").write_text("raise SystemExit(2)")
    process = start(folder, "--max_steps", "3")
    errors = process.communicate(timeout=20)[1]
    assert process.returncode == 2 and "error: stopped by the error of python 3-full_sft.py --data_path" in errors
    assert errors.endswith("to go on where it was: python quickstart.py --max_steps 3\n")


def test_nohup_stays_in_force(folder):
    process, _ = start_and_wait(
        folder, "single_chat/full_sft 3", prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None and "waits" in log(folder)[-1]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
