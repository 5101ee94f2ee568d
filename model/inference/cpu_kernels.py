"""Products of one row with a matrix on a CPU: what decoding a single request spends its time on, bound by memory."""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn


class OneRowLinear(nn.Linear):
    """nn.Linear without a bias, and with a faster product for one row on a CPU. F.linear reads the matrix with one core
    in float32; a batched product over blocks of its rows reads it with all of them (2 cores: 13 -> 23 GB/s), and
    compiled code with a plain sum.
    """

    def forward(self, x):
        one_row = x.numel() == self.in_features and x.device.type == "cpu" and not torch.is_grad_enabled()
        if one_row and torch.compiler.is_compiling():
            return (self.weight.float() * x.float()).sum(dim=-1).to(x.dtype).view(*x.shape[:-1], -1)
        if one_row and x.dtype == self.weight.dtype == torch.float32:
            blocks = self.weight.view(math.gcd(self.out_features, 16), -1, self.in_features)
            return torch.bmm(x.view(1, 1, -1).expand(len(blocks), 1, -1), blocks.mT).view(*x.shape[:-1], -1)
        return F.linear(x, self.weight)


def install(model):
    """Turn the linear layers of `model` into OneRowLinear, weights and names as they are; returns the model."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None:
            module.__class__ = OneRowLinear
    return model


@contextlib.contextmanager
def one_row_kernels(rows, model):
    """For one or two rows in bfloat16 on a CPU: PyTorch's own matrix-vector kernel reads the weights twice as fast as
    the oneDNN one that it would take otherwise (2 cores, one row: 25 against 12 GB/s)."""
    weight, enabled = model.tok_embeddings.weight, torch.backends.mkldnn.enabled
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and rows <= 2:
        torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled
