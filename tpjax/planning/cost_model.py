"""Time and memory of a sharded model on given chips, from formulas alone.

A layer reads its weights and its cache, multiplies, and sums over the chips. A block of a layer takes as long
as its memory traffic or its arithmetic, whichever is longer. A step adds up the blocks, the collectives and a
fixed term per layer:

    step = Σ over blocks max(bytes / bandwidth, FLOPs / rate) + collectives + fixed

Memory traffic and arithmetic: Pope et al. 2022, "Efficiently Scaling Transformer Inference",
https://arxiv.org/abs/2211.05102, sections 2 (memory and compute time) and 3.2.1 (weights sharded over chips,
two all-reduces a layer), and "How to Scale Your Model", https://jax-ml.github.io/scaling-book/, chapters 1
(rooflines), 3 (collectives) and 7 (prefill, decode, and the cache). Times are seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import asdict, dataclass, fields

from tpjax.config import ExpertAxis
from tpjax.hardware import Hardware
from tpjax.planning.counts import Counts
from tpjax.planning.workload import Workload
from tpjax.runtime.limits import CHUNK_SIZES, PAGE_SIZE


@dataclass(frozen=True)
class Cost:
    """Time of a decode step or a prefill by cause, in seconds.

    Attributes:
        weights: reading weights.
        cache: reading and writing the key-value cache.
        compute: arithmetic beyond the memory traffic it overlaps with.
        collectives: moving data between chips.
        fixed: launches and host work, whatever the sizes.
    """

    weights: float = 0.0
    cache: float = 0.0
    compute: float = 0.0
    collectives: float = 0.0
    fixed: float = 0.0

    @property
    def total(self) -> float:
        """All parts together, seconds."""
        return self.weights + self.cache + self.compute + self.collectives + self.fixed

    @property
    def bound(self) -> str:
        """Name of the part that takes most time."""
        return max(fields(self), key=lambda field: getattr(self, field.name)).name

    def ms(self) -> dict[str, float]:
        """Returns the parts in milliseconds, by name."""
        return {name: seconds * 1e3 for name, seconds in asdict(self).items()}

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, times: float) -> Cost:
        return Cost(*(getattr(self, field.name) * times for field in fields(self)))


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one chip, in bytes."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """Weights, cache and workspace together, bytes."""
        return self.weights + self.cache + self.workspace


class CostModel:
    """Computes time and memory of a model sharded over ``tp`` chips.

    Args:
        counts: the model's element counts.
        hardware: the chip.
        tp: chips of one replica.
        workload: provides the dtypes; batch and lengths are arguments of each formula.
        expert_axis: the sharded axis of a mixture's experts: each expert's width, or the experts themselves
            if tp divides their number.
    """

    def __init__(
        self,
        counts: Counts,
        hardware: Hardware,
        tp: int,
        workload: Workload,
        expert_axis: ExpertAxis = "width",
    ) -> None:
        self.counts, self.hardware, self.tp, self.workload = counts, hardware, tp, workload
        self.expert_axis = expert_axis
        self.config, self.held = counts.config, counts.on_device(tp, expert_axis)
        self._cache_elements, self._attention_flops = counts.cache_elements(tp), counts.attention_flops(tp)
        # Faked chips share one machine: their reads and products add up instead of running in parallel.
        self._sharing = tp if hardware.shared else 1

    # --- time ----------------------------------------------------------------------------------------------

    def decode(self, batch: int, context: int) -> Cost:
        """Computes a decode step of one replica (Pope et al., section 2; the book, chapter 7)."""
        return self.layers(batch, batch, context) + self.embedding_and_head(batch)

    def prefill(self, tokens: int) -> Cost:
        """Computes a prefill of one prompt on one replica, which samples one token.

        Attention is causal: a token attends to half of the prompt on average.
        """
        return self.layers(1, tokens, (tokens + 1) / 2) + self.embedding_and_head(1, tokens)

    def layers(self, sequences: int, tokens: int, context: float) -> Cost:
        """Computes the cost of all decoder layers.

        Args:
            sequences: sequences, whose cache is read once each.
            tokens: tokens computed, all sequences together.
            context: keys that a token attends to, on average.
        """
        reduce = self.hardware.interconnect.all_reduce_s(self.tp, self._message(tokens))
        blocks = self.attention(sequences, tokens, context) + self.dense(tokens) + self.mixture(tokens)
        return blocks + self.overhead(tokens) + Cost(collectives=2 * self.config.num_layers * reduce)

    def attention(self, sequences: int, tokens: int, context: float) -> Cost:
        """Computes the cost of attention in all layers, projections included."""
        config, window_layers = self.config, self.counts.window_layers
        window = min(context, config.attention.sliding_window) if config.attention.sliding_window else context
        cost = self._product(self.held.attention, tokens)
        cost += self._cache(sequences, tokens, window) * window_layers
        return cost + self._cache(sequences, tokens, context) * (config.num_layers - window_layers)

    def dense(self, tokens: int) -> Cost:
        """Computes the cost of the dense MLPs and shared experts in all layers."""
        return self._product(self.held.mlp, tokens)

    def mixture(self, tokens: int) -> Cost:
        """Computes the cost of routed experts in all layers; only weights of chosen experts are read.

        A token chooses k of E experts at random, so that T tokens choose E (1 - (1 - k/E)^T) of them. If the
        experts are sharded, chips have uneven numbers of chosen ones: the step waits for the chip with most.
        """
        moe = self.config.moe
        if moe is None:
            return Cost()
        count, active = moe.num_experts, moe.experts_per_token
        chosen = 1 - (1 - active / count) ** tokens
        if self.expert_axis == "width":
            one, read = self.held.experts / count, count * chosen
            computed = float(tokens * active)
        else:
            one, even = self.held.experts * self.tp / count, count * chosen / self.tp
            read = busiest(count / self.tp, chosen, self.tp)
            computed = tokens * active / self.tp * read / even
        return self._block(read * one, 2.0 * computed * one) + self._product(self.held.routers, tokens)

    def overhead(self, tokens: int) -> Cost:
        """Computes what all layers cost beyond memory traffic, products and collectives."""
        efficiency = self.hardware.efficiency
        micros = (efficiency.layer_us + efficiency.token_us * tokens) * self.config.num_layers
        micros += efficiency.expert_us * self.counts.expert_layers
        return Cost(fixed=1e-6 * micros)

    def embedding_and_head(self, rows: int, tokens: int | None = None) -> Cost:
        """Computes the cost of embedding, vocabulary projection and sampling.

        Args:
            rows: sequences that a token is sampled for.
            tokens: tokens that are embedded; ``None``: one a row.
        """
        workload = self.workload
        itemsize = workload.weight_bytes if self.held.head else workload.activation_bytes
        reduce = self.hardware.interconnect.all_reduce_s
        moved = reduce(self.tp, self._message(tokens or rows)) + reduce(self.tp, 8.0 * rows)
        fixed = self.hardware.efficiency.step_us * 1e-6
        projection = self._product(self.held.head or self.held.embedding, rows, itemsize)
        return projection + Cost(collectives=moved, fixed=fixed)

    def _product(self, elements: float, tokens: float, itemsize: int | None = None) -> Cost:
        """Computes the cost of matrices that every token is multiplied by."""
        return self._block(elements, 2.0 * tokens * elements, itemsize)

    def _block(self, elements: float, flops: float, itemsize: int | None = None) -> Cost:
        """Computes the cost of weights of ``itemsize`` bytes an element, and the arithmetic on them."""
        itemsize = itemsize or self.workload.weight_bytes
        hardware, efficiency = self.hardware, self.hardware.efficiency
        rate = hardware.bandwidth_bytes_s * efficiency.weights
        if itemsize == 1:
            rate *= efficiency.low_precision_weights
        read = self._sharing * elements * itemsize / rate
        return Cost(weights=read, compute=self._beyond(flops, read))

    def _cache(self, sequences: int, tokens: int, context: float) -> Cost:
        """Computes the cost of attention scores and weighted sums in one layer, cache traffic included."""
        hardware = self.hardware
        length = context if tokens == sequences else 2 * context  # a prompt is written, and read back
        moved = sequences * length * self._cache_elements * self.workload.cache_bytes
        read = self._sharing * moved / (hardware.bandwidth_bytes_s * hardware.efficiency.cache)
        flops = tokens * context * self._attention_flops
        return Cost(cache=read, compute=self._beyond(flops, read, low_precision=False))

    def _beyond(self, flops: float, traffic_s: float, *, low_precision: bool = True) -> float:
        """Returns the seconds of arithmetic beyond the memory traffic that it overlaps with."""
        hardware, efficiency = self.hardware, self.hardware.efficiency
        rate = hardware.flops * efficiency.compute
        if low_precision and self.workload.dtype == "fp8" and hardware.low_precision_flops is not None:
            rate = hardware.low_precision_flops * efficiency.low_precision_compute
        return max(0.0, self._sharing * flops / rate - traffic_s)

    def _message(self, tokens: int) -> float:
        """Returns the bytes of the residual of all tokens."""
        return float(tokens * self.config.hidden_size * self.workload.activation_bytes)

    # --- memory --------------------------------------------------------------------------------------------

    def memory(self, batch: int, context: int) -> MemoryUse:
        """Computes the memory of one chip of a replica with ``batch`` sequences.

        The cache consists of full pages, in sliding layers too. The workspace holds the widest activations
        of a prefill chunk, and the logits of a batch.
        """
        config, held, workload = self.config, self.held, self.workload
        itemsize = workload.activation_bytes
        weights = (held.layer_matrices + held.head) * workload.weight_bytes
        weights += (held.vectors + held.embedding) * itemsize
        rows = max(batch, CHUNK_SIZES[-1])
        widest = max(
            2 * config.mlp.intermediate_size, 4 * config.attention.num_heads * config.attention.head_dim
        )
        width = math.ceil(widest / self.tp) + 4 * config.hidden_size
        workspace = rows * width * itemsize + 8 * batch * math.ceil(config.vocab_size / self.tp)
        return MemoryUse(weights, batch * self.sequence_bytes(context), workspace)

    def sequence_bytes(self, context: int) -> int:
        """Returns the cache bytes of one sequence on one chip."""
        positions = math.ceil(context / PAGE_SIZE) * PAGE_SIZE
        return positions * self.config.num_layers * self._cache_elements * self.workload.cache_bytes

    def largest_batch(self, context: int) -> int:
        """Returns how many sequences of that length fit a replica."""
        usable = self.hardware.usable_bytes
        most = int(usable // self.sequence_bytes(context))
        return bisect_right(range(1, most + 1), usable, key=lambda batch: self.memory(batch, context).total)

    def largest_context(self, batch: int) -> int:
        """Returns the most tokens a sequence, a multiple of the page size, at which ``batch`` of them fit."""
        usable = self.hardware.usable_bytes
        most = int(usable // (batch * self.sequence_bytes(PAGE_SIZE)))
        pages = range(1, most + 1)
        return PAGE_SIZE * bisect_right(
            pages, usable, key=lambda count: self.memory(batch, count * PAGE_SIZE).total
        )


def busiest(count: float, chance: float, chips: int) -> float:
    """Estimates the most chosen experts on any chip, if each is chosen independently.

    Mean plus sqrt(2 ln chips) standard deviations, the expected maximum of that many normal samples.

    Args:
        count: experts on each chip.
        chance: probability that an expert is chosen.
        chips: number of chips.
    """
    spread = math.sqrt(2 * math.log(chips) * count * chance * (1 - chance)) if chips > 1 else 0.0
    return min(count, count * chance + spread)
