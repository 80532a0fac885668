"""Reads the variants of the rotary embedding from ``config.json`` and GGUF metadata."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from tpjax.config import (
    RopeKind,
    RopeParameters,
    brief,
    check_choice,
    check_positive,
    check_size,
)
from tpjax.errors import ConfigError
from tpjax.families.config_reader import Fields
from tpjax.families.gguf_metadata import GGUFView
from tpjax.families.unread import ROPE_NUMERIC

log = logging.getLogger(__name__)

_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


def rope_of(
    fields: Fields,
    context: int,
    default_theta: float = 10_000.0,
    default: Mapping[str, Any] | None = None,
) -> RopeParameters:
    """Reads the rotary embedding of a family that rotates all dimensions of a head.

    Raises:
        ConfigError: the configuration rotates a part of them; otherwise as :func:`partial_rope_of`.
    """
    rope, fraction = partial_rope_of(fields, context, default_theta, default=default)
    if fraction != 1:
        raise ConfigError(f"{fields.where}: partial_rotary_factor={fraction} is not supported")
    return rope


def partial_rope_of(
    fields: Fields,
    context: int,
    default_theta: float = 10_000.0,
    default_fraction: float = 1.0,
    default: Mapping[str, Any] | None = None,
) -> tuple[RopeParameters, float]:
    """Reads the rotary embedding, and the fraction of a head's dimensions that rotate.

    From ``rope_parameters`` (transformers 5), or ``rope_theta``, ``partial_rotary_factor`` and
    ``rope_scaling`` (4). If a file has both objects, only the older one counts, as in transformers.

    Args:
        fields: fields of ``config.json``.
        context: ``max_position_embeddings``, tokens.
        default_theta: default of ``rope_theta``.
        default_fraction: default of ``partial_rotary_factor``.
        default: the scaling of a family that has one by default.

    Raises:
        ConfigError: a parameter is missing, malformed or not supported.
    """
    parameters = rope_section(fields)
    if default is not None and not parameters.raw:
        parameters = Fields(default, parameters.where)
    theta = parameters.number("rope_theta", fields.number("rope_theta", default_theta))
    fraction = fields.number("partial_rotary_factor", default_fraction)
    fraction = parameters.number("partial_rotary_factor", fraction)
    check_fraction("partial_rotary_factor", fraction)
    # Phi-3 keeps it beside the parameters
    original = fields.integer("original_max_position_embeddings", None)
    return rope_from(parameters, theta, context, original), fraction


def check_fraction(name: str, value: float) -> None:
    """Raises a ``ConfigError`` unless a head's fraction that rotates is above 0 and at most 1."""
    if not 0 < value <= 1:
        raise ConfigError(f"{name}={brief(value)} is not above 0 and at most 1")


def rope_section(fields: Fields) -> Fields:
    """Returns the object that describes the rotary embedding; an empty one if there is none.

    If a file has both, transformers 5 uses ``rope_scaling`` alone: not even the base of the other counts.
    """
    new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
    if new.raw and old.raw and new.raw != old.raw:
        log.warning("%s: rope_scaling is used, rope_parameters beside it is not", fields.where)
    return old if old.raw else new


def rope_from(parameters: Fields, theta: float, context: int, original: int | None = None) -> RopeParameters:
    """Builds a rotary embedding from its object of parameters.

    Args:
        parameters: the object.
        theta: base.
        context: ``max_position_embeddings``, tokens.
        original: context of the pre-training, tokens, if the configuration has it beside the object.

    Raises:
        ConfigError: a parameter is missing, malformed or not supported.
    """
    parameters.read.update({"rope_theta", "partial_rotary_factor", "type"})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "su":
        kind = "longrope"  # its name in the first Phi-3 files
    check_choice("rope_type", kind, RopeKind)
    wanted = _ROPE_FIELDS.get(kind, ())
    missing = [name for name in wanted if parameters.get(name, None) is None]
    if missing:
        raise ConfigError(f"rope_type={brief(kind)} needs {', '.join(missing)}")
    inside = parameters.integer("original_max_position_embeddings", context)
    check_positive("rope_theta", theta)
    values: dict[str, Any] = {"theta": float(theta), "kind": kind}
    if kind in ("linear", "dynamic", "llama3", "yarn"):
        values["factor"] = parameters.get("factor")
    if kind == "llama3":
        values |= {name: parameters.get(name) for name in ("low_freq_factor", "high_freq_factor")}
    if kind in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = inside if original is None else original
    if kind == "dynamic":
        values["original_max_position_embeddings"] = context  # as transformers has it
    if kind == "yarn":
        for name in ("attn_factor", "extrapolation_factor"):
            parameters.require(name, 1)  # vLLM reads them
        values |= {
            "beta_fast": parameters.number("beta_fast", 32),
            "beta_slow": parameters.number("beta_slow", 1),
            "truncate": parameters.boolean("truncate", True),
            "attention_factor": _yarn_attention_factor(parameters),
        }
    if kind == "longrope":
        original = values["original_max_position_embeddings"]
        check_size("original_max_position_embeddings", original)
        values |= {
            "divisors": parameters.numbers("short_factor"),
            "long_divisors": parameters.numbers("long_factor"),
            "attention_factor": longrope_attention_factor(
                parameters.number("attention_factor", None),
                parameters.number("factor", context / original),
                original,
            ),
        }
    parameters.finish(numeric=ROPE_NUMERIC)
    return RopeParameters(**values)


def _yarn_attention_factor(parameters: Fields) -> float:
    """Returns the factor of section 3.4 of the YaRN paper; DeepSeek has the coefficients of two terms."""

    def term(coefficient: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0

    factor = parameters.number("factor")
    given: float | None = parameters.number("attention_factor", None)
    coefficients = [parameters.number(name, 0) for name in ("mscale", "mscale_all_dim")]
    check_positive("rope factor", factor)
    if given is not None:
        return given
    if not all(coefficients):
        return term(1.0)
    above, below = map(term, coefficients)
    for name, one in (("mscale", above), ("mscale_all_dim", below)):
        check_positive(f"{parameters.where}: the attention factor of {name}", one)
    return above / below


def longrope_attention_factor(given: float | None, factor: float, original: int) -> float:
    """Returns the factor of section 3.3 of the LongRoPE paper, unless the configuration sets it.

    Raises:
        ConfigError: there is none for these numbers.
    """
    check_positive("rope factor", factor)
    if given is None and factor > 1 and original == 1:
        raise ConfigError(
            f"rope factor={factor} and original_max_position_embeddings=1 give no attention factor"
        )
    if given is not None or factor <= 1:
        return 1.0 if given is None else given
    return math.sqrt(1 + math.log(factor) / math.log(original))


def gguf_rope(view: GGUFView, default_theta: float) -> RopeParameters:
    """Reads the rotary embedding from the metadata of a GGUF file.

    Raises:
        ConfigError: the scaling is not supported.
    """
    theta = view.number("rope.freq_base", default_theta)
    check_positive("rope.freq_base", theta)
    kind = view.get("rope.scaling.type", "none")
    if kind == "none":
        return RopeParameters(theta=theta, divisors=view.rope_divisors)
    if kind == "linear":
        return RopeParameters(theta=theta, kind="linear", factor=float(view.number("rope.scaling.factor")))
    if kind == "yarn":
        # llama.cpp multiplies the stored factor by its own term, which converters have divided out
        factor = float(view.number("rope.scaling.factor"))
        check_positive("rope.scaling.factor", factor)
        older = view.number("rope.scaling.yarn_attn_factor", 1.0)
        given = float(view.number("rope.scaling.attn_factor", older))
        return RopeParameters(
            theta=theta,
            kind="yarn",
            factor=factor,
            original_max_position_embeddings=view.get(
                "rope.scaling.original_context_length", view.get("context_length")
            ),
            beta_fast=float(view.number("rope.scaling.yarn_beta_fast", 32.0)),
            beta_slow=float(view.number("rope.scaling.yarn_beta_slow", 1.0)),
            attention_factor=given * (0.1 * math.log(factor) + 1),
        )
    raise ConfigError(f"GGUF rope.scaling.type={brief(kind)} is not supported: use none, linear or yarn")
