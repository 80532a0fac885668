"""The compiled programs of serving: which there are, what each takes and returns, and how they are compiled.

The only place that splits the model and calls ``jax.jit`` for serving. Programs are compiled ahead of their
first call, so a call can never recompile: shapes come from a fixed set of buckets.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpjax.config import ModelConfig, SequenceParallel
from tpjax.mesh import absent_array, is_local
from tpjax.model import Decoder
from tpjax.runtime import steps
from tpjax.runtime.limits import ChunkShape, DecodeShape, Limits
from tpjax.runtime.rows import PackedRows, PackedStep
from tpjax.runtime.state import DeviceState, StageState
from tpjax.sampling import mask_words
from tpjax.sharding import LOGITS, REPLICATED, SEQUENCE_PARALLEL

log = logging.getLogger(__name__)

Kind = Literal["decode", "step", "step_and_score", "score", "set_history", "set_masks", "layers"]

# Bytes of a device's residual from which sequence parallelism pays on GPUs: between H100s one kernel sums
# small messages faster than two can (vLLM's issue 27700 has figures).
_GPU_MIN_BYTES = 8 * 2**20
# A TPU's compiler may turn a product and its reduce-scatter into a loop over slices of rows, which reads the
# weight at every trip: for 512 tokens and two layers of Llama-3-8B on v5e:2x4, 2.28 million cycles, not 1.84.
_TPU_COMPILER_OPTIONS: dict[str, str | bool] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


class ProgramSpec(NamedTuple):
    """Identifies a program.

    Attributes:
        kind: what it computes: the function of that name in ``steps.py``. ``layers`` is what all stages of a
            pipeline but the last run.
        batch: decode rows, or the rows of ``set_masks``.
        chunks: prompt chunks; ``None``: the kind has none.
        greedy: the sampler only takes the likeliest tokens.
        blocks: of decode steps, as :class:`DecodeShape` has it.
    """

    kind: Kind
    batch: int = 0
    chunks: ChunkShape | None = None
    greedy: bool = False
    blocks: int = 0

    @classmethod
    def decode(cls, shape: DecodeShape, *, greedy: bool) -> ProgramSpec:
        """Returns a decode step of a shape."""
        return cls("decode", shape.rows, greedy=greedy, blocks=shape.blocks)

    @property
    def tokens(self) -> int:
        """Tokens that pass through the layers, without padding for sequence parallelism."""
        return self.batch + (self.chunks.tokens if self.chunks else 0)

    @property
    def sampled_rows(self) -> int:
        """Rows that a token is sampled for."""
        return self.batch + (self.chunks.rows if self.chunks else 0)

    def __str__(self) -> str:
        """``step of 8 rows and 4 x 32 prompt tokens, greedy``."""
        blocks = f" and {self.blocks} blocks of pages" if self.blocks else ""
        parts = [f"{self.batch} rows{blocks}"] if self.batch else []
        if self.chunks:
            parts.append(f"{self.chunks.rows} x {self.chunks.length} prompt tokens")
        of = f" of {' and '.join(parts)}" if parts else ""
        return f"{self.kind}{of}{', greedy' if self.greedy else ''}"

    @property
    def takes_weights(self) -> bool:
        """Whether the program is called with (weights, state, *arguments), not with (state, *arguments)."""
        return self.kind not in ("set_history", "set_masks")

    @property
    def before_last(self) -> ProgramSpec:
        """What the other stages of a pipeline run before the last one runs this."""
        return ProgramSpec("layers", self.batch, self.chunks, blocks=self.blocks)

    @property
    def donated(self) -> int:
        """Index of the argument that is donated: the state."""
        return int(self.takes_weights)


@dataclass(frozen=True)
class Program:
    """What a program computes, and what it takes and returns.

    Attributes:
        step: a function of (model, state, *arguments), or of (state, *arguments) if it takes no weights. It
            returns the next state and its results.
        arguments: host arguments of the shapes and dtypes that it is compiled for.
        results: sharding of each result after the state.
        inputs: of a pipeline's stage, what comes from another stage after the host arguments: its shape,
            dtype and sharding.
    """

    step: Callable[..., tuple[Any, ...]]
    arguments: tuple[Any, ...]
    results: tuple[PartitionSpec, ...]
    inputs: tuple[jax.ShapeDtypeStruct, ...] = ()


class ModelGraph:
    """A model without its weights.

    Weights are flattened once: programs take them as a flat tuple, which costs a call the least.
    """

    def __init__(self, graph: nnx.GraphDef[Decoder], tree: jax.tree_util.PyTreeDef) -> None:
        self._graph = graph
        self._tree = tree

    @classmethod
    def split(cls, model: Decoder) -> tuple[ModelGraph, tuple[jax.Array, ...]]:
        """Returns a model's graph and its weights."""
        graph, state = nnx.split(model)
        leaves, tree = jax.tree.flatten(state)
        return cls(graph, tree), tuple(leaves)

    def merge(self, weights: Sequence[Any]) -> Decoder:
        """Returns the model with these weights, in the order in which :meth:`split` returned them."""
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, weights))


class AbsentProgram:
    """Stands for a program on devices of other processes alone: returns what it returns, as seen from here.

    Args:
        mesh: of those devices.
        program: the program.
        lowered: as it was lowered here.
        state: index of the state among the arguments.
    """

    def __init__(self, mesh: Mesh, program: Program, lowered: jax.stages.Lowered, state: int) -> None:
        self._state = state
        self._results = [
            _absent(result, NamedSharding(mesh, spec))
            for spec, result in zip(program.results, lowered.out_info[1:], strict=True)
        ]

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        """Returns the state as it was given, and the results."""
        return arguments[self._state], *self._results


def _absent(results: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda one: absent_array(one.shape, one.dtype, sharding), results)


class Programs:
    """Compiles the programs of one model, or of a stage of it, on one mesh, and keeps them.

    Args:
        graph: the model without its weights.
        weights: its weights on the devices, or their shapes, dtypes and shardings.
        state: shapes, dtypes and shardings of the device state.
        layers: numbers of the stage's layers; all of the model's if it is one piece.
        config: the architecture, of the whole model.
        mesh: ``("tp",)``.
        limits: fixed sizes.
        decode_shapes: of decode steps, smallest first.
        dtype: of activations.
        sequence_parallel: as :class:`Runner` takes it.
        following: the next stage's mesh; ``None``: there is no other stage after this one.
        compile_elsewhere: of several processes, starts to compile a program in the others, and returns what
            waits for them: no program is used before every process has it. So with the last stage of a
            pipeline and the stages before it.

    Attributes:
        compiled: the programs compiled so far.
        expected: programs that :meth:`Runner.warm_up` compiles: others stand in for those that it has not
            reached yet.
    """

    def __init__(
        self,
        graph: ModelGraph,
        weights: Sequence[Any],
        state: StageState,
        layers: range,
        *,
        config: ModelConfig,
        mesh: Mesh,
        limits: Limits,
        decode_shapes: Sequence[DecodeShape],
        dtype: np.dtype,
        sequence_parallel: SequenceParallel,
        following: Mesh | None = None,
        compile_elsewhere: Callable[[ProgramSpec], Callable[[], None]] | None = None,
    ) -> None:
        self.compiled: dict[ProgramSpec, Any] = {}
        self.expected: frozenset[ProgramSpec] = frozenset()
        self._compiling: dict[ProgramSpec, Future[Any]] = {}
        self._lock = threading.Lock()
        self._graph = graph
        self._weights = weights
        self._state = state
        self._is_first, self._is_last = layers.start == 0, layers.stop == config.num_layers
        self._config = config
        self._mesh = mesh
        self._limits = limits
        self._decode_shapes = tuple(decode_shapes)
        self._dtype = dtype
        self._sequence_parallel = sequence_parallel
        self._following = following
        self._compile_elsewhere = compile_elsewhere
        self._platform: str = mesh.devices.flat[0].platform

    def serving(self) -> list[ProgramSpec]:
        """Returns every program that serving can call.

        Decode steps have two variants, by what they sample. Those with prompt chunks have one: what sampling
        costs is little beside them.
        """
        limits, shapes = self._limits, self._limits.usable_chunk_shapes
        return [
            *(
                ProgramSpec.decode(shape, greedy=greedy)
                for shape in self._decode_shapes
                for greedy in (True, False)
            ),
            *(ProgramSpec("step", 0, chunks) for chunks in shapes),
            *(
                ProgramSpec("step", batch, chunks)
                for batch in limits.mixed_batch_sizes
                for chunks in limits.mixed_chunk_shapes
            ),
            ProgramSpec("step_and_score", limits.max_rows, limits.score_chunks),
            ProgramSpec("set_history"),
            ProgramSpec("set_masks", limits.mask_batch),
        ]

    def first(self) -> list[ProgramSpec]:
        """Returns programs that can stand in for all others, but for prompt log-probabilities."""
        limits = self._limits
        return [
            ProgramSpec("step", limits.max_rows, limits.mixed_chunk_shapes[-1]),
            ProgramSpec.decode(self._decode_shapes[-1], greedy=False),
            ProgramSpec("set_history"),
            ProgramSpec("set_masks", limits.mask_batch),
        ]

    @property
    def progress(self) -> tuple[int, int]:
        """How many of the expected programs are compiled, and how many are expected."""
        return sum(spec in self.compiled for spec in self.expected), len(self.expected)

    def usable(self, best: ProgramSpec, others: Iterable[ProgramSpec]) -> ProgramSpec:
        """Returns a program that need not be waited for.

        Args:
            best: the cheapest program for the work.
            others: programs that can do it too, the cheapest first.

        Returns:
            ``best``; if it is expected and not compiled yet, the first of the others that is compiled.
        """
        if best in self.compiled or best not in self.expected:
            return best
        return next((spec for spec in others if spec in self.compiled), best)

    def get(self, spec: ProgramSpec) -> Any:
        """Returns a program, compiled if it is not yet; waits if another thread is compiling it.

        It is a ``jax.stages.Compiled``, or an :class:`AbsentProgram`.
        """
        if (compiled := self.compiled.get(spec)) is not None:
            return compiled
        with self._lock:
            if (compiled := self.compiled.get(spec)) is not None:
                return compiled
            other = self._compiling.get(spec)
            own = self._compiling[spec] = other or Future()
        if other is not None:
            return other.result()
        try:
            compiled = self._compile(spec)
        except BaseException as error:
            own.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._compiling[spec]
        own.set_result(compiled)
        return compiled

    def _compile(self, spec: ProgramSpec) -> jax.stages.Compiled | AbsentProgram:
        compiled: jax.stages.Compiled | AbsentProgram
        started = time.perf_counter()
        options = _TPU_COMPILER_OPTIONS if self._platform == "tpu" else None
        wait = None if self._compile_elsewhere is None else self._compile_elsewhere(spec)
        with jax.set_mesh(self._mesh):
            lowered = self.lower(spec)
        if is_local(self._mesh):
            compiled = lowered.compile(options)
        else:
            compiled = AbsentProgram(self._mesh, self.program(spec), lowered, spec.donated)
        if wait is not None:
            wait()
        with self._lock:
            self.compiled[spec] = compiled
            count = "program {} of {}: ".format(*self.progress) if spec in self.expected else ""
            log.info("%scompiled %s in %.2f s", count, spec, time.perf_counter() - started)
        return compiled

    def compile(self, specs: Sequence[ProgramSpec]) -> None:
        """Compiles programs, in parallel: XLA compiles outside Python's lock."""
        with ThreadPoolExecutor(min(len(specs), os.cpu_count() or 1)) as pool:
            for compiled in [pool.submit(self.get, spec) for spec in specs]:
                compiled.result()

    def lower(self, spec: ProgramSpec) -> jax.stages.Lowered:
        """Traces a program without compiling it, from shapes alone."""
        program = self.program(spec)
        step, arguments = program.step, (self._state, *program.arguments, *program.inputs)
        if spec.takes_weights:
            step, arguments = self._with_weights(program.step), (self._weights, *arguments)
            step.__name__ = spec.kind  # the program's name in profiles
        # the state comes out in the layout in which it went in, so that it can be donated to the next call
        results = (NamedSharding(self._mesh, result) for result in program.results)
        out_shardings = (self._state.formats(), *results)
        jitted = jax.jit(step, donate_argnums=spec.donated, out_shardings=out_shardings)
        with jax.set_mesh(self._mesh):
            return jitted.lower(*arguments)

    def _with_weights(self, step: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        """Returns a step as a function of flat weights in place of the model."""

        def step_with_weights(weights: Sequence[Any], *arguments: Any) -> tuple[Any, ...]:
            return step(self._graph.merge(weights), *arguments)

        return step_with_weights

    def program(self, spec: ProgramSpec) -> Program:
        """Returns what a program computes, takes and returns."""
        program = self._program(spec)
        if (self._is_first and self._is_last) or not spec.takes_weights:
            return program
        program = replace(program, inputs=(self._input(spec),))
        if not self._is_last:
            return program
        return replace(program, step=steps.with_tokens(program.step), results=(*program.results, REPLICATED))

    def _input(self, spec: ProgramSpec) -> jax.ShapeDtypeStruct:
        """Returns what a stage takes: the last tokens of all slots, or the hidden states of a step."""
        if self._is_first:
            sharding = NamedSharding(self._mesh, REPLICATED)
            return jax.ShapeDtypeStruct((self._limits.max_slots + 1,), np.int32, sharding=sharding)
        sharding = NamedSharding(self._mesh, self.residual_spec(spec))
        shape = self._rows(spec, self._mesh.size), self._config.hidden_size
        return jax.ShapeDtypeStruct(shape, self._dtype, sharding=sharding)

    def _rows(self, spec: ProgramSpec, tp: int) -> int:
        """Returns the tokens of a step over ``tp`` devices, with those that pad it."""
        return steps.padded_tokens(spec.tokens, self.residual_spec(spec, tp), tp)

    def _program(self, spec: ProgramSpec) -> Program:
        """Returns a program as that of a model in one piece."""
        kind, batch, chunks, greedy, blocks = spec
        mesh, limits, residual = self._mesh, self._limits, self.residual_spec(spec)
        if chunks:
            packed, _ = PackedStep.pack([], [], limits, batch, chunks)
        match kind:
            case "layers":
                work = packed if chunks else PackedRows.pack([], limits, batch)
                assert self._following is not None
                alike = self._following.size == mesh.size
                handed = self._rows(spec, self._following.size)
                layers = partial(steps.layers, residual=residual, rows=handed, blocks=blocks)
                # stages of as many devices hand the residual on as it lies
                return Program(layers, (work,), (residual if alike else REPLICATED,))
            case "decode":
                rows = PackedRows.pack([], limits, batch)
                decode = partial(steps.decode, steps=limits.steps, greedy=greedy, mesh=mesh, blocks=blocks)
                return Program(decode, (rows, np.int32(1)), (REPLICATED,))
            case "step":
                step = partial(steps.step, residual=residual, greedy=greedy, mesh=mesh)
                return Program(step, (packed,), (REPLICATED,))
            case "step_and_score":
                both = partial(steps.step_and_score, residual=residual, greedy=greedy, mesh=mesh)
                return Program(both, (packed, packed.token_ids), (REPLICATED, REPLICATED))
            case "score":
                # no process can read what is on the devices of another
                logits = REPLICATED if jax.process_count() > 1 else LOGITS
                return Program(partial(steps.score, residual=residual), (packed,), (logits,))
            case "set_history":
                assert isinstance(self._state, DeviceState)
                shape = self._state.history.bias.shape[1:]
                history = (np.zeros((1, *shape), dtype) for dtype in (np.bool_, np.int32, np.float32))
                return Program(steps.set_history, (np.int32(0), *history), ())
            case "set_masks":
                words = np.zeros((batch, mask_words(self._config.vocab_size)), np.uint32)
                return Program(steps.set_masks, (np.zeros(batch, np.int32), words), ())

    def residual_spec(self, spec: ProgramSpec, tp: int | None = None) -> PartitionSpec:
        """Returns the spec of the residual in a program; without prompt chunks: ``REPLICATED``.

        Args:
            spec: the program.
            tp: devices of another stage, whose residual it then is.
        """
        tp = tp or self._mesh.size
        if spec.chunks is None or tp == 1 or self._sequence_parallel == "off":
            return REPLICATED
        rows = steps.padded_tokens(spec.tokens, SEQUENCE_PARALLEL, tp) // tp
        if self._sequence_parallel == "on" or self._sequence_parallel_pays(rows):
            return SEQUENCE_PARALLEL
        return REPLICATED

    def _sequence_parallel_pays(self, rows: int) -> bool:
        """Returns whether sequence parallelism is faster with ``rows`` of a step's tokens on each device."""
        match self._platform:
            case "tpu":
                return True
            case "gpu":
                return rows * self._config.hidden_size * self._dtype.itemsize >= _GPU_MIN_BYTES
            case _:  # on CPU, XLA has no reduce-scatter: every device would sum it all, then gather it again
                return False
