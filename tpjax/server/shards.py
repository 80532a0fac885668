"""How a model is cut over the mesh, for the web page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpjax.llm import LLM


def shards(llm: LLM) -> dict[str, Any]:
    """What lies where.

    Returns:
        The mesh's size and kind of device; the head plan in words; of each kind of tensor its spec, shape,
        shape on one device, and bytes per device; and of the cache the same.
    """
    report = llm.explain()
    return {
        "tp": report.tp,
        "platform": report.platform,
        "dtype": report.dtype,
        "heads": report.heads["summary"],
        "weight_bytes_per_device": report.weight_bytes_per_device,
        "cache_bytes_per_device": report.cache["bytes_per_device"],
        "tensors": [
            {
                "name": row.name,
                "count": row.count,
                "spec": row.spec,
                "shape": row.shape,
                "shard_shape": row.shard_shape,
                "bytes_per_device": row.bytes_per_device,
                "replicated": row.replicated,
            }
            for row in report.tensors
        ],
    }
