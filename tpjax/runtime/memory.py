"""Fits context, slots and cache into the memory of the devices, before a weight is read."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from tpjax import cache as kv
from tpjax.config import KVDtype, ModelConfig, Quantize
from tpjax.errors import ConfigError
from tpjax.mesh import describe_tp
from tpjax.runtime.limits import (
    MAX_PROMPT_TOKENS,
    PAGE_SIZE,
    STEPS,
    Limits,
    chunk_shapes,
    mixed_chunk_shapes,
)
from tpjax.sampling import HISTORY_BYTES, mask_words
from tpjax.sharding import head_plan, pad_to_multiple, width_per_device
from tpjax.windows import ONE_GROUP, Windows, pages_held

# Bytes of the cache on a CPU, whose memory is shared with everything else, unless one sequence needs more:
# enough for several long conversations.
_CPU_CACHE_BYTES = 2**30
# Fraction left to what is not planned: the allocator's fragments, collectives' buffers, loaded programs.
_RESERVED = 0.08
# Fraction of a device's memory for penalties and biases, and the sequences that may have some in any case.
_HISTORIES = 0.01
_LEAST_HISTORIES = 8
# Sequences decoded at once unless told: on a CPU, and elsewhere at most. Each may then have this many tokens.
CPU_SLOTS = 8
SLOTS = (256, 128, 64, 32, 16, 8, 4, 2)
SLOT_TOKENS = 1024
_MOST_TP = 64
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of one device.

    Attributes:
        free: free bytes.
        cache_cap: bytes that the cache exceeds only if one sequence needs more; ``None``: no cap.
        platform: the kind of device, which decides how arrays are laid out in memory.
    """

    free: int
    cache_cap: int | None = None
    platform: str = "cpu"


def device_memory(tp: int) -> DeviceMemory | None:
    """Returns the memory of each of ``tp`` devices; ``None`` if it is unknown.

    Faked devices share the host's memory: each gets an equal part of what is available.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        free = _host_memory()
        return None if free is None else DeviceMemory(free // tp, _CPU_CACHE_BYTES // tp)
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    free = int((stats["bytes_limit"] - stats.get("bytes_in_use", 0)) * (1 - _RESERVED))
    return DeviceMemory(free, platform=device.platform)


@dataclass(frozen=True)
class MeshShare:
    """What a mesh has of a model: all of it, or a pipeline stage.

    Attributes:
        config: the architecture, with its layers only.
        tp: its devices.
        weight_bytes: bytes of the weights on each of them.
    """

    config: ModelConfig
    tp: int
    weight_bytes: int


def plan_limits(
    config: ModelConfig,
    tp: int,
    dtype: jnp.dtype,
    *,
    weight_bytes: int,
    memory: DeviceMemory | None,
    max_model_len: int | None,
    max_slots: int | None,
    kv_dtype: KVDtype = "auto",
    quantized_bytes: Callable[[Quantize], int] | None = None,
) -> Limits:
    """Chooses the sizes of slots, context and cache of a model on one mesh, as :func:`plan_stages` does.

    Args:
        config: the architecture.
        tp: devices.
        dtype: dtype of activations.
        weight_bytes: bytes of the weights on each device.
        memory: as :func:`plan_stages` takes it.
        max_model_len: as :func:`plan_stages` takes it.
        max_slots: as :func:`plan_stages` takes it.
        kv_dtype: what keys and values are kept in; ``auto``: ``dtype``.
        quantized_bytes: returns the bytes of quantised weights on each device, for an error's advice;
            ``None``: they cannot be quantised.

    Raises:
        ConfigError: as in :func:`plan_stages`.
    """
    return plan_stages(
        config,
        [MeshShare(config, tp, weight_bytes)],
        dtype,
        memory=memory,
        max_model_len=max_model_len,
        max_slots=max_slots,
        kv_dtype=kv_dtype,
        quantized_bytes=None if quantized_bytes is None else lambda kind: [quantized_bytes(kind)],
    )


def plan_stages(
    config: ModelConfig,
    shares: Sequence[MeshShare],
    dtype: jnp.dtype,
    *,
    memory: DeviceMemory | None,
    max_model_len: int | None,
    max_slots: int | None,
    kv_dtype: KVDtype = "auto",
    quantized_bytes: Callable[[Quantize], Sequence[int]] | None = None,
) -> Limits:
    """Chooses the sizes of slots, context and cache.

    The cache holds ``max_slots`` sequences of full length if there is room, and at least one. How many of
    them may have penalties or biases at once: :func:`max_histories`.

    Args:
        config: the architecture.
        shares: what each pipeline stage has; one: the model is in one piece. All have as many pages as fit
            the one with least room.
        dtype: dtype of activations.
        memory: memory of each device; ``None``: enough.
        max_model_len: tokens of the longest sequence; ``None``: the model's longest context, if it fits.
        max_slots: sequences decoded at once; ``None``: 8 on a CPU, elsewhere the largest power of two up to
            256 of which each has cache pages for 1,024 tokens, or for ``max_model_len`` if that is less.
        kv_dtype: what keys and values are kept in; ``auto``: ``dtype``.
        quantized_bytes: returns the bytes of quantised weights on each device of each stage, for an error's
            advice; ``None``: they cannot be quantised.

    Raises:
        ConfigError: ``max_model_len`` exceeds the model's longest context, or the model does not fit; the
            message has the sizes and what would fit.
    """
    longest = config.longest_context
    if max_model_len is not None and not 1 <= max_model_len <= longest:
        raise ConfigError(f"max_model_len={max_model_len} is not between 1 and the model's {longest}")
    if max_slots is not None and max_slots < 1:
        raise ConfigError(f"max_slots={max_slots} is less than 1")
    platform, length = "cpu" if memory is None else memory.platform, max_model_len or longest
    windows = windows_of(config, length)
    pools = [
        PagePool(windows, _page_bytes(one, dtype, platform, windows, kv_dtype), kv_dtype) for one in shares
    ]
    if max_slots is None:
        max_slots = _slots_with_room(shares, dtype, memory, pools, length)
    pages = pools[0].held(length) * max_slots
    if memory is not None:
        needs = _needs(shares, dtype, memory, max_slots)
        rooms = [
            (memory.free - need.total) // pool.page_bytes - 1  # the null page
            for need, pool in zip(needs, pools, strict=True)
        ]
        least = pools[0].held(PAGE_SIZE if max_model_len is None else length)
        if (room := min(rooms)) < least:
            asked = (max_model_len, max_slots, least, quantized_bytes)
            raise ConfigError(_Misfit(shares, dtype, memory, pools, *asked).error(rooms.index(room)))
        cap = memory.cache_cap
        if cap is not None:
            room = min(room, max(least, cap // max(pool.page_bytes for pool in pools)))
        pages = min(pages, room)
        length = pools[0].longest(pages, length)
    last = shares[-1]  # it samples
    return Limits(
        max_slots=max_slots,
        max_model_len=length,
        num_pages=pages + 1,
        page_size=PAGE_SIZE,
        chunk_shapes=chunk_shapes(platform),
        mixed_shapes=mixed_chunk_shapes(platform),
        steps=1 if len(shares) > 1 else STEPS.get(platform, 1),
        max_histories=max_histories(config, last.tp, max_slots, memory),
        windows=windows,
        stages=len(shares),
    )


@dataclass(frozen=True)
class PagePool:
    """The pages that all page groups of a model share.

    Attributes:
        windows: window of each page group.
        page_bytes: bytes of a page on each device.
        kv_dtype: what keys and values are kept in.
    """

    windows: Windows
    page_bytes: int
    kv_dtype: KVDtype = "auto"

    def held(self, tokens: int) -> int:
        """Returns the pages that a sequence of so many tokens holds at once, at most."""
        return pages_held(tokens, self.windows, PAGE_SIZE, MAX_PROMPT_TOKENS)

    def longest(self, pages: int, limit: int) -> int:
        """Returns the tokens of the longest sequence, up to ``limit``, that so many pages hold."""
        most = range(1, -(-limit // PAGE_SIZE) + 1)
        blocks = bisect.bisect_right(most, pages, key=lambda count: self.held(count * PAGE_SIZE))
        return min(limit, blocks * PAGE_SIZE)


def windows_of(config: ModelConfig, max_model_len: int) -> Windows:
    """Returns the window of each page group of a model whose longest sequence has so many tokens.

    Where that is hardly more than a window, all layers form one group: nothing would be given back.
    """
    windows = kv.page_groups(config)
    held = pages_held(max_model_len, windows, PAGE_SIZE, MAX_PROMPT_TOKENS)
    return windows if held < len(windows) * -(-max_model_len // PAGE_SIZE) else ONE_GROUP


def max_histories(config: ModelConfig, tp: int, max_slots: int, memory: DeviceMemory | None) -> int:
    """Returns how many sequences may have penalties or biases at once; further ones wait for one of these.

    Each takes 9 bytes for every token of the vocabulary, shared by the devices: 2.25 MiB for 262,144 tokens
    on one device, 141 KiB a device for 128,256 on eight. All slots have one if together they take at most 1%
    of a device's free memory, else as many as do, and 8 in any case.
    """
    if memory is None:
        return max_slots
    row = pad_to_multiple(config.vocab_size, tp) // tp * HISTORY_BYTES
    return min(max_slots, max(_LEAST_HISTORIES, int(memory.free * _HISTORIES) // row - 1))  # one is spare


def sampler_bytes(config: ModelConfig, tp: int, max_slots: int, histories: int) -> int:
    """Returns the bytes of penalties, biases and masks on each device, spare rows included."""
    padded = pad_to_multiple(config.vocab_size, tp)
    masks = (max_slots + 1) * (mask_words(padded) + 1) * 4
    return (histories + 1) * (padded // tp) * HISTORY_BYTES + masks


def _slots_with_room(
    shares: Sequence[MeshShare],
    dtype: jnp.dtype,
    memory: DeviceMemory | None,
    pools: Sequence[PagePool],
    longest: int,
) -> int:
    """Returns how many sequences the devices have room for; see :func:`plan_stages`."""
    if memory is None or memory.platform == "cpu":
        return CPU_SLOTS
    pages = pools[0].held(min(longest, SLOT_TOKENS))
    for slots in SLOTS:
        needs = _needs(shares, dtype, memory, slots)
        if all(
            need.total + slots * pages * pool.page_bytes <= memory.free
            for need, pool in zip(needs, pools, strict=True)
        ):
            return slots
    return 1


def _needs(
    shares: Sequence[MeshShare], dtype: jnp.dtype, memory: DeviceMemory, max_slots: int
) -> list[MemoryNeed]:
    """Returns what each stage needs on each device besides the cache."""
    return [memory_need(one, dtype, memory, max_slots, samples=one is shares[-1]) for one in shares]


def memory_need(
    share: MeshShare, dtype: jnp.dtype, memory: DeviceMemory, max_slots: int, *, samples: bool = True
) -> MemoryNeed:
    """Returns what is needed on each device besides the cache.

    Args:
        share: what the mesh has of the model.
        dtype: dtype of activations.
        memory: memory of each device.
        max_slots: sequences decoded at once.
        samples: whether the mesh samples: a pipeline's stages before the last do not.
    """
    config, tp = share.config, share.tp
    histories = max_histories(config, tp, max_slots, memory)
    return MemoryNeed(
        share.weight_bytes,
        workspace_bytes(config, tp, dtype, max_slots, chunk_shapes(memory.platform)[-1].tokens),
        sampler_bytes(config, tp, max_slots, histories) if samples else 0,
    )


def workspace_bytes(
    config: ModelConfig, tp: int, dtype: jnp.dtype, max_slots: int, prompt_tokens: int = MAX_PROMPT_TOKENS
) -> int:
    """Estimates the temporary bytes of the largest program on each device.

    In prefill these are a handful of residuals and of the layer's widest products; in a decode step the
    logits, of which sampling takes five copies on a TPU and eight on a CPU, and as much again for what the
    compilers of other devices keep.
    """
    plan = head_plan(config, tp)
    qkv = plan.num_head_slots * (plan.group_size + 2) * config.attention.head_dim
    gate_up = 2 * tp * width_per_device(config.mlp.intermediate_size, tp)
    itemsize = max(jnp.dtype(dtype).itemsize, 2)
    prefill = prompt_tokens * itemsize * (8 * config.hidden_size + 5 * (qkv + gate_up) // tp)
    logits = pad_to_multiple(config.vocab_size, tp) // tp * 4
    return max(prefill, 10 * max_slots * logits, 2 * PAGE_SIZE * logits)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a model needs on each device."""

    weights: int
    workspace: int
    sampler: int
    cache: int = 0

    @property
    def total(self) -> int:
        """Bytes of all together."""
        return self.weights + self.workspace + self.sampler + self.cache


@dataclass(frozen=True)
class _Misfit:
    """A model that does not fit: what was asked for, as :func:`plan_stages` has it, and pages at least."""

    shares: Sequence[MeshShare]
    dtype: jnp.dtype
    memory: DeviceMemory
    pools: Sequence[PagePool]
    max_model_len: int | None
    max_slots: int
    pages: int
    quantized_bytes: Callable[[Quantize], Sequence[int]] | None

    def error(self, number: int) -> str:
        """Returns the message about a stage without the room: sizes, and what would fit."""
        tp, need = self.shares[number].tp, self._need(number)
        ways = list(self._ways(number))
        length = f"max_model_len={self.max_model_len}" if self.max_model_len else f"{PAGE_SIZE} tokens"
        advice = f"what would fit: {' or '.join(ways)}" if ways else "nothing smaller fits"
        stage = f"stage {number + 1} of {len(self.shares)} " if len(self.shares) > 1 else ""
        return (
            f"the model does not fit: {stage}at tp={tp} in {jnp.dtype(self.dtype).name} each device needs "
            f"{human_bytes(need.weights)} for weights, {human_bytes(need.workspace)} for temporaries, "
            f"{human_bytes(need.sampler)} for penalties and masks and {human_bytes(need.cache)} to cache "
            f"{length}, together {human_bytes(need.total)}, and has {human_bytes(self.memory.free)}; {advice}"
        )

    def _ways(self, number: int) -> Iterator[str]:
        """Yields what would let a stage fit."""
        share, need, free = self.shares[number], self._need(number), self.memory.free
        pool = self.pools[number]
        pages = (free - need.total + need.cache) // pool.page_bytes - 1
        if self.max_model_len is not None and (fitting := pool.longest(pages, self.max_model_len)):
            yield f"max_model_len={fitting}"
        for fewer in (slots for slots in SLOTS if slots < self.max_slots):
            if self._need(number, max_slots=fewer).total <= free:
                yield f"max_slots={fewer}"
                break
        if jnp.dtype(self.dtype).itemsize == 4 and need.total // 2 <= free:
            yield "dtype=bfloat16"
        if lighter := self._quantized_that_fits():
            yield f"quantize={lighter!r}"
        shared = self.memory.platform == "cpu"  # more faked devices have no more memory together
        for more in [] if shared else range(share.tp + 1, _MOST_TP + 1):
            weights = need.weights * share.tp // more
            if self._need(number, replace(share, tp=more, weight_bytes=weights)).total <= free:
                each = [one.tp for one in self.shares]
                each[number] = more
                yield f"tp={more if len({one.tp for one in self.shares}) == 1 else describe_tp(each)}"
                break

    def _quantized_that_fits(self) -> Quantize | None:
        """Returns the mildest rounding of weights with which all stages fit."""
        kinds: tuple[Quantize, ...] = () if self.quantized_bytes is None else ("int8", "int4")
        for kind in kinds:
            assert self.quantized_bytes is not None
            each = zip(self.shares, self.quantized_bytes(kind), strict=True)
            lighter = [replace(share, weight_bytes=weights) for share, weights in each]
            if all(self._need(number, one).total <= self.memory.free for number, one in enumerate(lighter)):
                return kind
        return None

    def _need(self, number: int, share: MeshShare | None = None, max_slots: int | None = None) -> MemoryNeed:
        """Returns what a stage needs on each device, also if it were another one."""
        given, pool = self.shares[number], self.pools[number]
        share, samples = share or given, number == len(self.shares) - 1
        page_bytes = pool.page_bytes
        if share.tp != given.tp:
            page_bytes = _page_bytes(share, self.dtype, self.memory.platform, pool.windows, pool.kv_dtype)
        need = memory_need(share, self.dtype, self.memory, max_slots or self.max_slots, samples=samples)
        return replace(need, cache=(self.pages + 1) * page_bytes)  # with the null page


def _page_bytes(
    share: MeshShare, dtype: jnp.dtype, platform: str, windows: Windows, kv_dtype: KVDtype
) -> int:
    """Returns the bytes of a page on each device of a mesh."""
    return kv.page_bytes_per_device(share.config, share.tp, PAGE_SIZE, dtype, platform, windows, kv_dtype)


def human_bytes(count: float) -> str:
    """Formats bytes with a binary unit: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def _host_memory() -> int | None:
    """Returns what the system calls available, within the container's limit, bytes; ``None`` if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or no limit ("max")
        return available
    # cached file pages count as used, and are given up when memory is needed
    return min(available, max(0, limit - used + int(counts.get("inactive_file", 0))))
