"""What a model will cost on given chips, from formulas alone.

A layer reads its weights and its cache, multiplies, and sums over the chips. Each block of a layer takes the
longer of its traffic and its arithmetic; the blocks, the collectives and a fixed term per layer add up:

    step = Σ over blocks max(bytes / bandwidth, FLOPs / rate) + collectives + fixed

Traffic and arithmetic: Pope et al. 2022, "Efficiently Scaling Transformer Inference",
https://arxiv.org/abs/2211.05102, sections 2 (memory and compute time) and 3.2.1 (weights cut over chips,
two all-reduces a layer), and "How to Scale Your Model", https://jax-ml.github.io/scaling-book/, chapters 1
(rooflines), 3 (collectives) and 7 (prefill, decode, and the cache). Times are seconds inside, milliseconds in
results.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tpjax.config import ExpertAxis
from tpjax.errors import ConfigError
from tpjax.hardware import Hardware
from tpjax.planning.counts import Counts
from tpjax.runtime.runner import CHUNK_SIZES, PAGE_SIZE

DTYPE_BYTES = {"float32": 4, "bf16": 2, "int8": 1, "fp8": 1}
_CLOSE = 0.05  # plans within this of the fastest count as equal, and the one with fewer chips a replica wins


@dataclass(frozen=True)
class Workload:
    """What is served.

    Attributes:
        batch: sequences decoded at once, over all replicas.
        context: tokens each of them has in the cache.
        prompt_len: tokens of a prompt.
        dtype: of the weights; norms and the embedding keep 16 bits.
        cache_dtype: of keys and values; ``auto``: as the weights, thus 8 bits beside 8-bit weights: so the
            published 8-bit measurements ran.
    """

    batch: int = 1
    context: int = 2048
    prompt_len: int = 1024
    dtype: str = "bf16"
    cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("batch", "context", "prompt_len"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} is not a whole number, 1 or more")
        for name, known in (("dtype", DTYPE_BYTES), ("cache_dtype", ("auto", *DTYPE_BYTES))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not known: use {', '.join(known)}")

    @property
    def weight_bytes(self) -> int:
        """Of one element of a matrix."""
        return DTYPE_BYTES[self.dtype]

    @property
    def activation_bytes(self) -> int:
        """Of one element of an activation, a norm or the embedding."""
        return max(2, self.weight_bytes)

    @property
    def cache_bytes(self) -> int:
        """Of one element of the cache."""
        return DTYPE_BYTES[self.dtype if self.cache_dtype == "auto" else self.cache_dtype]


@dataclass(frozen=True)
class Cost:
    """Where the time of a step or a prefill goes, seconds; of arithmetic, what its traffic does not hide."""

    weights: float = 0.0
    cache: float = 0.0
    compute: float = 0.0
    collectives: float = 0.0
    fixed: float = 0.0

    @property
    def total(self) -> float:
        """The whole step."""
        return self.weights + self.cache + self.compute + self.collectives + self.fixed

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        return max(fields(self), key=lambda field: getattr(self, field.name)).name

    def ms(self) -> dict[str, float]:
        """The parts in milliseconds."""
        return {name: seconds * 1e3 for name, seconds in asdict(self).items()}

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, times: float) -> Cost:
        return Cost(*(getattr(self, field.name) * times for field in fields(self)))


@dataclass(frozen=True)
class MemoryUse:
    """What one chip holds, bytes."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.workspace


class CostModel:
    """A model sharded over ``tp`` chips of a kind: the formulas.

    Args:
        counts: the model.
        hardware: the chip.
        tp: chips of one replica.
        workload: gives the dtypes; batch and lengths are arguments of each formula.
        cut: what of a mixture's experts is sharded: each one's width, or whole experts where tp divides
            their count.
    """

    def __init__(
        self, counts: Counts, hardware: Hardware, tp: int, workload: Workload, cut: ExpertAxis = "width"
    ) -> None:
        self.counts, self.hardware, self.tp, self.workload, self.cut = counts, hardware, tp, workload, cut
        self.config, self.held = counts.config, counts.on_device(tp, cut)
        self._cache_elements, self._attention_flops = counts.cache_elements(tp), counts.attention_flops(tp)
        # Faked chips share one machine: what they read and multiply adds up, it does not go on in parallel.
        self._sharing = tp if hardware.shared else 1

    # --- time ----------------------------------------------------------------------------------------------

    def decode(self, batch: int, context: int) -> Cost:
        """One step of ``batch`` sequences of one replica (Pope et al., section 2; the book, chapter 7)."""
        return self.layers(batch, batch, context) + self.embedding_and_head(batch)

    def prefill(self, tokens: int) -> Cost:
        """One prompt on one replica, causal: a token sees half of it on average. Draws one token."""
        return self.layers(1, tokens, (tokens + 1) / 2) + self.embedding_and_head(1, tokens)

    def layers(self, sequences: int, tokens: int, context: float) -> Cost:
        """All layers.

        Args:
            sequences: whose cache is read, once each.
            tokens: computed, all sequences together.
            context: keys that a token sees, on average.
        """
        reduce = self.hardware.interconnect.all_reduce_s(self.tp, self._message(tokens))
        blocks = self.attention(sequences, tokens, context) + self.dense(tokens) + self.mixture(tokens)
        return blocks + self.overhead(tokens) + Cost(collectives=2 * self.config.num_layers * reduce)

    def attention(self, sequences: int, tokens: int, context: float) -> Cost:
        """Attention of all layers, its projections included."""
        config, window_layers = self.config, self.counts.window_layers
        seen = min(context, config.sliding_window) if config.sliding_window else context
        cost = self._product(self.held.attention, tokens)
        cost += self._cache(sequences, tokens, seen) * window_layers
        return cost + self._cache(sequences, tokens, context) * (config.num_layers - window_layers)

    def dense(self, tokens: int) -> Cost:
        """The MLPs of all layers, shared experts included."""
        return self._product(self.held.mlp, tokens)

    def mixture(self, tokens: int) -> Cost:
        """The experts of all layers that have them; of their weights, only those some token chose are read.

        A token chooses k of E, so that T tokens touch E (1 - (1 - k/E)^T) of them if they choose at random.
        Whole experts on different chips are not touched evenly: the step waits for the chip with the most.
        """
        moe = self.config.moe
        if moe is None:
            return Cost()
        count, active = moe.num_experts, moe.experts_per_token
        chosen = 1 - (1 - active / count) ** tokens
        if self.cut == "width":
            one, touched = self.held.experts / count, count * chosen
            computed = float(tokens * active)
        else:
            one, even = self.held.experts * self.tp / count, count * chosen / self.tp
            touched = busiest(count / self.tp, chosen, self.tp)
            computed = tokens * active / self.tp * touched / even
        return self._block(touched * one, 2.0 * computed * one) + self._product(self.held.routers, tokens)

    def overhead(self, tokens: int) -> Cost:
        """What layers cost beyond traffic, products and collectives."""
        efficiency = self.hardware.efficiency
        micros = (efficiency.layer_us + efficiency.token_us * tokens) * self.config.num_layers
        micros += efficiency.expert_us * self.counts.expert_layers
        return Cost(fixed=1e-6 * micros)

    def embedding_and_head(self, rows: int, tokens: int | None = None) -> Cost:
        """Embedding and vocabulary projection: one all-reduce of all tokens, and small ones to sample."""
        workload = self.workload
        stored = workload.weight_bytes if self.held.head else workload.activation_bytes
        reduce = self.hardware.interconnect.all_reduce_s
        moved = reduce(self.tp, self._message(tokens or rows)) + reduce(self.tp, 8.0 * rows)
        fixed = self.hardware.efficiency.step_us * 1e-6
        projection = self._product(self.held.head or self.held.embedding, rows, stored)
        return projection + Cost(collectives=moved, fixed=fixed)

    def _product(self, elements: float, tokens: float, stored: int | None = None) -> Cost:
        """Matrices that every token is multiplied by."""
        return self._block(elements, 2.0 * tokens * elements, stored)

    def _block(self, elements: float, flops: float, stored: int | None = None) -> Cost:
        stored = stored or self.workload.weight_bytes
        hardware, efficiency = self.hardware, self.hardware.efficiency
        rate = hardware.bandwidth_bytes_s * efficiency.weights
        if stored == 1:
            rate *= efficiency.low_precision_weights
        read = self._sharing * elements * stored / rate
        return Cost(weights=read, compute=self._beyond(flops, read))

    def _cache(self, sequences: int, tokens: int, seen: float) -> Cost:
        """One layer's scores and sums, and the cache's traffic."""
        hardware = self.hardware
        length = seen if tokens == sequences else 2 * seen  # a prompt is written, and read back
        moved = sequences * length * self._cache_elements * self.workload.cache_bytes
        read = self._sharing * moved / (hardware.bandwidth_bytes_s * hardware.efficiency.cache)
        flops = tokens * seen * self._attention_flops
        return Cost(cache=read, compute=self._beyond(flops, read, low_precision=False))

    def _beyond(self, flops: float, traffic_s: float, *, low_precision: bool = True) -> float:
        """Arithmetic's time beyond the traffic that it hides behind."""
        hardware, efficiency = self.hardware, self.hardware.efficiency
        rate = hardware.flops * efficiency.compute
        if low_precision and self.workload.dtype == "fp8" and hardware.low_precision_flops is not None:
            rate = hardware.low_precision_flops * efficiency.low_precision_compute
        return max(0.0, self._sharing * flops / rate - traffic_s)

    def _message(self, tokens: int) -> float:
        return float(tokens * self.config.hidden_size * self.workload.activation_bytes)

    # --- memory --------------------------------------------------------------------------------------------

    def memory(self, batch: int, context: int) -> MemoryUse:
        """What a chip of a replica with ``batch`` sequences holds.

        The cache keeps whole pages, of sliding layers too. Workspace: the widest activations of a chunk of a
        prompt, and the logits of a batch.
        """
        config, held, workload = self.config, self.held, self.workload
        wide = workload.activation_bytes
        weights = (held.layer_matrices + held.head) * workload.weight_bytes
        weights += (held.vectors + held.embedding) * wide
        rows = max(batch, CHUNK_SIZES[-1])
        widest = max(2 * config.intermediate_size, 4 * config.num_heads * config.head_dim)
        width = math.ceil(widest / self.tp) + 4 * config.hidden_size
        workspace = rows * width * wide + 8 * batch * math.ceil(config.vocab_size / self.tp)
        return MemoryUse(weights, batch * self.sequence_bytes(context), workspace)

    def sequence_bytes(self, context: int) -> int:
        """The cache of one sequence on one chip."""
        positions = math.ceil(context / PAGE_SIZE) * PAGE_SIZE
        return positions * self.config.num_layers * self._cache_elements * self.workload.cache_bytes

    def largest_batch(self, context: int) -> int:
        """Sequences of that length that a replica has room for."""
        usable = self.hardware.usable_bytes
        most = int(usable // self.sequence_bytes(context))
        return bisect_right(range(1, most + 1), usable, key=lambda batch: self.memory(batch, context).total)

    def largest_context(self, batch: int) -> int:
        """Tokens, in whole pages, that each of so many sequences has room for."""
        usable = self.hardware.usable_bytes
        most = int(usable // (batch * self.sequence_bytes(PAGE_SIZE)))
        pages = range(1, most + 1)
        return PAGE_SIZE * bisect_right(
            pages, usable, key=lambda count: self.memory(batch, count * PAGE_SIZE).total
        )


@dataclass(frozen=True)
class Plan:
    """One way to cut a model over the chips, and what it costs.

    Attributes:
        model: the formulas it comes from.
        chips: all of them.
        workload: what is served.
        decode: a step of the fullest replica.
        prefill: one prompt.
        memory: of a chip of the fullest replica.
    """

    model: CostModel
    chips: int
    workload: Workload
    decode: Cost
    prefill: Cost
    memory: MemoryUse

    @property
    def tp(self) -> int:
        """Chips a replica."""
        return self.model.tp

    @property
    def replicas(self) -> int:
        """Copies of the model."""
        return self.chips // self.tp

    @property
    def batch(self) -> int:
        """Sequences of the fullest replica."""
        return math.ceil(self.workload.batch / self.replicas)

    @property
    def fits(self) -> bool:
        """Whether weights, cache and workspace fit in a chip's usable memory."""
        return self.memory.total <= self.model.hardware.usable_bytes

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.workload.batch / self.decode.total

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        model, workload, hardware = self.model, self.workload, self.model.hardware
        return {
            "model": model.counts.name,
            "hardware": hardware.name,
            "chips": self.chips,
            "tp": self.tp,
            "replicas": self.replicas,
            **asdict(workload),
            "batch_per_replica": self.batch,
            "experts_cut_by": model.cut if model.config.moe else None,
            "decode": {
                "step_ms": self.decode.total * 1e3,
                "tokens_per_s_per_sequence": 1 / self.decode.total,
                "tokens_per_s": self.tokens_per_s,
                "tokens_per_s_per_chip": self.tokens_per_s / self.chips,
                "split_ms": self.decode.ms(),
                "bound": self.decode.bound,
            },
            "prefill": {
                "ms": self.prefill.total * 1e3,
                "tokens_per_s": workload.prompt_len / self.prefill.total,
                "split_ms": self.prefill.ms(),
                "bound": self.prefill.bound,
            },
            "memory": {
                "bytes_per_chip": self.memory.total,
                "fits": self.fits,
                "usable_bytes": hardware.usable_bytes,
                "split_bytes": asdict(self.memory),
                "largest_batch": self.replicas * model.largest_batch(workload.context),
                "largest_context": model.largest_context(self.batch),
            },
            "source": hardware.source,
        }


def make_plan(counts: Counts, hardware: Hardware, chips: int, tp: int, workload: Workload) -> Plan:
    """Costs of one tp. A mixture's experts are cut in the way that decodes faster.

    Raises:
        ConfigError: the chips are not a multiple of tp.
    """
    if tp < 1 or chips % tp:
        raise ConfigError(
            f"{chips} chips are not a multiple of tp={tp}: use tp={', '.join(map(str, divisors(chips)))}"
        )
    batch = math.ceil(workload.batch / (chips // tp))
    cuts: list[ExpertAxis] = ["width"]
    moe = counts.config.moe
    if moe and moe.num_experts % tp == 0:
        cuts.append("experts")
    models = [CostModel(counts, hardware, tp, workload, cut) for cut in cuts]
    model = min(models, key=lambda model: model.decode(batch, workload.context).total)
    return Plan(
        model,
        chips,
        workload,
        model.decode(batch, workload.context),
        model.prefill(workload.prompt_len),
        model.memory(batch, workload.context),
    )


def make_plans(counts: Counts, hardware: Hardware, chips: int, workload: Workload) -> list[Plan]:
    """Costs of every tp that divides the chips; the rest are replicas."""
    return [make_plan(counts, hardware, chips, tp, workload) for tp in divisors(chips)]


def recommend(plans: Iterable[Plan]) -> tuple[Plan, str]:
    """The plan to take, and why: the fastest that fits, or a smaller tp that is as fast within 5%.

    Raises:
        ConfigError: none fits.
    """
    plans = list(plans)
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        raise ConfigError(does_not_fit(plans[-1]))
    fastest = min(fitting, key=lambda plan: plan.decode.total)
    best = next(plan for plan in fitting if plan.decode.total <= (1 + _CLOSE) * fastest.decode.total)
    if len(fitting) == 1 and len(plans) > 1:
        return best, f"tp={best.tp} is the only one that fits"
    reason = f"tp={best.tp} decodes fastest of those that fit: {best.decode.total * 1e3:.2f} ms a step"
    if best is not fastest:
        reason = (
            f"tp={best.tp} takes {best.decode.total * 1e3:.2f} ms a step, within {_CLOSE:.0%} of "
            f"tp={fastest.tp} ({fastest.decode.total * 1e3:.2f} ms) on fewer chips a replica"
        )
    return best, f"{reason}; most of it is {best.decode.bound}"


def does_not_fit(plan: Plan) -> str:
    """The numbers, and what would fit."""
    counts, hardware, workload = plan.model.counts, plan.model.hardware, plan.workload
    memory, usable = plan.memory, hardware.usable_bytes
    text = (
        f"{counts.name} at tp={plan.tp} needs {memory.total / 1e9:.1f} GB a chip "
        f"({memory.weights / 1e9:.1f} of weights, {memory.cache / 1e9:.1f} of cache), "
        f"but {hardware.name} has {usable / 1e9:.1f} GB usable of {hardware.memory_bytes / 1e9:.0f}"
    )
    would = []
    if (batch := plan.replicas * plan.model.largest_batch(workload.context)) > 0:
        would.append(f"a batch of {batch}")
        if (context := plan.model.largest_context(plan.batch)) > 0:
            would.append(f"a context of {context}")
    if workload.weight_bytes > 1:
        smaller = replace(workload, dtype="int8", cache_dtype="auto")
        if make_plan(counts, hardware, plan.chips, plan.tp, smaller).fits:
            would.append("--dtype int8")
    for more in (2**power for power in range(13)):
        if more > plan.tp and make_plan(counts, hardware, more, more, workload).fits:
            would.append(f"tp={more}")
            break
    return f"{text}; {' or '.join(would) or 'nothing smaller'} would fit"


def frontier(plan: Plan) -> list[tuple[int, float, float]]:
    """Batches from 1 to the largest that fits: (batch, tokens/s a sequence, tokens/s a chip)."""
    model, context = plan.model, plan.workload.context
    largest = model.largest_batch(context)
    batches = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    points = []
    for batch in [*batches, *([largest] if largest else [])]:
        seconds = model.decode(batch, context).total
        points.append((batch * plan.replicas, 1 / seconds, batch / seconds / plan.tp))
    return points


def divisors(number: int) -> list[int]:
    """Of a whole number, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def busiest(count: float, chance: float, chips: int) -> float:
    """The most hits on any of ``chips`` if each of a chip's ``count`` things is hit with that chance.

    The mean and sqrt(2 ln chips) standard deviations, as the largest of so many normal draws; at most all.
    """
    spread = math.sqrt(2 * math.log(chips) * count * chance * (1 - chance)) if chips > 1 else 0.0
    return min(count, count * chance + spread)
