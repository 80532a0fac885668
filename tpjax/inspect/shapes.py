"""The dimensions of a model that cost something, and the built-in ones of published models.

A device's share follows the layers' own rules: heads by ``HeadPlan``, widths and vocabulary padded to a
multiple of tp.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpjax.checkpoints.hub import resolve
from tpjax.checkpoints.load import read_config
from tpjax.config import ModelConfig
from tpjax.errors import CheckpointError
from tpjax.sharding import HeadPlan


@dataclass(frozen=True)
class Latent:
    """Latent attention: keys and values are kept as one vector a token (DeepSeek-V2, section 2.1).

    Attributes:
        query_rank: width of the compressed queries; 0: they are projected from the residual.
        rank: width of the compressed keys and values.
        rope_dim: of the rotated part, one for all heads.
        nope_dim: of a head's part that is not rotated.
        value_dim: of a head's values.
    """

    query_rank: int
    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP.

    Attributes:
        count: experts of a layer.
        active: of them per token.
        width: of one.
        shared_width: of the expert every token goes through; 0: there is none.
        dense_layers: layers that have the plain MLP instead.
    """

    count: int
    active: int
    width: int
    shared_width: int = 0
    dense_layers: int = 0


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer, as far as it costs anything. Letters as in ``model.py``.

    Attributes:
        name: of the model.
        layers: decoder layers.
        hidden: D.
        heads: H.
        kv_heads: K.
        head_dim: h.
        width: F of the plain MLP.
        vocab: V.
        tied: the vocabulary projection is the embedding.
        gated: the MLP has gate, up and down, not up and down alone.
        experts: the mixture, if there is one.
        latent: latent attention, if it has that.
        window: keys a sliding layer sees.
        window_layers: how many layers slide.
        layer_vectors: elements of a layer that are no matrices: norms, biases.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    vocab: int
    tied: bool = False
    gated: bool = True
    experts: Experts | None = None
    latent: Latent | None = None
    window: int | None = None
    window_layers: int = 0
    layer_vectors: int = 0

    @classmethod
    def from_config(cls, config: ModelConfig, name: str) -> Shape:
        """The shape of a checkpoint."""
        moe, latent = config.moe, config.latent
        experts = None
        if moe is not None:
            dense_layers = config.num_layers - sum(moe.sparse_layers)
            experts = Experts(
                moe.num_experts, moe.experts_per_token, moe.expert_width, moe.shared_width, dense_layers
            )
        compressed = None
        if latent is not None:
            compressed = Latent(
                query_rank=latent.q_lora_rank or 0,
                rank=latent.kv_lora_rank,
                rope_dim=config.rotated_dim,
                nope_dim=config.head_dim - config.rotated_dim,
                value_dim=latent.v_head_dim,
            )
        return cls(
            name=name,
            layers=config.num_layers,
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            width=config.intermediate_size,
            vocab=config.vocab_size,
            tied=config.tie_word_embeddings,
            gated=config.gated_mlp,
            experts=experts,
            latent=compressed,
            window=config.sliding_window,
            window_layers=config.layer_types.count("sliding_attention"),
            layer_vectors=2 * config.hidden_size,
        )

    @property
    def expert_layers(self) -> int:
        """Layers with a mixture of experts."""
        return self.layers - self.experts.dense_layers if self.experts else 0

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        mixture = self.mixture_weights(1) if self.experts else 0
        return (
            self.layers * (self.attention_weights(1) + self.layer_vectors)
            + (self.layers - self.expert_layers) * self.mlp_weights(1, self.width)
            + self.expert_layers * mixture
            + (1 if self.tied else 2) * self.vocab_weights(1)
            + self.hidden
        )

    @property
    def active_parameters(self) -> int:
        """Elements of the weights that one token is multiplied by."""
        mlp = (self.layers - self.expert_layers) * self.mlp_weights(1, self.width)
        if self.experts:
            few = replace(self.experts, count=self.experts.active)
            mlp += self.expert_layers * replace(self, experts=few).mixture_weights(1)
        return self.layers * self.attention_weights(1) + mlp + self.vocab_weights(1)

    # --- what one of tp devices holds, elements ------------------------------------------------------------

    def attention_weights(self, tp: int) -> int:
        """Matrices of one layer's attention. Latent attention's compressions are whole on every device."""
        if self.latent is None:
            slots, group = self._slots(tp)
            return slots * (2 * group + 2) * self.head_dim * self.hidden
        latent, heads = self.latent, math.ceil(self.heads / tp)
        down = self.hidden * (latent.query_rank + latent.rank + latent.rope_dim)
        up = (latent.query_rank or self.hidden) * (latent.nope_dim + latent.rope_dim)
        up += latent.rank * (latent.nope_dim + latent.value_dim) + latent.value_dim * self.hidden
        return down + heads * up

    def mlp_weights(self, tp: int, width: int) -> int:
        """A gated MLP of that width, or one expert whose width is cut."""
        return (3 if self.gated else 2) * self.hidden * math.ceil(width / tp)

    def mixture_weights(self, tp: int) -> int:
        """One layer's router, on every device, and its share of the experts, each one's width cut."""
        assert self.experts
        experts = self.experts
        routed = experts.count * self.mlp_weights(tp, experts.width)
        return self.hidden * experts.count + routed + self.mlp_weights(tp, experts.shared_width)

    def vocab_weights(self, tp: int) -> int:
        """The embedding, or the vocabulary projection."""
        return math.ceil(self.vocab / tp) * self.hidden

    def cache_elements(self, tp: int) -> int:
        """Of one token in one layer. A latent is one vector for all heads: every device keeps it."""
        if self.latent is not None:
            return self.latent.rank + self.latent.rope_dim
        return 2 * self._slots(tp)[0] * self.head_dim

    def attention_flops(self, tp: int) -> int:
        """Of one query of one layer with one key and its value: score and weighted sum, all heads."""
        if self.latent is not None:
            dims = 2 * self.latent.rank + self.latent.rope_dim  # scores and sums in the latent space
            return 2 * math.ceil(self.heads / tp) * dims
        slots, group = self._slots(tp)
        return 4 * slots * group * self.head_dim

    def _slots(self, tp: int) -> tuple[int, int]:
        plan = HeadPlan(self.heads, self.kv_heads, tp)
        return plan.slots_per_device, plan.group_size


# --- published models --------------------------------------------------------------------------------------


def _model(
    name: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    width: int,
    vocab: int,
    *,
    norms: int = 2,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    other_vectors: int = 0,
    **rest: Any,
) -> Shape:
    """A row of ``config.json`` figures; ``norms`` counts a layer's norms of width D."""
    vectors = norms * hidden + other_vectors + 2 * head_dim * qk_norm
    vectors += (heads + 2 * kv_heads) * head_dim * qkv_bias
    sizes = (layers, hidden, heads, kv_heads, head_dim, width, vocab)
    return Shape(name, *sizes, layer_vectors=vectors, **rest)


def _qwen25(
    name: str, layers: int, hidden: int, heads: int, kv: int, width: int, vocab: int, **rest: Any
) -> Shape:
    head_dim = hidden // heads
    return _model(name, layers, hidden, heads, kv, head_dim, width, vocab, qkv_bias=True, **rest)


def _qwen3(name: str, layers: int, hidden: int, heads: int, kv: int, width: int, **rest: Any) -> Shape:
    return _model(name, layers, hidden, heads, kv, 128, width, 151_936, qk_norm=True, **rest)


def _gemma2(name: str, layers: int, hidden: int, heads: int, kv: int, head_dim: int, width: int) -> Shape:
    slides: dict[str, Any] = {"window": 4096, "window_layers": layers // 2}
    return _model(name, layers, hidden, heads, kv, head_dim, width, 256_000, norms=4, tied=True, **slides)


def _gemma3(
    name: str,
    layers: int,
    hidden: int,
    heads: int,
    kv: int,
    head_dim: int,
    width: int,
    vocab: int,
    window: int,
) -> Shape:
    slides: dict[str, Any] = {"window": window, "window_layers": layers - layers // 6}
    sizes = (layers, hidden, heads, kv, head_dim, width, vocab)
    return _model(name, *sizes, norms=4, qk_norm=True, tied=True, **slides)


def _gpt_oss(name: str, layers: int, experts: int) -> Shape:
    hidden, heads, kv, head_dim, width = 2880, 64, 8, 64, 2880
    biases = (heads + 2 * kv) * head_dim + hidden  # q, k, v and o
    biases += heads + experts * (1 + 3 * width)  # sinks, router, and gate, up and down of each expert
    return _model(
        name,
        layers,
        hidden,
        heads,
        kv,
        head_dim,
        width,
        201_088,
        other_vectors=biases,
        experts=Experts(experts, 4, width),
        window=128,
        window_layers=layers // 2,
    )


def _deepseek_v3() -> Shape:
    latent = Latent(query_rank=1536, rank=512, rope_dim=64, nope_dim=128, value_dim=128)
    return _model(
        "deepseek-v3",
        61,
        7168,
        128,
        128,
        128,
        18_432,
        129_280,
        other_vectors=latent.query_rank + latent.rank,  # norms of the compressed vectors
        latent=latent,
        experts=Experts(256, 8, 2048, shared_width=2048, dense_layers=3),
    )


_LLAMA3_8B = (32, 4096, 32, 8, 128, 14_336, 128_256)
_LLAMA3_70B = (80, 8192, 64, 8, 128, 28_672, 128_256)

# Figures of each model's config.json on Hugging Face; of a multimodal model, its text half. Names of the
# built-in aliases are here too, so that planning fetches nothing.
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        _model("llama-2-7b", 32, 4096, 32, 32, 128, 11_008, 32_000),
        _model("llama-2-13b", 40, 5120, 40, 40, 128, 13_824, 32_000),
        _model("llama-2-70b", 80, 8192, 64, 8, 128, 28_672, 32_000),
        _model("llama-3-8b", *_LLAMA3_8B),
        _model("llama-3-70b", *_LLAMA3_70B),
        _model("llama-3.1-8b", *_LLAMA3_8B),
        _model("llama-3.1-70b", *_LLAMA3_70B),
        _model("llama-3.1-405b", 126, 16_384, 128, 8, 128, 53_248, 128_256),
        _qwen25("qwen2.5-0.5b", 24, 896, 14, 2, 4864, 151_936, tied=True),
        _qwen25("qwen2.5-1.5b", 28, 1536, 12, 2, 8960, 151_936, tied=True),
        _qwen25("qwen2.5-3b", 36, 2048, 16, 2, 11_008, 151_936, tied=True),
        _qwen25("qwen2.5-7b", 28, 3584, 28, 4, 18_944, 152_064),
        _qwen25("qwen2.5-14b", 48, 5120, 40, 8, 13_824, 152_064),
        _qwen25("qwen2.5-32b", 64, 5120, 40, 8, 27_648, 152_064),
        _qwen25("qwen2.5-72b", 80, 8192, 64, 8, 29_568, 152_064),
        _qwen3("qwen3-0.6b", 28, 1024, 16, 8, 3072, tied=True),
        _qwen3("qwen3-1.7b", 28, 2048, 16, 8, 6144, tied=True),
        _qwen3("qwen3-4b", 36, 2560, 32, 8, 9728, tied=True),
        _qwen3("qwen3-8b", 36, 4096, 32, 8, 12_288),
        _qwen3("qwen3-14b", 40, 5120, 40, 8, 17_408),
        _qwen3("qwen3-32b", 64, 5120, 64, 8, 25_600),
        _qwen3("qwen3-30b-a3b", 48, 2048, 32, 4, 6144, experts=Experts(128, 8, 768)),
        _qwen3("qwen3-235b-a22b", 94, 4096, 64, 4, 12_288, experts=Experts(128, 8, 1536)),
        _gemma2("gemma-2-2b", 26, 2304, 8, 4, 256, 9216),
        _gemma2("gemma-2-9b", 42, 3584, 16, 8, 256, 14_336),
        _gemma2("gemma-2-27b", 46, 4608, 32, 16, 128, 36_864),
        _gemma3("gemma-3-270m", 18, 640, 4, 1, 256, 2048, 262_144, 512),
        _gemma3("gemma-3-1b", 26, 1152, 4, 1, 256, 6912, 262_144, 512),
        _gemma3("gemma-3-4b", 34, 2560, 8, 4, 256, 10_240, 262_208, 1024),
        _gemma3("gemma-3-12b", 48, 3840, 16, 8, 256, 15_360, 262_208, 1024),
        _gemma3("gemma-3-27b", 62, 5376, 32, 16, 128, 21_504, 262_208, 1024),
        _model("mistral-7b", 32, 4096, 32, 8, 128, 14_336, 32_000, window=4096, window_layers=32),
        _model("mixtral-8x7b", 32, 4096, 32, 8, 128, 14_336, 32_000, experts=Experts(8, 2, 14_336)),
        _model("mixtral-8x22b", 56, 6144, 48, 8, 128, 16_384, 32_768, experts=Experts(8, 2, 16_384)),
        _gpt_oss("gpt-oss-20b", 24, 32),
        _gpt_oss("gpt-oss-120b", 36, 128),
        _deepseek_v3(),
        _model("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49_152, tied=True),
        _gemma3("gemma3-270m", 18, 640, 4, 1, 256, 2048, 262_144, 512),
    )
}


def find_shape(model: str) -> Shape:
    """The shape of a built-in model, of a checkpoint or configuration here, or of a Hugging Face id.

    Of the latter no more is fetched than its ``config.json``.

    Raises:
        CheckpointError: it is none of these, or not a checkpoint.
        DownloadError: the id's configuration cannot be fetched.
        ConfigError: its architecture is not supported.
    """
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model).expanduser()
    if not path.exists() and "/" not in model:
        close = difflib.get_close_matches(model, SHAPES, n=3)
        hint = (
            f"did you mean {' or '.join(close)}?" if close else f"the built-in ones are {', '.join(SHAPES)}"
        )
        raise CheckpointError(f"{model!r} is neither a checkpoint nor a built-in model; {hint}")
    name = path.name if path.exists() else model
    return Shape.from_config(read_config(resolve(model, configuration=True)), name)
