"""Exact maps between MiniMind and the stock classes of transformers, of configurations and of weights, both ways.

    dense                <-> LlamaForCausalLM (MistralForCausalLM where dim is no multiple of n_heads: LlamaConfig refuses it)
    mixture of experts   <-> GraniteMoeSharedForCausalLM

The classes compute the same but for names and for three habits. Rotary embedding turns the pairs (2i, 2i+1) of a head
here and (i, i + D/2) there, so the rows of wq and wk are reordered, which leaves every product of query and key as it
was. Granite keeps w1 and w3 of all experts in one tensor. It multiplies attention scores by attention_multiplier, which
has to be D^-0.5, and weighs experts by a softmax over the k chosen ones, which is our renormalised softmax over all.

Shape letters: D head size, C model width, H width of an expert, S of the shared one, E experts.
"""

import math

import torch

from model.LMConfig import LMConfig

MOE_TYPE = "granitemoeshared"
CLASSES = {"llama": "Llama", "mistral": "Mistral", MOE_TYPE: "GraniteMoeShared"}
OUTER_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm"}
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
}
FEED_FORWARD_NAMES = {
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
IN_MEMORY = {
    "input_linear.weight": "experts.gate_up_proj",
    "output_linear.weight": "experts.down_proj",
    "router.layer.weight": "router.weight",
}
ROUTER_NAME = {"feed_forward.gate": "block_sparse_moe.router.layer"}
# What the stock classes can and MiniMind cannot: the value that means "without it". None and a missing field do too.
WITHOUT = dict(
    attention_bias=False, mlp_bias=False, sliding_window=None, quantization_config=None, embedding_multiplier=1.0,
    logits_scaling=1.0, residual_multiplier=1.0,
)  # fmt: skip
ROPE_WITHOUT = dict(partial_rotary_factor=1.0, truncate=True)
ROPE_KNOWN = ("rope_type", "factor", "beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings")
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
)  # fmt: skip


def stock_type(config):
    """model_type of the stock class that computes what a Transformer of the LMConfig `config` does."""
    return MOE_TYPE if config.use_moe else "mistral" if config.dim % config.n_heads else "llama"


def stock_config(config):
    """config.json of the stock class, a dict, for an LMConfig. transformers 4 and vLLM look for rope_theta and
    rope_scaling, transformers 5 for rope_parameters.

    Raises ValueError for a router without its equal there.
    """
    kind = stock_type(config)
    fields = dict(
        architectures=[f"{CLASSES[kind]}ForCausalLM"], model_type=kind, vocab_size=config.vocab_size,
        hidden_size=config.dim, intermediate_size=config.hidden_dim, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim,
        max_position_embeddings=config.max_seq_len, rms_norm_eps=config.norm_eps, hidden_act="silu",
        attention_bias=False, tie_word_embeddings=True, **rope_fields(config),
    )  # fmt: skip
    if kind == "mistral":
        fields["sliding_window"] = None  # older transformers default to 4096
    if config.use_moe:
        check_router(config.num_experts_per_tok, config.norm_topk_prob)
        fields.update(
            num_local_experts=config.n_routed_experts, num_experts_per_tok=config.num_experts_per_tok,
            shared_intermediate_size=config.n_shared_experts * config.hidden_dim, attention_multiplier=config.head_dim**-0.5,
            embedding_multiplier=1.0, logits_scaling=1.0, residual_multiplier=1.0, router_aux_loss_coef=config.aux_loss_alpha,
        )  # fmt: skip
    return fields


def check_router(experts_per_token, renormalised=True):
    """Raise ValueError unless Granite's router and ours weigh the experts alike: that of a single one is 1 there, its
    probability here."""
    if experts_per_token < 2 or not renormalised:
        raise ValueError("Granite renormalises the weights of 2 or more experts a token, this model does not")


def rope_fields(config):
    """rope_theta, rope_scaling and rope_parameters of config.json. YaRN's trained length is made explicit: left out it
    would be max_position_embeddings there and max_seq_len / factor here."""
    scaling = {**config.rope_scaling, "factor": float(config.rope_scaling["factor"])} if config.rope_scaling else None
    if scaling and scaling["rope_type"] == "yarn":
        trained = config.trained_length
        scaling["original_max_position_embeddings"] = int(trained) if trained == int(trained) else trained
    parameters = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    return dict(rope_theta=config.rope_theta, rope_scaling=scaling, rope_parameters=parameters)


def fields_of_stock_config(description):
    """LMConfig's fields for a stock class's config.json, a dict. Raises ValueError with one line for an architecture or a
    feature that MiniMind does not have."""
    from transformers import AutoConfig  # here, for it takes a fifth of a second

    kind = description.get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"model_type {kind!r} is none of minimind, {', '.join(CLASSES)}, the ones that can be read")
    for name in SIZES:
        if not isinstance(description.get(name, 1), int) or description.get(name, 1) < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {description[name]!r}")
    theirs = AutoConfig.for_model(**description)  # fills in what config.json leaves to the class
    for name, value in WITHOUT.items():
        if getattr(theirs, name, None) not in (None, value):
            raise ValueError(f"{name} is {getattr(theirs, name)!r}, which MiniMind does not have")
    if theirs.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {theirs.hidden_act!r}, MiniMind's is silu")
    scaling = dict(theirs.rope_parameters)
    theta, rope_type = scaling.pop("rope_theta"), scaling.get("rope_type")
    scaling.pop("type", None)
    for name in scaling.keys() - set(ROPE_KNOWN):
        if scaling[name] not in (None, ROPE_WITHOUT.get(name)):
            raise ValueError(f"RoPE's {name} is {scaling[name]!r}, which MiniMind does not have")
        del scaling[name]
    fields = dict(
        dim=theirs.hidden_size, n_layers=theirs.num_hidden_layers, n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads, vocab_size=theirs.vocab_size, hidden_dim=theirs.intermediate_size,
        norm_eps=theirs.rms_norm_eps, max_seq_len=theirs.max_position_embeddings, rope_theta=theta,
        head_dim=getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        rope_scaling=None if rope_type == "default" else scaling,
    )  # fmt: skip
    if kind == MOE_TYPE:
        check_router(theirs.num_experts_per_tok)
        if not math.isclose(theirs.attention_multiplier, fields["head_dim"] ** -0.5, rel_tol=1e-6):
            raise ValueError(f"attention_multiplier is {theirs.attention_multiplier}, MiniMind's is head size ** -0.5")
        shared, rest = divmod(theirs.shared_intermediate_size, theirs.intermediate_size)
        if rest:
            raise ValueError("shared_intermediate_size is no multiple of intermediate_size")
        fields.update(
            use_moe=True, n_routed_experts=theirs.num_local_experts, num_experts_per_tok=theirs.num_experts_per_tok,
            n_shared_experts=shared, aux_loss_alpha=theirs.router_aux_loss_coef,
        )  # fmt: skip
    return fields


def weight_names(config):
    """(name here, name in the stock class) of every tensor that is one there too."""
    inner = {**LAYER_NAMES, **(ROUTER_NAME if config.use_moe else FEED_FORWARD_NAMES)}
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in OUTER_NAMES.items()}
    for layer in range(config.n_layers):
        prefix = f"layers.{layer}."
        names |= {f"{prefix}{ours}.weight": f"model.{prefix}{theirs}.weight" for ours, theirs in inner.items()}
    return names.items()


def is_rotated(name):
    """Whether the rows of the tensor of this name are what rotary embedding turns."""
    return name.endswith((".wq.weight", ".wk.weight"))


def half_split(weight, head_dim):
    """wq or wk [heads * D, C] with each head's rows 0, 1, 2, 3, ... in the order 0, 2, ..., 1, 3, ..."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def interleaved(weight, head_dim):
    """What half_split was given."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def stock_weights(state, config):
    """The stock class's state dict, as its files hold it, of a Transformer's `state`. The output matrix is tied and left
    out."""
    stock = {}
    for ours, theirs in weight_names(config):
        stock[theirs] = half_split(state[ours], config.head_dim) if is_rotated(ours) else state[ours]
    for layer in range(config.n_layers if config.use_moe else 0):
        ours, theirs = f"layers.{layer}.feed_forward", f"model.layers.{layer}"
        experts = [f"{ours}.experts.{index}" for index in range(config.n_routed_experts)]
        inputs = [joined_inputs(state, expert) for expert in experts]
        stock[f"{theirs}.block_sparse_moe.input_linear.weight"] = torch.stack(inputs)  # [E, 2H, C]
        outputs = [state[f"{expert}.w2.weight"] for expert in experts]
        stock[f"{theirs}.block_sparse_moe.output_linear.weight"] = torch.stack(outputs)  # [E, C, H]
        if config.n_shared_experts:
            shared = f"{ours}.shared_experts"
            stock[f"{theirs}.shared_mlp.input_linear.weight"] = joined_inputs(state, shared)  # [2S, C]
            stock[f"{theirs}.shared_mlp.output_linear.weight"] = state[f"{shared}.w2.weight"]  # [C, S]
    return stock


def stock_model(model):
    """The stock class with the weights of `model`, a Transformer, in memory: LlamaForCausalLM and so on, float32, on the CPU.

    Raises ValueError for a router without its equal there.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**stock_config(model.config))
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    load_stock_weights(stock, model.state_dict(), model.config)
    return stock


def load_stock_weights(stock, state, config):
    """Copy a Transformer's `state` into the stock model. Raises RuntimeError where it does not fit."""
    weights, own = stock_weights(state, config), stock.state_dict()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    stock.load_state_dict({name if name in own else renamed(name): tensor for name, tensor in weights.items()})


def weights_of_stock_model(stock, config):
    """The stock model's weights as a Transformer's state dict, the output matrix included."""
    in_files = {in_memory: name for name, in_memory in IN_MEMORY.items()}
    state = state_of_stock_weights(
        {renamed(name, in_files): tensor for name, tensor in stock.state_dict().items()}, config
    )
    return {**state, "output.weight": state["tok_embeddings.weight"]}


def renamed(name, names=IN_MEMORY):
    """The name of a tensor with what follows Granite's "block_sparse_moe" replaced as `names` say: transformers 5 has other
    names in memory than in files."""
    before, block, after = name.partition(".block_sparse_moe.")
    return before + block + names.get(after, after)


def joined_inputs(state, expert):
    """w1 above w3 of a SwiGLU: [2H, C]."""
    return torch.cat([state[f"{expert}.w1.weight"], state[f"{expert}.w3.weight"]])


def state_of_stock_weights(stock, config):
    """v1's state dict of a stock class's. The output matrix comes along where there is one. Raises ValueError for a tensor
    that is missing or has no place here, and for one that cannot be reordered or cut for its shape."""
    stock = {name: tensor for name, tensor in stock.items() if not name.endswith("rotary_emb.inv_freq")}

    def take(name):
        if name not in stock:
            raise ValueError(f"tensor {name} is missing")
        return stock.pop(name)

    state = {}
    try:
        for ours, theirs in weight_names(config):
            tensor = take(theirs)
            state[ours] = interleaved(tensor, config.head_dim) if is_rotated(ours) else tensor
        for layer in range(config.n_layers if config.use_moe else 0):
            ours, theirs = f"layers.{layer}.feed_forward", f"model.layers.{layer}"
            inputs = take(f"{theirs}.block_sparse_moe.input_linear.weight")
            outputs = take(f"{theirs}.block_sparse_moe.output_linear.weight")
            experts = {f"{ours}.experts.{index}": pair for index, pair in enumerate(zip(inputs, outputs))}
            if config.n_shared_experts:
                shared = [take(f"{theirs}.shared_mlp.{name}_linear.weight") for name in ("input", "output")]
                experts[f"{ours}.shared_experts"] = shared
            for name, (w1_and_w3, w2) in experts.items():
                state[f"{name}.w1.weight"], state[f"{name}.w3.weight"] = w1_and_w3.chunk(2)
                state[f"{name}.w2.weight"] = w2
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"a tensor has another shape than config.json says ({error})") from None
    if "lm_head.weight" in stock:
        state["output.weight"] = stock.pop("lm_head.weight")
    for name in stock:
        raise ValueError(f"tensor {name} has no place in a MiniMind")
    return state


def fields_of_config(description, names):
    """LMConfig's fields `names` of a Hugging Face config.json, MiniMind's own or a stock class's, complete. Raises
    ValueError as fields_of_stock_config and LMConfig do."""
    if description.get("model_type") == "minimind":
        fields = {name: description[name] for name in names if name in description}
        if not fields.get("head_dim") and {"dim", "n_heads"} <= fields.keys():
            fields["head_dim"] = fields["dim"] // fields["n_heads"]  # v1's rule, also where it leaves a rest
    else:
        fields = fields_of_stock_config(description)
    config = LMConfig(**fields)
    return {name: getattr(config, name) for name in names}
