"""Says why a parameter is sharded or replicated: derived from its module, its spec and its layout."""

from __future__ import annotations

from typing import Any

from tpjax.checkpoints.parameters import Parameter
from tpjax.config import ModelConfig, MoEConfig
from tpjax.layers.attention import Attention
from tpjax.layers.latent_attention import KeyValueProjection, LatentAttention
from tpjax.layers.linear import Embedding, Linear, PositionEmbedding, RowLinear
from tpjax.layers.moe import ExpertStack, GateProjection, Router
from tpjax.layers.norm import HeadScale, Norm
from tpjax.mesh import AXIS
from tpjax.model import Decoder
from tpjax.sharding import REPLICATED, Content, HeadPlan, StackedLayout, head_plan


def reason(parameter: Parameter, model: Decoder, tp: int) -> str:
    """Says why a parameter is sharded or replicated, and what part of it is padding or copies.

    Args:
        parameter: a parameter of ``model``.
        model: a decoder, which may be abstract.
        tp: number of devices.
    """
    if tp == 1:
        return "one device holds everything"
    parent, owner = _modules(parameter, model)
    parts = [_placement(parameter, owner, parent, model, tp)]
    content = parameter.layout.content((slice(None),) * len(parameter.layout.shape))
    heads = next((module for module in (owner, parent) if isinstance(module, Attention)), None)
    if heads is not None:
        parts += _head_places(heads.plan, content)
    elif content.zeros:
        parts.append(_padding(parameter, owner, parent, model.config))
    return "; ".join(parts)


def experts_reason(moe: MoEConfig, tp: int) -> str:
    """Says why experts are sharded over devices, or the width of each expert is."""
    if moe.expert_parallel != "auto":
        return f"expert_parallel={moe.expert_parallel!r} asks for it"
    divides = "divides" if moe.num_experts % tp == 0 else "does not divide"
    return f"tp={tp} {divides} {moe.num_experts} experts"


def cache_reason(config: ModelConfig, tp: int) -> str:
    """Says why the key-value cache is sharded or replicated."""
    if tp == 1:
        return "one device holds everything"
    if config.attention.latent is not None:
        return "every head reads the full latent: every device keeps it"
    plan = head_plan(config, tp)
    heads = plan.stored_kv_heads
    copied = len(heads) - heads.count(None) - len(set(heads) - {None})
    parts = _head_places(plan, Content(plan.num_kv_heads, copied, heads.count(None)))
    return "; ".join(["each device keeps the KV heads that its query heads read", *parts])


def _modules(parameter: Parameter, model: Decoder) -> tuple[Any, Any]:
    """Returns the parent of the module that owns a parameter, and that module."""
    parent: Any = None
    owner: Any = model
    for name in parameter.attribute[:-1]:
        parent, owner = owner, owner[name] if isinstance(name, int) else getattr(owner, name)
    return parent, owner


def _placement(parameter: Parameter, owner: Any, parent: Any, model: Decoder, tp: int) -> str:
    is_bias = parameter.path[-1] == "bias"
    if parameter.is_scales and parameter.sharding.is_fully_replicated:
        return (
            "scales of outputs that every device computes or adds up"  # others are sharded like their outputs
        )
    match owner:
        case Norm() if isinstance(parent, Attention):
            return "norm of each head: all heads have the same weight, and none is split over devices"
        case Norm() if isinstance(parent, LatentAttention):
            return "norm of a latent that every device computes"
        case Norm():
            return "norm: every device normalises full rows"
        case HeadScale() | Attention():
            return "numbers of each head: sharded like the heads"
        case PositionEmbedding():
            return "a look-up: cheaper on every device than an all-reduce"
        case Embedding() if owner is model.lm_head:
            return "column-parallel: each device scores its own tokens, and logits stay sharded"
        case Embedding():
            tied = " and scores" if model.lm_head is None and model.is_last else ""
            return f"sharded along the vocabulary: each device looks up{tied} its own tokens; one all-reduce"
        case RowLinear(partial_sums=None) if is_bias:
            return "bias of a row-parallel product: added once, after the all-reduce"
        case RowLinear() if is_bias:
            return "bias of a row-parallel product: added by the first device alone, before the all-reduce"
        case RowLinear():
            return "row-parallel: each device sums over its own inputs; one all-reduce adds the partial sums"
        case Linear() if owner.spec == REPLICATED:
            return "every head reads the full latent: every device computes it"
        case Linear() if is_bias:
            return "bias of a column-parallel product: sharded like its outputs"
        case Linear():
            what = "features" if not isinstance(parent, Attention | LatentAttention) else "heads"
            return f"column-parallel: each device computes its own {what}, and nothing moves"
        case KeyValueProjection():
            return "each device expands the latent for its own heads, and nothing moves"
        case Router():
            return "small: every device picks the same experts, and nothing moves"
        case GateProjection():
            return "small: every device computes the same weight, and nothing moves"
        case ExpertStack():
            return _expert_placement(parameter, owner, parent.experts, model.config, tp)
    return "replicated" if parameter.sharding.is_fully_replicated else "sharded"


def _expert_placement(
    parameter: Parameter, owner: ExpertStack, routed: ExpertStack, config: ModelConfig, tp: int
) -> str:
    spec = tuple(parameter.sharding.spec)
    if AXIS not in spec:
        return "bias of a sum over the width: counted on the first device alone"
    if owner is not routed:
        return "each device has a part of its width; partial sums join the all-reduce of the routed experts"
    assert config.moe is not None
    what = "its own experts" if spec[0] == AXIS else "a part of every expert's width"
    return f"each device has {what}: {experts_reason(config.moe, tp)}"


def _head_places(plan: HeadPlan, content: Content) -> list[str]:
    parts = []
    if content.zeros:
        parts.append(
            f"padded: {plan.num_heads} query and {plan.num_kv_heads} KV heads → "
            f"{plan.num_padded_heads} and {plan.num_head_slots}"
        )
    if content.copied:
        count = sum(head is not None for head in plan.stored_kv_heads)
        why = ">" if plan.tp > plan.num_kv_heads else "does not divide"
        parts.append(
            f"KV heads replicated, {plan.num_kv_heads} → {count}: tp={plan.tp} {why} {plan.num_kv_heads}"
        )
    return parts


def _padding(parameter: Parameter, owner: Any, parent: Any, config: ModelConfig) -> str:
    for module in (owner, parent):
        if isinstance(module, LatentAttention | KeyValueProjection):
            return f"padded: {config.attention.num_heads} heads → {module.num_heads}"
    layout = parameter.layout
    one = layout.one if isinstance(layout, StackedLayout) else layout
    _, size = one.sizes[0]
    what = "tokens" if isinstance(owner, Embedding) else "features"
    return f"padded: {size} {what} → {one.shape[one.axis] // len(one.sizes)}"
