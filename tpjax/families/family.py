"""What describes a family: its readers of configurations and its tensor names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tpjax.config import ModelConfig
from tpjax.families.config_reader import Fields
from tpjax.families.gguf_metadata import GGUFView
from tpjax.families.tensor_names import TensorMapping, WeightMap


@dataclass(frozen=True)
class GGUFArchitecture:
    """A GGUF architecture of a family.

    Attributes:
        name: value of ``general.architecture``.
        config: metadata, tensor names and the vocabulary's size, to the configuration.
        modules: what the file calls a layer's modules, as in :class:`WeightMap`.
    """

    name: str
    config: Callable[[GGUFView], ModelConfig]
    modules: Callable[[ModelConfig], Mapping[str, TensorMapping]]

    def names(self, config: ModelConfig) -> WeightMap:
        """What the file calls the model's tensors."""
        top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
        stored = {**{name: TensorMapping(gguf) for name, gguf in top.items()}, **self.modules(config)}
        ignored = (r"rope_(freqs|factors_long|factors_short)\.weight",)
        return WeightMap(stored, layers="blk", prefixes=(("", ""),), ignored=ignored)


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Attributes:
        model_type: as ``config.json`` has it.
        examples: models of this family, for the README's table.
        config: reads ``config.json``.
        names: what a checkpoint calls the model's tensors.
        gguf: the GGUF architectures that hold this family.
    """

    model_type: str
    examples: str
    config: Callable[[Fields], ModelConfig]
    names: Callable[[ModelConfig], WeightMap] = lambda config: WeightMap()
    gguf: tuple[GGUFArchitecture, ...] = ()
