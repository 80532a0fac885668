"""tpjax: tensor-parallel inference of large language models in JAX and Flax.

Importing this package starts no JAX backend and imports nothing heavy, so that devices can still be faked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tpjax import errors as _errors
from tpjax._version import __version__
from tpjax.distributed import initialize_distributed
from tpjax.mesh import fake_devices, guard_rendezvous, make_mesh
from tpjax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tpjax.llm import LLM, Completion, Delta

TpjaxError = _errors.TpjaxError

__all__ = [
    "LLM",
    "Completion",
    "Delta",
    "SamplingParams",
    "TpjaxError",
    "__version__",
    "fake_devices",
    "initialize_distributed",
    "make_mesh",
]

guard_rendezvous()  # a user who faked devices through XLA_FLAGS alone is safe too


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | {*__all__})


def __getattr__(name: str) -> Any:
    """Imports what needs JAX when it is first used."""
    if name in ("LLM", "Completion", "Delta"):
        from tpjax import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'tpjax' has no attribute {name!r}")
