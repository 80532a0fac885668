"""Steps with decode rows, drafts and prompt chunks at once: the same numbers as one sequence at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from flax import nnx
from jax.sharding import PartitionSpec

from tpjax.cache import NULL_PAGE, BatchMetadata, TokenGroup, allocate
from tpjax.checkpoints.load import load_decoder
from tpjax.checkpoints.opening import open_checkpoint
from tpjax.checkpoints.parameters import abstract_decoder
from tpjax.mesh import make_mesh
from tpjax.sharding import REPLICATED, SEQUENCE_PARALLEL

PAGE, BLOCKS = 8, 6
SEQUENCES = 5
F32 = jnp.dtype("float32")


class Model:
    """A golden over ``tp`` devices, with the pages of five sequences in random order."""

    def __init__(self, name: str, tp: int, residual: PartitionSpec = REPLICATED) -> None:
        checkpoint = open_checkpoint(GOLDENS / name)
        self.mesh, self.vocab_size = make_mesh(tp), checkpoint.config.vocab_size
        model = load_decoder(
            checkpoint, abstract_decoder(checkpoint.config, self.mesh, F32), self.mesh, progress=False
        )
        pages = SEQUENCES * BLOCKS
        self.cache = allocate(checkpoint.config, self.mesh, num_pages=pages + 1, page_size=PAGE, dtype=F32)
        self.tables = (
            np.random.default_rng(0).permutation(pages).reshape(SEQUENCES, BLOCKS).astype(np.int32) + 1
        )
        graph, self.weights = nnx.split(model)

        @jax.jit
        def forward(weights: Any, cache: Any, tokens: Any, metadata: BatchMetadata) -> Any:
            model = nnx.merge(graph, weights)
            hidden, cache = model(tokens, cache, [metadata], residual)
            return model.logits(hidden), cache

        self.forward = forward

    def __call__(self, tokens: Any, metadata: BatchMetadata) -> np.ndarray:
        """Returns the logits after each token of a step."""
        with jax.set_mesh(self.mesh):
            logits, self.cache = self.forward(self.weights, self.cache, np.asarray(tokens), metadata)
        return np.asarray(logits)[:, : self.vocab_size]

    def group(self, rows: list[tuple[int | None, int, int]], length: int, *, chunks: bool) -> TokenGroup:
        """Rows of (sequence, first position, tokens); no sequence: padding."""
        none = np.full(BLOCKS, NULL_PAGE, np.int32)
        tables = np.stack([none if of is None else self.tables[of] for of, _, _ in rows])
        starts = np.array([first for _, first, _ in rows], np.int32)
        return TokenGroup(
            jnp.asarray(tables),
            jnp.asarray(starts[:, None] + np.arange(length, dtype=np.int32)),
            jnp.asarray([count for _, _, count in rows], jnp.int32),
            jnp.full(len(rows), BLOCKS * PAGE, jnp.int32),
            chunks=chunks,
        )


def check(name: str, tp: int, residual: PartitionSpec, padding: int) -> None:
    rng = np.random.default_rng(1)
    model = Model(name, tp, residual)
    tokens = rng.integers(0, model.vocab_size, (SEQUENCES, BLOCKS * PAGE)).astype(np.int32)
    expected = []  # each sequence by itself, as one chunk
    for of in range(SEQUENCES):
        group = model.group([(of, 0, BLOCKS * PAGE)], BLOCKS * PAGE, chunks=True)
        expected.append(model(tokens[of], BatchMetadata((group,))))
    model.cache = jax.tree.map(lambda buffer: jnp.full_like(buffer, 7.0), model.cache)

    def run(*groups: tuple[list[tuple[int | None, int, int]], int, bool]) -> None:
        flat, wanted = [], []
        for rows, length, _ in groups:
            for of, first, count in rows:
                part = np.zeros(length, np.int32)
                if of is not None:
                    part[:count] = tokens[of, first : first + count]
                wanted += [None if of is None else (of, first + i) for i in range(count)]
                wanted += [None] * (length - count)
                flat.append(part)
        total = sum(len(part) for part in flat)
        extra = padding + -(total + padding) % (16 * tp)
        metadata = BatchMetadata(
            tuple(model.group(rows, length, chunks=chunks) for rows, length, chunks in groups), extra
        )
        logits = model(np.concatenate([*flat, np.zeros(extra, np.int32)]), metadata)
        assert np.isfinite(logits).all()  # padding too
        for at, place in enumerate(wanted):
            if place is not None:
                np.testing.assert_allclose(logits[at], expected[place[0]][place[1]], atol=2e-4, rtol=2e-3)

    # a prompt in two chunks of one step, two others of different lengths beside it, and a row of padding
    run(([(0, 0, 8), (0, 8, 8), (1, 0, 8), (2, 0, 5), (None, 0, 0)], 8, True))
    # parts of pages: 4 and 4 of one prompt; its rows and another's decode in the same step
    run(([(1, 8, 1), (None, 0, 0)], 1, False), ([(3, 0, 4), (3, 4, 4)], 4, True))
    # rows of three tokens that cross from page to page, of which one has two; a chunk continues beside them
    run(([(1, 9, 3), (2, 5, 2), (0, 16, 3)], 3, False), ([(3, 8, 8), (4, 0, 7)], 8, True))
    run(([(2, 7, 3), (1, 12, 3), (0, 19, 3), (3, 16, 3)], 3, False))
    run(([(0, 22, 2)], 3, False))
    run(([(4, 7, 1), (2, 10, 1), (None, 0, 0)], 1, False), ([(0, 24, 8), (0, 32, 8), (0, 40, 8)], 8, True))
    assert_untouched(model, used={0: 48, 1: 15, 2: 11, 3: 19, 4: 8})


def assert_untouched(model: Model, used: dict[int, int]) -> None:
    """Nothing is written beyond a sequence's last page, nor past the last part of it."""
    for buffer in jax.tree.leaves(model.cache):
        pages = np.asarray(buffer)
        for of, length in used.items():
            for block in range(-(-length // PAGE), BLOCKS):
                assert (pages[model.tables[of, block]] == 7.0).all()


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        ("llama", 1),
        pytest.param("llama", 3, marks=pytest.mark.slow),
        pytest.param("gemma3", 2, marks=pytest.mark.slow),  # windows
        pytest.param("deepseek_v3", 2, marks=pytest.mark.slow),  # latent attention, experts
        pytest.param("gpt_oss", 3, marks=pytest.mark.slow),  # sinks, experts
        pytest.param("mixtral", 4, marks=pytest.mark.slow),
        pytest.param("cohere", 3, marks=pytest.mark.slow),  # parallel blocks
        pytest.param("olmo2", 4, marks=pytest.mark.slow),  # norms over whole projections
        pytest.param("phi3", 2, marks=pytest.mark.slow),
    ],
)
def test_a_step_of_anything(name: str, tp: int) -> None:
    check(name, tp, REPLICATED, padding=0)


@pytest.mark.parametrize(
    ("name", "tp"),
    [("llama", 2), *(pytest.param(n, 3, marks=pytest.mark.slow) for n in ("mixtral", "cohere"))],
)
def test_with_the_residual_sharded_over_tokens(name: str, tp: int) -> None:
    check(name, tp, SEQUENCE_PARALLEL, padding=5)
