"""Loads a checkpoint into a sharded model: every device receives only its slice."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as MemoryLayout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tpjax.attention import XLA, Backend
from tpjax.checkpoints import agreement, blocks, digests, orbax
from tpjax.checkpoints.assemble import Canonical, Order, fill
from tpjax.checkpoints.kept import Kept, StoredSource
from tpjax.checkpoints.quantized import Part, dequantized
from tpjax.checkpoints.rounding import RoundedSource
from tpjax.checkpoints.safetensors import MAX_JSON_BYTES, SafetensorsCheckpoint, has_weights
from tpjax.checkpoints.source import TensorInfo, TensorSource, shown
from tpjax.config import ExpertParallel, ModelConfig, Quantize, check_choice
from tpjax.errors import CheckpointError, ConfigError
from tpjax.families.config_reader import Fields
from tpjax.families.family import GGUFArchitecture
from tpjax.families.gguf_metadata import GGUFView
from tpjax.families.quantization import Quantization, quantization_of
from tpjax.families.registry import FAMILIES, config_from_gguf, config_from_hf, gguf_architecture
from tpjax.families.tensor_names import TensorMapping, WeightMap
from tpjax.layers.weights import (
    FormatOf,
    QuantizedParameter,
    WeightFormat,
    dtype_bits,
    quantize_weights,
    rounded_format,
)
from tpjax.mesh import absent_array, is_local
from tpjax.model import Decoder
from tpjax.sharding import Layout, WeightLayout

if TYPE_CHECKING:
    from tpjax.checkpoints.gguf import GGUFFile

log = logging.getLogger(__name__)

_ReadBox: TypeAlias = Callable[[tuple[slice, ...], np.ndarray | None], np.ndarray]
_MOST_ROWS_SHOWN = 20
ENDS = ("embed_tokens.weight", "lm_head.weight")
_LAYER = re.compile(r"layers\.(\d+)(?=\.)")
_OUT_FIRST = {"tpu"}  # platforms that keep a weight stored [in, out] as [out, in] in memory


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: only names, shapes and the configuration have been read.

    Attributes:
        path: the directory or file.
        config: the architecture.
        source: the tensors, by canonical names.
        quantization: how its weights are quantised by its configuration; ``None``: they are not, or it is a
            GGUF file, in which each tensor has a format of its own.
    """

    path: Path
    config: ModelConfig
    source: CanonicalSource
    quantization: Quantization | None = None

    def with_expert_parallel(self, expert_parallel: ExpertParallel) -> Checkpoint:
        """Returns the same checkpoint with :meth:`ModelConfig.with_expert_parallel` applied."""
        return replace(self, config=self.config.with_expert_parallel(expert_parallel))

    def check_quantize(self, quantize: Quantize | None, quantize_head: bool = False) -> None:
        """Checks that weights can be quantised while they are loaded.

        Raises:
            ConfigError: ``quantize`` is not known, the checkpoint's weights are quantised already, or
                ``quantize_head`` would change nothing.
        """
        check_stored(self.path, self.quantization, self.source.format_of, quantize, quantize_head)


def check_quantize(quantize: Quantize | None) -> None:
    """Raises a ``ConfigError`` unless ``quantize`` is ``None`` or known."""
    if quantize is not None:
        check_choice("quantize", quantize, Quantize)


def check_stored(
    where: str | Path,
    quantization: Quantization | None,
    format_of: FormatOf | None,
    quantize: Quantize | None,
    quantize_head: bool,
) -> None:
    """Checks how weights are to be kept against how they are stored: see :meth:`Checkpoint.check_quantize`.

    Args:
        where: the model in error messages.
        quantization: how its configuration says that it is quantised.
        format_of: how it stores canonical tensors.
        quantize: what weights are to be rounded to.
        quantize_head: whether embedding and head are to be quantised.
    """
    check_quantize(quantize)
    if quantize is not None and quantization is not None:
        raise ConfigError(
            f"quantize={quantize!r} would round weights that are quantised already: {where} has them "
            f"as {quantization.described}, and rounding those to {quantize} would lose more of the "
            "original: use quantize=None, which computes with exactly what is stored"
        )
    if quantize_head and quantize is None and not (format_of and any(map(format_of, ENDS))):
        raise ConfigError(
            "quantize_head=True keeps embedding and head as quantize says or as they are stored: "
            f"quantize=None, and {where} does not store them in 8 or 4 bits"
        )


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a Hugging Face directory, an Orbax directory or a GGUF file.

    Raises:
        CheckpointError: it is missing, incomplete or malformed.
        ConfigError: its architecture is not supported.
    """
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{path} is neither a directory nor a .gguf file")
        from tpjax.checkpoints.gguf import GGUFFile  # of a package that is imported where it is needed
        from tpjax.checkpoints.gguf_blocks import GGUFBlocks

        file = GGUFFile(path)
        architecture = gguf_architecture(str(file.metadata.get("general.architecture")))
        config = config_from_gguf(_gguf_view(file, architecture))
        names = architecture.names(config)
        if (
            not config.tie_word_embeddings
        ):  # the format has no such field, and some files hold the embedding twice
            tied = replace(config, tie_word_embeddings=True)
            config = config if CanonicalSource(file, names, tied).has_other_head() else tied
        return _opened(path, config, GGUFBlocks(file), names)
    if orbax.is_orbax(path):
        orbax.check_files(path)
        config, quantization = orbax.read_config(path), orbax.read_quantization(path)
        return _opened_stored(path, config, orbax.OrbaxCheckpoint(path), WeightMap(), quantization)
    return _open_safetensors(path, *_read_hf_config(path))


def _open_safetensors(path: Path, raw: Mapping[str, Any], config: ModelConfig) -> Checkpoint:
    if digests.has_manifest(path):  # `tpjax convert` wrote it
        orbax.check_files(path)
    stored = SafetensorsCheckpoint(path)
    if (path / "adapter_config.json").is_file():
        log.warning("%s: the adapter beside the weights, adapter_config.json, is not applied", path)
    names = FAMILIES[config.model_type].names(config)
    return _opened_stored(path, config, stored, names, quantization_of(Fields(raw)), stored.unlisted)


def _opened_stored(
    path: Path,
    config: ModelConfig,
    files: TensorSource,
    names: WeightMap,
    quantization: Quantization | None,
    unlisted: frozenset[str] = frozenset(),
) -> Checkpoint:
    """Builds the checkpoint of tensors that may be quantised as a configuration says."""
    if quantization is not None:
        files = dequantized(files, quantization, path)
    return replace(_opened(path, config, files, names, unlisted), quantization=quantization)


def _opened(
    path: Path,
    config: ModelConfig,
    files: TensorSource,
    names: WeightMap,
    unlisted: frozenset[str] = frozenset(),
) -> Checkpoint:
    """Builds the checkpoint; a stored head that differs from the embedding unties them."""
    source = CanonicalSource(files, names, config, unlisted)
    agreement.check_sizes(path, config, files.tensors, source.layer)
    if config.tie_word_embeddings and source.has_other_head():
        log.warning(
            "%s: the configuration ties lm_head to the embedding, but another is stored: that is used", path
        )
        config = replace(config, tie_word_embeddings=False)
        source = CanonicalSource(files, names, config, unlisted)
    return Checkpoint(path, config, source)


def read_config(path: Path) -> ModelConfig:
    """Reads the architecture alone: from a directory, a ``config.json``, or a GGUF file.

    If there are weights beside it that cannot be opened, the configuration alone counts.
    """
    if orbax.is_orbax(path):
        return orbax.read_config(path)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return open_checkpoint(path).config
    raw, config = _read_hf_config(path)
    if config.tie_word_embeddings and path.is_dir() and has_weights(path):
        try:
            return _open_safetensors(path, raw, config).config
        except CheckpointError as error:
            log.info("%s: planned by its configuration alone: %s", path, error)
    return config


def read_quantization(path: Path) -> Quantization | None:
    """Returns how the weights of a directory, or of a bare ``config.json``, are quantised, if they are."""
    if orbax.is_orbax(path):
        return orbax.read_quantization(path)
    return quantization_of(Fields(_read_json(path)))


def _read_hf_config(path: Path) -> tuple[Mapping[str, Any], ModelConfig]:
    """Returns ``config.json`` of a directory, or a file like it, as it is and as a configuration."""
    raw = _read_json(path)
    try:
        return raw, config_from_hf(raw)
    except ConfigError as error:
        file, message = path / "config.json" if path.is_dir() else path, str(error)
        raise ConfigError(f"{file}: {message.removeprefix('config.json: ')}") from error


def _read_json(path: Path) -> Any:
    """Returns the decoded ``config.json`` of a directory, or of a file."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json")
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{file}: JSON of {size} bytes, at most {MAX_JSON_BYTES} are read")

    def consistent(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values and values[key] != value:
                raise CheckpointError(f"{file}: key {shown(key)} appears twice, with two values")
            values[key] = value
        return values

    try:
        return json.loads(file.read_text(), object_pairs_hook=consistent)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error


def abstract_decoder(
    config: ModelConfig,
    mesh: Mesh,
    dtype: jnp.dtype,
    quantize: Quantize | None = None,
    backend: Backend = XLA,
    format_of: FormatOf | None = None,
    layers: range | None = None,
    quantize_head: bool = False,
) -> Decoder:
    """Returns the model, or a pipeline stage's part of it, with shapes, dtypes and shardings, without memory.

    Args:
        config: the architecture.
        mesh: ``("tp",)``.
        dtype: dtype of activations, and of weights that are not quantised.
        quantize: what the weights of attention, MLPs and experts are kept in; ``None``: ``dtype``.
        backend: what computes attention.
        format_of: without ``quantize``: how canonical tensors are kept, as a checkpoint stores them.
        layers: numbers of the stage's layers; ``None``: all.
        quantize_head: embedding and head are kept so too, not in ``dtype``.
    """
    first = 0 if layers is None else layers.start

    def kept(name: str) -> WeightFormat | None:
        head = name in ENDS
        if head and not quantize_head:
            return None
        if quantize is not None:
            return rounded_format(quantize, head=head)
        return None if format_of is None else format_of(_renumbered(name, first))

    def declared() -> Decoder:
        model = Decoder(config, mesh.size, dtype, backend, layers)
        model.quantize = quantize
        quantize_weights(model, kept, mesh.size, mesh.devices.flat[0].platform, backend)
        return model

    with jax.set_mesh(mesh):  # a parameter that declares a sharding needs a mesh, even without memory
        model = nnx.eval_shape(declared)
    return _with_values(
        model,
        {
            parameter.path: jax.ShapeDtypeStruct(
                parameter.layout.shape, parameter.dtype, sharding=parameter.format
            )
            for parameter in parameters(model, mesh)
        },
    )


@dataclass(frozen=True)
class Parameter:
    """A declared parameter, as the loader and ``explain`` see it.

    Attributes:
        path: attribute names from the model's root.
        attribute: those of the owning module's attribute: of the values and scales of a quantised weight, the
            weight's.
        layout: the canonical tensors it is made of.
        sharding: the devices of its slices.
        dtype: dtype on the devices.
        quantized: the quantised weight whose values, scales or zero points it holds; ``None``: of none.
        row_major: a TPU keeps it in the order of its layout too.
        first_layer: number of the model's layer that the path calls layer 0.
    """

    path: tuple[Any, ...]
    attribute: tuple[Any, ...]
    layout: Layout
    sharding: NamedSharding
    dtype: jnp.dtype
    quantized: QuantizedParameter | None = None
    row_major: bool = False
    first_layer: int = 0

    @property
    def name(self) -> str:
        """Dotted path."""
        return ".".join(map(str, self.path))

    @property
    def is_quantized(self) -> bool:
        """Whether it holds the values of a quantised weight."""
        return self.quantized is not None and self.path[-1] == "values"

    @property
    def is_scales(self) -> bool:
        """Whether it holds the scales or zero points of a quantised weight."""
        return self.quantized is not None and not self.is_quantized

    @property
    def format(self) -> Format | NamedSharding:
        """The sharding and, on a TPU, the memory layout of weights that are stored transposed.

        A TPU keeps those as the checkpoint has them, [out, in], the layout in which it reads them for the few
        rows of a decode step. Otherwise every step would have a relayout of each: two layers of Llama-3-8B
        and the head take an estimated 0.41 ms on v5e:2x4, not 0.57. On a CPU, products of 2 to 32 rows are
        10 to 40% slower with that layout.
        """
        return Format(MemoryLayout((1, 0)), self.sharding) if self.out_first else self.sharding

    @property
    def out_first(self) -> bool:
        """Whether a weight [in, out] is kept as [out, in] in memory."""
        platform = self.sharding.mesh.devices.flat[0].platform
        transposed = isinstance(self.layout, WeightLayout) and self.layout.transposed
        return platform in _OUT_FIRST and transposed and not self.row_major

    @property
    def bytes_per_device(self) -> int:
        """Bytes of one device's slice."""
        return math.prod(self.sharding.shard_shape(self.layout.shape)) * dtype_bits(self.dtype) // 8

    def canonical(self, source: str) -> str:
        """Returns the canonical name of a source of the layout, which is relative to the owner's parent."""
        return _renumbered(".".join(map(str, (*self.attribute[:-2], source))), self.first_layer)


def _renumbered(name: str, first: int) -> str:
    """Returns the canonical name of a tensor whose layer is numbered from layer ``first``."""
    if not first or not (layer := _LAYER.match(name)):
        return name
    return f"layers.{int(layer[1]) + first}{name[layer.end() :]}"


def parameters(model: Decoder, mesh: Mesh) -> list[Parameter]:
    """Returns every parameter that the model declares, in the order of its state's leaves."""
    state = nnx.state(model, nnx.Param)
    shardings = dict(nnx.to_flat_state(nnx.get_named_sharding(state, mesh)))
    quantized = {
        path: module for path, module in nnx.iter_modules(model) if isinstance(module, QuantizedParameter)
    }

    def declared(path: tuple[Any, ...], variable: nnx.Param) -> Parameter:
        owner = quantized.get(path[:-1])
        return Parameter(
            path,
            path if owner is None else path[:-1],
            variable.get_metadata("layout"),
            shardings[path].get_value(),
            variable.dtype,
            owner,
            variable.get_metadata("row_major"),
            model.layer_range.start,
        )

    return [declared(path, variable) for path, variable in nnx.to_flat_state(state)]


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
        [_with_values(model, values) for model, values in zip(models, of_replica, strict=True)]
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


def _with_values(model: Decoder, values: Mapping[tuple[Any, ...], Any]) -> Decoder:
    state = nnx.state(model, nnx.Param)
    filled = [(path, variable.replace(values[path])) for path, variable in nnx.to_flat_state(state)]
    nnx.update(model, nnx.from_flat_state(filled))
    return model


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
    rejected, ignored = checkpoint.source.classify([name for name in present if name not in needed], needed)
    problems += [f"unexpected  {name} {list(present[name].shape)}" for name in rejected]
    if not problems:
        agreement.warn_of(checkpoint.path, ignored)
    else:
        more = len(problems) - _MOST_ROWS_SHOWN
        shown = problems[:_MOST_ROWS_SHOWN] + ([f"… and {more} more"] if more > 0 else [])
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
    if parameter.out_first:
        shapes = [shape[::-1] for shape in shapes]
    arrays = blocks.empty(shapes, np.dtype(parameter.dtype), zeros=zeros)
    if parameter.out_first:
        arrays = [array.T for array in arrays]
    return Order(parameter, layout, dict(zip(wanted, arrays, strict=True)), parameter.canonical)


def _array(parameter: Parameter, parts: Mapping[tuple[tuple[int, int], ...], np.ndarray]) -> jax.Array:
    """Returns the filled parts as one array over the devices; a CPU device uses its part without a copy."""
    shape, sharding = parameter.layout.shape, parameter.sharding
    if not parameter.out_first:
        return jax.make_array_from_callback(
            shape, sharding, lambda index: parts[_bounds(index, shape)]
        ).block_until_ready()
    # The devices receive [out, in]; the transpose to [in, out] changes only the layout: no byte moves.
    transposed = NamedSharding(sharding.mesh, P(*reversed((*sharding.spec, None)[:2])))
    stored = jax.make_array_from_callback(
        shape[::-1], transposed, lambda index: parts[_bounds(index and index[::-1], shape)].T
    )
    return jax.jit(jnp.transpose, out_shardings=parameter.format)(stored).block_until_ready()


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


class CanonicalSource:
    """A checkpoint's tensors by canonical names.

    Args:
        files: the tensors as they are stored.
        names: the weight map.
        config: the architecture. If it ties embedding and head and only the head is stored, that is both.
        unlisted: names of tensors that the checkpoint's index does not list.

    Attributes:
        stored: the checkpoint's tensors that are not ignored, by its own names.
        layer: matches the beginning of the name of a layer's tensor; its group is the layer's number.
    """

    def __init__(
        self,
        files: TensorSource,
        names: WeightMap,
        config: ModelConfig,
        unlisted: frozenset[str] = frozenset(),
    ) -> None:
        self._files = files
        self._names = names
        self._unlisted = unlisted
        candidates = (*names.prefixes, ("", ""))  # a bare backbone (AutoModel.save_pretrained) has none
        self._parts: Mapping[str, WeightFormat] = getattr(files, "formats", {})
        self._prefix = next(
            (
                prefix
                for probe in ("embed_tokens.weight", "norm.weight")
                for prefix in candidates
                if names.locate(probe, prefix).name in files.tensors
            ),
            candidates[0],
        )
        self._tied = config.tie_word_embeddings
        own, head = (names.locate(name, self._prefix).name for name in ENDS)
        self._embedding = ENDS[self._tied and own not in files.tensors and head in files.tensors]
        self.layer = re.compile(re.escape(f"{self._prefix[0]}{names.layers}.") + r"(\d+)\.")
        ignored = [re.compile(pattern) for pattern in (*names.ignored, *agreement.BUFFERS)]
        if self._tied and self._embedding != ENDS[1]:
            ignored.append(re.compile(re.escape(head)))
        self.stored: Mapping[str, TensorInfo] = {
            name: info
            for name, info in files.tensors.items()
            if not any(pattern.fullmatch(name) for pattern in ignored)
        }

    def locate(self, name: str) -> TensorMapping:
        """Returns the place of a tensor in the checkpoint."""
        return self._names.locate(self._embedding if name == ENDS[0] else name, self._prefix)

    def has_other_head(self) -> bool:
        """Returns whether embedding and head are both stored and differ; reads up to the first difference."""
        own, head = (self._names.locate(name, self._prefix).name for name in ENDS)
        both = own in self._files.tensors and head in self._files.tensors
        return both and not agreement.are_equal(self._files, own, head)

    def classify(self, unexpected: list[str], needed: Collection[str]) -> tuple[list[str], list[str]]:
        """Splits tensors that the model does not need into those to reject and those to ignore."""
        prefixes = {part for pair in (*self._names.prefixes, ("", "")) for part in pair}
        return agreement.rejected_and_ignored(
            unexpected, needed, prefixes, self._names.layers, self._unlisted
        )

    def itemsize(self, name: str) -> int:
        """Returns the bytes of an element in what :meth:`read` returns."""
        return self._files.tensors[self.locate(name).name].dtype.itemsize

    def format_of(self, name: str) -> WeightFormat | None:
        """Returns the format of a tensor that can be kept as it is stored in 8 or 4 bits."""
        at = self.locate(name)
        return None if at.offset or at.heads is not None else self._parts.get(at.name)

    def read_part(self, name: str, part: Part, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a box [out, in] of a kept tensor's values, or [out, groups] of scales or zero points."""

        def read(box: tuple[slice, ...], memory: np.ndarray | None = None) -> np.ndarray:
            files: Any = self._files
            found: np.ndarray = files.read_part(self.locate(name).name, part, box)
            return found

        return self._selected(self.locate(name), index, None, read)

    def outer_axis(self, name: str) -> int:
        """Returns the axis along which a tensor is stored slice after slice: such slices are read fastest."""
        at = self.locate(name)
        stored = self._files.tensors[at.name]
        axes = len(stored.shape) - (at.place is not None)
        return int(axes == 2 and at.heads is None and at.transposed != stored.columns_first)

    def read(self, name: str, index: tuple[slice, ...], memory: np.ndarray | None = None) -> np.ndarray:
        """Reads a slice of a tensor, and no more of the file than it spans there.

        Args:
            name: canonical name.
            index: the slice.
            memory: an array for the result, used if it can be read straight into it.
        """
        at = self.locate(name)
        if at.heads is not None:
            values = self._files.read(at.name).reshape(-1)
            return (values if at.rows is None else values[at.rows])[index]
        read = partial(self._files.read, at.name)
        values = self._selected(at, index, None if at.offset else memory, read)
        return values - at.offset if at.offset else values

    def _selected(
        self, at: TensorMapping, index: tuple[slice, ...], memory: np.ndarray | None, read: _ReadBox
    ) -> np.ndarray:
        """Reads the rows of an index in their order."""
        if at.rows is None:
            return self._ordered(at, index, memory, read)
        wanted = at.rows[index[0]]
        first = int(wanted.min())
        values = self._ordered(at, (slice(first, int(wanted.max()) + 1), *index[1:]), None, read)
        if len(values) != len(wanted) or np.any(np.diff(wanted) != 1):
            values = values[wanted - first]
        return values

    def _ordered(
        self, at: TensorMapping, index: tuple[slice, ...], memory: np.ndarray | None, read: _ReadBox
    ) -> np.ndarray:
        """Reads an index of a tensor that may be transposed, or one of a stack."""
        if at.transposed:
            index, memory = index[::-1], None if memory is None else memory.T
        if at.place is None:
            values = read(index, memory)
        else:
            stacked = None if memory is None else memory[None]
            values = read((slice(at.place, at.place + 1), *index), stacked)[0]
        return values.T if at.transposed else values


def _gguf_view(file: GGUFFile, architecture: GGUFArchitecture) -> GGUFView:
    def divisors(*names: str) -> tuple[float, ...] | None:
        name = next((name for name in names if name in file.tensors), None)
        return None if name is None else tuple(float(x) for x in file.read(name))

    return GGUFView(
        architecture.name,
        file.metadata,
        {name: info.shape for name, info in file.tensors.items()},
        divisors("rope_freqs.weight", "rope_factors_short.weight"),
        divisors("rope_factors_long.weight"),
    )
