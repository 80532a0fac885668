"""Attention of new tokens to the paged cache.

Layers call :func:`paged_attention` with the backend that :func:`choose_backend` chose for the model, and no
backend directly. Tests hold each backend to :mod:`tpjax.attention.reference`.
"""

from tpjax.attention.backends import (
    XLA,
    Backend,
    KernelShape,
    Verdict,
    cache_writer,
    choose_backend,
    paged_attention,
)

__all__ = ["XLA", "Backend", "KernelShape", "Verdict", "cache_writer", "choose_backend", "paged_attention"]
