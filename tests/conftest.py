"""Every test process sees sixteen faked CPU devices; real models come from the packages the aliases name."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jaxtyping

if TYPE_CHECKING:
    from api_server import Api

    from tpjax import LLM
    from tpjax.text.tokenizer import Tokenizer


def modules_with_shapes() -> list[str]:
    """The modules of tpjax whose signatures have array shapes, found without importing one."""
    (package,) = (Path(one) for one in importlib.util.find_spec("tpjax").submodule_search_locations)
    found = sorted(path for path in package.rglob("*.py") if "from jaxtyping import" in path.read_text())
    return [".".join(path.relative_to(package.parent).with_suffix("").parts) for path in found]


# shapes and dtypes in signatures are checked at each call: while tracing, that is, so once a program
if importlib.util.find_spec("beartype"):  # a machine that is lent for its GPU lacks it
    jaxtyping.install_import_hook(modules_with_shapes(), "signatures.checked")

import tpjax  # noqa: E402

# A shell has its background jobs ignore interrupts, and all that they start: tests would wait for ends that
# never come.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests compile hundreds of small programs, each for a few calls. LLVM's optimisation costs half of that,
# and the fusion emitters of jax 0.10 half of the rest; later versions have no others, and end at the flag.
# Code in one part is generated once, not in 32 parts that two cores share: a tenth of the rest.
COMPILE_FAST = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    COMPILE_FAST.append("--xla_cpu_use_fusion_emitters=false")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in flags:  # test_as_shipped sets the level that XLA has by itself
    os.environ["XLA_FLAGS"] = " ".join((flags, *COMPILE_FAST))
tpjax.fake_devices(16)

import jax  # noqa: E402  (after the devices are faked)
import pytest  # noqa: E402
import trained_tokenizers  # noqa: E402

GOLDENS = Path(__file__).parent / "goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--all`."""
    parser.addoption("--all", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked slow, unless all is asked for, a mark, or the test by its name.

    Of all, what is marked as shipped is left to ``test_as_shipped``, which names it.
    """
    if config.getoption("markexpr"):
        return
    mark = "as_shipped" if config.getoption("--all") else "slow"
    named = [arg.partition("::")[2] for arg in config.args if "::" in arg]
    kept, left_out = [], []
    for item in items:
        name = item.nodeid.partition("::")[2]
        marked = item.get_closest_marker(mark) and not any(name.startswith(one) for one in named)
        (left_out if marked else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says how to run what was left out."""
    if not (config.getoption("--all") or config.getoption("markexpr")):
        terminalreporter.write_line("without the tests marked slow: --all runs them too")


@pytest.fixture(scope="session", autouse=True)
def strict_jax(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Dtypes never widen silently; a program compiled once in this run and process is found again."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    # of each process its own: two that write one entry at once could read half of it
    jax.config.update("jax_compilation_cache_dir", os.fspath(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # one for the processes that tests start, some of them at once: a limit makes JAX lock it
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": os.fspath(tmp_path_factory.mktemp("xla_of_processes")),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**32),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    gc.collect()
    gc.freeze()  # what was imported stays: a full collection would look through it for a third of a second
    yield


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return _model("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_first_layers(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two of SmolLM2's thirty layers, with its vocabulary."""
    from first_layers import first_layers

    return first_layers(smollm2_gguf, 2, tmp_path_factory.mktemp("first_layers") / "model.gguf")


@pytest.fixture(scope="session")
def smollm2_short(smollm2_first_layers: Path) -> LLM:
    """Those two layers over two devices: a real vocabulary, and programs that compile in a second."""
    from tpjax import LLM

    return LLM(smollm2_first_layers, tp=2, max_model_len=256, max_slots=2)


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """Gemma 3 270M, Q4_K_M."""
    return _model("gemma3-270m")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_gguf: Path) -> Tokenizer:
    """SmolLM2's, from its GGUF file: byte-level BPE."""
    return _tokenizer(smollm2_gguf)


@pytest.fixture(scope="session")
def gemma3_tokenizer(gemma3_gguf: Path) -> Tokenizer:
    """Gemma 3's, from its GGUF file: SentencePiece."""
    return _tokenizer(gemma3_gguf)


@pytest.fixture(scope="session")
def byte_level_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of 400 tokens."""
    return trained_tokenizers.byte_level_json(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def sentencepiece_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model of 400 tokens."""
    return trained_tokenizers.sentencepiece_model(tmp_path_factory.mktemp("spm"))


@pytest.fixture(scope="session")
def byte_level(byte_level_dir: Path) -> Tokenizer:
    """The tokenizer of ``byte_level_dir``."""
    return _tokenizer(byte_level_dir)


@pytest.fixture(scope="session")
def spm(sentencepiece_dir: Path) -> Tokenizer:
    """The tokenizer of ``sentencepiece_dir``."""
    return _tokenizer(sentencepiece_dir)


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A server of the tiny model."""
    from api_server import api_of

    with api_of(tmp_path_factory.mktemp("api")) as one:
        yield one


def _tokenizer(path: Path) -> Tokenizer:
    from tpjax.text.loading import load_tokenizer

    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    return tokenizer


def _model(alias: str) -> Path:
    from tpjax.checkpoints.hub import resolve

    return resolve(alias)
