"""What an all-reduce costs, by message size, between chips on each kind of link.

Every model is a latency and a bandwidth term. In a decode step most of it is latency: messages are [B, D],
a few kilobytes.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Protocol

_ONE_SHOT_BYTES = 256 * 1024  # above it, reading every peer's whole message takes longer than two phases
_TWO_SHOT_BYTES = 4 * 2**20


class Interconnect(Protocol):
    """How chips are connected."""

    def all_reduce_s(self, chips: int, message_bytes: float) -> float:
        """Seconds to sum a message of that size over so many chips; 0 for one chip."""
        ...

    def transfer_s(self, message_bytes: float) -> float:
        """Seconds to hand a message to a neighbour."""
        ...


@dataclass(frozen=True)
class NVLink:
    """GPUs behind NVLink or PCIe, and a network between groups of them.

    Small messages go one-shot (every GPU reads all peers' buffers), middle ones two-shot (reduce-scatter,
    then all-gather, each in one phase), both for powers of two only; the rest go round a ring (NCCL). Sizes
    as in XLA's kernels. Beyond one group, each group reduces inside, then a tree runs between them.

    Attributes:
        link_bytes_s: one direction, what one GPU can send.
        latency_us: of a one-shot kernel over two GPUs.
        peer_us: more for each further GPU.
        ring_us: of starting a ring; NCCL's launch.
        group: GPUs that reach each other directly.
        direct: GPUs can read each other's memory, so that one-shot and two-shot kernels run.
        fraction: of ``link_bytes_s`` that an all-reduce reaches.
        network_bytes_s: one direction per GPU between groups.
        network_us: a message's latency between groups.
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

    def all_reduce_s(self, chips: int, message_bytes: float) -> float:
        """One-shot, two-shot or ring inside a group, then a tree over the groups."""
        if chips == 1:
            return 0.0
        inside = min(chips, self.group)
        seconds = self._inside_s(inside, message_bytes)
        groups = math.ceil(chips / self.group)
        if groups > 1:
            share = message_bytes / inside
            between = 2 * (groups - 1) / groups * share / (self.fraction * self.network_bytes_s)
            seconds += 2 * math.ceil(math.log2(groups)) * self.network_us * 1e-6 + between
        return seconds

    def transfer_s(self, message_bytes: float) -> float:
        """A copy to the next GPU of the group."""
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
    sum of the axes' bandwidths. An axis that closes into a ring sends both ways round; a line does not.

    Attributes:
        link_bytes_s: one direction of one link.
        axes: dimensions of the torus.
        ring: an axis is closed where its length is a multiple of this.
        hop_us: latency of one hop.
        fraction: of the bandwidth that an all-reduce reaches.
    """

    link_bytes_s: float
    axes: int
    ring: int
    hop_us: float = 0.15
    fraction: float = 0.95

    def all_reduce_s(self, chips: int, message_bytes: float) -> float:
        """Along all axes of the squarest slice of so many chips."""
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
        """One hop over one link."""
        return self.hop_us * 1e-6 + message_bytes / (self.fraction * self.link_bytes_s)


@dataclass(frozen=True)
class Measured:
    """All-reduces timed on the machine at hand, between whose sizes times are interpolated.

    Attributes:
        timings: (bytes, seconds) by rising size, all over the same number of chips.
    """

    timings: tuple[tuple[float, float], ...]

    def all_reduce_s(self, chips: int, message_bytes: float) -> float:
        """Linear between measured sizes, in proportion beyond the largest."""
        if chips == 1:
            return 0.0
        at = bisect.bisect_left([size for size, _ in self.timings], message_bytes)
        if at == 0:
            return self.timings[0][1]
        if at == len(self.timings):
            return self.timings[-1][1] * message_bytes / self.timings[-1][0]
        (low, before), (high, after) = self.timings[at - 1], self.timings[at]
        return before + (after - before) * (message_bytes - low) / (high - low)

    def transfer_s(self, message_bytes: float) -> float:
        """As long as an all-reduce."""
        return self.all_reduce_s(2, message_bytes)


def torus(chips: int, axes: int) -> tuple[int, ...]:
    """The squarest box of so many chips, longest side last: 8 on two axes are 2×4."""
    if axes == 1:
        return (chips,)
    side = max(n for n in range(1, round(chips ** (1 / axes)) + 1) if chips % n == 0)
    return tuple(sorted((side, *torus(chips // side, axes - 1))))
