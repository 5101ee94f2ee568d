"""A folder with our own code works in transformers as its own models do, in a directory without this project."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from conftest import trained_scale
from model.export.card import Card
from model.export.huggingface import write_folder
from model.inference.engine import Engine
from model.LMConfig import LMConfig
from model.settings import SamplingParameters

BASE = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=128, vocab_size=6400)
CARD = Card("tiny", {}, "0" * 64, "mit")
PROMPTS = [[1, 40, 50], [1, *range(100, 130)], [1, 7, 8, 9, 10, 11, 12]]

# What a user of the folder writes; it cannot import anything of this project.
GENERATE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
prompts, result = json.loads(sys.argv[2]), {}
width = max(map(len, prompts))
ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
settings = dict(max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
result["together"] = model.generate(ids, attention_mask=mask, **settings)[:, width:].tolist()
for name, cache in (("alone", True), ("without cache", False)):
    answers = [model.generate(torch.tensor([prompt]), use_cache=cache, **settings) for prompt in prompts]
    result[name] = [answer[0, len(prompt) :].tolist() for prompt, answer in zip(prompts, answers)]
result["class"] = type(model).__module__.split(".")[0]
result["project"] = "model.tokenizer" in sys.modules
messages = [{"role": "user", "content": "你好"}]
result["prompt"] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
result["tied"] = model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()
print(json.dumps(result))
"""

TRAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
rows = torch.randint(3, 6400, (8, 24))
labels = rows.clone()
labels[:, :5] = -100
labels[0, :20] = -100
data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels)]

def mean_loss(checkpointing):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.zero_grad()
    loss = model(input_ids=rows, labels=labels).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

plain, checkpointed = mean_loss(False), mean_loss(True)
same = plain[0] == checkpointed[0] and torch.allclose(plain[1], checkpointed[1], atol=1e-6)
arguments = TrainingArguments("trained", per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=3,
    learning_rate=0.02, logging_steps=1, use_cpu=True, report_to=[], lr_scheduler_type="constant", max_grad_norm=0,
    gradient_checkpointing=True, save_strategy="no")
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train()
trainer.save_model("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
kept = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(json.dumps(dict(plain=plain[0], same=same, losses=losses, kept=kept)))
"""


def in_an_empty_directory(program, folder, *words):
    """The last line, read as JSON, that a program prints in a directory that holds nothing but the folder."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", program, folder.name, *words],
        cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(use_moe=True, n_shared_experts=2, rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        dict(dim=50, head_dim=12),
    ],
    ids=["dense", "experts and yarn", "odd heads"],
)
def test_the_folder_with_code_generates_what_our_engine_does(tmp_path, tokenizer, fields):
    model = trained_scale(LMConfig(**{**BASE, **fields}))
    write_folder(tmp_path / "tiny", model, tokenizer, "minimind", "float32", CARD)
    result = in_an_empty_directory(GENERATE, tmp_path / "tiny", json.dumps(PROMPTS))
    assert result["class"] == "transformers_modules" and not result["project"] and result["tied"]
    greedy = SamplingParameters(temperature=0, max_new_tokens=30, stop_token_ids=())
    expected = [request.token_ids for request in Engine(model, tokenizer).generate(PROMPTS, greedy)]
    assert result["together"] == result["alone"] == result["without cache"] == expected
    chat = [{"role": "user", "content": "你好"}]
    assert result["prompt"] == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


def test_transformers_trains_the_folder_with_code(tmp_path, tokenizer):
    """Trainer hands over labels and num_items_in_batch: four micro-batches with unequal numbers of targets are one
    batch. Gradient checkpointing changes nothing."""
    write_folder(tmp_path / "tiny", trained_scale(LMConfig(**BASE)), tokenizer, "minimind", "float32", CARD)
    result = in_an_empty_directory(TRAIN, tmp_path / "tiny")
    assert result["same"] and result["kept"]
    assert abs(result["losses"][0] - result["plain"]) < 1e-3 * result["plain"]
    assert result["losses"][2] < result["losses"][0]


@pytest.mark.parametrize("kind, fields", [("llama", {}), ("granitemoe", dict(use_moe=True)), ("minimind", {})])
def test_every_folder_is_complete_and_in_the_number_format_asked_for(tmp_path, tokenizer, kind, fields):
    from transformers import AutoModelForCausalLM

    model = trained_scale(LMConfig(**BASE, **fields))
    write_folder(tmp_path / "half", model, tokenizer, kind, "bfloat16", CARD)
    names = {path.name for path in (tmp_path / "half").iterdir()}
    files = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    files |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert names == files | ({"LMConfig.py", "model.py"} if kind == "minimind" else set())
    description = json.loads((tmp_path / "half/config.json").read_text())
    assert (description["bos_token_id"], description["eos_token_id"], description["pad_token_id"]) == (1, 2, 0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half", trust_remote_code=kind == "minimind")
    assert loaded.dtype == torch.bfloat16 and loaded.generation_config.eos_token_id == 2
    stored = safetensors.torch.load_file(tmp_path / "half/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert torch.equal(loaded.get_input_embeddings().weight, model.tok_embeddings.weight.to(torch.bfloat16))


def test_older_transformers_find_what_they_look_for(tmp_path, tokenizer):
    """transformers 4.57 and vLLM read rope_theta, rope_scaling and torch_dtype; Mistral's window must be said to be none."""
    yarn = {"rope_type": "yarn", "factor": 4.0}
    model = trained_scale(LMConfig(**{**BASE, "dim": 50}, head_dim=12, rope_theta=5e4, rope_scaling=yarn))
    write_folder(tmp_path / "old", model, tokenizer, "llama", "float32", CARD)
    description = json.loads((tmp_path / "old/config.json").read_text())
    assert description["architectures"] == ["MistralForCausalLM"] and description["sliding_window"] is None
    assert description["rope_theta"] == 5e4 and description["torch_dtype"] == description["dtype"] == "float32"
    assert description["rope_scaling"] == {**yarn, "original_max_position_embeddings": 32}
    assert description["rope_parameters"] == {**description["rope_scaling"], "rope_theta": 5e4}
