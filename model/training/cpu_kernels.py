"""Faster training where PyTorch's own kernels lose time or memory: attention by blocks on a CPU, cross-entropy by chunks
everywhere. install() puts them in.

Shape letters: B batch, T tokens, H query heads, G key/value heads, D head size, C model width, V vocabulary, N = B * T.
"""

import torch

SCORES = 1 << 20  # of a block of queries, all rows and heads together: 4 MB, which stay in the cache of two cores
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
        layer.attention.training_kernel = block_attention if blocks else None


@torch.library.custom_op("minimind::block_attention", mutates_args=())
def attend_by_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """[output, probabilities of each block] of block_attention. (A custom operator is one node to torch.compile, which
    would spend minutes on the loop and make it no faster.)"""
    (batch, heads, length, size), groups = query.shape, key.shape[1]
    # Query heads that share a key head stand side by side, so one product with that key head serves them all.
    shape = batch * groups, heads // groups, length, size
    wide_query = (query.float() * size**-0.5).reshape(shape)
    wide_key, value = key.float().reshape(-1, length, size), value.reshape(-1, length, size)
    output, probabilities = torch.empty(shape, dtype=query.dtype), []
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for start, end in blocks_of(batch, heads, length):
        scores = wide_query[:, :, start:end].flatten(1, 2) @ wide_key[:, :end].transpose(1, 2)
        scores = scores.view(*shape[:2], end - start, end)
        scores[..., start:].masked_fill_(future[start:end, start:end], float("-inf"))
        probability = scores.softmax(dim=-1).to(query.dtype).flatten(1, 2)
        output[:, :, start:end] = (probability @ value[:, :end]).view_as(output[:, :, start:end])
        probabilities.append(probability)
    return [output.view(batch, heads, length, size), *probabilities]


@attend_by_blocks.register_fake
def _(query, key, value):
    (batch, heads, length, _), groups = query.shape, key.shape[1]
    blocks = blocks_of(batch, heads, length)
    shapes = [(batch * groups, (end - start) * (heads // groups), end) for start, end in blocks]
    return [query.new_empty(query.shape), *map(query.new_empty, shapes)]


@torch.library.custom_op("minimind::block_attention_gradients", mutates_args=())
def gradients_by_blocks(
    output_gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    saved: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; saved: what attend_by_blocks returned."""
    (batch, heads, length, size), groups = query.shape, key.shape[1]
    shape = batch * groups, heads // groups, length, size
    output_gradient, query, output = (part.reshape(shape) for part in (output_gradient, query, saved[0]))
    key, wide_value = key.reshape(-1, length, size), value.float().reshape(-1, length, size)
    wide_gradient = output_gradient.float()
    product = (wide_gradient * output).sum(dim=-1, keepdim=True)
    query_gradient = torch.empty_like(query)
    key_gradient, value_gradient = (torch.zeros(key.shape, dtype=torch.float32) for _ in range(2))
    for probability, (start, end) in zip(saved[1:], blocks_of(batch, heads, length)):
        scores_gradient = wide_gradient[:, :, start:end].flatten(1, 2) @ wide_value[:, :end].transpose(1, 2)
        scores_gradient.sub_(product[:, :, start:end].flatten(1, 2)).mul_(probability)
        scores_gradient = scores_gradient.to(query.dtype)
        query_gradient[:, :, start:end] = (scores_gradient @ key[:, :end]).view_as(query_gradient[:, :, start:end])
        key_gradient[:, :end] += scores_gradient.transpose(1, 2) @ query[:, :, start:end].flatten(1, 2)
        value_gradient[:, :end] += probability.transpose(1, 2) @ output_gradient[:, :, start:end].flatten(1, 2)
    gradients = query_gradient * size**-0.5, (key_gradient * size**-0.5).to(key.dtype), value_gradient.to(key.dtype)
    return tuple(gradient.view(batch, -1, length, size) for gradient in gradients)


@gradients_by_blocks.register_fake
def _(output_gradient, query, key, value, saved):
    return tuple(part.new_empty(part.shape) for part in (query, key, value))


def save_for_gradients(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def gradients_of_inputs(ctx, gradients):
    query, key, value, *saved = ctx.saved_tensors
    return gradients_by_blocks(gradients[0], query, key, value, saved)


attend_by_blocks.register_autograd(gradients_of_inputs, setup_context=save_for_gradients)


def block_attention(query, key, value):
    """Causal attention, query [B, H, T, D], key and value [B, G, T, D] -> [B, H, T, D], for bfloat16 training on a CPU,
    where PyTorch's fused kernel loses its time in tiny products.

    Queries go in blocks, each against all keys up to its end, all heads of all rows in one batched product, so that a
    block's scores stay in the cache and the upper triangle is never computed. What the softmax and its derivative
    subtract is float32 (rounded to bfloat16, scores of trained size would be off by several percent), what is summed
    afterwards bfloat16. Probabilities are kept for the backward pass: B * H * T^2 bytes a layer. Backward:
    dS = P * (dP - rowsum(dO * O)), as in FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 2).
    """
    with torch.autocast("cpu", enabled=False):  # which would multiply in bfloat16 what was made float32
        return attend_by_blocks(query, key, value)[0]


def blocks_of(batch, heads, length):
    """(start, end) of each block of queries."""
    size = min(128, max(16, SCORES // (batch * heads * length) // 16 * 16))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


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
        loss, x_gradient = 0.0, torch.empty_like(x)
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # adapters leave it as it is
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
            if weight_gradient is not None:
                weight_gradient += gradient.t() @ part
        ctx.save_for_backward(x_gradient, weight_gradient)
        return loss

    @staticmethod
    def backward(ctx, loss_gradient):
        x_gradient, weight_gradient = ctx.saved_tensors
        return x_gradient * loss_gradient, None if weight_gradient is None else weight_gradient * loss_gradient, None
