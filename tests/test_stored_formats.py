"""Checkpoints that are quantised already: what is read, and that it stays so in memory at any tp."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import GOLDENS
from flax import nnx
from safetensors.numpy import save_file
from stepwise import Stepwise

from tpjax import LLM
from tpjax.checkpoints import skipped
from tpjax.checkpoints.declared import declared_formats, formats_of
from tpjax.checkpoints.load import check_tensors, load_decoder
from tpjax.checkpoints.opening import open_checkpoint, read_config
from tpjax.checkpoints.parameters import abstract_decoder, parameters
from tpjax.checkpoints.skipped import matcher_of
from tpjax.config import brief
from tpjax.errors import CheckpointError, ConfigError
from tpjax.families.quantization import Quantization
from tpjax.families.registry import FAMILIES, config_from_hf
from tpjax.families.tensor_names import WeightMap
from tpjax.layers.weights import FormatOf, WeightFormat, dtype_bits
from tpjax.mesh import make_mesh
from tpjax.planning.published import find_model
from tpjax.runtime.counts import Counts, stored_bytes
from tpjax.runtime.device_speed import stored_itemsizes

F32 = jnp.dtype("float32")
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
GROUP = 16
PROMPT = np.random.default_rng(2).integers(0, 64, 24)
Tensors = dict[str, np.ndarray]
Stored = tuple[Tensors, np.ndarray]  # by the part of the name behind the module's, and what they stand for
RNG = np.random.default_rng(0)


def uniform(*shape: int) -> np.ndarray:
    return RNG.uniform(0.5, 2, shape).astype(np.float32) / 64


def spread(scales: np.ndarray, height: int, width: int, shape: tuple[int, ...]) -> np.ndarray:
    """Repeats the scale of each block for each of its elements."""
    return np.kron(scales, np.ones((height, width), scales.dtype))[: shape[0], : shape[1]]


def float8(shape: tuple[int, int]) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32).astype(E4M3)


def fp8_blocks(height: int) -> Callable[[tuple[int, int]], Stored]:
    def stored(shape: tuple[int, int]) -> Stored:
        values, scales = float8(shape), uniform(-(-shape[0] // height), -(-shape[1] // GROUP))
        worth = values.astype(np.float32) * spread(scales, height, GROUP, shape)
        return {"weight": values, "weight_scale_inv": scales}, worth

    return stored


def fp8_of(*scale_shape: int) -> Callable[[tuple[int, int]], Stored]:
    """One scale for the tensor, or one for each output."""

    def stored(shape: tuple[int, int]) -> Stored:
        values, scales = float8(shape), uniform(*(shape[0] if size == -1 else size for size in scale_shape))
        worth = values.astype(np.float32) * scales.reshape(-1, 1)
        one = np.ones(1, np.float32)  # of activations, which are not quantised here
        activations = {"input_scale": one, "input_zero_point": one.astype(np.int8), "output_scale": one}
        return {"weight": values, "weight_scale": scales, **activations}, worth

    return stored


def fp8_tensor(shape: tuple[int, int]) -> Stored:
    tensors, worth = fp8_of()(shape)
    return {"weight": tensors["weight"], "weight_scale_inv": tensors["weight_scale"]}, worth


def fp8_static(shape: tuple[int, int]) -> Stored:
    """As transformers writes it: the scale of activations, which are not quantised here, under its name."""
    tensors, worth = fp8_tensor(shape)
    return {**tensors, "activation_scale": np.ones((), np.float32)}, worth


def fbgemm(shape: tuple[int, int]) -> Stored:
    tensors, worth = fp8_of(-1, 1)(shape)
    bound = np.full(1, 1200, np.float32)  # of activations, which are not quantised here
    return {
        "weight": tensors["weight"],
        "weight_scale": tensors["weight_scale"],
        "input_scale_ub": bound,
    }, worth


def modelopt(*scale_shape: int) -> Callable[[tuple[int, int]], Stored]:
    """With the scales of a quantised cache: each projection has them here, keys' and values' in files."""

    def stored(shape: tuple[int, int]) -> Stored:
        tensors, worth = fp8_of(*scale_shape)(shape)
        one = np.ones((), np.float32)
        cache = {"k_scale": one, "v_scale": one} if shape == (16, 48) else {}
        return {
            "weight": tensors["weight"],
            "weight_scale": tensors["weight_scale"],
            "input_scale": one,
        } | cache, worth

    return stored


def fp4_values(codes: np.ndarray) -> np.ndarray:
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[codes & 7]
    return np.where(codes & 8, -magnitudes, magnitudes)


def nvfp4(shape: tuple[int, int]) -> Stored:
    """NVFP4QTensor of Model Optimizer: a byte is two values, the first in the low half."""
    codes = RNG.integers(0, 16, shape).astype(np.uint8)
    scales, shared = uniform(shape[0], shape[1] // 16) * 4096, np.float32(uniform()) / 64
    scales = scales.astype(E4M3)
    worth = fp4_values(codes) * spread(scales.astype(np.float32) * shared, 1, 16, shape)
    return {
        "weight": codes[:, ::2] + 16 * codes[:, 1::2],
        "weight_scale": scales,
        "weight_scale_2": np.asarray(shared),
        "input_scale": np.ones((), np.float32),
    }, worth


def ct_nvfp4(shape: tuple[int, int]) -> Stored:
    """As compressed-tensors has it: the number for all is the other's inverse."""
    tensors, _ = nvfp4(shape)
    scales, shared = tensors["weight_scale"], np.float32(1 / tensors["weight_scale_2"])
    codes = np.stack([tensors["weight"] % 16, tensors["weight"] // 16], axis=-1).reshape(shape)
    worth = fp4_values(codes) * spread(scales.astype(np.float32) / shared, 1, 16, shape)
    one = np.ones(1, np.float32)
    stored = {"weight_packed": tensors["weight"], "weight_scale": scales, "weight_global_scale": shared * one}
    return {**stored, "input_global_scale": one}, worth


def mx_scales(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Exponents of 2, a byte for 32 inputs, and what they stand for. The last group may be half a one."""
    exponents = RNG.integers(118, 124, (shape[0], -(-shape[1] // 32))).astype(np.uint8)
    return exponents, spread(np.exp2(exponents.astype(np.float32) - 127), 1, 32, shape)


def mxfp8(shape: tuple[int, int]) -> Stored:
    values, (exponents, scales) = float8(shape), mx_scales(shape)
    return {"weight": values, "weight_scale": exponents}, values.astype(np.float32) * scales


def ct_mxfp4(shape: tuple[int, int]) -> Stored:
    codes = RNG.integers(0, 16, shape).astype(np.uint8)
    exponents, scales = mx_scales(shape)
    packed = codes[:, ::2] + 16 * codes[:, 1::2]
    return {"weight_packed": packed, "weight_scale": exponents}, fp4_values(codes) * scales


def int8_channels(shape: tuple[int, int]) -> Stored:
    values, scales = RNG.integers(-128, 128, shape).astype(np.int8), uniform(shape[0], 1)
    scales = scales.astype(ml_dtypes.bfloat16)
    worth = values.astype(np.float32) * scales.astype(np.float32)
    return {"weight": values, "weight_scale": scales}, worth


def int8_zeros(shape: tuple[int, int]) -> Stored:
    tensors, _ = int8_channels(shape)
    zero = RNG.integers(-128, 128, (shape[0], 1)).astype(np.int8)
    worth = (tensors["weight"].astype(np.float32) - zero) * tensors["weight_scale"].astype(np.float32)
    return {**tensors, "weight_zero_point": zero}, worth


def words(
    numbers: np.ndarray, axis: int, order: tuple[int, ...] = tuple(range(8)), bits: int = 4
) -> np.ndarray:
    """Packs unsigned numbers along an axis one by one; ``order`` has the number at each place of a word."""
    moved = np.moveaxis(numbers.astype(np.int64), axis, -1)
    count = 32 // bits
    out = np.zeros((*moved.shape[:-1], -(-moved.shape[-1] // count)), np.int64)
    for word in range(out.shape[-1]):
        for place in range(count):
            at = word * count + order[place] if count == 8 else word * count + place
            if at < moved.shape[-1]:
                out[..., word] |= moved[..., at] << (bits * place)
    return np.moveaxis(out.astype(np.uint32).view(np.int32), -1, axis)


def packed(zeros: bool, bits: int = 4) -> Callable[[tuple[int, int]], Stored]:
    def stored(shape: tuple[int, int]) -> Stored:
        half, groups = 2 ** (bits - 1), shape[1] // GROUP
        values = RNG.integers(-half, half, shape)
        scales = uniform(shape[0], groups).astype(ml_dtypes.bfloat16)
        zero = RNG.integers(-half, half, (shape[0], groups)) * zeros
        worth = values - spread(zero, 1, GROUP, shape).astype(np.float32)
        worth = worth.astype(np.float32) * spread(scales.astype(np.float32), 1, GROUP, shape)
        tensors = {
            "weight_packed": words(values + half, 1, bits=bits),
            "weight_scale": scales,
            "weight_shape": np.array(shape, np.int64),
        }
        if zeros:
            tensors["weight_zero_point"] = words(zero + half, 0, bits=bits)
        return tensors, worth

    return stored


def gptq(shift: int, bits: int = 4) -> Callable[[tuple[int, int]], Stored]:
    """The first version stores zero points less one: GPTQModel takes 0x11111111 from their words."""

    def stored(shape: tuple[int, int]) -> Stored:
        outputs, inputs = shape
        values, zero = RNG.integers(0, 2**bits, shape), RNG.integers(0, 2**bits, (outputs, inputs // GROUP))
        scales = uniform(outputs, inputs // GROUP).astype(np.float16)
        worth = (values - spread(zero, 1, GROUP, shape)).astype(np.float32)
        worth = worth * spread(scales.astype(np.float32), 1, GROUP, shape)
        ones = np.uint32({4: 0x11111111, 8: 0x01010101}[bits] * shift)
        return {
            "qweight": words(values.T, 0, bits=bits),
            "qzeros": (words(zero.T, 1, bits=bits).view(np.uint32) - ones).view(np.int32),
            "scales": np.ascontiguousarray(scales.T),
            "g_idx": (np.arange(inputs) // GROUP).astype(np.int32),
        }, worth

    return stored


def awq(shape: tuple[int, int]) -> Stored:
    outputs, inputs = shape
    values, zero = RNG.integers(0, 16, shape), RNG.integers(0, 16, (outputs, inputs // GROUP))
    scales = uniform(outputs, inputs // GROUP).astype(np.float16)
    worth = (values - spread(zero, 1, GROUP, shape)).astype(np.float32)
    worth = worth * spread(scales.astype(np.float32), 1, GROUP, shape)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(values.T, 1, order),
        "qzeros": words(zero.T, 1, order),
        "scales": np.ascontiguousarray(scales.T),
    }, worth


def compressed(layout: str, bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "symmetric": True,
        "observer": "minmax",
        **more,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "ignore": ["lm_head"],
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "producer": {"name": "modelopt", "version": "0.29.0"},
}
FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [12, GROUP]}
FORMATS: dict[str, tuple[Callable[[tuple[int, int]], Stored], dict[str, Any], str]] = {
    "fp8-blocks": (fp8_blocks(12), FP8_BLOCKS, "float8_e4m3fn"),
    "fp8-tensor": (fp8_tensor, {"quant_method": "fp8", "weight_block_size": None}, "float8_e4m3fn"),
    "fp8-auto": (fp8_of(), {"quant_method": "fp8", "ignored_layers": ["lm_head"]}, "float8_e4m3fn"),
    "fp8-static": (
        fp8_static,
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        "float8_e4m3fn",
    ),
    "fbgemm": (fbgemm, FBGEMM, "float8_e4m3fn"),
    "modelopt-fp8": (modelopt(), MODELOPT, "float8_e4m3fn"),
    "modelopt-fp8-channel": (
        modelopt(-1),
        {**MODELOPT, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        "float8_e4m3fn",
    ),
    "modelopt-nvfp4": (nvfp4, {**MODELOPT, "quant_algo": "NVFP4"}, "float8_e4m3fn"),
    "ct-fp8-tensor": (fp8_of(1), compressed("float-quantized", 8, "float", "tensor"), "float8_e4m3fn"),
    "ct-fp8-channel": (fp8_of(-1, 1), compressed("float-quantized", 8, "float", "channel"), "float8_e4m3fn"),
    "ct-nvfp4": (
        ct_nvfp4,
        compressed("nvfp4-pack-quantized", 4, "float", "tensor_group", group_size=16),
        "float8_e4m3fn",
    ),
    "ct-mxfp4": (
        ct_mxfp4,
        compressed("mxfp4-pack-quantized", 4, "float", "group", group_size=32),
        "float8_e4m3fn",
    ),
    "ct-mxfp8": (mxfp8, compressed("mxfp8-quantized", 8, "float", "group", group_size=32), "float8_e4m3fn"),
    "modelopt-mxfp8": (mxfp8, {**MODELOPT, "quant_algo": "MXFP8"}, "float8_e4m3fn"),
    "ct-int8": (int8_channels, compressed("int-quantized", 8, "int", "channel"), "int8"),
    "ct-int8-zeros": (
        int8_zeros,
        compressed("int-quantized", 8, "int", "channel", symmetric=False),
        "int8",
    ),
    "ct-int4": (packed(False), compressed("pack-quantized", 4, "int", "group", group_size=GROUP), "int8"),
    "ct-int4-zeros": (
        packed(True),
        compressed("pack-quantized", 4, "int", "group", group_size=GROUP, symmetric=False),
        "int8",
    ),
    "ct-w8a16": (packed(False, 8), compressed("pack-quantized", 8, "int", "group", group_size=GROUP), "int8"),
    "gptq": (gptq(1), GPTQ, "int8"),
    "gptq-8": (gptq(1, 8), {**GPTQ, "bits": 8}, "int8"),
    "gptq-v2": (gptq(0), {**GPTQ, "checkpoint_format": "gptq_v2"}, "int8"),
    "awq": (awq, AWQ, "int8"),
}  # fmt: skip
FAST = {("gptq", 3), ("fp8-blocks", 3), ("awq", 3), ("ct-int4-zeros", 3), ("modelopt-nvfp4", 3)}
# Formats that are kept as another one is, which is tried at every tp.
SAME = {
    *("fp8-tensor", "fp8-auto", "fp8-static", "fbgemm", "ct-fp8-tensor"),  # ct-fp8-channel
    *("modelopt-fp8", "modelopt-fp8-channel"),
    *("ct-nvfp4", "ct-mxfp4", "ct-mxfp8", "modelopt-mxfp8"),  # modelopt-nvfp4, gpt-oss, fp8-blocks
    *("gptq", "gptq-v2"),  # awq
}


def tensors_of(stored: Callable[[tuple[int, int]], Stored]) -> tuple[Tensors, Tensors]:
    """A checkpoint's tensors, and its weights as float32 by canonical names."""
    hidden, width = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    files: Tensors = {}
    weights: Tensors = {}
    for name, shape in {"embed_tokens": (64, hidden), "lm_head": (64, hidden), "norm": (hidden,)}.items():
        weights[f"{name}.weight"] = RNG.normal(size=shape).astype(np.float32)
    matrices = {
        **{f"self_attn.{name}_proj": (48 if name == "q" else 16, hidden) for name in "qkv"},
        "self_attn.o_proj": (hidden, 48),
        **{f"mlp.{name}_proj": (width, hidden) for name in ("gate", "up")},
        "mlp.down_proj": (hidden, width),
    }
    for layer in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"layers.{layer}.{norm}.weight"] = np.ones(hidden, np.float32)
    files |= {name if name == "lm_head.weight" else f"model.{name}": x for name, x in weights.items()}
    for layer in range(2):
        for name, shape in matrices.items():
            parts, worth = stored(shape)
            weights[f"layers.{layer}.{name}.weight"] = worth
            files |= {f"model.layers.{layer}.{name}.{part}": x for part, x in parts.items()}
    return files, weights


def save(
    path: Path, files: Mapping[str, np.ndarray], settings: dict[str, Any], config: dict[str, Any] = CONFIG
) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    save_file({name: np.asarray(x, order="C") for name, x in files.items()}, path / "model.safetensors")
    return path


@pytest.fixture(scope="module", params=FORMATS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Tensors]:
    stored, settings, _ = FORMATS[request.param]
    files, weights = tensors_of(stored)
    return request.param, save(tmp_path_factory.mktemp(request.param), files, settings), weights


def test_what_is_read(model: tuple[str, Path, Tensors]) -> None:
    """Any box of any tensor, dequantised; and that all of them stay as they are stored."""
    name, path, weights = model
    checkpoint = open_checkpoint(path)
    rng = np.random.default_rng(1)
    for key, want in weights.items():
        for _ in range(5):
            box = tuple(
                slice(*np.sort(rng.choice(size + 1, 2, replace=False)).tolist()) for size in want.shape
            )
            np.testing.assert_array_equal(checkpoint.source.read(key, box), want[box], err_msg=f"{key} {box}")
    mesh = make_mesh(2)
    model_of = abstract_decoder(checkpoint.config, mesh, F32, format_of=checkpoint.source.format_of)
    kept = {one.dtype.name for one in parameters(model_of, mesh) if "_proj" in one.name and one.is_quantized}
    assert kept == {FORMATS[name][2]}
    assert sum(one.is_quantized for one in parameters(model_of, mesh)) == 8


def test_a_configuration_alone(model: tuple[str, Path, Tensors]) -> None:
    """It says the same formats, up to the dtype of scales, and the same bytes."""
    name, path, weights = model
    checkpoint = open_checkpoint(path)
    declared = declared_formats(path / "config.json", checkpoint.config)
    assert declared is not None
    for key in weights:
        if "norm" not in key:
            said, stored = declared(key), checkpoint.source.format_of(key)
            said = said and replace(said, scales=F32)
            assert said == (stored and replace(stored, scales=F32)), key
    wide = partial(_with_scales_of, declared, checkpoint.source.format_of)
    mesh = make_mesh(1)
    kept = abstract_decoder(checkpoint.config, mesh, jnp.dtype("bfloat16"), format_of=wide)
    held = Counts("", checkpoint.config).on_device(1)
    sizes = stored_itemsizes(held, jnp.dtype("bfloat16"), parameters(kept, mesh))
    bits = {p.quantized.kept.values for p in parameters(kept, mesh) if p.quantized is not None}
    # on a CPU 4 bits take a byte, and a group that ends early is counted as the part of one that it is
    if dtype_bits(bits.pop()) == 8 and not name.endswith("mxfp8"):
        assert stored_bytes(checkpoint.config, wide) == pytest.approx(sizes.weights)
    known = find_model(str(path / "config.json"))
    assert known.quantization == checkpoint.quantization and known.stored_bytes is not None
    with pytest.raises(ConfigError, match=r"config\.json has them as .*, and rounding those to int8 would"):
        known.check_quantize("int8", quantize_head=False)


def _with_scales_of(declared: FormatOf, stored: FormatOf, name: str) -> WeightFormat | None:
    said, found = declared(name), stored(name)
    return said if said is None or found is None else replace(said, scales=found.scales)


def test_modules_that_are_not_quantised(tmp_path: Path) -> None:
    """By name, by the name of what they are in, and by a regular expression."""

    def formats(**settings: Any) -> set[str]:
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": settings}))
        declared = declared_formats(tmp_path, read_config(tmp_path))
        assert declared is not None
        modules = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
        names = [f"layers.{layer}.{module}.weight" for layer in range(2) for module in modules]
        return {name.removesuffix(".weight") for name in names if declared(name) is not None}

    fp8 = {"quant_method": "fp8"}
    everything = formats(**fp8)
    assert len(everything) == 6
    inside = {"layers.0.self_attn.q_proj", "layers.0.self_attn.o_proj"}
    assert formats(**fp8, modules_to_not_convert=["model.layers.0.self_attn"]) == everything - inside
    assert formats(**fp8, ignored_layers=["o_proj"]) == {name for name in everything if "o_proj" not in name}
    ignored = compressed("int-quantized", 8, "int", "channel") | {"ignore": ["re:.*mlp.*", "lm_head"]}
    assert formats(**ignored) == {name for name in everything if "mlp" not in name}
    groups = ignored["config_groups"]
    mlp, queries = (groups["group_0"] | {"targets": one} for one in (["re:.*mlp.*"], ["re:.*0.*q_proj$"]))
    ignored |= {"ignore": ["lm_head"], "config_groups": {"group_0": mlp, "group_1": queries}}
    assert formats(**ignored) == {
        *(name for name in everything if "mlp" in name),
        "layers.0.self_attn.q_proj",
    }


def by_matching(module: str, entries: tuple[str, ...]) -> bool:
    """The definition, an expression for each entry."""
    for name in entries:
        pattern = name.removeprefix("re:")
        if name == pattern:
            pattern = rf"(.*\.)?{'[^.]*'.join(map(re.escape, name.split('*')))}(\..*)?$"
        if re.match(pattern, module):
            return True
    return False


def test_entries_match_as_the_definition_says() -> None:
    draw = random.Random(3)
    modules = ["".join(draw.choices("aab.", k=draw.randrange(9))) for _ in range(60)]
    entries = ["".join(draw.choices("aab.*", k=draw.randrange(6))) for _ in range(600)]
    entries += ["re:", "re:a", "re:.*b", r"re:a*\.(b|aa)$", "re:b.*a.*", "a\n"]
    found = {(one, two) for one in entries for two in modules if matcher_of([one])(two)}
    assert found == {(one, two) for one in entries for two in modules if by_matching(two, (one,))}
    for _ in range(50):
        some = tuple(draw.sample(entries, 3))
        assert list(map(matcher_of(some), modules)) == [by_matching(one, some) for one in modules]


@pytest.mark.parametrize(
    "entry",
    (
        *("re:(", "re:a{99999999999}", "re:" + "(" * 5000, "re:(a+)+$", "re:(a|a)*$"),
        *("re:" + "a?" * 40 + "b", "re:(?>(.*)*)x", "re:" + ".*" * 7 + "x", "re:(a)?(?(1)(a*)*|b)"),
    ),
)
def test_an_expression_that_cannot_be_used_is_named(entry: str) -> None:
    with pytest.raises(ConfigError, match="of modules that are quantised or not") as error:
        formats_of(Quantization("fp8", skipped=("lm_head", entry)), WeightMap())
    assert brief(entry) in str(error.value)


def test_long_lists_are_looked_up() -> None:
    """600 entries and 20,000 modules took 17 minutes when each was matched with each."""
    is_skipped = matcher_of(
        [f"model.layers.{i}.self_attn" for i in range(610)] + ["a*" * 30 + "b", "re:.*gate$"]
    )
    begin = time.perf_counter()
    modules = [f"model.layers.{i % 60}.mlp.experts.{i}.{'a' * 40}" for i in range(20_000)]
    assert not any(map(is_skipped, modules))
    assert time.perf_counter() - begin < 20  # 1 s on an idle core


def test_expressions_that_take_too_long_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skipped, "_MOST_SECONDS", 0.01)
    is_skipped = matcher_of(["re:.*.*.*x"])
    with pytest.raises(ConfigError, match=r"'re:\.\*\.\*\.\*x' first, took over"):
        for i in range(100_000):
            is_skipped(f"{'a' * 60}.{i}")


@pytest.mark.parametrize(
    ("model", "tp"),
    (
        pytest.param(name, tp, marks=() if (name, tp) in FAST else pytest.mark.slow)
        for name in FORMATS
        for tp in ((3,) if name in SAME else (1, 3, 5, 8))
    ),
    indirect=["model"],
)
def test_logits(model: tuple[str, Path, Tensors], tp: int) -> None:
    """Those of the weights that the stored ones stand for."""
    _, path, weights = model
    want = reference.logits(open_checkpoint(path).config, weights, PROMPT)
    stepwise = Stepwise(str(path), tp, max_length=64)
    got = np.concatenate([stepwise(PROMPT[:-1].tolist()), stepwise(PROMPT[-1:].tolist())])
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def refusal(path: Path, name: str, change: Callable[[Tensors], None], **settings: Any) -> str:
    """The error of a checkpoint after a change to its tensors or its configuration."""
    stored, config, _ = FORMATS[name]
    files, _ = tensors_of(stored)
    change(files)
    with (
        pytest.raises((CheckpointError, ConfigError)) as error,
        LLM(save(path, files, {**config, **settings}), tp=1),
    ):
        pass
    return str(error.value)


O_PROJ = "model.layers.0.self_attn.o_proj"


def test_order_of_inputs(tmp_path: Path) -> None:
    def shuffle(files: Tensors) -> None:
        files[f"{O_PROJ}.g_idx"] = files[f"{O_PROJ}.g_idx"][::-1]

    assert refusal(tmp_path, "gptq", shuffle) == (
        f"{tmp_path}: tensor '{O_PROJ}.g_idx' puts inputs in another order than groups of 16 (act-order), "
        "which is not supported"
    )
    # with static groups, or one group for all inputs, the order is kept in spite of desc_act
    stored, config, _ = FORMATS["gptq"]
    files, weights = tensors_of(stored)
    path = save(tmp_path / "static", files, {**config, "desc_act": True, "static_groups": True})
    name = "layers.0.self_attn.o_proj.weight"
    np.testing.assert_array_equal(
        open_checkpoint(path).source.read(name, (slice(None),) * 2), weights[name], err_msg=name
    )


def test_misfits(tmp_path: Path) -> None:
    def without(part: str) -> Callable[[Tensors], None]:
        return lambda files: files.__delitem__(f"{O_PROJ}.{part}") and None

    def cut(part: str) -> Callable[[Tensors], None]:
        return lambda files: files.update({f"{O_PROJ}.{part}": files[f"{O_PROJ}.{part}"][:-1]})

    def spoilt(part: str) -> Callable[[Tensors], None]:
        def change(files: Tensors) -> None:
            files[f"{O_PROJ}.{part}"] = files[f"{O_PROJ}.{part}"].copy()
            files[f"{O_PROJ}.{part}"][0, 0] = np.nan

        return change

    tensor = f"{tmp_path}: tensor '{O_PROJ}"
    assert (
        refusal(tmp_path, "awq", without("scales")) == f"{tensor}.qweight' has no '{O_PROJ}.scales' beside it"
    )
    assert refusal(tmp_path, "awq", cut("qzeros")) == (
        f"{tensor}.qweight' of shape [48, 6] needs '{O_PROJ}.qzeros' of shape [3, 6], which has [2, 6]"
    )
    assert refusal(tmp_path, "gptq", spoilt("scales")) == (
        f"{tensor}.weight' has a scale that is no finite number: nan at [0, 0]"
    )
    assert refusal(tmp_path, "ct-int4", cut("weight_packed")) == (
        f"{tensor}.weight_packed' of shape [47, 6] has 8 numbers a word: "
        f"'{O_PROJ}.weight_shape' says [48, 48]"
    )
    assert refusal(tmp_path, "ct-w8a16", without("weight_scale")) == (
        f"{tensor}.weight_packed' has no '{O_PROJ}.weight_scale' beside it"
    )
    assert refusal(tmp_path, "ct-int8", without("weight_scale")) == (
        f"{tensor}.weight' is int8, but '{O_PROJ}.weight_scale' is missing"
    )
    for name, size in (("ct-int8", [47, 1]), ("fbgemm", [47, 1]), ("modelopt-fp8-channel", [47])):
        assert refusal(tmp_path, name, cut("weight_scale")) == (
            f"{tensor}.weight' of shape [48, 48] needs one scale or one for each of 48 outputs: "
            f"'{O_PROJ}.weight_scale' has shape {size}"
        )
    assert refusal(tmp_path, "fp8-blocks", cut("weight_scale_inv")) == (
        f"{tensor}.weight' of shape [48, 48] in blocks of [12, 16] needs scales of shape [4, 3], "
        f"'{O_PROJ}.weight_scale_inv' has [3, 3]"
    )
    assert refusal(tmp_path, "fp8-blocks", without("weight_scale_inv")) == (
        f"{tensor}.weight' is float8, but '{O_PROJ}.weight_scale_inv' is missing"
    )
    assert "zero_point=False is not supported: use True" in refusal(
        tmp_path, "awq", lambda _: None, zero_point=False
    )
    assert "version='gemv' is not supported" in refusal(tmp_path, "awq", lambda _: None, version="gemv")
    assert "bits=3 is not supported: use 4" in refusal(tmp_path, "gptq", lambda _: None, bits=3)
    assert refusal(tmp_path, "gptq", lambda _: None, group_size=32) == (
        f"{tmp_path}: tensor 'model.layers.0.mlp.down_proj.qweight' of shape [12, 48] needs "
        "'model.layers.0.mlp.down_proj.scales' of shape [3, 48], which has [6, 48]"
    )


def test_misfits_of_float_formats(tmp_path: Path) -> None:
    """Missing, of another shape or dtype, or no number: each is named."""

    def changed(name: str, part: str, values: np.ndarray | None) -> str:
        def change(files: Tensors) -> None:
            files.pop(f"{O_PROJ}.{part}")
            if values is not None:
                files[f"{O_PROJ}.{part}"] = values

        message = refusal(tmp_path, name, change)
        return message.replace(f"{tmp_path}: tensor ", "").replace(f"{O_PROJ}.", "")

    nan, scales = np.full((), np.nan, np.float32), np.ones((48, 1), np.float32)
    spoilt, blocks = scales.copy(), np.ones((48, 3), np.float32).astype(E4M3)
    spoilt[40] = np.nan
    no_number = blocks.copy()
    no_number.view(np.uint8)[40, 2] = 0x7F
    of_dtype = "use float8_e4m3fn with scales of float32, bfloat16, float16, float8_e8m0fnu"
    one_or_all = "'weight' of shape [48, 48] needs one scale or one for each of 48 outputs: 'weight_scale'"
    for name, part, values, message in (
        ("fbgemm", "weight_scale", None, "'weight' is float8, but 'weight_scale' is missing"),
        ("fbgemm", "weight_scale", scales.T, f"{one_or_all} has shape [1, 48]"),
        ("fbgemm", "weight_scale", spoilt, "'weight' has a scale that is no finite number: nan at [40, 0]"),
        (
            *("fbgemm", "weight_scale", scales.astype(np.float64)),
            f"'weight' of float8_e4m3fn with scales of float64 is not supported: {of_dtype}",
        ),
        (
            *("fbgemm", "weight", np.ones((48, 48), np.int8)),
            f"'weight' of int8 with scales of float32 is not supported: {of_dtype}",
        ),
        (
            *("modelopt-fp8", "weight", np.ones((48, 48), np.uint8)),
            f"'weight' of uint8 with scales of float32 is not supported: {of_dtype}",
        ),
        ("modelopt-fp8", "weight_scale", None, "'weight' is float8, but 'weight_scale' is missing"),
        ("modelopt-fp8", "weight_scale", np.ones(3, np.float32), f"{one_or_all} has shape [3]"),
        ("modelopt-fp8", "weight_scale", nan, "'weight' has a scale that is no finite number: nan at [0, 0]"),
        ("modelopt-nvfp4", "weight_scale_2", None, "'weight' is uint8, but 'weight_scale_2' is missing"),
        ("modelopt-nvfp4", "weight_scale", None, "'weight' has no 'weight_scale' beside it"),
        ("modelopt-nvfp4", "weight", None, "'weight_scale_2' has no 'weight' beside it"),
        (
            *("modelopt-nvfp4", "weight_scale", blocks[:, :2]),
            "'weight' of shape [48, 24] needs 'weight_scale' of shape [48, 3], which has [48, 2]",
        ),
        (
            *("modelopt-nvfp4", "weight_scale", blocks.view(np.uint8)),
            "'weight_scale' is uint8, not float8_e4m3fn",
        ),
        (
            *("modelopt-nvfp4", "weight", np.ones((48, 48), np.int8)),
            "'weight' of int8 and shape [48, 48] is no matrix of uint8, 2 values each",
        ),
        (
            *("modelopt-nvfp4", "weight_scale_2", scales),
            "'weight_scale_2' of float32 and shape [48, 1] is not one number of float32",
        ),
        (
            *("modelopt-nvfp4", "weight_scale_2", nan),
            "'weight' has a scale that is no finite number: nan at [0, 0]",
        ),
        (
            *("modelopt-nvfp4", "weight_scale", no_number),
            "'weight' has a scale that is no finite number: nan at [40, 2]",
        ),
        ("ct-nvfp4", "weight_global_scale", None, "'weight_packed' has no 'weight_global_scale' beside it"),
        (
            *("ct-nvfp4", "weight_global_scale", np.zeros(1, np.float32)),
            "'weight' has a scale that is no finite number: inf at [0, 0]",
        ),
        ("ct-mxfp4", "weight_scale", scales[:, :1] * [1, 1], "'weight_scale' is float64, not uint8"),
        (
            *("ct-mxfp4", "weight_packed", np.ones((48, 24), np.int32)),
            "'weight_packed' of int32 and shape [48, 24] is no matrix of uint8, 2 values each",
        ),
        (
            *("ct-mxfp8", "weight_scale", np.full((48, 2), 255, np.uint8)),
            "'weight' has a scale that is no finite number: nan at [0, 0]",
        ),
        (
            *("modelopt-mxfp8", "weight_scale", np.ones((48, 3), np.uint8)),
            "'weight' of shape [48, 48] in blocks of [1, 32] needs scales of shape [48, 2], "
            "'weight_scale' has [48, 3]",
        ),
        (
            *("modelopt-fp8", "weight_scale", np.ones((), np.uint8)),
            f"'weight' of float8_e4m3fn with scales of uint8 is not supported: {of_dtype}",
        ),
    ):
        assert changed(name, part, values) == message


def test_what_else_would_be_another_number(tmp_path: Path) -> None:
    """Zero points that are no int8, NaN among float8 values, an order that AWQ does not have, two weights."""

    def with_(part: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
        return lambda files: files.update({f"{O_PROJ}.{part}": change(files[f"{O_PROJ}.{part}"])})

    def added(part: str, values: np.ndarray) -> Callable[[Tensors], None]:
        return lambda files: files.update({f"{O_PROJ}.{part}": values})

    def nan(values: np.ndarray) -> np.ndarray:
        bits = values.view(np.uint8).copy()
        bits[40, 3] = 0xFF
        return bits.view(E4M3)

    tensor = f"{tmp_path}: tensor '{O_PROJ}"
    for kind in (np.float32, np.int32):
        message = refusal(
            tmp_path, "ct-int8-zeros", with_("weight_zero_point", lambda x, kind=kind: x.astype(kind))
        )
        assert message == f"{tensor}.weight_zero_point' is {np.dtype(kind)}, not int8"
    for name in ("ct-fp8-channel", "fp8-blocks"):
        message = refusal(tmp_path, name, with_("weight", nan))
        assert message == f"{tensor}.weight' has a value that is no number: nan at [40, 3]"
    message = refusal(tmp_path, "ct-int4", with_("weight_shape", lambda x: x * np.float32(np.nan)))
    assert message == f"{tensor}.weight_shape' is float64, not int32 or int64"
    assert f"unexpected  {O_PROJ}.g_idx [48]" in refusal(tmp_path, "awq", added("g_idx", np.arange(48)))
    both = "are both there: one of them is to be used"
    for name, part in (("gptq", "qweight"), ("awq", "qweight"), ("ct-int4", "weight_packed")):
        message = refusal(tmp_path, name, added("weight", np.ones((48, 48), np.float16)))
        assert message == f"{tensor}.{part}' and '{O_PROJ}.weight' {both}"


def test_biases_that_gptq_adds(tmp_path: Path) -> None:
    """Older tools write one of zeros for each matrix; any other would change a number."""
    files, _ = tensors_of(gptq(1))
    bias = np.zeros(48, np.float16)
    path = save(tmp_path, {**files, f"{O_PROJ}.bias": bias}, GPTQ)
    checkpoint, mesh = open_checkpoint(path), make_mesh(1)
    model = abstract_decoder(checkpoint.config, mesh, F32, format_of=checkpoint.source.format_of)
    check_tensors(checkpoint, parameters(model, mesh))
    bias[-1] = 0.5
    message = refusal(tmp_path, "gptq", lambda files: files.update({f"{O_PROJ}.bias": bias}))
    assert f"unexpected  {O_PROJ}.bias [48]" in message


def random_files(family: str, **sizes: int) -> tuple[dict[str, Any], Tensors]:
    """A golden's configuration with other sizes, and tensors as its family's files have them."""
    fields = json.loads((GOLDENS / family / "config.json").read_text()) | sizes
    config, mesh = config_from_hf(fields), make_mesh(1)
    names, files = FAMILIES[config.model_type].names(config), {}
    for one in parameters(abstract_decoder(config, mesh, F32), mesh):
        for source, shape in one.layout.canonical_shapes().items():
            at = names.locate(one.canonical(source), names.prefixes[0])
            files[at.name] = RNG.normal(size=at.shape(shape)).astype(np.float32)
    return fields, files


@pytest.mark.parametrize(
    ("family", "sizes", "pattern", "stored"),
    (
        pytest.param("gpt2", {}, r"c_\w+\.weight$", (), id="float8, a scale for all"),
        pytest.param("gpt2", {}, r"c_\w+\.weight$", (-1, 1), id="float8, a scale for each input"),
        pytest.param("gpt_oss", {}, r"experts\.\w+proj$", (), id="float8, a scale for all experts"),
        pytest.param("gpt_oss", {}, r"experts\.\w+proj$", (0,), id="float8, a scale for each expert"),
        # which is stored [in, out] in any family
        pytest.param("gpt2", {"n_embd": 48, "n_inner": 96}, r"c_\w+\.weight$", None, id="gptq"),
    ),
)
def test_families_that_store_inputs_first(
    family: str, sizes: dict[str, int], pattern: str, stored: tuple[int, ...] | None, tmp_path: Path
) -> None:
    fields, files = random_files(family, **sizes)
    plain = dict(files)
    for name in [one for one in plain if re.search(pattern, one)]:
        values = files.pop(name)
        if stored is None:
            parts, worth = gptq(1)(values.shape[::-1])
            files |= {f"{name.removesuffix('weight')}{part}": x for part, x in parts.items()}
            plain[name] = worth.T
        else:
            shape = [{-1: values.shape[-2], 0: len(values)}.get(size, size) for size in stored]
            files[name], files[f"{name}_scale"] = values.astype(E4M3), uniform(*shape)
            scales = files[f"{name}_scale"].reshape(-1, *[1] * (values.ndim - 1))
            plain[name] = files[name].astype(np.float32) * scales
    settings = GPTQ if stored is None else {"quant_method": "fp8", "weight_block_size": None}
    path = save(tmp_path / "quantised", files, settings, fields)
    want = open_checkpoint(save(tmp_path / "plain", plain, {}, fields)).source
    checkpoint, mesh = open_checkpoint(path), make_mesh(3)
    declared = abstract_decoder(checkpoint.config, mesh, F32, format_of=checkpoint.source.format_of)
    model = load_decoder(checkpoint, declared, mesh, progress=False)
    assert any(one.is_quantized for one in parameters(model, mesh)) == (stored is None)
    arrays = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for one in parameters(model, mesh):
        got = np.asarray(arrays[one.path][...], np.float32)
        if one.is_scales:
            continue
        if one.quantized is not None:
            assert one.quantized.inputs == 1
            groups = (
                np.asarray(arrays[(*one.attribute, part)][...], np.float32) for part in ("zeros", "scales")
            )
            zeros, scales = (np.repeat(x, got.shape[1] // x.shape[1], axis=1) for x in groups)
            got = (got - zeros) * scales
        whole = (slice(None),) * got.ndim
        expected = one.layout.read(
            lambda source, box, one=one: want.read(one.canonical(source), box), whole, F32
        )
        np.testing.assert_array_equal(got, expected, one.name)


def test_zero_points_of_a_method_that_has_none(tmp_path: Path) -> None:
    """Where they are 0 they change nothing, and some tools write them."""

    def added(zero: np.ndarray) -> Callable[[Tensors], None]:
        return lambda files: files.update({f"{O_PROJ}.weight_zero_point": zero})

    tensor, says = f"{tmp_path}: tensor '{O_PROJ}.weight_zero_point'", "symmetric=True says that all are 0"
    for name, zero, shown in (
        ("ct-int8", np.full((48, 1), 3, np.int8), "from 3 to 3"),
        ("ct-fp8-channel", np.eye(48, 1, dtype=np.int8), "from 0 to 1"),
        ("ct-int4", words(np.eye(48, 3, dtype=np.int64) + 7, 0), "from -1 to 0"),
    ):
        message = refusal(tmp_path, name, added(zero))
        assert message == f"{tensor} has zero points {shown}, and {says}"
    files, _ = tensors_of(packed(False))
    added(words(np.full((48, 3), 8), 0))(files)
    with LLM(save(tmp_path, files, FORMATS["ct-int4"][1]), tp=1, max_model_len=32):
        pass


def test_settings_that_are_not_known(tmp_path: Path) -> None:
    def refused(name: str, **settings: Any) -> str:
        return refusal(tmp_path, name, lambda _: None, **settings)

    file = f"{tmp_path}/config.json"
    assert refused("gptq", group_size=0) == f"{file}: group_size=0 is not a whole number, 1 or more"
    methods = "supported are fp8, fbgemm_fp8, mxfp4, gptq, awq, auto-round, compressed-tensors, modelopt"
    assert refused("gptq", quant_method="quip") == (
        f"{file}: quantization_config: quant_method='quip' is not supported; {methods}"
    )
    algorithms = "supported are FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, MXFP8, NVFP4, W4A16_NVFP4"
    for algorithm in ("MIXED_PRECISION", "W4A16_AWQ", "nvfp4_awq", 8):
        assert refused("modelopt-fp8", quant_algo=algorithm) == (
            f"{file}: quantization_config: quant_algo={algorithm!r} is not supported; {algorithms}"
        )
    assert refused("modelopt-nvfp4", group_size=32) == (
        f"{file}: quantization_config: group_size=32 is not supported: use 16"
    )
    assert refused("modelopt-fp8", pre_quant_scale=True).endswith("pre_quant_scale=True is not supported")
    wide = compressed("nvfp4-pack-quantized", 4, "float", "tensor_group", group_size=32)
    assert refused("ct-nvfp4", **wide).endswith(
        "strategy='tensor_group' and group_size=32 with format=nvfp4-pack-quantized are not supported: use "
        "tensor_group and 16"
    )
    strange = compressed("int-quantized", 8, "int", "token")
    message = "strategy='token' is not supported: use tensor, channel, group or block"
    assert message in refused("ct-int8", **strange)
    mixed = dict(FORMATS["ct-int8"][1])
    other = compressed("pack-quantized", 4, "int", "group", group_size=GROUP)["config_groups"]["group_0"]
    mixed["config_groups"] = {**mixed["config_groups"], "group_1": {**other, "format": "pack-quantized"}}
    assert "has 2 ways to quantise weights: 1 is supported" in refused("ct-int8", **mixed)


def test_where_the_settings_are(tmp_path: Path) -> None:
    """In the text part alone, where transformers looks next, or in ModelOpt's file beside ``config.json``."""
    files, weights = tensors_of(modelopt())
    inner = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", "*layers.1*"]}
    written = {"producer": MODELOPT["producer"], "quantization": inner}
    path = save(tmp_path, files, {})
    name, box = "layers.0.mlp.up_proj.weight", (slice(3, 7), slice(5, 40))
    beside = path / "hf_quant_config.json"
    for settings in ({}, {**inner, "quant_algo": None}):  # a cache alone is quantised
        beside.write_text(json.dumps({**written, "quantization": settings}))
        assert declared_formats(path, read_config(path)) is None
    beside.write_text(json.dumps(written))
    checkpoint = open_checkpoint(path)
    np.testing.assert_array_equal(checkpoint.source.read(name, box), weights[name][box])
    for file in (path, path / "config.json"):  # of a directory, and of a configuration alone
        declared = declared_formats(file, checkpoint.config)
        assert declared is not None and declared(name) == checkpoint.source.format_of(name)
        assert declared(name.replace("0", "1")) is None  # a wildcard crosses dots
    beside.write_text(json.dumps({**written, "quantization": {**inner, "quant_algo": "W4A8_AWQ"}}))
    with pytest.raises(
        ConfigError, match=r"hf_quant_config\.json: quantization: quant_algo='W4A8_AWQ' is not"
    ):
        open_checkpoint(path)
    save(tmp_path, files, MODELOPT)  # config.json counts
    assert open_checkpoint(path).quantization == checkpoint.quantization
    beside.write_text("[]")
    save(tmp_path, files, {})
    with pytest.raises(ConfigError, match=r"hf_quant_config\.json: a list is not an object"):
        open_checkpoint(path)


def test_a_text_part_that_is_quantised(tmp_path: Path) -> None:
    """transformers takes the outer settings, and where there are none those of the text part."""
    fields, files = random_files("gemma3-with-vision")
    plain = dict(files)
    modules = [name for name, x in files.items() if "_proj." in name and x.ndim == 2]
    for name in modules:
        scales = uniform(len(files[name]), 1)
        files[name], files[f"{name}_scale"] = files[name].astype(E4M3), scales
        plain[name] = files[name].astype(np.float32) * scales
    inside = {**fields, "text_config": {**fields["text_config"], "quantization_config": FBGEMM}}
    (tmp_path / "plain").mkdir()
    want = open_checkpoint(save(tmp_path / "plain", plain, {}, fields)).source
    name = "layers.1.mlp.down_proj.weight"
    for outer, config in (({}, inside), (FBGEMM, fields), (FBGEMM, inside)):
        checkpoint = open_checkpoint(save(tmp_path, files, outer, config))
        assert checkpoint.source.format_of(name) == WeightFormat(jnp.dtype(jnp.float8_e4m3fn))
        declared = declared_formats(tmp_path / "config.json", checkpoint.config)
        assert declared is not None and declared(name) == checkpoint.source.format_of(name)
        whole = (slice(None), slice(None))
        np.testing.assert_array_equal(checkpoint.source.read(name, whole), want.read(name, whole))
    other = {**fields["text_config"], "quantization_config": {"quant_method": "quip"}}
    with pytest.raises(ConfigError, match="text_config: quantization_config: quant_method='quip' is not"):
        open_checkpoint(save(tmp_path, files, {}, {**fields, "text_config": other}))
    with pytest.raises(ConfigError, match=r"text_config=\{.* is not supported"):  # Llama has no such part
        open_checkpoint(save(tmp_path, files, {}, {**CONFIG, "text_config": inside["text_config"]}))


# --- read by transformers ----------------------------------------------------------------------------------


def logits_of_transformers(path: Path, **options: Any) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[parity]'")
    reader = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    with torch.no_grad():
        found: np.ndarray = reader(torch.tensor(PROMPT[None])).logits[0].float().numpy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("ct-")])
def test_transformers_reads_the_same(name: str, tmp_path: Path) -> None:
    """Its logits are those of the weights that tpjax reads, and the library's weights are these bit by bit.

    Scales are float32: the library returns weights in the dtype of the scales, and rounds them to bfloat16
    where those are, and all of those of NVFP4 and the MX formats, which no model of float32 can have then.
    """
    torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="pip install -e '.[parity]'")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    stored, settings, _ = FORMATS[name]
    files, weights = tensors_of(stored)
    in_bfloat16 = name in ("ct-nvfp4", "ct-mxfp4", "ct-mxfp8")  # whatever the dtype of scales
    if not in_bfloat16:
        files = {key: x.astype(np.float32) if key.endswith("_scale") else x for key, x in files.items()}
    path = save(tmp_path, files, settings)
    scheme = quantization.QuantizationScheme(**settings["config_groups"]["group_0"])
    compressor = compressors.BaseCompressor.get_value_from_registry(settings["format"])
    modules = [key.removesuffix(".weight_scale") for key in files if key.endswith(".weight_scale")]
    assert len(modules) == 14
    for module in modules:
        if name.startswith("ct-mx") and not module.endswith("down_proj"):
            continue  # it wants a multiple of 32 inputs
        parts = {
            key.removeprefix(f"{module}."): x for key, x in files.items() if key.startswith(f"{module}.")
        }
        tensors = {
            part: torch.from_numpy(x.view(np.uint8)).view(torch.float8_e4m3fn)
            if x.dtype == E4M3
            else torch.from_numpy(x)
            for part, x in parts.items()
        }
        found = compressor.decompress(tensors, scheme)["weight"].float().numpy()
        want = weights[f"{module.removeprefix('model.')}.weight"]
        np.testing.assert_allclose(found, want, rtol=2**-7 if in_bfloat16 else 0, err_msg=module)
    # transformers 5.23 looks for packed integers where activations are not quantised too, and for zero points
    # that are not packed
    if in_bfloat16 or name in ("ct-int8", "ct-int8-zeros", "ct-int4-zeros"):
        return
    got = logits_of_transformers(path)
    want = reference.logits(open_checkpoint(path).config, weights, PROMPT)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.slow
def test_transformers_reads_the_same_blocks(tmp_path: Path) -> None:
    """Of equal height: transformers finds it from the number of scales."""
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[parity]'")
    files, weights = tensors_of(fp8_blocks(8))
    path = save(tmp_path, files, {"quant_method": "fp8", "weight_block_size": [8, GROUP]})
    settings = transformers.FineGrainedFP8Config(weight_block_size=(8, GROUP), dequantize=True)
    got = logits_of_transformers(path, quantization_config=settings)
    want = reference.logits(open_checkpoint(path).config, weights, PROMPT)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
