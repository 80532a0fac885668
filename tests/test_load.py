"""From files to shards: each device holds exactly its slice, and what does not fit is listed at once."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tpjax.checkpoints import load as load_module
from tpjax.checkpoints.assemble import fill
from tpjax.checkpoints.canonical import CanonicalSource
from tpjax.checkpoints.load import load_decoder
from tpjax.checkpoints.opening import Checkpoint, open_checkpoint, read_config
from tpjax.checkpoints.parameters import abstract_decoder, parameters
from tpjax.checkpoints.safetensors import SafetensorsCheckpoint
from tpjax.checkpoints.source import TensorInfo, TensorSource
from tpjax.errors import CheckpointError, ConfigError
from tpjax.families.registry import FAMILIES
from tpjax.mesh import make_mesh

LAYERS, D, H, K, HEAD, F, V = 2, 10, 6, 2, 4, 20, 50
F32 = jnp.dtype("float32")

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "head_dim": HEAD,
    "vocab_size": V,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (D,),
            f"{prefix}post_attention_layernorm.weight": (D,),
            f"{prefix}self_attn.q_proj.weight": (H * HEAD, D),
            f"{prefix}self_attn.k_proj.weight": (K * HEAD, D),
            f"{prefix}self_attn.v_proj.weight": (K * HEAD, D),
            f"{prefix}self_attn.o_proj.weight": (D, H * HEAD),
            f"{prefix}mlp.gate_proj.weight": (F, D),
            f"{prefix}mlp.up_proj.weight": (F, D),
            f"{prefix}mlp.down_proj.weight": (D, F),
        }
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


TENSORS = tensors()


def save(path: Path, weights: Mapping[str, np.ndarray], **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(dict(weights), path / "model.safetensors")
    return path


def load(path: Path, tp: int, dtype: jnp.dtype = F32) -> dict[str, jax.Array]:
    checkpoint, mesh = open_checkpoint(path), make_mesh(tp)
    model = load_decoder(checkpoint, abstract_decoder(checkpoint.config, mesh, dtype), mesh, progress=False)
    return {".".join(map(str, key)): leaf for key, leaf in flat(model).items()}


def flat(model: Any) -> dict[tuple[Any, ...], jax.Array]:
    return {key: variable.get_value() for key, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}


# --- what each device must hold, put together by hand ------------------------------------------------------

# (KV head, its query heads) of every slot, worked out on paper: six queries over two KV heads.
SLOTS: dict[int, list[tuple[int | None, list[int | None]]]] = {
    1: [(0, [0, 1, 2]), (1, [3, 4, 5])],
    3: [(0, [0, 1, 2]), (1, [3, 4, 5]), (None, [None] * 3)],
    8: [(0, [0]), (0, [1]), (0, [2]), (1, [3]), (1, [4]), (1, [5]), (None, [None]), (None, [None])],
}


def expected(tp: int, weights: Mapping[str, np.ndarray] = TENSORS) -> dict[str, np.ndarray]:
    """Every stored parameter in full, from the canonical tensors."""

    def padded(x: np.ndarray, axis: int) -> np.ndarray:
        missing = -x.shape[axis] % tp
        return np.concatenate(
            [x, np.zeros_like(x, shape=(*x.shape[:axis], missing, *x.shape[axis + 1 :]))], axis
        )

    def head(x: np.ndarray, number: int | None) -> np.ndarray:
        """Columns of one head of a weight [in, H * h], or of o_proj as it is stored, [D, H * h]."""
        return (
            np.zeros((D, HEAD), np.float32) if number is None else x[:, number * HEAD : (number + 1) * HEAD]
        )

    out = {
        "embed_tokens.weight": padded(weights["model.embed_tokens.weight"], 0),
        "lm_head.weight": padded(weights["lm_head.weight"], 0),
        "norm.weight": weights["model.norm.weight"],
    }
    for layer in range(LAYERS):
        source, target = f"model.layers.{layer}.", f"layers.{layer}."
        q, k, v = (weights[f"{source}self_attn.{name}_proj.weight"].T for name in "qkv")
        o = weights[f"{source}self_attn.o_proj.weight"]
        gate, up = (weights[f"{source}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        down = weights[f"{source}mlp.down_proj.weight"]
        out |= {
            f"{target}{name}.weight": weights[f"{source}{name}.weight"]
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        columns, outputs = [], []
        for kv_head, heads in SLOTS[tp]:
            columns += [head(q, h) for h in heads] + [head(k, kv_head), head(v, kv_head)]
            outputs += [head(o, h) for h in heads]
        out[f"{target}self_attn.qkv_proj.weight"] = np.concatenate(columns, axis=1).T
        out[f"{target}self_attn.o_proj.weight"] = np.concatenate(outputs, axis=1)
        parts = zip(np.split(padded(gate, 1), tp, axis=1), np.split(padded(up, 1), tp, axis=1), strict=True)
        out[f"{target}mlp.gate_up_proj.weight"] = np.concatenate(
            [part for pair in parts for part in pair], axis=1
        ).T
        out[f"{target}mlp.down_proj.weight"] = padded(down, 1)
    return out


CUT_AXIS = {"qkv_proj": 0, "gate_up_proj": 0, "o_proj": 1, "down_proj": 1, "embed_tokens": 0, "lm_head": 0}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("plain") / "model", TENSORS)


@pytest.mark.parametrize("tp", (1, 3, 8))
def test_each_device_holds_its_slice(plain: Path, tp: int) -> None:
    arrays, full = load(plain, tp), expected(tp)
    assert arrays.keys() == full.keys()
    for name, array in arrays.items():
        assert array.dtype == np.float32 and array.shape == full[name].shape
        axis = CUT_AXIS.get(name.split(".")[-2])
        assert len(array.addressable_shards) == tp
        shards = [full[name]] * tp if axis is None else np.split(full[name], tp, axis=axis)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), shards[shard.device.id], err_msg=name)


def test_matrices_keep_the_checkpoint_s_order(plain: Path) -> None:
    """None is transposed while it is loaded; only experts are, for their grouped products."""
    checkpoint, mesh = open_checkpoint(plain), make_mesh(3)
    declared = parameters(abstract_decoder(checkpoint.config, mesh, F32), mesh)
    assert {one.name.split(".", 2)[-1] for one in declared if len(one.layout.shape) == 2} > {
        "self_attn.qkv_proj.weight",
        "mlp.gate_up_proj.weight",
    }
    assert not any(one.layout.transposed for one in declared)


def test_sharded_files_and_single_file_are_the_same(plain: Path, tmp_path: Path) -> None:
    names = sorted(TENSORS)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, of in files.items():
        save_file({name: TENSORS[name] for name in of}, tmp_path / file)
    index = {"weight_map": {name: file for file, of in files.items() for name in of}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    one, two = load(plain, 3), load(tmp_path, 3)
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name])


def test_bare_backbone(plain: Path, tmp_path: Path) -> None:
    """``AutoModel.save_pretrained`` leaves the prefix out, and has no head."""
    bare = {name.removeprefix("model."): x for name, x in TENSORS.items() if name != "lm_head.weight"}
    arrays = load(save(tmp_path / "bare", bare, tie_word_embeddings=True), 3)
    full = expected(3)
    assert arrays.keys() == full.keys() - {"lm_head.weight"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, full[name])


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for i in range(LAYERS)}
    arrays = load(save(tmp_path / "old", TENSORS | extra), 1)
    assert arrays.keys() == expected(1).keys()


def test_bfloat16_checkpoint_to_float32_and_back(tmp_path: Path) -> None:
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in TENSORS.items()}
    path = save(tmp_path / "half", half)
    full = expected(3, {name: x.astype(np.float32) for name, x in half.items()})
    wide, narrow = load(path, 3), load(path, 3, jnp.dtype("bfloat16"))
    for name in full:
        assert (wide[name].dtype, narrow[name].dtype) == (jnp.float32, jnp.bfloat16)
        np.testing.assert_array_equal(wide[name], full[name])
        np.testing.assert_array_equal(np.asarray(narrow[name]).astype(np.float32), full[name])


def test_float8_checkpoint_loads_as_what_it_stands_for(tmp_path: Path) -> None:
    """Projections in blocks of 4 x 3, everything else as it is; no device's slice ends with a block."""
    stored, values = dict(TENSORS), dict(TENSORS)
    for name in (name for name in TENSORS if "_proj" in name):
        weight = TENSORS[name].astype(ml_dtypes.float8_e4m3fn)
        grid = [-(-size // step) for size, step in zip(weight.shape, (4, 3), strict=True)]
        scale = np.random.default_rng(1).uniform(0.5, 2, grid).astype(np.float32)
        stored |= {name: weight, f"{name}_scale_inv": scale}
        spread = np.kron(scale, np.ones((4, 3), np.float32))[: weight.shape[0], : weight.shape[1]]
        values[name] = weight.astype(np.float32) * spread
    settings = {"quant_method": "fp8", "weight_block_size": [4, 3]}
    arrays = load(save(tmp_path / "float8", stored, quantization_config=settings), 3)
    full = expected(3, values)
    assert arrays.keys() == full.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, full[name], err_msg=name)


class Counting:
    """A source that counts the elements read of each tensor, and those read straight into their place."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.tensors: Mapping[str, TensorInfo] = source.tensors
        self.elements: dict[str, int] = {}
        self.in_place: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(
        self, name: str, index: tuple[slice, ...] | None = None, memory: np.ndarray | None = None
    ) -> np.ndarray:
        out = self._source.read(name, index, memory)
        with self._lock:
            self.elements[name] = self.elements.get(name, 0) + out.size
            if out is memory:
                self.in_place[name] = self.in_place.get(name, 0) + out.size
        return out


@pytest.mark.parametrize("tp", (1, 3, 8))
def test_every_element_is_read_once(plain: Path, tp: int) -> None:
    """Whichever devices want it: at tp = 8 three slots hold each KV head, and all devices the norms."""
    config, mesh = read_config(plain), make_mesh(tp)
    source = Counting(SafetensorsCheckpoint(plain))
    checkpoint = Checkpoint(plain, config, CanonicalSource(source, FAMILIES["llama"].names(config), config))
    load_decoder(checkpoint, abstract_decoder(config, mesh, F32), mesh, progress=False)
    sizes = {name: math.prod(info.shape) for name, info in source.tensors.items()}
    assert source.elements == sizes
    # without a copy: whole rows; those of o_proj and down_proj are cut
    cut = () if tp == 1 else ("o_proj", "down_proj")
    in_place = {name: size for name, size in sizes.items() if not any(part in name for part in cut)}
    assert source.in_place == in_place


def test_a_process_reads_only_its_devices_slices(plain: Path) -> None:
    """Of eight devices the last two, as where each process has two: no more than they hold is read."""
    config, mesh = read_config(plain), make_mesh(8)
    source = Counting(SafetensorsCheckpoint(plain))
    canonical = CanonicalSource(source, FAMILIES["llama"].names(config), config)
    declared = parameters(abstract_decoder(config, mesh, F32), mesh)
    orders, wanted = [], 0
    for parameter in declared:
        order = load_module._order(parameter)
        parts = dict(list(order.parts.items())[-2:])
        orders.append(replace(order, parts=parts))
        contents = (parameter.layout.content(tuple(slice(*b) for b in bounds)) for bounds in parts)
        wanted += sum(content.held + content.copied for content in contents)
    assert [order.what for order in fill(orders, canonical)] == declared
    assert 0 < sum(source.elements.values()) <= wanted < sum(x.size for x in TENSORS.values()) / 3


def test_abstract_model_holds_no_memory(plain: Path) -> None:
    mesh = make_mesh(3)
    model = abstract_decoder(read_config(plain), mesh, F32)
    for key, leaf in flat(model).items():
        assert isinstance(leaf, jax.ShapeDtypeStruct), key
    shapes = {p.name: (p.layout.shape, p.dtype) for p in parameters(model, mesh)}
    assert shapes == {name: (x.shape, F32) for name, x in expected(3).items()}


# --- errors ------------------------------------------------------------------------------------------------


def error_message(path: Path, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as error:
        load(path, 1)
    return str(error.value)


def test_every_difference_in_one_message(tmp_path: Path) -> None:
    wrong = dict(TENSORS)
    del wrong["model.layers.1.mlp.up_proj.weight"]
    del wrong["lm_head.weight"]
    wrong["model.layers.0.self_attn.q_proj.weight"] = np.ones((H * HEAD + 1, D), np.float32)
    wrong["model.norm.weight"] = np.ones((D, 1), np.float32)
    wrong["model.layers.2.mlp.up_proj.weight"] = np.ones((F, D), np.float32)
    wrong["model.layers.0.self_attn.q_proj.bias"] = np.ones(H * HEAD, np.float32)
    for layer, kind in enumerate((np.int8, np.complex64)):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        wrong[name] = wrong[name].astype(kind)
    path = save(tmp_path / "wrong", wrong)
    (path / "quant_config.json").write_text("{}")
    lines = error_message(path).splitlines()
    assert lines.pop() == "  quant_config.json is not read: config.json has no quantization_config"
    assert lines[0] == f"{path}: configuration and weights disagree on 8 tensors:"
    assert sorted(line.strip() for line in lines[1:]) == sorted(
        (
            "missing     model.layers.1.mlp.up_proj.weight [20, 10]",
            "missing     lm_head.weight [50, 10]",
            "mismatched  model.layers.0.self_attn.q_proj.weight: "
            "the configuration says [24, 10], the file has [25, 10]",
            "mismatched  model.norm.weight: the configuration says [10], the file has [10, 1]",
            *(
                f"mismatched  model.layers.{layer}.mlp.down_proj.weight: {kind} is no floating-point number"
                for layer, kind in enumerate(("int8", "complex64"))
            ),
            "unexpected  model.layers.2.mlp.up_proj.weight [20, 10]",
            "unexpected  model.layers.0.self_attn.q_proj.bias [24]",
        )
    )


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    extra = {f"model.layers.0.extra.{i}": np.ones(1, np.float32) for i in range(40)}
    lines = error_message(save(tmp_path / "extra", TENSORS | extra)).splitlines()
    assert lines[0].endswith("disagree on 40 tensors:")
    assert len(lines) == 1 + 20 + 1
    assert lines[-1].strip() == "… and 20 more"


def test_the_wrong_configuration(tmp_path: Path) -> None:
    """A deeper model than the file: what is missing is named, with its shape."""
    message = error_message(save(tmp_path / "deeper", TENSORS, num_hidden_layers=3))
    assert "missing     model.layers.2.self_attn.q_proj.weight [24, 10]" in message
    assert "disagree on 9 tensors" in message


def test_two_tensors_for_one_name(tmp_path: Path) -> None:
    """With and without the prefix: taking either silently would be a guess."""
    both = TENSORS | {"norm.weight": np.zeros(D, np.float32)}
    assert "norm.weight" in error_message(save(tmp_path / "both", both))


def test_missing_path(tmp_path: Path) -> None:
    assert error_message(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'} does not exist"


def test_not_a_model_file(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"x")
    assert error_message(file) == f"{file} is neither a directory nor a .gguf file"


def test_no_config(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert error_message(tmp_path) == f"{tmp_path} has no config.json"


@pytest.mark.parametrize("text", ("", "{", '{"model_type": "llama",}', "[" * 100_000, "\udcff"))
def test_broken_config(tmp_path: Path, text: str) -> None:
    path = save(tmp_path / "broken", TENSORS)
    (path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    message = error_message(path)
    assert message.startswith(f"{path / 'config.json'} is not valid JSON: ")
    assert "\n" not in message


@pytest.mark.parametrize("text", ("[]", "null", '"llama"', "5"))
def test_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    path = save(tmp_path / "list", TENSORS)
    (path / "config.json").write_text(text)
    assert error_message(path, ConfigError).startswith(f"{path}/config.json: a configuration is an object, ")


def test_unsupported_model_type(tmp_path: Path) -> None:
    path = save(tmp_path / "bert", TENSORS, model_type="bert")
    start = f"{path}/config.json: model_type='bert' is not supported; supported are llama, "
    assert error_message(path, ConfigError).startswith(start)


@pytest.mark.parametrize("name", ("pytorch_model.bin", "consolidated.00.pth", "model.pt"))
def test_only_pickles(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")  # a pickle that would run a command
    message = error_message(tmp_path)
    assert name in message and "never opened" in message and "save_pretrained" in message


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    message = error_message(tmp_path)
    assert "no weights" in message and "model.safetensors.index.json" in message


def test_read_config_needs_no_weights(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG))
    config = read_config(tmp_path)
    assert config == read_config(file)
    assert (
        config.num_layers,
        config.attention.num_heads,
        config.attention.num_kv_heads,
        config.attention.head_dim,
    ) == (LAYERS, H, K, HEAD)
