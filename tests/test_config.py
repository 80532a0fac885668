"""Configurations reject what contradicts itself, by field and both numbers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

import pytest

from tpjax.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig, RopeConfig, RopeParameters
from tpjax.errors import ConfigError

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=100,
    hidden_size=48,
    num_layers=3,
    max_position_embeddings=512,
    attention=AttentionConfig(
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        query_scale=8**-0.5,
        layer_types=("full_attention", "sliding_attention", "full_attention"),
        sliding_window=16,
    ),
    mlp=MLPConfig(intermediate_size=64),
    norm=NormConfig(eps=1e-5),
)


def config(**changed: Any) -> ModelConfig:
    """The configuration with fields changed; a mapping changes fields of a group."""
    values = {
        name: replace(getattr(CONFIG, name), **value) if isinstance(value, dict) else value
        for name, value in changed.items()
    }
    return replace(CONFIG, **values)


def one_field(path: str, value: Any) -> dict[str, Any]:
    """``attention.num_heads`` changed, as :func:`config` takes it."""
    group, _, name = path.rpartition(".")
    return {group: {name: value}} if group else {name: value}


def error_message(**changed: Any) -> str:
    with pytest.raises(ConfigError) as error:
        config(**changed)
    assert "\n" not in str(error.value)
    return str(error.value)


SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "max_position_embeddings",
    "attention.num_heads",
    "attention.num_kv_heads",
    "attention.head_dim",
    "mlp.intermediate_size",
)


@pytest.mark.parametrize("value", (0, -4, True, 1.0, "8", None, math.nan))
@pytest.mark.parametrize("path", SIZES)
def test_sizes_are_whole_numbers(path: str, value: Any) -> None:
    name = path.rpartition(".")[2]
    assert error_message(**one_field(path, value)) == f"{name}={value!r} is not a whole number, 1 or more"


def test_kv_heads_divide_heads() -> None:
    message = error_message(attention={"num_heads": 10, "num_kv_heads": 4})
    assert message == "num_kv_heads=4 is not a divisor of num_heads=10"


def test_head_dim_is_even() -> None:
    assert "head_dim=7" in error_message(attention={"head_dim": 7})


@pytest.mark.parametrize("value", (0.0, -1.0, math.nan, math.inf, "1e-5", None, 1j))
@pytest.mark.parametrize(
    ("path", "name"),
    (
        ("norm.eps", "norm_eps"),
        ("embedding_scale", "embedding_scale"),
        ("attention.query_scale", "query_scale"),
        ("residual_scale", "residual_scale"),
        ("logit_scale", "logit_scale"),
    ),
)
def test_scales_are_positive(path: str, name: str, value: Any) -> None:
    assert error_message(**one_field(path, value)) == f"{name}={value!r} is not a positive number"


def test_one_layer_type_a_layer() -> None:
    message = error_message(attention={"layer_types": ("full_attention",) * 4})
    assert message == "layer_types has 4 entries, but num_layers=3"


def test_unknown_layer_type() -> None:
    message = error_message(attention={"layer_types": ("full_attention", "mamba", "full_attention")})
    assert message == "layer type='mamba' is not supported: use full_attention or sliding_attention"


@pytest.mark.parametrize("window", (None, 0, -3, 2.5, "16", True))
def test_sliding_layers_need_a_window(window: Any) -> None:
    assert error_message(attention={"sliding_window": window}).startswith(f"sliding_window={window!r}")


def test_window_is_not_needed_without_sliding_layers() -> None:
    attention = {"layer_types": ("full_attention",) * 3, "sliding_window": None}
    assert config(attention=attention).attention.sliding_window is None


@pytest.mark.parametrize(
    ("path", "name"),
    (
        ("norm.kind", "norm"),
        ("block", "block"),
        ("position_embedding", "position_embedding"),
        ("attention.qk_norm", "qk_norm"),
        ("mlp.activation", "activation"),
    ),
)
def test_unknown_choice(path: str, name: str) -> None:
    assert error_message(**one_field(path, "selu")).startswith(f"{name}='selu' is not supported: use ")


def test_known_choices_are_listed() -> None:
    assert error_message(mlp={"activation": "selu"}).endswith("use silu, gelu, gelu_tanh or relu")


@pytest.mark.parametrize(
    ("path", "name"), (("attention.softcap", "attn_softcap"), ("logit_softcap", "logit_softcap"))
)
@pytest.mark.parametrize("value", (0, -30.0, math.inf, "30"))
def test_caps_are_positive(path: str, name: str, value: Any) -> None:
    assert error_message(**one_field(path, value)) == f"{name}={value!r} is not a positive number"


@pytest.mark.parametrize(
    ("changed", "message"),
    (
        ({"rope": {"rotary_dim": 5}}, "rotary_dim=5 is odd: rotary embeddings need pairs"),
        ({"rope": {"rotary_dim": 10}}, "rotary_dim=10 is over head_dim=8"),
        ({"rope": {"rotary_dim": 0}}, "rotary_dim=0 is not a whole number, 1 or more"),
        ({"rope": {"layers": (True,)}}, "rope_layers has 1 entries, but num_layers=3"),
        (
            {"rope": {"full": RopeParameters(divisors=(1.0,) * 3)}},
            "rope divisors has 3 entries, but 8 dimensions of a head rotate in 4 pairs",
        ),
    ),
)
def test_what_rotates_is_consistent(changed: dict[str, Any], message: str) -> None:
    assert error_message(**changed) == message


def test_head_dim_may_be_odd_without_rotation() -> None:
    assert config(attention={"head_dim": 7}, position_embedding="learned").attention.head_dim == 7


def test_rope_and_window_of_each_kind() -> None:
    far, near = RopeParameters(theta=1e6), RopeParameters(theta=1e4)
    both = config(rope=RopeConfig(full=far, sliding=near))
    assert both.rope.parameters_of("full_attention") is far
    assert both.rope.parameters_of("sliding_attention") is near
    assert RopeConfig(full=far).parameters_of("sliding_attention") is far
    assert both.attention.window_of("full_attention") is None
    assert both.attention.window_of("sliding_attention") == 16


def test_configurations_are_frozen_and_hashable() -> None:
    one = config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.num_layers = 4  # type: ignore[misc]
    assert hash(one) == hash(config())
    assert one == config() != config(attention={"num_kv_heads": 3})


def rope_error(**fields: Any) -> str:
    with pytest.raises(ConfigError) as error:
        RopeParameters(**fields)
    return str(error.value)


@pytest.mark.parametrize("kind", ("spiral", "", None))
def test_unknown_rope(kind: Any) -> None:
    assert rope_error(kind=kind) == (
        f"rope_type={kind!r} is not supported: use default, linear, dynamic, llama3, yarn or longrope"
    )


def test_longrope_needs_both_lists() -> None:
    assert "short and long factors" in rope_error(kind="longrope", divisors=(1.0,))


@pytest.mark.parametrize("value", (0.0, -8.0, math.nan, math.inf, "8", None))
@pytest.mark.parametrize("name", ("theta", "factor", "low_freq_factor", "high_freq_factor"))
def test_rope_numbers_are_positive(name: str, value: Any) -> None:
    message = rope_error(kind="llama3", **{name: value})
    assert f"rope {name}=" in message and str(value) in message and "is not a positive number" in message


@pytest.mark.parametrize("value", (0, -1, "8192", None))
def test_rope_original_context_is_positive(value: Any) -> None:
    message = rope_error(kind="llama3", factor=8.0, original_max_position_embeddings=value)
    assert "original_max_position_embeddings" in message and str(value) in message


@pytest.mark.parametrize(("low", "high"), ((4.0, 4.0), (5.0, 4.0)))
def test_rope_band_has_a_width(low: float, high: float) -> None:
    message = rope_error(kind="llama3", low_freq_factor=low, high_freq_factor=high)
    assert message == f"rope low_freq_factor={low} is not below high_freq_factor={high}"
