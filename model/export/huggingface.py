"""Hugging Face folders: MiniMind with its own code beside it, or a stock class of transformers that needs none."""

import json
import shutil
from pathlib import Path

import safetensors.torch

from model.checkpoint import CONFIG_FIELDS
from model.convert import stock_config, stock_weights
from model.device import DTYPES
from model.errors import UserError
from model.export.card import model_card
from model.files import atomic_folder
from model.tokenizer import chat_template

CODE = ("LMConfig.py", "model.py")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# All that an export may hold: a folder with anything else in it is not replaced.
FILES = {*CODE, *TOKENIZER, "config.json", "generation_config.json", "model.safetensors", "README.md"}


def write_folder(path, model, tokenizer, kind, dtype, card):
    """Write the folder `path`, complete or not at all; an export that is there is replaced.

    model: a Transformer. kind: "minimind" (custom code), "llama" (dense; a Mistral where LlamaConfig refuses the shape) or
    "granitemoe". dtype: of the weights, a name of model.device.DTYPES. card: model.export.card.Card. Raises UserError for a
    model of the other kind, OSError for a full disk.
    """
    config, state = model.config, model.state_dict()
    if kind == "minimind":
        description = minimind_config(config)
        weights = {name: tensor for name, tensor in state.items() if name != "output.weight"}  # tied
    else:
        check_kind(config, kind)
        try:
            description = stock_config(config)
        except ValueError as error:
            raise UserError(f"--format {kind}: {error}; --format minimind can") from None
        weights = stock_weights(state, config)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    description.update(ids, dtype=dtype, torch_dtype=dtype)  # transformers 5 and 4
    weights = {name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in weights.items()}
    with atomic_folder(path) as folder:
        (folder / "model.safetensors").write_bytes(safetensors.torch.save(weights, {"format": "pt"}))
        write_json(folder / "config.json", description)
        write_json(folder / "generation_config.json", ids)
        sources = [Path(tokenizer.name_or_path, name) for name in TOKENIZER]
        if kind == "minimind":
            sources += [Path(__file__).parent.parent / name for name in CODE]
        for source in sources:
            if source.exists():
                shutil.copyfile(source, folder / source.name)
        if not tokenizer.chat_template:  # ours is what this project used; other programs must not guess
            (folder / "chat_template.jinja").write_text(chat_template(tokenizer), "utf-8")
        (folder / "README.md").write_text(model_card(card, config, tokenizer, kind), "utf-8")


def check_kind(config, kind):
    """Raise UserError (exit code 2) for a dense model as granitemoe or a mixture of experts as llama."""
    right = "granitemoe" if config.use_moe else "llama"
    if kind != right:
        what = "a mixture of experts" if config.use_moe else "dense"
        raise UserError(f"--format {kind}: the model is {what}; its stock class is --format {right}", exit_code=2)


def minimind_config(config):
    """config.json of MiniMind's own classes, a dict."""
    fields = {name: getattr(config, name) for name in CONFIG_FIELDS}
    classes = {"AutoConfig": "LMConfig.LMConfig", "AutoModelForCausalLM": "model.Transformer"}
    return dict(
        architectures=["Transformer"], model_type=config.model_type, auto_map=classes, **fields, tie_word_embeddings=True
    )  # fmt: skip


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")
