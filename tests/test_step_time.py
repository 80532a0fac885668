"""The time of a step by hand, in its special cases, and of the device that it is predicted for."""

import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from tpjax.families.registry import config_from_hf
from tpjax.hardware import HARDWARE, Efficiency, Hardware, known_device
from tpjax.interconnect import NVLink
from tpjax.mesh import make_mesh
from tpjax.planning.published import published_config
from tpjax.runtime.counts import Counts
from tpjax.runtime.device_speed import device_hardware
from tpjax.runtime.device_speed import step_time as step_time_of
from tpjax.step_time import Itemsizes, StepTime, StepTokens, attended

# 1 GB/s, 1 MFLOP/s, everything reached; an all-reduce over two takes 1 us and its size over 1 GB/s
CHIP = Hardware(
    "by hand",
    memory_bytes=1e9,
    bandwidth_bytes_s=1e9,
    flops=1e6,
    low_precision_flops=None,
    interconnect=NVLink(1e9, latency_us=1.0, peer_us=0.0, fraction=1.0),
    efficiency=Efficiency(1.0, 1.0, 1.0, 1.0, 1.0, layer_us=10.0, expert_us=5.0, step_us=100.0),
    source="by hand",
)
# 2 layers, D=64, 4 heads, 2 KV heads of 16, F=128, V=1000, untied
SIZES = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
LAYERS = 2 * (64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 128)
HEAD = 1000 * 64
KEY = 2 * 2 * 16  # elements of a token's key and value in a layer
PAIR = 4 * 4 * 16  # FLOPs of a query with a key in a layer
BF16 = Itemsizes(weights=2, activations=2, cache=2)


def step_time(tp: int = 1, chip: Hardware = CHIP, **changes) -> StepTime:
    return StepTime(Counts("tiny", config_from_hf({**SIZES, **changes})).share(tp), chip, BF16)


def published(name: str, chip: str = "v5e", tp: int = 8) -> StepTime:
    return StepTime(Counts(name, published_config(name)).share(tp), HARDWARE[chip].device, BF16)


def test_a_mixed_step_reads_weights_once_and_multiplies_all_tokens():
    cost = step_time().step(StepTokens(rows=3, context=50, chunks=((128, 160), (0, 8))))
    assert cost.weights == pytest.approx(2 * (LAYERS + HEAD) / 1e9)
    moved = 3 * 50 + (128 + 2 * 32) + 2 * 8  # rows read; a chunk reads what is before it, and itself twice
    assert cost.cache == pytest.approx(2 * moved * KEY * 2 / 1e9)
    pairs = 3 * 50 + sum(range(129, 161)) + sum(range(1, 9))
    flops = 2 * (3 + 32 + 8) * LAYERS + 2 * (3 + 2) * HEAD + 2 * pairs * PAIR  # the head has five rows
    assert cost.compute == pytest.approx(flops / 1e6 - cost.weights - cost.cache)
    assert cost.fixed == pytest.approx(2 * 10e-6 + 100e-6)


def test_decode_and_prefill_are_special_cases():
    times = step_time(tp=2)
    assert times.decode(4, 70) == times.step(StepTokens(4, 70))
    assert times.prefill(70) == times.step(StepTokens(chunks=((0, 70),)))
    assert times.seconds(4, 4 * 70) == times.decode(4, 70).total
    assert times.seconds(0, 0, 70) == times.prefill(70).total
    assert times.seconds(4, 4 * 70, 32, 128) == times.step(StepTokens(4, 70, ((128, 160),))).total


def test_all_tokens_of_a_step_are_reduced_together():
    cost = step_time(tp=2).step(StepTokens(3, 5, ((0, 40),)))
    message, sampled = 43 * 64 * 2, 8 * 4
    assert cost.collectives == pytest.approx(5 * (1e-6 + message / 1e9) + 1e-6 + sampled / 1e9)


def test_parallel_blocks_reduce_once_a_layer_and_wide_norms_once_more():
    def collectives(name: str) -> float:
        config = published_config("llama-3-8b")
        if name == "norm":
            config = replace(config, attention=replace(config.attention, qk_norm="projection"))
        elif name == "parallel":
            config = replace(config, block="parallel")
        share = Counts(name, config).share(8)
        return StepTime(share, HARDWARE["v5e"], BF16).decode(4, 10).collectives

    links = HARDWARE["v5e"].interconnect
    reduce = links.all_reduce_s(8, 4 * 4096 * 2)
    assert collectives("") - collectives("parallel") == pytest.approx(32 * reduce)
    assert collectives("norm") - collectives("") == pytest.approx(32 * links.all_reduce_s(8, 4 * 8))


@pytest.mark.parametrize("window", [None, 1, 7, 50, 1000])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 60), (40, 60), (128, 256)])
def test_a_token_attends_to_itself_and_before_within_its_window(start, stop, window):
    pairs = sum(min(position + 1, window or position + 1) for position in range(start, stop))
    assert attended(start, stop, window) == pairs


@pytest.mark.parametrize("model", ["llama-3-8b", "mixtral-8x7b", "gemma-3-4b", "deepseek-v3"])
def test_more_tokens_never_take_less_time(model):
    times = published(model)
    prompts = [times.seconds(16, 16 * 500, tokens) for tokens in (0, 1, 16, 128, 512, 4096)]
    rows = [times.seconds(rows, rows * 500, 128) for rows in (0, 1, 8, 64, 256)]
    behind = [times.seconds(16, 16 * 500, 128, before) for before in (0, 128, 1024, 65536)]
    for figures in (prompts, rows, behind):
        assert figures == sorted(figures)
    # one pass costs less than two: the weights are read once
    assert prompts[3] < times.seconds(16, 16 * 500) + times.seconds(0, 0, 128)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
    ],
)
def test_known_devices(kind, name):
    assert known_device(kind) == HARDWARE[name]


def test_a_tpu7x_has_two_devices():
    chip, device = HARDWARE["tpu7x"], known_device("TPU7x")
    assert (device.memory_bytes, device.bandwidth_bytes_s, device.flops) == (96e9, 3690e9, 1153.5e12)
    assert device == chip.device == device.device and chip.devices_per_chip == 2
    # the two dies of each of four chips reduce first; the four then have the same message as one die had
    links = chip.interconnect
    inside = links.all_reduce_s(2, 1e6)
    assert inside == pytest.approx(2 * 0.15e-6 + 1e6 / (0.95 * 600e9))
    torus = replace(links, devices_per_chip=1)
    assert links.all_reduce_s(8, 1e6) == pytest.approx(inside + torus.all_reduce_s(4, 1e6))


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA A100-SXM4-40GB", "TPU v9", ""])
def test_other_devices_are_unknown(kind):
    assert known_device(kind) is None


def test_steps_of_a_mesh_are_predicted():
    config = config_from_hf(SIZES)
    mesh = make_mesh(2)
    times = step_time_of(config, mesh, np.dtype("float32"))
    assert times.tp == 2 and times.held == Counts("", config).on_device(2)
    assert times.itemsizes == Itemsizes(4, 4, 4) and times.hardware.shared
    assert times.seconds(4, 400) < times.seconds(4, 400, 128)


def test_this_machine_is_measured_quickly():
    device = jax.devices("cpu")[0]
    start = time.perf_counter()
    one = device_hardware(device, np.dtype("float32"))
    assert time.perf_counter() - start < 30  # 0.2 s on a quiet machine
    assert one.shared and one.source == "measured on this machine"
    assert 1e8 < one.bandwidth_bytes_s < 1e13 and 1e8 < one.flops < 1e15
    assert device_hardware(device, np.dtype("float32")) is one
    # any machine multiplies many tokens faster than it would read the weight anew for each
    assert one.flops > 2 * one.bandwidth_bytes_s / 4
