"""The maps to stock classes are exact: transformers' own Llama, Mistral and GraniteMoeShared compute what ours computes,
and what comes back is what went there, bit for bit."""

import json
import os

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import trained_scale
from model.checkpoint import load_model, read_weights
from model.convert import (
    fields_of_stock_config,
    half_split,
    interleaved,
    load_stock_weights,
    state_of_stock_weights,
    stock_config,
    stock_model,
    stock_type,
    stock_weights,
    weights_of_stock_model,
)
from model.errors import UserError
from model.LMConfig import LMConfig

BASE = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=128)
YARN = {"rope_type": "yarn", "factor": 4.0}
SHAPES = {
    "llama": {},
    "no grouped heads": dict(n_kv_heads=4, rope_theta=1e6, norm_eps=1e-6),
    "one key head, odd sizes": dict(dim=60, n_heads=6, n_kv_heads=1, hidden_dim=52, n_layers=3),
    "mistral, dim 50 in 4 heads": dict(dim=50, head_dim=12, hidden_dim=40),
    "mistral, heads wider than dim": dict(dim=50, head_dim=20, n_kv_heads=4),
    "llama, heads narrower than dim": dict(head_dim=8),
    "linear": dict(rope_scaling={"rope_type": "linear", "factor": 4}),
    "yarn": dict(rope_scaling=YARN),
    "yarn, all of it": dict(
        rope_scaling={**YARN, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.3, "original_max_position_embeddings": 20}
    ),
    "granite, no shared expert": dict(use_moe=True, n_shared_experts=0),
    "granite, one shared expert": dict(use_moe=True, n_shared_experts=1),
    "granite, two shared experts": dict(use_moe=True, n_shared_experts=2, n_routed_experts=5, num_experts_per_tok=3),
    "granite, yarn": dict(use_moe=True, rope_scaling=YARN, hidden_dim=24),
    "granite, dim 52 in 5 heads": dict(use_moe=True, dim=52, n_heads=5, n_kv_heads=5, head_dim=10),
}  # fmt: skip


def shape(name):
    return LMConfig(**{**BASE, **SHAPES[name]})


def stock_folder(model, folder):
    """A folder with nothing in it but config.json and weights, as transformers reads it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(stock_config(model.config)))
    weights = {name: tensor.contiguous() for name, tensor in stock_weights(model.state_dict(), model.config).items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_the_stock_class_gives_the_same_logits_and_the_same_greedy_tokens(tmp_path, name):
    ours = trained_scale(shape(name))
    stock, report = AutoModelForCausalLM.from_pretrained(
        stock_folder(ours, tmp_path / "stock"), output_loading_info=True
    )
    stock.eval()
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(stock).__name__.lower() == f"{stock_type(ours.config)}forcausallm"
    ids = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = ours(ids).logits
        assert logits.std() > 1  # or nothing would be shown
        assert (stock(ids).logits - logits).abs().max() < 1e-3
    theirs = stock.generate(ids[:1, :20], max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert theirs[0, 20:].tolist() == greedy(ours, ids[:1, :20], 64)


def greedy(model, ids, count):
    """By whole forward passes, without a cache."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -count:].tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_what_comes_back_is_bit_equal(tmp_path, name):
    ours = trained_scale(shape(name))
    model, metadata = load_model(stock_folder(ours, tmp_path / "stock"))
    state = model.state_dict()
    assert list(state) == list(ours.state_dict())
    assert all(torch.equal(state[key], tensor) for key, tensor in ours.state_dict().items())
    expected = ours.config.to_dict()
    if scaling := expected["rope_scaling"]:  # the trained length, which was left to the factor, is now said
        scaling["factor"] = float(scaling["factor"])
        if scaling["rope_type"] == "yarn":
            scaling.setdefault("original_max_position_embeddings", 32)
    assert model.config.to_dict() == expected and metadata["config"]["dim"] == ours.config.dim


@pytest.mark.parametrize("name", SHAPES)
def test_a_stock_model_in_memory_computes_the_same_and_gives_the_weights_back(name):
    """The class as transformers makes it from a folder is what to compare with: tests above show that it is ours."""
    ours = trained_scale(shape(name))
    stock = stock_model(ours)
    assert type(stock).__name__.lower() == f"{stock_type(ours.config)}forcausallm"
    assert stock.get_output_embeddings().weight is stock.get_input_embeddings().weight
    ids = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = ours(ids).logits
        assert logits.std() > 1
        assert (stock.eval()(ids).logits - logits).abs().max() < 1e-3
    back = weights_of_stock_model(stock, ours.config)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in ours.state_dict().items())
    assert back["output.weight"] is back["tok_embeddings.weight"]  # saved once

    other = trained_scale(shape(name), seed=1).state_dict()
    load_stock_weights(stock, other, ours.config)
    back = weights_of_stock_model(stock, ours.config)
    assert all(torch.equal(back[key], tensor) for key, tensor in other.items())
    before = ours.state_dict()["norm.weight"].clone()
    stock.model.norm.weight.data.zero_()  # it is a copy
    assert torch.equal(ours.state_dict()["norm.weight"], before)


@pytest.mark.parametrize("name", ["llama", "granite, one shared expert"])
def test_weights_that_do_not_fit_a_stock_model_are_refused(name):
    ours = trained_scale(shape(name))
    stock, state = stock_model(ours), ours.state_dict()
    with pytest.raises(RuntimeError, match="model.norm.weight"):
        load_stock_weights(stock, {**state, "norm.weight": torch.zeros(3)}, ours.config)
    with pytest.raises(KeyError, match="attention.wo.weight"):
        load_stock_weights(
            stock, {key: state[key] for key in state if key != "layers.1.attention.wo.weight"}, ours.config
        )


@pytest.mark.parametrize("name", ["llama", "mistral, dim 50 in 4 heads", "granite, two shared experts"])
def test_a_folder_that_transformers_saved_itself_is_read(tmp_path, name):
    """Its config.json leaves defaults out and names fields as today's transformers does."""
    ours = trained_scale(shape(name))
    stock = AutoModelForCausalLM.from_pretrained(stock_folder(ours, tmp_path / "stock"))
    stock.save_pretrained(tmp_path / "saved")
    loaded, _ = load_model(tmp_path / "saved")
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in ours.state_dict().items())


def test_a_llama_with_an_equal_head_of_its_own_is_read_and_another_head_refused(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=90, tie_word_embeddings=False, max_position_embeddings=64, rope_theta=5000.0,
    )  # fmt: skip
    stock = LlamaForCausalLM(config).eval()
    stock.save_pretrained(tmp_path / "own")
    with pytest.raises(UserError, match="model.safetensors: output.weight differs from tok_embeddings.weight"):
        load_model(tmp_path / "own")
    stock.lm_head.weight.data.copy_(stock.model.embed_tokens.weight.data)
    stock.save_pretrained(tmp_path / "equal")
    ours, _ = load_model(tmp_path / "equal")
    assert (ours.config.rope_theta, ours.config.norm_eps) == (config.rope_parameters["rope_theta"], 1e-6)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert (ours.eval()(ids).logits - stock(ids).logits).abs().max() < 1e-4


def test_half_split_by_hand():
    """Two heads of size 4: rows 0 1 2 3 of a head become 0 2 1 3."""
    weight = torch.arange(8.0)[:, None].expand(8, 3)
    assert half_split(weight, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@settings(max_examples=50, deadline=None)
@given(heads=st.integers(1, 6), half=st.integers(1, 9), width=st.integers(1, 5))
def test_the_order_of_rows_goes_there_and_back(heads, half, width):
    weight = torch.rand(heads * 2 * half, width)
    moved = half_split(weight, 2 * half)
    assert torch.equal(interleaved(moved, 2 * half), weight)
    assert moved.sort(0).values.equal(weight.sort(0).values)


def test_the_kind_of_stock_class():
    kinds = {
        "llama": LMConfig(),
        "mistral": LMConfig(dim=50, n_heads=4, n_kv_heads=2, head_dim=12),
        "granitemoeshared": LMConfig(use_moe=True),
    }
    assert all(stock_type(config) == kind for kind, config in kinds.items())
    for kind, config in kinds.items():
        assert AutoConfig.for_model(**stock_config(config)).model_type == kind


@pytest.mark.parametrize("fields", [dict(norm_topk_prob=False), dict(num_experts_per_tok=1)])
def test_a_router_that_granite_lacks_is_refused(fields):
    with pytest.raises(ValueError, match="Granite renormalises"):
        stock_config(LMConfig(use_moe=True, **fields))


STOCK_MOE = stock_config(LMConfig(**BASE, use_moe=True))


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(model_type="qwen2"), "model_type 'qwen2' is none of minimind, llama, mistral, granitemoeshared"),
        (dict(model_type=None), "model_type None is none of"),
        (dict(attention_bias=True), "attention_bias is True"),
        (dict(mlp_bias=True), "mlp_bias is True"),
        (dict(quantization_config={"quant_method": "gptq"}), "quantization_config is"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(model_type="mistral", sliding_window=64), "sliding_window is 64"),
        (
            dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, rope_parameters=None),
            "must be 'linear' or 'yarn'",
        ),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        (dict(rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25}), "is 0.25"),
        (dict(rope_parameters={**YARN, "rope_theta": 1e4, "truncate": False}), "RoPE's truncate is False"),
        (dict(rope_parameters={**YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 0.5}), "RoPE's mscale"),
        (dict(rope_parameters={**YARN, "rope_theta": 1e4, "factor": float("nan")}), "factor must be a number"),
        (dict(num_attention_heads=0), "num_attention_heads must be a whole number of at least 1, got 0"),
        (dict(intermediate_size="7"), "intermediate_size must be a whole number"),
        ({**STOCK_MOE, "num_experts_per_tok": 1}, "Granite renormalises the weights of 2 or more"),
        ({**STOCK_MOE, "attention_multiplier": 1.0}, "attention_multiplier is 1.0"),
        ({**STOCK_MOE, "embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
        ({**STOCK_MOE, "logits_scaling": 6.0}, "logits_scaling is 6.0"),
        ({**STOCK_MOE, "residual_multiplier": 0.22}, "residual_multiplier is 0.22"),
        ({**STOCK_MOE, "shared_intermediate_size": 100}, "shared_intermediate_size is no multiple"),
    ],
)
def test_what_minimind_does_not_have_is_named(changes, reason):
    description = {**stock_config(LMConfig(**BASE)), **changes}
    with pytest.raises(ValueError, match=reason):
        LMConfig(**fields_of_stock_config(description))


@pytest.mark.parametrize("name", ["llama", "granite, one shared expert"])
def test_tensors_too_few_too_many_and_of_another_shape_are_named(name):
    config = shape(name)
    weights = stock_weights(trained_scale(config).state_dict(), config)
    for key in weights:
        less = {other: tensor for other, tensor in weights.items() if other != key}
        with pytest.raises(ValueError, match=f"tensor {key} is missing"):
            state_of_stock_weights(less, config)
    with pytest.raises(ValueError, match="tensor model.layers.0.self_attn.q_proj.bias has no place"):
        state_of_stock_weights({**weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match="has another shape than config.json says"):
        state_of_stock_weights({**weights, "model.layers.0.self_attn.q_proj.weight": torch.zeros(7, 64)}, config)
    old = {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}  # a buffer of older files
    assert state_of_stock_weights(old, config).keys() == state_of_stock_weights(weights, config).keys()


def v1_folder(folder, model, **fields):
    """What the original's export left in 2024: its own code, pytorch_model.bin and a config.json with v1's fields."""
    folder.mkdir()
    names = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "max_seq_len", "use_moe"]
    config = {name: getattr(model.config, name) for name in names}
    config.update(
        hidden_dim=None, multiple_of=64, dropout=0.0, flash_attn=True, model_type="minimind", torch_dtype="float32"
    )
    config["auto_map"] = {"AutoConfig": "LMConfig.LMConfig", "AutoModelForCausalLM": "model.Transformer"}
    config.update(transformers_version="4.44.0", architectures=["Transformer"], **fields)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("LMConfig.py", "model.py"):
        (folder / name).write_text(
            f"open({str(folder / 'ran')!r}, 'w')\nraise SystemExit('code of the folder was run')\n"
        )
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    "fields, said",
    [
        ({}, {}),
        (dict(use_moe=True), dict(n_shared_experts=True, n_routed_experts=4, num_experts_per_tok=2)),
        (dict(use_moe=True), dict(n_shared_experts=2, n_routed_experts=4)),  # v1 made one whatever the number
        (dict(use_moe=True, n_shared_experts=2), dict(n_shared_experts=2, n_routed_experts=4)),
        (dict(use_moe=True, n_shared_experts=0), dict(n_shared_experts=None, n_routed_experts=4)),
        (dict(dim=50, head_dim=12), {}),  # v1 rounded dim / n_heads down
    ],
)
def test_v1s_folders_are_read_without_running_their_code(tmp_path, fields, said):
    model = trained_scale(LMConfig(**{**BASE, **fields}))
    folder = v1_folder(tmp_path / "minimind-v1-small", model, **said)
    loaded, _ = load_model(folder)
    ids = torch.arange(50)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: "),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json: "),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}'), "config.json: "),
        (lambda folder: (folder / "model.safetensors").unlink() or (folder / "model.safetensors").mkdir(), "has no"),
        (lambda folder: whole_numbers(folder / "model.safetensors"), "holds torch.int32, no weights"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors or pytorch_model.bin"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04K\x01."), "not a safetensors file"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
            and (folder / "model.safetensors.index.json").write_text("{}"),
            "it is in parts, save it again as one file",
        ),
        (lambda folder: cut(folder / "model.safetensors"), "not a safetensors file, or a truncated one"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_one_line(tmp_path, damage, reason):
    folder = stock_folder(trained_scale(LMConfig(**BASE)), tmp_path / "stock")
    damage(folder)
    with pytest.raises(UserError, match=reason) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def whole_numbers(path):
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: tensor.int() for name, tensor in weights.items()}, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("function, words", [(print, ("run",)), (os.system, ("touch ran",))])
def test_a_pickle_with_code_in_a_folder_is_refused(tmp_path, function, words, monkeypatch):
    class Unsafe:
        def __reduce__(self):
            return function, words

    folder = v1_folder(tmp_path / "v1", trained_scale(LMConfig(**BASE)))
    monkeypatch.chdir(tmp_path)
    torch.save({"tok_embeddings.weight": Unsafe()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: refused, loading it would run .*(print|system)"):
        read_weights(folder)
    assert not (tmp_path / "ran").exists()


def test_a_configuration_is_no_checkpoint(tmp_path):
    folder = stock_folder(trained_scale(LMConfig(**BASE)), tmp_path / "stock")
    with pytest.raises(UserError, match="config.json: not a PyTorch checkpoint"):
        load_model(folder / "config.json")


def test_flags_that_contradict_a_folder_are_named_and_free_ones_taken(tmp_path):
    folder = stock_folder(trained_scale(LMConfig(**BASE)), tmp_path / "stock")
    with pytest.raises(UserError, match="has n_heads 4, not 8"):
        load_model(folder, n_heads=8)
    assert load_model(folder, max_seq_len=512)[0].config.max_seq_len == 512
