"""Keys and values of 8 bits: int8 or float8 e4m3, with one scale for each token and head.

The scale is the largest magnitude of the vector over the largest number of the dtype, so that nothing is
clipped; numbers are rounded to nearest, ties to even. A token is rounded once, when it is written, and by
itself: what the cache returns of it depends on no other token, thus on no chunk, batch or page.

Float8 is kept as bytes: where a processor has no float8, XLA would widen a whole buffer to read a page of it.

A TPU reads rows of 8 bits in tiles of 32 by 128 and writes them in tiles of 8 by 128. Rows that are wider
than a tile lie differently in the two, and XLA would copy a whole buffer to write to it. There a vector of
more than 128 elements is stored in parts, side by side as heads are: see :func:`part_width`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from tpjax.config import KVDtype
from tpjax.mesh import AXIS

QuantizedDtype = Literal["int8", "fp8"]

SCALE_DTYPE = jnp.dtype(jnp.float32)
_FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)
_STORED: dict[QuantizedDtype, jnp.dtype] = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.uint8)}
_LARGEST: dict[QuantizedDtype, float] = {"int8": 127.0, "fp8": float(jnp.finfo(_FLOAT8).max)}
_TILE_WIDTH = {"tpu": 128}  # elements, by platform; elsewhere vectors are whole
_LEAST = 1e-30  # largest magnitude of a vector of zeros: its scale is not 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedBuffer:
    """A buffer of the cache in 8 bits.

    Attributes:
        values: int8, or the bytes of float8 e4m3. KP are the parts of all heads, those of a head one after
            the other; all are equally wide, the last one padded with zeros.
        scales: one for each vector. The pages of a head lie side by side and positions are last, so that no
            memory layout pads them and a TPU writes a page's in place.
        width: elements of a vector, h.
        dtype: dtype in which vectors are returned.
    """

    values: Shaped[Array, "pages KP page_size part"]
    scales: Float[Array, "K pages page_size"]
    width: int = field(metadata={"static": True})
    dtype: jnp.dtype = field(metadata={"static": True})

    @classmethod
    def abstract(
        cls,
        shape: tuple[int, int, int, int],
        kind: QuantizedDtype,
        dtype: jnp.dtype,
        part: int,
        of_values: Any,
        of_scales: Any,
    ) -> QuantizedBuffer:
        """Returns the shapes, dtypes and shardings of a buffer, without the memory.

        Args:
            shape: pages, K, page_size, h.
            kind: what vectors are kept in.
            dtype: dtype in which vectors are returned.
            part: elements of a part of a vector.
            of_values: sharding and memory layout of values.
            of_scales: those of scales.
        """
        num_pages, heads, page_size, width = shape
        values = (num_pages, heads * -(-width // part), page_size, part)
        scales = (heads, num_pages, page_size)
        arrays: dict[str, Any] = {
            "values": jax.ShapeDtypeStruct(values, _STORED[kind], sharding=of_values),
            "scales": jax.ShapeDtypeStruct(scales, SCALE_DTYPE, sharding=of_scales),
        }
        return cls(**arrays, width=width, dtype=dtype)

    @classmethod
    def of(
        cls, vectors: Float[Array, "pages K page_size h"], kind: QuantizedDtype, part: int | None = None
    ) -> QuantizedBuffer:
        """Returns a buffer that holds vectors, in parts of ``part`` elements or whole."""
        values, scales = quantized(vectors, kind)
        width = vectors.shape[-1]
        values = _in_parts(values.swapaxes(1, 2), part or width).swapaxes(1, 2)
        return cls(values, scales.swapaxes(0, 1), width, vectors.dtype)

    @property
    def kind(self) -> QuantizedDtype:
        """What vectors are kept in."""
        return "int8" if self.values.dtype == _STORED["int8"] else "fp8"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the vectors: pages, K, page_size, h."""
        return self.values.shape[0], self.scales.shape[0], self.values.shape[2], self.width

    def read(self, pages: Int[Array, " B"]) -> Float[Array, "B K page_size h"]:
        """Returns one page of each sequence."""
        values = self._joined(self.values.at[pages].get(mode="promise_in_bounds"))
        read = _scales_of
        if self.shape[1] > 1 and not jax.sharding.get_abstract_mesh().empty:
            of_heads, none = PartitionSpec(AXIS), PartitionSpec()
            read = jax.shard_map(
                read, in_specs=(of_heads, none), out_specs=PartitionSpec(None, AXIS), check_vma=False
            )
        return dequantized(values, read(self.scales, pages), self.dtype)

    @property
    def vectors(self) -> Float[Array, "pages K page_size h"]:
        """All vectors, float32: for a small buffer."""
        return dequantized(self._joined(self.values), self.scales.swapaxes(0, 1), SCALE_DTYPE)

    def in_parts(self, values: Shaped[Array, "B S K h"]) -> Shaped[Array, "B S KP part"]:
        """Returns new values as they are stored, parts after parts."""
        return _in_parts(values, self.values.shape[-1])

    def _joined(self, values: Shaped[Array, "n KP page_size part"]) -> Shaped[Array, "n K page_size h"]:
        """Returns the values of pages with their parts side by side."""
        count, _, page_size, part = values.shape
        if part == self.width:
            return values
        values = values.reshape(count, -1, -(-self.width // part), page_size, part).swapaxes(2, 3)
        return values.reshape(count, values.shape[1], page_size, -1)[..., : self.width]

    @property
    def numbers(self) -> Shaped[Array, "pages K page_size h"]:
        """The values as numbers, int8 or float8, where a processor has both."""
        return self.values if self.kind == "int8" else jax.lax.bitcast_convert_type(self.values, _FLOAT8)

    def specs(self, spec: PartitionSpec) -> QuantizedBuffer:
        """Returns the specs of values, sharded as ``spec`` says along K or not at all, and of scales."""
        arrays: dict[str, Any] = {"values": spec, "scales": PartitionSpec(*spec[1:2])}
        return replace(self, **arrays)

    def with_arrays(
        self, values: Shaped[Array, "pages KP page_size part"], scales: Float[Array, "K pages page_size"]
    ) -> QuantizedBuffer:
        """Returns a buffer with other content."""
        return replace(self, values=values, scales=scales)

    def returned(self, x: Float[Array, "*vectors h"]) -> Float[Array, "*vectors h"]:
        """Returns vectors as they are read once they were written."""
        return dequantized(*quantized(x, self.kind), self.dtype)


def part_width(width: int, platform: str) -> int:
    """Returns the elements of a vector that are stored side by side on a platform."""
    return min(width, _TILE_WIDTH.get(platform, width))


def _in_parts(values: Shaped[Array, "B S K h"], part: int) -> Shaped[Array, "B S KP part"]:
    width = values.shape[-1]
    if part == width:
        return values
    padded = jnp.pad(values, ((0, 0),) * 3 + ((0, -width % part),))
    return padded.reshape(*values.shape[:2], -1, part)


def _scales_of(
    scales: Float[Array, "K pages page_size"], pages: Int[Array, " B"]
) -> Float[Array, "B K page_size"]:
    """Returns the scales of pages, on one device: rows of a matrix, for which a TPU moves no more."""
    heads, num_pages, page_size = scales.shape
    rows = scales.reshape(heads * num_pages, page_size)
    at = pages[:, None] + num_pages * jnp.arange(heads)
    return rows.at[at].get(mode="promise_in_bounds")


def quantized(
    x: Float[Array, "*vectors h"], kind: QuantizedDtype
) -> tuple[Shaped[Array, "*vectors h"], Float[Array, "*vectors"]]:
    """Returns the values and scales that are kept of vectors.

    A vector that holds a NaN or an infinity gets a scale that is not a finite number.
    """
    x = x.astype(SCALE_DTYPE)
    # a product, as XLA would make of a division by a constant in some programs and not in others
    scales = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), _LEAST) * (1 / _LARGEST[kind])
    x = x / scales[..., None]
    if kind == "int8":
        return jnp.round(x).astype(_STORED[kind]), scales
    return jax.lax.bitcast_convert_type(x.astype(_FLOAT8), _STORED[kind]), scales


def dequantized(
    values: Shaped[Array, "*vectors h"], scales: Float[Array, "*vectors"], dtype: jnp.dtype
) -> Float[Array, "*vectors h"]:
    """Returns the vectors of values, as they are kept, and scales."""
    if values.dtype == _STORED["fp8"]:
        values = jax.lax.bitcast_convert_type(values, _FLOAT8)
    return (values.astype(SCALE_DTYPE) * scales[..., None]).astype(dtype)


def element_bytes(kv_dtype: KVDtype, dtype: jnp.dtype) -> int:
    """Returns the bytes of an element of the cache; ``auto`` keeps ``dtype``."""
    return jnp.dtype(dtype if kv_dtype == "auto" else _STORED[kv_dtype]).itemsize


def scale_bytes(kv_dtype: KVDtype) -> int:
    """Returns the bytes of the scale of a cached vector; 0: it has none."""
    return 0 if kv_dtype == "auto" else SCALE_DTYPE.itemsize


def vector_bytes(width: int, kv_dtype: KVDtype, dtype: jnp.dtype) -> int:
    """Returns the bytes of a cached vector, scale included.

    Args:
        width: its elements, padding of a memory layout included.
        kv_dtype: what the cache is kept in; ``auto``: ``dtype``.
        dtype: dtype of activations.
    """
    return width * element_bytes(kv_dtype, dtype) + scale_bytes(kv_dtype)
