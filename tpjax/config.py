"""The model's architecture as plain, validated data. No I/O: ``families/`` fills it from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from tpjax.errors import ConfigError

LayerType = Literal["full_attention", "sliding_attention"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Norm = Literal["rms", "layer"]
Block = Literal["pre", "sandwich", "post", "parallel", "parallel_two_norms"]
QKNorm = Literal["none", "head", "each_head", "projection"]
PositionEmbedding = Literal["rope", "learned"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
RouterScoring = Literal["softmax", "sigmoid"]
ExpertParallel = Literal["auto", "on", "off"]
ExpertAxis = Literal["experts", "width"]  # the sharded axis of experts [E, D, F]: E or F
SequenceParallel = Literal["auto", "on", "off"]
AttentionBackend = Literal["auto", "reference", "xla", "tpu", "gpu"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["int8", "fp8", "int4"]
KVDtype = Literal["auto", "int8", "fp8"]


# A Python object is made for each layer, head and expert: a number far beyond any model's is rejected before
# that. The deepest published model has 126 layers; the widest have 128 heads and 512 experts.
MAX_LAYERS, MAX_HEADS, MAX_EXPERTS = 1024, 2048, 8192
# Axes of weights, of which the longest published are 53,248 and 262,208; else int32, as token positions are.
MAX_WIDTH, MAX_VOCAB, MAX_INTEGER = 2**20, 2**22, 2**31 - 1

# Upper bounds of a model's sizes.
SIZES = {
    "vocab_size": MAX_VOCAB,
    "hidden_size": MAX_WIDTH,
    "intermediate_size": MAX_WIDTH,
    "num_layers": MAX_LAYERS,
    "num_heads": MAX_HEADS,
    "num_kv_heads": MAX_HEADS,
    "head_dim": MAX_WIDTH,
    "max_position_embeddings": MAX_INTEGER,
}

_MOST_CHARS_SHOWN = 80


def brief(value: object) -> str:
    """Returns a value from a file as an error shows it: one short printable line."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else _written(value)
    return (
        text if len(text) <= _MOST_CHARS_SHOWN else f"{text[:_MOST_CHARS_SHOWN]}... ({len(text)} characters)"
    )


def _written(value: object) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # Python prints no integer of over 4,300 digits
        return f"a {type(value).__name__} too long to write"


def check_size(name: str, value: object, most: int = MAX_INTEGER) -> None:
    """Raises a ``ConfigError`` unless the value is a whole number, 1 to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={brief(value)} is not a whole number, 1 or more")
    check_most(name, value, most)


def check_most(name: str, value: int, most: int) -> None:
    """Raises a ``ConfigError`` if a whole number is over ``most``."""
    if value > most:
        raise ConfigError(f"{name}={brief(value)} is over {most}, the most that is supported")


def _check_sizes(config: object, *names: str) -> None:
    for name in names:
        check_size(name, getattr(config, name), SIZES[name])


def check_positive(name: str, value: object) -> None:
    """Raises a ``ConfigError`` unless the value is a finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # integers are compared as integers: one beyond the range of floats has no float to test for infinity
    fine = number and 0 < value < float("inf")  # type: ignore[operator]
    if not fine or (isinstance(value, int) and value >= 2**63):
        raise ConfigError(f"{name}={brief(value)} is not a positive number")


def check_choice(name: str, value: object, choices: object) -> None:
    """Raises a ``ConfigError`` unless the value is one of the arguments of a ``Literal``."""
    known = get_args(choices)
    if value not in known:
        listed = f"{', '.join(known[:-1])} or {known[-1]}"
        raise ConfigError(f"{name}={brief(value)} is not supported: use {listed}")


@dataclass(frozen=True)
class RopeParameters:
    """Frequencies of a rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: ``default``; ``linear`` (positions divided by ``factor``); ``dynamic`` (the base grows with the
            sequence's length beyond ``original_max_position_embeddings``); ``llama3`` (long wavelengths
            divided by ``factor``, short ones kept, a ramp between; Llama 3.1 report, section 3.4.2);
            ``yarn`` (the same idea with another ramp; Peng et al. 2023, https://arxiv.org/abs/2309.00071);
            ``longrope`` (each frequency has a divisor, and another one in sequences longer than
            ``original_max_position_embeddings``; Ding et al. 2024, https://arxiv.org/abs/2402.13753).
        factor: context extension factor.
        low_freq_factor: ``llama3``: wavelengths over original / low_freq_factor are scaled by ``factor``.
        high_freq_factor: ``llama3``: wavelengths under original / high_freq_factor are kept.
        original_max_position_embeddings: context of the pre-training, tokens.
        divisors: one for each frequency, or ``None``: ``longrope``'s short factors, and what GGUF files hold
            in place of ``llama3`` parameters.
        long_divisors: ``longrope``'s long factors.
        beta_fast: ``yarn``: pairs with more rotations than this over the original context are kept.
        beta_slow: ``yarn``: pairs with fewer rotations than this are scaled by ``factor``.
        truncate: ``yarn``: the ramp's ends are rounded to pair indices.
        attention_factor: ``yarn``, ``longrope``: multiplies cosines and sines, thus queries and keys.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    divisors: tuple[float, ...] | None = None
    long_divisors: tuple[float, ...] | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        check_choice("rope_type", self.kind, RopeKind)
        numbers = (
            "theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
        )
        for name in numbers:
            check_positive(f"rope {name}", getattr(self, name))
        check_size("rope original_max_position_embeddings", self.original_max_position_embeddings)
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"rope low_freq_factor={self.low_freq_factor} is not below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        for name in ("divisors", "long_divisors"):
            for divisor in getattr(self, name) or ():
                check_positive(f"rope {name}", divisor)
        if self.kind == "longrope" and (self.divisors is None or self.long_divisors is None):
            raise ConfigError("rope_type='longrope' needs short and long factors")

    @property
    def follows_length(self) -> bool:
        """Whether frequencies depend on the length of the sequence."""
        return self.kind in ("dynamic", "longrope")

    def scaling_key(self, max_length: int) -> int:
        """Returns a key that is equal for maximum lengths, in tokens, with equal frequencies."""
        if not self.follows_length or max_length <= self.original_max_position_embeddings:
            return 0
        return max_length if self.kind == "dynamic" else 1


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Which dimensions of a head rotate, in which layers, and with which frequencies.

    Attributes:
        full: frequencies in full-attention layers.
        sliding: frequencies in sliding-window layers; ``None``: the same.
        layers: one entry a layer: whether it rotates its queries and keys; ``None``: all do.
        rotary_dim: dimensions of a head that rotate: the first, or with latent attention the last; ``None``:
            all.
    """

    full: RopeParameters = RopeParameters()
    sliding: RopeParameters | None = None
    layers: tuple[bool, ...] | None = None
    rotary_dim: int | None = None

    def parameters_of(self, layer_type: LayerType) -> RopeParameters:
        """Returns the frequencies of a kind of layer."""
        return self.full if layer_type == "full_attention" or self.sliding is None else self.sliding

    def scaling_key(self, max_length: int) -> tuple[int, ...]:
        """Returns a key that is equal for maximum lengths, in tokens, at which a text has equal keys."""
        return tuple(rope.scaling_key(max_length) for rope in (self.full, self.sliding) if rope is not None)


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, section 2.1, https://arxiv.org/abs/2405.04434).

    Keys and values of all heads are projections of one latent per token, and all heads share the part of the
    key that rotates, the last ``rotary_dim`` of ``head_dim``. These two are what the cache holds.

    Attributes:
        q_lora_rank: width of the latent of the queries; ``None``: queries are projected from the residual.
        kv_lora_rank: width of the latent of keys and values.
        v_head_dim: width of a value head.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    v_head_dim: int

    def __post_init__(self) -> None:
        for name in ("q_lora_rank", "kv_lora_rank", "v_head_dim"):
            if name != "q_lora_rank" or self.q_lora_rank is not None:
                check_size(name, getattr(self, name), MAX_WIDTH)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The attention of every layer.

    Attributes:
        num_heads: query heads [H].
        num_kv_heads: key and value heads [K]; divides ``num_heads``.
        head_dim: width of a head [h].
        query_scale: multiplies query-key products.
        softcap: bounds the scaled products smoothly, ``cap * tanh(product / cap)``; ``None``: not.
        bias: q, k and v have biases.
        out_bias: ``o_proj`` has a bias.
        qk_norm: norm of queries and keys before RoPE: ``none``, ``head`` (each head, one weight for all),
            ``each_head`` (each head by a weight of its own), ``projection`` (all heads as one vector).
        sinks: every head has a learned score without a value, which takes a part of the softmax (Xiao et al.
            2023, https://arxiv.org/abs/2309.17453).
        layer_types: one entry a layer.
        sliding_window: keys a sliding-window layer sees, the query's own included, tokens.
        latent: latent attention in place of keys and values per head; ``None``: not.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_scale: float
    softcap: float | None = None
    bias: bool = False
    out_bias: bool = False
    qk_norm: QKNorm = "none"
    sinks: bool = False
    layer_types: tuple[LayerType, ...]
    sliding_window: int | None = None
    latent: LatentConfig | None = None

    def __post_init__(self) -> None:
        _check_sizes(self, "num_heads", "num_kv_heads", "head_dim")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} is not a divisor of num_heads={self.num_heads}"
            )
        check_positive("query_scale", self.query_scale)
        if self.softcap is not None:
            check_positive("attn_softcap", self.softcap)
        check_choice("qk_norm", self.qk_norm, QKNorm)
        for kind in self.layer_types:
            check_choice("layer type", kind, LayerType)
        if "sliding_attention" in self.layer_types:
            check_size("sliding_window", self.sliding_window)
        if self.latent is not None and self.qk_norm != "none":
            raise ConfigError(f"qk_norm={self.qk_norm!r} is not supported with latent attention")

    def window_of(self, layer_type: LayerType) -> int | None:
        """Returns the keys that a layer of a kind sees, or ``None`` for all."""
        return self.sliding_window if layer_type == "sliding_attention" else None


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """The MLP of every layer that has no mixture of experts.

    Attributes:
        intermediate_size: width [F].
        gated: ``down(act(gate(x)) * up(x))``; else ``down(act(up(x)))``.
        activation: non-linearity, of experts too.
        bias: the projections have biases.
    """

    intermediate_size: int
    gated: bool = True
    activation: Activation = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self, "intermediate_size")
        check_choice("activation", self.activation, Activation)


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Every norm.

    Attributes:
        kind: ``rms`` (root mean square) or ``layer`` (mean and variance).
        eps: epsilon.
        bias: norms also add a bias; those of queries and keys never do.
        offset: norms multiply by ``offset + weight`` (1 for Gemma).
    """

    kind: Norm = "rms"
    eps: float
    bias: bool = False
    offset: float = 0.0

    def __post_init__(self) -> None:
        check_choice("norm", self.kind, Norm)
        check_positive("norm_eps", self.eps)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts that replaces the MLP (Shazeer et al. 2017, https://arxiv.org/abs/1701.06538).

    Attributes:
        num_experts: experts of a layer [E].
        experts_per_token: how many of them compute a token [k].
        expert_width: width of one expert [F].
        sparse_layers: one entry a layer: whether experts replace its MLP.
        scoring: ``softmax`` over all experts, or each expert's own ``sigmoid`` (DeepSeek-V3, section 2.1.2,
            https://arxiv.org/abs/2412.19437).
        norm_topk_prob: the chosen experts' scores are divided by their sum. With ``softmax`` that is the
            softmax over the chosen experts alone.
        num_groups: ``sigmoid``: groups of equal size that the experts form.
        groups_per_token: ``sigmoid``: groups that a token's experts are chosen from: those whose two best
            experts score highest.
        routed_scale: multiplies the chosen experts' scores.
        router_bias: the router's scores have a bias.
        correction_bias: ``sigmoid``: a bias per expert that counts in the choice, not in the weights.
        expert_bias: the experts' projections have biases.
        shared_width: width of the expert that computes every token; 0: there is none.
        shared_gate: its output is multiplied by a sigmoid of the token.
        swiglu_limit: gate and up are clamped to this, and the gate is ``(up + 1) * gate * sigmoid(alpha *
            gate)`` (gpt-oss model card, https://arxiv.org/abs/2508.10925); ``None``: as in the MLP.
        swiglu_alpha: alpha of that gate.
        expert_parallel: ``on``: each device holds some of the experts; ``off``: each expert's width F is
            sharded; ``auto``: ``on`` if tp divides the number of experts.
    """

    num_experts: int
    experts_per_token: int
    expert_width: int
    sparse_layers: tuple[bool, ...]
    scoring: RouterScoring = "softmax"
    norm_topk_prob: bool
    num_groups: int = 1
    groups_per_token: int = 1
    routed_scale: float = 1.0
    router_bias: bool = False
    correction_bias: bool = False
    expert_bias: bool = False
    shared_width: int = 0
    shared_gate: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    expert_parallel: ExpertParallel = "auto"

    def __post_init__(self) -> None:
        check_size("expert_width", self.expert_width, MAX_WIDTH)
        for name in ("num_experts", "experts_per_token", "num_groups", "groups_per_token"):
            check_size(name, getattr(self, name), MAX_EXPERTS)
        if self.shared_width != 0:
            check_size("shared_width", self.shared_width, MAX_WIDTH)
        for name in ("routed_scale", "swiglu_alpha"):
            check_positive(name, getattr(self, name))
        if self.swiglu_limit is not None:
            check_positive("swiglu_limit", self.swiglu_limit)
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"experts_per_token={self.experts_per_token} is over num_experts={self.num_experts}"
            )
        check_choice("scoring", self.scoring, RouterScoring)
        if self.scoring == "softmax" and (self.correction_bias or self.num_groups > 1):
            raise ConfigError(
                f"correction_bias={self.correction_bias} and num_groups={self.num_groups} "
                "need scoring='sigmoid', but it is 'softmax'"
            )
        self._check_groups()
        if self.shared_gate and not self.shared_width:
            raise ConfigError("shared_gate=True needs a shared expert, but shared_width=0")
        check_choice("expert_parallel", self.expert_parallel, ExpertParallel)

    def _check_groups(self) -> None:
        if self.num_groups == 1:
            return
        if self.num_experts % self.num_groups or self.num_experts < 2 * self.num_groups:
            raise ConfigError(
                f"num_groups={self.num_groups} does not split num_experts={self.num_experts} "
                "into equal groups of 2 or more"
            )
        reachable = self.groups_per_token * (self.num_experts // self.num_groups)
        if self.groups_per_token > self.num_groups or self.experts_per_token > reachable:
            raise ConfigError(
                f"groups_per_token={self.groups_per_token} of num_groups={self.num_groups} hold {reachable} "
                f"experts, but experts_per_token={self.experts_per_token}"
            )

    def sharded_axis(self, tp: int) -> ExpertAxis:
        """Returns the axis of the expert weights that is sharded over ``tp`` devices.

        Raises:
            ConfigError: ``expert_parallel`` is ``on`` and tp does not divide the number of experts.
        """
        divides = self.num_experts % tp == 0
        if self.expert_parallel == "on" and not divides:
            raise ConfigError(
                f"expert_parallel='on' needs a tp that divides num_experts={self.num_experts}, "
                f"but tp={tp}: use auto or off"
            )
        return "experts" if divides and self.expert_parallel != "off" else "width"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Letters in brackets are the dimension names used in every shape.

    A group of fields belongs to the module that computes with them; what all modules share is here.

    Attributes:
        model_type: the family, as Hugging Face names it.
        vocab_size: tokens [V].
        hidden_size: width of the residual [D].
        num_layers: decoder layers.
        max_position_embeddings: longest context the model was made for, tokens.
        attention: the attention of every layer.
        rope: the rotary embedding of queries and keys.
        mlp: the MLP.
        moe: the mixture of experts that replaces the MLP in some layers; ``None``: in none.
        norm: every norm.
        block: where a layer norms: ``pre`` (what goes into attention and MLP), ``post`` (what comes out),
            ``sandwich`` (both), ``parallel`` (attention and MLP read the same normed input),
            ``parallel_two_norms`` (the same input, each through a norm of its own).
        position_embedding: ``rope`` or ``learned`` (a vector per position, added to the embeddings).
        tie_word_embeddings: the vocabulary projection is the embedding, transposed.
        embedding_scale: multiplies the embeddings.
        residual_scale: multiplies what attention and MLP add to the residual.
        logit_scale: multiplies the logits.
        logit_softcap: bounds the logits smoothly; ``None``: not.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position_embeddings: int
    attention: AttentionConfig
    rope: RopeConfig = RopeConfig()
    mlp: MLPConfig
    moe: MoEConfig | None = None
    norm: NormConfig
    block: Block = "pre"
    position_embedding: PositionEmbedding = "rope"
    tie_word_embeddings: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        _check_sizes(self, "vocab_size", "hidden_size", "num_layers", "max_position_embeddings")
        for name in ("embedding_scale", "residual_scale", "logit_scale"):
            check_positive(name, getattr(self, name))
        if self.logit_softcap is not None:
            check_positive("logit_softcap", self.logit_softcap)
        check_choice("block", self.block, Block)
        check_choice("position_embedding", self.position_embedding, PositionEmbedding)
        self._check_context()
        self._check_layers()
        if self.position_embedding == "rope":
            self._check_rotation()
        if self.attention.latent is not None:
            for name, value, only in (
                ("position_embedding", self.position_embedding, "rope"),
                ("rope_layers", self.rope.layers, None),
            ):
                if value != only:
                    raise ConfigError(f"{name}={value!r} is not supported with latent attention")

    def _check_context(self) -> None:
        if self.rope.full.kind != "dynamic":
            return
        factor, context = self.rope.full.factor, self.max_position_embeddings
        if not 1 <= context * factor <= MAX_INTEGER:
            raise ConfigError(
                f"rope factor={factor} of max_position_embeddings={context} is a context of "
                f"{context * factor:g} tokens: 1 to {MAX_INTEGER} are supported"
            )

    def _check_layers(self) -> None:
        for name, entries in (
            ("layer_types", self.attention.layer_types),
            ("rope_layers", self.rope.layers),
            ("sparse_layers", self.sparse_layers),
        ):
            if entries is not None and len(entries) != self.num_layers:
                raise ConfigError(f"{name} has {len(entries)} entries, but num_layers={self.num_layers}")

    def _check_rotation(self) -> None:
        rotated = self.rotated_dim
        check_size("rotary_dim", rotated)
        if rotated > self.attention.head_dim:
            raise ConfigError(f"rotary_dim={rotated} is over head_dim={self.attention.head_dim}")
        if rotated % 2:
            name = "head_dim" if self.rope.rotary_dim is None else "rotary_dim"
            raise ConfigError(f"{name}={rotated} is odd: rotary embeddings need pairs")
        for rope in (self.rope.full, self.rope.sliding):
            for name in ("divisors", "long_divisors"):
                divisors = None if rope is None else getattr(rope, name)
                if divisors is not None and len(divisors) != rotated // 2:
                    raise ConfigError(
                        f"rope {name} has {len(divisors)} entries, but {rotated} dimensions of a head rotate "
                        f"in {rotated // 2} pairs"
                    )

    @property
    def rotated_dim(self) -> int:
        """Dimensions of a head that rotate."""
        return self.attention.head_dim if self.rope.rotary_dim is None else self.rope.rotary_dim

    @property
    def longest_context(self) -> int:
        """Tokens a sequence may have: more than the model was made for if its RoPE scaling is dynamic."""
        full = self.rope.full
        return int(self.max_position_embeddings * (full.factor if full.kind == "dynamic" else 1.0))

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP read the same input, so that one all-reduce adds up both outputs."""
        return self.block in ("parallel", "parallel_two_norms")

    def rotates(self, layer: int) -> bool:
        """Returns whether a layer rotates its queries and keys."""
        return self.position_embedding == "rope" and (self.rope.layers is None or self.rope.layers[layer])

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """For each layer, whether a mixture of experts replaces the MLP."""
        return (False,) * self.num_layers if self.moe is None else self.moe.sparse_layers

    def of_layers(self, layers: Sequence[int]) -> ModelConfig:
        """Returns the same architecture with only these of its layers, by their numbers."""
        moe, rotated = self.moe, self.rope.layers
        return replace(
            self,
            num_layers=len(layers),
            attention=replace(
                self.attention, layer_types=tuple(self.attention.layer_types[i] for i in layers)
            ),
            rope=replace(self.rope, layers=rotated and tuple(rotated[i] for i in layers)),
            moe=moe and replace(moe, sparse_layers=tuple(moe.sparse_layers[i] for i in layers)),
        )

    def with_expert_parallel(self, expert_parallel: ExpertParallel) -> ModelConfig:
        """Returns the same architecture with :attr:`MoEConfig.expert_parallel` set.

        Raises:
            ConfigError: the value is unknown, or the model has no experts.
        """
        check_choice("expert_parallel", expert_parallel, ExpertParallel)
        if self.moe is not None:
            return replace(self, moe=replace(self.moe, expert_parallel=expert_parallel))
        if expert_parallel != "auto":
            raise ConfigError(
                f"expert_parallel={expert_parallel!r} needs a mixture of experts, "
                f"and this {self.model_type} model has none"
            )
        return self
