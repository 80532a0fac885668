"""Layers split over pipeline stages: the tokens and logits of a model in one piece."""

from __future__ import annotations

import io
import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import openai
import pytest
from conftest import GOLDENS
from rich.console import Console
from serving import tiny_checkpoint

from tpjax import LLM, SamplingParams
from tpjax.checkpoints.opening import open_checkpoint
from tpjax.checkpoints.parameters import parameters
from tpjax.config import ModelConfig
from tpjax.errors import ConfigError, DeviceError
from tpjax.hardware import HARDWARE
from tpjax.inspect.budget import measured
from tpjax.mesh import make_stage_meshes
from tpjax.planning import stage_benchmark
from tpjax.planning.published import published_config
from tpjax.planning.workload import Workload
from tpjax.runtime.layer_split import layer_seconds, split_layers
from tpjax.runtime.limits import Limits
from tpjax.step_time import Itemsizes, StepTokens

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 131, length).tolist() for length in (3, 40, 100, 7, 60, 20, 11)]
SIZES = {"max_model_len": 128, "max_slots": 4}
BF16 = Itemsizes(2, 2, 2)


def load(name: str, pp: int, **options: Any) -> LLM:
    return LLM(GOLDENS / name, pp=pp, **({"tp": 2} | SIZES | options))


def compare(one: LLM, several: LLM) -> None:
    """Logits, greedy and seeded tokens, with log-probabilities of the prompt and of what is sampled."""
    vocab = one.config.vocab_size
    prompts = [[token % vocab for token in prompt] for prompt in PROMPTS]
    expected = one.logits(prompts[2])
    difference = np.abs(several.logits(prompts[2]) - expected).max() / np.abs(expected).max()
    assert difference < 1e-5
    params = [
        SamplingParams(
            max_tokens=12,
            ignore_eos=True,
            temperature=float(number % 2),
            seed=number,
            logprobs=2 if number == 1 else None,
            prompt_logprobs=1 if number == 3 else None,
        )
        for number in range(len(prompts))
    ]
    wanted, got = one.generate(prompts, params), several.generate(prompts, params)
    assert [each.token_ids for each in got] == [each.token_ids for each in wanted]
    assert {each.finish_reason for each in got} == {"length"}
    for mine, other in (
        (got[1].logprobs, wanted[1].logprobs),
        (got[3].prompt_logprobs, wanted[3].prompt_logprobs),
    ):
        pairs = [(a, b) for a, b in zip(mine, other, strict=True) if b is not None]
        assert [a.token_id for a, _ in pairs] == [b.token_id for _, b in pairs] and pairs
        np.testing.assert_allclose([a.logprob for a, _ in pairs], [b.logprob for _, b in pairs], atol=1e-4)


# gemma3: layers with and without windows, a tied embedding; deepseek_v3: latent attention, experts in some
# layers; gpt2: learned positions; cohere2: attention and MLP in parallel, no rotation in some layers.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tp", "pp", "options"),
    (
        ("llama", 2, 2, {"sequence_parallel": "on"}),  # hidden states move as they lie: cut over tokens
        ("llama", 1, 2, {"quantize": "int4"}),
        ("deepseek_v3", 2, 3, {}),
        ("gemma3", 1, 3, {}),
        ("gpt_oss", 1, 2, {}),
        ("gpt2", 1, 2, {}),
        ("cohere2", 1, 3, {}),
    ),
)
def test_as_in_one_piece(name: str, tp: int, pp: int, options: dict[str, Any]) -> None:
    with load(name, 1, tp=tp, **options) as one, load(name, pp, tp=tp, **options) as several:
        assert len(several.runner.stages) == pp
        compare(one, several)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tps", "options"),
    (
        ("llama", (3, 1), {"sequence_parallel": "on"}),  # stages pad a step differently
        ("mixtral", (2, 3), {"quantize": "int8"}),
        ("deepseek_v3", (2, 1, 3), {"sequence_parallel": "on"}),
    ),
)
def test_stages_of_different_numbers_of_devices(
    name: str, tps: tuple[int, ...], options: dict[str, Any]
) -> None:
    prompts, params = (
        PROMPTS[3:6],
        [SamplingParams(max_tokens=8, ignore_eos=True, temperature=t, seed=3) for t in (0, 1, 1)],
    )
    with load(name, 1, tp=1, **options) as one, load(name, len(tps), tp=tps, **options) as several:
        assert [stage.mesh.size for stage in several.runner.stages] == list(tps)
        prompts = [[token % one.config.vocab_size for token in prompt] for prompt in prompts]
        logits = [llm.logits(prompts[1][:30]) for llm in (one, several)]
        assert np.abs(logits[0] - logits[1]).max() < 1e-5 * np.abs(logits[0]).max()
        wanted, got = ([each.token_ids for each in llm.generate(prompts, params)] for llm in (one, several))
        assert got == wanted


class Odd:
    """Allows odd tokens alone, and ends after nine."""

    error = None

    def __init__(self, vocab: int) -> None:
        self.count, self.words = 0, -(-vocab // 32)

    @property
    def finished(self) -> bool:
        return self.count == 9

    def mask(self) -> np.ndarray:
        return np.full(self.words, 0xAAAAAAAA, np.uint32)

    def advance(self, token: int) -> None:
        assert token % 2
        self.count += 1


@pytest.fixture(scope="module")
def text_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, LLM]]:
    path: Path = tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    sizes = {"max_model_len": 400, "max_slots": 4}
    with LLM(path, tp=2, **sizes) as one, LLM(path, tp=2, pp=2, **sizes) as two:
        yield one, two


def test_all_that_requests_ask_for(text_models: tuple[LLM, LLM]) -> None:
    """Penalties, biases, stop strings, minimum lengths, bad words: beside each other, over two groups."""
    one, two = text_models
    prompts = ["the quick brown fox", "words become text", "lazy dogs", "tokens", "over the", "jump"]
    (free,) = one.generate(prompts[2], max_tokens=20, temperature=0)
    params = [
        SamplingParams(max_tokens=30, temperature=0, repetition_penalty=1.3, frequency_penalty=0.4),
        SamplingParams(max_tokens=25, temperature=0.9, seed=5, presence_penalty=0.7, logit_bias={7: 3.0}),
        SamplingParams(max_tokens=30, temperature=0, stop=free.text[4:8]),
        SamplingParams(max_tokens=30, temperature=1.0, top_p=0.8, top_k=30, seed=1, min_tokens=9),
        SamplingParams(max_tokens=30, temperature=0, stop_token_ids=free.token_ids[5:6]),
        SamplingParams(max_tokens=18, temperature=1.0, min_p=0.02, seed=3, bad_words=["the"]),
    ]
    wanted, got = one.generate(prompts, params), two.generate(prompts, params)
    for mine, other in zip(got, wanted, strict=True):
        assert (mine.token_ids, mine.text, mine.finish_reason) == (
            other.token_ids,
            other.text,
            other.finish_reason,
        )
    assert "stop" in {each.finish_reason for each in got}
    assert [delta.token_ids for delta in two.stream(prompts[0], params[0])]  # a single row, one step ahead


def test_grammars(text_models: tuple[LLM, LLM]) -> None:
    answers: list[list[list[int]]] = []
    for llm in text_models:
        requests = [
            llm.request([3, 4, number], SamplingParams(max_tokens=14, temperature=1.0, seed=number), **extra)
            for number, extra in enumerate(({"grammar": Odd(384)}, {}, {"grammar": Odd(384)}, {}))
        ]
        for request in requests:
            llm.engine.add(request)
        while llm.engine.busy:
            llm.engine.step()
        answers.append([request.output_token_ids for request in requests])
    assert answers[0] == answers[1] and all(token % 2 for token in answers[1][0]) and len(answers[1][0]) == 9


def test_prefix_cache_and_preemption(text_models: tuple[LLM, LLM]) -> None:
    """Few pages, and prompts that share one: what is in flight when a row is preempted is not lost."""
    one, two = text_models
    prompts = [[5] * 130 + [number] for number in range(5)]
    params = SamplingParams(max_tokens=150, temperature=0.8, seed=2, ignore_eos=True)
    wanted = one.generate(prompts, params)
    blocks = two.engine.scheduler.blocks
    kept = blocks.allocate(blocks.free - 6)  # three rows share a page and take one each, then another each
    got = two.generate(prompts, params)
    blocks.release(kept)
    assert [each.token_ids for each in got] == [each.token_ids for each in wanted]
    stats = two.engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hits >= 4 * 128


def test_a_failure_loses_no_later_request(text_models: tuple[LLM, LLM]) -> None:
    """The first stage's cache is gone: what runs ends with an error, and then all is as before."""
    _, two = text_models
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    wanted = two.generate(PROMPTS[:3], params)
    for buffer in jax.tree.leaves(two.runner.stages[0].state):
        buffer.delete()
    lost = two.generate(PROMPTS[:3], params)
    assert {each.finish_reason for each in lost} == {"error"}
    again = two.generate(PROMPTS[:3], params)
    assert [each.token_ids for each in again] == [each.token_ids for each in wanted]


@pytest.mark.slow
def test_after_warm_up_nothing_compiles() -> None:
    with load("llama", 2, tp=1, max_model_len=64, max_slots=2) as two:
        two.warm_up()
        count = two.runner.compile_count
        two.generate(PROMPTS[:2], max_tokens=5, temperature=0)
        two.generate(PROMPTS[:1], max_tokens=5, prompt_logprobs=2, presence_penalty=0.3)
        assert two.runner.compile_count == count
        first, last = two.runner.stages
        assert {spec.kind for spec in first.programs.compiled} == {"layers"}
        needed = {spec.before_last for spec in last.programs.compiled if spec.takes_weights}
        assert first.programs.compiled.keys() == needed


# --- what a stage holds ------------------------------------------------------------------------------------


def test_a_stage_holds_its_layers_and_their_cache() -> None:
    """The embedding is on the first stage and, as it is the projection too, on the last."""
    with load("llama-bias-tied", 1) as one, load("llama-bias-tied", 2) as two:
        first, last = two.runner.stages
        assert (first.layers, last.layers) == (range(1), range(1, 2))
        devices = [{d for w in stage.weights for d in w.devices()} for stage in two.runner.stages]
        assert [sorted(d.id for d in some) for some in devices] == [[0, 1], [2, 3]]
        names = [p.name for p in parameters(one.runner.abstract_model(), one.mesh)]
        whole, seen = dict(zip(names, one.runner.weights, strict=True)), []
        for stage in two.runner.stages:
            declared = parameters(stage.abstract_model(), stage.mesh)
            for parameter, weight in zip(declared, stage.weights, strict=True):
                name = parameter.name.replace("layers.0.", f"layers.{stage.layers.start}.")
                np.testing.assert_array_equal(np.asarray(weight), np.asarray(whole[name]))
                seen.append(name)
        (embedding,) = (name for name in names if "embed_tokens" in name)
        assert sorted(seen) == sorted([*names, embedding])
        assert len(first.state.cache.entries) == len(last.state.cache.entries) == 1
        assert not hasattr(first.state, "history")


def test_drawn_tokens_wait_for_no_later_step() -> None:
    """A group is fed what its own last step drew, not what a step in flight after it will draw."""
    with load("llama", 2) as llm:
        drawn, fed = llm.runner._pipeline._drawn, []
        tokens = drawn.tokens
        drawn.tokens = lambda work: fed.append(tokens(work)) or fed[-1]
        steps: list[Any] = []
        send_back = llm.runner._pipeline.send_back
        llm.runner._pipeline.send_back = lambda work, array: (
            send_back(work, array) or steps.append(drawn._last[-1][1])
        )
        llm.generate(PROMPTS[:4], max_tokens=28, temperature=0, ignore_eos=True)
        steady = range(len(fed) - 30, len(fed) - 6)
        assert all(fed[number] is steps[number - 2] for number in steady)


# --- the split ---------------------------------------------------------------------------------------------


def seconds(config: ModelConfig, tp: int = 1) -> list[float]:
    return layer_seconds(config, tp, BF16, HARDWARE["v5e"], StepTokens(8, 1024))


def split(config: ModelConfig, *tps: int) -> list[range]:
    return list(split_layers(config, tps, BF16, HARDWARE["v5e"]))


def test_layers_are_split_by_cost() -> None:
    """Counted are the projection on the last stage, and that layers with experts take longer."""
    config = published_config("llama-3-8b")
    for pp in (1, 2, 3, 5, 32):
        parts = split(config, *[1] * pp)
        assert [i for part in parts for i in part] == list(range(32)) and all(parts) and len(parts) == pp
    *same, last = seconds(config)
    assert last > 2 * max(same)  # 525 million elements of the projection beside 218 of a layer
    assert [len(part) for part in split(config, 1, 1)] == [17, 15]
    config = published_config("deepseek-v3")
    first, last_stage = split(config, 1, 1)
    assert len(first) > len(last_stage) and not any(config.sparse_layers[:3])


@pytest.mark.parametrize("tps", ((1, 1), (1, 1, 1), (1, 1, 1, 1), (4, 1), (1, 2), (1, 3, 2), (3, 3, 1, 2)))
def test_no_other_split_is_faster(tps: tuple[int, ...]) -> None:
    """Held against all splits of a model with dense and sparse layers."""
    config = open_checkpoint(GOLDENS / "deepseek_v3").config.of_layers([0, 1, 2, 2, 1, 0, 2])
    layers = [seconds(config, tp) for tp in tps]
    assert len({round(one, 12) for one in layers[0][1:6]}) > 1
    bounds = [(0, *some, 7) for some in itertools.combinations(range(1, 7), len(tps) - 1)]

    def slowest(parts: Sequence[Sequence[int]]) -> float:
        return max(sum(own[i] for i in part) for own, part in zip(layers, parts, strict=True))

    fastest = min(slowest([range(*ends) for ends in itertools.pairwise(some)]) for some in bounds)
    assert slowest(split(config, *tps)) == pytest.approx(fastest)


def test_a_stage_of_more_devices_has_more_layers() -> None:
    """By the time that they save, which is less than their number where a layer waits for its all-reduces."""
    config = published_config("llama-3.1-70b")
    counts = [[len(part) for part in split(config, *tps)] for tps in ((4, 4), (6, 2), (2, 6))]
    assert counts[0][0] in range(39, 42) and counts[1][0] > 55 and counts[2][1] > 50
    stages = zip((6, 2), split(config, 6, 2), strict=True)
    times = [sum(seconds(config, tp)[i] for i in part) for tp, part in stages]
    assert max(times) < 1.1 * min(times)


# --- what does not go together -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"pp": 0}, DeviceError, "pp=0 is not a whole number of pipeline stages, 1 to 1024"),
        ({"pp": 3}, ConfigError, "pp=3 stages need a layer each, but this model has num_layers=2"),
        ({"pp": 9}, DeviceError, r"pp=9 stages of tp=2 need 18 devices, but JAX sees 16 \(CPU\)"),
        ({"pp": 2, "dp": 5}, DeviceError, "dp=5 replicas of pp=2 stages of tp=2 need 20 devices"),
        (
            {"pp": 3, "tp": None},
            DeviceError,
            "16 devices are not a multiple of pp=3: tp=5 would use 15 of them, tp=6,5,5 all",
        ),
        ({"pp": 2, "tp": (3, 1, 1)}, DeviceError, "tp=3,1,1 is of 3 stages, but pp=2"),
        ({"tp": (3, 1)}, DeviceError, "tp=3,1 is of 2 stages, but pp=1"),
        ({"pp": 2, "tp": (3, 0)}, DeviceError, "tp=0 is not a whole number of devices, 1 or more"),
        ({"pp": 2, "tp": "3,1"}, DeviceError, "tp='3' is not a whole number of devices, 1 or more"),
        ({"pp": 2, "tp": (12, 5)}, DeviceError, "pp=2 stages of tp=12,5 need 17 devices, but JAX sees 16"),
    ),
)
def test_layouts_that_do_not_fit(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LLM(GOLDENS / "llama", **({"tp": 2} | options))


@dataclass
class Device:
    number: int
    process_index: int
    platform: str = "cpu"


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight devices and of four."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda: [Device(number, number // 8) for number in range(12)])
    monkeypatch.setattr(jax, "make_mesh", lambda *_, devices, **__: [one.number for one in devices])


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize(
    ("tp", "pp", "wanted"),
    (
        ((8, 4), 2, [[*range(8)], [8, 9, 10, 11]]),
        ((3, 2), 2, [[0, 1, 2], [8, 9]]),  # each process has a stage
        ((6, 4), 2, [[*range(6)], [8, 9, 10, 11]]),
        ((1, 2, 1), 3, [[0], [1, 2], [8]]),
        ((6, 3, 1), 3, [[*range(6)], [8, 9, 10], [11]]),
        (2, 4, [[0, 1], [2, 3], [4, 5], [8, 9]]),
    ),
)
def test_a_stage_is_of_one_process(tp: int | tuple[int, ...], pp: int, wanted: list[list[int]]) -> None:
    assert make_stage_meshes(tp, 1, pp) == [wanted]


@pytest.mark.usefixtures("two_processes")
def test_stages_that_do_not_fit_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "pp=2 stages of tp=6: stage 2 needs 6 devices of one process, but process 1 has 4 left of 4"
    with pytest.raises(DeviceError, match=why):
        make_stage_meshes(6, 1, 2)
    why = "pp=3 stages of tp=6,4,1: stage 3 needs 1 device of one process, but process 1 has 0 left of 4"
    with pytest.raises(DeviceError, match=why):
        make_stage_meshes((6, 4, 1), 1, 3)
    with pytest.raises(DeviceError, match="dp=2 replicas run in one process, but there are 2"):
        make_stage_meshes(1, 2, 2)
    monkeypatch.setattr(jax, "devices", lambda: [Device(number, number // 4) for number in range(12)])
    why = "pp=2 stages of tp=4 leave process 2 without a device: the 3 processes have 12; use more stages"
    with pytest.raises(DeviceError, match=why):
        make_stage_meshes(4, 1, 2)


def test_no_dispatches_of_several_steps() -> None:
    limits = Limits(max_slots=5, max_model_len=128, num_pages=12, steps=1, stages=2)
    assert limits.max_rows == 3 and limits.batch_sizes == (1, 2, 3)
    with pytest.raises(ConfigError, match="steps=4 of one dispatch are not supported with stages=2"):
        replace(limits, steps=4)


@pytest.mark.slow
def test_replicas_of_several_stages() -> None:
    params = SamplingParams(max_tokens=8, temperature=0.7, seed=4, ignore_eos=True)
    with load("llama", 1) as one, load("llama", 2, dp=2) as both:
        meshes: Sequence[Any] = [stage.mesh for engine in both.engines for stage in engine.runner.stages]
        assert [[d.id for d in mesh.devices.flat] for mesh in meshes] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert [each.token_ids for each in both.generate(PROMPTS, params)] == [
            each.token_ids for each in one.generate(PROMPTS, params)
        ]


# --- the command line, and reports --------------------------------------------------------------------------


def test_explain_shows_each_stage() -> None:
    from tpjax.inspect.explain import explain_model

    one, two = (explain_model(str(GOLDENS / "llama"), tp=2, max_model_len=400, pp=pp) for pp in (1, 2))
    shown = io.StringIO()
    Console(file=shown, width=300).print(two)
    assert "llama at pp=2 × tp=2" in shown.getvalue().replace(str(GOLDENS) + "/", "")
    first, last = two.stages
    assert two.layers == [(0, 1), (1, 2)] and two.rows == 4
    assert first.weight_bytes_per_device + last.weight_bytes_per_device == one.weight_bytes_per_device
    assert [one.cache["buffers"], first.cache["buffers"], last.cache["buffers"]] == [4, 2, 2]
    hidden = open_checkpoint(GOLDENS / "llama").config.hidden_size
    assert two.hidden_bytes == 4 * hidden and f"{4 * hidden} B a token" in shown.getvalue()
    for stage, reduces in ((first, 3), (last, 2)):  # two a layer, and the embedding's on the first
        decode, _ = stage.steps
        found = measured(decode.collectives)
        assert found["all_reduces"] == decode.budget["all_reduces"] == reduces
        assert found["all_reduce_bytes"] == decode.budget["all_reduce_bytes"]
        assert found["all_gathers"] == decode.budget["all_gathers"] == (stage is last)


def test_explain_shows_stages_of_unlike_devices() -> None:
    from tpjax.inspect.explain import explain_model

    report = explain_model(str(GOLDENS / "llama"), tp=(3, 1), max_model_len=400, pp=2)
    shown = io.StringIO()
    Console(file=shown, width=300).print(report)
    assert "llama at pp=2 × tp=3,1" in shown.getvalue().replace(str(GOLDENS) + "/", "")
    assert report.tp == [stage.tp for stage in report.stages] == [3, 1]
    for stage in report.stages:
        decode, _ = stage.steps
        found = measured(decode.collectives)
        assert {name: decode.budget[name] for name in found} == found
    assert found["all_reduces"] == found["all_gathers"] == 0  # the last has one device


def test_each_stage_is_timed_alone(text_models: tuple[LLM, LLM]) -> None:
    _, two = text_models
    workload = Workload(1, context=60, prompt_len=30, dtype="float32")
    report = stage_benchmark.run(two.runner, "tiny", two.config, {2: HARDWARE["v5e"]}, workload, 1)
    itemsizes, hidden = workload.itemsizes, two.config.hidden_size
    decode = layer_seconds(two.config, 2, itemsizes, HARDWARE["v5e"], StepTokens(1, 60))
    prefill = layer_seconds(two.config, 2, itemsizes, HARDWARE["v5e"], StepTokens(chunks=((0, 30),)))
    assert [one.layers for one in report.stages] == [(0, 1), (1, 2)]
    for one, decode_s, prefill_s in zip(report.stages, decode, prefill, strict=True):
        assert one.decode_plan_ms == pytest.approx(1e3 * decode_s) and one.decode_ms > 0
        assert one.prefill_plan_ms == pytest.approx(1e3 * prefill_s) and one.prefill_ms > 0
    assert (report.decode_bytes, report.prefill_bytes) == (4 * hidden, 4 * 32 * hidden)
    shown = io.StringIO()
    Console(file=shown, width=120).print(report)
    assert f"to the next stage: {4 * hidden} bytes of a decoded token" in " ".join(shown.getvalue().split())


@pytest.mark.slow
def test_the_server_answers_as_without_stages(tmp_path: Path) -> None:
    """``tpjax serve --tp 2 --pp 2`` as a process, and the OpenAI client."""
    directory = tiny_checkpoint(tmp_path)
    prompts = [f"the quick brown fox {number}" for number in range(8)]
    ask: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 24}
    with LLM(directory, tp=1, **SIZES) as alone:
        wanted = [c.text for c in alone.generate(prompts, max_tokens=24, temperature=0, ignore_eos=True)]
    words = ["--tp", "2", "--pp", "2", "--port", "0", "--served-model-name", "tiny", "--max-model-len", "256"]
    environment = {name: text for name, text in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    with subprocess.Popen(
        [sys.executable, "-m", "tpjax", "serve", str(directory), *words],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as server:
        try:
            assert server.stderr is not None
            address = ""
            for line in server.stderr:
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    address = found[0]
                if "is ready" in line:
                    break
            reader = threading.Thread(target=server.stderr.read)
            reader.start()
            with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=9) as client:

                def answer(prompt: str) -> str:
                    reply = client.completions.create(prompt=prompt, extra_body={"ignore_eos": True}, **ask)
                    return reply.choices[0].text

                with ThreadPoolExecutor(len(prompts)) as pool:
                    assert list(pool.map(answer, prompts)) == wanted
        finally:
            server.terminate()
            assert server.wait(60) == 0
        reader.join()


@pytest.mark.slow
def test_generate_says_the_layout() -> None:
    words = ["3 4 5", "--token-ids", "--max-tokens", "3", "--max-model-len", "128", "--pp", "2", "--tp", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tpjax", "generate", "--model", str(GOLDENS / "llama"), *words],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "pp=2 × tp=1" in done.stderr
