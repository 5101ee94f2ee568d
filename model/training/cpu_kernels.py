"""Faster training on a CPU: attention and cross-entropy by blocks that stay in the cache. install() puts them in.

Shape letters: B batch, T tokens, H query heads, G key/value heads, D head size, C model width, V vocabulary, N = B * T.
"""

import torch


def install(model, device, dtype):
    """Have `model`, a Transformer, train with these kernels where they serve: on the CPU, attention in bfloat16."""
    on_cpu = device.type == "cpu"
    model.training_loss_kernel = ChunkedCrossEntropy.apply if on_cpu else None
    for layer in model.layers:
        layer.attention.training_kernel = BlockAttention.apply if on_cpu and dtype == torch.bfloat16 else None


class BlockAttention(torch.autograd.Function):
    """Causal attention for bfloat16 training on a CPU, where PyTorch's fused kernel loses its time in tiny products.

    Queries go in blocks, each against all keys up to its end, all heads of all rows in one batched product, so that a
    block's scores stay in the cache and the upper triangle is never computed. Probabilities are kept for the backward
    pass in bfloat16: B * H * T^2 bytes a layer. Backward: dS = P * (dP - rowsum(dO * O)), as in FlashAttention-2 (Dao
    2023, arXiv 2307.08691, algorithm 2).
    """

    BLOCK = 64

    @staticmethod
    def forward(ctx, query, key, value):
        (batch, heads, length, size), groups = query.shape, key.shape[1]
        # Query heads that share a key head stand side by side, so one product with that key head serves them all.
        query = (query * size**-0.5).reshape(batch * groups, heads // groups, length, size)
        key, value = (part.reshape(batch * groups, length, size) for part in (key, value))
        output, probabilities = torch.empty_like(query), []
        future = torch.ones(BlockAttention.BLOCK, BlockAttention.BLOCK, dtype=torch.bool).triu(1)
        for start, end in BlockAttention.blocks(length):
            scores = query[:, :, start:end].flatten(1, 2) @ key[:, :end].transpose(1, 2)
            scores = scores.view(*query.shape[:2], end - start, end)
            scores[..., start:].masked_fill_(future[: end - start, : end - start], float("-inf"))
            probability = scores.softmax(dim=-1).flatten(1, 2)
            output[:, :, start:end] = (probability @ value[:, :end]).view_as(output[:, :, start:end])
            probabilities.append(probability)
        ctx.save_for_backward(query, key, value, output, *probabilities)
        ctx.batch = batch
        return output.view(batch, heads, length, size)

    @staticmethod
    def backward(ctx, output_gradient):
        query, key, value, output, *probabilities = ctx.saved_tensors
        output_gradient = output_gradient.reshape(query.shape)
        product = (output_gradient * output).sum(dim=-1, keepdim=True)
        query_gradient = torch.empty_like(query)
        key_gradient, value_gradient = (torch.zeros(key.shape, dtype=torch.float32) for _ in range(2))
        for probability, (start, end) in zip(probabilities, BlockAttention.blocks(query.shape[2])):
            gradient = output_gradient[:, :, start:end].flatten(1, 2)
            scores_gradient = gradient @ value[:, :end].transpose(1, 2)
            scores_gradient.sub_(product[:, :, start:end].flatten(1, 2)).mul_(probability)
            query_gradient[:, :, start:end] = (scores_gradient @ key[:, :end]).view_as(query_gradient[:, :, start:end])
            key_gradient[:, :end] += scores_gradient.transpose(1, 2) @ query[:, :, start:end].flatten(1, 2)
            value_gradient[:, :end] += probability.transpose(1, 2) @ gradient
        batch, (length, size) = ctx.batch, query.shape[2:]
        query_gradient = (query_gradient * size**-0.5).view(batch, -1, length, size)
        return query_gradient, *(g.to(key.dtype).view(batch, -1, length, size) for g in (key_gradient, value_gradient))

    @staticmethod
    def blocks(length):
        """(start, end) of each block of queries."""
        return [(start, min(start + BlockAttention.BLOCK, length)) for start in range(0, length, BlockAttention.BLOCK)]


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of x [N, C] times weight [V, C] transposed against targets [N] (-100 ignored).

    A chunk's logits become their own gradient while still in the cache (softmax minus one-hot), so neither [N, V] nor a
    second pass over it is needed. Built for the CPU; a GPU has the memory and torch.compile fuses the plain form there.
    """

    ROWS = 256

    @staticmethod
    def forward(ctx, x, weight, targets):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        narrow = weight.to(dtype)
        loss, x_gradient, weight_gradient = 0.0, torch.empty_like(x), torch.zeros_like(weight)
        for rows in range(0, x.shape[0], ChunkedCrossEntropy.ROWS):
            rows = slice(rows, rows + ChunkedCrossEntropy.ROWS)
            part, target = x[rows].to(dtype), targets[rows, None]
            ignored, target = target == -100, target.clamp(min=0)
            logits = (part @ narrow.t()).to(weight.dtype)
            log_sum = logits.logsumexp(dim=-1, keepdim=True)
            loss = loss + (log_sum - logits.gather(1, target)).masked_fill(ignored, 0.0).sum()
            gradient = logits.sub_(log_sum).exp_()
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
