"""A model as the stages of a replica declare it: decoders without weights, and the sizes that fit.

A model in one piece is the case of one stage. What loads a model, what explains one and what compiles one for
chips that are not here begin with this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jax.numpy as jnp
from jax.sharding import Mesh

from tpjax.attention import Backend
from tpjax.checkpoints.parameters import Parameter, abstract_decoder, parameters
from tpjax.config import KVDtype, ModelConfig, Quantize
from tpjax.layers.weights import FormatOf
from tpjax.model import Decoder
from tpjax.runtime.limits import Limits
from tpjax.runtime.memory import DeviceMemory, MeshShare, plan_stages


@dataclass(frozen=True)
class AbstractStages:
    """The stages of one replica, from shapes alone.

    Attributes:
        config: the architecture, of the whole model.
        meshes: ``("tp",)`` of each stage.
        layers: numbers of the layers of each.
        backends: what computes attention in each.
        dtype: of activations, and of weights that are not quantised.
        quantize: what the weights of attention, MLPs and experts are kept in; ``None``: ``dtype``.
        quantize_head: embedding and head are kept so too.
        format_of: without ``quantize``: how canonical tensors are kept, as a checkpoint stores them.
        kv_dtype: what keys and values are kept in; ``auto``: ``dtype``.
    """

    config: ModelConfig
    meshes: Sequence[Mesh]
    layers: Sequence[range]
    backends: Sequence[Backend]
    dtype: jnp.dtype
    quantize: Quantize | None = None
    quantize_head: bool = False
    format_of: FormatOf | None = None
    kv_dtype: KVDtype = "auto"

    @cached_property
    def decoders(self) -> list[Decoder]:
        """The part of the model that each stage runs, without memory."""
        return [
            abstract_decoder(
                self.config,
                mesh,
                self.dtype,
                self.quantize,
                backend,
                self.format_of,
                part,
                self.quantize_head,
            )
            for mesh, part, backend in zip(self.meshes, self.layers, self.backends, strict=True)
        ]

    @cached_property
    def parameters(self) -> list[list[Parameter]]:
        """What each stage declares."""
        return [parameters(*stage) for stage in zip(self.decoders, self.meshes, strict=True)]

    @cached_property
    def shares(self) -> list[MeshShare]:
        """What each stage has of the model."""
        return [
            MeshShare(self.config.of_layers(part), mesh.size, sum(p.bytes_per_device for p in declared))
            for part, mesh, declared in zip(self.layers, self.meshes, self.parameters, strict=True)
        ]

    def limits(
        self,
        memory: DeviceMemory | None,
        max_model_len: int | None,
        max_slots: int | None,
        *,
        may_quantize: bool = False,
    ) -> Limits:
        """Chooses the sizes of slots, context and cache: :func:`tpjax.runtime.memory.plan_stages`.

        Args:
            memory: memory of each device; ``None``: enough.
            max_model_len: tokens of the longest sequence; ``None``: the model's longest context, if it fits.
            max_slots: sequences decoded at once; ``None``: what the devices have room for.
            may_quantize: whether an error may advise to quantise the weights.

        Raises:
            ConfigError: a size is out of range, or the model does not fit.
        """

        def quantized_bytes(kind: Quantize) -> list[int]:
            stages = replace(self, quantize=kind, quantize_head=False)
            return [share.weight_bytes for share in stages.shares]

        return plan_stages(
            self.config,
            self.shares,
            self.dtype,
            memory=memory,
            max_model_len=max_model_len,
            max_slots=max_slots,
            kv_dtype=self.kv_dtype,
            quantized_bytes=quantized_bytes if may_quantize else None,
        )
