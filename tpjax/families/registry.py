"""Every model family: Hugging Face and GGUF configurations and weight names.

:mod:`tpjax.families` tells how to add one. Everything after this module knows only ``ModelConfig`` and
canonical weight names, which are Hugging Face's without the ``model.`` prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tpjax.config import ModelConfig, brief
from tpjax.errors import ConfigError, TpjaxError
from tpjax.families import cohere, deepseek, gemma, gpt, gpt_oss, llama, mixtral, phi, qwen, qwen_moe
from tpjax.families.config_reader import Fields
from tpjax.families.family import Family, GGUFArchitecture
from tpjax.families.gguf_metadata import GGUFView
from tpjax.families.quantization import quantization_of

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for lineage in (llama, qwen, gemma, phi, cohere, gpt, mixtral, qwen_moe, gpt_oss, deepseek)
    for family in lineage.FAMILIES
}
_BY_TYPE = FAMILIES | {name: family for family in FAMILIES.values() for name in family.other_types}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a decoded ``config.json``, as transformers 4 or 5 wrote it.

    Raises:
        ConfigError: the family, or a field's value, is not supported, or a field is missing or malformed.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"a configuration is an object, not a {type(raw).__name__}")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _BY_TYPE:
        raise ConfigError(
            f"model_type={brief(model_type)} is not supported; supported are {', '.join(FAMILIES)}"
        )
    fields = Fields(raw)
    with _malformed(fields.where):
        config = _BY_TYPE[model_type].config(fields)
        quantization_of(fields)  # for its errors: a configuration alone shows what cannot be loaded
        fields.finish()
        return config


def config_from_gguf(view: GGUFView) -> ModelConfig:
    """Reads a GGUF file's metadata.

    Raises:
        ConfigError: the architecture is not supported, or a key is missing or malformed.
    """
    architecture = gguf_architecture(view.architecture)
    with _malformed("GGUF metadata"):
        return architecture.config(view)


@contextmanager
def _malformed(where: str) -> Iterator[None]:
    """Converts what a value that no reader expected raises to a ``ConfigError``: files come from anywhere."""
    try:
        yield
    except TpjaxError:
        raise
    except (TypeError, ArithmeticError, AttributeError, ValueError, LookupError) as error:
        raise ConfigError(f"{where}: malformed: {brief(str(error))} ({type(error).__name__})") from error


def gguf_architecture(name: str) -> GGUFArchitecture:
    """Returns the GGUF architecture of a name.

    Raises:
        ConfigError: it is not supported.
    """
    known = {gguf.name: gguf for family in FAMILIES.values() for gguf in family.gguf}
    if name not in known:
        raise ConfigError(
            f"GGUF architecture {brief(name)} is not supported; supported are {', '.join(known)}"
        )
    return known[name]
