"""What describes a family: its readers of configurations and its tensor names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tpjax.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig, RopeConfig
from tpjax.families.config_reader import Fields, full_attention_in_all_layers
from tpjax.families.gguf_metadata import GGUFView
from tpjax.families.tensor_names import TensorMapping, WeightMap


@dataclass(frozen=True)
class GGUFArchitecture:
    """A GGUF architecture that holds a family.

    Attributes:
        name: value of ``general.architecture``.
        config: builds the configuration from the file's metadata and tensor shapes.
        modules: the places of a layer's modules in the file, as in :class:`WeightMap`.
    """

    name: str
    config: Callable[[GGUFView], ModelConfig]
    modules: Callable[[ModelConfig], Mapping[str, TensorMapping]]

    def names(self, config: ModelConfig) -> WeightMap:
        """Returns the weight map of the file."""
        top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
        stored = {**{name: TensorMapping(gguf) for name, gguf in top.items()}, **self.modules(config)}
        ignored = (r"rope_(freqs|factors_long|factors_short)\.weight",)
        return WeightMap(stored, layers="blk", prefixes=(("", ""),), ignored=ignored)


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Attributes:
        model_type: value of ``model_type`` in ``config.json``.
        examples: models of this family, for the README's table.
        config: builds the configuration from ``config.json``.
        names: builds the weight map of a safetensors checkpoint.
        gguf: the GGUF architectures that hold this family.
        other_types: other values of ``model_type`` that published files of the same architecture have.
    """

    model_type: str
    examples: str
    config: Callable[[Fields], ModelConfig]
    names: Callable[[ModelConfig], WeightMap] = lambda config: WeightMap()
    gguf: tuple[GGUFArchitecture, ...] = ()
    other_types: tuple[str, ...] = ()


def model_config(
    sizes: Mapping[str, Any],
    *,
    attention: Mapping[str, Any],
    rope: RopeConfig,
    mlp: Mapping[str, Any],
    norm: Mapping[str, Any],
    **model: Any,
) -> ModelConfig:
    """Builds a configuration from sizes and, group by group, what else the family sets.

    Args:
        sizes: sizes by their names in ``ModelConfig`` and its groups.
        attention: fields of ``AttentionConfig``. Unless they are given, ``query_scale`` is the inverse square
            root of ``head_dim`` and every layer has full attention.
        rope: the rotary embedding.
        mlp: fields of ``MLPConfig``.
        norm: fields of ``NormConfig``.
        **model: other fields of ``ModelConfig``.

    Raises:
        ConfigError: the fields contradict each other.
    """

    def own(*names: str) -> dict[str, Any]:
        return {name: sizes[name] for name in names}

    usual = {
        "query_scale": sizes["head_dim"] ** -0.5,
        "layer_types": full_attention_in_all_layers(sizes["num_layers"]),
    }
    return ModelConfig(
        **own("vocab_size", "hidden_size", "num_layers", "max_position_embeddings"),
        attention=AttentionConfig(**{**own("num_heads", "num_kv_heads", "head_dim"), **usual, **attention}),
        rope=rope,
        mlp=MLPConfig(**own("intermediate_size"), **mlp),
        norm=NormConfig(**norm),
        **model,
    )
