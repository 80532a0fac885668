"""Reading collectives out of compiled programs: recorded ones, in every form XLA prints, and live ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tpjax.inspect.collectives import Collective, find_collectives, summarise
from tpjax.mesh import make_mesh

ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""


def module(body: str, *computations: str) -> str:
    """A module as ``Compiled.as_text()`` prints it, source tables and reductions included."""
    tables = 'FileNames\n1 "x.py"\n\nStackFrames\n1 {file_location_id=1 parent_frame_id=1}\n'
    header = (
        "HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4,2]{1,0})->f32[4,24]{1,0}}\n"
    )
    entry = (
        "ENTRY %main.0_spmd (param: f32[4,2], param.1: f32[2,24]) -> f32[4,24] {\n"
        + body.strip("\n")
        + "\n}\n"
    )
    return "\n".join((header, tables, ADD, *computations, entry))


def only(line: str) -> Collective:
    (found,) = find_collectives(module("  " + line))
    return found


def brief(found: list[Collective]) -> list[tuple[str, str, int, int, int, bool]]:
    return [(c.kind, c.shapes, c.bytes, c.group_size, c.count, c.conditional) for c in found]


def test_nothing_moves() -> None:
    assert find_collectives(module("  ROOT %p = f32[4,24]{1,0} parameter(0)")) == []
    assert find_collectives("") == []


# --- one line each -----------------------------------------------------------------------------------------

ALL_REDUCE = (
    "ROOT %all-reduce = f32[4,24]{1,0} all-reduce(%ynn_fusion), channel_id=1, replica_groups=@, "
    'use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(f)/dot_general" stack_frame_id=3}'
)


@pytest.mark.parametrize(
    ("groups", "size"),
    (
        ("{{0,1,2,3,4,5,6,7}}", 8),
        ("{{0,1,2},{3,4,5}}", 3),
        ("{{0},{1}}", 1),
        ("[2,4]<=[8]", 4),  # iota: two groups of four
        ("[1,8]<=[8]", 8),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=1,'axis_1'=8] {'axis_1'}", 8),  # jax 0.10.2 prints partitioned products like this
        ("mesh['axis_0'=8] {'axis_0'}", 8),  # jax 0.12
        ("mesh['tp'=8] {'tp'}", 8),
        ("mesh['dp'=2,'tp'=4] {'tp'}", 4),
        ("mesh['dp'=2,'tp'=4] {'dp','tp'}", 8),
        ("{}", 0),  # all devices, and the line does not say how many
    ),
)
def test_group_sizes(groups: str, size: int) -> None:
    one = only(ALL_REDUCE.replace("@", groups))
    assert one == Collective("all-reduce", "f32[4,24]", 4 * 24 * 4, size, 1, False, "jit(f)/dot_general")


@pytest.mark.parametrize(
    ("line", "kind", "shapes", "size"),
    (
        (
            "%all_gather.5 = f32[8,4]{1,0} all-gather(%bitcast), replica_groups={{0,1}}, dimensions={0}",
            "all-gather", "f32[8,4]", 128,
        ),
        (
            "%reduce_scatter.10 = f32[1,3]{1,0} reduce-scatter(%param.1), replica_groups={{0,1}}, "
            "dimensions={0}, to_apply=%add",
            "reduce-scatter", "f32[1,3]", 12,
        ),
        (
            "%ppermute.3 = bf16[8,3]{1,0:T(8,128)(2,1)} collective-permute(%param.1), channel_id=1, "
            "source_target_pairs={{0,1},{1,0}}",
            "collective-permute", "bf16[8,3]", 48,
        ),
        (
            "%all-to-all = (f32[1,3]{1,0}, f32[1,3]{1,0}, /*index=2*/f32[1,3]{1,0}) all-to-all("
            "%a, %b, /*index=2*/%c), "
            "replica_groups={{0,1,2}}",
            "all-to-all", "f32[1,3] f32[1,3] f32[1,3]", 36,
        ),
        (
            "%all-reduce = (f32[], bf16[3]{0}) all-reduce(%a, %b), replica_groups={{0,1}}, to_apply=%add",
            "all-reduce", "f32[] bf16[3]", 10,
        ),
        (
            "%cb = s32[5]{0} collective-broadcast(%a), replica_groups={{0,1}}",
            "collective-broadcast", "s32[5]", 20,
        ),
        (
            "%ag = pred[16]{0} all-gather(%a), replica_groups={{0,1}}, dimensions={0}",
            "all-gather", "pred[16]", 16,
        ),
        (
            "%ag = s4[16]{0:E(4)} all-gather(%a), replica_groups={{0,1}}, dimensions={0}",
            "all-gather", "s4[16]", 8,
        ),
        (
            "%ag = f8e4m3fn[16,2]{1,0} all-gather(%a), replica_groups={{0,1}}, dimensions={0}",
            "all-gather", "f8e4m3fn[16,2]", 32,
        ),
    ),
)  # fmt: skip
def test_kinds_and_bytes(line: str, kind: str, shapes: str, size: int) -> None:
    one = only(line)
    assert (one.kind, one.shapes, one.bytes, one.count) == (kind, shapes, size, 1)


@pytest.mark.parametrize(
    ("start", "done", "kind", "shapes", "size"),
    (
        (
            "%s = f32[4,24]{1,0} all-reduce-start(%p), channel_id=1, replica_groups={{0,1}}, to_apply=%add",
            "%d = f32[4,24]{1,0} all-reduce-done(%s)",
            "all-reduce", "f32[4,24]", 384,
        ),
        (  # two arrays in one
            "%s = (f32[4]{0}, f32[2]{0}) all-reduce-start(%p, %q), replica_groups={{0,1}}, to_apply=%add",
            "%d = (f32[4]{0}, f32[2]{0}) all-reduce-done(%s)",
            "all-reduce", "f32[4] f32[2]", 24,
        ),
        (  # (operand, result)
            "%s = (f32[1,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%p), "
            "replica_groups=[1,8]<=[8], dimensions={0}",
            "%d = f32[8,4]{1,0} all-gather-done(%s)",
            "all-gather", "f32[8,4]", 128,
        ),
        (
            "%s = ((f32[1,4]{1,0}, s32[1]{0}), (f32[8,4]{1,0}, s32[8]{0})) all-gather-start(%p, %q), "
            "replica_groups=[1,8]<=[8], dimensions={0}",
            "%d = (f32[8,4]{1,0}, s32[8]{0}) all-gather-done(%s)",
            "all-gather", "f32[8,4] s32[8]", 160,
        ),
        (
            "%s = (f32[8,3]{1,0}, f32[8,3]{1,0}) collective-permute-start(%p), "
            "source_target_pairs={{0,1},{1,0}}",
            "%d = f32[8,3]{1,0} collective-permute-done(%s)",
            "collective-permute", "f32[8,3]", 96,
        ),
        (  # TPU: two context words after operand and result
            "%s = (f32[8,3]{1,0:T(8,128)}, f32[8,3]{1,0:T(8,128)}, u32[]{:S(2)}, u32[]{:S(2)}) "
            "collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
            "%d = f32[8,3]{1,0:T(8,128)} collective-permute-done(%s)",
            "collective-permute", "f32[8,3]", 96,
        ),
    ),
)  # fmt: skip
def test_asynchronous_pairs_count_once(start: str, done: str, kind: str, shapes: str, size: int) -> None:
    (one,) = find_collectives(module(f"  {start}\n  %other = f32[2]{{0}} add(%x, %x)\n  ROOT {done}"))
    assert (one.kind, one.shapes, one.bytes, one.count) == (kind, shapes, size, 1)


WRAPPED = """
%async_computation (param_0: f32[64,3]) -> f32[8,3] {
  %param_0 = f32[64,3]{1,0} parameter(0)
  ROOT %rs = f32[8,3]{1,0} reduce-scatter(%param_0), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}
"""


@pytest.mark.parametrize("again", ("", ", calls=%async_computation"))
def test_wrapped_asynchronous_collective_counts_once(again: str) -> None:
    """GPU: any other collective is wrapped; older XLA names the wrapped computation at both ends."""
    body = (
        "  %s = ((f32[64,3]{1,0}), f32[8,3]{1,0}) async-start(%p), calls=%async_computation\n"
        f"  ROOT %d = f32[8,3]{{1,0}} async-done(%s){again}"
    )
    assert brief(find_collectives(module(body, WRAPPED))) == [("reduce-scatter", "f32[8,3]", 96, 8, 1, False)]


# --- control flow ------------------------------------------------------------------------------------------

# As jax 0.10.2 compiled it: fori_loop(0, 5) over a psum and, in a cond, an all_gather.
LOOP = (
    """
%region_3.0_spmd (param.6: (f32[4])) -> (f32[4]) {
  ROOT %param.6 = (f32[4]{0}) parameter(0)
}

%region_4.0_spmd (param.7: (f32[4])) -> (f32[4]) {
  %param.7 = (f32[4]{0}) parameter(0)
  %get-tuple-element.20 = f32[4]{0} get-tuple-element(%param.7), index=0
  %bitcast = f32[1,4]{1,0} bitcast(%get-tuple-element.20)
  %all_gather.5 = f32[8,4]{1,0} all-gather(%bitcast), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(loop)/while/body/cond/branch_1_fun/all_gather" stack_frame_id=21}
  %wrapped_reduce = f32[4]{0} fusion(%all_gather.5, %constant.2.clone), kind=kLoop, calls=%add
  ROOT %tuple.17 = (f32[4]{0}) tuple(%wrapped_reduce)
}
""",  # noqa: E501
    """
%region_0.6_spmd (param.2: (s32[], f32[4])) -> (s32[], f32[4]) {
  %param.2 = (s32[], f32[4]{0}) parameter(0)
  %get-tuple-element.27 = f32[4]{0} get-tuple-element(%param.2), index=1
  %psum.7 = f32[4]{0} all-reduce(%get-tuple-element.27), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(loop)/while/body/psum" stack_frame_id=18}
  %compare_convert_fusion = s32[] fusion(%psum.7), kind=kLoop, calls=%add
  %conditional.clone = (f32[4]{0}) conditional(%compare_convert_fusion, %tuple.14, %tuple.14), branch_computations={%region_3.0_spmd, %region_4.0_spmd}, metadata={op_name="jit(loop)/while/body/cond" stack_frame_id=20}
  ROOT %tuple.20 = (s32[], f32[4]{0}) tuple(%wrapped_add, %get-tuple-element.29)
}

%region_6.7_spmd (param.3: (s32[], f32[4])) -> pred[] {
  %param.3 = (s32[], f32[4]{0}) parameter(0)
  ROOT %lt = pred[] compare(%get-tuple-element.16, %constant.12.clone), direction=LT
}
""",  # noqa: E501
)
WHILE = (
    "  %while.9 = (s32[], f32[4]{0}) while(%tuple.18), condition=%region_6.7_spmd, body=%region_0.6_spmd, "
    'metadata={op_name="jit(loop)/while" stack_frame_id=16}'
)
TRIPS = (
    ', backend_config={"dynamic_variables":[],"known_induction_variable":{"tuple_index":"0"},'
    '"known_init_step":{"init":"0","step":"1"},"known_trip_count":{"n":"5"}}'
)


def test_loop_with_known_trip_count_and_conditional() -> None:
    found = find_collectives(module(WHILE + TRIPS, *LOOP))
    assert brief(found) == [
        ("all-reduce", "f32[4]", 16, 8, 5, False),
        ("all-gather", "f32[8,4]", 128, 8, 5, True),
    ]
    assert found[1].op_name == "jit(loop)/while/body/cond/branch_1_fun/all_gather"


def test_loop_of_unknown_length_counts_once() -> None:
    assert [(c.kind, c.count) for c in find_collectives(module(WHILE, *LOOP))] == [
        ("all-reduce", 1),
        ("all-gather", 1),
    ]


def test_nested_loops_multiply() -> None:
    outer = """
%outer_body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %ag = f32[6]{0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}
INNER
}

%outer_condition (p: (s32[], f32[4])) -> pred[] {
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}
""".replace("INNER", WHILE + TRIPS)
    body = (
        "  %while.1 = (s32[], f32[4]{0}) while(%t), condition=%outer_condition, body=%outer_body, "
        'backend_config={"known_trip_count":{"n":"3"}}\n'
        "  %last = f32[2]{0} all-reduce(%y), replica_groups={{0,1}}, to_apply=%add"
    )
    assert brief(find_collectives(module(body, *LOOP, outer))) == [
        ("all-gather", "f32[6]", 24, 2, 3, False),
        ("all-reduce", "f32[4]", 16, 8, 15, False),
        ("all-gather", "f32[8,4]", 128, 8, 15, True),
        ("all-reduce", "f32[2]", 8, 2, 1, False),
    ]


BRANCHES = """
%first (p: f32[4]) -> f32[4] {
  ROOT %a = f32[4]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

%second (p: f32[4]) -> f32[4] {
  ROOT %b = f32[8]{0} all-gather(%p), replica_groups={{0,1}}, dimensions={0}
}
"""


@pytest.mark.parametrize(
    "branches",
    ("branch_computations={%first, %second}", "true_computation=%first, false_computation=%second"),
)
def test_every_branch_is_read(branches: str) -> None:
    """By index, and by predicate: XLA prints the two differently."""
    body = f'  %c = f32[4]{{0}} conditional(%i, %x, %y), {branches}, metadata={{op_name="jit(f)/cond"}}'
    assert brief(find_collectives(module(body, BRANCHES))) == [
        ("all-reduce", "f32[4]", 16, 2, 1, True),
        ("all-gather", "f32[8]", 32, 2, 1, True),
    ]


def test_calls_are_followed_and_unreachable_computations_are_not() -> None:
    assert find_collectives(module("  ROOT %p = f32[4]{0} parameter(0)", BRANCHES)) == []
    twice = "  %c = f32[4]{0} call(%x), to_apply=%first\n  %d = f32[4]{0} call(%c), to_apply=%first"
    assert [(c.kind, c.count) for c in find_collectives(module(twice, BRANCHES))] == [("all-reduce", 1)] * 2


# --- reduce-scatters of a CPU ------------------------------------------------------------------------------

# as XLA's CPU compiler prints a product whose sum each of four devices keeps 16 of 64 rows of
KEPT = """
%kept (param_0: f32[64,32], param_1: u32[]) -> f32[16,32] {
  %param_0 = f32[64,32]{1,0} parameter(0)
  %param_1 = u32[] parameter(1)
  %convert = s32[] convert(%param_1)
  %rows = s32[] constant(16)
  %first = s32[] multiply(%convert, %rows)
  %zero = s32[] constant(0)
  ROOT %slice = f32[16,32]{1,0} dynamic-slice(%param_0, %first, %zero), dynamic_slice_sizes={16,32}
}

%full (param_0.1: f32[64,32]) -> f32[64,32] {
  %param_0.1 = f32[64,32]{1,0} parameter(0)
  ROOT %tanh = f32[64,32]{1,0} tanh(%param_0.1)
}
"""
SUMMED = """
  %x = f32[64,32]{1,0} parameter(0)
  %step = u32[] parameter(1)
  %device = u32[] partition-id()
  %sum = f32[64,32]{1,0} all-reduce(%x), replica_groups=mesh['axis_0'=4] {'axis_0'}, to_apply=%add
"""


@pytest.mark.parametrize(
    "reader",
    (
        "%part = f32[16,32]{1,0} fusion(%sum, %device), kind=kLoop, calls=%kept",
        """%shape = f32[64,32]{1,0} bitcast(%sum)
  %zero = s32[] constant(0)
  %first = s32[] convert(%device)
  %part = f32[16,32]{1,0} dynamic-slice(%shape, %first, %zero), dynamic_slice_sizes={16,32}""",
    ),
)
def test_all_reduce_whose_part_is_kept(reader: str) -> None:
    assert brief(find_collectives(module(f"{SUMMED}  {reader}", KEPT))) == [
        ("reduce-scatter", "f32[16,32]", 16 * 32 * 4, 4, 1, False)
    ]


@pytest.mark.parametrize(
    "reader",
    (
        "%part = f32[16,32]{1,0} fusion(%sum, %step), kind=kLoop, calls=%kept",  # the same rows everywhere
        "%all = f32[64,32]{1,0} fusion(%sum), kind=kLoop, calls=%full",
        """%part = f32[16,32]{1,0} fusion(%sum, %device), kind=kLoop, calls=%kept
  %all = f32[64,32]{1,0} fusion(%sum), kind=kLoop, calls=%full""",
        "%row = f32[1,32]{1,0} dynamic-slice(%sum, %device, %device), dynamic_slice_sizes={1,32}",
    ),
)
def test_all_reduce_of_which_more_is_read(reader: str) -> None:
    assert brief(find_collectives(module(f"{SUMMED}  {reader}", KEPT))) == [
        ("all-reduce", "f32[64,32]", 64 * 32 * 4, 4, 1, False)
    ]


def test_live_part_kept() -> None:
    """Rows that are summed and sharded: no full sum stays on any device."""
    mesh = make_mesh(4)

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P("tp", None)))

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((64, 128), P(None, "tp")), ((128, 32), P("tp", None)))
    ]
    found = find_collectives(jax.jit(product).lower(*shapes).compile().as_text())
    assert brief(found) == [("reduce-scatter", "f32[16,32]", 16 * 32 * 4, 4, 1, False)]


def test_summarise() -> None:
    def one(kind: str, size: int, count: int, conditional: bool, name: str) -> Collective:
        return Collective(kind, f"f32[{size // 4}]", size, 8, count, conditional, name)

    rows = summarise(
        [
            one("all-reduce", 16, 2, False, "a"),
            one("all-gather", 4000, 1, True, "b"),
            one("all-gather", 100, 1, False, "c"),
            one("all-reduce", 16, 5, False, "d"),
            one("all-reduce", 16, 1, True, "e"),
        ]
    )
    assert rows == [
        one("all-reduce", 16, 7, False, ""),  # 112 bytes: before the gather of 100
        one("all-gather", 100, 1, False, ""),
        one("all-gather", 4000, 1, True, ""),  # what runs only if asked for comes last
        one("all-reduce", 16, 1, True, ""),
    ]


# --- as this JAX prints it ---------------------------------------------------------------------------------


def test_live_product() -> None:
    mesh = make_mesh(8)

    def shape(dims: tuple[int, int], spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        product = jax.jit(lambda x, w: jax.lax.with_sharding_constraint(x @ w, P()))
        hlo = product.lower(shape((4, 16), P(None, "tp")), shape((16, 24), P("tp", None))).compile().as_text()
    assert brief(find_collectives(hlo)) == [("all-reduce", "f32[4,24]", 384, 8, 1, False)]


def test_live_loop_and_conditional() -> None:
    mesh = make_mesh(4)

    def loop(x: jax.Array) -> jax.Array:
        def body(_: jax.Array, c: jax.Array) -> jax.Array:
            c = jax.lax.psum(c, "tp") * 0.1
            return jax.lax.cond(c.sum() > 0, lambda: jax.lax.all_gather(c, "tp").sum(0), lambda: c)

        return jax.lax.fori_loop(0, 5, body, x)

    mapped = jax.shard_map(loop, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    hlo = jax.jit(mapped).lower(jax.ShapeDtypeStruct((6,), jnp.float32)).compile().as_text()
    assert brief(find_collectives(hlo)) == [
        ("all-reduce", "f32[6]", 24, 4, 5, False),
        ("all-gather", "f32[4,6]", 96, 4, 5, True),
    ]


def test_live_kinds() -> None:
    mesh = make_mesh(4)

    def moves(x: jax.Array) -> tuple[jax.Array, ...]:
        return (
            jax.lax.ppermute(x, "tp", [(i, (i + 1) % 4) for i in range(4)]),
            jax.lax.all_to_all(x, "tp", 0, 0),
            jax.lax.psum_scatter(x, "tp"),
            jax.lax.psum(x.max(0), "tp", axis_index_groups=[[0, 1], [2, 3]]),
        )

    specs = (P("tp"), P("tp"), P("tp"), P())
    mapped = jax.shard_map(moves, mesh=mesh, in_specs=P("tp"), out_specs=specs, check_vma=False)
    hlo = jax.jit(mapped).lower(jax.ShapeDtypeStruct((16, 3), jnp.float32)).compile().as_text()
    found = {c.kind: (c.bytes, c.group_size, c.count) for c in find_collectives(hlo)}
    assert found == {
        "collective-permute": (48, 0, 1),  # pairs, not groups
        "all-to-all": (48, 4, 1),
        "reduce-scatter": (12, 4, 1),
        "all-reduce": (12, 2, 1),
    }
