"""The model is faithful to v1, causal, the same with and without a cache, and equal to plain references."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import trained_scale
from model.LMConfig import PRESETS, LMConfig, preset_config
from model.model import Attention, FeedForward, MOEFeedForward, MoEGate, RMSNorm, RotaryTable, Transformer, apply_rotary

TINY = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=64)


@pytest.fixture(params=["dense", "moe"])
def config(request):
    return LMConfig(**TINY, use_moe=request.param == "moe")


def v1_forward(model, input_ids):
    """v1's dense forward pass written out with loops over positions, heads and pairs of complex numbers."""
    weights, config = model.state_dict(), model.config
    size, share = config.head_dim, config.n_heads // config.n_kv_heads
    angles = torch.outer(torch.arange(input_ids.shape[1]), config.rope_theta ** -(torch.arange(0, size, 2) / size))
    turn = torch.polar(torch.ones_like(angles.double()), angles.double())

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps) * weights[name]

    def rotate(x):
        return torch.view_as_real(torch.complex(x[..., 0::2], x[..., 1::2]) * turn).flatten(-2)

    x = weights["tok_embeddings.weight"][input_ids]
    for index in range(config.n_layers):
        layer = f"layers.{index}."
        h = norm(x, layer + "attention_norm.weight")
        q, k, v = (h @ weights[layer + f"attention.{name}.weight"].T for name in ("wq", "wk", "wv"))
        heads = []
        for head in range(config.n_heads):
            own, shared = slice(head * size, (head + 1) * size), slice(head // share * size, (head // share + 1) * size)
            scores = rotate(q[..., own]) @ rotate(k[..., shared]).transpose(1, 2) / math.sqrt(size)
            future = torch.ones_like(scores).triu(1).bool()
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[..., shared])
        x = x + torch.cat(heads, -1) @ weights[layer + "attention.wo.weight"].T
        h = norm(x, layer + "ffn_norm.weight")
        w1, w2, w3 = (weights[layer + f"feed_forward.w{number}.weight"].T for number in (1, 2, 3))
        x = x + (F.silu(h @ w1) * (h @ w3)) @ w2
    return norm(x, "norm.weight") @ weights["output.weight"].T


def test_dense_equals_v1_written_out():
    model = trained_scale(LMConfig(**TINY), torch.float64)
    input_ids = torch.randint(0, 300, (2, 17))
    with torch.no_grad():
        assert (model(input_ids).logits - v1_forward(model, input_ids)).abs().max() < 1e-4  # cos, sin are float32


def test_parameter_counts_and_names_of_v1():
    counts = {"minimind-v1-small": (26_878_464, 75), "minimind-v1": (108_749_568, 147)}
    for name, expected in counts.items():
        with torch.device("meta"):
            model = Transformer(preset_config(name))
        assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == expected
    with torch.device("meta"):
        model = Transformer(preset_config("minimind-v1-moe", n_shared_experts=True))
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == (96_100_864, 179)
    names = set(model.state_dict())
    for name in (
        "feed_forward.gate.weight",
        "feed_forward.experts.3.w2.weight",
        "feed_forward.shared_experts.w1.weight",
    ):
        assert f"layers.7.{name}" in names
    assert {"tok_embeddings.weight", "norm.weight", "output.weight", "layers.0.attention.wo.weight"} <= names
    assert not any("rotary" in name or "pos_cis" in name or "mask" in name for name in names)


def test_equals_stock_llama_after_the_row_permutation():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LMConfig(**TINY)
    ours = trained_scale(config)
    stock = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=True,
        )
    ).eval()

    def half_split(weight, heads):
        return weight.view(heads, config.head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)

    source = ours.state_dict()
    target = {"model.embed_tokens.weight": source["tok_embeddings.weight"], "model.norm.weight": source["norm.weight"]}
    target["lm_head.weight"] = source["output.weight"]
    names = {
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "attention_norm": "input_layernorm",
    }
    names |= {"ffn_norm": "post_attention_layernorm", "feed_forward.w1": "mlp.gate_proj"}
    names |= {"feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj"}
    for index in range(config.n_layers):
        for name, stock_name in names.items():
            target[f"model.layers.{index}.{stock_name}.weight"] = source[f"layers.{index}.{name}.weight"]
        for name, heads in (("q", config.n_heads), ("k", config.n_kv_heads)):
            weight = half_split(source[f"layers.{index}.attention.w{name}.weight"], heads)
            target[f"model.layers.{index}.self_attn.{name}_proj.weight"] = weight
    stock.load_state_dict(target, strict=True)
    input_ids = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        assert (ours(input_ids).logits - stock(input_ids).logits).abs().max() < 5e-4


@settings(max_examples=20, deadline=None)
@given(length=st.integers(2, 40), change=st.integers(1, 39), moe=st.booleans())
def test_causality(length, change, moe):
    change = min(change, length - 1)
    model = trained_scale(LMConfig(**TINY, use_moe=moe))
    first = torch.randint(0, 300, (1, length))
    second = first.clone()
    second[0, change:] = (second[0, change:] + 1) % 300
    with torch.no_grad():
        a, b = model(first).logits, model(second).logits
    assert torch.allclose(a[:, :change], b[:, :change], atol=1e-4)
    assert not torch.allclose(a[:, change:], b[:, change:], atol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(config, side):
    model = trained_scale(config)
    real = torch.randint(0, 300, (1, 9))
    padding = torch.zeros(1, 5, dtype=torch.long)
    order = [padding, real] if side == "left" else [real, padding]
    mask = torch.cat([torch.full_like(part, part is real) for part in order], dim=1)
    place = slice(5, None) if side == "left" else slice(0, 9)
    promises = (None,) if side == "left" else (None, "right")
    with torch.no_grad():
        expected = model(real)
        for promise in promises:
            padded = model(torch.cat(order, dim=1), attention_mask=mask, padding_side=promise)
            assert torch.isfinite(padded.logits).all()
            assert (padded.logits[:, place] - expected.logits).abs().max() < 1e-4
            assert torch.allclose(padded.aux_loss, expected.aux_loss, atol=1e-6)


def test_loss_has_the_hugging_face_meaning(config):
    model = trained_scale(config, torch.float64)
    input_ids = torch.randint(0, 300, (3, 20))
    labels = input_ids.clone()
    labels[:, :7] = -100
    logits = model(input_ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    for return_logits in (True, False):
        output = model(input_ids, labels=labels, return_logits=return_logits)
        assert torch.allclose(output.loss.double(), expected, rtol=1e-5)
        assert (output.logits is None) == (not return_logits)
    targets = (labels[:, 1:] != -100).sum()
    assert torch.allclose(model(input_ids, labels=labels, num_items_in_batch=5).loss.double() * 5, expected * targets)
    all_ignored = model(input_ids, labels=torch.full_like(labels, -100)).loss
    assert all_ignored == 0


def test_moe_equals_a_plain_per_token_reference_in_float64():
    config = LMConfig(**{**TINY, "n_shared_experts": 2}, use_moe=True)
    model = trained_scale(config, torch.float64)
    layer = model.layers[0].feed_forward
    x = torch.randn(3, 11, config.dim, dtype=torch.float64)

    def swiglu(expert, token):
        return expert.w2.weight @ (F.silu(expert.w1.weight @ token) * (expert.w3.weight @ token))

    expected, probabilities, counts = torch.zeros_like(x), torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    for row in range(3):
        for position in range(11):
            token = x[row, position]
            scores = (layer.gate.weight @ token).softmax(0)
            chosen = scores.argsort(descending=True)[:2]
            for expert in chosen:
                share = scores[expert] / scores[chosen].sum()
                expected[row, position] += share * swiglu(layer.experts[expert], token)
                counts[row, expert] += 1
            expected[row, position] += swiglu(layer.shared_experts, token)
            probabilities[row] += scores / 11
    balance = config.aux_loss_alpha * (counts * 4 / (11 * 2) * probabilities).sum(1).mean()
    for mode in (model.train(), model.eval()):
        output, aux_loss = mode.layers[0].feed_forward(x)
        assert (output - expected).abs().max() < 1e-5  # the router decides in float32
        assert torch.allclose(aux_loss.double(), balance, rtol=1e-5)
    assert torch.allclose(layer.gate.expert_load.double(), counts.sum(0) / counts.sum())


def router(**fields):
    torch.manual_seed(0)
    gate = MoEGate(LMConfig(**TINY, use_moe=True, **fields))
    torch.nn.init.normal_(gate.weight, std=0.3)
    return gate, torch.randn(3, 7, TINY["dim"])


def test_without_norm_topk_prob_a_weight_is_the_experts_probability():
    gate, x = router(norm_topk_prob=False)
    weights, experts, _ = gate(x)
    probabilities = (x.flatten(0, 1) @ gate.weight.T).softmax(-1)
    assert torch.allclose(weights, probabilities.gather(1, experts), atol=1e-6) and (weights.sum(1) < 0.999).all()


def test_without_seq_aux_the_balance_is_that_of_the_batch():
    gate, x = router(seq_aux=False, aux_loss_alpha=0.3)
    real = torch.ones(3, 7)
    real[1, 4:] = 0
    _, experts, aux_loss = gate(x, real)
    rows = real.flatten().bool()
    probability = (x.flatten(0, 1)[rows] @ gate.weight.T).softmax(-1).mean(0)
    load = experts[rows].flatten().bincount(minlength=4) * 4 / (2 * rows.sum())
    assert torch.allclose(aux_loss, 0.3 * (load * probability).sum(), rtol=1e-5)


def test_the_router_decides_alike_under_autocast():
    gate, x = router()
    expected = gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(gate(x), expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_experts_run_in_every_dtype(dtype):
    model = trained_scale(LMConfig(**TINY, use_moe=True), dtype)
    input_ids = torch.randint(0, 300, (2, 8))
    model(input_ids, labels=input_ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_router_receives_the_balance_loss_gradient():
    model = trained_scale(LMConfig(**TINY, use_moe=True)).train()
    model(torch.randint(0, 300, (2, 8))).aux_loss.backward()
    for layer in model.layers:
        assert layer.feed_forward.gate.weight.grad.abs().max() > 0
        gradient = layer.feed_forward.experts[0].w1.weight.grad
        assert gradient is None or not gradient.any() or layer is not model.layers[-1]


@pytest.mark.parametrize("hidden_dim, dtype", [(128, torch.float32), (130, torch.float32), (128, torch.float64)])
def test_an_expert_without_tokens_has_a_gradient_of_zero(hidden_dim, dtype):
    """DDP waits for a gradient of every parameter on every rank; hidden_dim 130 and float64 cannot be grouped."""
    model = trained_scale(LMConfig(**TINY, hidden_dim=hidden_dim, use_moe=True), dtype).train()
    with torch.no_grad():
        for layer in model.layers:
            layer.feed_forward.gate.weight.zero_()  # every score equal: the same two experts take all tokens
    input_ids = torch.randint(0, 300, (1, 6))
    model(input_ids, labels=input_ids).loss.backward()
    gradients = [expert.w1.weight.grad for expert in model.layers[0].feed_forward.experts]
    assert [bool(gradient.any()) for gradient in gradients].count(True) == 2


def test_grouped_products_equal_the_experts_one_by_one(monkeypatch):
    model = trained_scale(LMConfig(**TINY, use_moe=True, num_experts_per_tok=3)).train()
    layer, x = model.layers[0].feed_forward, torch.randn(3, 11, TINY["dim"])
    results = []
    for grouped in (True, False):
        monkeypatch.setattr(MOEFeedForward, "can_group", lambda self, copies, grouped=grouped: grouped)
        output, _ = layer(x.requires_grad_())
        results.append((output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])))
    for one, other in zip(*results):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("product", ["grouped", "one_by_one"])
def test_routed_experts_are_dropped_in_training(product):
    layer = trained_scale(LMConfig(**TINY, use_moe=True, dropout=0.5)).layers[0].feed_forward
    copies, ends = torch.randn(40, TINY["dim"]), torch.tensor([10, 20, 30, 40], dtype=torch.int32)
    for training, share in ((True, 0.5), (False, 0)):
        dropped = getattr(layer.train(training), product)(copies, ends) == 0
        assert dropped.float().mean() == pytest.approx(share, abs=0.1)


def test_adapters_in_place_of_an_experts_layers_are_called(monkeypatch):
    model = trained_scale(LMConfig(**TINY, use_moe=True)).train()
    layer, x = model.layers[0].feed_forward, torch.randn(2, 5, TINY["dim"])
    before = layer(x)[0]

    class Doubled(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, x):
            return 2 * self.base(x)

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # where the products would be grouped
    assert layer.can_group(x) and torch.allclose(layer(x)[0], before, atol=1e-4)
    for name in ("w1", "w2", "w3"):
        plain = getattr(layer.experts[0], name)
        setattr(layer.experts[0], name, Doubled(plain))
        assert not layer.can_group(x), name
        setattr(layer.experts[0], name, plain)
    for expert in layer.experts:
        expert.w2 = Doubled(expert.w2)
    assert not torch.allclose(layer(x)[0], before, atol=1e-2)


@pytest.mark.parametrize(
    "device, dtype, masked, fused",
    [
        ("cpu", torch.float32, True, True), ("cuda", torch.bfloat16, False, True), ("cuda", torch.float16, False, True),
        ("cuda", torch.float32, False, False), ("cuda", torch.bfloat16, True, False),
    ],
)  # fmt: skip
def test_keys_are_repeated_where_no_fused_kernel_shares_them(monkeypatch, device, dtype, masked, fused):
    from model import model as module

    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool) if masked else None
    assert module.shares_keys(device, dtype, mask) is fused
    model, seen = trained_scale(LMConfig(**TINY)), []
    ids, kernel = torch.randint(0, 300, (1, 8)), F.scaled_dot_product_attention
    expected = model(ids).logits
    monkeypatch.setattr(module, "shares_keys", lambda *where: fused)
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda query, key, value, **options: (
            seen.append((key.shape[1], options["enable_gqa"])) or kernel(query, key, value, **options)
        ),
    )
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    assert set(seen) == {(2, True) if fused else (4, False)}


def test_autocast_training_gradients_are_close_to_float32():
    model = trained_scale(LMConfig(**TINY)).train()
    input_ids = torch.randint(0, 300, (2, 64))
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(input_ids, labels=input_ids, return_logits=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[0].norm()


def test_rotary_table_stays_float32_and_grows():
    model = Transformer(LMConfig(**TINY)).to(torch.bfloat16)
    model(torch.randint(0, 300, (1, 100)))  # beyond max_seq_len = 64
    table = model.rotary_table.table
    assert table.dtype == torch.float32 and table.shape[0] >= 100
    longer = RotaryTable(LMConfig(**{**TINY, "max_seq_len": 128}))(100, torch.device("cpu"))
    assert torch.equal(table[:100], longer)


def test_the_rotary_table_is_made_once_for_all_trained_lengths():
    rotary_table = RotaryTable(LMConfig(**TINY))
    rotary_table(1, torch.device("cpu"))
    made = rotary_table.table
    rotary_table(TINY["max_seq_len"], torch.device("cpu"))
    assert rotary_table.table is made


def test_a_model_that_generated_can_be_trained():
    model = Transformer(LMConfig(**TINY))
    ids = torch.randint(50, (2, 9))
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids).loss.backward()
    assert model.layers[0].attention.wq.weight.grad.abs().sum() > 0


def test_rotation_is_the_same_compiled_and_not(monkeypatch):
    x, table = torch.randn(2, 9, 4, 16), RotaryTable(LMConfig(**TINY))(9, torch.device("cpu"))[:, None]
    eager = apply_rotary(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.allclose(apply_rotary(x, table), eager, atol=1e-6)


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_rope_scaling_equals_transformers(scaling):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from model.model import rope_frequencies

    config = LMConfig(dim=512, max_seq_len=2048, rope_scaling=scaling)
    parameters = {**scaling, "rope_theta": 10000.0, "original_max_position_embeddings": 512}
    stock = LlamaConfig(
        hidden_size=512, num_attention_heads=16, max_position_embeddings=2048, rope_parameters=parameters
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](stock, device="cpu")
    frequencies, factor = rope_frequencies(config)
    assert torch.allclose(frequencies, expected, rtol=1e-5) and factor == pytest.approx(expected_factor)


def test_plain_attention_equals_the_fused_kernel(config):
    model = trained_scale(config)
    input_ids = torch.randint(0, 300, (2, 12))
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    with torch.no_grad():
        fused = [model(input_ids).logits, model(input_ids, attention_mask=mask).logits[:, 3:]]
        for layer in model.layers:
            layer.attention.flash_attn = False
        plain = [model(input_ids).logits, model(input_ids, attention_mask=mask).logits[:, 3:]]
    for a, b in zip(fused, plain):
        assert (a - b).abs().max() < 1e-4


def test_save_pretrained_round_trip(config, tmp_path):
    config.rope_scaling = {"rope_type": "linear", "factor": 2.0}
    model = trained_scale(config)
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path).eval()
    input_ids = torch.randint(0, 300, (1, 30))
    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, model(input_ids).logits)
    assert again.output.weight is again.tok_embeddings.weight
    assert again.config.rope_scaling == config.rope_scaling


def test_initial_weights():
    model = Transformer(LMConfig(dim=256, n_layers=8, n_heads=8, n_kv_heads=4))
    block = model.layers[3]
    for matrix in (block.attention.wq, block.feed_forward.w1, block.feed_forward.w3, model.tok_embeddings):
        assert matrix.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for matrix in (block.attention.wo, block.feed_forward.w2):
        assert matrix.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_dropout_only_in_training():
    model = trained_scale(LMConfig(**{**TINY, "dropout": 0.3}))
    input_ids = torch.randint(0, 300, (1, 10))
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("flash_attn", [True, False])
def test_attention_drops_weights_and_output_in_training(flash_attn):
    attention = Attention(LMConfig(**TINY, dropout=0.5, flash_attn=flash_attn))
    query, key, value = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.ones(2, 2, 9, 16)
    left = attention.train().attend(query, key, value, None)  # of weights that sum to one
    assert left[:, :, 0].unique().tolist() == [0.0, 2.0] and left.mean() == pytest.approx(1, abs=0.3)
    assert torch.allclose(attention.eval().attend(query, key, value, None), torch.tensor(1.0))
    rotary = RotaryTable(LMConfig(**TINY))(9, torch.device("cpu"))[:, None]
    dropped = attention.train()(torch.randn(2, 9, 64), rotary, None, None, 0) == 0
    assert dropped.float().mean() == pytest.approx(0.5, abs=0.1)


def test_feed_forward_and_embeddings_are_dropped_in_training():
    feed_forward, x = FeedForward(16, 32, dropout=0.5), torch.randn(50, 16)
    whole, dropped = feed_forward.eval()(x), feed_forward.train()(x)
    assert (dropped == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert torch.allclose(dropped[dropped != 0], 2 * whole[dropped != 0])
    model, seen = trained_scale(LMConfig(**TINY, dropout=0.5)).train(), []
    model.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    input_ids = torch.randint(0, 300, (2, 20))
    model(input_ids)
    assert (seen[0] == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert torch.allclose(seen[0][seen[0] != 0], 2 * model.tok_embeddings(input_ids)[seen[0] != 0])


def test_rms_norm_works_in_float32():
    norm = RMSNorm(8, 1e-5).to(torch.bfloat16)
    x = torch.randn(4, 8).bfloat16() * 100
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert (norm(x).double() - expected).abs().max() < 0.02


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(dim=100, n_heads=16), "dim (100) must be divisible by n_heads (16)"),
        (dict(dim=48, n_heads=16), "must be even"),
        (dict(n_heads=16, n_kv_heads=5), "n_kv_heads (5)"),
        (dict(n_layers=0), "n_layers must be a whole number"),
        (dict(dropout=1.0), "dropout"),
        (dict(use_moe=True, num_experts_per_tok=5), "num_experts_per_tok (5)"),
        (dict(use_moe=True, scoring_func="sigmoid"), "softmax"),
        (dict(rope_scaling={"rope_type": "dynamic", "factor": 2}), "'linear' or 'yarn'"),
        (dict(rope_scaling={"rope_type": "linear", "factor": 0.5}), "factor"),
        (dict(rope_scaling="yarn"), "must be a dict"),
        (dict(rope_theta=0), "rope_theta"),
    ],
)
def test_impossible_shapes_are_refused_in_one_line(fields, words):
    with pytest.raises(ValueError) as error:
        LMConfig(**fields)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_presets():
    for name in PRESETS:
        assert preset_config(name, max_seq_len=None).vocab_size in (6400, 32000)
    assert preset_config("minimind-v1", dim=1024).dim == 1024
    with pytest.raises(ValueError, match="minimind-v1-small"):
        preset_config("gpt-5")


def test_generate_of_transformers_works(config):
    """Its cache, its left padding and its beams: the same greedy tokens as full forward passes give."""
    model = trained_scale(config)
    prompt = torch.randint(3, 300, (1, 6))
    expected = prompt
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), dim=1)
    arguments = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    for use_cache in (True, False):
        assert torch.equal(model.generate(prompt, use_cache=use_cache, **arguments), expected)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), prompt), dim=1)
    mask = (torch.arange(9) >= 3).long()[None]
    assert torch.equal(model.generate(padded, attention_mask=mask, **arguments)[:, 3:], expected)
    assert model.generate(prompt, num_beams=2, **arguments).shape == expected.shape


def test_what_peft_and_transformers_pass(config):
    model = trained_scale(config)
    input_ids = torch.randint(0, 300, (1, 5))
    with torch.no_grad():
        logits = model(input_ids).logits
        embedded = model(inputs_embeds=model.tok_embeddings(input_ids), output_attentions=None, use_cache=False)
        assert torch.equal(embedded.logits, logits)
        assert torch.equal(model(input_ids, return_dict=False)[0], logits)
    with pytest.raises(TypeError, match="output_attentions"):
        model(input_ids, output_attentions=True)


def test_expert_load_is_the_share_of_choices_in_each_layer():
    model, chosen = trained_scale(LMConfig(**TINY, use_moe=True)), []
    for layer in model.layers:
        layer.feed_forward.gate.register_forward_hook(lambda gate, inputs, output: chosen.append(output[1].flatten()))
    model(torch.randint(0, 300, (3, 20)))
    expected = [experts.bincount(minlength=4) / experts.numel() for experts in chosen]
    assert len(chosen) == len(model.layers) > 1 and not torch.equal(*expected)
    torch.testing.assert_close(model.expert_load(), torch.stack(expected))
    assert Transformer(LMConfig(**TINY)).expert_load() is None
