"""export_model.py: every format, there and back, and one clear line with nothing left behind where it cannot be."""

import functools
import hashlib
import json
import resource
import shutil

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoTokenizer

from conftest import assert_one_line_error, run_script, trained_scale
from model.checkpoint import load_model, save_checkpoint
from model.LMConfig import LMConfig
from model.tokenizer import tokenizer_hash

SHAPE = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)


def checkpoint(path, tokenizer, stage="multi_chat/full_sft", **fields):
    model = trained_scale(LMConfig(**{**SHAPE, **fields}, vocab_size=len(tokenizer)))
    metadata = {"stage": stage, "tokenizer_hash": tokenizer_hash(tokenizer), "validation_loss": 1.25, "step": 7}
    metadata["parent"] = {"file": "/home/somebody/out/parent.pth", "sha256": "0"}
    save_checkpoint(path, model, metadata)
    return model


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("dense") / "multi_chat/full_sft_32.pth"
    checkpoint(path, tokenizer)
    return path


@pytest.fixture(scope="module")
def experts(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("moe") / "full_sft_32_moe.pth"
    checkpoint(path, tokenizer, use_moe=True)
    return path


@pytest.fixture
def run(run_in_process, monkeypatch, tmp_path):
    """run_in_process of the script in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(run_in_process, "export_model.py")


def failed(result, *parts, code=1):
    assert result[0] == code and "Traceback" not in result[2], result
    (line,) = (line for line in result[2].splitlines() if "error: " in line)
    assert all(str(part) in line for part in parts), line


def same_weights(path, other):
    (first, _), (second, _) = load_model(path), load_model(other)
    return all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("kind", ["minimind", "llama"])
def test_a_dense_model_there_and_back_is_bit_equal(run, tmp_path, dense, kind):
    code, out, err = run("--checkpoint", dense, "--format", kind, "--output", tmp_path / "there")
    assert code == 0 and f"-> {kind}" in out and not err
    code, out, _ = run("--checkpoint", tmp_path / "there", "--format", "pth", "--output", tmp_path / "back.pth")
    assert code == 0
    assert same_weights(dense, tmp_path / "back.pth")
    plain = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(plain) == list(torch.load(dense, weights_only=True))
    record = json.loads((tmp_path / "back.json").read_text())
    assert record["parent"]["file"] == str(tmp_path / "there")
    assert f"its tokenizer: --tokenizer_path {tmp_path / 'there'}" in out
    assert record["tokenizer_hash"] == json.loads(dense.with_suffix(".json").read_text())["tokenizer_hash"]


@pytest.mark.parametrize("kind", ["minimind", "granitemoe"])
def test_a_mixture_of_experts_there_and_back_is_bit_equal(run, tmp_path, experts, kind):
    assert run("--checkpoint", experts, "--format", kind, "--output", "there")[0] == 0
    assert run("--checkpoint", "there", "--format", "pth", "--output", "back_32_moe.pth")[0] == 0
    assert same_weights(experts, tmp_path / "back_32_moe.pth")


def test_without_flags_the_latest_chat_model_becomes_a_folder(run, tmp_path, tokenizer):
    checkpoint(tmp_path / "out/multi_chat/full_sft_32.pth", tokenizer)
    assert run("--dim", 32, "--n_layers", 2, "--n_heads", 4, "--n_kv_heads", 2)[0] == 0
    assert (tmp_path / "out/export/full_sft_32_minimind/model.py").exists()


def test_the_card_tells_what_is_known(run, tmp_path, dense):
    sha256 = hashlib.sha256(dense.read_bytes()).hexdigest()
    scores = dict(accuracy=0.2556, correct=344, questions=1346, interval_95=[0.233, 0.2796], checkpoint_sha256=sha256)
    scores |= dict(verdict="not distinguishable from guessing", benchmark="C-Eval", prompt_format="chat", few_shot=5)
    scores |= dict(not_fitting=3)  # longer than the context
    (tmp_path / "summary.json").write_text(json.dumps(scores))
    words = ("--format", "llama", "--license", "cc-by-nc-4.0", "--scores", "summary.json", "--output", "card")
    assert run("--checkpoint", dense, *words)[0] == 0
    card = (tmp_path / "card/README.md").read_text("utf-8")
    for part in ("license: cc-by-nc-4.0", "2 x 32", "LlamaForCausalLM", "344 of 1346 = 25.56%", "23.30% to 27.96% of the 1343 asked",
                 "not distinguishable from guessing", "multi_chat/full_sft", "1.2500", "# card", sha256, "| parent.pth |",
                 "C-Eval, chat prompts, up to 5 examples", "counted as wrong | 3 |"):  # fmt: skip
        assert part in card
    (tmp_path / "summary.json").write_text(json.dumps({**scores, "checkpoint_sha256": "0" * 64}))
    failed(run("--checkpoint", dense, "--force", *words), "--scores", "another checkpoint")
    for text in ("[]", "{", '{"accuracy": 1}', json.dumps({**scores, "interval_95": 3})):
        (tmp_path / "summary.json").write_text(text)
        failed(run("--checkpoint", dense, "--force", *words), "summary.json", "eval_ceval.py")


def test_a_gguf_has_a_modelfile_beside_it(run, tmp_path, dense):
    code, out, _ = run("--checkpoint", dense, "--format", "gguf", "--output", "made/chat.gguf")
    assert code == 0 and "chat.gguf: " in out
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"chat.gguf", "Modelfile"}
    modelfile = (tmp_path / "made/Modelfile").read_text("utf-8")
    assert modelfile.startswith("FROM ./chat.gguf\n") and "PARAMETER stop </s>" in modelfile
    assert '{{ if eq .Role "system" }}<s>system\n{{ .Content }}</s>\n{{ else if eq .Role "user" }}' in modelfile
    assert modelfile.count("<s>assistant\n") == 2 and "num_ctx 64" in modelfile
    for number_format in ("f16", "f32"):  # beside each other, with a Modelfile each
        words = ("--quantization", number_format, "--output", f"made/{number_format}.gguf")
        assert run("--checkpoint", dense, "--format", "gguf", *words)[0] == 0
        assert (
            (tmp_path / f"made/{number_format}.Modelfile").read_text("utf-8").startswith(f"FROM ./{number_format}.gguf")
        )
    assert (tmp_path / "made/Modelfile").read_text("utf-8") == modelfile
    failed(run("--checkpoint", dense, "--format", "gguf", "--output", "made/chat.gguf"), "chat.gguf", "--force")
    (tmp_path / "made/chat.gguf").unlink()
    failed(run("--checkpoint", dense, "--format", "gguf", "--output", "made/chat.gguf"), "Modelfile", "--force")
    assert run("--checkpoint", dense, "--format", "gguf", "--output", "made/chat.gguf", "--force")[0] == 0
    assert run("--checkpoint", dense, "--format", "gguf")[0] == 0
    made = {path.name for path in (tmp_path / "out/export/full_sft_32_gguf").iterdir()}
    assert made == {"full_sft_32_q8_0.gguf", "Modelfile"}


def test_a_bare_pth_takes_its_heads_from_the_flag_and_yarn_is_carried_over(run, tmp_path, tokenizer, dense):
    bare = tmp_path / "bare.pth"
    torch.save(torch.load(dense, weights_only=True), bare)
    failed(run("--checkpoint", bare, "--n_heads", 64, "--format", "llama", "--output", "x"), "bare.pth", "--n_heads")
    words = ("--n_heads", 4, "--max_seq_len", 1024, "--rope_scaling", "yarn")
    code, _, err = run("--checkpoint", bare, *words, "--format", "llama", "--output", "long")
    assert code == 0 and "cannot tell which tokenizer" in err, err
    model, _ = load_model(tmp_path / "long")
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
    assert model.config.rope_scaling == scaling and model.config.max_seq_len == 1024 and model.config.n_heads == 4


def test_half_precision_halves_the_file(run, tmp_path, dense):
    for dtype in ("float32", "float16"):
        assert run("--checkpoint", dense, "--format", "pth", "--dtype", dtype, "--output", f"{dtype}.pth")[0] == 0
    sizes = [(tmp_path / f"{dtype}.pth").stat().st_size for dtype in ("float32", "float16")]
    assert 1.8 < sizes[0] / sizes[1] < 2.1
    assert load_model(tmp_path / "float16.pth")[1]["stage"] == "multi_chat/full_sft"


@pytest.mark.parametrize(
    "words, parts, code",
    [
        (["--format", "granitemoe", "--output", "x"], ["--format granitemoe", "dense", "--format llama"], 2),
        (["--format", "gguf", "--output", "x"], ["--output x", "ends in .gguf"], 2),
        (["--format", "pth", "--output", "x.gguf"], ["--output x.gguf", "ends in .pth"], 2),
        (["--format", "gguf", "--dtype", "float16", "--output", "x.gguf"], ["--dtype"], 2),
        (["--format", "llama", "--quantization", "f16", "--output", "x"], ["--quantization"], 2),
        (["--format", "pth", "--license", "mit", "--output", "x.pth"], ["--license"], 2),
        (["--format", "gguf", "--scores", "s.json", "--output", "x.gguf"], ["--scores", "--push_to_hub"], 2),
        (["--format", "pth", "--output", "x.resume.pth"], ["x.resume.pth"], 2),
        (["--private"], ["--private", "--push_to_hub"], 2),
        (["--push_to_hub", "a b/c"], ["--push_to_hub a b/c"], 2),
        (["--output", "."], ["is there already"], 1),
        (["--format", "gguf", "--output", "."], ["ends in .gguf"], 2),
        (["--output", "/"], ["is there already"], 1),
        (["--format", "onnx"], ["--format", "onnx"], 2),
    ],
)
def test_wrong_usage_is_one_line_and_leaves_nothing(run, tmp_path, dense, words, parts, code):
    failed(run("--checkpoint", dense, *words), *parts, code=code)
    assert not list(tmp_path.iterdir())


def test_experts_as_llama_are_refused(run, tmp_path, experts):
    failed(run("--checkpoint", experts, "--format", "llama"), "mixture of experts", "--format granitemoe", code=2)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_replaced_only_when_forced_and_only_if_it_is_an_export(run, tmp_path, dense, experts):
    assert run("--checkpoint", dense, "--format", "llama", "--output", "there")[0] == 0
    before = (tmp_path / "there/model.safetensors").read_bytes()
    failed(run("--checkpoint", dense, "--output", "there"), "there", "--force")
    assert not (tmp_path / "there/model.py").exists() and (tmp_path / "there/model.safetensors").read_bytes() == before
    assert run("--checkpoint", experts, "--output", "there", "--force")[0] == 0
    assert (tmp_path / "there/model.py").exists() and load_model(tmp_path / "there")[0].config.use_moe
    assert run("--checkpoint", dense, "--format", "llama", "--output", "there", "--force")[0] == 0
    assert not (tmp_path / "there/model.py").exists()  # nothing of the earlier one stays
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    (tmp_path / "there/LMConfig.py").mkdir()
    failed(run("--checkpoint", dense, "--output", "there", "--force"), "there", "LMConfig.py")
    (tmp_path / "there/LMConfig.py").rmdir()
    (tmp_path / "there/diary.txt").write_text("mine")
    failed(run("--checkpoint", dense, "--output", "there", "--force"), "there", "diary.txt")
    assert (tmp_path / "there/diary.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    failed(run("--checkpoint", dense, "--output", "file", "--force"), "file", "not a folder")
    (tmp_path / "x.gguf").mkdir()
    failed(run("--checkpoint", dense, "--format", "gguf", "--output", "x.gguf", "--force"), "x.gguf", "folder")


def test_damaged_and_foreign_sources(run, tmp_path, dense, small_tokenizer_path):
    failed(run("--checkpoint", "none.pth"), "none.pth", "no such checkpoint")
    failed(run("--checkpoint", dense, "--tokenizer_path", small_tokenizer_path), "6400 words but the tokenizer 400")
    (tmp_path / "empty").mkdir()
    failed(run("--checkpoint", "empty", "--format", "pth"), "empty", "config.json")
    (tmp_path / "empty/config.json").write_text('{"model_type": "gpt2"}')
    failed(run("--checkpoint", "empty", "--format", "pth"), "empty/config.json", "'gpt2'", "llama")
    (tmp_path / "empty/config.json").unlink()
    (tmp_path / "empty").rmdir()
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_could_be_resumed_is_not_replaced(run, tmp_path, dense):
    (tmp_path / "x.resume.pth").write_bytes(b"mine")
    words = ("--checkpoint", dense, "--format", "pth", "--force", "--output", "x.pth")
    failed(run(*words), "x.resume.pth is there", "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["x.resume.pth"]


def test_a_damaged_description_costs_the_card_its_lines_only(run, tmp_path, dense):
    torch.save(torch.load(dense, weights_only=True), tmp_path / "odd.pth")
    record = json.loads(dense.with_suffix(".json").read_text())
    record.pop("weights_sha256")
    for fields in (
        dict(step="abc", parent="x"),
        dict(tokens_seen=[1], parent={"x": 1}),
        dict(validation_loss="x", stage=None),
    ):
        (tmp_path / "odd.json").write_text(json.dumps({**record, **fields}))
        assert run("--checkpoint", "odd.pth", "--output", "card", "--force")[0] == 0


def test_a_tokenizer_without_a_chat_template_gets_the_one_that_was_used(run, tmp_path, dense, tokenizer):
    bare = shutil.copytree(tokenizer.name_or_path, tmp_path / "bare")
    config = json.loads((bare / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    words = ("--checkpoint", dense, "--tokenizer_path", bare)
    assert run(*words, "--format", "llama", "--output", "there")[0] == 0
    assert (tmp_path / "there/chat_template.jinja").read_text("utf-8") == tokenizer.chat_template
    assert tokenizer.chat_template in (tmp_path / "there/README.md").read_text("utf-8")
    assert AutoTokenizer.from_pretrained(tmp_path / "there").chat_template == tokenizer.chat_template
    assert run(*words, "--format", "gguf", "--output", "x.gguf")[0] == 0
    assert GGUFReader(tmp_path / "x.gguf").fields["tokenizer.chat_template"].contents() == tokenizer.chat_template


def test_a_template_that_is_no_frame_leaves_no_half_export(run, tmp_path, dense, tokenizer):
    odd = shutil.copytree(tokenizer.name_or_path, tmp_path / "odd")
    config = json.loads((odd / "tokenizer_config.json").read_text())
    (odd / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages[0]['content'] }}"}))
    words = ("--tokenizer_path", odd, "--format", "gguf", "--output", "made/x.gguf")
    failed(run("--checkpoint", dense, *words), "odd: its chat template")
    assert not (tmp_path / "made").exists() or not list((tmp_path / "made").iterdir())


@pytest.mark.parametrize("kind, output", [("minimind", "x"), ("gguf", "x.gguf")])
def test_a_full_disk_leaves_nothing(tmp_path, dense, kind, output):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    words = ["--checkpoint", dense, "--format", kind, "--output", tmp_path / "made" / output]
    words += ["--quantization", "f32"] if kind == "gguf" else []
    process = run_script("export_model.py", *words, preexec_fn=small_files)
    problem = "x: File too large" if kind == "minimind" else "x.gguf: could not be written completely"
    assert_one_line_error(process, problem)
    assert not (tmp_path / "made").exists() or not list((tmp_path / "made").iterdir())
