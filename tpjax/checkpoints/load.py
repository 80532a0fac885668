"""From a checkpoint on disk to a sharded model: every device receives only its slice."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tpjax.checkpoints.gguf import GGUFFile
from tpjax.checkpoints.quantized import dequantized
from tpjax.checkpoints.safetensors import SafetensorsCheckpoint
from tpjax.checkpoints.source import TensorInfo, TensorSource
from tpjax.config import ExpertSharding, ModelConfig
from tpjax.errors import CheckpointError
from tpjax.families import (
    FAMILIES,
    GGUFArchitecture,
    GGUFView,
    config_from_gguf,
    config_from_hf,
    gguf_architecture,
    gguf_name,
)
from tpjax.mappings.fields import Fields
from tpjax.mappings.quantization import quantization_of
from tpjax.model import Decoder
from tpjax.sharding import Layout

_MOST_ROWS_SHOWN = 20


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: nothing but names, shapes and the configuration has been read.

    Attributes:
        path: the directory or file.
        config: the architecture.
        source: its tensors, under canonical names.
    """

    path: Path
    config: ModelConfig
    source: TensorSource

    def with_expert_sharding(self, expert_sharding: ExpertSharding) -> Checkpoint:
        """The same checkpoint, its experts cut as :meth:`ModelConfig.with_expert_sharding` has it."""
        return replace(self, config=self.config.with_expert_sharding(expert_sharding))


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a Hugging Face directory or a GGUF file.

    Raises:
        CheckpointError: it is missing, incomplete or malformed.
        ConfigError: its architecture is not supported.
    """
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{path} is neither a directory nor a .gguf file")
        file = GGUFFile(path)
        architecture = gguf_architecture(str(file.metadata.get("general.architecture")))
        config = config_from_gguf(_gguf_view(file, architecture))
        return Checkpoint(path, config, _GGUFSource(file, config, architecture))
    raw = _read_json(path)
    config = config_from_hf(raw)
    files: TensorSource = SafetensorsCheckpoint(path)
    quantization = quantization_of(Fields(raw))
    if quantization is not None:
        files = dequantized(files, quantization, path)
    return Checkpoint(path, config, _HFSource(files, config))


def read_config(path: Path) -> ModelConfig:
    """Reads the architecture alone: from a directory with a ``config.json``, that file, or a GGUF file."""
    if path.suffix.lower() == ".gguf" and path.is_file():
        return open_checkpoint(path).config
    return config_from_hf(_read_json(path))


def _read_json(path: Path) -> Any:
    """The decoded ``config.json`` of a directory, or that file itself."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json")
    try:
        return json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error


def abstract_decoder(config: ModelConfig, mesh: Mesh, dtype: jnp.dtype) -> Decoder:
    """The model with shapes, dtypes and shardings, and no memory behind them."""
    with jax.set_mesh(mesh):  # a parameter that declares a sharding needs a mesh, even without memory
        model = nnx.eval_shape(lambda: Decoder(config, mesh.size, dtype))
    return _with_values(
        model,
        {
            parameter.path: jax.ShapeDtypeStruct(
                parameter.layout.shape, parameter.dtype, sharding=parameter.sharding
            )
            for parameter in parameters(model, mesh)
        },
    )


@dataclass(frozen=True)
class Parameter:
    """A declared parameter, as the loader and ``explain`` see it.

    Attributes:
        path: attribute names from the model's root.
        layout: what it is made of.
        sharding: where its slices go.
        dtype: stored.
    """

    path: tuple[Any, ...]
    layout: Layout
    sharding: NamedSharding
    dtype: jnp.dtype

    @property
    def name(self) -> str:
        """Dotted path."""
        return ".".join(map(str, self.path))

    @property
    def bytes_per_device(self) -> int:
        """Bytes of one device's slice."""
        return math.prod(self.sharding.shard_shape(self.layout.shape)) * np.dtype(self.dtype).itemsize

    def canonical(self, source: str) -> str:
        """Canonical name of one of the layout's sources: they are relative to the owner's parent."""
        return ".".join(map(str, (*self.path[:-2], source)))


def parameters(model: Decoder, mesh: Mesh) -> list[Parameter]:
    """Every parameter the model declares, in the order of its state's leaves."""
    state = nnx.state(model, nnx.Param)
    shardings = dict(nnx.to_flat_state(nnx.get_named_sharding(state, mesh)))
    return [
        Parameter(path, variable.get_metadata("layout"), shardings[path].get_value(), variable.dtype)
        for path, variable in nnx.to_flat_state(state)
    ]


def load_decoder(checkpoint: Checkpoint, model: Decoder, mesh: Mesh, *, progress: bool = True) -> Decoder:
    """Reads the weights onto the mesh.

    Each device's slice is read and built by itself; the host holds no more than one canonical tensor beyond
    the slices.

    Args:
        checkpoint: from :func:`open_checkpoint`.
        model: from :func:`abstract_decoder`, for the same mesh; it gets the weights.
        mesh: ``("tp",)``.
        progress: show a bar on stderr where that is a terminal.

    Raises:
        CheckpointError: configuration and weights disagree; the message lists every difference.
    """
    declared = parameters(model, mesh)
    check_tensors(checkpoint, declared)
    arrays: dict[tuple[Any, ...], jax.Array] = {}
    with _bar(progress) as bar:
        task = bar.add_task("loading weights", total=len(declared))
        for parameter in declared:
            arrays[parameter.path] = _load(parameter, checkpoint.source)
            bar.advance(task)
    return _with_values(model, arrays)


def _with_values(model: Decoder, values: Mapping[tuple[Any, ...], Any]) -> Decoder:
    state = nnx.state(model, nnx.Param)
    filled = [(path, variable.replace(values[path])) for path, variable in nnx.to_flat_state(state)]
    nnx.update(model, nnx.from_flat_state(filled))
    return model


def check_tensors(checkpoint: Checkpoint, declared: Iterable[Parameter]) -> None:
    """Compares what the model needs with what the checkpoint has, all differences at once.

    Raises:
        CheckpointError: with one line per missing, unexpected or misshapen tensor.
    """
    needed = {
        parameter.canonical(source): shape
        for parameter in declared
        for source, shape in parameter.layout.canonical_shapes().items()
    }
    present = checkpoint.source.tensors
    problems = [f"missing     {name} {list(shape)}" for name, shape in needed.items() if name not in present]
    problems += [
        f"mismatched  {name}: the configuration says {list(shape)}, the file has {list(present[name].shape)}"
        for name, shape in needed.items()
        if name in present and present[name].shape != shape
    ]
    problems += [f"unexpected  {name} {list(present[name].shape)}" for name in present if name not in needed]
    if problems:
        more = len(problems) - _MOST_ROWS_SHOWN
        shown = problems[:_MOST_ROWS_SHOWN] + ([f"… and {more} more"] if more > 0 else [])
        raise CheckpointError(
            f"{checkpoint.path}: configuration and weights disagree on {len(problems)} tensors:\n  "
            + "\n  ".join(shown)
        )


def _load(parameter: Parameter, source: TensorSource) -> jax.Array:
    built: dict[tuple[tuple[int, ...], ...], np.ndarray] = {}
    shape = parameter.layout.shape

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return source.read(parameter.canonical(name), index)

    def slice_for(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or (slice(None),) * len(shape)
        # replicated parameters ask for the same slice once per device: build it once
        key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        if key not in built:
            built.clear()
            built[key] = parameter.layout.read(read, index, np.dtype(parameter.dtype))
        return built[key]

    return jax.make_array_from_callback(shape, parameter.sharding, slice_for)


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


class _HFSource:
    """A safetensors checkpoint under canonical names."""

    def __init__(self, files: TensorSource, config: ModelConfig) -> None:
        self._files = files
        ignored = [re.compile(pattern) for pattern in FAMILIES[config.model_type].ignored]
        if config.tie_word_embeddings:
            ignored.append(re.compile(r"lm_head\.weight"))
        # a bare backbone (AutoModel.save_pretrained) leaves out the prefix
        bare = not any(name.startswith("model.") for name in files.tensors)
        # only `lm_head` stands outside the prefix; another name there is none of the model's
        self._names = {
            name.removeprefix("model.")
            if bare or name.startswith(("model.", "lm_head."))
            else f"<outside model.>{name}": name
            for name in files.tensors
            if not any(pattern.fullmatch(name) for pattern in ignored)
        }
        self.tensors: Mapping[str, TensorInfo] = {
            canonical: files.tensors[name] for canonical, name in self._names.items()
        }

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self._files.read(self._names[name], index)


class _GGUFSource:
    """A GGUF file under canonical names, in Hugging Face's conventions."""

    def __init__(self, file: GGUFFile, config: ModelConfig, architecture: GGUFArchitecture) -> None:
        self._file = file
        self._head_dim = config.head_dim
        self._architecture = architecture
        canonical = {
            gguf: name
            for name in _canonical_names(config, architecture)
            for gguf in [gguf_name(name, architecture)]
        }
        self._names = {canonical.get(name, name): name for name in file.tensors if name != _ROPE_DIVISORS}
        self.tensors: Mapping[str, TensorInfo] = {
            name: file.tensors[gguf] for name, gguf in self._names.items()
        }

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        gguf = self._names[name]
        if self._architecture.interleaved_rope and re.search(r"\.[qk]_proj\.", name):
            return self._read_halves(gguf, index or (slice(None),) * len(self.tensors[name].shape))
        values = self._file.read(gguf, index)
        is_norm = name.endswith("norm.weight")
        return (
            values - self._architecture.norm_offset if is_norm and self._architecture.norm_offset else values
        )

    def _read_halves(self, gguf: str, index: tuple[slice, ...]) -> np.ndarray:
        """Rows of q or k, from the order (pair, half) within a head to (half, pair)."""
        head_dim = self._head_dim
        start, stop, _ = index[0].indices(self._file.tensors[gguf].shape[0])
        first, last = start // head_dim, -(-stop // head_dim)
        heads = self._file.read(gguf, (slice(first * head_dim, last * head_dim), *index[1:]))
        pairs = heads.reshape(last - first, head_dim // 2, 2, *heads.shape[1:])
        return pairs.swapaxes(1, 2).reshape(heads.shape)[start - first * head_dim : stop - first * head_dim]


_ROPE_DIVISORS = "rope_freqs.weight"


def _gguf_view(file: GGUFFile, architecture: GGUFArchitecture) -> GGUFView:
    divisors = None
    if _ROPE_DIVISORS in file.tensors:
        divisors = tuple(float(x) for x in file.read(_ROPE_DIVISORS))
    shapes = {name: info.shape for name, info in file.tensors.items()}
    return GGUFView(architecture.name, file.metadata, shapes, divisors)


def _canonical_names(config: ModelConfig, architecture: GGUFArchitecture) -> list[str]:
    layers = [
        f"layers.{layer}.{name}.{kind}"
        for layer in range(config.num_layers)
        for name in architecture.layer_names
        for kind in ("weight", "bias")
    ]
    return ["embed_tokens.weight", "norm.weight", "lm_head.weight", *layers]
