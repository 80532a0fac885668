"""How a model is cut over the mesh, for the web page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpjax.llm import LLM


def shards(llm: LLM) -> dict[str, Any]:
    """Devices, and of each kind of tensor the spec, the shape on a device, and its bytes."""
    return {}
