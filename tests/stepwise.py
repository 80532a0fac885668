"""A golden's model without the engine, for tests of its numbers alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from conftest import GOLDENS
from flax import nnx
from jax.sharding import PartitionSpec

from tpjax.cache import BatchMetadata, TokenGroup, allocate
from tpjax.checkpoints.load import load_decoder
from tpjax.checkpoints.opening import open_checkpoint
from tpjax.checkpoints.parameters import abstract_decoder
from tpjax.config import KVDtype, Quantize
from tpjax.mesh import make_mesh
from tpjax.sharding import REPLICATED


class Stepwise:
    """A model over ``tp`` devices and its cache, without sampling, which takes longest to compile.

    Args:
        name: name of the golden.
        tp: devices.
        max_length: longest length of the sequence, tokens.
        residual: layout of the residual.
        dtype: dtype of weights and cache.
        quantize: what weights are kept in.
        kv_dtype: what keys and values are kept in.
        quantize_head: embedding and head are kept so too.
    """

    PAGE = 64

    def __init__(
        self,
        name: str,
        tp: int,
        max_length: int,
        residual: PartitionSpec = REPLICATED,
        dtype: str = "float32",
        quantize: Quantize | None = None,
        kv_dtype: KVDtype = "auto",
        quantize_head: bool = False,
    ) -> None:
        checkpoint = open_checkpoint(GOLDENS / name)
        self.mesh, self.vocab_size = make_mesh(tp), checkpoint.config.vocab_size
        kind, pages = jnp.dtype(dtype), -(-max_length // self.PAGE)
        format_of = checkpoint.source.format_of
        model = abstract_decoder(
            checkpoint.config,
            self.mesh,
            kind,
            quantize,
            format_of=format_of,
            quantize_head=quantize_head,
        )
        model = load_decoder(checkpoint, model, self.mesh, progress=False)
        self.cache = allocate(
            checkpoint.config,
            self.mesh,
            num_pages=pages + 1,
            page_size=self.PAGE,
            dtype=kind,
            kv_dtype=kv_dtype,
        )
        self.length = 0
        graph, self.weights = nnx.split(model)
        table, max_lengths = (
            jnp.arange(1, pages + 1, dtype=jnp.int32)[None],
            jnp.array([max_length], jnp.int32),
        )

        @jax.jit
        def forward(weights: Any, cache: Any, tokens: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
            positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            model = nnx.merge(graph, weights)
            group = TokenGroup(table, positions, max_length=max_lengths, chunks=tokens.size > 1)
            hidden, cache = model(tokens[0], cache, [BatchMetadata((group,))], residual)
            return model.logits(hidden), cache

        self.forward = forward

    def __call__(self, tokens: list[int]) -> np.ndarray:
        """Returns the logits after each token: of a first chunk, padded to a page, or of one token."""
        size = 1 if len(tokens) == 1 else self.PAGE
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(tokens)] = tokens
        with jax.set_mesh(self.mesh):
            logits, self.cache = self.forward(self.weights, self.cache, padded, np.int32(self.length))
        self.length += len(tokens)
        return np.asarray(logits, np.float32)[: len(tokens), : self.vocab_size]
