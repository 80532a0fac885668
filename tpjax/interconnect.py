"""Models the time of an all-reduce by message size, for each kind of link between chips.

Every model has a latency and a bandwidth term. In a decode step latency dominates: messages are [B, D], a few
kilobytes.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

_ONE_SHOT_BYTES = 256 * 1024  # above it, reading the full message of every peer takes longer than two phases
_TWO_SHOT_BYTES = 4 * 2**20


class Interconnect(Protocol):
    """A kind of link between chips."""

    def all_reduce_s(self, devices: int, message_bytes: float) -> float:
        """Returns the seconds of an all-reduce over ``devices`` devices; 0 for one."""
        ...

    def transfer_s(self, message_bytes: float) -> float:
        """Returns the seconds to send a message to a neighbour."""
        ...


@dataclass(frozen=True)
class NVLink:
    """GPUs behind NVLink or PCIe, and a network between groups of them.

    Small messages are reduced one-shot (every GPU reads the buffers of all peers), medium ones two-shot
    (reduce-scatter, then all-gather, each in one phase), both for powers of two only; the rest by a ring
    (NCCL). Sizes are those of the kernels in XLA. Beyond one group, each group reduces first, then a tree
    runs over the groups.

    Attributes:
        link_bytes_s: bandwidth of one GPU, one direction.
        latency_us: latency of a one-shot kernel over two GPUs.
        peer_us: additional latency for each further GPU.
        ring_us: latency to start a ring: the launch of NCCL.
        group: number of GPUs that are connected directly.
        direct: whether GPUs can read the memory of their peers, which one-shot and two-shot kernels need.
        fraction: fraction of ``link_bytes_s`` that an all-reduce reaches.
        network_bytes_s: bandwidth between groups, one direction, per GPU.
        network_us: latency of a message between groups.
    """

    link_bytes_s: float
    latency_us: float = 6.0
    peer_us: float = 0.7
    ring_us: float = 12.0
    group: int = 8
    direct: bool = True
    fraction: float = 0.75
    network_bytes_s: float = 50e9
    network_us: float = 10.0

    def all_reduce_s(self, devices: int, message_bytes: float) -> float:
        """Returns the seconds of one-shot, two-shot or ring in a group, then a tree over groups."""
        if devices == 1:
            return 0.0
        inside = min(devices, self.group)
        seconds = self._inside_s(inside, message_bytes)
        groups = math.ceil(devices / self.group)
        if groups > 1:
            part = message_bytes / inside
            between = 2 * (groups - 1) / groups * part / (self.fraction * self.network_bytes_s)
            seconds += 2 * math.ceil(math.log2(groups)) * self.network_us * 1e-6 + between
        return seconds

    def transfer_s(self, message_bytes: float) -> float:
        """Returns the seconds of a copy to the next GPU in the group."""
        return self.latency_us * 1e-6 + message_bytes / (self.fraction * self.link_bytes_s)

    def _inside_s(self, chips: int, message_bytes: float) -> float:
        rate = self.fraction * self.link_bytes_s
        once = (self.latency_us + self.peer_us * (chips - 2)) * 1e-6
        ringed = 2 * (chips - 1) / chips * message_bytes / rate
        ways = [(self.ring_us + 2 * (chips - 1)) * 1e-6 + ringed]
        if self.direct and chips & (chips - 1) == 0:
            if message_bytes <= _ONE_SHOT_BYTES:
                ways.append(once + (chips - 1) * message_bytes / rate)
            if message_bytes <= _TWO_SHOT_BYTES:
                ways.append(1.5 * once + ringed)
        return min(ways)


@dataclass(frozen=True)
class ICI:
    """TPU chips in a torus (How to Scale Your Model, chapters 2 and 3).

    An all-reduce is a reduce-scatter and an all-gather along every axis at once: twice the message over the
    sum of the bandwidths of all axes. An axis that is a ring sends in both directions; a line does not.

    Attributes:
        link_bytes_s: bandwidth of one link, one direction.
        axes: number of dimensions of the torus.
        ring: an axis is a ring if its length is a multiple of this.
        hop_us: latency of one hop.
        fraction: fraction of the bandwidth that an all-reduce reaches.
        devices_per_chip: devices of one chip. They reduce among themselves first, over a link between their
            dies, and share the links of the chip.
        die_bytes_s: bandwidth of the link between two dies of a chip, one direction.
    """

    link_bytes_s: float
    axes: int
    ring: int
    hop_us: float = 0.15
    fraction: float = 0.95
    devices_per_chip: int = 1
    die_bytes_s: float = math.inf

    def all_reduce_s(self, devices: int, message_bytes: float) -> float:
        """Returns the seconds inside chips, then along all axes of the squarest slice of chips."""
        inside = min(devices, self.devices_per_chip)
        chips = math.ceil(devices / self.devices_per_chip)
        return self._dies_s(inside, message_bytes) + self._torus_s(chips, message_bytes)

    def _dies_s(self, dies: int, message_bytes: float) -> float:
        if dies == 1:
            return 0.0
        moved = 2 * (dies - 1) / dies * message_bytes
        return 2 * self.hop_us * 1e-6 + moved / (self.fraction * self.die_bytes_s)

    def _torus_s(self, chips: int, message_bytes: float) -> float:
        if chips == 1:
            return 0.0
        rate, hops = 0.0, 0.0
        for length in torus(chips, self.axes):
            closed = length % self.ring == 0
            rate += self.fraction * self.link_bytes_s * (2 if closed else 1) * (length > 1)
            hops += length / 2 if closed else length - 1
        moved = 2 * (chips - 1) / chips * message_bytes
        return 2 * hops * self.hop_us * 1e-6 + moved / rate

    def transfer_s(self, message_bytes: float) -> float:
        """Returns the seconds of one hop over one link."""
        return self.hop_us * 1e-6 + message_bytes / (self.fraction * self.link_bytes_s)


@dataclass(frozen=True)
class Measured:
    """All-reduces timed on this machine, interpolated between the measured sizes.

    Attributes:
        timings: (bytes, seconds) in ascending order, all over the same number of chips.
    """

    timings: tuple[tuple[float, float], ...]

    def all_reduce_s(self, devices: int, message_bytes: float) -> float:
        """Returns seconds: linear between measured sizes, proportional beyond the largest."""
        return 0.0 if devices == 1 else interpolated(self.timings, message_bytes)

    def transfer_s(self, message_bytes: float) -> float:
        """Returns the seconds of an all-reduce over two devices."""
        return self.all_reduce_s(2, message_bytes)


def interpolated(timings: Sequence[tuple[float, float]], size: float) -> float:
    """Returns seconds: linear between measured sizes, those of the smallest below it, proportional beyond.

    Args:
        timings: (size, seconds) in ascending order.
        size: the size to tell the seconds of.
    """
    index = bisect.bisect_left(timings, size, key=lambda one: one[0])
    if index == 0:
        return timings[0][1]
    if index == len(timings):
        return timings[-1][1] * size / timings[-1][0]
    (low, before), (high, after) = timings[index - 1], timings[index]
    return before + (after - before) * (size - low) / (high - low)


def torus(chips: int, axes: int) -> tuple[int, ...]:
    """Returns the sides of the squarest box of ``chips`` chips, longest last: 2×4 for 8 chips on two axes."""
    if axes == 1:
        return (chips,)
    side = max(n for n in range(1, round(chips ** (1 / axes)) + 1) if chips % n == 0)
    return tuple(sorted((side, *torus(chips // side, axes - 1))))
