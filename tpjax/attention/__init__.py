"""Attention of new tokens to the paged cache: the one place that chooses what computes it.

A backend is a function with the signature of :func:`tpjax.attention.xla.paged_attention`. Layers call the
name exported here and no backend directly. Tests hold each backend to :mod:`tpjax.attention.reference`.
"""

from tpjax.attention.xla import paged_attention

__all__ = ["paged_attention"]
