"""Configurations of the built-in models."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tpjax.inspect.budget import measured
from tpjax.inspect.explain import explain_model
from tpjax.inspect.published import is_published, published_config
from tpjax.inspect.shapes import SHAPES, Shape


@pytest.mark.parametrize("name", SHAPES)
def test_the_configuration_has_the_shape(name: str) -> None:
    wanted, found = SHAPES[name], Shape.from_config(published_config(name), name)
    # vectors are counted for plan alone, and a latent has no width of its own for all heads
    left_out = {"layer_vectors": 0, **({"head_dim": 0} if wanted.latent else {})}
    assert replace(found, **left_out) == replace(wanted, **left_out)


def test_what_is_no_size() -> None:
    assert published_config("llama-3.1-8b").rope.kind == "llama3"
    assert published_config("gemma-2-27b").query_scale == 144**-0.5
    assert published_config("gemma-3-12b").layer_types[4:6] == ("sliding_attention", "full_attention")
    assert published_config("mixtral-8x22b").longest_context == 65_536
    assert published_config("deepseek-v3").moe is not None


def test_a_checkpoint_comes_first() -> None:
    assert is_published("llama-3-8b")
    assert not is_published("smollm2-135m")  # an alias: its checkpoint can be had
    assert not is_published("llama-3-9b")


def test_explained_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "llama-3-tiny", Shape("llama-3-tiny", 2, 64, 4, 2, 16, 96, 128))
    report = explain_model("llama-3-tiny", tp=2, max_model_len=128)
    assert (report.model, report.model_type, report.tp) == ("llama-3-tiny", "llama", 2)
    assert measured(report.steps[0].collectives)["all_reduces"] == 5
