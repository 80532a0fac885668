"""The paged key-value cache (Kwon et al. 2023, https://arxiv.org/abs/2309.06180).

Each layer keeps one buffer of keys and one of values, [pages, K, page_size, h], sharded along K. With latent
attention it keeps one replicated buffer of latents, [pages, 1, page_size, r]: all heads read all of it. Block
tables say which page holds which positions of which sequence; they are arguments of every call, not state.
Page 0 is never assigned to a sequence: padding rows and padding positions write to it.

A buffer may be kept in 8 bits, with its scales in a buffer beside it: see :mod:`tpjax.cache_quantization`.

Where some layers see all keys and others only a window, layers form page groups: a sequence has pages of its
own in each, and those of a group with a window are given back once no query can see them. All groups take
pages from one pool, and the n-th layers of all groups share a buffer, so that any page can serve any group:
the memory goes where the sequences need it, long or short (vLLM's hybrid cache is built so,
https://docs.vllm.ai/en/latest/design/hybrid_kv_cache_manager.html).
"""

from tpjax.cache.buffers import NULL_PAGE, Buffer, CacheWriter, PageWriter
from tpjax.cache.layer_cache import LatentCache, LatentPages, LayerCache, Pages, StoredPages
from tpjax.cache.layer_places import LayerPlace, layer_places, num_entries, page_groups
from tpjax.cache.paged_cache import (
    CacheLayout,
    PagedKVCache,
    abstract,
    allocate,
    cache_layout,
    page_bytes_per_device,
)
from tpjax.cache.token_groups import BatchMetadata, TokenGroup

__all__ = [
    "NULL_PAGE",
    "BatchMetadata",
    "Buffer",
    "CacheLayout",
    "CacheWriter",
    "LatentCache",
    "LatentPages",
    "LayerCache",
    "LayerPlace",
    "PageWriter",
    "PagedKVCache",
    "Pages",
    "StoredPages",
    "TokenGroup",
    "abstract",
    "allocate",
    "cache_layout",
    "layer_places",
    "num_entries",
    "page_bytes_per_device",
    "page_groups",
]
