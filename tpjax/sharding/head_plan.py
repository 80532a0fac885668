"""Which attention heads each device computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from tpjax.config import ModelConfig
from tpjax.errors import ConfigError


@dataclass(frozen=True)
class HeadPlan:
    """Which attention heads each device computes, for any ``tp``.

    Heads are arranged in *head slots*: a head slot is one KV head with up to ``group_size`` of the query
    heads that read it. Every device has ``head_slots_per_device`` of them, so shapes are equal everywhere.
    If tp does not divide the KV heads, a KV head may fill several head slots (it is replicated and its
    queries are split), and head slots or query heads may be padding (zero weights, and zero rows in
    ``o_proj``, keep that exact).

    Among all such arrangements the plan takes the one with the fewest weights per device, then the
    smallest cache.

    Attributes:
        num_heads: query heads H of the checkpoint.
        num_kv_heads: KV heads K of the checkpoint; divides H.
        tp: devices, 1 to 64.
    """

    num_heads: int
    num_kv_heads: int
    tp: int

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "tp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is less than 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} is not a divisor of num_heads={self.num_heads}"
            )

    @cached_property
    def group_size(self) -> int:
        """Query heads per head slot, padding included."""
        return self._shape[0]

    @cached_property
    def head_slots_per_device(self) -> int:
        """KV heads per device, replicas and padding included."""
        return self._shape[1]

    @property
    def num_head_slots(self) -> int:
        """KV heads over all devices, replicas and padding included: the K of the cache and of qkv."""
        return self.tp * self.head_slots_per_device

    @property
    def num_padded_heads(self) -> int:
        """Query heads over all devices, padding included."""
        return self.num_head_slots * self.group_size

    @cached_property
    def head_slots(self) -> tuple[tuple[int | None, tuple[int | None, ...]], ...]:
        """The KV head and the query heads of each head slot; ``None`` marks padding."""
        per_group = self.num_heads // self.num_kv_heads
        filled: list[tuple[int | None, tuple[int | None, ...]]] = []
        for kv_head in range(self.num_kv_heads):
            first = kv_head * per_group
            for start in range(0, per_group, self.group_size):
                heads = range(first + start, first + min(start + self.group_size, per_group))
                filled.append((kv_head, (*heads, *[None] * (self.group_size - len(heads)))))
        padding = (None, (None,) * self.group_size)
        return (*filled, *[padding] * (self.num_head_slots - len(filled)))

    @property
    def stored_query_heads(self) -> list[int | None]:
        """The query heads in the order of the head slots; ``None`` marks padding."""
        return [head for _, heads in self.head_slots for head in heads]

    @property
    def stored_kv_heads(self) -> list[int | None]:
        """The KV head of each head slot; ``None`` marks padding."""
        return [kv_head for kv_head, _ in self.head_slots]

    @property
    def query_padding(self) -> float:
        """Extra attention-head FLOPs, as a fraction of the checkpoint's."""
        return self.num_padded_heads / self.num_heads - 1

    @property
    def kv_padding(self) -> float:
        """Extra KV-cache bytes over all devices, as a fraction of the checkpoint's."""
        return self.num_head_slots / self.num_kv_heads - 1

    @cached_property
    def _shape(self) -> tuple[int, int]:
        per_group = self.num_heads // self.num_kv_heads

        def cost(group_size: int) -> tuple[int, int]:
            head_slots = math.ceil(self.num_kv_heads * math.ceil(per_group / group_size) / self.tp)
            # per head slot: q and o of each query head, one k and one v, each hidden_size x head_dim
            return head_slots * (2 * group_size + 2), head_slots

        group_size = min(range(1, per_group + 1), key=lambda g: (*cost(g), -g))
        return group_size, cost(group_size)[1]


@lru_cache(maxsize=64)
def head_plan(config: ModelConfig, tp: int) -> HeadPlan:
    """Returns the head plan of a model over ``tp`` devices.

    With latent attention every query head has a key and a value of its own, expanded from the latent.
    """
    kv_heads = (
        config.attention.num_kv_heads if config.attention.latent is None else config.attention.num_heads
    )
    return HeadPlan(config.attention.num_heads, kv_heads, tp)
