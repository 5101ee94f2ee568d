"""The shape of a MiniMind model: every number that decides which weights exist and what they compute."""

import math

from transformers import PretrainedConfig

# name -> the fields that differ from LMConfig's defaults. The last four names are v1's first release and a model small
# enough to learn the demo world on two CPU cores within minutes.
PRESETS = {
    "minimind-v1-small": dict(dim=512, n_layers=8),
    "minimind-v1": dict(dim=768, n_layers=16),
    "minimind-v1-moe": dict(dim=512, n_layers=8, use_moe=True, n_shared_experts=2),
    "minimind-v0-small": dict(dim=640, n_layers=8, vocab_size=32000),
    "minimind-v0": dict(dim=1024, n_layers=16, vocab_size=32000),
    "minimind-v0-moe": dict(dim=640, n_layers=8, vocab_size=32000, use_moe=True, n_shared_experts=2),
    "minimind-tiny": dict(dim=192, n_layers=4, n_heads=6, n_kv_heads=3, max_seq_len=256),
}


class LMConfig(PretrainedConfig):
    """Configuration under MiniMind v1's field names; the Hugging Face names are aliases of them.

    Raises ValueError with one line when no model of the given shape can exist.
    """

    model_type = "minimind"
    keys_to_ignore_at_inference = ["kv_cache"]
    rope_scaling = None  # a plain field again: transformers 5 makes it a property that rewrites its value
    attribute_map = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "hidden_dim",
        "rms_norm_eps": "norm_eps",
        "max_position_embeddings": "max_seq_len",
    }

    def __init__(
        self, dim=512, n_layers=8, n_heads=16, n_kv_heads=8, vocab_size=6400, hidden_dim=None, multiple_of=64,
        norm_eps=1e-5, max_seq_len=512, dropout=0.0, flash_attn=True, rope_theta=10000.0, rope_scaling=None,
        use_moe=False, num_experts_per_tok=2, n_routed_experts=4, n_shared_experts=1, scoring_func="softmax",
        aux_loss_alpha=0.01, seq_aux=True, norm_topk_prob=True, head_dim=None, **kwargs,
    ):  # fmt: skip
        self.dim = dim
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.vocab_size = vocab_size
        self.multiple_of = multiple_of
        self.hidden_dim = swiglu_hidden_dim(dim, multiple_of) if hidden_dim is None else hidden_dim
        self.norm_eps = norm_eps
        self.max_seq_len = max_seq_len
        self.dropout = dropout
        self.flash_attn = flash_attn
        self.rope_theta = float(rope_theta)
        self.rope_scaling = dict(rope_scaling) if isinstance(rope_scaling, dict) else rope_scaling or None
        self.use_moe = bool(use_moe)
        self.num_experts_per_tok = num_experts_per_tok
        self.n_routed_experts = n_routed_experts
        self.n_shared_experts = int(n_shared_experts or 0)
        self.scoring_func = scoring_func
        self.aux_loss_alpha = aux_loss_alpha
        self.seq_aux = seq_aux
        self.norm_topk_prob = norm_topk_prob
        self.head_dim = head_dim
        self.check_shape()
        kwargs.setdefault("bos_token_id", 1)
        kwargs.setdefault("eos_token_id", 2)
        kwargs.setdefault("tie_word_embeddings", True)
        super().__init__(**kwargs)

    @property
    def trained_length(self):
        """Tokens of context before RoPE scaling stretched it: max_seq_len without scaling."""
        scaling = self.rope_scaling or {"factor": 1}
        return scaling.get("original_max_position_embeddings") or self.max_seq_len / scaling["factor"]

    def check_shape(self):
        """Raise ValueError naming the first field that makes the model impossible; head_dim None becomes dim / n_heads."""
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "max_seq_len")
        for name in sizes + (("n_routed_experts", "num_experts_per_tok") if self.use_moe else ()):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.head_dim is None:
            if self.dim % self.n_heads:
                raise ValueError(f"dim ({self.dim}) must be divisible by n_heads ({self.n_heads})")
            self.head_dim = self.dim // self.n_heads
        if not isinstance(self.head_dim, int) or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"dim / n_heads ({self.head_dim}) must be even: rotary embedding turns pairs")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be divisible by n_kv_heads ({self.n_kv_heads})")
        for name in ("norm_eps", "dropout", "aux_loss_alpha"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be positive, got {self.rope_theta!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.use_moe:
            self.check_experts()
        if self.rope_scaling is not None:
            self.check_rope_scaling()

    def check_experts(self):
        if self.num_experts_per_tok > self.n_routed_experts:
            chosen, routed = self.num_experts_per_tok, self.n_routed_experts
            raise ValueError(f"num_experts_per_tok ({chosen}) must not exceed n_routed_experts ({routed})")
        if self.n_shared_experts < 0:
            raise ValueError(f"n_shared_experts must not be negative, got {self.n_shared_experts}")
        if self.scoring_func != "softmax":
            raise ValueError(f"scoring_func must be 'softmax', got {self.scoring_func!r}")

    def check_rope_scaling(self):
        """rope_scaling is {"rope_type": "linear" or "yarn", "factor": F >= 1}; yarn also reads beta_fast, beta_slow,
        attention_factor and original_max_position_embeddings (default: max_seq_len / factor, as trained)."""
        scaling = self.rope_scaling
        if not isinstance(scaling, dict):
            raise ValueError(f"rope_scaling must be a dict with rope_type and factor, got {scaling!r}")
        scaling.setdefault("rope_type", scaling.pop("type", None))
        if scaling["rope_type"] not in ("linear", "yarn"):
            raise ValueError(f"rope_scaling rope_type must be 'linear' or 'yarn', got {scaling['rope_type']!r}")
        factor = scaling.get("factor")
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 <= factor < math.inf:
            raise ValueError(f"rope_scaling factor must be a number of at least 1, got {factor!r}")
        for name in ("beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings"):
            value = scaling.get(name) or 1
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"rope_scaling {name} must be a number above 0, got {scaling[name]!r}")


def swiglu_hidden_dim(dim, multiple_of):
    """Width of the feed-forward layer: two thirds of 4 * dim (SwiGLU has three matrices where a plain MLP has two;
    Shazeer 2020, arXiv 2002.05202), rounded up to a multiple of `multiple_of`."""
    return multiple_of * ((2 * 4 * dim // 3 + multiple_of - 1) // multiple_of)


def preset_config(name, **overrides):
    """LMConfig of a preset with single fields replaced; overrides that are None are ignored.

    Raises ValueError for an unknown preset or an impossible shape.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}, choose one of: {', '.join(PRESETS)}")
    return LMConfig(**{**PRESETS[name], **{key: value for key, value in overrides.items() if value is not None}})
