"""The GGUF is proven by llama.cpp itself: it splits text as our tokenizer does, says the same greedy words, and chats."""

import json
import random
import unicodedata
import urllib.request

import gguf
import pytest
import torch
import xllamacpp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from conftest import ROOT, trained_scale
from model.errors import UserError
from model.export.gguf import splitting_name, write_gguf
from model.inference.engine import Engine
from model.LMConfig import LMConfig
from model.settings import SamplingParameters
from model.tokenizer import encode_text, load_tokenizer, render_conversation, save_tokenizer

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
    ranges = ((32, 592), (32, 0x3000), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xE000, 0x10000), (0x1F300, 0x1FAFF))
    wild = [
        "".join(
            chr(chance.randrange(*chance.choice((*ranges, (0x10000, 0x110000))))) for _ in range(chance.randint(1, 30))
        )
        for _ in range(1000 - len(fixed) - len(made))
    ]
    return [*fixed, *made, *wild]


def test_text_is_split_as_our_tokenizer_splits_it(llama, tokenizer):
    texts = strings()
    assert len(texts) == 1000
    for text in texts:
        assert llama.tokens(text) == encode_text(tokenizer, text), repr(text)


def test_real_text_is_split_as_our_tokenizer_splits_it(llama, tokenizer):
    for path in sorted((ROOT / "dataset/demo_world").iterdir()) + [ROOT / "README.md", ROOT / "model/model.py"]:
        text = path.read_text("utf-8")
        assert llama.tokens(text) == encode_text(tokenizer, text), path.name


V1_SPLITTING = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def test_v1s_tokenizer_splits_as_gpt_2s(tmp_path):
    """The original's tokenizer has GPT-2's splitting, and its own chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = [path.read_text("utf-8") for path in sorted((ROOT / "dataset/demo_world").iterdir())]
    backend.train_from_iterator([*texts, (ROOT / "README_en.md").read_text("utf-8")], trainer)
    save_tokenizer(backend, tmp_path / "v1")
    tokenizer = load_tokenizer(tmp_path / "v1")
    _, llama = exported(tmp_path, tokenizer, vocab_size=len(tokenizer))
    for text in [*strings()[::3], *texts]:
        assert llama.tokens(text) == encode_text(tokenizer, text), repr(text)


@pytest.mark.parametrize(
    "model, splitter, name",
    [
        ({}, V1_SPLITTING, "gpt-2"),
        ({"ignore_merges": True}, V1_SPLITTING, None),
        ({"byte_fallback": True}, V1_SPLITTING, None),
        ({"end_of_word_suffix": "</w>"}, V1_SPLITTING, None),
        ({"continuing_subword_prefix": "##"}, V1_SPLITTING, None),
        ({"dropout": 0.1}, V1_SPLITTING, None),
        ({"type": "WordPiece"}, V1_SPLITTING, None),
        ({}, {**V1_SPLITTING, "add_prefix_space": True}, None),
        ({}, {**V1_SPLITTING, "use_regex": False}, None),
        ({}, None, None),
    ],
)
def test_only_what_llama_cpp_has_gets_a_name(model, splitter, name):
    bare = {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "byte_fallback": False,
    }
    assert splitting_name({"normalizer": None, "model": {**bare, **model}, "pre_tokenizer": splitter}) == name


@pytest.mark.parametrize("change", [{"behavior": "Removed"}, {"invert": True}, {"pattern": {"String": " "}}])
def test_another_split_than_ours_has_no_name(tokenizer, change):
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    assert splitting_name(definition) == "superbpe"
    definition["pre_tokenizer"]["pretokenizers"][0].update(change)
    assert splitting_name(definition) is None


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
        (dict(use_moe=True, norm_topk_prob=False), "Granite renormalises"),
        (dict(rope_scaling={**YARN, "beta_fast": 20}), "beta_fast 32 and beta_slow 1 only"),
    ):
        with pytest.raises(UserError, match=f"--format gguf: .*{reason}"):
            write_gguf(path, trained_scale(LMConfig(**{**BASE, **fields})), tokenizer, "f32", "x", "mit")
    from model.export import gguf as module

    monkeypatch.setattr(module, "splitting_name", lambda definition: None)
    with pytest.raises(UserError, match="splits text in a way for which llama.cpp has no name"):
        write_gguf(path, trained_scale(LMConfig(**BASE)), tokenizer, "f32", "x", "mit")
    assert not list(tmp_path.iterdir())
