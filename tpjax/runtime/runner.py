"""The compiled programs of serving, and the device state they pass along.

The only place that splits the model and calls ``jax.jit`` for serving. Weights are flattened once; every
program takes them as a flat tuple, takes the cache by donation, and is compiled ahead of its first call, so
a call can never recompile: shapes come from a fixed set of buckets, and ``compiled`` lists the programs.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt

from tpjax import cache as kv
from tpjax.cache import NULL_PAGE, BatchMetadata, PagedKVCache
from tpjax.config import ModelConfig, SequenceParallel
from tpjax.errors import ConfigError
from tpjax.model import Decoder
from tpjax.sampling import History, Sampled, SamplingRows, sample, score
from tpjax.sampling_params import SamplingParams
from tpjax.sharding import LOGITS, REPLICATED, SEQUENCE_PARALLEL, Leaf, pad_to_multiple

log = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
PAGE_SIZE = 128
CHUNK_SIZES = (32, 64, 128, 256, 512)
STOP_IDS = 8  # stop tokens a row carries to the device; what is over is caught on the host
NO_TOKEN = -1  # what a finished row yields

# From where on a residual cut over positions pays. Of rows a device: a TPU's tile of bfloat16. Of bytes a
# device: between H100s one kernel sums small messages faster than two can (vLLM's issue 27700 has figures).
_TPU_MIN_ROWS = 16
_GPU_MIN_BYTES = 8 * 2**20
# A TPU's compiler may turn a product and its reduce-scatter into a loop over slices of rows, which reads the
# weight at every trip: for 512 tokens and two layers of Llama-3-8B on v5e:2x4, 2.28 million cycles, not 1.84.
_TPU_COMPILER_OPTIONS: dict[str, str | bool] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


@dataclass(frozen=True)
class Limits:
    """Sizes fixed at start; everything compiled follows from them.

    Attributes:
        max_slots: sequences decoded at once.
        max_model_len: tokens of one sequence, prompt and output.
        num_pages: pages of the cache, the null page included.
        page_size: positions per cache page.
        chunk_sizes: prefill lengths, ascending; each divides the page size or is a multiple of it.
        steps: decode steps of the long dispatch.
    """

    max_slots: int
    max_model_len: int
    num_pages: int
    page_size: int = 128
    chunk_sizes: tuple[int, ...] = CHUNK_SIZES
    steps: int = 4

    def __post_init__(self) -> None:
        for name in ("max_slots", "max_model_len", "page_size", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is less than 1")
        for size in self.chunk_sizes:
            if size % self.page_size and self.page_size % size:
                raise ConfigError(
                    f"chunk size {size} neither divides page_size={self.page_size} nor is a multiple"
                )
        if self.chunk_sizes[-1] % self.page_size:
            raise ConfigError(
                f"the largest chunk, {self.chunk_sizes[-1]}, is not a multiple of page_size={self.page_size}"
            )
        if self.num_pages < self.blocks + 1:
            raise ConfigError(
                f"num_pages={self.num_pages} cannot hold one sequence of max_model_len={self.max_model_len}: "
                f"that takes {self.blocks + 1} pages of {self.page_size}, the null page included"
            )

    @property
    def blocks(self) -> int:
        """Pages of the longest sequence: the width of a block table."""
        return -(-self.max_model_len // self.page_size)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Decode batches: powers of two up to ``max_slots``, and ``max_slots``."""
        powers = [2**i for i in range(self.max_slots.bit_length()) if 2**i < self.max_slots]
        return (*powers, self.max_slots)


def resolve_dtype(name: str) -> jnp.dtype:
    """The dtype of that name; ``auto`` follows the backend.

    Raises:
        ConfigError: there is none.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} is not supported: use {', '.join(DTYPES)}")
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


@dataclass(frozen=True)
class Row:
    """One sequence's part in a dispatch.

    Attributes:
        slot: where its last token and history are kept, 0 to max_slots - 1.
        position: of the next token to feed.
        pages: of its blocks, in order.
        params: sampling parameters.
        seed: of its noise.
        remaining: most tokens it may still yield.
        stop_ids: tokens that end it.
        masked_until: at positions before this one, draw only what :meth:`Runner.set_masks` allows its slot.
        max_length: tokens it may get to, prompt and output: some rotary embeddings go by it.
    """

    slot: int
    position: int
    pages: Sequence[int]
    params: SamplingParams
    seed: int
    remaining: int = 1
    stop_ids: Sequence[int] = ()
    masked_until: int = 0
    max_length: int = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Rows:
    """``Row``s as arrays; a row that does not exist uses the spare slot and the null page."""

    ints: Int[Leaf, "B 4"]  # slot, position, remaining, max_length
    stop_ids: Int[Leaf, "B stop"]
    block_tables: Int[Leaf, "B blocks"]
    sampling: SamplingRows

    @classmethod
    def pack(cls, rows: Sequence[Row], limits: Limits, size: int) -> _Rows:
        ints: Any = np.tile(np.array([limits.max_slots, 0, 0, 0], np.int32), (size, 1))
        stop_ids: Any = np.full((size, STOP_IDS), NO_TOKEN, np.int32)
        tables: Any = np.full((size, limits.blocks), NULL_PAGE, np.int32)
        for i, row in enumerate(rows):
            ints[i] = (row.slot, row.position, row.remaining, row.max_length)
            stop_ids[i, : len(row.stop_ids)] = row.stop_ids[:STOP_IDS]
            tables[i, : len(row.pages)] = row.pages
        sampling = SamplingRows.pack(
            [row.params for row in rows], [row.seed for row in rows], [row.masked_until for row in rows], size
        )
        return cls(ints, stop_ids, tables, sampling)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What lives on the devices between dispatches; every program takes it by donation.

    Attributes:
        cache: keys and values.
        tokens: last token of each slot; one spare slot for rows that do not exist.
        history: what penalties and biases need; a spare slot too.
    """

    cache: PagedKVCache
    tokens: Int[Leaf, " slots"]
    history: History


class Runner:
    """Runs one model on one mesh.

    Args:
        model: with its weights.
        mesh: ``("tp",)``.
        limits: fixed sizes.
        dtype: of the cache.
        sequence_parallel: whether prefill shards the residual over positions: ``on`` (if tp divides the
            chunk), ``off``, or ``auto``: if that is faster.

    Attributes:
        losses: how often the state was given up; whoever hands out pages has to forget what was in them.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        limits: Limits,
        dtype: jnp.dtype,
        sequence_parallel: SequenceParallel = "auto",
    ) -> None:
        self.config: ModelConfig = model.config
        self.mesh = mesh
        self.limits = limits
        self.dtype = jnp.dtype(dtype)
        self.sequence_parallel = sequence_parallel
        self.compiled: dict[tuple[str, int, int], jax.stages.Compiled] = {}
        self.compile_seconds = 0.0
        self._graph, state = nnx.split(model)
        leaves, self._tree = jax.tree.flatten(state)
        self._weights: tuple[jax.Array, ...] = tuple(leaves)
        self._state: State | None = None  # allocated at the first dispatch: explain needs no memory
        self.losses = 0

    # --- what the engine calls -----------------------------------------------------------------------------

    def prefill(self, row: Row, tokens: Sequence[int]) -> Sampled:
        """Runs a chunk of a prompt and draws the token after it.

        Args:
            row: its ``position`` is the chunk's first. A chunk smaller than a page lies within one, a larger
                one begins at a page.
            tokens: the chunk, at most the largest chunk size.

        Returns:
            Device arrays [1, 1, ...]; of use after the prompt's last chunk only.
        """
        size = self.chunk_size(len(tokens))
        rows = _Rows.pack([row], self.limits, 1)
        program = self.program("prefill", 1, size)
        length = np.int32(len(tokens))
        chunk = _padded(tokens, size)
        (drawn,) = self._dispatch(lambda state: program(self._weights, state, rows, chunk, length))
        return drawn

    def prefill_and_score(
        self, row: Row, tokens: Sequence[int], targets: Sequence[int]
    ) -> tuple[Sampled, Sampled]:
        """Like :meth:`prefill`; also the log-probability after each token of the one that does follow.

        Args:
            row: as there.
            tokens: as there.
            targets: the tokens one later; what follows the prompt's last one is not known.

        Returns:
            What :meth:`prefill` returns, and device arrays [chunk, ...] with the targets as their tokens.
        """
        size = self.chunk_size(len(tokens))
        rows = _Rows.pack([row], self.limits, 1)
        program = self.program("prefill_and_score", 1, size)
        chunk, following, length = _padded(tokens, size), _padded(targets, size), np.int32(len(tokens))
        drawn, scored = self._dispatch(
            lambda state: program(self._weights, state, rows, chunk, length, following)
        )
        return drawn, scored

    def decode(self, rows: Sequence[Row], steps: int) -> Sampled:
        """Feeds each row its slot's last token and draws the next, ``steps`` times.

        Args:
            rows: at most ``max_slots``, in different slots.
            steps: 1 or ``limits.steps``.

        Returns:
            Device arrays [steps, batch bucket, ...]; a row that has ended yields ``NO_TOKEN``.
        """
        size = next(size for size in self.limits.batch_sizes if size >= len(rows))
        program = self.program("decode", size, steps)
        packed = _Rows.pack(rows, self.limits, size)
        (drawn,) = self._dispatch(lambda state: program(self._weights, state, packed))
        return drawn

    def score(self, row: Row, tokens: Sequence[int]) -> Float[np.ndarray, "S V"]:
        """Runs a chunk of a prompt and returns the logits after each of its tokens, float32."""
        size = self.chunk_size(len(tokens))
        rows = _Rows.pack([row], self.limits, 1)
        program = self.program("score", 1, size)
        chunk = _padded(tokens, size)
        (logits,) = self._dispatch(lambda state: program(self._weights, state, rows, chunk))
        return np.asarray(logits)[: len(tokens), : self.config.vocab_size]

    def set_history(
        self,
        slot: int,
        prompt: Sequence[int],
        output: Sequence[int],
        params: SamplingParams,
        barred: Sequence[int] = (),
    ) -> None:
        """Tells a slot which tokens are in its prompt and its output so far, and sets its biases.

        ``barred`` tokens, and those ``params.allowed_token_ids`` leaves out, have a bias of minus infinity.
        """
        in_prompt = np.zeros((1, self.padded_vocab), np.bool_)
        in_prompt[0, list(prompt)] = True
        counts = np.bincount(np.asarray(output, np.int64), minlength=self.padded_vocab)[None].astype(np.int32)
        bias = np.zeros((1, self.padded_vocab), np.float32)
        for token, value in params.logit_bias.items():
            bias[0, token] = value
        if params.allowed_token_ids is not None:
            others = np.ones(self.padded_vocab, np.bool_)
            others[list(params.allowed_token_ids)] = False
            bias[0, others] = -np.inf
        bias[0, list(barred)] = -np.inf
        program = self.program("set_history", 1, 1)
        self._dispatch(lambda state: (program(state, np.int32(slot), in_prompt, counts, bias),))

    def set_masks(self, masks: Mapping[int, np.ndarray]) -> None:
        """Says which tokens slots may draw next.

        Args:
            masks: per slot uint32 [ceil(V / 32)]: bit ``i`` of word ``w`` allows token ``32 * w + i``.
        """
        slots: Any = np.full(self.limits.max_slots, self.limits.max_slots, np.int32)
        words: Any = np.zeros((self.limits.max_slots, -(-self.config.vocab_size // 32)), np.uint32)
        for row, (slot, mask) in enumerate(masks.items()):
            slots[row], words[row] = slot, mask
        program = self.program("set_masks", self.limits.max_slots, 1)
        self._dispatch(lambda state: (program(state, slots, words),))

    def reset(self) -> None:
        """Gives the state's memory back; the next dispatch begins with a state of zeros."""
        state, self._state = self._state, None
        self._give_up(state)

    def chunk_size(self, length: int) -> int:
        """The smallest chunk bucket that holds ``length`` tokens."""
        return next(size for size in self.chunk_sizes if size >= length)

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Chunk buckets of use: none beyond the first that holds the longest sequence."""
        sizes = self.limits.chunk_sizes
        enough = next(
            (i for i, size in enumerate(sizes) if size >= self.limits.max_model_len), len(sizes) - 1
        )
        return sizes[: enough + 1]

    def prepare(self, prompt_tokens: int) -> None:
        """Compiles what one prompt of that length needs, so that its first tokens do not wait for it."""
        *full, last = range(0, prompt_tokens, self.chunk_sizes[-1])
        sizes = {self.chunk_size(prompt_tokens - last)} | ({self.chunk_sizes[-1]} if full else set())
        self._compile([("decode", 1, self.limits.steps), *(("prefill", 1, size) for size in sizes)])
        jax.block_until_ready(self.state)

    def warm_up(self) -> None:
        """Compiles every program that serving can call; afterwards nothing compiles again."""
        self._compile(
            [
                *(
                    ("decode", batch, steps)
                    for batch in self.limits.batch_sizes
                    for steps in {1, self.limits.steps}
                ),
                *(("prefill", 1, size) for size in self.chunk_sizes),
                *(
                    ("prefill_and_score", 1, size)
                    for size in self.chunk_sizes
                    if size <= self.limits.page_size
                ),
                ("set_history", 1, 1),
                ("set_masks", self.limits.max_slots, 1),
            ]
        )
        # a first call also compiles the small transfers around a program
        null = Row(self.limits.max_slots, 0, (), SamplingParams(temperature=0), 0)
        jax.block_until_ready((self.prefill(null, [0]), self.decode([null], 1)))

    def residual_spec(self, length: int) -> PartitionSpec:
        """Returns the spec of the residual in prefill of ``length`` tokens; in decode: ``REPLICATED``."""
        rows, left = divmod(length, self.mesh.size)
        if left or self.mesh.size == 1 or self.sequence_parallel == "off":
            return REPLICATED
        return (
            SEQUENCE_PARALLEL
            if self.sequence_parallel == "on" or self._sequence_parallel_pays(rows)
            else REPLICATED
        )

    @property
    def compile_count(self) -> int:
        """Programs compiled so far."""
        return len(self.compiled)

    @property
    def state(self) -> State:
        """The state on the devices, allocated when first asked for."""
        if self._state is None:
            self._state = self._allocate()
        return self._state

    @property
    def padded_vocab(self) -> int:
        """V with the padding that makes tp divide it."""
        return pad_to_multiple(self.config.vocab_size, self.mesh.size)

    # --- programs ------------------------------------------------------------------------------------------

    def _dispatch(self, call: Callable[[State], Sequence[Any]]) -> list[Any]:
        """Hands the state to a program by donation and keeps the state it returns.

        A call that fails may have taken the state all the same: it is given up as a whole.

        Args:
            call: from the state to the next one, and results.

        Returns:
            The results.
        """
        state = self.state
        try:
            self._state = None
            self._state, *results = call(state)
        except BaseException:
            self._give_up(state)
            raise
        return results

    def _give_up(self, state: State | None) -> None:
        # deleted, since tracebacks may refer to it and would keep its memory
        self.losses += 1
        for buffer in jax.tree.leaves(state):
            if not buffer.is_deleted():
                buffer.delete()

    def program(self, kind: str, batch: int, length: int) -> Any:
        """The compiled program of that kind and bucket.

        Args:
            kind: ``prefill``, ``prefill_and_score``, ``decode``, ``score``, ``set_history`` or ``set_masks``.
            batch: rows.
            length: tokens of a chunk, or decode steps.
        """
        key = (kind, batch, length)
        if key not in self.compiled:
            started = time.perf_counter()
            options = _TPU_COMPILER_OPTIONS if self._platform == "tpu" else None
            with jax.set_mesh(self.mesh):
                self.compiled[key] = self.lower(kind, batch, length).compile(options)
            seconds = time.perf_counter() - started
            self.compile_seconds += seconds
            log.info("compiled %s batch=%d length=%d in %.2f s", kind, batch, length, seconds)
        return self.compiled[key]

    @property
    def _platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    def _sequence_parallel_pays(self, rows: int) -> bool:
        """Whether sharding a chunk's residual over positions, ``rows`` on each device, is faster."""
        match self._platform:
            case "tpu":
                return rows >= _TPU_MIN_ROWS
            case "gpu":
                return rows * self.config.hidden_size * self.dtype.itemsize >= _GPU_MIN_BYTES
            case _:  # on CPU, XLA has no reduce-scatter: every device would sum it all, then gather it again
                return False

    def _compile(self, programs: Sequence[tuple[str, int, int]]) -> None:
        # XLA compiles outside Python's lock: programs compile side by side
        with ThreadPoolExecutor(min(len(programs), os.cpu_count() or 1)) as pool:
            for compiled in [pool.submit(self.program, *key) for key in programs]:
                compiled.result()

    def lower(self, kind: str, batch: int, length: int) -> jax.stages.Lowered:
        """Traces a program without compiling it, from shapes alone."""
        rows = jax.tree.map(np.asarray, _Rows.pack([], self.limits, batch))
        weights, state = self._weights, self.abstract_state()
        with jax.set_mesh(self.mesh):
            if kind == "set_history":
                of_slot = [
                    np.zeros((1, self.padded_vocab), dtype) for dtype in (np.bool_, np.int32, np.float32)
                ]
                return self._jit(_set_history, donate=0).lower(state, np.int32(0), *of_slot)
            if kind == "set_masks":
                words = np.zeros((batch, -(-self.config.vocab_size // 32)), np.uint32)
                return self._jit(_set_masks, donate=0).lower(state, np.zeros(batch, np.int32), words)
            if kind == "decode":
                return self._jit(self._decode(length), donate=1).lower(weights, state, rows)
            tokens = np.zeros((batch, length), np.int32)
            if kind == "prefill":
                return self._jit(self._prefill, donate=1).lower(weights, state, rows, tokens, np.int32(0))
            if kind == "prefill_and_score":
                arguments = (weights, state, rows, tokens, np.int32(0), tokens)
                return self._jit(self._prefill_and_score, donate=1).lower(*arguments)
            return self._jit(self._score, donate=1).lower(weights, state, rows, tokens)

    @property
    def model(self) -> Decoder:
        """The model with its weights as they lie on the devices."""
        return self._model(self._weights)

    def abstract_model(self) -> Decoder:
        """The model without its weights: shapes, dtypes, shardings, and what each parameter is made of."""
        return self._model(
            [jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding) for w in self._weights]
        )

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of the state."""
        slots = self.limits.max_slots + 1
        tokens: Any = jax.ShapeDtypeStruct((slots,), jnp.int32, sharding=NamedSharding(self.mesh, REPLICATED))
        return State(
            kv.abstract(
                self.config,
                self.mesh,
                num_pages=self.limits.num_pages,
                page_size=self.limits.page_size,
                dtype=self.dtype,
            ),
            tokens,
            History.abstract(slots, self.padded_vocab, self.mesh),
        )

    def _jit(self, function: Callable[..., Any], donate: int) -> Any:
        # the state comes out as it lay when it went in, so that it can be donated to the next call
        state = jax.tree.map(lambda buffer: buffer.format, self.abstract_state())
        whole, cut = (NamedSharding(self.mesh, spec) for spec in (REPLICATED, LOGITS))
        out: Any = (state, whole)
        if function in (_set_history, _set_masks):
            out = state
        elif function == self._score:
            out = (state, cut)
        elif function == self._prefill_and_score:
            out = (state, whole, whole)
        return jax.jit(function, donate_argnums=donate, out_shardings=out)

    def _allocate(self) -> State:
        abstract = self.abstract_state()

        def zeros() -> State:
            return jax.tree.map(lambda buffer: jnp.zeros(buffer.shape, buffer.dtype), abstract)

        formats = jax.tree.map(lambda buffer: buffer.format, abstract)
        return jax.jit(zeros, out_shardings=formats)()

    def _model(self, weights: Sequence[Any]) -> Decoder:
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, weights))

    def _prefill(
        self,
        weights: Sequence[Array],
        state: State,
        rows: _Rows,
        tokens: Int[Array, "1 S"],
        length: Int[Array, ""],
    ) -> tuple[State, Sampled]:
        model = self._model(weights)
        state, hidden = self._run_chunk(model, state, rows, tokens)
        return self._draw_after(model, state, rows, hidden, length)

    def _prefill_and_score(
        self,
        weights: Sequence[Array],
        state: State,
        rows: _Rows,
        tokens: Int[Array, "1 S"],
        length: Int[Array, ""],
        targets: Int[Array, "1 S"],
    ) -> tuple[State, Sampled, Sampled]:
        model = self._model(weights)
        state, hidden = self._run_chunk(model, state, rows, tokens)
        scored = score(model.logits(hidden[0]), targets[0], self.mesh)
        return *self._draw_after(model, state, rows, hidden, length), scored

    def _draw_after(
        self,
        model: Decoder,
        state: State,
        rows: _Rows,
        hidden: Float[Array, "1 S D"],
        length: Int[Array, ""],
    ) -> tuple[State, Sampled]:
        slots, first = rows.ints[:, 0], rows.ints[:, 1]
        # where positions are cut, this sums one row over tp; a slice would gather all of them
        is_last = jnp.arange(hidden.shape[1]) == length - 1
        last = jax.lax.reduce_sum(jnp.where(is_last[:, None], hidden, 0), (1,))
        drawn, history = sample(
            model.logits(last), rows.sampling, state.history, slots, first + length, self.mesh
        )
        state = State(state.cache, state.tokens.at[slots].set(drawn.tokens), history)
        return state, jax.tree.map(lambda x: x[None], drawn)

    def _score(
        self, weights: Sequence[Array], state: State, rows: _Rows, tokens: Int[Array, "1 S"]
    ) -> tuple[State, Float[Array, "S V"]]:
        model = self._model(weights)
        state, hidden = self._run_chunk(model, state, rows, tokens)
        return state, model.logits(hidden[0])

    def _run_chunk(
        self, model: Decoder, state: State, rows: _Rows, tokens: Int[Array, "1 S"]
    ) -> tuple[State, Float[Array, "1 S D"]]:
        positions = rows.ints[:, 1, None] + jnp.arange(tokens.shape[1])
        at = BatchMetadata(rows.block_tables, positions, rows.ints[:, 3])
        hidden, cache = model(tokens, state.cache, at, self.residual_spec(tokens.shape[1]))
        return State(cache, state.tokens, state.history), hidden

    def _decode(self, steps: int) -> Callable[..., tuple[State, Sampled]]:
        def step(
            model: Decoder, state: State, rows: _Rows, alive: Array, positions: Array
        ) -> tuple[State, Sampled]:
            slots = jnp.where(alive, rows.ints[:, 0], self.limits.max_slots)
            # a row that has ended goes on computing, but on the null page and the spare slot
            tables = jnp.where(alive[:, None], rows.block_tables, NULL_PAGE)
            at = BatchMetadata(tables, positions[:, None], rows.ints[:, 3])
            hidden, cache = model(state.tokens[slots][:, None], state.cache, at)
            drawn, history = sample(
                model.logits(hidden[:, 0]), rows.sampling, state.history, slots, positions + 1, self.mesh
            )
            return State(cache, state.tokens.at[slots].set(drawn.tokens), history), drawn

        def decode(weights: Sequence[Array], state: State, rows: _Rows) -> tuple[State, Sampled]:
            model = self._model(weights)
            start, remaining = rows.ints[:, 1], rows.ints[:, 2]
            if steps == 1:
                state, drawn = step(model, state, rows, remaining > 0, start)
                return state, jax.tree.map(lambda x: x[None], drawn)

            def body(i: Array, carry: tuple[State, Array, Sampled]) -> tuple[State, Array, Sampled]:
                state, alive, out = carry
                # one that has ended goes to the beginning, where it walks one page only
                positions = jnp.where(alive, start + i, 0)
                state, drawn = step(model, state, rows, alive, positions)
                drawn = Sampled(
                    jnp.where(alive, drawn.tokens, NO_TOKEN),
                    drawn.logprobs,
                    drawn.top_tokens,
                    drawn.top_logprobs,
                )
                out = jax.tree.map(lambda all_, one: all_.at[i].set(one), out, drawn)
                ended = jnp.any(drawn.tokens[:, None] == rows.stop_ids, axis=1) | (drawn.tokens < 0)
                return state, alive & ~ended & (i + 1 < remaining), out

            shapes = jax.eval_shape(lambda: step(model, state, rows, remaining > 0, start)[1])
            out = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), shapes)
            state, _, out = jax.lax.fori_loop(0, steps, body, (state, remaining > 0, out))
            return state, out

        return decode


def _set_history(
    state: State,
    slot: Int[Array, ""],
    in_prompt: Bool[Array, "1 V"],
    counts: Int[Array, "1 V"],
    bias: Float[Array, "1 V"],
) -> State:
    history = state.history
    at = (slot, jnp.int32(0))
    history = History(
        jax.lax.dynamic_update_slice(history.in_prompt, in_prompt, at),
        jax.lax.dynamic_update_slice(history.counts, counts, at),
        jax.lax.dynamic_update_slice(history.bias, bias, at),
        history.allowed,
    )
    return State(state.cache, state.tokens, history)


def _set_masks(state: State, slots: Int[Array, " B"], words: UInt[Array, "B words"]) -> State:
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    padded_vocab = state.history.allowed.shape[1]
    allowed = bits.reshape(len(slots), -1)[:, :padded_vocab].astype(jnp.bool_)
    allowed = jnp.pad(allowed, ((0, 0), (0, padded_vocab - allowed.shape[1])))
    history = replace(state.history, allowed=state.history.allowed.at[slots].set(allowed))
    return State(state.cache, state.tokens, history)


def _padded(tokens: Sequence[int], size: int) -> np.ndarray:
    padded = np.zeros((1, size), np.int32)
    padded[0, : len(tokens)] = tokens
    return padded
