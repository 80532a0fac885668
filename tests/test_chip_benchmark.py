"""`tpjax doctor --measure`: figures of a chip beside what is expected of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from tpjax.attention import XLA, KernelShape
from tpjax.hardware import HARDWARE
from tpjax.inspect import chip_benchmark
from tpjax.inspect.collectives import find_collectives
from tpjax.mesh import make_mesh


@pytest.mark.slow
def test_expectations_are_those_of_the_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the devices were H100s: the data sheet, and ``plan``'s times."""
    chip = HARDWARE["h100-sxm"].device

    def half_a_second(call: Callable[[], Any], **_: int) -> float:
        jax.block_until_ready(call())
        return 0.5

    monkeypatch.setattr(chip_benchmark, "known_device", lambda kind: chip)
    monkeypatch.setattr(chip_benchmark, "seconds", half_a_second)

    def fails(*_: Any) -> float:
        raise MemoryError("no room\nin several lines")

    monkeypatch.setattr(chip_benchmark, "_BATCHES", (2,))
    monkeypatch.setattr(chip_benchmark, "product_rate", fails)
    told: list[chip_benchmark.Figure] = []
    report = chip_benchmark.measure(2, told.append)
    assert tuple(told) == report.figures
    figures = {figure.name: figure for figure in report.figures}
    product = figures["product in float32"]
    assert (product.measured, product.problem) == (None, "MemoryError: no room")
    assert report.devices == 2 and report.attention == "xla: it runs on every platform"
    assert figures["reading memory"].expected == chip.bandwidth_bytes_s / 1e9
    assert figures["reading memory"].measured == pytest.approx((1 << 26) / 0.5 / 1e9)
    assert figures["all-reduce of 256 KiB"].expected == chip.interconnect.all_reduce_s(2, 1 << 18) * 1e6
    assert figures["decode of 4 layers, 2 x 1024 tokens"].measured == 500
    assert 0 < (figures["decode of 4 layers, 2 x 1024 tokens"].expected or 0) < 5
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report)
    assert "measured / expected" in capture.get() and capture.get().count("not known") == 1
    assert "product in float32: MemoryError: no room" in capture.get()


def test_no_figure_is_begun_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are in the report still, which is whole JSON."""
    monkeypatch.setattr(chip_benchmark, "_LAST_START_S", -1.0)
    found = json.loads(json.dumps(chip_benchmark.measure(2).to_dict(), allow_nan=False))
    names = ["reading memory", "product in float32"]
    names += [f"all-reduce of {size} KiB" for size in (16, 256, 4096)]
    names += ["attention (xla) reading 8 x 1024 tokens"]
    names += [f"decode of 4 layers, {batch} x 1024 tokens" for batch in (1, 8)]
    assert [figure["name"] for figure in found["figures"]] == [*names, "prompt of 512 tokens"]
    assert {figure["problem"] for figure in found["figures"]} == {"not begun after -1 s"}
    assert found["products"] == "xla" and found["devices"] == 2


def test_what_is_timed_as_all_reduces_is() -> None:
    """XLA might multiply numbers that all devices share, or add up once."""
    program, x = chip_benchmark._all_reduces(make_mesh(4), 1 << 14)
    found = find_collectives(program.lower(x).compile().as_text())
    assert [(one.kind, one.bytes) for one in found] == [("all-reduce", 1 << 14)] * chip_benchmark._CHAIN


def test_attention_is_timed_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers read caches of their own until those are more than a chip's cache holds."""
    caches: list[int] = []

    def counted(call: Any) -> float:
        caches.append(len(call.args[1]))
        return 1.0

    monkeypatch.setattr(chip_benchmark, "seconds", counted)
    shape = KernelShape(1, 1, 16, 16, False, (None,), None, False, 128, "float32")
    for beyond, count in ((1, 1), (3 << 14, 2), (1 << 30, chip_benchmark._CHAIN)):
        monkeypatch.setattr(chip_benchmark, "_BEYOND_CACHES", beyond)
        chip_benchmark.attention_s(XLA, shape, 1, 100)  # two pages with the null page: 32 KiB
        assert caches.pop() == count


@pytest.mark.parametrize(
    ("platform", "room", "layers"),
    (("tpu", 8 << 30, 14), ("gpu", 40 << 30, 32), ("gpu", 1, 1), ("cpu", None, 4)),
)
def test_the_model_fits(platform: str, room: int | None, layers: int) -> None:
    """A layer of Llama 3 8B takes 436 MB in bfloat16, embedding and head 2.1 GB."""
    assert chip_benchmark._model(platform, room, jnp.dtype("bfloat16")).num_layers == layers
