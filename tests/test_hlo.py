"""What instructions read and write, and how a TPU lays arrays out."""

from __future__ import annotations

import pytest

from tpjax.inspect.hlo import Array, Module, read_arrays, tpu_array


@pytest.mark.parametrize(
    ("printed", "array", "size"),
    (
        ("f32[4,24]{1,0}", Array("f32", (4, 24), (1, 0)), 4 * 24 * 4),
        ("f32[]", Array("f32", ()), 4),
        (
            "bf16[129,1,128,64]{2,3,1,0:T(8,128)(2,1)}",
            Array("bf16", (129, 1, 128, 64), (2, 3, 1, 0), (8, 128)),
            129 * 64 * 128 * 2,
        ),
        ("bf16[8,100]{1,0:T(8,128)(2,1)S(1)}", Array("bf16", (8, 100), (1, 0), (8, 128), 1), 8 * 128 * 2),
        ("pred[9,6144]{1,0:T(8,128)(4,1)}", Array("pred", (9, 6144), (1, 0), (8, 128)), 16 * 6144),
        ("s32[9]{0:T(128)}", Array("s32", (9,), (0,), (128,)), 512),
    ),
)
def test_arrays(printed: str, array: Array, size: int) -> None:
    assert read_arrays(printed) == [array]
    assert array.bytes == size


@pytest.mark.parametrize(
    "printed",  # arguments of programs that libtpu 0.0.42 compiled
    (
        "bf16[4096,768]{1,0:T(8,128)(2,1)}",
        "bf16[576,192]{0,1:T(8,128)(2,1)}",
        "bf16[576,320]{0,1:T(8,128)(2,1)}",
        "bf16[576,384]{1,0:T(8,128)(2,1)}",
        "bf16[16384,576]{0,1:T(8,128)(2,1)}",
        "bf16[129,1,128,64]{2,3,1,0:T(8,128)(2,1)}",
        "bf16[1,4096,28672]{2,1,0:T(8,128)(2,1)}",
        "bf16[576]{0:T(1024)(128)(2,1)}",
        "s32[8,4]{0,1:T(4,128)}",
        "f32[9,6144]{1,0:T(8,128)}",
        "s32[9]{0:T(128)}",
    ),
)
def test_layouts_of_a_tpu(printed: str) -> None:
    (array,) = read_arrays(printed)
    assert tpu_array(array.dtype, array.dims) == array


PAGES = """HloModule m

%gather (p0: bf16[64,128,128], p1: s32[8]) -> bf16[8,128,128] {
  %p0 = bf16[64,128,128]{2,1,0} parameter(0)
  %p1 = s32[8]{0} parameter(1)
  ROOT %g = bf16[8,128,128]{2,1,0} gather(%p0, %p1), slice_sizes={1,128,128}
}

%view (p2: bf16[64,128,128]) -> bf16[64,128,128] {
  %p2 = bf16[64,128,128]{2,1,0} parameter(0)
  ROOT %b = bf16[64,128,128]{2,1,0} bitcast(%p2)
}

%scale (p3: bf16[64,128,128]) -> bf16[64,128,128] {
  %p3 = bf16[64,128,128]{2,1,0} parameter(0)
  %v = bf16[64,128,128]{2,1,0} fusion(%p3), kind=kLoop, calls=%view
  ROOT %m = bf16[64,128,128]{2,1,0} multiply(%v, %v)
}

%update (p4: bf16[64,128,128], p5: bf16[1,128,128], p6: s32[]) -> (bf16[64,128,128], s32[]) {
  %p4 = bf16[64,128,128]{2,1,0} parameter(0)
  %p5 = bf16[1,128,128]{2,1,0} parameter(1)
  %p6 = s32[] parameter(2)
  %d = bf16[64,128,128]{2,1,0} dynamic-update-slice(%p4, %p5, %p6, %p6, %p6)
  ROOT %t = (bf16[64,128,128]{2,1,0}, s32[]) tuple(%d, %p6)
}

ENTRY %main (pages: bf16[64,128,128], rows: s32[8], new: bf16[1,128,128], at: s32[]) -> bf16[8,128,128] {
  %pages = bf16[64,128,128]{2,1,0} parameter(0)
  %rows = s32[8]{0} parameter(1)
  %new = bf16[1,128,128]{2,1,0} parameter(2)
  %at = s32[] parameter(3)
  %taken = bf16[8,128,128]{2,1,0} fusion(%pages, %rows), kind=kCustom, calls=%gather
  %scaled = bf16[64,128,128]{2,1,0} fusion(%pages), kind=kLoop, calls=%scale
  %written = (bf16[64,128,128]{2,1,0}, s32[]) fusion(%pages, %new, %at), kind=kLoop, calls=%update
  ROOT %plain = bf16[64,128,128]{2,1,0} dynamic-update-slice(%pages, %new, %at, %at, %at)
}
"""
PAGE = 128 * 128 * 2


@pytest.mark.parametrize(
    ("name", "read", "written"),
    (
        ("taken", 8 * PAGE, [8 * PAGE]),
        ("scaled", 64 * PAGE, [64 * PAGE]),
        ("written", 0, [PAGE, 4]),
        ("plain", 0, [PAGE]),
    ),
)
def test_slices_and_updates_in_place(name: str, read: int, written: list[int]) -> None:
    module = Module(PAGES)
    instruction = module.computations["main"][name]
    assert module.read("main", "pages", instruction) == read
    assert [size for _, size in module.written(instruction)] == written


def test_a_tuple_in_a_tuple() -> None:
    """A reduction of two arrays beside an update: three arrays, of two operands of the fusion's root."""
    module = Module(
        """HloModule m, is_scheduled=true

%both (p: bf16[64,128,128], n: bf16[1,128,128], i: s32[]) -> ((f32[], s32[]), bf16[64,128,128]) {
  %p = bf16[64,128,128]{2,1,0} parameter(0)
  %n = bf16[1,128,128]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %r = (f32[], s32[]) reduce(%n, %n, %i, %i), dimensions={0,1,2}, to_apply=%best
  %u = bf16[64,128,128]{2,1,0} dynamic-update-slice(%p, %n, %i, %i, %i)
  ROOT %t = ((f32[], s32[]), bf16[64,128,128]{2,1,0}) tuple(%r, %u)
}

ENTRY %main (pages: bf16[64,128,128], new: bf16[1,128,128], at: s32[]) -> bf16[64,128,128] {
  %pages = bf16[64,128,128]{2,1,0} parameter(0)
  %new = bf16[1,128,128]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %f = ((f32[], s32[]), bf16[64,128,128]{2,1,0}) fusion(%pages, %new, %at), kind=kInput, calls=%both
}
"""
    )
    written = module.written(module.computations["main"]["f"])
    assert [size for _, size in written] == [4, 4, PAGE]
