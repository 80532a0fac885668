"""Predicts the time of one step from a chip's figures. Plain Python, no jax.

The engine sets its prompt budget with it, ``tpjax plan`` its figures. A step computes a token for each decode
row and the tokens of prompt chunks, all in one pass: weights are read once, every other matrix product has
all tokens, and attention treats decode rows and chunks apart. A block of a layer takes as long as its memory
traffic or its arithmetic, whichever is longer. A step adds up the blocks, the collectives and fixed terms:

    step = Σ over blocks max(bytes / bandwidth, FLOPs / rate) + collectives + fixed

Memory traffic and arithmetic: Pope et al. 2022, "Efficiently Scaling Transformer Inference",
https://arxiv.org/abs/2211.05102, sections 2 (memory and compute time) and 3.2.1 (weights sharded over chips,
two all-reduces a layer), and "How to Scale Your Model", https://jax-ml.github.io/scaling-book/, chapters 1
(rooflines), 3 (collectives) and 7 (prefill, decode, and the cache). Times are seconds.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, fields

from tpjax.config import ExpertAxis, ModelConfig
from tpjax.hardware import LANES, Hardware
from tpjax.interconnect import interpolated

_SAMPLED_BYTES = 8.0  # of a row: a device's best token and its score
_ROUTER_BYTES = 4.0  # of an element: float32 whatever the dtype


@dataclass(frozen=True)
class Elements:
    """Weight elements on one device, or their bytes, all layers together.

    Attributes:
        attention: attention matrices.
        mlp: matrices of the MLPs that every token goes through, shared experts included.
        routers: router matrices, which are replicated.
        experts: matrices of the routed experts.
        vectors: norms, biases, position embeddings and everything else that nothing is multiplied by as a
            matrix.
        embedding: the token embedding.
        head: the vocabulary projection; 0 if it is tied to the embedding.
    """

    attention: int = 0
    mlp: int = 0
    routers: int = 0
    experts: int = 0
    vectors: int = 0
    embedding: int = 0
    head: int = 0

    @property
    def layer_matrices(self) -> int:
        """Elements of all matrices in the decoder layers."""
        return self.attention + self.mlp + self.routers + self.experts

    @property
    def total(self) -> int:
        """Elements of all weights."""
        return self.layer_matrices + self.vectors + self.embedding + self.head


@dataclass(frozen=True)
class DeviceShare:
    """What one device holds and computes of a model that is sharded over ``tp`` devices.

    Attributes:
        config: the architecture.
        tp: number of devices.
        held: weight elements.
        cache_elements: cache elements of one token in one layer.
        cache_vectors: vectors that they form; each has a scale if the cache is quantised.
        attention_flops: FLOPs of one query position with one key and value, one layer.
        expert_axis: the sharded axis of a mixture's experts: each expert's width, or the experts themselves.
        expanded_flops: FLOPs of one query position with one key and value that are expanded from a latent, as
            a chunk's are where attention is no kernel; ``None``: there are no latents.
        expanding_flops: FLOPs of expanding one.
    """

    config: ModelConfig
    tp: int
    held: Elements
    cache_elements: int
    cache_vectors: int
    attention_flops: int
    expert_axis: ExpertAxis = "width"
    expanded_flops: int | None = None
    expanding_flops: int = 0


@dataclass(frozen=True)
class Itemsizes:
    """Bytes of one element, and how products compute.

    Attributes:
        weights: of a matrix of attention or MLPs, scales included; a little over 0.5 for 4 bits.
        activations: of an activation, a norm or the embedding.
        cache: of a key or a value.
        float8: whether products compute in float8, on chips that do.
        cache_scale: of the scale of a vector of the cache; 0 where it has none.
        head: of the head; ``None``: as of an activation.
        experts: of a matrix of routed experts; ``None``: as of other weights.
    """

    weights: float
    activations: float
    cache: float
    float8: bool = False
    cache_scale: int = 0
    head: float | None = None
    experts: float | None = None


@dataclass(frozen=True)
class StepTokens:
    """The tokens of one step.

    Attributes:
        rows: decode rows, a token each.
        context: keys that the token of a row attends to, itself included, on average over the rows.
        chunks: start and stop of each prompt chunk in its prompt; a token is sampled after each.
        padding_rows: rows that fill up the program's: they read no cache and choose no expert, and all else
            is computed for them.
        padding_tokens: tokens that fill up the program's chunks, in the same way.
    """

    rows: int = 0
    context: float = 0.0
    chunks: tuple[tuple[int, int], ...] = ()
    padding_rows: int = 0
    padding_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(stop - start for start, stop in self.chunks)

    @property
    def total(self) -> int:
        """Tokens that pass through the layers."""
        return self.present + self.padding_rows + self.padding_tokens

    @property
    def present(self) -> int:
        """Those that are no padding."""
        return self.rows + self.prompt_tokens

    @property
    def sampled(self) -> int:
        """Rows that a token is sampled for."""
        return self.rows + self.padding_rows + len(self.chunks)


@dataclass(frozen=True)
class Cost:
    """Time of a step by cause, in seconds.

    Attributes:
        weights: reading weights.
        cache: reading and writing the key-value cache.
        compute: arithmetic beyond the memory traffic it overlaps with.
        collectives: moving data between devices.
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
        return Cost(
            self.weights + other.weights,
            self.cache + other.cache,
            self.compute + other.compute,
            self.collectives + other.collectives,
            self.fixed + other.fixed,
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(
            self.weights * times,
            self.cache * times,
            self.compute * times,
            self.collectives * times,
            self.fixed * times,
        )


class StepTime:
    """Computes the time of a step on one replica.

    Args:
        share: what each device holds and computes.
        hardware: one device.
        itemsizes: bytes of an element of weights, activations and cache.
        replicas: replicas that step at the same time. Each has its own devices, but on faked ones they share
            the machine.
    """

    def __init__(
        self, share: DeviceShare, hardware: Hardware, itemsizes: Itemsizes, replicas: int = 1
    ) -> None:
        self.share, self.hardware, self.itemsizes = share, hardware, itemsizes
        self.config, self.tp, self.held = share.config, share.tp, share.held
        self.expert_axis = share.expert_axis
        attention = self.config.attention
        self._windows = Counter(attention.window_of(kind) for kind in attention.layer_types)
        # Faked devices share one machine: their reads and products add up instead of running in parallel.
        self._replicas = replicas if hardware.shared else 1
        self._sharing = self.tp * self._replicas if hardware.shared else 1

    @property
    def token_bytes(self) -> float:
        """Bytes of the cache of one token in one layer on one device, padding of its memory included."""
        share, sizes, lanes = self.share, self.itemsizes, LANES.get(self.hardware.platform, 1)
        width = lanes * math.ceil(share.cache_elements / share.cache_vectors / lanes)
        return share.cache_vectors * (width * sizes.cache + sizes.cache_scale)

    def seconds(
        self, decode_rows: int, context_tokens: int, prompt_tokens: int = 0, prompt_context: int = 0
    ) -> float:
        """Predicts the seconds of a step.

        Args:
            decode_rows: rows that decode a token each.
            context_tokens: keys that these tokens attend to, all rows together.
            prompt_tokens: tokens of a prompt chunk.
            prompt_context: tokens of that prompt before the chunk, which are in the cache.
        """
        chunks = ((prompt_context, prompt_context + prompt_tokens),) if prompt_tokens else ()
        return self.step(StepTokens(decode_rows, context_tokens / max(decode_rows, 1), chunks)).total

    def step(self, tokens: StepTokens) -> Cost:
        """Computes the cost of a step (Pope et al., section 2; the book, chapter 7)."""
        return self.layers(tokens) + self.embedding_and_head(tokens.sampled, tokens.total)

    def decode(self, batch: int, context: float) -> Cost:
        """Computes the cost of a step of ``batch`` decode rows alone."""
        return self.step(StepTokens(batch, context))

    def prefill(self, tokens: int) -> Cost:
        """Computes the cost of one prompt alone, in one step, which samples one token."""
        return self.step(StepTokens(chunks=((0, tokens),)))

    def layers(self, tokens: StepTokens) -> Cost:
        """Computes the cost of all decoder layers."""
        total = tokens.total
        blocks = self.attention(tokens) + self.dense(total) + self.mixture(tokens.present, total)
        return blocks + self.overhead(tokens) + Cost(collectives=self._collectives(total))

    def attention(self, tokens: StepTokens) -> Cost:
        """Computes the cost of attention in all layers, projections included.

        Decode rows and each chunk are computed apart.
        """
        cost = self._product(self.held.attention, tokens.total)
        for window, layers in self._windows.items():
            cost += self._attend(tokens, window) * layers
        return cost

    def dense(self, tokens: int) -> Cost:
        """Computes the cost of the dense MLPs and shared experts in all layers."""
        return self._product(self.held.mlp, tokens)

    def mixture(self, tokens: int, routed: int | None = None) -> Cost:
        """Computes the cost of routed experts in all layers; only weights of chosen experts are read.

        Args:
            tokens: tokens that choose experts.
            routed: tokens that the router scores, padding included; ``None``: the same.
        """
        moe = self.config.moe
        if moe is None:
            return Cost()
        count, active, read = moe.num_experts, moe.experts_per_token, self.experts_read(tokens)
        if self.expert_axis == "width":
            one, computed = self.held.experts / count, float(tokens * active)
        else:
            one, even = self.held.experts * self.tp / count, count * self._chosen(tokens) / self.tp
            computed = tokens * active / self.tp * read / even
        router = self._product(self.held.routers, tokens if routed is None else routed, _ROUTER_BYTES)
        return self._block(read * one, 2.0 * computed * one, self.itemsizes.experts) + router

    def experts_read(self, tokens: int) -> float:
        """Returns how many experts of a layer a device reads.

        A token chooses k of E experts at random, so that T tokens choose E (1 - (1 - k/E)^T) of them. If the
        experts are sharded, devices have uneven numbers of chosen ones: the step waits for the device with
        most.
        """
        moe = self.config.moe
        if moe is None:
            return 0.0
        if self.expert_axis == "width":
            return moe.num_experts * self._chosen(tokens)
        return busiest(moe.num_experts / self.tp, self._chosen(tokens), self.tp)

    def _chosen(self, tokens: int) -> float:
        """Returns the share of all experts that tokens choose."""
        moe = self.config.moe
        return 0.0 if moe is None else 1 - (1 - moe.experts_per_token / moe.num_experts) ** tokens

    def overhead(self, tokens: StepTokens) -> Cost:
        """Computes what all layers cost beyond memory traffic, products and collectives."""
        efficiency = self.hardware.efficiency
        each = efficiency.row_us * (tokens.rows + tokens.padding_rows)
        each += efficiency.token_us * (tokens.prompt_tokens + tokens.padding_tokens)
        micros = (efficiency.layer_us + each * self._replicas) * self.config.num_layers
        micros += efficiency.expert_us * sum(self.config.sparse_layers)
        return Cost(fixed=1e-6 * micros)

    def embedding_and_head(self, rows: int, tokens: int) -> Cost:
        """Computes the cost of embedding, vocabulary projection and sampling.

        Args:
            rows: rows that a token is sampled for.
            tokens: tokens that are embedded.
        """
        return self.head(rows) + self.embedding(tokens)

    def embedding(self, tokens: int) -> Cost:
        """Computes the cost of embedding tokens: one all-reduce."""
        return Cost(collectives=self.hardware.interconnect.all_reduce_s(self.tp, self._message(tokens)))

    def head(self, rows: int) -> Cost:
        """Computes the cost of the vocabulary projection and of sampling a token for each of ``rows``."""
        itemsize = self.itemsizes.activations if self.itemsizes.head is None else self.itemsizes.head
        # an all-gather moves half of what an all-reduce of its result does
        moved = self.hardware.interconnect.all_reduce_s(self.tp, _SAMPLED_BYTES * self.tp * rows / 2)
        fixed = self.hardware.efficiency.step_us * 1e-6
        projection = self._product(self.held.head or self.held.embedding, rows, itemsize)
        return projection + Cost(collectives=moved, fixed=fixed)

    def reduced_bytes(self, tokens: int, layers: range | None = None) -> float:
        """Returns the bytes of the results that are added up, or gathered, over devices.

        Args:
            tokens: tokens that take a step and have another sampled.
            layers: a pipeline stage's; the first embeds tokens, the last samples them; ``None``: all.
        """
        every = range(self.config.num_layers)
        part = every if layers is None else layers
        if self.tp == 1:
            return 0.0
        reduced = sum(count * size for count, size in self._all_reduces(tokens)) * len(part) / len(every)
        reduced += self._message(tokens) if part.start == 0 else 0
        return reduced + (_SAMPLED_BYTES * self.tp * tokens if part.stop == every.stop else 0)

    def _collectives(self, tokens: int) -> float:
        """Returns the seconds of all layers' all-reduces."""
        reduce = self.hardware.interconnect.all_reduce_s
        return sum(count * reduce(self.tp, size) for count, size in self._all_reduces(tokens))

    def _all_reduces(self, tokens: int) -> list[tuple[int, float]]:
        """Returns how many all-reduces of how many bytes all layers take.

        Each takes two, or one where its halves are parallel. A norm over all heads takes one of two float32
        numbers a token in addition.
        """
        layers = self.config.num_layers
        found = [((1 if self.config.parallel else 2) * layers, self._message(tokens))]
        if self.config.attention.qk_norm == "projection":
            found.append((layers, 8.0 * tokens))
        return found

    def _attend(self, tokens: StepTokens, window: int | None) -> Cost:
        """Computes the cost of attention scores and weighted sums in one layer, cache traffic included."""
        context = min(tokens.context, window or math.inf)
        share, cost = self.share, Cost()
        if tokens.rows:
            cost = self._cache(tokens.rows * context, tokens.rows * context * share.attention_flops)
        # only TPUs have a kernel for latents: elsewhere a chunk expands those before it, at each step
        expands = share.expanded_flops is not None and self.hardware.platform != "tpu"
        flops = (share.expanded_flops or 0) if expands else share.attention_flops
        for start, stop in tokens.chunks:
            length = stop - start
            before = min(start, window or math.inf)  # read from the cache; the chunk itself is written
            products = attended(start, stop, window) * flops + before * share.expanding_flops * expands
            cost += self._cache(before + 2 * length, products)
        return cost

    def _cache(self, moved: float, flops: float) -> Cost:
        """Computes the cost of reading or writing ``moved`` keys, and of products with keys and values."""
        hardware = self.hardware
        moved_bytes = moved * self.token_bytes
        read = self._sharing * moved_bytes / (hardware.bandwidth_bytes_s * hardware.efficiency.cache)
        return Cost(cache=read, compute=self._beyond(flops, read, low_precision=False))

    def _product(self, elements: float, tokens: float, itemsize: float | None = None) -> Cost:
        """Computes the cost of matrices that every token is multiplied by."""
        return self._block(elements, 2.0 * tokens * elements, itemsize)

    def _block(self, elements: float, flops: float, itemsize: float | None = None) -> Cost:
        """Computes the cost of weights of ``itemsize`` bytes an element, and the arithmetic on them."""
        itemsize = itemsize or self.itemsizes.weights
        hardware, efficiency = self.hardware, self.hardware.efficiency
        if hardware.products and itemsize == 4 and elements:
            first, seconds = hardware.products[0][1], interpolated(hardware.products, flops / (2 * elements))
            return Cost(weights=first, compute=seconds - first) * (self._sharing * elements)
        rate = hardware.bandwidth_bytes_s * efficiency.weights
        if itemsize < 2:
            rate *= efficiency.low_precision_weights
        read = self._sharing * elements * itemsize / rate
        return Cost(weights=read, compute=self._beyond(flops, read))

    def _beyond(self, flops: float, traffic_s: float, *, low_precision: bool = True) -> float:
        """Returns the seconds of arithmetic beyond the memory traffic that it overlaps with."""
        hardware, efficiency = self.hardware, self.hardware.efficiency
        rate = hardware.flops * efficiency.compute
        if low_precision and self.itemsizes.float8 and hardware.low_precision_flops is not None:
            rate = hardware.low_precision_flops * efficiency.low_precision_compute
        return max(0.0, self._sharing * flops / rate - traffic_s)

    def _message(self, tokens: int) -> float:
        """Returns the bytes of the residual of all tokens."""
        return float(tokens * self.config.hidden_size * self.itemsizes.activations)


def attended(start: int, stop: int, window: int | None = None) -> float:
    """Counts the pairs of a query and a key of tokens ``start`` to ``stop``: each sees itself and before."""
    pairs = (stop - start) * (start + stop + 1) / 2
    if window is not None:
        first = max(start, window)  # from here on, tokens see no more than the window
        if stop > first:
            pairs -= (stop - first) * (first + stop + 1) / 2 - (stop - first) * window
    return pairs


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
