"""Faster training where PyTorch's own kernels lose time or memory: attention by blocks on a CPU, cross-entropy by chunks
everywhere. install() puts them in.

Shape letters: B batch, T tokens, H query heads, G key/value heads, D head size, C model width, V vocabulary, N = B * T.
"""

import torch

BLOCK = 64  # queries: their scores stay in the cache of a core
CHUNK = {"cpu": 256, "cuda": 4096}  # rows of logits held at once: in the cache of a core; enough for a GPU


def install(model, device, dtype, compile):
    """Have `model`, a Transformer, train with these kernels where they serve.

    Attention on a CPU in bfloat16, compiled or not. The loss wherever its gradient needs no scaling, as float16's does,
    except in compiled code, which fuses the plain one.
    """
    chunked = device.type in CHUNK and dtype != torch.float16 and not compile
    model.training_loss_kernel = ChunkedCrossEntropy.apply if chunked else None
    blocks = device.type == "cpu" and dtype == torch.bfloat16
    for layer in model.layers:
        layer.attention.training_kernel = BlockAttention.apply if blocks else None


class BlockAttention(torch.autograd.Function):
    """Causal attention for bfloat16 training on a CPU, where PyTorch's fused kernel loses its time in tiny products.

    Queries go in blocks, each against all keys up to its end, all heads of all rows in one batched product, so that a
    block's scores stay in the cache and the upper triangle is never computed. What the softmax and its derivative
    subtract is float32 (rounded to bfloat16, scores of trained size would be off by several percent), what is summed
    afterwards bfloat16. Probabilities are kept for the backward pass: B * H * T^2 bytes a layer. Backward:
    dS = P * (dP - rowsum(dO * O)), as in FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 2).
    """

    @staticmethod
    def forward(ctx, query, key, value):
        (batch, heads, length, size), groups = query.shape, key.shape[1]
        # Query heads that share a key head stand side by side, so one product with that key head serves them all.
        query = query.reshape(batch * groups, heads // groups, length, size)
        key, value = (part.reshape(batch * groups, length, size) for part in (key, value))
        wide_query, wide_key = query.float() * size**-0.5, key.float()
        output, probabilities = torch.empty_like(query), []
        future = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)
        for start, end in blocks_of(length):
            scores = wide_query[:, :, start:end].flatten(1, 2) @ wide_key[:, :end].transpose(1, 2)
            scores = scores.view(*query.shape[:2], end - start, end)
            scores[..., start:].masked_fill_(future[: end - start, : end - start], float("-inf"))
            probability = scores.softmax(dim=-1).to(query.dtype).flatten(1, 2)
            output[:, :, start:end] = (probability @ value[:, :end]).view_as(output[:, :, start:end])
            probabilities.append(probability)
        ctx.save_for_backward(query, key, value, output, *probabilities)
        ctx.batch = batch
        return output.view(batch, heads, length, size)

    @staticmethod
    def backward(ctx, output_gradient):
        query, key, value, output, *probabilities = ctx.saved_tensors
        batch, (length, size) = ctx.batch, query.shape[2:]
        output_gradient = output_gradient.reshape(query.shape)
        wide_gradient, wide_value = output_gradient.float(), value.float()
        product = (wide_gradient * output.float()).sum(dim=-1, keepdim=True)
        query_gradient = torch.empty_like(query)
        key_gradient, value_gradient = (torch.zeros(key.shape, dtype=torch.float32) for _ in range(2))
        for probability, (start, end) in zip(probabilities, blocks_of(length)):
            scores_gradient = wide_gradient[:, :, start:end].flatten(1, 2) @ wide_value[:, :end].transpose(1, 2)
            scores_gradient.sub_(product[:, :, start:end].flatten(1, 2)).mul_(probability)
            scores_gradient = scores_gradient.to(query.dtype)
            query_gradient[:, :, start:end] = (scores_gradient @ key[:, :end]).view_as(query_gradient[:, :, start:end])
            key_gradient[:, :end] += scores_gradient.transpose(1, 2) @ query[:, :, start:end].flatten(1, 2)
            value_gradient[:, :end] += probability.transpose(1, 2) @ output_gradient[:, :, start:end].flatten(1, 2)
        scale = size**-0.5
        query_gradient = (query_gradient * scale).view(batch, -1, length, size)
        key_gradient, value_gradient = (
            gradient.to(key.dtype).view(batch, -1, length, size) for gradient in (key_gradient * scale, value_gradient)
        )
        return query_gradient, key_gradient, value_gradient


def blocks_of(length):
    """(start, end) of each block of queries."""
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of x [N, C] times weight [V, C] transposed against targets [N] (-100 ignored).

    A chunk's logits become their own gradient (softmax minus one-hot) while they are at hand, so neither [N, V] nor a
    second pass over it is needed.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        narrow, chunk = weight.to(dtype), CHUNK[kind]
        loss, x_gradient, weight_gradient = 0.0, torch.empty_like(x), torch.zeros_like(weight)
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            part, target = x[rows].to(dtype), targets[rows, None]
            ignored, target = target == -100, target.clamp(min=0)
            log_probability = torch.log_softmax(part @ narrow.t(), dim=-1, dtype=weight.dtype)
            loss = loss - log_probability.gather(1, target).masked_fill(ignored, 0.0).sum()
            gradient = log_probability.exp_()
            gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
            gradient = gradient.masked_fill_(ignored, 0.0).to(dtype)
            x_gradient[rows] = (gradient @ narrow).to(x.dtype)
            weight_gradient += gradient.t() @ part
        ctx.save_for_backward(x_gradient, weight_gradient)
        return loss

    @staticmethod
    def backward(ctx, loss_gradient):
        x_gradient, weight_gradient = ctx.saved_tensors
        return x_gradient * loss_gradient, weight_gradient * loss_gradient, None
