"""Faster modules for decoding give what the plain ones give, and go back to them where they do not serve."""

import copy

import pytest
import torch
from torch import nn

from conftest import TINY
from model.inference.kernels import Int8Linear, OneTokenAttention, can_pack, install
from model.LMConfig import LMConfig
from model.model import Transformer

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def packed_linear(dtype=torch.float32, rows_in=48, rows_out=20):
    torch.manual_seed(0)
    return install(nn.Sequential(nn.Linear(rows_in, rows_out, bias=False).to(dtype)))[0]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (16, 1), (3, 40), (1,), ()])
@pytest.mark.parametrize("compiling", [False, True])
def test_the_packed_product_is_the_product(monkeypatch, dtype, shape, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    linear = packed_linear(dtype)
    x = torch.randn(*shape, 48).to(dtype)
    expected = x.double() @ linear.weight.double().T
    found = linear(x)
    assert found.dtype == dtype and found.shape == (*shape, 20)
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_weight_changed_later_is_packed_anew():
    linear, x = packed_linear(), torch.ones(1, 48)
    with torch.no_grad():
        before = linear(x)
        linear.weight.mul_(2)  # as an optimizer does
        torch.testing.assert_close(linear(x), 2 * before)
        linear.weight.data.mul_(2)  # as merging an adapter may: nothing tells, but a new engine packs anew
        torch.testing.assert_close(install(nn.Sequential(linear))[0](x), 4 * before)
        linear.weight = nn.Parameter(linear.weight * 2)
        torch.testing.assert_close(linear(x), 8 * before)
        torch.testing.assert_close(linear.double()(x.double()).float(), 8 * before)


def rounded_by_hand(weight):
    """Each row as whole numbers times the bfloat16 nearest to its largest / 127, in float64."""
    rows = []
    for row in weight.tolist():
        scale = float(torch.tensor(max(map(abs, row)) / 127).bfloat16())
        rows.append([max(-127, min(127, round(number / scale))) * scale if scale else 0.0 for number in row])
    return torch.tensor(rows, dtype=torch.float64)


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (2, 2), (5, 1), (3, 40), (1,), ()])
@pytest.mark.parametrize("compiling", [False, True])
def test_the_8_bit_product_is_that_of_the_rounded_weight(monkeypatch, shape, compiling):
    linear = nn.Linear(48, 20, bias=False).bfloat16()
    torch.nn.init.normal_(linear.weight, std=0.3)
    linear.weight[3] *= 100  # rows have scales of their own
    linear.weight[4] = 0
    linear.weight[5, 0] = 30  # beside it, the others are whole numbers of 0 or 1 or 2
    install(nn.Sequential(linear), int8=True)
    x = torch.randn(*shape, 48).bfloat16()
    x[..., 0] = 0  # else its product is rounded more coarsely than the others differ
    eager = linear(x)  # packs
    if compiling and x.numel() == 48:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert linear(x).equal(eager)
    expected = x.double() @ rounded_by_hand(linear.weight).T
    plain = x.double() @ linear.weight.double().T
    size = x.double().norm(dim=-1, keepdim=True) * linear.weight.double().norm(dim=-1)
    assert eager.shape == (*shape, 20) and eager.dtype == torch.bfloat16
    error = ((eager.double() - expected).abs() / size.clamp(min=1e-9)).max()
    assert error < 2**-8, "as bfloat16 rounds"
    row = (..., 5)  # where rounding changes most
    assert (eager[row] - expected[row]).norm() < (eager[row] - plain[row]).norm() / 4


@torch.inference_mode()
def test_an_8_bit_layer_follows_its_weight_and_can_become_another_kind():
    linear = nn.Linear(48, 20, bias=False).bfloat16()
    model, x = nn.Sequential(linear), torch.randn(1, 48).bfloat16()
    plain = install(model)(x)
    rounded = install(model, int8=True)(x)
    assert type(linear) is Int8Linear and not rounded.equal(plain)
    linear.weight.data = 2 * linear.weight.data
    linear.packed_from = None
    torch.testing.assert_close(linear(x), 2 * rounded)
    assert install(model)(x).equal(2 * plain) and list(linear.state_dict()) == ["weight"]


def test_gradients_take_the_plain_product_and_names_stay():
    linear, x = packed_linear(), torch.randn(2, 48)
    assert linear(x).grad_fn is not None
    linear(x).sum().backward()
    torch.testing.assert_close(linear.weight.grad, x.sum(dim=0).expand(20, -1))
    with torch.no_grad():
        linear(x)
        with pytest.raises(RuntimeError, match="dtype"):
            linear(x.bfloat16())
    assert list(linear.state_dict()) == ["weight"] and linear.packed is not None
    assert copy.deepcopy(linear.state_dict())["weight"].equal(linear.weight)


def test_a_biased_layer_stays_as_it_is_and_other_devices_are_not_packed():
    assert type(install(nn.Sequential(nn.Linear(4, 4)))[0]) is nn.Linear
    assert can_pack(torch.ones(2, 2)) and not can_pack(torch.ones(2, 2, device="meta"))
    assert not can_pack(torch.ones(2, 2, dtype=torch.float64))


@torch.inference_mode()
@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_attention_is_each_head_by_itself(dtype, flash_attn):
    config = LMConfig(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=10, flash_attn=flash_attn)
    attention = install(Transformer(config)).layers[0].attention
    assert type(attention) is OneTokenAttention
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(3, 6, 1, 8, generator=generator).to(dtype)
    key, value = (torch.randn(3, 2, 5, 8, generator=generator).to(dtype) for _ in range(2))
    lengths = (5, 2, 1)
    mask = torch.tensor([[place < length for place in range(5)] for length in lengths]).view(3, 1, 1, 5)
    found, unmasked = attention.attend(query, key, value, mask), attention.attend(query, key, value, None)
    assert found.shape == (3, 6, 1, 8)
    for row, length in enumerate(lengths):
        for head in range(6):
            for result, count in ((found, length), (unmasked, 5)):
                keys, values = (part[row, head // 3, :count].double() for part in (key, value))
                weights = (keys @ query[row, head, 0].double() / 8**0.5).softmax(dim=0)
                torch.testing.assert_close(
                    result[row, head, 0].double(), weights @ values, atol=TOLERANCE[dtype] / 2, rtol=0
                )


def test_a_model_that_has_decoded_can_be_copied():
    torch.manual_seed(0)
    model = install(Transformer(LMConfig(**TINY, vocab_size=50)).eval())
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.allclose(copy.deepcopy(model)(ids).logits, expected, atol=1e-6)
