"""The MiniMind transformer: a Llama-style decoder, dense or with a mixture of experts (DeepSeek-V2 style).

Shape letters in comments: B batch, T new tokens, K keys (cached and new), H query heads, G key/value heads,
D head size, C model width, V vocabulary, E routed experts, N = B * T.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .LMConfig import LMConfig

LONGEST_TABLE = 1 << 16  # positions of the rotary table made at once, where a model has so many


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, in float32 whatever the input (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        if x.dtype == self.weight.dtype:  # the kernel computes in float32 by itself
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rope_frequencies(config):
    """Angle per position of each rotary pair, float32 [D / 2], and the factor cos and sin are multiplied by.

    Plain: theta^(-2i / D) (Su et al. 2021, arXiv 2104.09864). Linear scaling divides every angle by the factor (Chen et
    al. 2023, arXiv 2306.15595). YaRN divides only the slow pairs, those that turn less than beta_slow times within the
    trained length, keeps those that turn more than beta_fast times, blends between, and sharpens attention by
    0.1 ln(factor) + 1 (Peng et al. 2023, arXiv 2309.00071, eqs. 22-23).
    """
    size, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    pair = torch.arange(0, size, 2, dtype=torch.float32)
    frequencies = 1.0 / theta ** (pair / size)
    if scaling is None:
        return frequencies, 1.0
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return frequencies / factor, 1.0

    def pair_that_turns(turns):
        return size * math.log(config.trained_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.get("beta_fast") or 32.0)), 0)
    high = min(math.ceil(pair_that_turns(scaling.get("beta_slow") or 1.0)), size - 1)
    slow = ((torch.arange(size // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
    attention_factor = scaling.get("attention_factor") or 0.1 * math.log(factor) + 1.0
    return frequencies / factor * slow + frequencies * (1 - slow), attention_factor


class RotaryTable:
    """cos and sin of every position as one float32 tensor [positions, D / 2, 2], made on first use, doubled when outgrown.

    Neither parameter nor buffer, so .to(bfloat16) cannot round it and from_pretrained, which builds models on the
    meta device, cannot leave it unfilled.
    """

    def __init__(self, config):
        self.config = config
        self.table = None

    def __call__(self, positions, device):
        """The first `positions` rows, float32 [positions, D / 2, 2], on `device`."""
        if self.table is None or self.table.shape[0] < positions or self.table.device != device:
            known = 0 if self.table is None else self.table.shape[0]
            rows = max(positions if positions <= known else 2 * known, positions)
            rows = max(rows, min(self.config.max_seq_len, LONGEST_TABLE))
            with torch.inference_mode(False):  # a table made while generating must serve training too
                frequencies, scale = rope_frequencies(self.config)
                angles = torch.outer(torch.arange(rows, dtype=torch.float32), frequencies)
                self.table = (torch.stack((angles.cos(), angles.sin()), dim=-1) * scale).to(device)
        return self.table[:positions]


def apply_rotary(x, rotary):
    """Turn the interleaved pairs (2i, 2i+1) of x [B, T, heads, D] by rotary [T or B x T, 1, D / 2, 2]; same dtype back.

    A pair is a complex number and turning it a complex product: one pass over memory. torch.compile cannot fuse
    complex numbers, so compiled code spells the product out.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (real, imaginary), (cos, sin) = pairs.unbind(-1), rotary.unbind(-1)
        turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary))
    return turned.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (GQA; Ainslie et al. 2023, arXiv 2305.13245).

    training_kernel(query, key, value), where one is set, takes the place of scaled_dot_product_attention in training.
    """

    training_kernel = None

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.dropout, self.flash_attn = config.dropout, config.flash_attn
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.wo.writes_residual = True

    def forward(self, x, rotary, mask, kv_cache, layer_index):
        """x [B, T, C] -> [B, T, C]. mask: bool [B or 1, 1, T, K], True may be attended; None means plainly causal."""
        batch, length, _ = x.shape
        query = apply_rotary(self.wq(x).view(batch, length, self.n_heads, self.head_dim), rotary).transpose(1, 2)
        key = apply_rotary(self.wk(x).view(batch, length, self.n_kv_heads, self.head_dim), rotary).transpose(1, 2)
        value = self.wv(x).view(batch, length, self.n_kv_heads, self.head_dim).transpose(1, 2)
        if kv_cache is not None:
            key, value = kv_cache.update(key, value, layer_index)
        output = self.attend(query, key, value, mask)
        output = self.wo(output.transpose(1, 2).reshape(batch, length, -1))
        return F.dropout(output, self.dropout, self.training)

    def attend(self, query, key, value, mask):
        """query [B, H, T, D], key and value [B, G, K, D] -> [B, H, T, D], by the fastest kernel that can do it."""
        dropout = self.dropout if self.training else 0.0
        causal_alone = mask is None and dropout == 0 and query.shape[2] == key.shape[2]
        if self.training_kernel and self.flash_attn and causal_alone and torch.is_grad_enabled():
            return self.training_kernel(query, key, value)
        attend = F.scaled_dot_product_attention if self.flash_attn else plain_attention
        # "if" makes a plain bool of a length that torch.compile keeps symbolic; a kernel's flag may not be symbolic.
        causal = True if mask is None and query.shape[2] > 1 else False
        grouped = self.n_heads != self.n_kv_heads
        if grouped and self.flash_attn and not shares_keys(query.device.type, query.dtype, mask):
            key, value = repeat_heads(query, key, value)
            grouped = False
        return attend(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped)


def shares_keys(device_type, dtype, mask):
    """Whether a fused kernel lets query heads share a key head: on CUDA only in 16 bits and without a mask; otherwise
    scaled_dot_product_attention would fall back to one that holds all scores in memory."""
    return device_type != "cuda" or (mask is None and dtype in (torch.bfloat16, torch.float16))


def repeat_heads(query, key, value):
    """key and value [B, G, K, D] repeated for every head of query: [B, H, K, D]."""
    return (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))


def plain_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
    """softmax(Q K^T / sqrt(D)) V written out, with scaled_dot_product_attention's arguments (flash_attn=False)."""
    if enable_gqa:
        key, value = repeat_heads(query, key, value)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    weights = torch.softmax(scores.float(), dim=-1).to(query.dtype)
    return F.dropout(weights, dropout_p) @ value


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim, hidden_dim, dropout=0.0):
        super().__init__()
        self.dropout = dropout
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w2.writes_residual = True
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x):
        return F.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)


class MoEGate(nn.Module):
    """The router: softmax over experts, the top k of them, their weights renormalised to sum to one.

    `expert_load` [E], for the logs: the share of real tokens' choices each expert got in the last forward pass.
    """

    def __init__(self, config):
        super().__init__()
        self.top_k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.alpha, self.per_sequence = config.aux_loss_alpha, config.seq_aux
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.dim))
        self.expert_load = None

    def forward(self, x, token_mask=None):
        """x [B, T, C], token_mask [B, T] (1 = real token) -> weights [N, k], experts [N, k], aux_loss scalar."""
        # Routing decides in float32 in every mode: a bfloat16 router would pick other experts in training than after it.
        with torch.autocast(device_type=x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).softmax(dim=-1)  # [B, T, E]
        weights, experts = scores.topk(self.top_k, dim=-1, sorted=False)
        if self.normalise and self.top_k > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights.flatten(0, 1), experts.flatten(0, 1), self.balance_loss(scores, experts, token_mask)

    def balance_loss(self, scores, experts, token_mask):
        """alpha * sum_e f_e P_e: f_e the load of expert e (1 when balanced), P_e its mean probability, both within each
        sequence and averaged over sequences (seq_aux; DeepSeek-V2, arXiv 2405.04434, eqs. 23-25) or over the batch."""
        if token_mask is None:
            token_mask = torch.ones(scores.shape[:2], device=scores.device)
        if not self.per_sequence:
            scores, experts, token_mask = (part.flatten(0, 1)[None] for part in (scores, experts, token_mask))
        real = token_mask.to(scores.dtype)
        tokens = real.sum(dim=1, keepdim=True).clamp(min=1)  # [B, 1]
        picked = torch.zeros_like(scores).scatter_(2, experts, 1.0) * real[..., None]
        share = picked.sum(dim=1) / (tokens * self.top_k)  # [B, E], sums to one
        self.expert_load = share.mean(dim=0)
        load = share * scores.shape[-1]
        probability = (scores * real[..., None]).sum(dim=1) / tokens
        return self.alpha * (load * probability).sum(dim=1).mean()


class MOEFeedForward(nn.Module):
    """Routed experts, each a SwiGLU, weighted by the gate, plus shared experts that see every token."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.experts = nn.ModuleList(
            FeedForward(config.dim, config.hidden_dim, config.dropout) for _ in range(config.n_routed_experts)
        )
        self.gate = MoEGate(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = FeedForward(config.dim, config.hidden_dim * config.n_shared_experts, config.dropout)

    def forward(self, x, token_mask=None):
        """x [B, T, C] -> output [B, T, C], aux_loss scalar."""
        weights, experts, aux_loss = self.gate(x, token_mask)
        output = self.routed(x.reshape(-1, x.shape[-1]), weights, experts).view_as(x)
        if self.shared_experts is not None:
            output = output + self.shared_experts(x)
        return output, aux_loss

    def routed(self, x, weights, experts):
        """x [N, C], weights and experts [N, k] -> [N, C]. Copies of tokens are sorted by expert, so that each expert works
        on one contiguous slice, and the results go back to token order."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        order = experts.flatten().argsort(stable=True)
        ends = (experts.view(-1, 1) <= torch.arange(len(self.experts), device=x.device)).sum(dim=0, dtype=torch.int32)
        copies = x.to(dtype)[:, None].expand(-1, self.top_k, -1).reshape(-1, x.shape[-1]).index_select(0, order)
        results = self.grouped(copies, ends) if self.can_group(copies) else self.one_by_one(copies, ends)
        results = results.index_select(0, order.argsort()).view(-1, self.top_k, x.shape[-1])
        return (results * weights[..., None].to(results.dtype)).sum(dim=1).to(x.dtype)

    def can_group(self, copies):
        """Whether grouped products can do it and are faster: on a GPU, which would wait for the numbers, and in compiled
        training, which would break off. They copy all weights, so that a CPU is faster without. Layers that adapters have
        replaced must be called themselves."""
        pays = copies.device.type == "cuda" or (torch.compiler.is_compiling() and torch.is_grad_enabled())
        if not pays or copies.dtype == torch.float64 or not hasattr(F, "grouped_mm"):
            return False
        layers = [layer for expert in self.experts for layer in (expert.w1, expert.w2, expert.w3)]
        return all(isinstance(layer, nn.Linear) and layer.in_features % 8 == 0 for layer in layers)

    def grouped(self, copies, ends):
        """copies [N * k, C] sorted by expert, those of expert e ending at ends[e] -> [N * k, C], in three products and
        without waiting for the device to tell the numbers."""

        def product(rows, name):
            matrices = torch.stack([getattr(expert, name).weight.to(rows.dtype) for expert in self.experts])
            return F.grouped_mm(rows, matrices.transpose(1, 2), offs=ends)

        output = product(F.silu(product(copies, "w1")) * product(copies, "w3"), "w2")
        return F.dropout(output, self.experts[0].dropout, self.training)

    @torch.compiler.disable
    def one_by_one(self, copies, ends):
        """The same, one expert after the other. An expert without tokens has a gradient too: zero, as in grouped()."""
        slices = zip(self.experts, copies.tensor_split(ends[:-1].tolist()))
        return torch.cat([expert(part) for expert, part in slices if len(part) or torch.is_grad_enabled()])


class TransformerBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed_forward(norm(x)). After model.gradient_checkpointing_enable() training computes
    it again in the backward pass instead of keeping what is in between (Chen et al. 2016, arXiv 1604.06174)."""

    def __init__(self, config, layer_index):
        super().__init__()
        self.layer_index = layer_index
        self.attention = Attention(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        moe = config.use_moe
        self.feed_forward = (
            MOEFeedForward(config) if moe else FeedForward(config.dim, config.hidden_dim, config.dropout)
        )

    def forward(self, x, rotary, mask, kv_cache, token_mask):
        """x [B, T, C] -> x [B, T, C], aux_loss (None when dense)."""
        x = x + self.attention(self.attention_norm(x), rotary, mask, kv_cache, self.layer_index)
        normed = self.ffn_norm(x)
        if isinstance(self.feed_forward, MOEFeedForward):
            output, aux_loss = self.feed_forward(normed, token_mask)
            return x + output, aux_loss
        return x + self.feed_forward(normed), None


@dataclass
class MiniMindOutput(ModelOutput):
    """loss: cross-entropy alone; aux_loss: MoE balance loss, already times alpha (0 when dense); logits [B, T, V];
    past_key_values: the cache that was passed in, for transformers' generate()."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    past_key_values: object | None = None


class Transformer(PreTrainedModel, GenerationMixin):
    """MiniMind v1's model under v1's state-dict names. Input and output embeddings are one matrix.

    training_loss_kernel(x, weight, targets), where one is set, takes the place of the summed cross-entropy in training.
    """

    training_loss_kernel = None

    config_class = LMConfig
    base_model_prefix = ""
    _tied_weights_keys = {"output.weight": "tok_embeddings.weight"}
    _no_split_modules = ["TransformerBlock"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config=None):
        super().__init__(config or LMConfig())
        config = self.config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config, index) for index in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.output.weight = self.tok_embeddings.weight
        self.rotary_table = RotaryTable(config)
        self.post_init()

    def _init_weights(self, module):
        """Normal(0, 0.02); matrices that write to the residual stream, wo and w2, are scaled by 1 / sqrt(2 n_layers) so
        that its variance does not grow with depth (Radford et al. 2019, GPT-2, section 2.3)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            depth = 2 * self.config.n_layers if getattr(module, "writes_residual", False) else 1
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(depth))
        elif isinstance(module, MoEGate):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self):
        return self.tok_embeddings

    def set_input_embeddings(self, value):
        self.tok_embeddings = value

    def get_output_embeddings(self):
        return self.output

    def set_output_embeddings(self, value):
        self.output = value

    def expert_load(self):
        """Share [L, E] of the last forward pass's routing choices that each expert got in each layer; None if dense."""
        if not self.config.use_moe:
            return None
        return torch.stack([layer.feed_forward.gate.expert_load for layer in self.layers])

    def forward(
        self, input_ids=None, attention_mask=None, labels=None, kv_cache=None, position_ids=None,
        num_items_in_batch=None, logits_to_keep=0, padding_side=None, return_logits=True,
        past_key_values=None, inputs_embeds=None, return_dict=None, **flags,
    ):  # fmt: skip
        """Run the model over input_ids [B, T].

        attention_mask [B, K]: 1 for real tokens, 0 for padding, over cached and new tokens. padding_side="right"
            promises that padding only follows real tokens: causality then hides it and the fast kernel stays in use.
        labels [B, T]: labels[i] is input_ids[i] or -100 (ignored); the shift by one happens here.
        kv_cache: update(key, value, layer_index) stores and returns all keys and values; get_seq_length() tells how
            many tokens each row holds already, an int or a LongTensor [B], and key_count(T) how many keys update()
            will return for T new tokens, which must not wait for the device to tell.
        position_ids [T] or [B, T]: default, the token's place after the cached ones.
        num_items_in_batch: divide the summed loss by this instead of the number of supervised targets.
        logits_to_keep: logits of only the last so many positions (0: all), or LongTensor [B, n]: of these positions.
        return_logits=False (training): .logits is None; with a training_loss_kernel and gradients the loss never holds
            [B, T, V] numbers at once.
        past_key_values, inputs_embeds [B, T, C], return_dict and flags (use_cache, output_attentions, ...): what
            transformers and peft pass. A transformers Cache is a kv_cache. Raises TypeError for a flag that asks for
            what this model does not give.
        """
        known = ("use_cache", "cache_position")
        if wanted := [
            name for name in flags if name not in known and flags[name] is not None and flags[name] is not False
        ]:
            raise TypeError(f"Transformer.forward() does not know {', '.join(wanted)}")
        kv_cache = past_key_values if kv_cache is None else kv_cache
        if input_ids is None:
            input_ids = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        past = 0 if kv_cache is None else kv_cache.get_seq_length()
        keys = past + input_ids.shape[1] if isinstance(past, int) else kv_cache.key_count(input_ids.shape[1])
        mask = self.attention_mask_4d(input_ids, attention_mask, past, keys, padding_side)
        rotary = self.rotary(input_ids, past, keys, position_ids)
        token_mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        x = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        x = F.dropout(x, self.config.dropout, self.training)
        aux_losses = []
        for layer in self.layers:
            x, aux_loss = layer(x, rotary, mask, kv_cache, token_mask)
            if aux_loss is not None:
                aux_losses.append(aux_loss)
        x = self.norm(x)
        aux_loss = torch.stack(aux_losses).sum() if aux_losses else x.new_zeros((), dtype=torch.float32)
        all_logits = self.output(x) if return_logits and labels is not None else None
        loss = None if labels is None else self.token_loss(x, all_logits, labels, num_items_in_batch)
        logits = self.kept_logits(x, all_logits, logits_to_keep) if return_logits else None
        output = MiniMindOutput(loss=loss, logits=logits, aux_loss=aux_loss, past_key_values=past_key_values)
        return output if return_dict is not False else output.to_tuple()

    def rotary(self, input_ids, past, keys, position_ids):
        """cos and sin of the new tokens' positions, float32 [T or B x T, 1, D / 2, 2]."""
        length, device = input_ids.shape[1], input_ids.device
        if position_ids is None and isinstance(past, int):
            return self.rotary_table(keys, device)[past:, None]
        if position_ids is None:
            position_ids = past[:, None] + torch.arange(length, device=device)
        else:
            keys = int(position_ids.max()) + 1
        return self.rotary_table(keys, device)[position_ids].unsqueeze(-3)

    def attention_mask_4d(self, input_ids, attention_mask, past, keys, padding_side):
        """bool [B or 1, 1, T, K], True where a query may look, or None where plain causality says all there is to say."""
        length, device = input_ids.shape[1], input_ids.device
        if padding_side == "right" or attention_mask is None:
            if isinstance(past, int) and (past == 0 or length == 1):
                return None
        ragged = not isinstance(past, int)
        slots = torch.arange(length, device=device) + (past[:, None] if ragged else past)  # [T] or [B, T]
        allowed = torch.arange(keys, device=device) <= slots[..., None]
        allowed = allowed.view(-1, 1, length, keys)
        if attention_mask is not None and padding_side != "right":
            own = torch.arange(keys, device=device) == slots[..., None]  # a padding query must see something, else NaN
            allowed = allowed & (attention_mask[:, None, None, :].bool() | own.view(-1, 1, length, keys))
        return allowed

    def kept_logits(self, x, all_logits, logits_to_keep):
        """Logits of the last logits_to_keep positions (0: all), or of the positions it holds, LongTensor [B, n]."""
        x = x if all_logits is None else all_logits
        if isinstance(logits_to_keep, torch.Tensor):
            x = x.take_along_dim(logits_to_keep[..., None], dim=1)
        elif logits_to_keep:
            x = x[:, -logits_to_keep:]
        return self.output(x) if all_logits is None else x

    def token_loss(self, x, logits, labels, num_items_in_batch):
        """Cross-entropy of x [B, T, C], or of its logits where they exist, against labels [B, T] shifted by one."""
        x, targets = x[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        if num_items_in_batch is None:
            num_items_in_batch = (targets != -100).sum().clamp(min=1)
        if logits is None and self.training_loss_kernel and torch.is_grad_enabled():
            return self.training_loss_kernel(x, self.output.weight, targets) / num_items_in_batch
        logits = self.output(x) if logits is None else logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum") / num_items_in_batch
