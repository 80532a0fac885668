"""Loads a checkpoint into a sharded model: every device receives only its slice."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tpjax.checkpoints import agreement, blocks
from tpjax.checkpoints.assemble import Canonical, Order, fill
from tpjax.checkpoints.kept import Kept, StoredSource
from tpjax.checkpoints.opening import Checkpoint
from tpjax.checkpoints.parameters import Parameter, parameters, with_values
from tpjax.checkpoints.rounding import RoundedSource
from tpjax.errors import CheckpointError
from tpjax.mesh import absent_array, is_local
from tpjax.model import Decoder

_MOST_ROWS_SHOWN = 20
# What other tools read how weights are quantised from: NVIDIA ModelOpt, AutoGPTQ, AutoAWQ.
_OTHER_CONFIGURATIONS = ("quantize_config.json", "quant_config.json")


def load_decoder(checkpoint: Checkpoint, model: Decoder, mesh: Mesh, *, progress: bool = True) -> Decoder:
    """Reads the weights onto the mesh: see :func:`load_replicas`."""
    return load_replicas(checkpoint, [[model]], [[mesh]], progress=progress)[0][0]


def load_replicas(
    checkpoint: Checkpoint,
    replicas: Sequence[Sequence[Decoder]],
    meshes: Sequence[Sequence[Mesh]],
    *,
    progress: bool = True,
) -> list[list[Decoder]]:
    """Reads the weights once onto the meshes of several replicas.

    Each device gets only its slice, of its stage's layers; a process reads nothing of stages that are on
    devices of others. Besides the slices, the host holds the parameters
    that are being assembled: at most 128 MiB and one more. Weights that the model keeps in 8 or 4 bits are
    rounded block by block: see :mod:`tpjax.checkpoints.rounding`. An embedding that is the vocabulary
    projection too is read for the first stage and for the last.

    Args:
        checkpoint: from :func:`open_checkpoint`.
        replicas: from :func:`abstract_decoder`, for each replica the stages of the model, which is one unless
            it is a pipeline; they get the weights.
        meshes: ``("tp",)``, for each replica those of its stages; of one stage all are of equal size.
        progress: show a progress bar on stderr if that is a terminal.

    Raises:
        CheckpointError: configuration and weights disagree; the message lists every difference.
    """
    stages = [parameters(*one) for one in zip(replicas[0], meshes[0], strict=True)]
    everything = [parameter for declared in stages for parameter in declared]
    check_tensors(checkpoint, everything)
    source: Canonical = checkpoint.source
    if kept := quantized_tensors(everything):
        source = StoredSource(checkpoint.source, kept)
        if replicas[0][0].quantize is not None:
            source = RoundedSource(checkpoint.source, kept, checkpoint.path)
        for declared in stages:  # last: reading the values finds them
            declared.sort(key=lambda parameter: parameter.is_scales)
    arrays: list[list[dict[tuple[Any, ...], jax.Array]]] = [[{} for _ in stages] for _ in replicas]
    with _bar(progress) as bar:
        task = bar.add_task("loading weights", total=len(everything))
        for number, declared in enumerate(stages):
            if not is_local(meshes[0][number]):
                for parameter in declared:
                    absent = absent_array(parameter.layout.shape, parameter.dtype, parameter.sharding)
                    arrays[0][number][parameter.path] = absent
                bar.advance(task, len(declared))
                continue
            for order in fill(map(_order, declared), source):
                for replica, of_replica in zip(meshes, arrays, strict=True):
                    there = NamedSharding(replica[number], order.what.sharding.spec)
                    array = _array(replace(order.what, sharding=there), order.parts)
                    of_replica[number][order.what.path] = array
                bar.advance(task)
    return [
        [with_values(model, values) for model, values in zip(models, of_replica, strict=True)]
        for models, of_replica in zip(replicas, arrays, strict=True)
    ]


def quantized_tensors(declared: Iterable[Parameter]) -> dict[str, Kept]:
    """Returns the canonical tensors that are kept in 8 or 4 bits."""
    return {
        parameter.canonical(source): Kept(
            (shape[0], shape[1]), parameter.quantized.kept, parameter.quantized.group
        )
        for parameter in declared
        if parameter.quantized is not None and parameter.is_quantized
        for source, shape in parameter.layout.canonical_shapes().items()
    }


def check_tensors(checkpoint: Checkpoint, declared: Iterable[Parameter]) -> None:
    """Compares the tensors that the model needs with those of the checkpoint.

    Raises:
        CheckpointError: they differ; one line per missing, unexpected or mismatched tensor.
    """
    needed = {}
    for parameter in declared:
        if parameter.is_scales:
            continue  # computed while the values are read
        for source, shape in parameter.layout.canonical_shapes().items():
            at = checkpoint.source.locate(parameter.canonical(source))
            needed[at.name] = at.shape(shape)
    present = checkpoint.source.stored
    problems = [f"missing     {name} {list(shape)}" for name, shape in needed.items() if name not in present]
    problems += [
        f"mismatched  {name}: the configuration says {list(shape)}, the file has {list(present[name].shape)}"
        for name, shape in needed.items()
        if name in present and present[name].shape != shape
    ]
    problems += [
        f"mismatched  {name}: {present[name].dtype} is no floating-point number"
        for name in needed
        if name in present and not jnp.issubdtype(present[name].dtype, jnp.floating)
    ]
    rejected, ignored = checkpoint.source.classify([name for name in present if name not in needed], needed)
    problems += [f"unexpected  {name} {list(present[name].shape)}" for name in rejected]
    if not problems:
        agreement.warn_of(checkpoint.path, ignored)
    else:
        more = len(problems) - _MOST_ROWS_SHOWN
        shown = problems[:_MOST_ROWS_SHOWN] + ([f"… and {more} more"] if more > 0 else [])
        if checkpoint.quantization is None:
            others = (name for name in _OTHER_CONFIGURATIONS if (checkpoint.path / name).is_file())
            shown += [f"{name} is not read: config.json has no quantization_config" for name in others]
        raise CheckpointError(
            f"{checkpoint.path}: configuration and weights disagree on {len(problems)} tensors:\n  "
            + "\n  ".join(shown)
        )


def _order(parameter: Parameter) -> Order[Parameter]:
    """Allocates the slices of a parameter on this process's devices; replicas share one array."""
    layout = parameter.layout
    indices = parameter.sharding.addressable_devices_indices_map(layout.shape).values()
    wanted = list(dict.fromkeys(_bounds(index, layout.shape) for index in indices))
    shapes = [tuple(stop - start for start, stop in bounds) for bounds in wanted]
    zeros = any(layout.content(tuple(slice(*bound) for bound in bounds)).zeros for bounds in wanted)
    arrays = blocks.empty(shapes, np.dtype(parameter.dtype), zeros=zeros)
    return Order(parameter, layout, dict(zip(wanted, arrays, strict=True)), parameter.canonical)


def _array(parameter: Parameter, parts: Mapping[tuple[tuple[int, int], ...], np.ndarray]) -> jax.Array:
    """Returns the filled parts as one array over the devices; a CPU device uses its part without a copy."""
    shape, sharding = parameter.layout.shape, parameter.sharding
    return jax.make_array_from_callback(
        shape, sharding, lambda index: parts[_bounds(index, shape)]
    ).block_until_ready()


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    index = index or (slice(None),) * len(shape)
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _bar(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        disable=not (show and sys.stderr.isatty()),
    )
