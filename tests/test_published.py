"""Configurations of the built-in models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tpjax.errors import CheckpointError, ConfigError, DownloadError
from tpjax.inspect.budget import measured
from tpjax.inspect.explain import explain_model
from tpjax.planning import published
from tpjax.planning.published import find_config, is_published, published_config


def test_what_is_no_size() -> None:
    assert published_config("llama-3.1-8b").rope.full.kind == "llama3"
    assert published_config("gemma-2-27b").attention.query_scale == 144**-0.5
    assert published_config("gemma-3-12b").attention.layer_types[4:6] == (
        "sliding_attention",
        "full_attention",
    )
    assert published_config("mixtral-8x22b").longest_context == 65_536
    assert published_config("deepseek-v3").moe is not None


def test_a_checkpoint_comes_first() -> None:
    assert is_published("llama-3-8b")
    assert not is_published("smollm2-135m")  # an alias: its checkpoint can be had
    assert not is_published("llama-3-9b")


def test_who_cannot_download_is_told_of_the_published_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, *, configuration: bool) -> Path:
        assert configuration
        raise DownloadError(f"{name}: access is restricted")

    monkeypatch.setattr(published, "resolve", refused)
    with pytest.raises(DownloadError) as caught:
        find_config("meta-llama/llama-3.1-8B")
    refusal = "meta-llama/llama-3.1-8B: access is restricted"
    assert str(caught.value) == f"{refusal}; 'llama-3.1-8b' is the same architecture, and needs no file"
    with pytest.raises(DownloadError, match=r"restricted$"):
        find_config("meta-llama/Llama-9")


def test_explained_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {
        **published._published()["llama-3-8b"]["config"],
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 128,
    }
    monkeypatch.setitem(published._published(), "llama-3-tiny", {"id": "none/tiny", "config": tiny})
    report = explain_model("llama-3-tiny", tp=2, max_model_len=128)
    assert (report.model, report.model_type, report.tp) == ("llama-3-tiny", "llama", 2)
    assert measured(report.steps[0].collectives)["all_reduces"] == 5


def test_an_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"'llama-3-8' is neither .* did you mean llama-3-8b"):
        find_config("llama-3-8")
    with pytest.raises(CheckpointError, match=r"the built-in ones are llama-2-7b, .*deepseek-v3"):
        find_config("zzz")


def test_a_configuration_file(tmp_path: Path) -> None:
    raw = published._published()["smollm2-135m"]["config"]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw))
    assert find_config(str(file)) == ("config.json", published_config("smollm2-135m"))
    file.write_text(json.dumps({name: value for name, value in raw.items() if name != "hidden_size"}))
    with pytest.raises(ConfigError, match="'hidden_size' is missing"):
        find_config(str(file))
