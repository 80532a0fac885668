"""The time of a TPU program, from a small one written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tpjax.attention.tpu import Work
from tpjax.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig
from tpjax.hardware import HARDWARE
from tpjax.inspect.estimate import Estimate, estimate
from tpjax.inspect.hlo import Module
from tpjax.inspect.topology import parse_topology
from tpjax.step_time import Itemsizes

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=1024,
    hidden_size=512,
    num_layers=2,
    max_position_embeddings=2048,
    attention=AttentionConfig(
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        query_scale=0.125,
        layer_types=("sliding_attention", "full_attention"),
        sliding_window=128,
    ),
    mlp=MLPConfig(intermediate_size=1024),
    norm=NormConfig(eps=1e-5),
)
LOOPS = "\n".join(
    f"""
%body{n} (s{n}: (s32[], bf16[64,128,64])) -> (s32[], bf16[64,128,64]) {{
  %s{n} = (s32[], bf16[64,128,64]{{2,1,0}}) parameter(0)
  %pages{n} = bf16[64,128,64]{{2,1,0}} get-tuple-element(%s{n}), index=1
  %take{n} = bf16[2,128,64]{{2,1,0:S(1)}} fusion(%pages{n}), kind=kCustom, calls=%taken
  %mix{n} = f32[64]{{0:S(1)}} fusion(%take{n}), calls=%mixed, backend_config={{"estimated_cycles":"2000"}}
}}

%until{n} (u{n}: (s32[], bf16[64,128,64])) -> pred[] {{
  %u{n} = (s32[], bf16[64,128,64]{{2,1,0}}) parameter(0)
}}
"""
    for n in (0, 1)
)
PROGRAM = f"""HloModule jit_decode

%taken (p: bf16[64,128,64]) -> bf16[2,128,64] {{
  %p = bf16[64,128,64]{{2,1,0}} parameter(0)
  ROOT %slice = bf16[2,128,64]{{2,1,0}} slice(%p), slice={{[0:2], [0:128], [0:64]}}
}}

%mixed (m: bf16[2,512], h: bf16[1024,512]) -> f32[2,1024] {{
  %m = bf16[2,512]{{1,0}} parameter(0)
  %h = bf16[1024,512]{{1,0}} parameter(1)
  ROOT %d = f32[2,1024]{{1,0}} convolution(%m, %h), dim_labels=bf_oi->bf
}}

%rare (q: f32[8]) -> f32[8] {{
  %q = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} fusion(%q), kind=kLoop, calls=%mixed, backend_config={{"estimated_cycles":"70000"}}
}}
{LOOPS}
ENTRY %main (w: bf16[512,1024], x: bf16[2,512], head: bf16[1024,512], c: s32[]) -> f32[2,1024] {{
  %w = bf16[512,1024]{{1,0}} parameter(0)
  %x = bf16[2,512]{{1,0:S(1)}} parameter(1)
  %head = bf16[1024,512]{{1,0}} parameter(2)
  %ahead = ((bf16[512,1024]{{1,0}}), bf16[256,1024]{{1,0:S(1)}}, s32[]{{:S(2)}}) slice-start(%w), slice={{[0:256], [0:1024]}}
  %fetched = bf16[256,1024]{{1,0:S(1)}} slice-done(%ahead)
  %out = (bf16[2,512]{{1,0}}, bf16[2,512]{{1,0:S(1)}}, u32[]{{:S(2)}}) copy-start(%x)
  %stored = bf16[2,512]{{1,0}} copy-done(%out)
  %walk0 = (s32[], bf16[64,128,64]{{2,1,0}}) while(%t0), condition=%until0, body=%body0
  %walk1 = (s32[], bf16[64,128,64]{{2,1,0}}) while(%t1), condition=%until1, body=%body1
  %some = f32[8]{{0:S(1)}} conditional(%c, %y, %y), branch_computations={{%rare, %rare}}
  %sorted = f32[8]{{0:S(1)}} sort(%some), backend_config={{"estimated_cycles":"9223372036854775807"}}
  %kernel = bf16[2,512]{{1,0:S(1)}} custom-call(%fetched), custom_call_target="tpu_custom_call"
  %write_pages.1 = bf16[64,128,64]{{2,1,0}} custom-call(%c, %cache, %kernel), custom_call_target="tpu_custom_call", output_to_operand_aliasing={{{{}}: (1, {{}})}}
  %sum = bf16[2,512]{{1,0:S(1)}} all-reduce(%kernel), replica_groups={{{{0,1,2,3,4,5,6,7}}}}, to_apply=%add
  ROOT %logits = f32[2,1024]{{1,0}} fusion(%sum, %head), kind=kOutput, calls=%mixed, backend_config={{"estimated_cycles":"9000"}}
}}
"""  # noqa: E501


def estimated(
    config: ModelConfig = CONFIG,
    chip: str = "v5e:2x4",
    context: int = 300,
    kernel_work: Sequence[Work] = (),
    text: str = PROGRAM,
) -> Estimate:
    module = Module(text)
    return estimate(
        module,
        config,
        parse_topology(chip),
        tp=8,
        itemsizes=Itemsizes(2, 2, 2),
        batch=2,
        length=1,
        context=context,
        page_size=128,
        caches={(64, 64, 128)},
        kernel_work=kernel_work,
    )


def test_parts() -> None:
    """300 tokens are three pages; a window of 128 reaches back to the second."""
    found = estimated()
    clock = 197e12 / 2 / (4 * 128 * 128)
    assert clock == pytest.approx(1.50e9, rel=0.01)
    assert found.pages_s == pytest.approx((2 + 3) * 2000 / clock)
    assert found.compute_s == pytest.approx(((2 + 3) * 2000 + 9000) / clock)
    page = 2 * 128 * 64 * 2
    weights, stored, head, logits = 256 * 1024 * 2, 2 * 512 * 2, 1024 * 512 * 2, 2 * 1024 * 4
    written = 2 * 512 * 2  # by a kernel into the cache, whose buffer it does not move
    assert found.traffic_bytes == weights + stored + (2 + 3) * page + written + head + logits
    assert found.traffic_s == pytest.approx(found.traffic_bytes / 819e9)
    assert found.collectives_s == HARDWARE["v5e"].interconnect.all_reduce_s(8, 2 * 512 * 2)
    assert found.total_s == pytest.approx(found.compute_s + found.collectives_s)
    assert found.kernels == 3  # and the sort, whose number is none


def test_kernels() -> None:
    """The longer of bytes and products of each call, at two assumptions."""
    calls = (Work(bytes=8190, flops=1970), Work(bytes=819, flops=1_970_000))
    found = estimated(kernel_work=calls)
    assert found.kernel_bytes == 9009
    assert found.kernels_s == pytest.approx(10e-9 / 0.8 + 10e-9 / 0.5)
    assert found.low_kernels_s == pytest.approx(10e-9 / 0.6 + 10e-9 / 0.3)
    assert found.total_s == pytest.approx(estimated().total_s + found.kernels_s)
    assert found.low_total_s == pytest.approx(estimated().total_s + found.low_kernels_s)


@pytest.mark.parametrize("places", (("", ""), ("S(1)", ""), ("S(1)", "S(1)")))
def test_what_a_kernel_reads_on_chip(places: tuple[str, str]) -> None:
    """Queries and outputs that the compiler keeps on chip are no traffic; pages always are."""
    at = [f"{{3,2,1,0:T(4,128)(2,1){place}}}" for place in places]
    text = f"""HloModule jit_decode

ENTRY %main (q: bf16[2,1,4,128], pages: bf16[64,1,128,128]) -> bf16[2,1,4,128] {{
  %q = bf16[2,1,4,128]{at[0]} parameter(0)
  %pages = bf16[64,1,128,128]{{3,2,1,0}} parameter(1)
  ROOT %paged_attention = bf16[2,1,4,128]{at[1]} custom-call(%q, %pages), custom_call_target="tpu_custom_call"
}}
"""
    found = estimated(kernel_work=[Work(100_000, 0, 2 * 2 * 4 * 128 * 2)], text=text)
    assert found.kernel_bytes == 100_000 - 2 * 4 * 128 * 2 * sum(map(bool, places))


def test_bounds() -> None:
    """Weights and cache read once at full bandwidth, products at the peak rate."""
    attention = replace(CONFIG.attention, layer_types=("full_attention",) * 2, sliding_window=None)
    found = estimated(replace(CONFIG, attention=attention))
    layer = (4 * 512 * 512 + 3 * 512 * 1024) // 8
    cache = 2 * 2 * 300 * 2 * 128 * 2  # sequences, layers, tokens, keys and values, width in memory, bytes
    weights = 2 * (2 * layer + 1024 * 512 // 8)
    assert found.memory_bound_s == pytest.approx((weights + cache) / 819e9)
    flops = 2 * 2 * (2 * layer + 1024 * 512 // 8) + 2 * 2 * 300 * 4 * 64
    assert found.compute_bound_s == pytest.approx(flops / 197e12)
    assert found.bound_s == pytest.approx(found.memory_bound_s)  # two rows: memory holds everywhere


def test_a_chip_that_shows_as_two_devices() -> None:
    """Each half has half the bandwidth, at the same clock."""
    one = estimated(chip="tpu7x:2x2x1")
    assert one.traffic_s == pytest.approx(one.traffic_bytes / (7380e9 / 2))
    assert one.compute_s == pytest.approx(((2 + 3) * 2000 + 9000) / (2307e12 / 2 / (8 * 256 * 256)))


def test_an_empty_cache_is_not_walked() -> None:
    assert estimated(context=0).pages_s == 0


GATHER = "all-gather(%{}), channel_id=1, replica_groups={{{{0,1,2,3,4,5,6,7}}}}, dimensions={{0}}"
CHAIN = ', frontend_attributes={chain_id="0"}'
OVERLAPPED = f"""HloModule jit_step

%started (a: bf16[128,4096]) -> (bf16[128,4096], bf16[1024,4096]) {{
  %a = bf16[128,4096]{{1,0:S(1)}} parameter(0)
  %ga = bf16[1024,4096]{{1,0:S(1)}} {GATHER.format("a")}{CHAIN}
  ROOT %sa = (bf16[128,4096]{{1,0:S(1)}}, bf16[1024,4096]{{1,0:S(1)}}) custom-call(%ga), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.3 (b: bf16[128,4096]) -> bf16[1024,3584] {{
  %b = bf16[128,4096]{{1,0:S(1)}} parameter(0)
  %gb = bf16[1024,4096]{{1,0:S(1)}} {GATHER.format("b")}{CHAIN}
  ROOT %cb = bf16[1024,3584]{{1,0:S(1)}} convolution(%gb, %b), dim_labels=bf_oi->bf
}}

%ended (c: bf16[128,4096]) -> bf16[1024,4096] {{
  %c = bf16[128,4096]{{1,0:S(1)}} parameter(0)
  %gc = bf16[1024,4096]{{1,0:S(1)}} {GATHER.format("c")}{CHAIN}
  ROOT %dc = bf16[1024,4096]{{1,0:S(1)}} custom-call(%gc), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (x: bf16[128,4096]) -> bf16[1024,4096] {{
  %x = bf16[128,4096]{{1,0:S(1)}} parameter(0)
  %first = bf16[1024,4096]{{1,0:S(1)}} {GATHER.format("x")}
  %start = (bf16[128,4096]{{1,0:S(1)}}, bf16[1024,4096]{{1,0:S(1)}}) fusion(%x), kind=kCustom, calls=%started
  %part = bf16[128,4096]{{1,0:S(1)}} get-tuple-element(%start), index=0
  %product = bf16[1024,3584]{{1,0:S(1)}} fusion(%part), kind=kOutput, calls=%async_collective_fusion.3, backend_config={{"estimated_cycles":"30000"}}
  ROOT %done = bf16[1024,4096]{{1,0:S(1)}} fusion(%part), kind=kCustom, calls=%ended
}}
"""  # noqa: E501


def test_a_collective_beside_a_product() -> None:
    """Two gathers: of the second, the computation waits for what is left when its product has ended."""
    found = estimated(text=OVERLAPPED)
    gather_s = HARDWARE["v5e"].interconnect.all_reduce_s(8, 1024 * 4096 * 2) / 2
    product_s = 30000 / (197e12 / 2 / (4 * 128 * 128))
    assert product_s < gather_s
    assert found.collectives_s == pytest.approx(2 * gather_s)
    assert found.exposed_s == pytest.approx(2 * gather_s - product_s)
    assert found.total_s == pytest.approx(product_s + found.exposed_s)
    assert estimated().exposed_s == pytest.approx(estimated().collectives_s)


def test_a_permute_beside_more_than_it_takes() -> None:
    text = """HloModule jit_step

ENTRY %main (x: bf16[128,4096]) -> bf16[128,4096] {
  %x = bf16[128,4096]{1,0:S(1)} parameter(0)
  %sent = (bf16[128,4096]{1,0:S(1)}, bf16[128,4096]{1,0:S(1)}, u32[], u32[]) collective-permute-start(%x)
  %busy = f32[8]{0:S(1)} fusion(%x), kind=kLoop, calls=%none, backend_config={"estimated_cycles":"90000"}
  ROOT %here = bf16[128,4096]{1,0:S(1)} collective-permute-done(%sent)
}
"""
    found = estimated(text=text)
    assert found.collectives_s == HARDWARE["v5e"].interconnect.transfer_s(128 * 4096 * 2)
    assert found.exposed_s == 0
