"""Modules that decode faster than the plain ones: install() turns those of a model into these, weights and names
as they are."""

import torch
import torch.nn.functional as F
from torch import nn

from model.model import Attention


class PackedLinear(nn.Linear):
    """nn.Linear without a bias that on a CPU, without gradients, multiplies with a second copy of its weight, in the
    layout that oneDNN works in. Otherwise oneDNN brings the weight into that layout in each call, and float32 takes
    another library: one core, 1 to 256 rows, 1.8 to 4 times as fast in float32, 2 to 1.1 times in bfloat16. Compiled code
    multiplies a single row by a plain sum, which it fuses with what comes before and after.
    """

    ROWS = 16  # what the layout is chosen for; it serves any number
    PACKED = ("packed", "packed_from")
    packed = packed_from = None

    def forward(self, x):
        weight = self.weight
        if torch.compiler.is_compiling():
            if x.numel() > self.in_features or x.device.type != "cpu" or torch.is_grad_enabled():
                return F.linear(x, weight)
            return self.single_row(x)
        if torch.is_grad_enabled() or not can_pack(weight) or x.dtype != weight.dtype:
            return F.linear(x, weight)
        source = weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version
        if self.packed_from != source:  # the first time, and when the weight was changed since
            self.pack(weight.detach())
            self.packed_from = source
        return self.product(x)

    def pack(self, weight):
        """Bring `weight` [out, in] into the layout that product() works in."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, self.ROWS)

    def product(self, x):
        """x [..., in] times what pack() was given."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")

    def single_row(self, x):
        """The same of a single row, in compiled code."""
        return (self.weight.float() * x.float()).sum(dim=-1).to(x.dtype).view(*x.shape[:-1], -1)

    def take_packed(self):
        """What pack() has made, for put_packed; this layer forgets it."""
        return {name: self.__dict__.pop(name) for name in self.PACKED if name in self.__dict__}

    def put_packed(self, packed):
        """Have what take_packed gave, None: nothing. The weight must be the one that it was made of."""
        self.__dict__.update(packed or {})

    def __getstate__(self):
        """Copies and pickles pack for themselves: a packed weight cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name not in self.PACKED}


class Int8Linear(PackedLinear):
    """PackedLinear whose weight is rounded: each row to whole numbers from -127 to 127 times a scale of its own, the largest
    of the row / 127 (weight-only quantisation: what comes in stays bfloat16). A few rows, which wait for memory, are
    multiplied by PyTorch's 8-bit kernel, which fetches half of bfloat16's bytes; more rows by the rounded weight in
    bfloat16, whose kernel is faster then (26M model, tokens/s of 1, 4 and 16 requests: 1.7, 1.4 and 1.0 times bfloat16's).
    """

    FEW_ROWS = 4
    PACKED = (*PackedLinear.PACKED, "quantized", "scales")
    quantized = scales = None

    def pack(self, weight):
        weight = weight.float()
        largest = weight.abs().amax(dim=1)
        self.scales = (largest.clamp(min=torch.finfo(torch.float32).tiny) / 127).bfloat16()
        scales = self.scales.float()[:, None]
        self.quantized = (weight / scales).round().clamp(-127, 127).to(torch.int8)
        super().pack((self.quantized * scales).bfloat16())

    def product(self, x):
        return self.single_row(x) if x.numel() <= self.FEW_ROWS * self.in_features else super().product(x)

    def single_row(self, x):
        rows = x.reshape(-1, self.in_features)
        return torch._weight_int8pack_mm(rows, self.quantized, self.scales).view(*x.shape[:-1], -1)


def can_pack(weight):
    """Whether oneDNN is here and multiplies what `weight` holds."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    in_bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return in_bfloat16 or weight.dtype == torch.float32


class OneTokenAttention(Attention):
    """Attention that for a single new token reads each key and value once: the query heads that share a key head take
    the place of queries at several positions. PyTorch's kernel for grouped heads reads them for each query head (one
    core, 16 rows of 160 keys: 0.51 -> 0.35 ms in float32, 1.9 -> 0.44 in bfloat16).
    """

    def attend(self, query, key, value, mask):
        batch, heads, length, size = query.shape
        if length > 1 or not self.flash_attn:
            return super().attend(query, key, value, mask)
        query = query.reshape(batch, key.shape[1], -1, size)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).reshape(batch, heads, 1, size)


def install(model, int8=False):
    """Turn the linear layers and the attention of `model` into these, with int8 (bfloat16 on a CPU only) the layers into
    Int8Linear; returns the model."""
    for module in model.modules():
        if type(module) in (nn.Linear, PackedLinear, Int8Linear) and module.bias is None:
            module.__class__ = Int8Linear if int8 else PackedLinear
            module.packed_from = None
        elif type(module) is Attention:
            module.__class__ = OneTokenAttention
    return model
