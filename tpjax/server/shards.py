"""How a model is sharded over the mesh, for ``/shards`` and the web page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpjax.server.json_types import JsonObject

if TYPE_CHECKING:
    from tpjax.llm import LLM


def shards(llm: LLM) -> JsonObject:
    """Summarises a model's shardings.

    Returns:
        Size of the mesh, kind of device and the head plan in words; bytes of weights and cache per device;
        for each kind of tensor its spec, shape, shape on one device and bytes per device.
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
