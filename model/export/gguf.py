"""One GGUF file: weights, tokenizer and chat template for llama.cpp and what is built on it (Ollama, LM Studio).

llama.cpp's "llama" and "granitemoe" turn neighbouring pairs in rotary embedding, as MiniMind does: no row is moved.
"""

import contextlib
import json
import math
import sys

import torch

from model.convert import stock_config
from model.errors import UserError
from model.files import atomic_files
from model.tokenizer import chat_template

# llama.cpp's name of a splitting -> the steps of the pre_tokenizer in tokenizer.json.
SPLITTINGS = {
    "gpt-2": [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}],
    "superbpe": [
        {"type": "Split", "pattern": {"Regex": "\\n"}, "behavior": "Isolated", "invert": False},
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ],
}
BLOCK = 32  # numbers of a row that share a scale in q8_0
OUTER_NAMES = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
LAYER_NAMES = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "feed_forward.gate": "ffn_gate_inp",
    "feed_forward.shared_experts.w1": "ffn_gate_shexp",
    "feed_forward.shared_experts.w2": "ffn_down_shexp",
    "feed_forward.shared_experts.w3": "ffn_up_shexp",
}
EXPERT_NAMES = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


def write_gguf(path, model, tokenizer, quantization, name, licence, beside=None):
    """Write the Transformer `model` and its tokenizer as the file `path`, and the texts `beside`, {path: text}: all of them
    or none. quantization: number format of the matrices ("f32", "f16", "bf16" or "q8_0"); norms and routers stay float32.
    name, licence: what the file says of itself.

    Raises UserError for a router or a tokenizer that llama.cpp does not have, OSError for a full disk.
    """
    import gguf

    with atomic_files() as create:
        for text_path, text in (beside or {}).items():
            create(text_path, "w", encoding="utf-8").write(text)
        writer = gguf.GGUFWriter(create(path).name, "granitemoe" if model.config.use_moe else "llama")
        try:
            writer.add_name(name)
            writer.add_license(licence)
            add_config(writer, model.config)
            add_tokenizer(writer, tokenizer)
            for tensor_name, tensor in gguf_weights(model.state_dict(), model.config).items():
                kind = tensor_type(tensor_name, tensor, quantization)
                writer.add_tensor(tensor_name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
            writer.add_file_type(gguf.LlamaFileType[file_type(quantization)])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file(progress=sys.stderr.isatty())
        except OSError as error:
            if error.errno is None:  # numpy's, which does not say why
                raise UserError(f"{path}: could not be written completely; is the disk full?") from None
            raise
        finally:
            with contextlib.suppress(OSError):  # a full disk again, while buffers are flushed
                writer.close()


def file_type(quantization):
    """The name in gguf.LlamaFileType of a file of mostly this number format."""
    return "ALL_F32" if quantization == "f32" else f"MOSTLY_{quantization.upper()}"


def tensor_type(name, tensor, quantization):
    """gguf's type of one tensor. Rows that do not divide into blocks stay float16."""
    from gguf import GGMLQuantizationType

    if tensor.dim() == 1 or "ffn_gate_inp" in name:
        return GGMLQuantizationType.F32
    if quantization == "q8_0" and tensor.shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[quantization.upper()]


def add_config(writer, config):
    """The LMConfig as llama.cpp's keys. Raises UserError for a router that no stock architecture has."""
    import gguf

    try:
        stock = stock_config(config)
    except ValueError as error:
        raise UserError(f"--format gguf: {error}") from None
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if scaling := stock["rope_scaling"]:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        if scaling["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(round(scaling["original_max_position_embeddings"]))
            if (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1) != (32, 1):
                raise UserError(
                    "--format gguf: llama.cpp takes YaRN's beta_fast 32 and beta_slow 1 only, not this model's"
                )
            if attention_factor := scaling.get("attention_factor"):  # llama.cpp multiplies it by the usual one
                writer.add_rope_scaling_attn_factors(attention_factor / (0.1 * math.log(scaling["factor"]) + 1.0))
    if config.use_moe:
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_shared_feed_forward_length(stock["shared_intermediate_size"])
        writer.add_attention_scale(stock["attention_multiplier"])
        writer.add_embedding_scale(1.0)
        writer.add_residual_scale(1.0)
        writer.add_logit_scale(1.0)


def gguf_weights(state, config):
    """{llama.cpp's name: tensor} of v1's state dict; an expert matrix of all experts is one tensor [E, ...]. The output
    matrix is tied and left out."""
    weights = {theirs: state[ours] for ours, theirs in OUTER_NAMES.items()}
    for layer in range(config.n_layers):
        ours, theirs = f"layers.{layer}", f"blk.{layer}"
        for name, their_name in LAYER_NAMES.items():
            if f"{ours}.{name}.weight" in state:
                weights[f"{theirs}.{their_name}.weight"] = state[f"{ours}.{name}.weight"]
        for name, their_name in EXPERT_NAMES.items() if config.use_moe else ():
            experts = [f"{ours}.feed_forward.experts.{index}.{name}.weight" for index in range(config.n_routed_experts)]
            weights[f"{theirs}.{their_name}.weight"] = torch.stack([state[expert] for expert in experts])
    return weights


def add_tokenizer(writer, tokenizer):
    """Vocabulary, merges, control tokens and chat template. Raises UserError for a tokenizer that is no byte-level BPE or
    that splits text in a way for which llama.cpp has no name."""
    import gguf

    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    split = splitting_name(definition)
    if split is None:
        problem = "this tokenizer splits text in a way for which llama.cpp has no name"
        raise UserError(f"--format gguf: {problem}; the formats llama and minimind carry it along")
    vocabulary = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    control = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([vocabulary[token_id] for token_id in range(len(vocabulary))])
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if index in control else kinds.NORMAL for index in range(len(vocabulary))])
    merges = definition["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for add, token_id in (
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(chat_template(tokenizer))


def splitting_name(definition):
    """llama.cpp's name for how a tokenizer.json, a dict, cuts text before it merges; None when it has none.

    "superbpe" cuts out runs of digits and nothing else. So do the tokenizers made here, which besides cut between the
    digits and around line breaks: places that no merge of theirs crosses, so that the tokens are the same.
    """
    model, splitter = definition["model"], definition["pre_tokenizer"] or {}
    special = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    if definition["normalizer"] or model["type"] != "BPE" or any(model.get(name) for name in special):
        return None
    parts = [
        {name: value for name, value in part.items() if name != "trim_offsets"}  # decides no token
        for part in splitter.get("pretokenizers", [splitter])
    ]
    return next((name for name, known in SPLITTINGS.items() if parts == known), None)
