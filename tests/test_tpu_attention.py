"""The TPU kernel, interpreted on a CPU, against the definition: over random shapes, and inside the engine."""

from __future__ import annotations

import ast
import json
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Shape
from conftest import GOLDENS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from tpjax import LLM
from tpjax.attention import Backend, KernelShape, Verdict, choose_backend, selftest, tpu, tpu_write
from tpjax.checkpoints.opening import read_config
from tpjax.config import KVDtype
from tpjax.errors import ConfigError
from tpjax.inspect import doctor


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as small as these shapes: several of pages, queries and heads."""
    monkeypatch.setattr(tpu, "_BLOCK_KEYS", 16)
    monkeypatch.setattr(tpu, "_ROWS_PER_HEAD", 16)
    monkeypatch.setattr(tpu, "_MOST_HEADS", 2)


def check(shape: Shape, seed: int = 0, *, races: bool = False) -> None:
    interpret = pltpu.InterpretParams(detect_races=True) if races else True
    attention_cases.check(tpu, shape, seed, interpret=interpret)
    assert not races or not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    "shape",
    (
        pytest.param(Shape((1, 0, 1), (17, 0, 3), heads=2, per_head=3), id="decode"),
        pytest.param(
            Shape((1, 0, 1), (37, 0, 3), window=9, cyclic=True, sinks=True, softcap=2.0), id="window"
        ),
        pytest.param(Shape((1, 1), (9, 30), heads=4, width=24, value_dim=None), id="latents"),
        pytest.param(Shape((3, 2), (6, 15), length=3, per_head=2, dtype="bfloat16"), id="drafts"),
        pytest.param(Shape((1, 0, 1), (37, 0, 3), heads=3, window=9, kv_dtype="int8"), id="int8"),
        pytest.param(
            Shape((1, 1), (9, 30), heads=4, width=24, value_dim=None, kv_dtype="fp8", part=16), id="fp8"
        ),
        pytest.param(
            Shape((16, 9), (8, 0), length=16, heads=5, width=24, value_dim=None), id="chunks of latents"
        ),
    ),
)
def test_kernel(shape: Shape) -> None:
    check(shape)


def test_large_block_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read in several calls, of some rows each."""
    monkeypatch.setattr(tpu, "_TABLE_ENTRIES", 256)
    check(Shape((1, 0, 1), (17, 0, 3), heads=2, per_head=3, sinks=True))


def test_blocks() -> None:
    shape = Shape((16, 9, 0), (24, 8, 0), length=16, heads=3, per_head=4, window=11)
    assert tpu.choose_tiling(3, 4, 16, 8, (16, 16), 4) == (1, 4, 2)
    check(shape)


def test_rows_of_a_block_are_whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 43 heads that share a latent: DeepSeek-V3's 128 over three devices."""
    monkeypatch.setattr(tpu, "_ROWS_PER_HEAD", 512)
    assert tpu.choose_tiling(1, 43, 128, 128, (576, 0), 2).queries == 16
    assert tpu.choose_tiling(1, 16, 128, 128, (576, 0), 2).queries == 32
    assert tpu.choose_tiling(1, 43, 3, 128, (576, 0), 2).queries == 3


def test_programs_in_float32_are_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of Gemma 2 2B in fp8 took 26 MB of a chip's 16, and its programs did not compile."""
    monkeypatch.undo()
    taken = []
    choose = tpu.choose_tiling
    monkeypatch.setattr(tpu, "choose_tiling", lambda *shape: taken.append(choose(*shape)) or taken[-1])
    sizes: Any = {"heads": 4, "per_head": 2, "page_size": 128, "widths": (256, 256), "value_dim": 256}
    for dtype, kv_dtype in (("float32", "fp8"), ("float32", "auto"), ("bfloat16", "fp8")):
        tpu.work(1, 1024, 1024, window=None, dtype=jnp.dtype(dtype), kv_dtype=kv_dtype, **sizes)
    assert taken == [(4, 128, 1), (4, 128, 1), (4, 256, 4)]


def test_work() -> None:
    """Pages that a query sees, twice what it multiplies; of a chunk, the blocks that each tile sees."""
    shape: Any = {"heads": 2, "per_head": 4, "page_size": 8, "widths": (128, 128), "value_dim": 128}
    shape["dtype"] = jnp.dtype(jnp.bfloat16)
    row = 128 + 128
    decode = tpu.work(3, 1, 20, window=None, **shape)
    assert decode.bytes == 3 * 2 * 2 * (3 * 8 * row + 4 * row)  # three pages of keys and values
    assert decode.flops == 2 * 3 * 2 * 4 * 2 * 16 * row  # two blocks of two pages
    eight_bits = tpu.work(3, 1, 20, window=None, kv_dtype="int8", **shape)
    assert eight_bits.bytes == 3 * 2 * (3 * 8 * (row + 2 * 4) + 2 * 4 * row)
    assert tpu.work(3, 1, 20, window=4, **shape).bytes == 3 * 2 * 2 * (8 + 4) * row
    chunk = tpu.work(1, 16, 24, window=None, **shape)  # four tiles of four queries
    assert chunk.bytes == 2 * 2 * (sum((2, 2, 3, 3)) * 8 * row + 16 * 4 * row)
    assert chunk.flops == 2 * 2 * 4 * 4 * sum((1, 1, 2, 2)) * 16 * row


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    rows = draw(st.integers(1, 4))
    length = draw(st.sampled_from((1, 1, 2, 3, 8, 16)))
    page_size = draw(st.sampled_from((8, 16)))
    latent = draw(st.booleans())
    window = draw(st.none() | st.integers(1, 40))
    width = draw(st.sampled_from((8, 16, 24)))
    return Shape(
        lengths=tuple(draw(st.integers(0, length)) for _ in range(rows)),
        first=tuple(draw(st.integers(0, 40)) for _ in range(rows)),
        length=length,
        heads=draw(st.integers(1, 4)),
        per_head=1 if latent else draw(st.integers(1, 4)),
        width=width,
        value_dim=None if latent else draw(st.sampled_from((8, 16, 24))),
        page_size=page_size,
        window=window,
        cyclic=window is not None and draw(st.booleans()),
        softcap=draw(st.none() | st.just(3.0)),
        sinks=draw(st.booleans()),
        dtype=draw(st.sampled_from(("float32", "float32", "bfloat16"))),
        kv_dtype=draw(st.sampled_from(("auto", "auto", "int8", "fp8"))),
        part=draw(st.sampled_from((None, 8, 16))),
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=24, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes(), seed=st.integers(0, 2**20))
@example(shape=Shape((0, 0), (0, 0)), seed=0)  # nothing but padding
def test_random_shapes(shape: Shape, seed: int) -> None:
    check(shape, seed, races=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    (
        *((name, "auto") for name in ("llama", "gemma2", "deepseek_v3")),
        ("gpt_oss", "fp8"),
        ("deepseek_v3", "int8"),
    ),
)
def test_the_engine_generates_the_same_tokens(name: str, kv_dtype: KVDtype) -> None:
    prompts = [[at % 50 for at in range(length)] for length in (150, 3)]
    options: dict[str, Any] = {"max_model_len": 256, "max_slots": 2, "kv_dtype": kv_dtype}
    texts = []
    for attention in ("xla", "tpu", "reference") if name == "llama" else ("xla", "tpu"):
        with LLM(GOLDENS / name, 2, **options, attention=attention) as llm:
            done = llm.generate(prompts, temperature=0, max_tokens=5, ignore_eos=True)
            texts.append([one.token_ids for one in done])
    assert all(one == texts[0] for one in texts)


# --- which backend is used ---------------------------------------------------------------------------------

RIGHT = Verdict("TPU v5 lite", 0.001, 0.02, 0.2, 1.5)
SHAPE = KernelShape(8, 4, 128, 128, False, (None,), None, False, 128, "bfloat16")


class Device(NamedTuple):
    """What is asked of a device."""

    platform: str
    compute_capability: str = "9.0"
    device_kind: str = "NVIDIA H100"


TPU, GPU, CPU = (Device(platform) for platform in ("tpu", "gpu", "cpu"))


@pytest.mark.parametrize("device", (TPU, GPU))
@pytest.mark.parametrize(
    ("verdict", "by_kernel", "why"),
    (
        (None, False, "the kernel (--attention {}) is used unasked only where it was checked"),
        (RIGHT, True, "the kernel is right on TPU v5 lite, and takes 0.2 ms where the page walk takes 1.5"),
        (
            replace(RIGHT, kernel_ms=2.0),
            False,
            "the kernel is right on TPU v5 lite, but takes 2 ms where the page walk takes 1.5",
        ),
        (
            replace(RIGHT, error=float("inf")),
            False,
            "the kernel is wrong on TPU v5 lite: off by inf, 0.02 allowed",
        ),
    ),
)
def test_auto(device: Any, verdict: Verdict | None, by_kernel: bool, why: str) -> None:
    verify = None if verdict is None else lambda: verdict
    chosen = choose_backend("auto", device, SHAPE, verify)
    name = device.platform if by_kernel else "xla"
    walk = {
        "walk_pages": 8,
        "short_chunk_pages": 8,
        "in_rows": device is TPU,
        "fixed_trips": device is GPU and not by_kernel,
    }
    assert chosen == Backend(name, why.format(device.platform), **walk)


A100 = Device("gpu", "8.0", "NVIDIA A100-SXM4-80GB")
NOT_HOPPER = "compute capability 9 (Hopper), and NVIDIA A100-SXM4-80GB has 8.0"
LATENT = SHAPE._replace(latent=True, width=576, value_dim=512)


@pytest.mark.parametrize(
    ("device", "shape", "why"),
    (
        (CPU, SHAPE, "it runs on every platform"),
        (TPU, SHAPE._replace(dtype="float16"), "the kernel supports bfloat16 and float32, not float16"),
        (GPU, SHAPE._replace(dtype="float32"), "the kernel supports bfloat16 and float16, not float32"),
        (A100, SHAPE, f"the kernel is for {NOT_HOPPER}"),
        (
            GPU,
            LATENT,
            "the kernel supports values of at most 256 elements, and latent attention's have 512",
        ),
        (
            GPU,
            SHAPE._replace(width=72),
            "the kernel supports heads of a multiple of 16 elements, at most 256, not of 72",
        ),
        (
            GPU,
            SHAPE._replace(width=80, value_dim=80, kv_dtype="int8"),
            "the kernel supports heads of a multiple of 32 elements, at most 256, not of 80",
        ),
        (
            GPU,
            SHAPE._replace(page_size=32),
            "the kernel supports pages of a multiple of 64 positions, not of 32",
        ),
    ),
)
def test_auto_without_a_kernel(device: Any, shape: KernelShape, why: str) -> None:
    assert choose_backend("auto", device, shape, lambda: RIGHT) == Backend(
        "xla",
        why,
        walk_pages=1 if device is CPU else 8,
        short_chunk_pages=8,
        in_rows=device is TPU,
        fixed_trips=device.platform == "gpu",
    )


def test_asked_for() -> None:
    assert choose_backend("tpu", TPU, SHAPE) == Backend(
        "tpu", "asked for", walk_pages=8, short_chunk_pages=8, in_rows=True
    )
    assert choose_backend("gpu", GPU, SHAPE) == Backend("gpu", "asked for", walk_pages=8, short_chunk_pages=8)
    assert choose_backend("tpu", CPU, SHAPE).interpret


@pytest.mark.parametrize(
    ("asked", "device", "shape", "message"),
    (
        (
            "cuda",
            GPU,
            SHAPE,
            "attention='cuda' is not supported: use auto, reference, xla, tpu or gpu",
        ),
        ("tpu", GPU, SHAPE, "attention='tpu' needs TPUs, and the devices are of platform 'gpu'"),
        ("gpu", TPU, SHAPE, "attention='gpu' needs NVIDIA GPUs, and the devices are of platform 'tpu'"),
        (
            "tpu",
            TPU,
            SHAPE._replace(dtype="float16"),
            "attention='tpu' supports bfloat16 and float32, not float16",
        ),
        ("gpu", A100, SHAPE, f"attention='gpu' is for {NOT_HOPPER}"),
    ),
)
def test_backends_that_do_not_run(asked: Any, device: Any, shape: KernelShape, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose_backend(asked, device, shape)
    assert str(error.value) == message


@pytest.mark.skipif(hasattr(plgpu, "InterpretGPUParams"), reason="this jax can")
def test_a_gpu_kernel_is_interpreted_by_a_later_jax() -> None:
    with pytest.raises(ConfigError, match=r"attention='gpu' on a CPU is interpreted by jax 0\.12"):
        choose_backend("gpu", CPU, SHAPE)


@pytest.fixture
def short_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_CONTEXT": 20, "_ROWS": 3, "_CALLS": 1, "_ROUNDS": 1}.items():
        monkeypatch.setattr(selftest, name, value)


DEVICE = jax.devices()[0]


def verdict_of(name: str, folder: Path) -> Verdict:
    shape = KernelShape.of(read_config(GOLDENS / name), 2, np.dtype("float32"), 8)
    return selftest.verdict("tpu", shape, DEVICE, folder, interpret=True)


def test_a_verdict_is_kept(short_check: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The interpreted kernel is right. The next start knows; of another shape it does not."""
    found = verdict_of("llama", tmp_path)
    assert found.right and found.error < 1e-5
    shape = "heads 1, per_head 3, width 8, value_dim 8, page_size 8, dtype float32"
    assert selftest.verdicts(tmp_path, DEVICE) == [(f"tpu attention, {shape}", found)]
    monkeypatch.setattr(selftest, "_check", lambda *_: pytest.fail("checked again"))
    assert verdict_of("llama", tmp_path) == found
    with pytest.raises(pytest.fail.Exception):
        verdict_of("gpt_oss", tmp_path)


@pytest.mark.parametrize("wrong", (0.0, np.nan))
def test_a_wrong_kernel_is_found(
    wrong: float, short_check: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def attend(query: jax.Array, *_: Any, value_dim: int, **__: Any) -> jax.Array:
        return jnp.full((*query.shape[:-1], value_dim), wrong, query.dtype)

    monkeypatch.setattr(tpu, "attend", attend)
    found = verdict_of("llama", tmp_path)
    assert not found.right and not found.use_kernel and not found.problem


def broken(
    monkeypatch: pytest.MonkeyPatch, change: Callable[..., jax.Array], folder: Path, shape: KernelShape
) -> Verdict:
    """What is found of a kernel whose calls are changed."""
    attend = tpu.attend
    monkeypatch.setattr(tpu, "attend", partial(change, attend))
    found = selftest.verdict("tpu", shape, DEVICE, folder, interpret=True)
    assert not found.problem
    return found


SMALL = KernelShape(1, 2, 16, 16, False, (None,), None, False, 8, "float32")


def test_what_is_no_number_in_padding_is_found(
    short_check: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Experts see the padding at the end of a chunk too."""

    def change(attend: Any, query: jax.Array, *arguments: Any, **named: Any) -> jax.Array:
        first, stop = arguments[-2:]
        beyond = (first[:, None] + jnp.arange(query.shape[1]) >= stop[:, None]) & (stop[:, None] > 0)
        return jnp.where(beyond[:, :, None, None, None], jnp.nan, attend(query, *arguments, **named))

    assert broken(monkeypatch, change, tmp_path, SMALL).error == float("inf")


@pytest.mark.parametrize("ignored", ({"window": None}, {"cyclic": False}), ids=str)
def test_a_window_longer_than_the_contexts_of_the_check_is_checked(
    ignored: Any, short_check: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(selftest, "_WINDOW", 5)

    def change(attend: Any, *arguments: Any, **named: Any) -> jax.Array:
        output: jax.Array = attend(*arguments, **(named | ignored))
        return output

    assert not broken(monkeypatch, change, tmp_path, SMALL._replace(windows=(4096,))).right


@pytest.mark.parametrize("transient", (False, True))
def test_a_kernel_that_raises_is_not_used(
    transient: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model starts without it, whatever a compiler says. The next start knows, if memory was there."""
    message = "RESOURCE_EXHAUSTED: 3 GB" if transient else "INTERNAL: Mosaic failed to compile\nat line 3"
    tried = []

    def check(*_: Any) -> Verdict:
        tried.append(1)
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(selftest, "_check", check)
    for _ in range(2):
        found = selftest.verdict("tpu", SMALL, DEVICE, tmp_path)
        assert not found.right and not found.use_kernel
    assert len(tried) == (2 if transient else 1)
    why = f"the kernel does not run on cpu: JaxRuntimeError: {message.splitlines()[0]}"
    assert caplog.messages == [why] * len(tried)
    assert choose_backend("auto", TPU, SHAPE, lambda: found).why == why
    assert [verdict for _, verdict in selftest.verdicts(tmp_path, DEVICE)] == [found] * (not transient)


@pytest.mark.parametrize(
    "content",
    ("", "{", "[1]", "{}", '{"verdict": {"device": "a chip"}}', '{"verdict": [1]}', "\x00\xff"),
)
def test_a_verdict_that_cannot_be_read_is_made_again(
    content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(selftest, "_check", lambda *_: RIGHT)
    selftest.verdict("tpu", SMALL, DEVICE, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = json.loads(file.read_text())
    wrong = {"verdict": whole["verdict"] | {"error": "small"}}
    for broken in (content, json.dumps(whole | wrong)):
        file.write_bytes(broken.encode("latin-1"))
        assert selftest.verdicts(tmp_path, DEVICE) == []
        assert selftest.verdict("tpu", SMALL, DEVICE, tmp_path) == RIGHT
        assert json.loads(file.read_text()) == whole
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("key", ("jax", "compiler", "source", "device"))
def test_a_verdict_of_other_versions_is_not_shown(
    key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(selftest, "_check", lambda *_: RIGHT)
    selftest.verdict("tpu", SMALL, DEVICE, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: "another"}))
    assert selftest.verdicts(tmp_path, DEVICE) == []


class Client(NamedTuple):
    """What is asked of a device's client."""

    platform_version: str = "a compiler"


def test_doctor_says_what_auto_does_and_what_was_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device: Any = SimpleNamespace(**TPU._asdict(), client=Client())
    monkeypatch.setenv("TPJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    auto = "auto: tpu where a model's first start finds it right and no slower, else xla"
    assert doctor._attention("tpu") == [auto]
    monkeypatch.setattr(selftest, "_check", lambda *_: RIGHT)
    selftest.verdict("tpu", SHAPE._replace(windows=(None, 512)), device, tmp_path / "attention")
    shape = (
        "heads 8, per_head 4, width 128, value_dim 128, windows [None, 512], page_size 128, dtype bfloat16"
    )
    assert doctor._attention("tpu") == [auto, f"checked: tpu attention, {shape}: {RIGHT}"]
    device.platform, device.compute_capability = "gpu", "8.0"
    assert doctor._attention("gpu")[0].startswith("auto: xla: the kernel is for compute capability 9")


def test_a_verdict_that_cannot_be_kept_counts_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(selftest, "_check", lambda *_: RIGHT)
    folder = tmp_path / "file"
    folder.write_text("")
    assert selftest.verdict("tpu", SMALL, DEVICE, folder) == RIGHT
    (message,) = caplog.messages
    assert message.startswith("what was found of a kernel is not kept: [Errno ")


def test_a_verdict_is_of_all_that_kernels_are_made_of() -> None:
    """A change of what several kernels share, or of the check, makes it void."""
    package = Path(selftest.__file__).parents[1]
    kernels = [package / f"{name}.py" for name in ("attention/gpu", "attention/tpu", "attention/tpu_write")]
    kernels += [package / f"layers/quantized_{name}.py" for name in ("gpu", "tpu")]
    imported = {
        node.module
        for file in kernels
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
    } | {"tpjax.mosaic_gpu"}
    own = {name for name in imported if re.match(r"tpjax\.(attention\.|layers\.|activations|mosaic)", name)}
    needed = {f"{name.removeprefix('tpjax.').replace('.', '/')}.py" for name in own}
    assert {"attention/reference.py", "mosaic_gpu.py"} < needed
    assert needed | {str(file.relative_to(package)) for file in kernels} <= set(selftest._SOURCES)


def test_pages_that_are_written_elsewhere_are_found(
    short_check: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def write(buffer: jax.Array, content: jax.Array, pages: jax.Array, **_: Any) -> jax.Array:
        return buffer.at[pages + 1].set(content)

    monkeypatch.setattr(tpu_write, "write_pages", write)
    found = verdict_of("llama", tmp_path)
    assert found.error == float("inf") and not found.problem


def test_tokens_that_are_written_elsewhere_are_found(
    short_check: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def write(buffer: jax.Array, content: jax.Array, pages: jax.Array, offsets: Any, **_: Any) -> jax.Array:
        return buffer.at[pages, :, offsets ^ 1].set(content)

    monkeypatch.setattr(tpu_write, "write_tokens", write)
    shape = KernelShape.of(read_config(GOLDENS / "llama"), 2, np.dtype("float32"), 32)
    found = selftest.verdict("tpu", shape, jax.devices()[0], tmp_path, interpret=True)
    assert found.error == float("inf") and not found.problem


@pytest.mark.parametrize("dtype", ("bfloat16", "float32", "int8", "uint8"))
def test_a_token_s_tile_is_read_changed_and_written(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several blocks; tokens of padding meet in the null page, whose content means nothing."""
    monkeypatch.setattr(tpu_write, "_BLOCK_BYTES", 1 << 18)
    rng = np.random.default_rng(0)
    buffer = jnp.asarray(rng.integers(0, 99, (40, 3, 64, 48)), dtype)
    tokens = jnp.asarray(rng.integers(0, 99, (36, 3, 48)), dtype)
    pages = jnp.asarray(np.append(rng.permutation(np.arange(1, 40))[:33], [0, 0, 0]), jnp.int32)
    offsets = jnp.asarray(rng.integers(0, 64, 36), jnp.int32)
    written = jax.jit(tpu_write.write_tokens, static_argnames="interpret")(
        buffer, tokens, pages, offsets, interpret=True
    )
    expected = buffer.at[pages, :, offsets].set(tokens)
    np.testing.assert_array_equal(written[1:].astype(jnp.float32), expected[1:].astype(jnp.float32))


def test_a_kernel_that_hangs_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(selftest.os, "_exit", lambda code: ended.set())
    with selftest._watchdog(0.01):
        assert ended.wait(10)
    assert "start again with --attention xla" in capsys.readouterr().err


def test_each_call_of_a_check_has_its_own_time(
    short_check: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Many programs are compiled, which may take longer on a busy machine than one kernel may hang."""
    begun: list[threading.Timer] = []

    class Timer(threading.Timer):
        def start(self) -> None:
            assert all(one.finished.is_set() for one in begun)
            begun.append(self)

    monkeypatch.setattr(threading, "Timer", Timer)
    assert verdict_of("llama", tmp_path).right
    # pages, rows and chunks; the kernel's time, and the walk's
    assert len(begun) == 1 + 2 + 2 * 2 and all(one.finished.is_set() for one in begun)
