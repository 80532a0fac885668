"""`tpjax doctor --measure`: figures of a chip beside what is expected of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from tpjax.hardware import HARDWARE
from tpjax.inspect import chip_benchmark


@pytest.mark.slow
def test_expectations_are_those_of_the_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the devices were H100s: the data sheet, and ``plan``'s times."""
    chip = HARDWARE["h100-sxm"].device

    def half_a_second(call: Callable[[], Any], **_: int) -> float:
        jax.block_until_ready(call())
        return 0.5

    monkeypatch.setattr(chip_benchmark, "known_device", lambda kind: chip)
    monkeypatch.setattr(chip_benchmark, "seconds", half_a_second)
    monkeypatch.setattr(chip_benchmark, "_BATCHES", (2,))
    report = chip_benchmark.measure(2)
    figures = {figure.name: figure for figure in report.figures}
    assert report.devices == 2 and report.attention == "xla: it runs on every platform"
    assert figures["reading memory"].expected == chip.bandwidth_bytes_s / 1e9
    assert figures["reading memory"].measured == pytest.approx((1 << 26) / 0.5 / 1e9)
    assert figures["all-reduce of 256 KiB"].expected == chip.interconnect.all_reduce_s(2, 1 << 18) * 1e6
    assert figures["decode of 4 layers, 2 x 1024 tokens"].measured == 500
    assert 0 < (figures["decode of 4 layers, 2 x 1024 tokens"].expected or 0) < 5
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report)
    assert "measured / expected" in capture.get() and "not known" not in capture.get()


@pytest.mark.parametrize(
    ("platform", "room", "layers"),
    (("tpu", 8 << 30, 14), ("gpu", 40 << 30, 32), ("gpu", 1, 1), ("cpu", None, 4)),
)
def test_the_model_fits(platform: str, room: int | None, layers: int) -> None:
    """A layer of Llama 3 8B takes 436 MB in bfloat16, embedding and head 2.1 GB."""
    assert chip_benchmark._model(platform, room, jnp.dtype("bfloat16")).num_layers == layers
