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
from typing import Any, Literal

from tpjax.errors import ConfigError
from tpjax.inspect.hardware import Hardware
from tpjax.inspect.shapes import Shape

DTYPE_BYTES = {"float32": 4, "bf16": 2, "int8": 1, "fp8": 1}
_PAGE = 128  # positions; a sequence's cache is whole pages, as in the runner
_CHUNK = 512  # tokens of a prompt that are computed at once, the runner's largest chunk
_CLOSE = 0.05  # plans within this of the fastest count as equal, and the one with fewer chips a replica wins

ExpertCut = Literal["width", "experts"]


@dataclass(frozen=True)
class Traffic:
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
    def wide_bytes(self) -> int:
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
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

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
class Memory:
    """What one chip holds, bytes."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.workspace


class Model:
    """A shape cut over ``tp`` chips of a kind: the formulas.

    Args:
        shape: the model.
        hardware: the chip.
        tp: chips of one replica.
        traffic: gives the dtypes; batch and lengths are arguments of each formula.
        cut: of a mixture's experts: each one's width, or whole experts where tp divides their count.
    """

    def __init__(
        self, shape: Shape, hardware: Hardware, tp: int, traffic: Traffic, cut: ExpertCut = "width"
    ) -> None:
        self.shape, self.hardware, self.tp, self.traffic, self.cut = shape, hardware, tp, traffic, cut
        # Faked chips share one machine: what they read and multiply adds up, it does not go on in parallel.
        self._sharing = tp if hardware.shared else 1

    # --- time ----------------------------------------------------------------------------------------------

    def decode(self, batch: int, context: int) -> Cost:
        """One step of ``batch`` sequences of one replica (Pope et al., section 2; the book, chapter 7)."""
        return self.layers(batch, batch, context) + self.ends(batch)

    def prefill(self, tokens: int) -> Cost:
        """One prompt on one replica, causal: a token sees half of it on average. Draws one token."""
        return self.layers(1, tokens, (tokens + 1) / 2) + self.ends(1, tokens)

    def layers(self, sequences: int, tokens: int, context: float) -> Cost:
        """All layers.

        Args:
            sequences: whose cache is read, once each.
            tokens: computed, all sequences together.
            context: keys that a token sees, on average.
        """
        reduce = self.hardware.interconnect.all_reduce_s(self.tp, self._message(tokens))
        blocks = self.attention(sequences, tokens, context) + self.dense(tokens) + self.mixture(tokens)
        return blocks + self.overhead(tokens) + Cost(collectives=2 * self.shape.layers * reduce)

    def attention(self, sequences: int, tokens: int, context: float) -> Cost:
        """Attention of all layers, its projections included."""
        shape = self.shape
        seen = min(context, shape.window) if shape.window else context
        cost = self._product(shape.attention_weights(self.tp), tokens) * shape.layers
        cost += self._cache(sequences, tokens, seen) * shape.window_layers
        return cost + self._cache(sequences, tokens, context) * (shape.layers - shape.window_layers)

    def dense(self, tokens: int) -> Cost:
        """The MLPs of all layers that have one."""
        shape = self.shape
        count = shape.layers - shape.expert_layers
        return self._product(shape.mlp_weights(self.tp, shape.width), tokens) * count

    def mixture(self, tokens: int) -> Cost:
        """The experts of all layers that have them; of their weights, only those some token chose are read.

        A token chooses k of E, so that T tokens touch E (1 - (1 - k/E)^T) of them if they choose at random.
        Whole experts on different chips are not touched evenly: the step waits for the chip with the most.
        """
        shape, experts = self.shape, self.shape.experts
        if experts is None:
            return Cost()
        chance = 1 - (1 - experts.active / experts.count) ** tokens
        every = shape.hidden * experts.count + shape.mlp_weights(self.tp, experts.shared_width)
        if self.cut == "width":
            one, touched = shape.mlp_weights(self.tp, experts.width), experts.count * chance
            computed = float(tokens * experts.active)
        else:
            one, even = shape.mlp_weights(1, experts.width), experts.count * chance / self.tp
            touched = busiest(experts.count / self.tp, chance, self.tp)
            computed = tokens * experts.active / self.tp * touched / even
        layer = self._block(touched * one, 2.0 * computed * one) + self._product(every, tokens)
        return layer * shape.expert_layers

    def overhead(self, tokens: int) -> Cost:
        """What layers cost beyond traffic, products and collectives."""
        shape, efficiency = self.shape, self.hardware.efficiency
        micros = (efficiency.layer_us + efficiency.token_us * tokens) * shape.layers
        micros += efficiency.expert_us * shape.expert_layers
        return Cost(fixed=1e-6 * micros)

    def ends(self, rows: int, tokens: int | None = None) -> Cost:
        """Embedding and vocabulary projection: one all-reduce of all tokens, and small ones to sample."""
        head = self.shape.vocab_weights(self.tp)
        stored = self.traffic.wide_bytes if self.shape.tied else self.traffic.weight_bytes
        reduce = self.hardware.interconnect.all_reduce_s
        moved = reduce(self.tp, self._message(tokens or rows)) + reduce(self.tp, 8.0 * rows)
        fixed = self.hardware.efficiency.step_us * 1e-6
        return self._product(head, rows, stored) + Cost(collectives=moved, fixed=fixed)

    def _product(self, elements: float, tokens: float, stored: int | None = None) -> Cost:
        """Matrices that every token is multiplied by."""
        return self._block(elements, 2.0 * tokens * elements, stored)

    def _block(self, elements: float, flops: float, stored: int | None = None) -> Cost:
        stored = stored or self.traffic.weight_bytes
        hardware, efficiency = self.hardware, self.hardware.efficiency
        rate = hardware.bandwidth_bytes_s * efficiency.weights
        if stored == 1:
            rate *= efficiency.narrow_weights
        read = self._sharing * elements * stored / rate
        return Cost(weights=read, compute=self._beyond(flops, read))

    def _cache(self, sequences: int, tokens: int, seen: float) -> Cost:
        """One layer's scores and sums, and the cache's traffic."""
        hardware = self.hardware
        length = seen if tokens == sequences else 2 * seen  # a prompt is written, and read back
        moved = sequences * length * self.shape.cache_elements(self.tp) * self.traffic.cache_bytes
        read = self._sharing * moved / (hardware.bandwidth_bytes_s * hardware.efficiency.cache)
        flops = tokens * seen * self.shape.attention_flops(self.tp)
        return Cost(cache=read, compute=self._beyond(flops, read, narrow=False))

    def _beyond(self, flops: float, traffic_s: float, *, narrow: bool = True) -> float:
        """Arithmetic's time beyond the traffic that it hides behind."""
        hardware, efficiency = self.hardware, self.hardware.efficiency
        rate = hardware.flops * efficiency.compute
        if narrow and self.traffic.dtype == "fp8" and hardware.narrow_flops is not None:
            rate = hardware.narrow_flops * efficiency.narrow_compute
        return max(0.0, self._sharing * flops / rate - traffic_s)

    def _message(self, tokens: int) -> float:
        return float(tokens * self.shape.hidden * self.traffic.wide_bytes)

    # --- memory --------------------------------------------------------------------------------------------

    def memory(self, batch: int, context: int) -> Memory:
        """What a chip of a replica with ``batch`` sequences holds.

        The cache keeps whole pages, of sliding layers too. Workspace: the widest activations of a chunk of a
        prompt, and the logits of a batch.
        """
        shape, traffic = self.shape, self.traffic
        wide = traffic.wide_bytes
        matrices = shape.layers * shape.attention_weights(self.tp)
        matrices += (shape.layers - shape.expert_layers) * shape.mlp_weights(self.tp, shape.width)
        if shape.experts:
            matrices += shape.expert_layers * shape.mixture_weights(self.tp)
        weights = matrices * traffic.weight_bytes
        weights += (shape.layers * shape.layer_vectors + shape.hidden) * wide
        weights += shape.vocab_weights(self.tp) * wide
        if not shape.tied:
            weights += shape.vocab_weights(self.tp) * traffic.weight_bytes
        rows = max(batch, _CHUNK)
        width = math.ceil(max(2 * shape.width, 4 * shape.heads * shape.head_dim) / self.tp) + 4 * shape.hidden
        workspace = rows * width * wide + 8 * batch * math.ceil(shape.vocab / self.tp)
        return Memory(weights, batch * self.sequence_bytes(context), workspace)

    def sequence_bytes(self, context: int) -> int:
        """The cache of one sequence on one chip."""
        positions = math.ceil(context / _PAGE) * _PAGE
        return positions * self.shape.layers * self.shape.cache_elements(self.tp) * self.traffic.cache_bytes

    def largest_batch(self, context: int) -> int:
        """Sequences of that length that a replica has room for."""
        usable = self.hardware.usable_bytes
        most = int(usable // self.sequence_bytes(context))
        return bisect_right(range(1, most + 1), usable, key=lambda batch: self.memory(batch, context).total)

    def largest_context(self, batch: int) -> int:
        """Tokens, in whole pages, that each of so many sequences has room for."""
        usable = self.hardware.usable_bytes
        most = int(usable // (batch * self.sequence_bytes(_PAGE)))
        pages = range(1, most + 1)
        return _PAGE * bisect_right(pages, usable, key=lambda count: self.memory(batch, count * _PAGE).total)


@dataclass(frozen=True)
class Plan:
    """One way to cut a model over the chips, and what it costs.

    Attributes:
        model: the formulas it comes from.
        chips: all of them.
        traffic: what is served.
        decode: a step of the fullest replica.
        prefill: one prompt.
        memory: of a chip of the fullest replica.
    """

    model: Model
    chips: int
    traffic: Traffic
    decode: Cost
    prefill: Cost
    memory: Memory

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
        return math.ceil(self.traffic.batch / self.replicas)

    @property
    def fits(self) -> bool:
        """Whether weights, cache and workspace fit in a chip's usable memory."""
        return self.memory.total <= self.model.hardware.usable_bytes

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.traffic.batch / self.decode.total

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        model, traffic, hardware = self.model, self.traffic, self.model.hardware
        return {
            "model": model.shape.name,
            "hardware": hardware.name,
            "chips": self.chips,
            "tp": self.tp,
            "replicas": self.replicas,
            **asdict(traffic),
            "batch_per_replica": self.batch,
            "experts_cut_by": model.cut if model.shape.experts else None,
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
                "tokens_per_s": traffic.prompt_len / self.prefill.total,
                "split_ms": self.prefill.ms(),
                "bound": self.prefill.bound,
            },
            "memory": {
                "bytes_per_chip": self.memory.total,
                "fits": self.fits,
                "usable_bytes": hardware.usable_bytes,
                "split_bytes": asdict(self.memory),
                "largest_batch": self.replicas * model.largest_batch(traffic.context),
                "largest_context": model.largest_context(self.batch),
            },
            "source": hardware.source,
        }


def make_plan(shape: Shape, hardware: Hardware, chips: int, tp: int, traffic: Traffic) -> Plan:
    """Costs of one tp. A mixture's experts are cut in the way that decodes faster.

    Raises:
        ConfigError: the chips are not a multiple of tp.
    """
    if tp < 1 or chips % tp:
        raise ConfigError(
            f"{chips} chips are not a multiple of tp={tp}: use tp={', '.join(map(str, divisors(chips)))}"
        )
    batch = math.ceil(traffic.batch / (chips // tp))
    cuts: list[ExpertCut] = ["width"]
    if shape.experts and shape.experts.count % tp == 0:
        cuts.append("experts")
    models = [Model(shape, hardware, tp, traffic, cut) for cut in cuts]
    model = min(models, key=lambda model: model.decode(batch, traffic.context).total)
    return Plan(
        model,
        chips,
        traffic,
        model.decode(batch, traffic.context),
        model.prefill(traffic.prompt_len),
        model.memory(batch, traffic.context),
    )


def make_plans(shape: Shape, hardware: Hardware, chips: int, traffic: Traffic) -> list[Plan]:
    """Costs of every tp that divides the chips; the rest are replicas."""
    return [make_plan(shape, hardware, chips, tp, traffic) for tp in divisors(chips)]


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
    shape, hardware, traffic = plan.model.shape, plan.model.hardware, plan.traffic
    memory, usable = plan.memory, hardware.usable_bytes
    text = (
        f"{shape.name} at tp={plan.tp} needs {memory.total / 1e9:.1f} GB a chip "
        f"({memory.weights / 1e9:.1f} of weights, {memory.cache / 1e9:.1f} of cache), "
        f"but {hardware.name} has {usable / 1e9:.1f} GB usable of {hardware.memory_bytes / 1e9:.0f}"
    )
    would = []
    if (batch := plan.replicas * plan.model.largest_batch(traffic.context)) > 0:
        would.append(f"a batch of {batch}")
        if (context := plan.model.largest_context(plan.batch)) > 0:
            would.append(f"a context of {context}")
    if traffic.weight_bytes > 1:
        smaller = replace(traffic, dtype="int8", cache_dtype="auto")
        if make_plan(shape, hardware, plan.chips, plan.tp, smaller).fits:
            would.append("--dtype int8")
    for more in (2**power for power in range(13)):
        if more > plan.tp and make_plan(shape, hardware, more, more, traffic).fits:
            would.append(f"tp={more}")
            break
    return f"{text}; {' or '.join(would) or 'nothing smaller'} would fit"


def frontier(plan: Plan) -> list[tuple[int, float, float]]:
    """Batches from 1 to the largest that fits: (batch, tokens/s a sequence, tokens/s a chip)."""
    model, context = plan.model, plan.traffic.context
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
