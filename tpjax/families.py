"""Every model family: Hugging Face and GGUF configurations and weight names.

To add a family, see ``mappings/``: a function from its ``config.json`` to ``ModelConfig`` and an entry in the
module's ``FAMILIES``; where it exists as GGUF, also the architecture's metadata and tensor names. Everything
after this module knows only ``ModelConfig`` and canonical weight names, which are Hugging Face's without the
``model.`` prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tpjax.config import ModelConfig
from tpjax.errors import ConfigError
from tpjax.mappings import gemma, llama
from tpjax.mappings.fields import Family, Fields, GGUFArchitecture, GGUFView
from tpjax.mappings.quantization import quantization_of

FAMILIES: dict[str, Family] = {
    family.model_type: family for lineage in (llama, gemma) for family in lineage.FAMILIES
}

# Fields that change what the model computes, and the values under which they change nothing.
_INERT: dict[str, tuple[Any, ...]] = {
    "use_bidirectional_attention": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "add_cross_attention": (None, False),
}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a decoded ``config.json``, as transformers 4 or 5 wrote it.

    Raises:
        ConfigError: the family, or a field's value, is not supported, or a field is missing or malformed.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"config.json holds a {type(raw).__name__}, not an object")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"model_type={model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
    for name, inert in _INERT.items():
        if raw.get(name) not in inert:
            raise ConfigError(f"config.json: {name}={raw[name]!r} is not supported")
    quantization_of(Fields(raw))  # for its refusals: a configuration alone tells what cannot be loaded
    return FAMILIES[model_type].config(Fields(raw))


def config_from_gguf(view: GGUFView) -> ModelConfig:
    """Reads a GGUF file's metadata.

    Raises:
        ConfigError: the architecture is not supported, or a key is missing.
    """
    return gguf_architecture(view.architecture).config(view)


def gguf_architecture(name: str) -> GGUFArchitecture:
    """The architecture of that name.

    Raises:
        ConfigError: there is none.
    """
    known = {gguf.name: gguf for family in FAMILIES.values() for gguf in family.gguf}
    if name not in known:
        raise ConfigError(f"GGUF architecture {name!r} is not supported; supported are {', '.join(known)}")
    return known[name]


def hf_name(canonical: str) -> str:
    """Name of a tensor in a Hugging Face checkpoint."""
    return canonical if canonical.startswith("lm_head.") else f"model.{canonical}"


def gguf_name(canonical: str, architecture: GGUFArchitecture) -> str:
    """Name of a tensor in a GGUF file."""
    top = {
        "embed_tokens.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if canonical in top:
        return top[canonical]
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", canonical)
    if layer is None or layer[2] not in architecture.layer_names:
        raise ConfigError(f"GGUF architecture {architecture.name!r} has no tensor for {canonical!r}")
    return f"blk.{layer[1]}.{architecture.layer_names[layer[2]]}.{layer[3]}"
