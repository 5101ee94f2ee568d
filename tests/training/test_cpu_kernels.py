"""The CPU's training kernels against plain float64, and that training uses them where they belong."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import trained_scale
from model.inference.kv_cache import KVCache
from model.LMConfig import LMConfig
from model.model import Transformer
from model.training import cpu_kernels
from model.training.cpu_kernels import ChunkedCrossEntropy, block_attention


@settings(max_examples=12, deadline=None)
@given(length=st.integers(2, 300), heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]), batch=st.integers(1, 3))
def test_block_attention_equals_float64_attention(length, heads, batch):
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, heads[0], length, 16), (batch, heads[1], length, 16), (batch, heads[1], length, 16)]
    inputs = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    exact = [part.detach().double().requires_grad_() for part in inputs]
    gradient = torch.randn(shapes[0], generator=generator).bfloat16()
    output = block_attention(*inputs)
    output.backward(gradient)
    expected = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    expected.backward(gradient.double())
    for ours, reference in [(output, expected), *((a.grad, b.grad) for a, b in zip(inputs, exact))]:
        assert (ours.double() - reference).norm() < 5e-2 * reference.norm()  # bfloat16; a wrong mask is off by 1


def errors(attention, inputs, gradient):
    """Relative errors of output and gradients [query, key, value] against float64."""
    exact = [part.double().requires_grad_() for part in inputs]
    rounded = [part.clone().requires_grad_() for part in inputs]
    expected = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        output = attention(*rounded)
    pairs = [
        (output, expected),
        *zip(torch.autograd.grad(output, rounded, gradient), torch.autograd.grad(expected, exact, gradient.double())),
    ]
    return [float((ours.double() - reference).norm() / reference.norm()) for ours, reference in pairs]


@pytest.mark.parametrize("deviation", [1, 4, 9, 25])
def test_block_attention_is_as_exact_as_the_plain_kernel_at_trained_scale(deviation):
    """Scores of a trained model deviate by ten and more, and bfloat16 holds those to 1/16 only."""

    def plain(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    generator = torch.Generator().manual_seed(deviation)
    shapes = [(2, 8, 200, 32), (2, 4, 200, 32), (2, 4, 200, 32), (2, 8, 200, 32)]
    query, key, value, gradient = (torch.randn(shape, generator=generator).double() for shape in shapes)
    inputs = [(part * scale).bfloat16() for part, scale in ((query, deviation**0.5), (key, deviation**0.5), (value, 1))]
    scores = inputs[0][:, ::2].double() @ inputs[1].double().transpose(2, 3) / 32**0.5
    assert scores.std() == pytest.approx(deviation, rel=0.1)
    ours, reference = (errors(kernel, inputs, gradient.bfloat16()) for kernel in (block_attention, plain))
    assert all(own < 1.5 * other for own, other in zip(ours, reference)), (ours, reference)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 600), ignored=st.floats(0, 1))
def test_chunked_cross_entropy_equals_the_plain_one(rows, ignored):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 8, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(30, 8, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(0, 30, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -100
    grads = []
    for loss in (
        ChunkedCrossEntropy.apply(x, weight, targets),
        F.cross_entropy(x @ weight.T, targets, ignore_index=-100, reduction="sum"),
    ):
        grads.append((loss.detach(), *torch.autograd.grad(loss * 0.5, (x, weight))))
    for ours, reference in zip(*grads):
        assert torch.allclose(ours, reference, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 256, 600])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_frozen_weight_gets_no_gradient_and_the_input_the_same(rows, dtype):
    """As with adapters. bfloat16: by autocast, x and weight in float32."""
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(count, 8, dtype=torch.float64, generator=generator) for count in (rows, 30))
    targets, results = torch.randint(0, 30, (rows,), generator=generator), []
    targets[1::3] = -100
    exact = x.clone().requires_grad_()
    expected = F.cross_entropy(exact @ weight.T, targets, ignore_index=-100, reduction="sum")
    (expected * 0.5).backward()
    if dtype == torch.bfloat16:
        x, weight = x.float(), weight.float()
    for frozen in (False, True):
        own, matrix = x.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = ChunkedCrossEntropy.apply(own, matrix, targets)
        assert frozen == (loss.grad_fn.saved_tensors[1] is None)
        (loss * 0.5).backward()
        assert frozen == (matrix.grad is None)
        results.append((loss.detach(), own.grad))
    assert all(torch.equal(*pair) for pair in zip(*results))
    for ours, reference in zip(results[0], (expected.detach(), exact.grad)):
        assert (ours - reference).norm() <= (1e-10 if dtype == torch.float64 else 2e-2) * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_frozen_weights_around_the_others_get_their_gradients(dtype):
    """As with adapters: embeddings and output matrix, the whole first layer and a part of the second are frozen."""
    config = LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300)
    model, input_ids = trained_scale(config), torch.randint(0, 300, (2, 70))
    learned = [layer.weight for layer in model.layers[1].attention.children()]
    results = []
    for installed in (False, True):
        model.double()
        if installed:
            cpu_kernels.install(model.float(), torch.device("cpu"), dtype, compile=False)
        for parameter in model.requires_grad_(False).parameters():
            parameter.requires_grad_(any(parameter is own for own in learned))
        with torch.autocast("cpu", torch.bfloat16, enabled=installed and dtype == torch.bfloat16):
            model(input_ids, labels=input_ids, return_logits=False).loss.backward()
        assert sum(parameter.grad is not None for parameter in model.parameters()) == 4
        results.append([parameter.grad.double() for parameter in learned])
        model.zero_grad()
    for exact, ours in zip(*results):
        assert (ours - exact).norm() < (1e-4 if dtype == torch.float32 else 5e-2) * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_serve_training_alone_and_change_neither_loss_nor_gradient(monkeypatch, dtype):
    torch.manual_seed(0)
    model, used = Transformer(LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300)), []
    chunked = ChunkedCrossEntropy.apply
    monkeypatch.setattr(ChunkedCrossEntropy, "apply", lambda *inputs: used.append("loss") or chunked(*inputs))
    monkeypatch.setattr(cpu_kernels, "block_attention", lambda *qkv: used.append("attention") or block_attention(*qkv))
    input_ids, results = torch.randint(0, 300, (2, 70)), []
    for installed in (False, True):
        if installed:
            cpu_kernels.install(model, torch.device("cpu"), dtype, compile=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids, labels=input_ids, return_logits=False).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append((loss.item(), torch.cat([gradient.flatten() for gradient in gradients])))
    assert used.count("loss") == 1 and used.count("attention") == (2 if dtype == torch.bfloat16 else 0)
    (plain_loss, plain), (loss, gradient) = results
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert abs(loss - plain_loss) < tolerance * plain_loss and (gradient - plain).norm() < tolerance * plain.norm()
    used.clear()
    with torch.no_grad():
        model(input_ids, labels=input_ids, return_logits=False)
    assert not used
    cache = KVCache(model.config, 2, 80)
    for part in (input_ids[:, :60], input_ids[:, 60:61]):  # one token after many: more keys than queries
        used.clear()
        model(part, kv_cache=cache)
        cache.advance(part.shape[1])
    assert not used
    for place, chosen, compiled in (("mps", dtype, False), ("cuda", torch.float16, False), ("cuda", dtype, True)):
        cpu_kernels.install(model, torch.device(place), chosen, compiled)
        model(input_ids, labels=input_ids, return_logits=False).loss.backward()
        assert not used, place
    cpu_kernels.install(model, torch.device("cuda"), dtype, False)
    model(input_ids, labels=input_ids, return_logits=False).loss.backward()
    assert used == ["loss"]  # a GPU has its own fused attention


@pytest.mark.parametrize("moe", [False, True])
def test_a_compiled_training_step_is_one_graph(moe):
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, use_moe=moe)
    model, input_ids = Transformer(config), torch.randint(0, 300, (2, 70))
    cpu_kernels.install(model, torch.device("cpu"), torch.bfloat16, compile=True)
    losses = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(input_ids, labels=input_ids, num_items_in_batch=torch.tensor(138.0), return_logits=False)
        gradients = torch.autograd.grad(output.loss + output.aux_loss, list(model.parameters()))
        losses.append((output.loss.item(), torch.cat([gradient.flatten() for gradient in gradients])))
    (eager_loss, eager), (loss, gradient) = losses
    assert loss == pytest.approx(eager_loss, rel=1e-2) and (gradient - eager).norm() < 3e-2 * eager.norm()


def test_the_operators_tell_the_compiler_the_shapes_they_return():
    query, key = torch.randn(2, 4, 70, 8).bfloat16(), torch.randn(2, 2, 70, 8).bfloat16()
    checks = dict(test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(cpu_kernels.attend_by_blocks, (query, key, key), **checks)
    saved = cpu_kernels.attend_by_blocks(query, key, key)
    torch.library.opcheck(cpu_kernels.gradients_by_blocks, (query, query, key, key, saved), **checks)


def test_without_gradients_pytorchs_own_kernels_serve():
    model, used = Transformer(LMConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=50)), []
    model.training_loss_kernel = lambda *inputs: used.append("loss")
    model.layers[0].attention.training_kernel = lambda *qkv: used.append("attention")
    input_ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        assert model(input_ids, labels=input_ids, return_logits=False).loss.isfinite()
    assert not used


@pytest.mark.parametrize(
    "batch, heads, length, size",
    [(1, 1, 1, 128), (4, 16, 512, 32), (64, 16, 512, 16), (2, 8, 300, 128), (8, 6, 256, 80)],
)
def test_blocks_hold_every_query_once_and_scores_that_a_cache_holds(batch, heads, length, size):
    blocks = cpu_kernels.blocks_of(batch, heads, length)
    assert [query for start, end in blocks for query in range(start, end)] == list(range(length))
    assert {end - start for start, end in blocks[:-1]} <= {size} and blocks[-1][1] - blocks[-1][0] <= size
