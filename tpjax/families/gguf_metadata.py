"""Reads the metadata of a GGUF file that its architectures share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpjax.config import brief
from tpjax.errors import ConfigError
from tpjax.families.config_reader import REQUIRED, checked_sizes, is_number


@dataclass(frozen=True)
class GGUFView:
    """The description of a model in a GGUF file, without the weights.

    Attributes:
        architecture: prefix of its metadata keys.
        metadata: all metadata, by key.
        tensor_shapes: shapes by GGUF tensor name, in [out, in] order.
        rope_divisors: the tensor ``rope_freqs.weight``, or ``rope_factors_short.weight``, if there is one.
        rope_long_divisors: the tensor ``rope_factors_long.weight``, if there is one.
    """

    architecture: str
    metadata: Mapping[str, Any]
    tensor_shapes: Mapping[str, tuple[int, ...]]
    rope_divisors: tuple[float, ...] | None = None
    rope_long_divisors: tuple[float, ...] | None = None

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """Returns the architecture's metadata of a name, or ``default`` if there is none.

        Raises:
            ConfigError: there is neither.
        """
        key = f"{self.architecture}.{name}"
        value = self.metadata.get(key, default)
        if value is REQUIRED:
            raise ConfigError(f"the GGUF file has no metadata {key!r}")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """Returns a finite number, with :meth:`get`'s defaults.

        Raises:
            ConfigError: there is none, or it is none.
        """
        value = self.get(name, default)
        if value is not default and not is_number(value):
            raise ConfigError(f"GGUF {name}={brief(value)} is not a number that a float can hold")
        return value

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        if "token_embd.weight" not in self.tensor_shapes:
            raise ConfigError("the GGUF file has no tensor 'token_embd.weight'")
        return self.tensor_shapes["token_embd.weight"][0]

    @property
    def tied(self) -> bool:
        """Whether the vocabulary projection is the embedding."""
        return "output.weight" not in self.tensor_shapes


def gguf_sizes(view: GGUFView) -> dict[str, Any]:
    """Reads the sizes that have the same name in every GGUF architecture.

    Returns:
        Sizes by their names in ``ModelConfig`` and its groups.
    """
    hidden, heads = view.get("embedding_length"), view.get("attention.head_count")
    checked_sizes({"hidden_size": hidden, "num_heads": heads})
    return checked_sizes(
        {
            "vocab_size": view.vocab_size,
            "hidden_size": hidden,
            "intermediate_size": view.get("feed_forward_length"),
            "num_layers": view.get("block_count"),
            "num_heads": heads,
            "num_kv_heads": view.get("attention.head_count_kv", heads),
            "head_dim": view.get("attention.key_length", hidden // heads),
            "max_position_embeddings": view.get("context_length"),
        }
    )
