"""1-pretrain.py and 3-full_sft.py as a user runs them: stages, stop and resume, wrong input."""

import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch

from conftest import CPU_FLAGS, ROOT, TINY_FLAGS, assert_one_line_error, good, run_script, run_two_ranks, run_without
from model.checkpoint import load_model, read_metadata

COMMON = [*TINY_FLAGS, *CPU_FLAGS, "--learning_rate", "1e-3"]


@pytest.fixture
def flags(tmp_path, small_tokenizer_path):
    return [*COMMON, "--tokenizer_path", str(small_tokenizer_path), "--out_dir", str(tmp_path / "out")]


# ---- the stages


def test_the_three_stages_follow_each_other(run, flags, tmp_path, pretrain_csv, sft_csv):
    out = tmp_path / "out"
    text = good(run("1-pretrain.py", *flags, "--data_path", pretrain_csv, "--epochs", 1))
    parameters = sum(tensor.numel() for tensor in load_model(out / "pretrain_32.pth")[0].parameters())
    assert text.splitlines()[0].startswith(f"model: {parameters:,} parameters")
    assert "sample: <s>⟦" in text and f"python 3-full_sft.py --init_from {out / 'pretrain_32.pth'}" in text
    text = good(run("3-full_sft.py", *flags, "--data_path", sft_csv, "--max_steps", 3))
    assert "assistant\n⟦" in text and "python 3-full_sft.py --multi" in text
    text = good(run("3-full_sft.py", "--multi", *flags, "--data_path", sft_csv, "--max_steps", 3, "--last_turn_only"))
    assert "python 2-eval.py --checkpoint" in text
    chain = ["pretrain_32", "single_chat/full_sft_32", "multi_chat/full_sft_32"]
    written = {str(path.relative_to(out)) for path in out.rglob("[!.]*") if path.is_file()}
    logs = {f"logs/{name.replace('/', '_')}.jsonl" for name in chain}
    assert written == {name + suffix for name in chain for suffix in (".pth", ".json", ".resume.pth")} | logs
    for parent, child in zip(chain, chain[1:]):
        metadata = json.loads((out / f"{child}.json").read_text())
        described = json.loads((out / f"{parent}.json").read_text())
        assert metadata["parent"] == {"file": str(out / f"{parent}.pth"), "sha256": described["weights_sha256"]}
        assert metadata["stage"] == child.removesuffix("_32") and metadata["validation_loss"] > 0


def test_a_parent_of_another_shape_wins_unless_a_flag_says_otherwise(
    run, tmp_path, small_tokenizer_path, pretrain_csv, sft_csv
):
    common = ["--tokenizer_path", small_tokenizer_path, "--out_dir", tmp_path, "--max_steps", 1, "--batch_size", 2]
    moe = ["--dim", 48, "--n_layers", 1, "--n_heads", 4, "--n_kv_heads", 2, "--max_seq_len", 32, "--use_moe"]
    good(run("1-pretrain.py", *common, *moe, "--data_path", pretrain_csv))
    common += ["--init_from", tmp_path / "pretrain_48_moe.pth", "--data_path", sft_csv]
    good(run("3-full_sft.py", *common))
    config = load_model(tmp_path / "single_chat" / "full_sft_48_moe.pth")[0].config
    assert (config.n_layers, config.n_heads, config.n_kv_heads, config.max_seq_len) == (1, 4, 2, 32)
    assert_one_line_error(run("3-full_sft.py", *common, "--n_layers", 2), "pretrain_48_moe.pth", "n_layers 1, not 2")
    assert_one_line_error(run("3-full_sft.py", *common, "--preset", "minimind-tiny"), "has dim 48, not")
    good(run("3-full_sft.py", *common, "--max_seq_len", 40, "--overwrite"))
    assert load_model(tmp_path / "single_chat" / "full_sft_48_moe.pth")[0].config.max_seq_len == 40


@pytest.mark.parametrize("script", ["1-pretrain.py", "3-full_sft.py", "4-lora_sft.py"])
def test_help_needs_no_heavy_import_and_describes_every_flag(script):
    text = run_without({"torch", "transformers", "peft", "numpy"}, script, "--help").stdout
    for flag in (
        "preset max_seq_len data_path init_from resume accumulation_steps optimizer compile dtype wandb_project".split()
    ):
        assert f"--{flag}" in text
    assert f"python {script}" in text


def test_compiled_and_eager_runs_agree_and_write_the_same_names(
    run, flags, tmp_path, sft_csv, pretrain_csv, traced_only
):
    torch._dynamo.utils.counters.clear()
    flags += ["--n_layers", 1]
    good(run("1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 2))
    losses = []
    for words in ([], ["--compile"]):
        good(
            run(
                "3-full_sft.py",
                *flags,
                "--data_path",
                sft_csv,
                "--max_steps",
                12,
                "--log_interval",
                1,
                "--overwrite",
                *words,
            )
        )
        lines = (tmp_path / "out" / "logs" / "single_chat_full_sft_32.jsonl").read_text().splitlines()
        losses.append([record["loss"] for record in map(json.loads, lines) if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert not any("_orig_mod" in name for name in torch.load(tmp_path / "out" / "single_chat" / "full_sft_32.pth"))
    # Not one graph for every length: the model before and after its loss, with and without padding, in a batch of one.
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


def test_the_real_compiler_trains_as_eager_does(flags, tmp_path, pretrain_csv):
    """Half a minute of C++ compilation; in bfloat16, so that attention by blocks is part of the graph."""
    words = ["1-pretrain.py", *flags, "--n_layers", 1, "--dtype", "bfloat16", "--data_path", pretrain_csv]
    words += ["--max_steps", 6, "--log_interval", 1]
    losses = []
    for more in ([], ["--compile", "--overwrite"]):
        good(run_script(*words, *more, timeout=400))
        lines = (tmp_path / "out" / "logs" / "pretrain_32.jsonl").read_text().splitlines()
        losses.append([record["loss"] for record in map(json.loads, lines) if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[1][-1] < losses[1][0]


# ---- stop and go on


def start_script(words, until):
    """Start a script and return its process once its output matches `until`."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    seen = ""
    for line in process.stdout:
        seen += line
        if re.match(until, line):
            return process, seen
    raise AssertionError(seen + process.stderr.read())


def test_kill_9_and_resume_gives_the_weights_of_a_straight_run(run, flags, tmp_path, pretrain_csv):
    words = ["1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 200, "--log_interval", 1]
    words += ["--save_interval", 7, "--eval_interval", 50, "--accumulation_steps", 2, "--dropout", 0.1]
    process, _ = start_script(words, until="step 30/")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    text = good(run(*words, "--resume"))
    first = int(re.search(r"^step (\d+)/200", text, re.MULTILINE)[1])
    assert 29 <= first < 200 and first % 7 == 1
    other = [word if word != str(tmp_path / "out") else tmp_path / "straight" for word in words]
    good(run(*other))
    for name in ("pretrain_32.pth",):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/logs/pretrain_32.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_ctrl_c_saves_says_how_to_go_on_and_leaves_with_0(run, flags, tmp_path, pretrain_csv):
    words = ["1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 100000, "--log_interval", 1]
    process, _ = start_script([*words, "--num_workers", 2], until="step 5/")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: its workers get it too
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors and errors.count("SIGINT: finishing") == 1
    step, command = re.search(r"saved at step (\d+)/100,000; to go on: python (.*)", rest).groups()
    assert command == " ".join(map(str, [*words, "--num_workers", 2, "--resume"]))
    _, metadata = load_model(tmp_path / "out" / "pretrain_32.pth")
    assert metadata["step"] == int(step) >= 5


def test_sigterm_to_all_processes_saves_too(flags, tmp_path, pretrain_csv):
    """As timeout, torchrun and job schedulers send it: to the processes that prepare batches as well."""
    words = ["1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 100000, "--log_interval", 1]
    process, _ = start_script([*words, "--num_workers", 2, "--save_interval", 100000], until="step 5/")
    os.killpg(process.pid, signal.SIGTERM)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert errors.count("SIGTERM: finishing") == 1 and "stopped and saved at step" in rest
    assert load_model(tmp_path / "out" / "pretrain_32.pth")[1]["step"] >= 5


def test_stop_after_leaves_with_0_and_its_command_ends_with_the_weights_of_a_straight_run(
    run, flags, tmp_path, pretrain_csv
):
    words = ["1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 9]
    text = good(run(*words, "--stop_after", 4))
    assert "next stage" not in text
    command = re.search(r"saved at step 4/9; to go on: python (.*)", text)[1]
    assert command.endswith(" ".join(map(str, [*words, "--resume"])))
    assert "next stage" in good(run(*command.split()))
    resumed = (tmp_path / "out" / "pretrain_32.pth").read_bytes()
    words[words.index("--out_dir") + 1] = tmp_path / "straight"
    good(run(*words))
    assert resumed == (tmp_path / "straight" / "pretrain_32.pth").read_bytes()


def test_full_disk_while_saving_keeps_the_last_good_checkpoint(flags, tmp_path, pretrain_csv, run):
    words = ["1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 4]
    good(run(*words))
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.glob("pretrain_32.*")}
    size = (out / "pretrain_32.resume.pth").stat().st_size
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))  # noqa: E731
    words[-1] = 8
    process = run_script(*words, "--resume", preexec_fn=limit)
    assert_one_line_error(process, "pretrain_32.pth", "saving step 8", "step 4 is intact", "--resume")
    assert {path.name: path.read_bytes() for path in out.glob("pretrain_32.*")} == before
    assert "validation loss" in good(run(*words, "--resume"))


def test_two_ranks_train_as_one_process_of_twice_the_batch(run, flags, tmp_path, sft_csv, pretrain_csv):
    good(run("1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 1))
    words = ["3-full_sft.py", *flags, "--data_path", sft_csv, "--accumulation_steps", 2, "--max_steps", 6]
    words += ["--optimizer", "adamw"]  # Muon rounds to bfloat16, and two ranks add up in another order
    good(run(*words))
    single, metadata = load_model(tmp_path / "out" / "single_chat" / "full_sft_32.pth")
    words[words.index("--batch_size") + 1] = 2
    words += ["--overwrite"]
    assert good(run_two_ranks(*words)).count("model: ") == 1
    assert_same_run(tmp_path, single, metadata)
    # Two ranks begin, one process goes on.
    good(run_two_ranks(*words, "--stop_after", 3))
    words[words.index("--batch_size") + 1] = 4
    process = run(*words[:-1], "--resume")
    assert good(process) and "the number of processes was 2 and is 1 now; the same rows" in process.stderr
    assert_same_run(tmp_path, single, metadata)


def assert_same_run(tmp_path, single, metadata):
    double, other = load_model(tmp_path / "out" / "single_chat" / "full_sft_32.pth")
    for name in ("tokens_seen", "supervised_tokens_seen", "step"):
        assert metadata[name] == other[name]
    assert other["validation_loss"] == pytest.approx(metadata["validation_loss"], rel=1e-4)
    for (name, one), two in zip(single.named_parameters(), double.parameters()):
        assert torch.allclose(one, two, atol=2e-4), name


def test_full_disk_while_tokenising_is_one_line_and_leaves_nothing(flags, tmp_path, pretrain_csv):
    import resource

    cache = tmp_path / "cache"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # noqa: E731
    words = ["1-pretrain.py", *flags, "--data_path", pretrain_csv, "--cache_dir", cache, "--max_steps", 1]
    process = run_script(*words, preexec_fn=limit)
    assert_one_line_error(process, cache, "cannot write the token cache", "--cache_dir")
    assert not [path for path in cache.iterdir() if path.name not in (".lock", "hashes.json")]


# ---- wrong input


def test_wrong_data_is_one_line(run, flags, tmp_path):
    cases = [("empty.csv", "", "empty.csv"), ("other.csv", "title\nx\n", "text"), ("none.csv", None, "no such file")]
    for name, content, part in cases:
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        assert_one_line_error(run("1-pretrain.py", *flags, "--data_path", path), name, part)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not json\n")
    assert_one_line_error(run("1-pretrain.py", *flags, "--data_path", bad), "bad.jsonl")


def test_a_bad_row_is_counted_with_its_line_and_the_run_goes_on(run, flags, tmp_path, pretrain_csv):
    texts = pretrain_csv.read_text(encoding="utf-8").splitlines()[1:]
    path = tmp_path / "mixed.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    path.write_bytes(b"\n".join([lines[0], b"{broken", b'{"text": "\xff"}', *lines[1:]]) + b"\n")
    text = good(run("1-pretrain.py", *flags, "--data_path", path, "--max_steps", 1))
    assert "mixed.jsonl:2" in text


def test_wrong_flags_are_one_line(run, flags, tmp_path, pretrain_csv):
    words = ["1-pretrain.py", *flags, "--data_path", pretrain_csv]
    assert_one_line_error(run(*words, "--n_heads", 5), "--dim (32)", "n_heads (5)")
    assert_one_line_error(run(*words, "--preset", "huge"), "--preset huge", "minimind-v1-small", code=2)
    assert_one_line_error(run(*words, "--max_seq_len", 100000), "--max_seq_len 100000", "tokens")
    assert_one_line_error(run(*words, "--device", "tpu9"), "--device tpu9", code=2)
    assert_one_line_error(run(*words, "--tokenizer_path", tmp_path / "none"), "none", "--tokenizer_path")
    assert_one_line_error(run(*words, "--resume"), "--resume", "pretrain_32.resume.pth")
    for flag, value in (("--batch_size", 0), ("--learning_rate", "nan"), ("--max_steps", -1), ("--dtype", "int8")):
        process = run(*words, flag, value)
        assert process.returncode == 2 and f"argument {flag}" in process.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--dim", 2**20], ["--n_layers", 10**12]])
def test_a_model_beyond_memory_is_one_line(run, flags, pretrain_csv, words):
    assert_one_line_error(run("1-pretrain.py", *flags, "--data_path", pretrain_csv, *words), "--dim", "GB", "smaller")


def test_missing_data_is_told_before_a_parent_is_looked_for(run, flags, tmp_path):
    words = ["3-full_sft.py", *flags, "--data_path", tmp_path / "none.csv"]
    assert_one_line_error(run(*words), "none.csv: no such file", "data_process.py sft", "data_process.py demo")


def test_printed_commands_are_quoted(run, flags, tmp_path, pretrain_csv):
    out = tmp_path / "my runs"
    text = good(run("1-pretrain.py", *flags, "--out_dir", out, "--data_path", pretrain_csv, "--max_steps", 1))
    assert f"--init_from '{out / 'pretrain_32.pth'}'" in text and f"--checkpoint '{out}" in text
    assert "validating once before the first step" in text


def test_a_preset_of_another_vocabulary_is_refused(run, flags, tmp_path, pretrain_csv, sft_csv):
    words = [*flags, "--data_path", pretrain_csv, "--max_steps", 1]
    parts = ["--preset minimind-v0-small", "32000 words but the tokenizer 400", "--tokenizer_path"]
    assert_one_line_error(run("1-pretrain.py", *words, "--preset", "minimind-v0-small"), *parts)
    assert not (tmp_path / "out").exists()
    assert " 400 words" in good(run("1-pretrain.py", *words))  # no preset named: the tokenizer decides
    words = [*flags, "--data_path", sft_csv, "--max_steps", 1]
    assert_one_line_error(run("3-full_sft.py", *words, "--preset", "minimind-v0-small"), *parts)


def test_wrong_parents_are_one_line(run, flags, tmp_path, pretrain_csv, sft_csv):
    words = ["3-full_sft.py", *flags, "--data_path", sft_csv, "--max_steps", 1]
    assert_one_line_error(run(*words), "out/pretrain_32.pth", "run 1-pretrain.py first", "--init_from")
    assert_one_line_error(run(*words, "--multi"), "single_chat/full_sft_32.pth", "run 3-full_sft.py first")
    good(run("1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 1))
    path = tmp_path / "out" / "pretrain_32.pth"
    assert_one_line_error(run(*words, "--dim", 64), "out/pretrain_64.pth", f"there is {path}")
    position = words.index("--tokenizer_path")
    shipped = words[:position] + words[position + 2 :]
    assert_one_line_error(run(*shipped), path, "400 words but the tokenizer 6400", "--tokenizer_path")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert_one_line_error(run(*words), path, "truncated")
    path.write_text("hello")
    assert_one_line_error(run(*words), path, "not a PyTorch checkpoint")
    assert_one_line_error(run(*words, "--init_from", tmp_path / "none.pth"), "none.pth", "no such checkpoint")


def test_a_damaged_training_state_is_one_line(run, flags, tmp_path, pretrain_csv):
    words = ["1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 2]
    good(run(*words))
    state = tmp_path / "out" / "pretrain_32.resume.pth"
    content = state.read_bytes()
    for broken in (content[:-500], b"", b"x" * 100):
        state.write_bytes(broken)
        assert_one_line_error(run(*words, "--resume"), state)
    torch.save({"weights": {}}, state)
    assert_one_line_error(run(*words, "--resume"), state, "omit --resume")


def test_a_fresh_run_over_an_old_one_is_refused(run, flags, tmp_path, pretrain_csv):
    words = ["1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 1]
    good(run(*words))
    assert_one_line_error(run(*words), tmp_path / "out" / "pretrain_32.pth", "--resume", "--overwrite")
    assert_one_line_error(run(*words, "--resume", "--overwrite"), "--resume", "--overwrite", code=2)
    good(run(*words, "--overwrite", "--seed", 5))


def test_a_reader_that_leaves_does_not_end_the_run(flags, tmp_path, pretrain_csv):
    words = ["1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 60, "--log_interval", 1]
    process, _ = start_script(words, until="step 3/")
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=180) == 0
    assert load_model(tmp_path / "out" / "pretrain_32.pth")[1]["step"] == 60


def test_resume_of_the_second_stage_refuses_another_parent(run, flags, tmp_path, pretrain_csv, sft_csv):
    for seed in (1, 2):
        out = ["--out_dir", tmp_path / str(seed), "--seed", seed]
        good(run("1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 1, *out))
    words = ["3-full_sft.py", *flags, "--data_path", sft_csv, "--max_steps", 4]
    first, second = (tmp_path / str(seed) / "pretrain_32.pth" for seed in (1, 2))
    good(run(*words, "--init_from", first, "--stop_after", 2))
    failed = run(*words, "--init_from", second, "--resume")
    own = tmp_path / "out" / "single_chat" / "full_sft_32.pth"
    assert_one_line_error(failed, first, second, f"--init_from {own}")
    first.unlink()  # the stage before need not be there any more
    good(run(*words, "--init_from", own, "--resume"))
    assert read_metadata(own)["parent"]["file"] == str(first) and read_metadata(own)["step"] == 4


@pytest.mark.parametrize(
    "words, parts, code",
    [
        (["--zero_stage", 2], ["--zero_stage", "--deepspeed"], 2),
        (["--offload"], ["--offload", "--deepspeed"], 2),
        (["--fsdp", "--deepspeed"], ["--fsdp", "choose one"], 2),
        (["--fsdp"], ["--fsdp", "torchrun --nproc_per_node N"], 2),
        (["--deepspeed", "--zero_stage", 4], ["argument --zero_stage: must be at most 3"], 2),
        (["--deepspeed", "no.json"], ["--deepspeed no.json: no such file"], 1),
        (["--deepspeed", "ds.json", "--dtype", "float32"], ["ds.json: bf16 is enabled", "--dtype is float32"], 2),
        (["--deepspeed", "--optimizer", "muon"], ["--optimizer muon: ZeRO stage 2"], 2),
        (["--deepspeed"], ["DeepSpeed is not installed: pip install deepspeed"], 1),
    ],
)
def test_what_cannot_be_divided_is_one_line(run, flags, pretrain_csv, monkeypatch, tmp_path, words, parts, code):
    (tmp_path / "ds.json").write_text('{"bf16": {"enabled": true}}')
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = [tmp_path / word if word == "ds.json" else word for word in words]
    assert_one_line_error(run("1-pretrain.py", *flags, "--data_path", pretrain_csv, *words), *parts, code=code)


def test_the_reference_of_stage_5_is_whole(run, tmp_path):
    assert_one_line_error(run("5-dpo_train.py", "--deepspeed"), "unrecognized arguments: --deepspeed", code=2)


def test_launchers_may_say_the_local_rank_by_a_flag(run, flags, pretrain_csv, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")
    words = ["1-pretrain.py", *flags, "--data_path", pretrain_csv, "--max_steps", 1]
    good(run(*words, "--local_rank=3"))
    assert os.environ["LOCAL_RANK"] == "3"
    good(run(*words, "--local-rank", "1", "--overwrite"))
    assert os.environ["LOCAL_RANK"] == "3"  # torchrun's word counts
