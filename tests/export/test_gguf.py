"""The GGUF is proven by llama.cpp itself: it splits text as our tokenizer does, says the same greedy words, and chats."""

import json
import random
import unicodedata
import urllib.request

import gguf
import pytest
import torch
import xllamacpp

from conftest import trained_scale
from model.errors import UserError
from model.export.gguf import write_gguf
from model.inference.engine import Engine
from model.LMConfig import LMConfig
from model.settings import SamplingParameters
from model.tokenizer import encode_text, render_conversation

BASE = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=256, vocab_size=6400)
YARN = {"rope_type": "yarn", "factor": 4.0}


class LlamaCpp:
    """A GGUF behind llama.cpp's own server, with keys, values and attention in float32 as ours are."""

    def __init__(self, path):
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_parallel, parameters.n_ctx, parameters.n_gpu_layers, parameters.verbosity = 1, 256, 0, -1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(parameters)
        self.greedy([5, 6, 7], 1)  # a server that is let go before its loop runs would wait for ever

    def post(self, route, **body):
        request = urllib.request.Request(
            self.server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokens(self, text):
        return self.post("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]

    def greedy(self, ids, count):
        settings = dict(temperature=0, cache_prompt=False, return_tokens=True)
        return self.post("/completion", prompt=ids, n_predict=count, **settings)["tokens"]


def exported(tmp_path, tokenizer, quantization="f32", **fields):
    """(a model with the fields, the GGUF of it in llama.cpp)."""
    model = trained_scale(LMConfig(**{**BASE, **fields}))
    write_gguf(tmp_path / "x.gguf", model, tokenizer, quantization, "x", "mit")
    return model, LlamaCpp(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(dim=96, n_heads=5, n_kv_heads=5, head_dim=18, rope_theta=5e5, norm_eps=0.3),
        dict(rope_scaling={"rope_type": "linear", "factor": 4}),
        dict(rope_scaling=YARN),
        dict(rope_scaling={**YARN, "attention_factor": 1.3, "original_max_position_embeddings": 50}),
        dict(use_moe=True, n_shared_experts=0),
        dict(use_moe=True, n_shared_experts=1, rope_scaling=YARN),
        dict(use_moe=True, n_shared_experts=2, n_routed_experts=5, num_experts_per_tok=3),
    ],
)
def test_greedy_tokens_are_those_of_our_engine(tmp_path, tokenizer, fields):
    model, llama = exported(tmp_path, tokenizer, **fields)
    engine, chance = Engine(model, tokenizer), random.Random(0)
    prompts = [[chance.randrange(3, 6400) for _ in range(length)] for length in (5, 40, 90)]
    for prompt, ours in zip(prompts, engine.generate(prompts, SamplingParameters(temperature=0, max_new_tokens=64))):
        theirs = llama.greedy(prompt, 64)
        assert theirs[: len(ours.token_ids)] == ours.token_ids and len(ours.token_ids) > 10


@pytest.mark.parametrize("quantization, error", [("f16", 0.01), ("bf16", 0.05), ("q8_0", 0.02)])
@pytest.mark.parametrize("moe", [False, True])
def test_each_number_format_keeps_the_weights_as_well_as_it_can(tmp_path, tokenizer, quantization, error, moe):
    model, llama = exported(tmp_path, tokenizer, quantization, use_moe=moe)
    assert len(llama.greedy([5, 6, 7], 8)) > 0
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    stored = tensors["blk.1.ffn_down_exps.weight" if moe else "blk.1.ffn_down.weight"]
    feed_forward = model.layers[1].feed_forward
    weight = torch.stack([expert.w2.weight for expert in feed_forward.experts]) if moe else feed_forward.w2.weight
    values = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type)).view(weight.shape)
    assert 0 < (values - weight).norm() / weight.norm() < error
    kinds = {name: gguf.GGMLQuantizationType(tensor.tensor_type).name for name, tensor in tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == quantization.upper() and kinds["blk.0.attn_norm.weight"] == "F32"
    assert not moe or kinds["blk.0.ffn_gate_inp.weight"] == "F32"


def test_rows_that_do_not_divide_into_blocks_stay_half_precision(tmp_path, tokenizer):
    _, llama = exported(tmp_path, tokenizer, "q8_0", dim=48, hidden_dim=64, n_heads=3, n_kv_heads=1)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert len(llama.greedy([5, 6, 7], 8)) > 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer):
    return exported(tmp_path_factory.mktemp("gguf"), tokenizer)[1]


def strings():
    """1,000 texts: prose, code, digits of many scripts, emoji, rare and broken things, and mixtures of them."""
    chance = random.Random(0)
    pieces = """中文 长江是亚洲最长的河流。 世界上最高的山峰是珠穆朗玛峰，海拔8848.86米。 2024年3月15日 def f(x):\n\treturn x**2 {"a":[1,2]}
    it's we'll I'd ①②③ ½ ٣٤٥ १२३ 〇一二 ２０２４ Ⅳ 1,000,000 3.14 1e-5 😀 👨‍👩‍👧‍👦 🇨🇳 ✍🏽 한국어 русский العربية हिन्दी ไทย \u200b \ufeff é e\u0301
    \U00020000 \U0002a6d6 ﷽ ～ … —— 「」 <s> </s> <unk> < s> user assistant 🀄 ㊙ ㍿ ℃ \x07 \x7f \xa0 \u3000 \u2028""".split(
        " "
    )
    pieces += ["\n", "\n\n", " ", "   ", "\t", "\r\n", "\n \n", "0", "007", "的", "了"]
    fixed = ["", " ", "\n", *pieces]
    made = ["".join(chance.choices(pieces, k=chance.randint(1, 12))) for _ in range(700)]
    wild = [
        "".join(
            chr(chance.choice((chance.randrange(32, 0xD800), chance.randrange(0xE000, 0x110000)))) for _ in range(20)
        )
    ]
    for _ in range(1000 - len(fixed) - len(made) - len(wild)):
        wild.append("".join(chr(chance.randrange(32, 0x3000)) for _ in range(chance.randint(1, 30))))
    return [*fixed, *made, *wild]


def test_text_is_split_as_our_tokenizer_splits_it(llama, tokenizer):
    texts = strings()
    assert len(texts) == 1000
    for text in texts:
        assert llama.tokens(text) == encode_text(tokenizer, text), repr(text)


def test_no_merge_crosses_a_place_where_only_our_tokenizer_cuts(tokenizer):
    """The proof for every other text: llama.cpp's splitter cuts out runs of digits, ours besides each digit and newline.
    That makes no difference as long as no word holds one of them together with something else."""
    words = [text for text in map(tokenizer.decode, range(3, 6400)) if "\ufffd" not in text]
    cut_out = [any(part == "\n" or unicodedata.category(part)[0] == "N" for part in word) for word in words]
    assert sum(cut_out) >= 11 and not [word for word, cut in zip(words, cut_out) if cut and len(word) > 1]


def test_a_chat_turn_with_the_template_in_the_file(llama, tokenizer):
    messages = [
        {"role": "system", "content": "简短"}, {"role": "user", "content": "你好 </s> <s>"},
        {"role": "assistant", "content": "你好！"}, {"role": "user", "content": "1+1=?"},
    ]  # fmt: skip
    prompt = llama.post("/apply-template", messages=messages)["prompt"]
    assert prompt == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    plain = [{**messages[0]}, {"role": "user", "content": "你好"}]
    ids, _ = render_conversation(tokenizer, plain, add_generation_prompt=True)
    expected = llama.greedy(ids, 24)
    answer = llama.post("/v1/chat/completions", messages=plain, max_tokens=24, temperature=0, cache_prompt=False)
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"].strip("\ufffd") == text.strip("\ufffd") and text


def test_the_file_names_itself_and_its_tokenizer(tmp_path, tokenizer):
    write_gguf(tmp_path / "x.gguf", trained_scale(LMConfig(**BASE)), tokenizer, "f16", "x", "mit")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "x.gguf").fields.items()}
    assert fields["general.name"] == "x" and fields["general.license"] == "mit"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.bos_token_id"] == 1 and fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["llama.context_length"] == 256
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]


def test_what_llama_cpp_lacks_is_refused_and_nothing_left(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "x.gguf"
    for fields, reason in (
        (dict(use_moe=True, norm_topk_prob=False), "Granite always renormalises"),
        (dict(rope_scaling={**YARN, "beta_fast": 20}), "beta_fast 32 and beta_slow 1 only"),
    ):
        with pytest.raises(UserError, match=f"--format gguf: .*{reason}"):
            write_gguf(path, trained_scale(LMConfig(**{**BASE, **fields})), tokenizer, "f32", "x", "mit")
    from model.export import gguf as module

    monkeypatch.setattr(module, "splitting_name", lambda definition: None)
    with pytest.raises(UserError, match="splits text in a way for which llama.cpp has no name"):
        write_gguf(path, trained_scale(LMConfig(**BASE)), tokenizer, "f32", "x", "mit")
    assert not list(tmp_path.iterdir())
