"""DeepSpeed's ZeRO stages and FSDP2 compute what plain DDP does: losses, norms, weights, in every number format. They write
the same files, and each goes on exactly where itself or another has ended. (What is run, and how: divided_runs.py.)"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from divided_runs import BROKEN, CHANGED, FAMILIES, RESUMED, ZERO

from conftest import CPU_FLAGS, ROOT, TINY_FLAGS, good, run_script, save_chat
from model.checkpoint import load_model, read_tensors
from model.files import locked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is for Linux")
# How far losses and weights may be from DDP's. Rounding differs, and 16 bits multiply that.
CLOSE = {"float16": (1e-5, 1e-4), "bfloat16": (1e-5, 1e-4), "muon": (1e-5, 5e-3)}


def start(*words):
    """DeepSpeed's own launcher with two processes on the CPU, running."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [Path(sys.executable).with_name("deepspeed"), "--master_port", port, "--num_gpus=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    options = dict(cwd=ROOT, env=environment, start_new_session=True, text=True)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([str(word) for word in (*launcher, *words)], **options, **pipes)


@pytest.fixture(scope="module")
def results(tmp_path_factory, small_tokenizer_path, small_tokenizer, sft_csv):
    """What divided_runs.py has written, run once for all test processes; "out": where its scripts wrote."""
    common = tmp_path_factory.getbasetemp()
    out = (common.parent if "PYTEST_XDIST_WORKER" in os.environ else common) / "divided"
    with locked(out.with_suffix(".lock")):
        if not out.exists():
            save_chat(out / "pretrain_32.pth", small_tokenizer)
            shape = TINY_FLAGS[: TINY_FLAGS.index("--max_seq_len")]
            flags = [*shape, "--tokenizer_path", small_tokenizer_path, "--out_dir", out, *CPU_FLAGS, "--max_steps", 2]
            process = start("tests/training/divided_runs.py", small_tokenizer_path, sft_csv, out, *flags)
            assert finish(process) == 0, (out / "errors").write_text(process.errors)
    return {**torch.load(out / "results.pt", weights_only=True), "out": out}


def finish(process):
    """Wait for a launcher, keep what it wrote in .output and .errors, and return its exit code."""
    try:
        process.output, process.errors = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode


def difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_divides_the_work_does_not_change_it(results, family):
    first, *others = FAMILIES[family][1]
    expected = results[family, first]
    of_loss, of_weights = CLOSE.get(family, (1e-6, 1e-5))
    assert (
        len(expected["loss"]) == 4
        and len(expected["validation_loss"]) == 3
        and expected["loss"][3] < expected["loss"][0]
    )
    for words in others:
        run = results[family, words]
        for name, relative in (("loss", of_loss), ("validation_loss", of_loss), ("gradient_norm", 1e-3)):
            assert run[name] == pytest.approx(expected[name], rel=relative), (words, name)
        assert run["learning_rate"] == expected["learning_rate"], words
        assert difference(run["weights"], expected["weights"]) < of_weights, words


def test_clipping_is_at_work(results):
    assert min(results["clipped", ""]["gradient_norm"]) > 0.1
    assert difference(results["clipped", ""]["weights"], results["float32", ""]["weights"]) > 1e-5


def test_checkpointing_of_layers_changes_nothing(results):
    assert results["checkpointing", ""]["loss"] == results["float32", ""]["loss"]
    assert difference(results["checkpointing", ""]["weights"], results["float32", ""]["weights"]) == 0


@pytest.mark.parametrize("words", RESUMED)
def test_resuming_is_exact(results, words):
    family = "float16" if "float16" in words else "float32"
    straight, resumed = results[family, words.replace(" --dtype float16", "")], results["resumed", words]
    assert difference(straight["weights"], resumed["weights"]) == 0
    assert straight["validation_loss"][-1] == resumed["validation_loss"][-1]


@pytest.mark.parametrize("first, second", CHANGED)
def test_each_goes_on_where_another_has_ended(results, first, second):
    straight, changed = results["float32", first], results["changed", first, second]
    assert difference(straight["weights"], changed["weights"]) < 1e-5
    assert straight["validation_loss"][-1] == pytest.approx(changed["validation_loss"][-1], rel=1e-6)


@pytest.mark.parametrize("words", BROKEN)
def test_float16_skips_a_step_whose_scale_is_too_large(results, words):
    scales, unchanged = results["overflow", words]
    assert unchanged and scales == [2.0**59, 2.0**59]


@pytest.mark.parametrize("words", BROKEN)
def test_a_gradient_that_is_not_finite_is_refused_before_it_reaches_the_weights(results, words):
    error, unchanged = results["infinite", words]
    assert unchanged and "step 1: gradient norm is" in error and "stopped before it reached the weights" in error


def test_the_engine_keeps_the_number_format(results):
    """On a GPU it switches off the loop's autocast, which therefore stands inside the model too."""
    assert {results["format", words] for words in ZERO[::2]} == {"torch.bfloat16"}


def test_stages_three_and_four(results):
    assert results["scripts"] == [0, 0, 0]
    model, description = load_model(results["out"] / "single_chat/full_sft_32.pth")
    assert description["step"] == 2 and model.config.dim == 32
    adapters = [read_tensors(results["out"] / f"lora_{name}_32.pth") for name in ("sft", "other")]
    assert difference(*adapters) < 1e-5 and len(adapters[0]) == 28
    peft = safetensors.torch.load_file(results["out"] / "peft/adapter_model.safetensors")
    assert difference({name.removeprefix("base_model.model."): part for name, part in peft.items()}, adapters[0]) == 0


def test_ctrl_c_under_the_launcher_saves_and_one_process_goes_on(tmp_path, small_tokenizer_path, pretrain_csv):
    """A terminal sends SIGINT to all processes, and the launcher SIGTERM to its own once more."""
    words = ["1-pretrain.py", *TINY_FLAGS, "--tokenizer_path", small_tokenizer_path, "--data_path", pretrain_csv]
    words += ["--out_dir", tmp_path, "--device", "cpu", "--dtype", "float32", "--max_steps", 10**6, "--deepspeed"]
    process = start(*words, "--batch_size", 2)
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    os.killpg(process.pid, signal.SIGINT)
    finish(process)
    step = load_model(tmp_path / "pretrain_32.pth")[1]["step"]
    (told,) = [line for line in process.output.splitlines() if "stopped and saved" in line]
    assert f"at step {step:,}/" in told and "torchrun --nproc_per_node 2 1-pretrain.py --dim" in told
    output = good(run_script(*words, "--batch_size", 4, "--offload", "--resume", "--stop_after", step + 2))
    assert f"step {step + 2:,}/" in output and '"offload_optimizer": {"device": "cpu"' in output
