"""Compares tensor parallelism with replicas, pipeline stages and expert parallelism.

All use the formulas of ``step_time``, for the same model, chips and workload ("How to Scale Your Model",
chapters 7 and 8; Pope et al. 2022, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp

from tpjax.config import ExpertAxis, ModelConfig
from tpjax.errors import ConfigError
from tpjax.hardware import Hardware
from tpjax.layers.weights import FORMATS
from tpjax.mesh import describe_tp
from tpjax.planning.cost_model import CostModel
from tpjax.planning.plan import make_plans
from tpjax.planning.workload import Workload
from tpjax.runtime.counts import Counts
from tpjax.runtime.device_speed import itemsizes
from tpjax.runtime.layer_split import layer_seconds, split_layers
from tpjax.step_time import Itemsizes, StepTokens


@dataclass(frozen=True)
class Strategy:
    """One way to spread a model over all chips.

    Attributes:
        kind: ``tensor``, ``replicas``, ``tensor and replicas``, ``pipeline`` or ``expert``.
        layout: description of the layout.
        step_ms: milliseconds between two tokens of a sequence.
        tokens_per_s: tokens a second, all sequences together.
        prefill_ms: milliseconds to prefill one prompt.
        reduced_bytes: bytes of the results that a decoded token has added up, or exchanged, over devices.
        handed_bytes: bytes that a decoded token takes from one stage to the next, all stages together.
        bytes_per_device: memory of the fullest device.
        fits: whether that is within its usable memory.
    """

    kind: str
    layout: str
    step_ms: float
    tokens_per_s: float
    prefill_ms: float
    reduced_bytes: float
    handed_bytes: float
    bytes_per_device: float
    fits: bool


@dataclass(frozen=True)
class Comparison:
    """The best layout of each kind.

    Attributes:
        strategies: fastest first; those that do not fit come last.
        verdict: a sentence that says which is best, and by how much.
    """

    strategies: list[Strategy]
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, ready for JSON."""
        return asdict(self)


def compare(counts: Counts, hardware: Hardware, chips: int, workload: Workload) -> Comparison:
    """Finds the best layout of each kind for a workload, and ranks the kinds.

    Raises:
        ConfigError: no layout fits.
    """
    devices = chips * hardware.devices_per_chip
    every = [
        *_tensor_and_replicas(counts, hardware, chips, workload),
        *_pipelines(counts, hardware.device, devices, workload),
        *_experts(counts, hardware.device, devices, workload),
    ]
    kinds = dict.fromkeys(one.kind for one in every)
    ranked = sorted((_fastest(one for one in every if one.kind == kind) for kind in kinds), key=_rank)
    if not ranked[0].fits:
        raise ConfigError(
            f"{counts.name} fits {hardware.name}:{chips} in no way: the least is "
            f"{min(one.bytes_per_device for one in every) / 1e9:.1f} GB a device, but "
            f"{hardware.device.usable_bytes / 1e9:.1f} GB are usable"
        )
    return Comparison(ranked, _verdict(ranked, workload))


def _rank(one: Strategy) -> tuple[bool, float, float]:
    return (not one.fits, -one.tokens_per_s, one.prefill_ms)


def _fastest(strategies: Iterable[Strategy]) -> Strategy:
    return min(strategies, key=_rank)


def _verdict(ranked: list[Strategy], workload: Workload) -> str:
    best, *others = [one for one in ranked if one.fits]
    text = f"{best.layout} is best for {workload.batch} at once: {best.tokens_per_s:.0f} tokens/s"
    if not others:
        return f"{text}; nothing else fits"
    gain = best.tokens_per_s / others[0].tokens_per_s
    return f"{text}, {gain:.2f}× of {others[0].layout} ({others[0].tokens_per_s:.0f})"


def _tensor_and_replicas(
    counts: Counts, hardware: Hardware, chips: int, workload: Workload
) -> Iterator[Strategy]:
    for plan in make_plans(counts, hardware, chips, workload):
        tp = plan.tp
        kind = "tensor" if plan.replicas == 1 else "replicas" if tp == 1 else "tensor and replicas"
        layout = (
            f"tp={tp}" if plan.replicas == 1 else f"{plan.replicas} replicas" + (f" of tp={tp}" * (tp > 1))
        )
        yield Strategy(
            kind,
            layout,
            plan.decode.total * 1e3,
            plan.tokens_per_s,
            plan.prefill.total * 1e3,
            plan.model.reduced_bytes(1),
            0.0,
            plan.memory.total,
            plan.fits,
        )


def _pipelines(counts: Counts, device: Hardware, devices: int, workload: Workload) -> Iterator[Strategy]:
    """Computes pipelines of stages of consecutive layers, which share the devices out as evenly as it goes.

    Layers are split as :mod:`tpjax.runtime.layer_split` does when the model runs. The batch forms as many
    groups as there are stages, which work on one each: a token takes as long as a group takes through all
    stages, or as the slowest stage takes for all groups. A prompt goes through one stage after the other.
    """
    config, batch = counts.config, workload.batch
    hidden_bytes = 1.0 * config.hidden_size * workload.activation_bytes
    for stages in range(2, min(devices, config.num_layers) + 1):
        tp, wider = divmod(devices, stages)
        tps = [tp + (number < wider) for number in range(stages)]
        parts = split_layers(config, tps, _split_by(workload), device)
        models = {tp: CostModel(counts, device, tp, workload, _usual_axis(config, tp)) for tp in set(tps)}

        def of_stages(
            tokens: StepTokens,
            busy: int,
            tps: Sequence[int] = tps,
            parts: tuple[range, ...] = parts,
            models: Mapping[int, CostModel] = models,
        ) -> list[float]:
            layers = {
                tp: layer_seconds(config, tp, model.itemsizes, device, tokens, busy)
                for tp, model in models.items()
            }
            moved = device.interconnect.transfer_s(tokens.total * hidden_bytes)
            return [sum(layers[tp][i] for i in part) + moved for tp, part in zip(tps, parts, strict=True)]

        groups = min(stages, batch)
        seconds = of_stages(StepTokens(math.ceil(batch / groups), workload.context), groups)
        step = max(sum(seconds), groups * max(seconds))
        prefill = sum(of_stages(StepTokens(chunks=((0, workload.prompt_len),)), 1))
        held = max(_stage_bytes([models[tp] for tp in tps], parts))
        yield Strategy(
            "pipeline",
            f"{stages} pipeline stages" + (f" of tp={describe_tp(tps)}" * (devices > stages)),
            step * 1e3,
            batch / step,
            prefill * 1e3,
            sum(models[tp].reduced_bytes(1, part) for tp, part in zip(tps, parts, strict=True)),
            (stages - 1) * hidden_bytes,
            held,
            held <= device.usable_bytes,
        )


def _stage_bytes(models: Sequence[CostModel], parts: Sequence[range]) -> list[float]:
    """Returns the bytes on a device of each stage of a pipeline: of its layers, and of the ends it has."""

    def of_layers(model: CostModel, part: range) -> float:
        workload, config = model.workload, model.config.of_layers(part)
        cache = workload.batch * model.sequence_bytes(workload.context, config)
        workspace = model.memory(workload.batch, workload.context).workspace
        return sum(model.stored.layers[part.start : part.stop]) + cache + workspace

    stages = [of_layers(model, part) for model, part in zip(models, parts, strict=True)]
    first, last = models[0].stored, models[-1].stored
    stages[0] += first.first
    stages[-1] += last.last
    if models[-1].config.tie_word_embeddings:
        stages[-1] += last.parts.embedding  # it is on both
    return stages


def _split_by(workload: Workload) -> Itemsizes:
    """Returns the bytes of elements by which layers are split when the model runs."""
    quantize: Any = workload.dtype if workload.dtype in FORMATS else None
    kept: Any = {"int8": "int8", "fp8": "fp8"}.get(workload.cache_dtype, "auto")
    if workload.cache_dtype == "auto" and quantize is not None:
        kept = "fp8" if quantize == "fp8" else "int8"
    return itemsizes(jnp.dtype("float32" if workload.dtype == "float32" else "bfloat16"), quantize, kept)


def _usual_axis(config: ModelConfig, tp: int) -> ExpertAxis:
    """Returns the axis of the experts that is sharded unless told."""
    return config.moe.sharded_axis(tp) if config.moe else "width"


def _experts(counts: Counts, device: Hardware, devices: int, workload: Workload) -> Iterator[Strategy]:
    """Computes expert parallelism: sharded experts, replicated attention for each device's own sequences.

    A layer with experts takes two all-to-alls. An all-to-all moves at most what an all-gather of the same
    tokens moves, half an all-reduce (the book, chapter 3). The step waits for the device with most chosen
    experts.
    """
    moe = counts.config.moe
    if moe is None or devices == 1 or moe.num_experts % devices:
        return
    replicated, sharded = (
        CostModel(counts, device, tp, workload, "experts", min(devices // tp, workload.batch))
        for tp in (1, devices)
    )

    def seconds(own: StepTokens, tokens: int) -> float:
        # a device computes attention for its own sequences, and its experts for the tokens of all
        cost = replicated.attention(own) + replicated.dense(own.total) + replicated.overhead(own)
        cost += sharded.mixture(tokens) + replicated.embedding_and_head(own.sampled, own.total)
        hidden_bytes = counts.config.hidden_size * workload.activation_bytes
        exchange = device.interconnect.all_reduce_s(devices, float(tokens * hidden_bytes))
        return cost.total + sum(counts.config.sparse_layers) * exchange

    part, prompt = math.ceil(workload.batch / devices), workload.prompt_len
    step = seconds(StepTokens(part, workload.context), workload.batch)
    prefill = seconds(StepTokens(chunks=((0, prompt),)), prompt)
    elsewhere = replicated.stored.parts.experts - sharded.stored.parts.experts
    held = replicated.memory(part, workload.context).total - elsewhere
    yield Strategy(
        "expert",
        f"experts over {devices} devices, DP attention",
        step * 1e3,
        workload.batch / step,
        prefill * 1e3,
        2.0 * sum(counts.config.sparse_layers) * counts.config.hidden_size * workload.activation_bytes,
        0.0,
        held,
        held <= device.usable_bytes,
    )
