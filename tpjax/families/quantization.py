"""Reads how a checkpoint's weights are quantised from ``config.json``."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from tpjax.config import brief, check_size
from tpjax.errors import ConfigError
from tpjax.families.config_reader import Fields
from tpjax.families.unread import QUANTIZATION_NUMERIC

Method: TypeAlias = Literal["fp8", "fbgemm_fp8", "modelopt", "mxfp4", "compressed-tensors", "gptq", "awq"]

SECTION = "quantization_config"
HF_QUANT_CONFIG = "hf_quant_config.json"  # beside config.json: older checkpoints of ModelOpt have only this
_SKIPPED = ("ignored_layers", "modules_to_not_convert", "ignore", "exclude_modules")

# Which tensors are quantised, the scales' dtype, and activations, which are not quantised here, are read off
# the tensors themselves or play no part. What a cache is kept in is the user's choice.
_NOT_NEEDED = frozenset(
    {
        *("dequantize", "modules_to_convert", "scale_fmt", "kv_cache_scheme"),
        *("global_compression_ratio", "quantization_status", "version"),  # compressed-tensors
        *(
            "damp_percent",
            "damp_auto_increment",
            "dataset",
            "true_sequential",
            "static_groups",
            "meta",
        ),  # GPTQ
        *("model_name_or_path", "model_file_base_name", "quantizer", "model_seqlen", "tokenizer", "backend"),
        *("use_exllama", "exllama_config", "max_input_length", "use_cuda_fp16", "block_name_to_quantize"),
        *(
            "module_name_preceding_first_block",
            "batch_size",
            "pad_token_id",
            "disable_exllama",
            "mse",
            "lm_head",
        ),
        *("do_fuse", "fuse_max_seq_len", "modules_to_fuse"),  # AWQ
        "producer",  # ModelOpt
        *("autoround_version", "enable_quanted_input", "enable_minmax_tuning", "iters", "lr"),  # AutoRound
        *("minmax_lr", "nsamples", "seqlen", "low_gpu_mem_usage", "gradient_accumulate_steps"),
    }
)

_OF_OBSERVERS = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype", "block_structure"})
_BITSANDBYTES_SWITCHES = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint's weights are quantised. They stay so in memory.

    Attributes:
        method: ``fp8`` (float8 e4m3 with a scale per block: DeepSeek-V3 report, section 3.3), ``fbgemm_fp8``
            (with one per output), ``mxfp4`` (OCP Microscaling Formats 1.0: 32 values of FP4 e2m1 with a scale
            of e8m0), ``gptq``, ``awq``, ``compressed-tensors``, or NVIDIA's ``modelopt``: float8 e4m3, or
            NVFP4 (16 values of FP4 e2m1 with a scale of e4m3, and one of float32 for all).
        block: rows and columns that share a scale; ``None``: all columns, of one row or all rows, as the
            shape of the scales says.
        bits: of a value.
        zeros: compressed-tensors: scales have zero points.
        zero_shift: GPTQ: what is added to stored zero points.
        is_float: values are floating-point numbers.
        skipped: modules that are not quantised, by name, or by a regular expression behind ``re:``.
        targets: compressed-tensors: modules that are quantised, by the same rules; none: all linear layers.
        block_given: whether the configuration has the block. AutoFP8's have none, and one scale a tensor.
    """

    method: Method
    block: tuple[int, int] | None = (128, 128)
    bits: int = 8
    zeros: bool = False
    zero_shift: int = 0
    is_float: bool = True
    skipped: tuple[str, ...] = field(default=(), compare=False)
    targets: tuple[str, ...] = field(default=(), compare=False)
    block_given: bool = field(default=True, compare=False)

    @property
    def described(self) -> str:
        """Names the format, for an error message."""
        if self.method == "mxfp4":
            return "MXFP4, 4 bits with a scale for 32 values"
        if self.method == "fp8":
            if self.block is None:
                return "float8 with a scale for each tensor"
            return f"float8 with a scale for each block of {self.block[0]} × {self.block[1]}"
        shared = "each output or tensor"
        if self.block is not None:
            height, width = self.block
            shared = f"{width} inputs" if height == 1 else f"each block of {height} × {width}"
        return f"{self.method}, {self.bits} bits with a scale for {shared}"


def quantization_of(fields: Fields) -> Quantization | None:
    """Reads ``quantization_config`` of a configuration or, where it has none, of its text part.

    Returns:
        ``None`` if there is none, or it is switched off.

    Raises:
        ConfigError: the method, or a setting that changes what the bytes mean, is not supported.
    """
    settings, text = fields.section(SECTION), fields.raw.get("text_config")
    if not settings.raw and isinstance(text, Mapping):  # where transformers looks next
        settings = Fields(text, f"{fields.where}: text_config").section(SECTION)
    return _quantization(settings) if settings.raw else None


def _quantization(settings: Fields) -> Quantization | None:
    method = settings.get("quant_method")
    if method == "bitsandbytes" and not any(settings.get(name, False) for name in _BITSANDBYTES_SWITCHES):
        return None  # switched off: transformers loads plain weights then
    if isinstance(method, str) and method.startswith("modelopt"):
        return modelopt_quantization(settings)
    readers = {
        **{"fp8": _fp8, "fbgemm_fp8": _fbgemm_fp8, "mxfp4": _mxfp4},
        **{"gptq": _gptq, "awq": _awq, "auto-round": _auto_round, "compressed-tensors": _compressed_tensors},
    }
    if not isinstance(method, str) or method not in readers:
        raise ConfigError(
            f"{settings.where}: quant_method={brief(method)} is not supported; "
            f"supported are {', '.join((*readers, 'modelopt'))}"
        )
    return _finished(settings, readers[method](settings))


def _finished(settings: Fields, found: Quantization) -> Quantization:
    """Adds the modules that are not quantised, and checks the settings that nobody has read."""
    lists = (settings.get(name, None) for name in _SKIPPED)
    skipped = tuple(str(name) for one in lists if isinstance(one, list) for name in one)
    settings.finish(_NOT_NEEDED, QUANTIZATION_NUMERIC)
    return replace(found, skipped=(*found.skipped, *skipped))


def _fp8(settings: Fields) -> Quantization:
    settings.require("activation_scheme", "dynamic", "static")  # activations are not quantised in either case
    _need(settings, fmt="e4m3", expert_dtype="fp8")
    block = settings.nullable("weight_block_size", [128, 128])
    sizes = None if block is None else _block(settings, "weight_block_size", block)
    given = "weight_block_size" in settings.raw
    return Quantization("fp8", sizes, block_given=given)


def _fbgemm_fp8(settings: Fields) -> Quantization:
    settings.number("activation_scale_ub", None)  # of activations, which are not quantised here
    return Quantization("fbgemm_fp8", None)


def _mxfp4(settings: Fields) -> Quantization:
    return Quantization("mxfp4", (1, 32), 4)


# What NVIDIA's Model Optimizer names its formats, which vLLM reads by these names too
# (https://github.com/NVIDIA/Model-Optimizer, modelopt/torch/export/quant_utils.py): bits and block.
_MODELOPT: dict[str, tuple[int, tuple[int, int] | None]] = {
    "FP8": (8, None),
    "FP8_PER_CHANNEL_PER_TOKEN": (8, None),
    "FP8_PB_WO": (8, (128, 128)),
    "MXFP8": (8, (1, 32)),
    "NVFP4": (4, (1, 16)),
    "W4A16_NVFP4": (4, (1, 16)),
}


def modelopt_quantization(settings: Fields) -> Quantization | None:
    """Reads what NVIDIA's Model Optimizer writes: ``quantization_config``, or a ``hf_quant_config.json``.

    The file has the settings in ``quantization``, the section of ``config.json`` beside ``quant_method``.

    Returns:
        ``None`` if only a cache was to be quantised.

    Raises:
        ConfigError: the format, or a setting that changes what the bytes mean, is not supported.
    """
    if settings.raw.get("quantization"):
        settings.get("quant_method", None)
        inner = settings.section("quantization")
        settings.finish(_NOT_NEEDED, QUANTIZATION_NUMERIC)
        settings = inner
    settings.get("quant_method", None)
    for name in ("kv_cache_quant_algo", "config_groups"):  # the latter say again what quant_algo does
        settings.get(name, None)
    algorithm = settings.get("quant_algo", None)
    if algorithm is None:
        return None
    known = algorithm.upper() if isinstance(algorithm, str) else ""  # FP8_PB_WO is written in small letters
    if known not in _MODELOPT:
        raise ConfigError(
            f"{settings.where}: quant_algo={brief(algorithm)} is not supported; "
            f"supported are {', '.join(_MODELOPT)}"
        )
    bits, block = _MODELOPT[known]
    if block is not None:
        _need(settings, group_size=block[1])  # only formats of groups say it
    found = _finished(settings, Quantization("modelopt", block, bits))
    return replace(found, skipped=tuple(map(_wildcard, found.skipped)))


def _wildcard(name: str) -> str:
    """Returns a module's name, or the expression for a name with wildcards, whose ``*`` crosses dots."""
    return f"re:{fnmatch.translate(name)}" if set(name) & set("*?[") else name


def _gptq(settings: Fields) -> Quantization:
    # with static groups, or one group, inputs stay in their order: the tensors say whether they do
    settings.boolean("desc_act", False)
    _need(settings, pack_dtype="int32", dynamic=None, is_marlin_format=False)
    bits = settings.get("bits", 4)
    if type(bits) is not int or bits not in (4, 8):
        raise ConfigError(f"{settings.where}: bits={brief(bits)} is not supported: use 4 or 8")
    settings.get("sym", None)  # zero points are stored in either case
    kind = settings.get("checkpoint_format", settings.get("format", "gptq"))
    if kind not in ("gptq", "gptq_v2"):
        raise ConfigError(
            f"{settings.where}: checkpoint_format={brief(kind)} is not supported: use gptq or gptq_v2"
        )
    return Quantization("gptq", _group(settings), bits, zero_shift=int(kind == "gptq"), is_float=False)


def _awq(settings: Fields) -> Quantization:
    _need(settings, bits=4, w_bit=4, zero_point=True)  # w_bit, q_group_size: names of the first tool
    for name in ("version", "checkpoint_format", "format"):
        version = settings.get(name, "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise ConfigError(f"{settings.where}: {name}={brief(version)} is not supported: use gemm")
    first = "q_group_size" in settings.raw and "group_size" not in settings.raw
    group = _group(settings, "q_group_size" if first else "group_size")
    return Quantization("awq", group, 4, is_float=False)


def _auto_round(settings: Fields) -> Quantization:
    """Reads AutoRound's settings: it packs as GPTQ or as AWQ (https://github.com/intel/auto-round)."""
    _need(settings, data_type="int")
    packing = settings.get("packing_format")
    kinds = {"auto_round:auto_gptq": _gptq, "auto_round:gptq": _gptq, "auto_round:auto_awq": _awq}
    if not isinstance(packing, str) or packing not in kinds:
        raise ConfigError(
            f"{settings.where}: packing_format={brief(packing)} is not supported: use auto_round:auto_gptq "
            "or auto_round:auto_awq"
        )
    settings.get("sym", None)  # zero points are stored in either case
    found, layers = kinds[packing](settings), settings.section("extra_config")
    skipped = []
    for name in layers.raw:
        own = layers.section(name)
        if own.integer("bits", found.bits) >= 16:
            skipped.append(f"re:{name}" if set(name) & set("*?[(^$|+\\\\") else name)
        else:
            _need(own, bits=found.bits, data_type="int", group_size=settings.raw.get("group_size", 128))
    return replace(found, skipped=tuple(skipped))


def _compressed_tensors(settings: Fields) -> Quantization:
    """Reads the groups of compressed-tensors, whose weights must all be quantised in one way."""
    sparse = settings.get("sparsity_config", None)
    if sparse and not (isinstance(sparse, Mapping) and sparse.get("format") == "dense"):
        raise ConfigError(f"{settings.where}: sparsity_config={brief(sparse)} is not supported: use dense")
    layout = settings.get("format", None)  # newer files have it in the groups alone
    groups = settings.section("config_groups")
    found = {_of_group(groups.section(name), layout) for name in groups.raw}
    if len(found) != 1:
        raise ConfigError(f"{groups.where} has {len(found)} ways to quantise weights: 1 is supported")
    lists = (groups.section(name).get("targets", None) for name in groups.raw)
    targets = [str(target) for one in lists for target in (one if isinstance(one, list) else ["Linear"])]
    classes = any("." not in target and not target.startswith("re:") for target in targets)
    return replace(found.pop(), targets=() if classes else tuple(targets))  # classes: Linear, or unknown here


def _of_group(group: Fields, layout: Any) -> Quantization:
    layout = group.get("format", layout)
    weights = group.section("weights")
    bits, kind, strategy = (
        weights.integer("num_bits"),
        weights.get("type", "int"),
        weights.get("strategy", None),
    )
    known = {
        "pack-quantized": ("int", (4, 8)),
        "int-quantized": ("int", (8,)),
        "float-quantized": ("float", (8,)),
        "naive-quantized": (kind, (8,)),
        "nvfp4-pack-quantized": ("float", (4,)),
        "mxfp4-pack-quantized": ("float", (4,)),
        "mxfp8-quantized": ("float", (8,)),
    }
    if (
        not isinstance(layout, str)
        or layout not in known
        or kind != known[layout][0]
        or bits not in known[layout][1]
        or kind not in ("int", "float")
    ):
        raise ConfigError(
            f"{weights.where}: {bits} bits of type {brief(kind)} with format={brief(layout)} are not "
            "supported: use 8 bits in int-quantized, float-quantized or mxfp8-quantized, 4 or 8 in "
            "pack-quantized, 4 in nvfp4-pack-quantized or mxfp4-pack-quantized"
        )
    size = weights.get("group_size", None)
    strategy = strategy or ("channel" if size in (None, -1) else "group")
    actorder = weights.get("actorder", None)
    if actorder not in (None, False, "weight", "static"):
        raise ConfigError(
            f"{weights.where}: actorder={brief(actorder)} is not supported: it puts inputs in another order"
        )
    if weights.get("dynamic", False):
        raise ConfigError(f"{weights.where}: dynamic=True is not supported: weights have scales")
    block: tuple[int, int] | None = None
    only = {"nvfp4": ("tensor_group", 16), "mxfp4": ("group", 32), "mxfp8": ("group", 32)}.get(layout[:5])
    if only is not None and (strategy, size) != only:
        raise ConfigError(
            f"{weights.where}: strategy={brief(strategy)} and group_size={brief(size)} with format={layout} "
            f"are not supported: use {only[0]} and {only[1]}"
        )
    if strategy == "group" or only is not None:
        check_size("group_size", size)
        block = (1, size)
    elif strategy == "block":
        block = _block(weights, "block_structure", weights.get("block_structure"))
    elif strategy not in ("tensor", "channel"):
        known_ones = "tensor, channel, group or block"
        raise ConfigError(f"{weights.where}: strategy={brief(strategy)} is not supported: use {known_ones}")
    zeros = not weights.get("symmetric", True) and kind == "int"
    weights.finish(_OF_OBSERVERS, QUANTIZATION_NUMERIC)
    return Quantization("compressed-tensors", block, bits, zeros, is_float=kind == "float")


def _need(settings: Fields, **known: Any) -> None:
    """Raises a ``ConfigError`` unless each setting is absent or has its one supported value."""
    for name, only in known.items():
        value = settings.get(name, only)
        if value != only and not (only is None and not value):
            raise ConfigError(f"{settings.where}: {name}={brief(value)} is not supported: use {only}")


def _group(settings: Fields, name: str = "group_size") -> tuple[int, int] | None:
    """Reads the inputs that share a scale; -1 stands for all."""
    size = settings.get(name, 128)
    if size == -1:
        return None
    check_size(name, size)
    return 1, size


def _block(settings: Fields, name: str, block: Any) -> tuple[int, int]:
    if isinstance(block, str) and re.fullmatch(r"[1-9][0-9]{0,8}x[1-9][0-9]{0,8}", block):
        block = [int(size) for size in block.split("x")]  # as older files of compressed-tensors have it
    if not isinstance(block, list | tuple) or len(block) != 2:
        raise ConfigError(f"{settings.where}: {name}={brief(block)} is not supported: use two sizes")
    for size in block:
        check_size(name, size)
    return block[0], block[1]
