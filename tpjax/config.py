"""The model's architecture as plain, validated data. No I/O: ``families.py`` fills it from a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tpjax.errors import ConfigError

LayerType = Literal["full_attention", "sliding_attention"]
LAYER_TYPES: tuple[LayerType, ...] = ("full_attention", "sliding_attention")
Activation = Literal["silu", "gelu_tanh"]


def check_size(name: str, value: object) -> None:
    """Raises a ``ConfigError`` unless the value is a whole number, 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r} is not a whole number, 1 or more")


def check_positive(name: str, value: object) -> None:
    """Raises a ``ConfigError`` unless the value is a finite number above 0."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fine or value <= 0:  # type: ignore[operator]
        raise ConfigError(f"{name}={value!r} is not a positive number")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: ``default``; ``linear`` (positions divided by ``factor``); ``llama3`` (long wavelengths divided
            by ``factor``, short ones kept, a ramp between; Llama 3.1 report, section 3.4.2).
        factor: context extension factor.
        low_freq_factor: ``llama3``: wavelengths over original / low_freq_factor are scaled in full.
        high_freq_factor: ``llama3``: wavelengths under original / high_freq_factor are kept.
        original_max_position_embeddings: ``llama3``: context of the pre-training, tokens.
        divisors: divides each frequency, if given: what GGUF files hold in place of ``llama3`` parameters.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    divisors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("default", "linear", "llama3"):
            raise ConfigError(f"rope_type={self.kind!r} is not supported: use default, linear or llama3")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            check_positive(f"rope {name}", getattr(self, name))
        check_size("rope original_max_position_embeddings", self.original_max_position_embeddings)
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"rope low_freq_factor={self.low_freq_factor} is not below "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, section 2.1, https://arxiv.org/abs/2405.04434).

    Keys and values of all heads are projections of one latent per token, and all heads share the part of the
    key that rotates, the last ``rotary_dim`` of ``head_dim``. These two are what the cache holds.

    Attributes:
        q_lora_rank: width of the queries' own latent; ``None``: they are projected from the residual.
        kv_lora_rank: width of the keys' and values' latent.
        v_head_dim: of a value head.
        rope_interleave: the checkpoint rotates pairs (2i, 2i + 1), not halves.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    v_head_dim: int
    rope_interleave: bool

    def __post_init__(self) -> None:
        for name in (
            "kv_lora_rank",
            "v_head_dim",
            *(["q_lora_rank"] if self.q_lora_rank is not None else []),
        ):
            check_size(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Letters in brackets are the dimension names used in every shape.

    Attributes:
        model_type: the family, as Hugging Face names it.
        vocab_size: tokens [V].
        hidden_size: width of the residual [D].
        intermediate_size: width of the MLP [F].
        num_layers: decoder layers.
        num_heads: query heads [H].
        num_kv_heads: key and value heads [K]; divides ``num_heads``.
        head_dim: [h].
        max_position_embeddings: longest context the model was made for, tokens.
        rms_norm_eps: epsilon of every norm.
        rope: rotary embedding of full-attention layers.
        rope_sliding: of sliding-window layers; ``None``: the same.
        layer_types: one entry a layer.
        sliding_window: keys a sliding layer sees, the query's own included, tokens.
        tie_word_embeddings: the vocabulary projection is the embedding, transposed.
        activation: gate of the MLP.
        qk_norm: RMS norm of each query and key head before RoPE.
        sandwich_norms: also norm each block's output before the residual (four norms a layer).
        norm_offset: norms multiply by ``norm_offset + weight`` (1 for Gemma).
        embedding_scale: multiplies the embeddings.
        query_scale: multiplies query-key products.
        attention_bias: q, k, v have biases.
        attention_out_bias: ``o_proj`` has a bias.
        mlp_bias: the MLP's projections have biases.
        rotary_dim: dimensions of a head that rotate, the first ones; ``None``: all.
        latent: latent attention in place of keys and values per head; ``None``: not.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    layer_types: tuple[LayerType, ...]
    rope_sliding: RopeConfig | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    activation: Activation = "silu"
    qk_norm: bool = False
    sandwich_norms: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    query_scale: float
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    rotary_dim: int | None = None
    latent: LatentConfig | None = None

    @property
    def rotated_dim(self) -> int:
        """Dimensions of a head that rotate."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        )
        for name in sizes:
            check_size(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} is not a divisor of num_heads={self.num_heads}"
            )
        if self.rotated_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd: rotary embeddings need pairs")
        for name in ("rms_norm_eps", "embedding_scale", "query_scale"):
            check_positive(name, getattr(self, name))
        if len(self.layer_types) != self.num_layers:
            raise ConfigError(
                f"layer_types has {len(self.layer_types)} entries, but num_layers={self.num_layers}"
            )
        for kind in self.layer_types:
            if kind not in LAYER_TYPES:
                raise ConfigError(
                    f"layer type {kind!r} is not supported: use one of {', '.join(LAYER_TYPES)}"
                )
        if "sliding_attention" in self.layer_types:
            check_size("sliding_window", self.sliding_window)
        if self.activation not in ("silu", "gelu_tanh"):
            raise ConfigError(f"activation={self.activation!r} is not supported: use silu or gelu_tanh")

    def rope_of(self, layer_type: LayerType) -> RopeConfig:
        """The rotary embedding of a kind of layer."""
        sliding = layer_type == "sliding_attention" and self.rope_sliding is not None
        return self.rope_sliding if sliding and self.rope_sliding else self.rope

    def window_of(self, layer_type: LayerType) -> int | None:
        """Keys a layer of that kind sees, or ``None`` for all."""
        return self.sliding_window if layer_type == "sliding_attention" else None
