"""Reads safetensors weights that are stored in 8 or 4 bits: as they are, or dequantised box by box.

Every format is brought to one, ``(values - zeros) * scales``, with a scale for each output and group of
inputs. Dequantising is exact: every product is computed in float32, where a power-of-two scale loses nothing.
For a device's slice only the blocks and scales that it needs are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from tpjax.checkpoints.source import TensorInfo, TensorSource, lookup, shown, to_box
from tpjax.errors import CheckpointError
from tpjax.families.quantization import Quantization
from tpjax.layers.weights import WeightFormat
from tpjax.sharding import SCALE_SUFFIX, ZERO_SUFFIX

Part: TypeAlias = Literal["values", "scales", "zeros"]

_F32 = np.dtype(np.float32)
_BYTES = np.arange(256, dtype=np.uint8)
_E4M3, _E2M1 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float4_e2m1fn)
_U8 = np.dtype(np.uint8)
_BF16, _I8, _I32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.int8), np.dtype(np.int32)
# Values by byte: the look-up converts 540 million values a second, ml_dtypes 170 million.
E4M3_VALUES = _BYTES.view(_E4M3).astype(_F32)
E2M1_VALUES = (_BYTES & 15).view(_E2M1).astype(_F32)
# Of these a byte is an exponent of 2: OCP Microscaling Formats 1.0, whose scales are e8m0.
_MX_BLOCK = (1, 32)
_SCALE_DTYPES = tuple(map(np.dtype, (_F32, ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e8m0fnu)))
_FP4_PER_GROUP = 32
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place of each output's 4 bits in a word of 8 outputs


class QuantizedSource(TensorSource, Protocol):
    """A checkpoint some of whose tensors are stored in 8 or 4 bits; ``read`` dequantises them."""

    @property
    def formats(self) -> Mapping[str, WeightFormat]:
        """The format of each tensor that can be kept as it is stored."""
        ...

    def read_part(self, name: str, part: Part, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a box of a tensor's values, or of its scales or zero points.

        Args:
            name: a key of ``formats``.
            part: what is read.
            index: a slice for each axis of the tensor; along that of the inputs, groups of scales.

        Raises:
            CheckpointError: a scale is no finite number, or a float8 value no number.
        """
        ...


class Encoding(Protocol):
    """How one tensor is stored. Rows are outputs and columns inputs, whatever their order in the file."""

    @property
    def kept(self) -> WeightFormat:
        """The format."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stored tensors."""
        ...

    def values(self, lead: tuple[slice, ...], rows: slice, columns: slice) -> np.ndarray:
        """Reads values [*lead, rows, columns]: int8, float8 e4m3 or float4 e2m1."""
        ...

    def scales(self, lead: tuple[slice, ...], rows: slice, groups: slice) -> np.ndarray:
        """Reads scales [*lead, rows, groups]."""
        ...

    def zeros(self, lead: tuple[slice, ...], rows: slice, groups: slice) -> np.ndarray:
        """Reads zero points, int8."""
        ...


@dataclass(frozen=True)
class Encoded:
    """A tensor that is stored in 8 or 4 bits.

    Attributes:
        encoding: how it is stored.
        shape: logical shape.
        transposed: the logical tensor is [..., in, out].
        by_outputs: the logical tensor is [out, in] also where a family's plain one is [in, out].
    """

    encoding: Encoding
    shape: tuple[int, ...]
    transposed: bool = False
    by_outputs: bool = False

    def read(self, part: Part, box: tuple[slice, ...], called: str) -> np.ndarray:
        """Reads a box of a part; the axis of the inputs counts groups for scales and zero points.

        Args:
            part: what is read.
            box: a slice for each axis of the tensor.
            called: the tensor in error messages.

        Raises:
            CheckpointError: a scale is no finite number, or a float8 value no number.
        """
        *lead, rows, columns = box
        rows, columns = (columns, rows) if self.transposed else (rows, columns)
        found: np.ndarray = getattr(self.encoding, part)(tuple(lead), rows, columns)
        if part == "scales":
            check_scales(found, (*lead, rows, columns), called)
        elif found.dtype == _E4M3:
            _check_float8(found, (*lead, rows, columns), called)
        return found.swapaxes(-1, -2) if self.transposed else found

    def dequantized(self, box: tuple[slice, ...], called: str) -> np.ndarray:
        """Reads a box as float32; see :meth:`read`."""
        *lead, rows, columns = box
        rows, columns = (columns, rows) if self.transposed else (rows, columns)
        inputs = self.shape[-2] if self.transposed else self.shape[-1]
        group = min(self.encoding.kept.group or inputs, inputs)
        groups = slice(columns.start // group, -(-columns.stop // group))
        of_columns = np.arange(columns.start, columns.stop) // group - groups.start
        where = (tuple(lead), rows)
        values = widened(self.encoding.values(*where, columns))
        if self.encoding.kept.zeros:
            values -= self.encoding.zeros(*where, groups).astype(_F32)[..., of_columns]
        scales = self.encoding.scales(*where, groups)
        check_scales(scales, (*lead, rows, groups), called)
        values *= scales.astype(_F32)[..., of_columns]
        return np.ascontiguousarray(values.swapaxes(-1, -2) if self.transposed else values)


def check_scales(scales: np.ndarray, box: tuple[slice, ...], called: str) -> None:
    """Checks that scales are finite numbers.

    Args:
        scales: those of a box of a tensor.
        box: the box.
        called: the tensor in error messages.

    Raises:
        CheckpointError: one is not.
    """
    finite = np.isfinite(scales.astype(_F32))
    if not finite.all():
        first = tuple(np.argwhere(~finite)[0])
        raise CheckpointError(
            f"{called} has a scale that is no finite number: {scales[first]} at {_place(box, first)}"
        )


def _check_float8(values: np.ndarray, box: tuple[slice, ...], called: str) -> None:
    """Checks that no value of a box of a tensor is NaN, which not all backends widen to NaN."""
    magnitudes = values.view(np.uint8) & np.uint8(0x7F)
    if magnitudes.size and magnitudes.max() == 0x7F:
        first = tuple(np.argwhere(magnitudes == 0x7F)[0])
        raise CheckpointError(f"{called} has a value that is no number: nan at {_place(box, first)}")


def _place(box: tuple[slice, ...], at: tuple[int, ...]) -> list[int]:
    return [one.start + int(one_at) for one, one_at in zip(box, at, strict=True)]


def widened(values: np.ndarray) -> np.ndarray:
    """Returns values of 8 or 4 bits as float32."""
    table = {_E4M3: E4M3_VALUES, _E2M1: E2M1_VALUES}.get(values.dtype)
    return values.astype(_F32) if table is None else table[values.view(np.uint8)]


class QuantizedTensors:
    """A checkpoint's tensors, those stored in 8 or 4 bits under their logical names.

    Attributes:
        tensors: their shapes; ``columns_first`` of one in 8 or 4 bits that is [..., in, out].
        formats: see :attr:`QuantizedSource.formats`.
        by_outputs: tensors that are [out, in] whatever a family stores.
    """

    def __init__(self, source: TensorSource, encoded: Mapping[str, Encoded], where: Path) -> None:
        self._source, self._encoded, self._where = source, encoded, where
        parts = {name for one in encoded.values() for name in one.encoding.names}
        self.tensors: Mapping[str, TensorInfo] = {
            name: info for name, info in source.tensors.items() if name not in parts or name in encoded
        } | {name: TensorInfo(one.shape, _F32, one.transposed) for name, one in encoded.items()}
        self.formats: Mapping[str, WeightFormat] = {name: one.encoding.kept for name, one in encoded.items()}
        self.by_outputs = frozenset(name for name, one in encoded.items() if one.by_outputs)

    def read(
        self, name: str, index: tuple[slice, ...] | None = None, memory: np.ndarray | None = None
    ) -> np.ndarray:
        """Reads a tensor or a box of it, dequantised; see ``TensorSource.read``."""
        info = lookup(self.tensors, name, self._where)
        if name not in self._encoded:
            return self._source.read(name, index, memory)
        box = tuple(slice(*bounds) for bounds in to_box(info.shape, index))
        if any(one.start == one.stop for one in box):
            return np.empty([one.stop - one.start for one in box], _F32)
        return self._encoded[name].dequantized(box, self._called(name))

    def read_part(self, name: str, part: Part, index: tuple[slice, ...]) -> np.ndarray:
        """See :meth:`QuantizedSource.read_part`."""
        return self._encoded[name].read(part, index, self._called(name))

    def _called(self, name: str) -> str:
        return f"{self._where}: tensor {shown(name)}"


def dequantized(source: TensorSource, quantization: Quantization, where: Path) -> QuantizedTensors:
    """Returns the checkpoint's tensors with quantised ones as float32 of their logical shape.

    Args:
        source: the tensors as they are stored.
        quantization: how they are quantised.
        where: path of the checkpoint in error messages.

    Raises:
        CheckpointError: values and scales do not fit, or one of the two is missing.
    """
    find = {"mxfp4": _mxfp4_tensors, "gptq": _gptq_tensors, "awq": _awq_tensors}
    reader = _Reader(source, quantization, where)
    if quantization.method == "modelopt" and quantization.bits == 4:
        found = _nvfp4_tensors(reader)
    else:
        found = find.get(quantization.method, _scaled_tensors)(reader)
    for name, one in found.items():
        if name in source.tensors and name not in one.encoding.names:
            raise CheckpointError(
                f"{reader.tensor(one.encoding.names[0])} and {shown(name)} are both there: one of them is to "
                "be used"
            )
    return QuantizedTensors(source, found, where)


@dataclass(frozen=True)
class _Reader:
    """The stored tensors of a quantised checkpoint."""

    source: TensorSource
    quantization: Quantization
    where: Path

    def info(self, name: str) -> TensorInfo | None:
        return self.source.tensors.get(name)

    def tensor(self, name: str) -> str:
        return f"{self.where}: tensor {shown(name)}"

    def ends(self, suffix: str) -> list[str]:
        """Returns the modules that have a tensor of this name."""
        return [name.removesuffix(suffix) for name in self.source.tensors if name.endswith(suffix)]

    def beside(self, name: str, other: str, shape: tuple[int, ...], *dtypes: np.dtype) -> TensorInfo:
        """Returns a tensor that another needs, after a check of its shape and dtype."""
        info = self.info(other)
        if info is None:
            raise CheckpointError(f"{self.tensor(name)} has no {shown(other)} beside it")
        if info.shape != shape:
            raise CheckpointError(
                f"{self.tensor(name)} of shape {list(self.source.tensors[name].shape)} needs {shown(other)} "
                f"of shape {list(shape)}, which has {list(info.shape)}"
            )
        if dtypes and info.dtype not in dtypes:
            raise CheckpointError(
                f"{self.tensor(other)} is {info.dtype}, not {' or '.join(map(str, dtypes))}"
            )
        return info

    def refuse_zeros(self, zero: str, bits: int | None = None) -> None:
        """Checks that there are no zero points but 0, for a method that has none.

        Args:
            zero: the tensor that would have them.
            bits: of each, packed along the first axis; ``None``: they are not packed.
        """
        if self.info(zero) is None:
            return
        stored = self.source.read(zero)
        points = stored if bits is None else _unpacked(stored, bits, 0)
        if np.any(points):
            raise CheckpointError(
                f"{self.tensor(zero)} has zero points from {points.min()} to {points.max()}, and "
                "symmetric=True says that all are 0"
            )


# --- values as they are, with scales beside them: FP8 in blocks, compressed-tensors ------------------------


def _of_activations(name: str) -> Iterator[str]:
    """Returns the names of what quantises a module's inputs and outputs, which stay as they are here."""
    module = name.removesuffix(".weight")
    for part in ("input", "output", "activation"):
        yield from (f"{module}.{part}{suffix}" for suffix in (SCALE_SUFFIX, ZERO_SUFFIX))
    yield f"{module}.input_scale_ub"  # their largest one: fbgemm_fp8
    yield f"{module}.input_global_scale"  # NVFP4


@dataclass(frozen=True)
class _Scaled:
    """Values in float8 or int8 and scales for blocks of them: of one tensor, of each row, or smaller.

    Attributes:
        source: the stored tensors.
        name: the values.
        scale: the scales.
        zero: the zero points; ``None``: all are 0.
        block: rows and columns that share a scale.
        kept: the format: rows of a block have its scale each.
    """

    source: TensorSource
    name: str
    scale: str
    zero: str | None
    block: tuple[int, int]
    kept: WeightFormat

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.scale, f"{self.name}{ZERO_SUFFIX}", *_of_activations(self.name))

    def values(self, lead: tuple[slice, ...], rows: slice, columns: slice) -> np.ndarray:
        return self.source.read(self.name, (*lead, rows, columns))

    def scales(self, lead: tuple[slice, ...], rows: slice, groups: slice) -> np.ndarray:
        stored = self._of_blocks(self.scale, lead, rows, groups)
        exponents = stored.dtype == _U8
        return (stored.view(ml_dtypes.float8_e8m0fnu) if exponents else stored).astype(self.kept.scales)

    def zeros(self, lead: tuple[slice, ...], rows: slice, groups: slice) -> np.ndarray:
        assert self.zero is not None
        return self._of_blocks(self.zero, lead, rows, groups).astype(np.int8)

    def _of_blocks(self, name: str, lead: tuple[slice, ...], rows: slice, groups: slice) -> np.ndarray:
        shape, height = self.source.tensors[name].shape, self.block[0]
        first = rows.start // height
        wanted = slice(first, -(-rows.stop // height))
        if len(shape) == len(lead) + 2:
            part = self.source.read(name, (*lead, wanted, groups))
        elif len(shape) == len(lead) + 4:  # ModelOpt's: blocks of rows, 1, blocks of columns, 1
            part = self.source.read(name, (*lead, wanted, slice(0, 1), groups))[..., 0, :, 0]
        else:  # a number for each row, for each of a stack, or for all of it
            part, stack = self.source.read(name), self.source.tensors[self.name].shape[: len(lead)]
            if part.size == 1:
                part = np.broadcast_to(part.reshape(-1), (*stack, 1))
            part = part.reshape(*stack, -1, 1)[(*lead, wanted)]
        return part[..., np.arange(rows.start, rows.stop) // height - first, :]


def _scaled_tensors(reader: _Reader) -> dict[str, Encoded]:
    quantization = reader.quantization
    found = {}
    for name in reader.ends("_packed"):
        if quantization.is_float:
            shared = None if quantization.block == _MX_BLOCK else f"{name}_global_scale"
            found[name] = _float4_tensor(reader, name, f"{name}_packed", shared, divided=True)
        else:
            found[name] = _packed_tensor(reader, name)
    packed = {part for one in found.values() for part in one.encoding.names}
    for name, info in reader.source.tensors.items():
        if name in packed:
            continue
        scale = next(
            (f"{name}{suffix}" for suffix in ("_scale_inv", "_scale") if reader.info(f"{name}{suffix}")), None
        )
        if scale is None and (info.dtype == _E4M3 or (info.dtype == np.int8 and name.endswith(".weight"))):
            kind = "float8" if info.dtype == _E4M3 else "int8"
            missing = f"{name}{'_scale_inv' if quantization.method == 'fp8' else '_scale'}"
            raise CheckpointError(f"{reader.tensor(name)} is {kind}, but {shown(missing)} is missing")
        if scale is None or name in found:
            continue
        scales, size = reader.source.tensors[scale], info.shape
        if len(size) < 2:
            raise CheckpointError(
                f"{reader.tensor(name)} of shape {list(size)} has no rows and columns to scale"
            )
        stored = _E4M3 if quantization.is_float else _I8
        exponents = quantization.is_float and quantization.block == _MX_BLOCK
        of_scales = (*_SCALE_DTYPES, _U8) if exponents else _SCALE_DTYPES
        if info.dtype != stored or scales.dtype not in of_scales:
            raise CheckpointError(
                f"{reader.tensor(name)} of {info.dtype} with scales of {scales.dtype} is not supported: use "
                f"{stored} with scales of {', '.join(map(str, of_scales))}"
            )
        block = _block_of(reader, name, scale)
        zero = f"{name}{ZERO_SUFFIX}" if quantization.zeros else None
        if zero is not None:
            reader.beside(name, zero, scales.shape, _I8)
        else:
            reader.refuse_zeros(f"{name}{ZERO_SUFFIX}")
        per_output = block[1] >= size[-1]
        kept = WeightFormat(
            jnp.dtype(info.dtype),
            None if per_output else block[1],
            _F32 if per_output else _scale_dtype(scales.dtype),
            zeros=zero is not None,
        )
        found[name] = Encoded(_Scaled(reader.source, name, scale, zero, block, kept), size)
    return found


def _block_of(reader: _Reader, name: str, scale: str) -> tuple[int, int]:
    """Returns the rows and columns that share a scale, as the configuration and the scales' shape say."""
    info, scales = reader.source.tensors[name], reader.source.tensors[scale]
    *lead, rows, columns = info.shape
    block, whole = reader.quantization.block, (rows, columns)
    block = block if reader.quantization.block_given or scales.shape not in ((), (1,)) else None
    if block is None and scales.shape in ((), (1,), tuple(lead), (*lead, 1), (*lead, 1, 1)):
        return whole
    if block is None and scales.shape in ((*lead, rows), (*lead, rows, 1)):
        return 1, columns
    if block is None:
        raise CheckpointError(
            f"{reader.tensor(name)} of shape {list(info.shape)} needs one scale or one for each of {rows} "
            f"outputs: {shown(scale)} has shape {list(scales.shape)}"
        )
    height, width = block
    grid = (*lead, -(-rows // height), -(-columns // width))
    if scales.shape not in (grid, (*grid[:-1], 1, grid[-1], 1)):
        raise CheckpointError(
            f"{reader.tensor(name)} of shape {list(info.shape)} in blocks of {[height, width]} needs scales "
            f"of shape {list(grid)}, {shown(scale)} has {list(scales.shape)}"
        )
    return height, width


def _scale_dtype(dtype: np.dtype) -> jnp.dtype:
    """Returns the dtype that scales are kept in: powers of two in bfloat16, which holds them."""
    return jnp.dtype(jnp.bfloat16 if dtype in (_U8, np.dtype(ml_dtypes.float8_e8m0fnu)) else dtype)


# --- integers packed in words: compressed-tensors, GPTQ, AWQ -----------------------------------------------


def _unpacked(words: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Unpacks words of 32 bits along an axis, the lowest bits first, to numbers less 2**(bits - 1), int8.

    Args:
        words: int32.
        bits: bits of a number.
        axis: axis along which numbers follow each other.
        order: place of each number of a word in it.
    """
    count = 32 // bits
    shifts = np.array(order or range(count), np.uint32) * np.uint32(bits)
    spread = np.expand_dims(words.view(np.uint32), axis + 1) >> shifts.reshape(
        -1, *[1] * (words.ndim - 1 - axis)
    )
    numbers = (spread & np.uint32(2**bits - 1)).astype(np.int16) - 2 ** (bits - 1)
    shape = [size * count if i == axis else size for i, size in enumerate(words.shape)]
    return numbers.astype(np.int8).reshape(shape)


@dataclass(frozen=True)
class _Packed:
    """Integers packed along one axis, scales and packed zero points.

    Attributes:
        source: the stored tensors.
        names: the values, packed along ``axis`` of [out, in], and all other tensors of the weight.
        scale: the scales.
        zero: the zero points, packed along the outputs; ``None``: all are 2**(bits - 1).
        bits: of a number.
        axis: packed axis of the values, 0 or 1.
        inputs_first: values, scales and zero points are stored [in, out].
        order: place of each number of a word in it.
        kept: the format.
        shift: is added to each stored zero point, as to one number of a word: what goes beyond its bits is
            carried on to the next, as GPTQModel took it from there (``convert_gptq_v2_to_v1_format``).
    """

    source: TensorSource
    names: tuple[str, ...]
    scale: str
    zero: str | None
    bits: int
    axis: int
    inputs_first: bool
    kept: WeightFormat
    order: tuple[int, ...] | None = None
    shift: int = 0

    def values(self, lead: tuple[slice, ...], rows: slice, columns: slice) -> np.ndarray:
        return self._integers(self.names[0], self.axis, rows, columns)

    def scales(self, lead: tuple[slice, ...], rows: slice, groups: slice) -> np.ndarray:
        return self._box(self.scale, rows, groups).astype(self.kept.scales)

    def zeros(self, lead: tuple[slice, ...], rows: slice, groups: slice) -> np.ndarray:
        assert self.zero is not None
        shifts = sum(self.shift << place for place in range(0, 32, self.bits))
        return self._integers(self.zero, 0, rows, groups, np.uint32(shifts))

    def _box(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        if self.inputs_first:
            return self.source.read(name, (columns, rows)).T
        return self.source.read(name, (rows, columns))

    def _integers(
        self, name: str, axis: int, rows: slice, columns: slice, shifts: np.uint32 | None = None
    ) -> np.ndarray:
        count, box = 32 // self.bits, [rows, columns]
        first = box[axis].start // count
        box[axis] = slice(first, -(-box[axis].stop // count))
        stored = np.ascontiguousarray(self._box(name, *box))
        if shifts:
            stored = stored.view(np.uint32) + shifts
        numbers = _unpacked(stored, self.bits, axis, self.order)
        wanted = [slice(None), slice(None)]
        original = (rows, columns)[axis]
        wanted[axis] = slice(original.start - first * count, original.stop - first * count)
        return numbers[tuple(wanted)]


def _packed_tensor(reader: _Reader, name: str) -> Encoded:
    """compressed-tensors' pack-quantized: [out, in / 8] words, ``N_shape`` with the sizes."""
    quantization, packed, scale = reader.quantization, f"{name}_packed", f"{name}_scale"
    bits, stored = quantization.bits, reader.source.tensors[f"{name}_packed"]
    if len(stored.shape) != 2 or stored.dtype != _I32:
        raise CheckpointError(
            f"{reader.tensor(packed)} of {stored.dtype} and shape {list(stored.shape)} is no matrix of int32"
        )
    reader.beside(packed, f"{name}_shape", (2,), _I32, np.dtype(np.int64))
    rows, columns = (int(size) for size in reader.source.read(f"{name}_shape"))
    count = 32 // bits
    if (rows, -(-columns // count)) != stored.shape:
        raise CheckpointError(
            f"{reader.tensor(packed)} of shape {list(stored.shape)} has {count} numbers a word: "
            f"{shown(f'{name}_shape')} says [{rows}, {columns}]"
        )
    group = columns if quantization.block is None else quantization.block[1]
    groups = -(-columns // group)
    scales = reader.beside(packed, scale, (rows, groups), *_SCALE_DTYPES)
    zero = f"{name}{ZERO_SUFFIX}" if quantization.zeros else None
    if zero is not None:
        reader.beside(packed, zero, (-(-rows // count), groups), _I32)
    else:
        reader.refuse_zeros(f"{name}{ZERO_SUFFIX}", bits)
    if (order := reader.info(f"{name}_g_idx")) is not None:
        raise CheckpointError(
            f"{reader.tensor(f'{name}_g_idx')} of shape {list(order.shape)} puts inputs in another order "
            "(actorder), which is not supported"
        )
    kept = _integer_format(
        bits, None if quantization.block is None else group, scales.dtype, zero is not None
    )
    names = (packed, scale, f"{name}_shape", f"{name}{ZERO_SUFFIX}", *_of_activations(name))
    packing = _Packed(reader.source, names, scale, zero, bits, 1, False, kept)
    return Encoded(packing, (rows, columns))


def _integer_format(bits: int, group: int | None, scales: np.dtype, zeros: bool) -> WeightFormat:
    kind = jnp.dtype(jnp.int4 if bits == 4 else jnp.int8)
    return WeightFormat(kind, group, _F32 if group is None and not zeros else _scale_dtype(scales), zeros)


def _gptq_tensors(reader: _Reader) -> dict[str, Encoded]:
    """[in / 8, out] words, ``scales`` and packed ``qzeros`` [groups, out], and the group of each input."""
    return {
        f"{module}.weight": _words_tensor(reader, module, packed_inputs=True)
        for module in reader.ends(".qweight")
    }


def _awq_tensors(reader: _Reader) -> dict[str, Encoded]:
    """[in, out / 8] words in AWQ's order, ``scales`` and packed ``qzeros`` [groups, out]."""
    return {
        f"{module}.weight": _words_tensor(reader, module, packed_inputs=False)
        for module in reader.ends(".qweight")
    }


def _words_tensor(reader: _Reader, module: str, *, packed_inputs: bool) -> Encoded:
    quantization, name = reader.quantization, f"{module}.qweight"
    names = (name, *(f"{module}.{part}" for part in ("scales", "qzeros", "g_idx")[: 2 + packed_inputs]))
    stored, count = reader.source.tensors[name], 32 // quantization.bits
    if len(stored.shape) != 2 or stored.dtype != _I32:
        raise CheckpointError(
            f"{reader.tensor(name)} of {stored.dtype} and shape {list(stored.shape)} is no matrix of int32"
        )
    inputs, outputs = (
        size * (count if packed else 1)
        for size, packed in zip(stored.shape, (packed_inputs, not packed_inputs), strict=True)
    )
    group = inputs if quantization.block is None else quantization.block[1]
    groups = -(-inputs // group)
    scales = reader.beside(name, names[1], (groups, outputs), *_SCALE_DTYPES)
    reader.beside(name, names[2], (groups, -(-outputs // count)), _I32)
    if packed_inputs and reader.info(names[3]) is not None:
        reader.beside(name, names[3], (inputs,), _I32)
        if not np.array_equal(reader.source.read(names[3]), np.arange(inputs) // group):
            raise CheckpointError(
                f"{reader.tensor(names[3])} puts inputs in another order than groups of {group} "
                "(act-order), which is not supported"
            )
    kept = _integer_format(
        quantization.bits, None if quantization.block is None else group, scales.dtype, True
    )
    order = None if packed_inputs else _AWQ_ORDER
    packing = _Packed(
        reader.source,
        names,
        names[1],
        names[2],
        quantization.bits,
        int(packed_inputs),
        True,
        kept,
        order,
        quantization.zero_shift,
    )
    return Encoded(packing, (outputs, inputs), by_outputs=True)


# --- MXFP4 and NVFP4 ---------------------------------------------------------------------------------------


def _codes(pairs: np.ndarray) -> np.ndarray:
    """Returns the two values of each byte along a new last axis, the low half first."""
    return np.stack([pairs & 15, pairs >> 4], axis=-1).view(_E2M1)


_MXFP4_FORMAT = WeightFormat(jnp.dtype(jnp.float4_e2m1fn), _FP4_PER_GROUP, jnp.dtype(jnp.bfloat16))


@dataclass(frozen=True)
class _MXFP4:
    """``N_blocks`` [E, out, groups, 16] and ``N_scales`` [E, out, groups].

    A byte holds two neighbours along the input axis, the low half first, and 32 values share the scale
    ``2**(scale - 127)``.
    """

    source: TensorSource
    names: tuple[str, ...]
    kept: WeightFormat = _MXFP4_FORMAT

    def values(self, lead: tuple[slice, ...], rows: slice, columns: slice) -> np.ndarray:
        first, last = columns.start // _FP4_PER_GROUP, -(-columns.stop // _FP4_PER_GROUP)
        pairs = self.source.read(self.names[0], (*lead, rows, slice(first, last)))
        codes = _codes(pairs)
        flat = codes.reshape(*codes.shape[: len(lead) + 1], -1)
        return flat[..., columns.start - first * _FP4_PER_GROUP : columns.stop - first * _FP4_PER_GROUP]

    def scales(self, lead: tuple[slice, ...], rows: slice, groups: slice) -> np.ndarray:
        stored = self.source.read(self.names[1], (*lead, rows, groups))
        return stored.view(ml_dtypes.float8_e8m0fnu).astype(_BF16)

    def zeros(self, lead: tuple[slice, ...], rows: slice, groups: slice) -> np.ndarray:
        raise NotImplementedError


def _mxfp4_tensors(reader: _Reader) -> dict[str, Encoded]:
    """The logical tensors are [E, in, out], as transformers keeps the experts of gpt-oss."""
    found = {}
    for name in reader.ends("_blocks"):
        names = (f"{name}_blocks", f"{name}_scales")
        blocks, scales = map(reader.info, names)
        tensor = reader.tensor(names[0])
        if blocks is None or scales is None:
            raise CheckpointError(f"{tensor} has no {shown(names[1])} beside it")
        if blocks.dtype != np.uint8 or scales.dtype != np.uint8:
            raise CheckpointError(
                f"{tensor} is {blocks.dtype} and its scales {scales.dtype}: both must be uint8"
            )
        if len(blocks.shape) != 4 or blocks.shape[-1] != _FP4_PER_GROUP // 2:
            raise CheckpointError(
                f"{tensor} has shape {list(blocks.shape)}, not [experts, rows, groups, {_FP4_PER_GROUP // 2}]"
            )
        if scales.shape != blocks.shape[:-1]:
            raise CheckpointError(
                f"{tensor} of shape {list(blocks.shape)} needs scales of shape {list(blocks.shape[:-1])}, "
                f"{shown(names[1])} has {list(scales.shape)}"
            )
        experts, rows, groups, _ = blocks.shape
        shape = (experts, groups * _FP4_PER_GROUP, rows)
        found[name] = Encoded(_MXFP4(reader.source, names), shape, transposed=True)
    return found


@dataclass(frozen=True)
class _Float4:
    """Values of e2m1, two a byte, and scales of e4m3 with a number for all (NVFP4), or of e8m0 (MXFP4).

    A byte holds two neighbours along the input axis, the low half first.

    Attributes:
        source: the stored tensors.
        names: the values [..., out, in / 2], the scales [..., out, groups] and all others of the weight.
        shared: the number for all; ``None``: there is none.
        divided: scales are divided by it, as compressed-tensors does; else multiplied, as ModelOpt does. Both
            round to float32 once.
        kept: the format.
    """

    source: TensorSource
    names: tuple[str, ...]
    shared: str | None
    divided: bool
    kept: WeightFormat

    def values(self, lead: tuple[slice, ...], rows: slice, columns: slice) -> np.ndarray:
        first = columns.start // 2
        codes = _codes(self.source.read(self.names[0], (*lead, rows, slice(first, -(-columns.stop // 2)))))
        flat = codes.reshape(*codes.shape[:-2], -1)
        return flat[..., columns.start - 2 * first : columns.stop - 2 * first]

    def scales(self, lead: tuple[slice, ...], rows: slice, groups: slice) -> np.ndarray:
        stored = self.source.read(self.names[1], (*lead, rows, groups))
        if self.shared is None:
            return stored.view(ml_dtypes.float8_e8m0fnu).astype(_BF16)
        scales, shared = E4M3_VALUES[stored.view(np.uint8)], self.source.read(self.shared).reshape(())
        with np.errstate(all="ignore"):  # what is no finite number is found by `check_scales`
            return scales / shared if self.divided else scales * shared

    def zeros(self, lead: tuple[slice, ...], rows: slice, groups: slice) -> np.ndarray:
        raise NotImplementedError


def _float4_tensor(
    reader: _Reader, name: str, values: str, shared: str | None, *, divided: bool = False
) -> Encoded:
    assert reader.quantization.block is not None
    group, info, tensor = reader.quantization.block[1], reader.source.tensors[values], reader.tensor(values)
    if info.dtype != np.uint8 or len(info.shape) < 2:
        raise CheckpointError(
            f"{tensor} of {info.dtype} and shape {list(info.shape)} is no matrix of uint8, 2 values each"
        )
    *lead, rows, pairs = info.shape
    grid = (*lead, rows, -(-2 * pairs // group))
    reader.beside(values, f"{name}_scale", grid, _U8 if shared is None else _E4M3)
    if shared is not None:
        number = reader.info(shared)
        if number is None:
            raise CheckpointError(f"{tensor} has no {shown(shared)} beside it")
        if number.shape not in ((), (1,)) or number.dtype != _F32:
            raise CheckpointError(
                f"{reader.tensor(shared)} of {number.dtype} and shape {list(number.shape)} is not one number "
                "of float32"
            )
    of_all = () if shared is None else (shared,)
    names = (values, f"{name}_scale", *of_all, f"{name}_shape", *_of_activations(name))
    scales = jnp.dtype(jnp.bfloat16 if shared is None else jnp.float32)
    kept = WeightFormat(jnp.dtype(jnp.float4_e2m1fn), group, scales)
    return Encoded(_Float4(reader.source, names, shared, divided, kept), (*lead, rows, 2 * pairs))


def _nvfp4_tensors(reader: _Reader) -> dict[str, Encoded]:
    """ModelOpt's: the number for all is ``N_scale_2``."""
    found = {}
    for name in reader.ends("_scale_2"):
        if reader.info(name) is None:
            raise CheckpointError(f"{reader.tensor(f'{name}_scale_2')} has no {shown(name)} beside it")
        found[name] = _float4_tensor(reader, name, name, f"{name}_scale_2")
    for name, info in reader.source.tensors.items():
        if info.dtype == np.uint8 and name.endswith(".weight") and name not in found:
            raise CheckpointError(
                f"{reader.tensor(name)} is uint8, but {shown(f'{name}_scale_2')} is missing"
            )
    return found
