"""The model card, README.md of an export: what the model is, how it was trained, how well it does, how to run it."""

import dataclasses
import json
from pathlib import Path

from model.convert import CLASSES, stock_type
from model.errors import UserError
from model.tokenizer import chat_template

# What a card takes from eval_ceval.py's summary.json, and of which type it is.
SCORES = dict(
    benchmark=str, checkpoint_sha256=str, accuracy=float, correct=int, questions=int, interval_95=list, verdict=str,
    prompt_format=str, few_shot=int, not_fitting=int,
)  # fmt: skip


@dataclasses.dataclass
class Card:
    """What a card says besides the configuration. name: of the model. metadata: the .json beside the checkpoint, {} when
    there is none. sha256: of the checkpoint's weights. licence: an identifier as the Hugging Face hub knows them. scores:
    what eval_ceval.py wrote as summary.json, or None."""

    name: str
    metadata: dict
    sha256: str
    licence: str
    scores: dict | None = None


def read_scores(path):
    """The object in the summary.json of eval_ceval.py. Raises UserError when it is something else."""
    try:
        with open(path, encoding="utf-8") as handle:
            scores = json.load(handle)
        if all(isinstance(scores[name], kind) for name, kind in SCORES.items()) and len(scores["interval_95"]) == 2:
            return scores
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{path}: not the summary.json that eval_ceval.py writes")


def model_card(card, config, tokenizer, kind):
    """The card's text (Markdown). kind: "minimind", "llama", "granitemoe" or "gguf". Raises UserError for scores of
    another checkpoint."""
    if card.scores and card.scores["checkpoint_sha256"] != card.sha256:
        raise UserError("--scores: are of another checkpoint; run eval_ceval.py on this one")
    example = {"minimind": EXAMPLE_MINIMIND, "gguf": EXAMPLE_GGUF}.get(kind, EXAMPLE_STOCK)
    parts = [
        front_matter(card, kind),
        f"# {card.name}\n\nA small Chinese language model, trained with MiniMind from an empty folder.",
        "## Configuration\n\n" + table(configuration(config, kind)),
        "## Training\n\n" + table(training(card)),
        "## Scores\n\n" + (table(ceval(card.scores)) if card.scores else "Not measured; eval_ceval.py does."),
        "## How to run it\n\n" + example.replace("QUESTION", "你是谁？").replace("NAME", card.name),
        "## Chat format\n\n" + CHAT_FORMAT + f"\n\n```jinja\n{chat_template(tokenizer)}\n```",
        f"## Licence\n\n{card.licence} (the weights; MiniMind's code is Apache-2.0).",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(card, kind):
    library = "gguf" if kind == "gguf" else "transformers"
    lines = [
        f"license: {card.licence}",
        "language:",
        "- zh",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
    ]
    return "\n".join(["---", *lines, "tags:", "- minimind", "---"])


def table(rows):
    """A Markdown table of {name: value}; None is left out."""
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def configuration(config, kind):
    architecture = "MiniMind (custom code)" if kind == "minimind" else f"{CLASSES[stock_type(config)]}ForCausalLM"
    experts = (
        f"{config.n_routed_experts} routed, {config.num_experts_per_tok} a token, {config.n_shared_experts} shared"
    )
    return {
        "architecture": architecture,
        "layers x width": f"{config.n_layers} x {config.dim}",
        "query heads / key-value heads / head size": f"{config.n_heads} / {config.n_kv_heads} / {config.head_dim}",
        "feed-forward width": config.hidden_dim,
        "experts": experts if config.use_moe else None,
        "vocabulary": config.vocab_size,
        "context": f"{config.max_seq_len} tokens",
        "RoPE scaling": json.dumps(config.rope_scaling) if config.rope_scaling else None,
    }


def training(card):
    names = ("step", "tokens_seen", "validation_loss", "validation_bits_per_byte")
    known = {name: value for name, value in card.metadata.items() if name in names and isinstance(value, (int, float))}
    step, tokens, loss, bits = map(known.get, names)
    parent = card.metadata.get("parent")
    return {
        "stage": card.metadata.get("stage") or "unknown",
        "started from": Path(str(parent["file"])).name if isinstance(parent, dict) and "file" in parent else None,
        "steps": f"{step:,}" if step else None,
        "tokens seen in this stage": f"{tokens:,}" if tokens else None,
        "held-out loss": f"{loss:.4f}" if loss else None,
        "held-out bits per byte": f"{bits:.4f}" if bits else None,
        "sha256 of the checkpoint": card.sha256,
    }


def ceval(scores):
    low, high = (f"{bound:.2%}" for bound in scores["interval_95"])
    asked = scores["questions"] - scores["not_fitting"]
    return {
        "exam": f"{scores['benchmark']}, {scores['prompt_format']} prompts, up to {scores['few_shot']} examples",
        "right": f"{scores['correct']} of {scores['questions']} = {scores['accuracy']:.2%}",
        "95 % interval": f"{low} to {high}" + (f" of the {asked} asked" if asked < scores["questions"] else ""),
        "verdict": scores["verdict"],
        "longer than the context, counted as wrong": scores["not_fitting"] or None,
    }


CHAT_FORMAT = "The tokenizer brings this template along; `</s>` ends an answer."

EXAMPLE_MINIMIND = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
messages = [{"role": "user", "content": "QUESTION"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=128, do_sample=False)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```

`LMConfig.py` and `model.py` are the model's code; read them before you trust them. transformers' Trainer can train it;
a mixture of experts has its balance loss in `outputs.aux_loss`, to be added to `outputs.loss` in `compute_loss`."""

EXAMPLE_STOCK = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{"role": "user", "content": "QUESTION"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=128, do_sample=False)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```

It is a stock architecture: no code of its own, so programs that know the architecture take the folder as it is."""

EXAMPLE_GGUF = """```sh
llama-cli -m NAME.gguf --jinja        # llama.cpp, a chat in the terminal
llama-server -m NAME.gguf --jinja     # an OpenAI-compatible server
ollama create NAME -f Modelfile && ollama run NAME
```"""
