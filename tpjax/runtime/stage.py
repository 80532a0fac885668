"""A stage of a pipeline: some of the model's layers on a mesh of their own, with their cache and programs.

A model in one piece is the case of one stage. Of several, each takes the hidden states of the stage before
and hands its own on; the last one, which is the :class:`tpjax.runtime.runner.Runner`, samples. The tokens
that it has drawn go back to the first stage, on the devices: the host need not have read them.

Stages work at once on different steps: while the second runs a step, the first runs the next one, of other
rows or of the next part of a prompt. A device executes what it is given in order, so that no stage overtakes
another; a step waits only for its own hidden states and, in the first stage, for its rows' last tokens.
Dispatches of several decode steps are given up: the second step would wait for the tokens of the first to
come back through all stages, and all stages would wait with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib import xla_client  # no public call moves arrays as fast: see _copied
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from tpjax import cache as kv
from tpjax.attention import Backend
from tpjax.config import KVDtype, ModelConfig, SequenceParallel
from tpjax.mesh import absent_array, is_local
from tpjax.model import Decoder
from tpjax.runtime.limits import DecodeShape, Limits
from tpjax.runtime.programs import ModelGraph, Programs, ProgramSpec
from tpjax.runtime.rows import PackedRows, PackedStep
from tpjax.runtime.state import DeviceState, StageState
from tpjax.sharding import REPLICATED, SEQUENCE_PARALLEL


class Stage:
    """Some of a model's layers on one mesh.

    Args:
        model: the model, or the part of it that this stage runs, with its weights; or without
            (``abstract_decoder``): its programs can then be compiled, but not called.
        mesh: ``("tp",)``.
        limits: fixed sizes.
        dtype: of activations.
        sequence_parallel: whether prefill shards the residual over positions: ``on``, ``off``, or ``auto``:
            if that is faster.
        compile_elsewhere: as :class:`Programs` takes it.
        kv_dtype: what keys and values are kept in: ``int8``, ``fp8`` (e4m3), or ``auto``: ``dtype``.
        following: the next stage's mesh; ``None``: this stage is the only or the last one.

    Attributes:
        config: the architecture, of the whole model.
        layers: numbers of its layers.
        own_config: the architecture with these layers only.
        mesh: as given.
        following: as given.
        limits: as given.
        dtype: as given.
        kv_dtype: as given.
        backend: what computes attention.
        decode_shapes: what decode steps are compiled for, smallest first.
        weights: flat, in the order of :meth:`ModelGraph.split`.
        programs: the compiled programs.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        limits: Limits,
        dtype: jnp.dtype,
        sequence_parallel: SequenceParallel = "auto",
        compile_elsewhere: Callable[[ProgramSpec], Callable[[], None]] | None = None,
        kv_dtype: KVDtype = "auto",
        following: Mesh | None = None,
    ) -> None:
        self.config: ModelConfig = model.config
        self.layers = model.layer_range
        self.own_config = model.config.of_layers(model.layer_range)
        self.backend: Backend = model.backend
        self.mesh = mesh
        self.following = following
        self.limits = limits
        self.decode_shapes = limits.decode_shapes(self.backend.block_pages)
        self.dtype = jnp.dtype(dtype)
        self.kv_dtype: KVDtype = kv_dtype
        self._graph, self.weights = ModelGraph.split(model)
        self.programs = Programs(
            self._graph,
            self.weights,
            self.abstract_state(),
            self.layers,
            config=model.config,
            mesh=mesh,
            limits=limits,
            decode_shapes=self.decode_shapes,
            dtype=self.dtype,
            sequence_parallel=sequence_parallel,
            following=following,
            compile_elsewhere=compile_elsewhere,
        )
        self._state: Any = None  # allocated at the first dispatch: explain needs no memory

    @property
    def is_first(self) -> bool:
        """Whether it takes tokens."""
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        """Whether it samples."""
        return self.layers.stop == self.config.num_layers

    def decode_shapes_for(self, lengths: Sequence[int]) -> tuple[DecodeShape, ...]:
        """Returns the shapes of decode steps that hold rows, smallest first.

        Args:
            lengths: tokens of each row's sequence once the step has fed it the last one.
        """
        pages, blocks = self.backend.block_pages, 0
        if pages is not None:
            size, most = pages * self.limits.page_size, self.limits.max_model_len
            blocks = sum(-(-min(length, most) // size) for length in lengths)
        return tuple(shape for shape in self.decode_shapes if shape.holds(len(lengths), blocks))

    def own(self, spec: ProgramSpec) -> ProgramSpec:
        """Returns what this stage runs when the last one runs a program."""
        return spec if self.is_last else spec.before_last

    @property
    def model(self) -> Decoder:
        """The model with its weights on the devices."""
        return self._graph.merge(self.weights)

    def abstract_model(self) -> Decoder:
        """Returns the model without its weights: shapes, dtypes, shardings and tensor mappings."""
        return self._graph.merge(
            [jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding) for w in self.weights]
        )

    def abstract_state(self) -> StageState:
        """Returns shapes, dtypes and shardings of the state."""
        cache = kv.abstract(
            self.own_config,
            self.mesh,
            num_pages=self.limits.num_pages,
            page_size=self.limits.page_size,
            dtype=self.dtype,
            windows=self.limits.windows,  # of the whole model
            kv_dtype=self.kv_dtype,
        )
        if not self.is_last:
            return StageState(cache)
        return DeviceState.abstract(cache, self.config.vocab_size, self.mesh, self.limits)

    @property
    def state(self) -> Any:
        """The state on the devices, allocated when first asked for."""
        if self._state is None:
            abstract = self.abstract_state()
            self._state = abstract.zeros() if is_local(self.mesh) else jax.tree.map(_absent, abstract)
        return self._state

    def program(self, spec: ProgramSpec) -> Any:
        """Returns a program as a ``jax.stages.Compiled``, whose types would call every analysis optional."""
        return self.programs.get(spec)

    def run(self, spec: ProgramSpec, *arguments: Any) -> list[Any]:
        """Calls a program on the state and returns its results."""
        program = self.programs.get(spec)
        state, self._state = self.state, None
        results: list[Any]
        try:
            self._state, *results = program(self.weights, state, *arguments)
        except BaseException:  # it may have consumed the state all the same
            state.delete()
            raise
        return results

    def hand_on(self, spec: ProgramSpec, work: PackedRows | PackedStep, inputs: jax.Array) -> jax.Array:
        """Runs the layers for a step of the last stage; returns the hidden states on the next stage's mesh.

        Args:
            spec: the program of the last stage.
            work: its rows, or rows and chunks.
            inputs: what the stage before returned; of the first stage the last tokens of all slots.
        """
        (hidden,) = self.run(self.own(spec), work, inputs)
        return self.send(spec, hidden)

    def hands_on_whole(self, spec: ProgramSpec) -> bool:
        """Whether hidden states that are sharded over tokens are gathered for the next stage."""
        unlike = self.following is not None and self.following.size != self.mesh.size
        return unlike and self.programs.residual_spec(spec) == SEQUENCE_PARALLEL

    def send(self, spec: ProgramSpec, hidden: jax.Array) -> jax.Array:
        """Moves hidden states of a step to the next stage's mesh."""
        assert self.following is not None
        residual = self.programs.residual_spec(spec, self.following.size)
        there: jax.Array = moved(hidden, _sharding(self.following, residual))
        return there

    def free_state(self) -> None:
        """Frees the state; the next dispatch begins with a state of zeros."""
        state, self._state = self._state, None
        if state is not None:
            state.delete()

    def free(self) -> None:
        """Frees state, weights and programs."""
        self.free_state()
        for weight in self.weights:
            weight.delete()
        self.weights = ()
        self.programs.compiled.clear()


def moved(arrays: Any, sharding: NamedSharding) -> Any:
    """Moves arrays to another mesh. Every process that has devices of one of the two has to call it.

    Args:
        arrays: a tree of arrays on one mesh; on another number of devices than the sharding's, replicated.
        sharding: of the other mesh.
    """
    leaves, tree = jax.tree.flatten(arrays)
    source, mesh = leaves[0].sharding.mesh, sharding.mesh
    here, there = is_local(source), is_local(mesh)  # type: ignore[arg-type]
    if source.size == mesh.size and (here or there):
        return jax.tree.unflatten(tree, _copied(leaves, sharding))
    if here != there:  # between processes one copy goes from one device to another: JAX wants as many there
        leaves = _copied([_on_first_device(one) for one in leaves], _on_first(mesh))
    if there:
        return jax.tree.unflatten(tree, jax.device_put(leaves, sharding))
    return jax.tree.map(lambda one: absent_array(one.shape, one.dtype, sharding), arrays)


def _copied(arrays: Sequence[jax.Array], sharding: NamedSharding) -> list[jax.Array]:
    """Copies arrays to the devices of another mesh, each slice to the device at the same place.

    ``jax.device_put`` of arrays of other processes ends here too. For a small array between two devices of a
    CPU it takes 62 us, and this takes 6.
    """
    count = len(arrays)
    copies: list[jax.Array] = xla_client.batched_copy_array_to_devices_with_sharding(
        arrays,
        [sharding._internal_device_list] * count,
        [sharding] * count,
        [xla_client.ArrayCopySemantics.REUSE_INPUT] * count,
    )
    return copies


def _on_first_device(array: jax.Array) -> jax.Array:
    """Returns the copy of a replicated array that the first device of its mesh has."""
    sharding = _on_first(array.sharding.mesh)  # type: ignore[attr-defined]
    (first,) = sharding.device_set
    copies = [shard.data for shard in array.addressable_shards if shard.device == first]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, copies, dtype=array.dtype)


@cache
def _on_first(mesh: Mesh) -> NamedSharding:
    return NamedSharding(Mesh(mesh.devices.flat[:1], mesh.axis_names, axis_types=mesh.axis_types), REPLICATED)


@cache
def _sharding(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """Returns a sharding, the same object each time: that is cheap to make and dear to compare."""
    return NamedSharding(mesh, spec)


def _absent(array: jax.ShapeDtypeStruct) -> jax.Array:
    return absent_array(array.shape, array.dtype, array.sharding)


class Pipeline:
    """The stages before the last, and what moves between all of them.

    Arrays move by ``jax.device_put`` to the sharding that the next stage takes: nothing waits for the host,
    which dispatches all stages of a step one after the other. Stages may be of other processes: each process
    dispatches its own, and the transfers to them and from them; what is elsewhere is an array without a part
    here (:func:`tpjax.mesh.absent_array`).

    Args:
        stages: all but the last.

    Attributes:
        stages: as given.
    """

    def __init__(self, stages: tuple[Stage, ...]) -> None:
        self.stages = stages
        self._drawn = _DrawnTokens(stages[0]) if stages else None

    def compile(self, spec: ProgramSpec) -> Callable[[], None]:
        """Starts to compile what the stages run before a program of the last; returns what waits for it."""
        if not spec.takes_weights:
            return lambda: None
        before = spec.before_last
        pool = ThreadPoolExecutor(len(self.stages))  # XLA compiles outside Python's lock
        compiling = [pool.submit(stage.programs.get, before) for stage in self.stages]
        pool.shutdown(wait=False)

        def wait() -> None:
            for one in compiling:
                one.result()

        return wait

    def run(self, spec: ProgramSpec, work: PackedRows | PackedStep) -> jax.Array:
        """Runs the stages for a step of the last one, and returns the hidden states on its devices."""
        assert self._drawn is not None
        arrays = self._drawn.tokens(work)
        for stage in self.stages:
            arrays = stage.hand_on(spec, work, arrays)
        return arrays

    def results(self, results: list[Any]) -> list[Any]:
        """Returns what a step has drawn or scored where process 0 can read it: on the first stage's mesh."""
        if jax.process_count() == 1:
            return results
        there: list[Any] = moved(results, _sharding(self.stages[0].mesh, REPLICATED))
        return there

    def send_back(self, work: PackedRows | PackedStep, tokens: Int[Array, " slots"]) -> None:
        """Sends the last tokens of all slots to the first stage, after a step has drawn some."""
        assert self._drawn is not None
        self._drawn.keep(work, tokens)

    def lose(self) -> None:
        """Frees the states, and forgets what has been drawn."""
        for stage in self.stages:
            stage.free_state()
        if self._drawn is not None:
            self._drawn.clear()


class _DrawnTokens:
    """The last tokens of all slots on the first stage's devices, as several steps in flight have drawn them.

    A row is fed the token of the last step that drew for its slot. A step that waited for a later one, of
    other rows, would leave its stage idle: so the tokens after each of the last steps are kept.

    Args:
        stage: the first stage.
    """

    def __init__(self, stage: Stage) -> None:
        self._sharding = NamedSharding(stage.mesh, REPLICATED)
        self._spare = stage.limits.max_slots
        self._last: deque[tuple[int, jax.Array]] = deque(maxlen=_KEPT_PER_STAGE * stage.limits.stages)
        self._drawn_at = np.zeros(self._spare + 1, np.int64)  # number of the step that last drew for a slot
        self._steps = 0

    def tokens(self, work: PackedRows | PackedStep) -> jax.Array:
        """Returns the tokens of all slots after the earliest step that has drawn all that a step feeds."""
        if not self._last:
            zeros = np.zeros(self._spare + 1, np.int32)
            return jax.make_array_from_callback(
                zeros.shape, self._sharding, lambda index: zeros[index], dtype=zeros.dtype
            )
        rows = work.rows[: work.batch] if isinstance(work, PackedStep) else work
        needed = self._drawn_at[np.asarray(rows.slots)].max(initial=0)
        return next(tokens for step, tokens in self._last if step >= needed)

    def keep(self, work: PackedRows | PackedStep, tokens: jax.Array) -> None:
        """Keeps the tokens after a step."""
        self._steps += 1
        rows = work.rows if isinstance(work, PackedStep) else work
        self._drawn_at[np.asarray(rows.slots)] = self._steps
        self._drawn_at[self._spare] = 0
        self._last.append((self._steps, moved(tokens, self._sharding)))

    def clear(self) -> None:
        """Forgets everything."""
        self._last.clear()


_KEPT_PER_STAGE = 2  # steps in flight, and those that have just been read
