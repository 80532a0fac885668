"""How a model is sharded over the mesh, for ``/shards`` and the web page."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

from tpjax.inspect.budget import measured
from tpjax.inspect.explain import explain_stage
from tpjax.inspect.explain_report import Report, TensorRow
from tpjax.inspect.tables import source_text
from tpjax.server.json_types import JsonObject

if TYPE_CHECKING:
    from tpjax.llm import LLM

Cut = Literal["column", "row", "vocabulary", "experts", "width", "heads", "replicated"]

# How the reasons of ``inspect.reasons`` begin, for parameters that are sharded
_CUTS: dict[str, Cut] = {
    "column-parallel": "column",
    "bias of a column-parallel product": "column",
    "row-parallel": "row",
    "bias of a row-parallel product": "row",
    "sharded along the vocabulary": "vocabulary",
    "each device has its own experts": "experts",
    "each device has a part of": "width",
    "each device expands the latent": "column",
    "numbers of each head": "heads",
}


def shards(llm: LLM) -> JsonObject:
    """Summarises a model's shardings; of a pipeline those of the first stage.

    Returns:
        The mesh: its devices, and the head plan in words; bytes of weights and cache per device; each kind of
        tensor: spec, how it is cut, shape, shape on one device, and bytes on each device, held, copied and
        zeros; the cache in the same way; and the collectives of a decode step by source line, next to the
        budget.
    """
    llm.front.check_open()
    report = explain_stage(llm.runner.stages[0], llm.name)
    return {
        "tp": report.tp,
        "platform": report.platform,
        "dtype": report.dtype,
        "quantize": report.quantize,
        "kv_dtype": report.kv_dtype,
        "devices": [
            {"id": device.id, "process": device.process_index, "kind": device.device_kind}
            for device in llm.mesh.devices.flat
        ],
        "heads": report.heads["summary"],
        "weight_bytes_per_device": report.weight_bytes_per_device,
        "cache_bytes_per_device": report.cache["bytes_per_device"],
        "cache": _cache(report),
        "step": _step(report),
        "tensors": [
            {
                "name": row.name,
                "count": row.count,
                "spec": row.spec,
                "cut": cut(row),
                "why": row.why,
                "shape": row.shape,
                "shard_shape": row.shard_shape,
                "bytes_per_device": row.bytes_per_device,
                "replicated": row.replicated,
                "devices": [asdict(content) for content in row.devices],
            }
            for row in report.tensors
        ],
    }


def cut(row: TensorRow) -> Cut:
    """Says how a kind of tensor is sharded: ``width`` is that of each expert."""
    if row.replicated:
        return "replicated"
    return next((cut for reason, cut in _CUTS.items() if row.why.startswith(reason)), "column")


def _cache(report: Report) -> JsonObject:
    cache = report.cache
    names = (
        "spec",
        "num_pages",
        "page_size",
        "buffers",
        "page_bytes_per_device",
        "bytes_per_device",
        "why",
    )
    return {
        **{name: cache[name] for name in names},
        "replicated": cache["spec"] == "replicated",
        "devices": [asdict(content) for content in cache["devices"]],
    }


def _step(report: Report) -> JsonObject:
    """Describes the collectives of a decode step. Bytes are those of the results on one device."""
    step = next(step for step in report.steps if step.name == "decode")
    return {
        "name": step.title,
        "always": measured(step.collectives),
        "budget": step.budget,
        "collectives": [
            {
                "kind": one.kind,
                "result": one.shapes,
                "count": one.count,
                "bytes": one.count * one.bytes,
                "conditional": one.conditional,
                "source": one.source,
                "text": source_text(one.source),
            }
            for one in step.collectives
        ],
    }
