"""Tensor parallelism against its neighbours: replicas, pipeline stages, expert parallelism.

All with the formulas of ``plan.py``, for the same model, chips and workload ("How to Scale Your Model",
chapters 7 and 8; Pope et al. 2022, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tpjax.errors import ConfigError
from tpjax.hardware import Hardware
from tpjax.planning.counts import Counts
from tpjax.planning.plan import Cost, CostModel, Workload, divisors, make_plan


@dataclass(frozen=True)
class Strategy:
    """One way to spread a model over all chips.

    Attributes:
        kind: ``tensor``, ``replicas``, ``tensor and replicas``, ``pipeline`` or ``expert``.
        layout: in words.
        step_ms: between two tokens of a sequence.
        tokens_per_s: of all sequences together.
        prefill_ms: one prompt.
        bytes_per_chip: of the fullest chip.
        fits: in its usable memory.
    """

    kind: str
    layout: str
    step_ms: float
    tokens_per_s: float
    prefill_ms: float
    bytes_per_chip: float
    fits: bool


@dataclass(frozen=True)
class Comparison:
    """The strategies, fastest first, those that do not fit last.

    Attributes:
        strategies: the best layout of each kind.
        verdict: which is best, and by how much.
    """

    strategies: list[Strategy]
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def compare(counts: Counts, hardware: Hardware, chips: int, workload: Workload) -> Comparison:
    """The best layout of each kind for this workload, and which kind wins.

    Raises:
        ConfigError: none fits.
    """
    every = [
        *_tensor_and_replicas(counts, hardware, chips, workload),
        *_pipelines(counts, hardware, chips, workload),
        *_experts(counts, hardware, chips, workload),
    ]
    kinds = dict.fromkeys(one.kind for one in every)
    ranked = sorted((_fastest(one for one in every if one.kind == kind) for kind in kinds), key=_rank)
    if not ranked[0].fits:
        raise ConfigError(
            f"{counts.name} fits {hardware.name}:{chips} in no way: the least is "
            f"{min(one.bytes_per_chip for one in every) / 1e9:.1f} GB a chip, but "
            f"{hardware.usable_bytes / 1e9:.1f} GB are usable"
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
    for tp in divisors(chips):
        plan = make_plan(counts, hardware, chips, tp, workload)
        kind = "tensor" if tp == chips else "replicas" if tp == 1 else "tensor and replicas"
        layout = f"tp={tp}" if tp == chips else f"{plan.replicas} replicas" + (f" of tp={tp}" * (tp > 1))
        yield Strategy(
            kind,
            layout,
            plan.decode.total * 1e3,
            plan.tokens_per_s,
            plan.prefill.total * 1e3,
            plan.memory.total,
            plan.fits,
        )


def _pipelines(counts: Counts, hardware: Hardware, chips: int, workload: Workload) -> Iterator[Strategy]:
    """Stages of consecutive layers, each sharded over tp chips.

    A token passes all stages before the next one of its sequence starts, so that the batch is split into as
    many parts as there are stages, and a step lasts as many times the slowest stage, which also draws.
    """
    layers = counts.config.num_layers
    for stages in divisors(chips):
        tp = chips // stages
        if stages == 1 or stages > layers:
            continue
        depth = math.ceil(layers / stages) / layers
        model = CostModel(counts, hardware, tp, workload)
        part = math.ceil(workload.batch / stages)

        def through(blocks: Cost, rest: Cost, tokens: int, rounds: int, depth: float = depth) -> float:
            handed = hardware.interconnect.transfer_s(2.0 * tokens * counts.config.hidden_size)
            return rounds * ((blocks * depth + rest).total + handed)

        step = through(
            model.layers(part, part, workload.context), model.embedding_and_head(part), part, stages
        )
        prompt = workload.prompt_len
        prefill = through(model.layers(1, prompt, (prompt + 1) / 2), Cost(), prompt, stages)
        prefill += model.embedding_and_head(1, prompt).total
        memory = model.memory(workload.batch, workload.context)
        # the first stage has the embedding, the last the projection
        embedding = model.held.embedding * workload.activation_bytes
        both_ends = embedding + model.held.head * workload.weight_bytes
        held = (memory.weights - both_ends + memory.cache) * depth + embedding + memory.workspace
        yield Strategy(
            "pipeline",
            f"{stages} pipeline stages" + (f" of tp={tp}" * (tp > 1)),
            step * 1e3,
            workload.batch / step,
            prefill * 1e3,
            held,
            held <= hardware.usable_bytes,
        )


def _experts(counts: Counts, hardware: Hardware, chips: int, workload: Workload) -> Iterator[Strategy]:
    """Whole experts on each chip, and attention on whole sequences: two all-to-alls a layer of experts.

    An all-to-all moves at most what an all-gather of the same tokens moves, half an all-reduce (the book,
    chapter 3), and the experts' step waits for the chip with the most of them to read.
    """
    moe = counts.config.moe
    if moe is None or chips == 1 or moe.num_experts % chips:
        return
    whole, cut = (CostModel(counts, hardware, tp, workload, "experts") for tp in (1, chips))

    def seconds(sequences: int, own: int, tokens: int, context: float) -> float:
        # a chip computes attention for its own sequences, and its experts for everybody's
        cost = whole.attention(sequences, own, context) + whole.dense(own) + whole.overhead(own)
        cost += cut.mixture(tokens) + whole.embedding_and_head(sequences)
        exchange = hardware.interconnect.all_reduce_s(chips, 2.0 * tokens * counts.config.hidden_size)
        return cost.total + counts.expert_layers * exchange

    part, prompt = math.ceil(workload.batch / chips), workload.prompt_len
    step = seconds(part, part, workload.batch, workload.context)
    prefill = seconds(1, prompt, prompt, (prompt + 1) / 2)
    spread = whole.held.experts - cut.held.experts
    held = whole.memory(part, workload.context).total - spread * workload.weight_bytes
    yield Strategy(
        "expert",
        f"experts over {chips} chips, sequences whole",
        step * 1e3,
        workload.batch / step,
        prefill * 1e3,
        held,
        held <= hardware.usable_bytes,
    )
