"""The runner: dispatches compiled programs and carries the device state from one to the next.

Of a pipeline it is the last stage, which samples; it drives the others.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from tpjax.config import KVDtype, SequenceParallel
from tpjax.model import Decoder
from tpjax.runtime.leader import Leader
from tpjax.runtime.limits import ChunkShape, Limits
from tpjax.runtime.programs import ProgramSpec
from tpjax.runtime.rows import Chunk, PackedRows, PackedStep, Row
from tpjax.runtime.stage import Pipeline, Stage
from tpjax.runtime.state import DeviceState
from tpjax.sampling import Sampled, mask_words
from tpjax.sampling_params import SamplingParams
from tpjax.sharding import pad_to_multiple

log = logging.getLogger(__name__)


class StepOutput(NamedTuple):
    """What a step returns.

    Attributes:
        sampled: device arrays [1, rows, ...]: the next token of each decode row first.
        sampled_at: for each prompt the row of the token after its chunk; it means something only after the
            prompt's last one.
        scored: device arrays [tokens, ...] of the log-probabilities of the chunks' targets, if there are any.
        scored_at: for each prompt the row of its first target.
    """

    sampled: Sampled
    sampled_at: list[int]
    scored: Sampled | None
    scored_at: list[int]

    @classmethod
    def of(
        cls,
        spec: ProgramSpec,
        chunks: Sequence[Chunk],
        first_chunks: Sequence[int],
        sampled: Sampled,
        scored: Sampled | None = None,
    ) -> StepOutput:
        """Returns the results of a program.

        Args:
            spec: the program.
            chunks: parts of prompts.
            first_chunks: index of the first chunk of each, as the program counts them.
            sampled: first result.
            scored: second result, if there is one.
        """
        assert spec.chunks is not None
        length = spec.chunks.length
        last = [
            first - (-len(chunk.token_ids) // length) - 1
            for first, chunk in zip(first_chunks, chunks, strict=True)
        ]
        return cls(
            sampled,
            [spec.batch + index for index in last],
            scored,
            [first * length for first in first_chunks],
        )


class Runner(Stage):
    """Runs one model: on one mesh, or as the last stage of a pipeline, which drives the stages before it.

    Args:
        model: the model with its weights, or without (``abstract_decoder``): its programs can then be
            compiled, but not called. Of a pipeline, the part with the last layers.
        mesh: ``("tp",)``.
        limits: fixed sizes.
        dtype: of activations.
        sequence_parallel: as :class:`Stage` takes it.
        leader: of several processes, in process 0: what sends each dispatch to the others.
        earlier: stages before the last one.
        kv_dtype: as :class:`Stage` takes it.

    Attributes:
        leader: as given.
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
        leader: Leader | None = None,
        earlier: Sequence[Stage] = (),
        kv_dtype: KVDtype = "auto",
    ) -> None:
        self.leader = leader
        self._pipeline = Pipeline(tuple(earlier))
        elsewhere = [] if leader is None else [leader.compile]
        if earlier:
            elsewhere.append(self._pipeline.compile)
        compile_elsewhere = partial(_start_all, elsewhere) if elsewhere else None
        super().__init__(model, mesh, limits, dtype, sequence_parallel, compile_elsewhere, kv_dtype)
        self.state_resets = 0
        self._masks: dict[int, bytes] = {}  # as last uploaded, by slot

    @classmethod
    def of_stages(
        cls,
        models: Sequence[Decoder],
        meshes: Sequence[Mesh],
        limits: Limits,
        dtype: jnp.dtype,
        sequence_parallel: SequenceParallel = "auto",
        leader: Leader | None = None,
        kv_dtype: KVDtype = "auto",
    ) -> Runner:
        """Returns the runner of a model in parts, each on its mesh, or in one piece."""
        earlier = [
            Stage(model, mesh, limits, dtype, sequence_parallel, kv_dtype=kv_dtype, following=following)
            for model, (mesh, following) in zip(models[:-1], pairwise(meshes), strict=True)
        ]
        return cls(models[-1], meshes[-1], limits, dtype, sequence_parallel, leader, earlier, kv_dtype)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages, this one last."""
        return (*self._pipeline.stages, self)

    # --- what the engine calls -----------------------------------------------------------------------------

    def step(self, decode: Sequence[Row], chunks: Sequence[Chunk]) -> StepOutput:
        """Runs prompt chunks, and one decode step of other rows beside them, as one program.

        Args:
            decode: at most ``max_slots`` rows, in different slots.
            chunks: parts of prompts that fit one shape together: see :meth:`Limits.fitting`.
        """
        spec = self._step_spec(len(decode), chunks)
        shape = spec.chunks
        assert shape is not None
        packed, first_chunks = PackedStep.pack(decode, chunks, self.limits, spec.batch, shape)
        if spec.kind == "step":
            return StepOutput.of(spec, chunks, first_chunks, *self.dispatch(spec, packed))
        targets = np.zeros(shape, np.int32)
        for first, chunk in zip(first_chunks, chunks, strict=True):
            start = first * shape.length
            targets.reshape(-1)[start : start + len(chunk.targets or ())] = chunk.targets or ()
        return StepOutput.of(spec, chunks, first_chunks, *self.dispatch(spec, packed, targets))

    def decode(self, rows: Sequence[Row], steps: int) -> Sampled:
        """Feeds each row its slot's last token and samples the next, ``steps`` times.

        Args:
            rows: at most ``max_slots``, in different slots.
            steps: 1 to ``limits.steps``.

        Returns:
            Device arrays [limits.steps, batch bucket, ...], of which the first ``steps`` count; a row that
            has ended outputs ``NO_TOKEN``.
        """
        greedy = all(row.plain_greedy() for row in rows)
        shapes = self.decode_shapes_for([row.position + steps for row in rows])
        spec = self.programs.usable(
            ProgramSpec.decode(shapes[0], greedy=greedy),
            (ProgramSpec.decode(shape, greedy=one) for shape in shapes for one in (greedy, False)),
        )
        sampled: Sampled
        (sampled,) = self.dispatch(spec, PackedRows.pack(rows, self.limits, spec.batch), np.int32(steps))
        return sampled

    def score(self, chunk: Chunk) -> Float[np.ndarray, "S V"]:
        """Runs a part of a prompt and returns the logits after each of its tokens, float32."""
        shape = self.limits.fitting([chunk.span])
        packed, _ = PackedStep.pack([], [chunk], self.limits, 0, shape)
        (logits,) = self.dispatch(ProgramSpec("score", 0, shape), packed)
        return np.asarray(logits)[: len(chunk.token_ids), : self.config.vocab_size]

    def _step_spec(self, rows: int, chunks: Sequence[Chunk]) -> ProgramSpec:
        """Returns the smallest program that runs these decode rows and chunks, and need not be waited for."""
        limits, spans = self.limits, [chunk.span for chunk in chunks]
        if any(chunk.targets is not None for chunk in chunks):
            return ProgramSpec("step_and_score", limits.max_rows, limits.score_chunks)
        among = limits.mixed_chunk_shapes if rows else limits.usable_chunk_shapes
        batches = [size for size in limits.mixed_batch_sizes if size >= rows]
        smallest = ProgramSpec("step", batches[0] if rows else 0, limits.fitting(spans, among))
        others = (
            ProgramSpec("step", batch, shape)
            for shape in among
            if limits.holds(shape, spans)
            for batch in (batches if rows else (0, *batches))
        )
        return self.programs.usable(smallest, others)

    def chunk_shapes(self) -> tuple[tuple[ChunkShape, ...], tuple[ChunkShape, ...]]:
        """Returns the shapes of prompt chunks of a step that decodes nothing, and of one that does.

        While :meth:`warm_up` compiles, they are those for which no step has to wait.
        """
        limits, compiled = self.limits, self.programs.compiled
        alone, mixed = limits.usable_chunk_shapes, limits.mixed_chunk_shapes
        if not self.programs.expected:
            return alone, mixed
        now = tuple(shape for shape in mixed if ProgramSpec("step", limits.max_rows, shape) in compiled)
        alone_now = (s for s in alone if s in now or ProgramSpec("step", 0, s) in compiled)
        return tuple(alone_now) or alone, now or mixed

    def set_history(
        self,
        row: int,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        params: SamplingParams,
        barred_ids: Sequence[int] = (),
    ) -> None:
        """Sets a row of the history: counts and biases of a sequence.

        Args:
            row: 0 to ``limits.history_rows`` - 1.
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
            others[np.asarray(params.allowed_array)] = False
            bias[0, others] = -np.inf
        bias[0, list(barred_ids)] = -np.inf
        self.dispatch(ProgramSpec("set_history"), np.int32(row), in_prompt, counts, bias)

    def set_masks(self, masks: Mapping[int, np.ndarray]) -> None:
        """Sets the tokens that slots may sample next; uploads the masks that differ from the last upload.

        Args:
            masks: per slot uint32 [ceil(V / 32)]: bit ``i`` of word ``w`` allows token ``32 * w + i``.
        """
        each = {slot: mask.tobytes() for slot, mask in masks.items()}  # bytes compare faster than arrays
        changed = [(slot, words) for slot, words in each.items() if self._masks.get(slot) != words]
        spec, calls = ProgramSpec("set_masks", self.limits.mask_batch), []
        nothing = bytes(4 * mask_words(self.config.vocab_size))
        for start in range(0, len(changed), spec.batch):
            rows = changed[start : start + spec.batch]
            rows += [(self.limits.max_slots, nothing)] * (spec.batch - len(rows))  # the spare slot
            words = np.frombuffer(b"".join(words for _, words in rows), np.uint32)
            calls.append((np.array([slot for slot, _ in rows], np.int32), words.reshape(spec.batch, -1)))
        if calls:
            self._dispatch_all(spec, calls)
            self._masks.update(changed)

    def reset(self) -> None:
        """Frees the state; the next dispatch begins with a state of zeros."""
        if self.leader is not None:
            self.leader.reset()
        self._lose(self._state)

    def close(self) -> None:
        """Frees the state, the weights and the programs; nothing can be dispatched any more."""
        if self.leader is not None:
            self.leader.close()
        self.reset()
        for stage in self.stages:
            stage.free()

    @property
    def compile_count(self) -> int:
        """Number of programs compiled so far."""
        return sum(len(stage.programs.compiled) for stage in self.stages)

    # --- compiling ahead -----------------------------------------------------------------------------------

    def prepare(self, spans: Sequence[tuple[int, int]], *, greedy: bool, tokens: int = 1) -> None:
        """Compiles what one prompt needs, so that its first tokens do not wait for it.

        Args:
            spans: the parts in which it runs: first position and one past the last.
            greedy: whether its tokens are the likeliest, and nothing else about them is asked for.
            tokens: tokens that it may output.
        """
        shapes = {self.limits.fitting([span]) for span in spans}
        chunks = (ProgramSpec("step", 0, shape) for shape in sorted(shapes))
        prompt = spans[-1][1]
        first, *others = self.decode_shapes_for([prompt + 1])
        later = self.decode_shapes_for([prompt + tokens])
        needed = (first, *others[: 1 + len(others) - len(later)])
        decode = (ProgramSpec.decode(shape, greedy=greedy) for shape in needed)
        self.programs.compile([*decode, *chunks])
        jax.block_until_ready([stage.state for stage in self.stages])

    def warm_up(self, *, background: bool = False) -> None:
        """Compiles every program that serving can call; afterwards nothing compiles again.

        Args:
            background: return when those are compiled that can stand in for the others, and go on with
                these on a thread, one at a time.
        """
        programs = self.programs
        programs.expected = frozenset(programs.serving())
        programs.compile(programs.first() if background else programs.serving())
        self.run_nothing()  # a first call also compiles the small transfers around a program
        if background:
            threading.Thread(target=self._compile_others, name="tpjax-compile", daemon=True).start()
        else:
            programs.expected = frozenset()

    def run_nothing(self) -> None:
        """Runs a prompt chunk and a decode step of no request, and waits for them."""
        null = Row(self.limits.max_slots, 0, (), SamplingParams(temperature=0), 0)
        jax.block_until_ready((self.step([], [Chunk(null, [0])]).sampled, self.decode([null], 1)))

    def _compile_others(self) -> None:
        for spec in self.programs.serving():
            if not self.weights:  # closed
                break
            try:
                self.programs.get(spec)
            except Exception:  # the request that needs it tries again, and reports it
                if self.weights:
                    log.exception("%s could not be compiled", spec)
        self.programs.expected = frozenset()

    # --- the state and the dispatches -----------------------------------------------------------------------

    @property
    def state(self) -> DeviceState:
        """The state on the devices, allocated when first asked for."""
        if self._state is None and self.leader is not None:
            self.leader.allocate()
        state: DeviceState = super().state
        return state

    @property
    def padded_vocab(self) -> int:
        """V padded to a multiple of tp."""
        return pad_to_multiple(self.config.vocab_size, self.mesh.size)

    def dispatch(self, spec: ProgramSpec, *arguments: Any) -> list[Any]:
        """Calls a program on the state, with host arguments, and returns its results."""
        return self._dispatch_all(spec, [arguments])

    def _dispatch_all(self, spec: ProgramSpec, calls: Sequence[Sequence[Any]]) -> list[Any]:
        """Donates the state to a program, keeps the state it returns, and so on; returns the last results.

        Of several processes, process 0 sends the dispatches to the others first. A call that fails may have
        consumed the state all the same: the whole state is given up.
        """
        program = self.programs.get(spec)
        weights = (self.weights,) if spec.takes_weights else ()
        state = self.state
        results: list[Any] = []
        try:
            self._state = None
            if self.leader is not None:
                self.leader.dispatch(spec, calls)
            for arguments in calls:
                if self._pipeline.stages and weights:
                    hidden = self._pipeline.run(spec, arguments[0])
                    state, *results, tokens = program(*weights, state, *arguments, hidden)
                    self._pipeline.send_back(arguments[0], tokens)
                    results = self._pipeline.results(results)
                else:
                    state, *results = program(*weights, state, *arguments)
            self._state = state
        except BaseException as error:
            self.fail(error)
            self._lose(state)
            raise
        return results

    def fail(self, error: BaseException) -> None:
        """Ends all processes if there are several: the others wait for this one in a collective."""
        if self.leader is not None:
            kind = "interrupted" if not isinstance(error, Exception) else f"failed: {type(error).__name__}"
            line = next(iter(str(error).splitlines()), "")[:300]
            self.leader.fail(f"a dispatch of process 0 {kind} {line}".rstrip())

    def _lose(self, state: DeviceState | None) -> None:
        self.state_resets += 1
        self._masks.clear()
        self._state = None
        if state is not None:
            state.delete()
        self._pipeline.lose()


def _start_all(
    starts: Sequence[Callable[[ProgramSpec], Callable[[], None]]], spec: ProgramSpec
) -> Callable[[], None]:
    """Starts to compile a program wherever it is needed; returns what waits for all of them."""
    waits = [start(spec) for start in starts]

    def wait() -> None:
        for one in waits:
            one()

    return wait
