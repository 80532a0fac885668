"""The runner: dispatches compiled programs and carries the device state from one to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from tpjax.config import ModelConfig, SequenceParallel
from tpjax.model import Decoder
from tpjax.runtime.limits import Limits
from tpjax.runtime.programs import Kind, ModelGraph, Programs, ProgramSpec
from tpjax.runtime.rows import PackedRows, Row
from tpjax.runtime.state import DeviceState
from tpjax.sampling import Sampled, mask_words
from tpjax.sampling_params import SamplingParams
from tpjax.sharding import pad_to_multiple


class Runner:
    """Runs one model on one mesh.

    Args:
        model: the model with its weights, or without (``abstract_decoder``): its programs can then be
            compiled, but not called.
        mesh: ``("tp",)``.
        limits: fixed sizes.
        dtype: of the cache.
        sequence_parallel: whether prefill shards the residual over positions: ``on`` (if tp divides the
            chunk), ``off``, or ``auto``: if that is faster.

    Attributes:
        config: the architecture.
        mesh: as given.
        limits: as given.
        dtype: as given.
        weights: flat, in the order of :meth:`ModelGraph.split`.
        programs: the compiled programs.
        state_resets: how often the state was lost, by a failure or by :meth:`reset`. Whenever it has changed,
            all pages have lost their content.
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
        self._graph, self.weights = ModelGraph.split(model)
        self.programs = Programs(
            self._graph,
            self.weights,
            self.abstract_state(),
            config=model.config,
            mesh=mesh,
            limits=limits,
            dtype=self.dtype,
            sequence_parallel=sequence_parallel,
        )
        self.state_resets = 0
        self._state: DeviceState | None = None  # allocated at the first dispatch: explain needs no memory

    # --- what the engine calls -----------------------------------------------------------------------------

    def prefill(self, row: Row, tokens: Sequence[int]) -> Sampled:
        """Runs a chunk of a prompt and samples the token after it.

        Args:
            row: its ``position`` is the chunk's first. A chunk smaller than a page lies within one, a larger
                one begins at a page.
            tokens: the chunk, at most the largest chunk size.

        Returns:
            Device arrays [1, 1, ...]; only meaningful after the prompt's last chunk.
        """
        size = self.chunk_size(len(tokens))
        arguments = (self._pack([row], 1), _padded(tokens, size), np.int32(len(tokens)))
        sampled: Sampled
        (sampled,) = self._dispatch(ProgramSpec("prefill", 1, size), *arguments)
        return sampled

    def prefill_and_score(
        self, row: Row, tokens: Sequence[int], targets: Sequence[int]
    ) -> tuple[Sampled, Sampled]:
        """Runs :meth:`prefill` and also computes the log-probability of each token's successor.

        Args:
            row: as in :meth:`prefill`.
            tokens: as in :meth:`prefill`.
            targets: the tokens one later; the successor of the prompt's last token is not known.

        Returns:
            The result of :meth:`prefill`, and device arrays [chunk, ...] with the targets as their tokens.
        """
        size = self.chunk_size(len(tokens))
        arguments = (self._pack([row], 1), _padded(tokens, size), np.int32(len(tokens)))
        spec = ProgramSpec("prefill_and_score", 1, size)
        sampled, scored = self._dispatch(spec, *arguments, _padded(targets, size))
        return sampled, scored

    def decode(self, rows: Sequence[Row], steps: int) -> Sampled:
        """Feeds each row its slot's last token and samples the next, ``steps`` times.

        Args:
            rows: at most ``max_slots``, in different slots.
            steps: 1 or ``limits.steps``.

        Returns:
            Device arrays [steps, batch bucket, ...]; a row that has ended outputs ``NO_TOKEN``.
        """
        size = next(size for size in self.limits.batch_sizes if size >= len(rows))
        sampled: Sampled
        (sampled,) = self._dispatch(ProgramSpec("decode", size, steps), self._pack(rows, size))
        return sampled

    def score(self, row: Row, tokens: Sequence[int]) -> Float[np.ndarray, "S V"]:
        """Runs a chunk of a prompt and returns the logits after each of its tokens, float32."""
        size = self.chunk_size(len(tokens))
        (logits,) = self._dispatch(ProgramSpec("score", 1, size), self._pack([row], 1), _padded(tokens, size))
        return np.asarray(logits)[: len(tokens), : self.config.vocab_size]

    def set_history(
        self,
        slot: int,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        params: SamplingParams,
        barred_ids: Sequence[int] = (),
    ) -> None:
        """Sets a slot's history and biases.

        Args:
            slot: the slot.
            prompt_token_ids: tokens of its prompt.
            output_token_ids: tokens of its output so far.
            params: tokens that ``allowed_token_ids`` leaves out get a bias of minus infinity.
            barred_ids: tokens that get a bias of minus infinity as well.
        """
        in_prompt = np.zeros((1, self.padded_vocab), np.bool_)
        in_prompt[0, list(prompt_token_ids)] = True
        output = np.asarray(output_token_ids, np.int64)
        counts = np.bincount(output, minlength=self.padded_vocab)[None].astype(np.int32)
        bias = np.zeros((1, self.padded_vocab), np.float32)
        for token, value in params.logit_bias.items():
            bias[0, token] = value
        if params.allowed_token_ids is not None:
            others = np.ones(self.padded_vocab, np.bool_)
            others[list(params.allowed_token_ids)] = False
            bias[0, others] = -np.inf
        bias[0, list(barred_ids)] = -np.inf
        self._dispatch(ProgramSpec("set_history"), np.int32(slot), in_prompt, counts, bias)

    def set_masks(self, masks: Mapping[int, np.ndarray]) -> None:
        """Sets the tokens that slots may sample next.

        Args:
            masks: per slot uint32 [ceil(V / 32)]: bit ``i`` of word ``w`` allows token ``32 * w + i``.
        """
        spec = ProgramSpec("set_masks", self.limits.max_slots)
        slots = np.full(spec.batch, self.limits.max_slots, np.int32)  # the spare slot
        words = np.zeros((spec.batch, mask_words(self.config.vocab_size)), np.uint32)
        for row, (slot, mask) in enumerate(masks.items()):
            slots[row], words[row] = slot, mask
        self._dispatch(spec, slots, words)

    def reset(self) -> None:
        """Frees the state; the next dispatch begins with a state of zeros."""
        state, self._state = self._state, None
        self._lose(state)

    def close(self) -> None:
        """Frees the state, the weights and the programs; nothing can be dispatched any more."""
        self.reset()
        for weight in self.weights:
            weight.delete()
        self.weights = ()
        self.programs.compiled.clear()

    def chunk_size(self, length: int) -> int:
        """Returns the smallest chunk size that holds ``length`` tokens."""
        return next(size for size in self.chunk_sizes if size >= length)

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Chunk sizes in use, ascending, tokens."""
        return self.limits.usable_chunk_sizes

    @property
    def compile_count(self) -> int:
        """Number of programs compiled so far."""
        return len(self.programs.compiled)

    # --- compiling ahead -----------------------------------------------------------------------------------

    def prepare(self, prompt_tokens: int) -> None:
        """Compiles what one prompt of that many tokens needs, so that its first tokens do not wait for it."""
        *full, last = range(0, prompt_tokens, self.chunk_sizes[-1])
        sizes = {self.chunk_size(prompt_tokens - last)} | ({self.chunk_sizes[-1]} if full else set())
        chunks = (ProgramSpec("prefill", 1, size) for size in sizes)
        self.programs.compile([ProgramSpec("decode", 1, self.limits.steps), *chunks])
        jax.block_until_ready(self.state)

    def warm_up(self) -> None:
        """Compiles every program that serving can call; afterwards nothing compiles again."""
        self.programs.compile(self.programs.serving())
        # a first call also compiles the small transfers around a program
        null = Row(self.limits.max_slots, 0, (), SamplingParams(temperature=0), 0)
        jax.block_until_ready((self.prefill(null, [0]), self.decode([null], 1)))

    def program(self, kind: Kind, batch: int, length: int) -> Any:
        """Returns a program as a ``jax.stages.Compiled``, whose types would call every analysis optional."""
        return self.programs.get(ProgramSpec(kind, batch, length))

    # --- the model and the state ---------------------------------------------------------------------------

    @property
    def model(self) -> Decoder:
        """The model with its weights on the devices."""
        return self._graph.merge(self.weights)

    def abstract_model(self) -> Decoder:
        """Returns the model without its weights: shapes, dtypes, shardings and tensor mappings."""
        return self._graph.merge(
            [jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding) for w in self.weights]
        )

    @property
    def state(self) -> DeviceState:
        """The state on the devices, allocated when first asked for."""
        if self._state is None:
            self._state = self.abstract_state().zeros()
        return self._state

    def abstract_state(self) -> DeviceState:
        """Returns shapes, dtypes and shardings of the state."""
        return DeviceState.abstract(self.config, self.mesh, self.limits, self.dtype)

    @property
    def padded_vocab(self) -> int:
        """V padded to a multiple of tp."""
        return pad_to_multiple(self.config.vocab_size, self.mesh.size)

    def _pack(self, rows: Sequence[Row], size: int) -> PackedRows:
        return PackedRows.pack(rows, self.limits, size)

    def _dispatch(self, spec: ProgramSpec, *arguments: Any) -> list[Any]:
        """Donates the state to a program, keeps the state it returns, and returns its results.

        A call that fails may have consumed the state all the same: the whole state is given up.
        """
        program = self.programs.get(spec)
        weights = (self.weights,) if spec.takes_weights else ()
        state = self.state
        results: list[Any]
        try:
            self._state = None
            self._state, *results = program(*weights, state, *arguments)
        except BaseException:
            self._lose(state)
            raise
        return results

    def _lose(self, state: DeviceState | None) -> None:
        self.state_resets += 1
        if state is not None:
            state.delete()


def _padded(token_ids: Sequence[int], size: int) -> np.ndarray:
    """Returns token ids as int32 [1, size], padded with zeros."""
    padded = np.zeros((1, size), np.int32)
    padded[0, : len(token_ids)] = token_ids
    return padded
