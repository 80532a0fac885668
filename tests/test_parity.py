"""The same numbers as transformers, at every tp.

Against goldens (``scripts/make_goldens.py``) everywhere, and against transformers itself where it is
installed. The tolerance is DESIGN's: float32, max|difference| / max|logits| <= 1e-4, equal greedy tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GOLDENS
from stepwise import Stepwise

from tpjax import LLM, SamplingParams
from tpjax.checkpoints.opening import open_checkpoint
from tpjax.config import RopeConfig, RopeParameters
from tpjax.sharding import SEQUENCE_PARALLEL

TINY = sorted(golden.parent.name for golden in GOLDENS.glob("*/golden.npz"))
EVERY_TP = range(1, 9)
AT_EVERY_TP = ("llama", "gemma3", "gpt_oss")  # in the default tier; the others there at one tp
# Their layers, and how checkpoints store them, are those of a golden that is tried at every tp, named here; a
# map of names and a few numbers, which tp does not touch, are their own. Of the three tp, one shards nothing,
# one divides few sizes, and one is above the number of KV heads.
AT_THREE_TP = {
    "cohere2": "cohere",
    "gemma": "gemma3",
    "gemma2": "gemma3",
    "gemma3-with-vision": "gemma3",
    "gpt_neox-serial": "gpt_neox",
    "granite": "llama",
    "llama-bias-tied": "gpt_oss",
    "mistral": "llama",
    "qwen2": "gpt_oss",
    "qwen2_moe": "mixtral",
    "qwen3": "gemma3",
    "qwen3_moe": "mixtral",
    "smollm3": "llama",
    "starcoder2": "gpt2",
}
LIVE = (
    "llama",
    "deepseek_v3",
)  # also against transformers itself in the default tier
TOLERANCE = 1e-4
STEPS = 64
GREEDY = SamplingParams(max_tokens=STEPS, temperature=0, ignore_eos=True)


def relative_error(actual: np.ndarray, expected: np.ndarray, scale: float | None = None) -> float:
    return float(np.abs(actual - expected).max() / (scale or np.abs(expected).max()))


def slow(value: Any) -> Any:
    """A parameter that only `--all` tries."""
    return pytest.param(value, marks=pytest.mark.slow)


def wide(name: str, tp: int) -> tuple[pytest.MarkDecorator, ...]:
    """Marks what the default tier leaves to `--all`: of most goldens, all but one tp."""
    return () if tp == 3 or (name in AT_EVERY_TP and tp in (1, 2, 8)) else (pytest.mark.slow,)


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        pytest.param(name, tp, marks=wide(name, tp))
        for name in TINY
        for tp in (EVERY_TP if name not in AT_THREE_TP else (1, 3, 8))
    ],
)
def test_parity_with_goldens(name: str, tp: int) -> None:
    """Logits of a prompt in one chunk, then the greedy continuation token by token through the cache."""
    golden = np.load(GOLDENS / name / "golden.npz")
    prompt = golden["prompt"].tolist()
    model = Stepwise(name, tp, max_length=len(prompt) + STEPS)

    logits = model(prompt)
    assert relative_error(logits, golden["logits"]) <= TOLERANCE
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < STEPS:
        tokens.append(int(model(tokens[-1:])[0].argmax()))
    assert tokens == golden["greedy"].tolist()


@pytest.mark.parametrize("tp", (slow(2), 3, slow(8)))
@pytest.mark.parametrize("name", ("qwen3", "gemma3", "cohere", "gpt2", "gpt_oss", "deepseek_v3"))
def test_parity_with_sequence_parallelism(name: str, tp: int) -> None:
    """Also if tp does not divide the chunk, 64 positions."""
    golden = np.load(GOLDENS / name / "golden.npz")
    model = Stepwise(name, tp, max_length=len(golden["prompt"]) + STEPS, residual=SEQUENCE_PARALLEL)
    assert relative_error(model(golden["prompt"].tolist()), golden["logits"]) <= TOLERANCE


@pytest.mark.parametrize(
    "name",
    (slow("cohere"), "deepseek_v3", "gemma3", slow("gpt2"), slow("gpt_oss"), slow("mixtral"), "phi3"),
)
def test_parity_of_the_engine(name: str) -> None:
    """The same through the engine, for families that differ in what the runner passes or keeps."""
    golden = np.load(GOLDENS / name / "golden.npz")
    llm = LLM(GOLDENS / name, tp=3, max_model_len=128, max_slots=1)
    (completion,) = llm.generate([golden["prompt"].tolist()], GREEDY)
    assert completion.token_ids == golden["greedy"].tolist()
    assert completion.finish_reason == "length"


@pytest.mark.parametrize("name", TINY)
def test_goldens_are_worth_comparing(name: str) -> None:
    """A continuation that repeats one token would agree by accident."""
    golden = np.load(GOLDENS / name / "golden.npz")
    assert len(set(golden["greedy"].tolist())) > 8
    assert len(golden["prompt"]) > 9  # longer than the sliding windows


@pytest.mark.parametrize("name", [name if name in LIVE else slow(name) for name in TINY])
def test_parity_with_transformers(name: str) -> None:
    """Live, on a prompt no golden has seen."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[parity]'")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDENS / name, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    llm = LLM(GOLDENS / name, tp=3, max_model_len=160, max_slots=1)
    prompt = np.random.default_rng(11).integers(0, 128, 150)
    with torch.no_grad():
        expected = model(torch.tensor(prompt)[None]).logits[0].numpy()
    assert relative_error(llm.logits(prompt), expected) <= TOLERANCE


def test_longrope_shares_no_pages_across_the_switch() -> None:
    """Cached pages with the rotary embedding of a short sequence are not reused by a long one."""
    config = open_checkpoint(GOLDENS / "phi3").config
    assert [config.rope.scaling_key(max_length) for max_length in (2, 32, 33, 300)] == [
        (0,),
        (0,),
        (1,),
        (1,),
    ]
    dynamic = RopeParameters(kind="dynamic", original_max_position_embeddings=32, factor=4.0)
    grows = replace(config, rope=RopeConfig(full=dynamic))
    assert [grows.rope.scaling_key(max_length) for max_length in (2, 32, 33, 34)] == [
        (0,),
        (0,),
        (33,),
        (34,),
    ]


def test_parity_of_longrope_at_the_switch() -> None:
    """Frequencies change where a sequence is longer than the original context, 32 tokens here."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[parity]'")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDENS / "phi3", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    llm = LLM(GOLDENS / "phi3", tp=2, max_model_len=128, max_slots=1)
    prompt = np.random.default_rng(13).integers(0, 128, 33)
    with torch.no_grad():
        short, long = (model(torch.tensor(prompt[:n])[None]).logits[0].numpy() for n in (32, 33))
    assert relative_error(long[:32], short) > 0.01  # not the same model, then
    assert relative_error(llm.logits(prompt[:32]), short) <= TOLERANCE
    assert relative_error(llm.logits(prompt), long) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fixture", "name", "tp"), [("smollm2_gguf", "smollm2-135m", 4), ("gemma3_gguf", "gemma3-270m", 3)]
)
def test_parity_of_a_real_model(fixture: str, name: str, tp: int, request: pytest.FixtureRequest) -> None:
    """Where heads are padded: 9 and 3 KV heads over 4 devices, 4 and 1 over 3; below both are at tp=2."""
    path: Path = request.getfixturevalue(fixture)
    golden = np.load(GOLDENS / f"{name}.npz")
    llm = LLM(path, tp=tp, max_model_len=256, max_slots=1)
    prompt = golden["prompt"].tolist()

    logits = llm.logits(prompt)
    assert relative_error(logits[:, golden["kept"]], golden["logits"], float(golden["scale"])) <= TOLERANCE
    assert (logits.argmax(axis=1) == golden["kept"][golden["logits"].argmax(axis=1)]).all()
    (completion,) = llm.generate([prompt], GREEDY)
    assert completion.token_ids == golden["greedy"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ("smollm2_gguf", "gemma3_gguf"))
def test_parity_real_with_transformers(fixture: str, request: pytest.FixtureRequest) -> None:
    """Live and over the whole vocabulary, through transformers' own reading of the GGUF file."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[parity]'")
    path = request.getfixturevalue(fixture)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    llm = LLM(path, tp=2, max_model_len=256, max_slots=1)
    assert llm.tokenizer is not None
    prompt = llm.tokenizer.encode("In the beginning the Universe was created. 这让很多人非常生气。")
    with torch.no_grad():
        expected = model(torch.tensor(prompt)[None]).logits[0].numpy()
    assert relative_error(llm.logits(prompt), expected) <= TOLERANCE


@pytest.fixture(scope="module")
def tiny() -> Callable[[int], LLM]:
    built: dict[int, LLM] = {}

    def at(tp: int) -> LLM:
        if tp not in built:
            built[tp] = LLM(GOLDENS / "gemma3", tp=tp, max_model_len=256, max_slots=2)
        return built[tp]

    return at


@pytest.mark.parametrize("tp", (slow(1), 3))
def test_cached_decode_equals_full_forward(tiny: Callable[[int], LLM], tp: int) -> None:
    """Each greedy token is the arg-max of the teacher-forced logits of everything before it."""
    llm = tiny(tp)
    prompt = np.random.default_rng(3).integers(0, 131, 130).tolist()  # its decode crosses a page boundary
    (completion,) = llm.generate([prompt], GREEDY)
    logits = llm.logits(prompt + completion.token_ids)
    assert logits[len(prompt) - 1 : -1].argmax(axis=1).tolist() == completion.token_ids


@pytest.mark.slow
@pytest.mark.parametrize("tp", (1, 3, 4))
def test_batch_of_mixed_lengths_equals_one_by_one(tiny: Callable[[int], LLM], tp: int) -> None:
    """More prompts than slots, greedy and sampled in one batch."""
    llm = tiny(tp)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 131, length).tolist() for length in (1, 130, 31, 32, 33, 128, 7)]
    params = [
        SamplingParams(max_tokens=5 + 6 * i, temperature=0.9 * (i % 2), seed=i, top_p=0.9, ignore_eos=True)
        for i in range(len(prompts))
    ]
    together = llm.generate(prompts, params)
    alone = [llm.generate([prompt], p)[0] for prompt, p in zip(prompts, params, strict=True)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [len(c.token_ids) for c in together] == [p.max_tokens for p in params]


@pytest.mark.slow
def test_same_sampled_tokens_at_every_tp(tiny: Callable[[int], LLM]) -> None:
    prompt = list(range(3, 30))
    params = [
        SamplingParams(max_tokens=24, temperature=1.0, seed=seed, ignore_eos=True, **extra)
        for seed in (1, 2**32 - 1)
        for extra in ({}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"repetition_penalty": 1.3})
    ]
    sampled = {
        tp: [c.token_ids for c in tiny(tp).generate([prompt] * len(params), params)] for tp in (1, 3, 8)
    }
    assert sampled[1] == sampled[3] == sampled[8]
    assert len({tuple(tokens) for tokens in sampled[1]}) > len(params) // 2
