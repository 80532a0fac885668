"""The model's architecture as plain, validated data. No I/O: ``families.py`` fills it from a checkpoint."""

from __future__ import annotations

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
ExpertAxis = Literal["experts", "width"]  # what is sharded of E experts of width F
SequenceParallel = Literal["auto", "on", "off"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


# A Python object is made for each layer, head and expert: a number beyond what any model has by far is
# refused before that. The deepest published model has 126 layers; the widest have 128 heads and 512 experts.
MAX_LAYERS, MAX_HEADS, MAX_EXPERTS = 1024, 2048, 8192
# Axes of weights, of which the longest published are 53,248 and 262,208; all else: token positions are int32.
MAX_WIDTH, MAX_VOCAB, MAX_INTEGER = 2**20, 2**22, 2**31 - 1

_MOST_CHARS_SHOWN = 80


def brief(value: object) -> str:
    """A value from a file as an error shows it: one short printable line."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else _written(value)
    return (
        text if len(text) <= _MOST_CHARS_SHOWN else f"{text[:_MOST_CHARS_SHOWN]}... ({len(text)} characters)"
    )


def _written(value: object) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # Python writes no integer of over 4,300 digits
        return f"a {type(value).__name__} too long to write"


def check_size(name: str, value: object, most: int = MAX_INTEGER) -> None:
    """Raises a ``ConfigError`` unless the value is a whole number, 1 to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={brief(value)} is not a whole number, 1 or more")
    check_most(name, value, most)


def check_most(name: str, value: int, most: int) -> None:
    """Raises a ``ConfigError`` where a whole number is over ``most``."""
    if value > most:
        raise ConfigError(f"{name}={brief(value)} is over {most}, the most that is supported")


def check_positive(name: str, value: object) -> None:
    """Raises a ``ConfigError`` unless the value is a finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # an integer is compared first: one beyond the range of floats is none to ask for being finite
    fine = number and 0 < value < float("inf")  # type: ignore[operator]
    if not fine or (isinstance(value, int) and value >= 2**63):
        raise ConfigError(f"{name}={brief(value)} is not a positive number")


def check_choice(name: str, value: object, choices: object) -> None:
    """Raises a ``ConfigError`` unless the value is one of a ``Literal``'s."""
    known = get_args(choices)
    if value not in known:
        listed = f"{', '.join(known[:-1])} or {known[-1]}"
        raise ConfigError(f"{name}={brief(value)} is not supported: use {listed}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: ``default``; ``linear`` (positions divided by ``factor``); ``dynamic`` (the base grows with the
            sequence's length beyond ``original_max_position_embeddings``); ``llama3`` (long wavelengths
            divided by ``factor``, short ones kept, a ramp between; Llama 3.1 report, section 3.4.2);
            ``yarn`` (the same idea with another ramp; Peng et al. 2023, https://arxiv.org/abs/2309.00071);
            ``longrope`` (frequencies divided one by one, by other numbers where the sequence is longer than
            ``original_max_position_embeddings``; Ding et al. 2024, https://arxiv.org/abs/2402.13753).
        factor: context extension factor.
        low_freq_factor: ``llama3``: wavelengths over original / low_freq_factor are scaled in full.
        high_freq_factor: ``llama3``: wavelengths under original / high_freq_factor are kept.
        original_max_position_embeddings: context of the pre-training, tokens.
        divisors: divides each frequency, if given: ``longrope``'s numbers for short sequences, and what GGUF
            files hold in place of ``llama3`` parameters.
        long_divisors: ``longrope``'s numbers for long sequences.
        beta_fast: ``yarn``: pairs that turn more often over the original context are kept.
        beta_slow: ``yarn``: pairs that turn less often are scaled in full.
        truncate: ``yarn``: the ramp begins and ends at whole pairs.
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
        """Whether frequencies depend on how long the sequence gets."""
        return self.kind in ("dynamic", "longrope")

    def rope_scaling_key(self, max_length: int) -> int:
        """Equal for lengths, tokens, at which frequencies are the same."""
        if not self.follows_length or max_length <= self.original_max_position_embeddings:
            return 0
        return max_length if self.kind == "dynamic" else 1


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, section 2.1, https://arxiv.org/abs/2405.04434).

    Keys and values of all heads are projections of one latent per token, and all heads share the part of the
    key that rotates, the last ``rotary_dim`` of ``head_dim``. These two are what the cache holds.

    Attributes:
        q_lora_rank: width of the queries' own latent; ``None``: they are projected from the residual.
        kv_lora_rank: width of the keys' and values' latent.
        v_head_dim: of a value head.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    v_head_dim: int

    def __post_init__(self) -> None:
        for name in ("q_lora_rank", "kv_lora_rank", "v_head_dim"):
            if name != "q_lora_rank" or self.q_lora_rank is not None:
                check_size(name, getattr(self, name), MAX_WIDTH)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts in place of the MLP (Shazeer et al. 2017, https://arxiv.org/abs/1701.06538).

    Attributes:
        num_experts: experts of a layer [E].
        experts_per_token: how many of them compute a token [k].
        expert_width: width of one expert [F].
        sparse_layers: one entry a layer: whether it has experts; the others have the MLP.
        scoring: ``softmax`` over all experts, or each expert's own ``sigmoid`` (DeepSeek-V3, section 2.1.2,
            https://arxiv.org/abs/2412.19437).
        norm_topk_prob: the chosen experts' scores are divided by their sum. With ``softmax`` that is the
            softmax over the chosen experts alone.
        num_groups: ``sigmoid``: experts are chosen from some of so many groups of equal size.
        groups_per_token: ``sigmoid``: from the groups whose two best experts score highest.
        routed_scale: multiplies the chosen experts' scores.
        router_bias: the router's scores have a bias.
        correction_bias: ``sigmoid``: a bias per expert that counts in choosing, not in weighing.
        expert_bias: the experts' projections have biases.
        shared_width: width of the expert that computes every token; 0: there is none.
        shared_gate: its output is weighed by a sigmoid of the token.
        swiglu_limit: gate and up are clamped to this, and the gate is ``(up + 1) * gate * sigmoid(alpha *
            gate)`` (gpt-oss model card, https://arxiv.org/abs/2508.10925); ``None``: as in the MLP.
        swiglu_alpha: that alpha.
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
                f"num_groups={self.num_groups} does not cut num_experts={self.num_experts} into equal groups "
                "of 2 or more"
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


# The sizes of a model, and the most each may be.
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
        norm: ``rms`` (root mean square) or ``layer`` (mean and variance).
        norm_eps: epsilon of every norm.
        norm_bias: norms also add a bias; those of queries and keys never do.
        norm_offset: norms multiply by ``norm_offset + weight`` (1 for Gemma).
        block: where a layer norms: ``pre`` (what goes into attention and MLP), ``post`` (what comes out),
            ``sandwich`` (both), ``parallel`` (attention and MLP read the same normed input),
            ``parallel_two_norms`` (the same input, each through a norm of its own).
        position_embedding: ``rope`` or ``learned`` (a vector per position, added to the embeddings).
        rope: rotary embedding of full-attention layers.
        rope_sliding: of sliding-window layers; ``None``: the same.
        rope_layers: which layers rotate; ``None``: all.
        rotary_dim: dimensions of a head that rotate: the first, or with ``latent`` the last; ``None``: all.
        layer_types: one entry a layer.
        sliding_window: keys a sliding layer sees, the query's own included, tokens.
        qk_norm: norm of queries and keys before RoPE: ``none``, ``head`` (each head, one weight for all),
            ``each_head`` (each head by a weight of its own), ``projection`` (all heads as one vector).
        query_scale: multiplies query-key products.
        attn_softcap: bounds them smoothly: ``cap * tanh(product / cap)``; ``None``: not.
        attention_bias: q, k, v have biases.
        attention_out_bias: ``o_proj`` has a bias.
        attention_sinks: every head has a score of nothing, which takes its share of the softmax.
        gated_mlp: ``down(act(gate(x)) * up(x))``; else ``down(act(up(x)))``.
        activation: non-linearity of the MLP.
        mlp_bias: the MLP's projections have biases.
        moe: the mixture of experts that stands in for the MLP in some layers; ``None``: in none.
        latent: latent attention in place of keys and values per head; ``None``: not.
        tie_word_embeddings: the vocabulary projection is the embedding, transposed.
        embedding_scale: multiplies the embeddings.
        residual_scale: multiplies what attention and MLP add to the residual.
        logit_scale: multiplies the logits.
        logit_softcap: bounds the logits smoothly; ``None``: not.
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
    norm: Norm = "rms"
    norm_eps: float
    norm_bias: bool = False
    norm_offset: float = 0.0
    block: Block = "pre"
    position_embedding: PositionEmbedding = "rope"
    rope: RopeConfig
    rope_sliding: RopeConfig | None = None
    rope_layers: tuple[bool, ...] | None = None
    rotary_dim: int | None = None
    layer_types: tuple[LayerType, ...]
    sliding_window: int | None = None
    qk_norm: QKNorm = "none"
    query_scale: float
    attn_softcap: float | None = None
    attention_bias: bool = False
    attention_out_bias: bool = False
    attention_sinks: bool = False
    gated_mlp: bool = True
    activation: Activation = "silu"
    mlp_bias: bool = False
    moe: MoEConfig | None = None
    latent: LatentConfig | None = None
    tie_word_embeddings: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        for name, most in SIZES.items():
            check_size(name, getattr(self, name), most)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} is not a divisor of num_heads={self.num_heads}"
            )
        for name in ("norm_eps", "embedding_scale", "query_scale", "residual_scale", "logit_scale"):
            check_positive(name, getattr(self, name))
        for name in ("attn_softcap", "logit_softcap"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        choices = (
            ("norm", Norm),
            ("block", Block),
            ("position_embedding", PositionEmbedding),
            ("qk_norm", QKNorm),
            ("activation", Activation),
        )
        for name, known in choices:
            check_choice(name, getattr(self, name), known)
        for name in ("layer_types", "rope_layers"):
            entries = getattr(self, name)
            if entries is not None and len(entries) != self.num_layers:
                raise ConfigError(f"{name} has {len(entries)} entries, but num_layers={self.num_layers}")
        for kind in self.layer_types:
            check_choice("layer type", kind, LayerType)
        if "sliding_attention" in self.layer_types:
            check_size("sliding_window", self.sliding_window)
        if self.position_embedding == "rope":
            self._check_rotation()
        if self.moe is not None and len(self.moe.sparse_layers) != self.num_layers:
            raise ConfigError(
                f"sparse_layers has {len(self.moe.sparse_layers)} entries, but num_layers={self.num_layers}"
            )
        if self.latent is not None:
            for name, only in (("qk_norm", "none"), ("position_embedding", "rope"), ("rope_layers", None)):
                value = getattr(self, name)
                if value != only:
                    raise ConfigError(f"{name}={value!r} is not supported with latent attention")

    def _check_rotation(self) -> None:
        rotated = self.rotated_dim
        check_size("rotary_dim", rotated)
        if rotated > self.head_dim:
            raise ConfigError(f"rotary_dim={rotated} is over head_dim={self.head_dim}")
        if rotated % 2:
            name = "head_dim" if self.rotary_dim is None else "rotary_dim"
            raise ConfigError(f"{name}={rotated} is odd: rotary embeddings need pairs")
        for rope in (self.rope, self.rope_sliding):
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
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def longest_context(self) -> int:
        """Tokens a sequence may have: beyond what the model was made for where RoPE stretches by itself."""
        stretch = self.rope.factor if self.rope.kind == "dynamic" else 1.0
        return int(self.max_position_embeddings * stretch)

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP read the same input, and one sum takes in what both add to it."""
        return self.block in ("parallel", "parallel_two_norms")

    def rotates(self, layer: int) -> bool:
        """Whether a layer rotates its queries and keys."""
        return self.position_embedding == "rope" and (self.rope_layers is None or self.rope_layers[layer])

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """For each layer, whether a mixture of experts stands in for the MLP."""
        return (False,) * self.num_layers if self.moe is None else self.moe.sparse_layers

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

    def rope_of(self, layer_type: LayerType) -> RopeConfig:
        """The rotary embedding of a kind of layer."""
        sliding = layer_type == "sliding_attention" and self.rope_sliding is not None
        return self.rope_sliding if sliding and self.rope_sliding else self.rope

    def rope_scaling_key(self, max_length: int) -> tuple[int, ...]:
        """Equal for lengths, tokens, at which the same text has the same keys."""
        return tuple(
            rope.rope_scaling_key(max_length) for rope in (self.rope, self.rope_sliding) if rope is not None
        )

    def window_of(self, layer_type: LayerType) -> int | None:
        """Keys a layer of that kind sees, or ``None`` for all."""
        return self.sliding_window if layer_type == "sliding_attention" else None
