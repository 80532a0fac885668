"""Several replicas behind one front: routing, equal tokens, cancellation, and a replica that fails."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import openai
import pytest
from conftest import GOLDENS
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from serving import load_tiny, running, tiny_checkpoint

from tpjax import LLM, SamplingParams
from tpjax.checkpoints.source import TensorSource
from tpjax.engine.router import Router
from tpjax.engine.routing import ReplicaLoad, choose
from tpjax.errors import ConfigError, DeviceError, EngineError
from tpjax.mesh import make_meshes

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 131, length).tolist() for length in (3, 40, 130, 7, 200, 20, 11)]
GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=10, temperature=1.0, ignore_eos=True)


def load(dp: int, **options: Any) -> LLM:
    return LLM(GOLDENS / "llama", dp=dp, **({"tp": 1, "max_model_len": 400, "max_slots": 2} | options))


@pytest.fixture(scope="module")
def one() -> LLM:
    return load(1)


@pytest.fixture(scope="module")
def two() -> Iterator[LLM]:
    with load(2) as llm:
        yield llm


def hits(llm: LLM) -> list[int]:
    return [status.stats.prefix_hits for status in llm.front.status()]


def queries(llm: LLM) -> list[int]:
    return [status.stats.prefix_queries for status in llm.front.status()]


# --- the policy ---------------------------------------------------------------------------------------------


def test_where_a_request_goes() -> None:
    idle, busy = ReplicaLoad(True, 0, 0), ReplicaLoad(True, 3, 0)
    assert choose([idle, idle]) == 0
    assert choose([busy, idle]) == 1
    assert choose([busy._replace(cached=4), idle]) == 0  # three wait; four pages are there
    assert choose([busy._replace(cached=2), idle]) == 1
    assert choose([ReplicaLoad(False, 2, 50), ReplicaLoad(True, 9, 0)]) == 1  # it starts at once
    assert choose([ReplicaLoad(False, 2, 0), ReplicaLoad(False, 9, 8)]) == 1
    assert choose([busy]) == 0


@given(st.lists(st.integers(1, 30), min_size=40, max_size=80), st.integers(2, 5), st.integers(0, 12))
def test_a_shared_prefix_attracts_no_more_than_its_pages(
    lengths: list[int], replicas: int, shared: int
) -> None:
    """Requests that never end and share a prefix: no replica gets far ahead of another."""
    queued, cached = [0] * replicas, [0] * replicas
    for length in lengths:
        at = choose([ReplicaLoad(True, queued[i], cached[i]) for i in range(replicas)])
        queued[at] += 1 + length + shared - cached[at]
        cached[at] = shared
        assert max(queued) - min(queued) <= 1 + max(lengths) + 2 * shared


# --- meshes -------------------------------------------------------------------------------------------------


def test_meshes_are_disjoint() -> None:
    ids = [[device.id for device in mesh.devices.flat] for mesh in make_meshes(3, 4)]
    assert ids == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert [mesh.size for mesh in make_meshes(None, 4)] == [4] * 4


@pytest.mark.parametrize(
    ("tp", "dp", "message"),
    (
        (2, 0, "dp=0 is not a whole number of replicas, 1 or more"),
        (2, True, "dp=True is not a whole number of replicas"),
        (2, 9, r"dp=9 replicas of tp=2 need 18 devices, but JAX sees 16 \(CPU\).*fake_devices\(18\)"),
        (None, 3, "16 devices are not a multiple of dp=3: tp=5 would use 15 of them"),
        (None, 17, "dp=17 replicas of tp=1 need 17 devices, but JAX sees 16"),
    ),
)
def test_layouts_that_do_not_fit(tp: int | None, dp: int, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        LLM(GOLDENS / "llama", tp=tp, dp=dp)


def test_several_processes_have_one_replica_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(DeviceError, match="dp=2 replicas run in one process, but there are 3"):
        make_meshes(1, 2)


# --- tokens -------------------------------------------------------------------------------------------------


def test_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tpjax.checkpoints.safetensors import SafetensorsCheckpoint

    read: list[int] = []
    real = SafetensorsCheckpoint.read

    def counted(self: TensorSource, *arguments: Any) -> np.ndarray:
        values = real(self, *arguments)
        read.append(values.nbytes)
        return values

    monkeypatch.setattr(SafetensorsCheckpoint, "read", counted)
    totals = []
    for dp in (1, 3):
        read.clear()
        with load(dp, tp=2) as llm:
            totals.append(sum(read))
            engines = llm.engines
            for engine in engines:
                for mine, first in zip(engine.runner.weights, engines[0].runner.weights, strict=True):
                    np.testing.assert_array_equal(mine, first)
            devices = [{d for w in engine.runner.weights for d in w.devices()} for engine in engines]
            assert [len(one) for one in devices] == [2] * dp and len(set().union(*devices)) == 2 * dp
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize("params", (pytest.param(GREEDY, marks=pytest.mark.slow), SAMPLED))
def test_tokens_do_not_depend_on_the_replica(one: LLM, two: LLM, params: SamplingParams) -> None:
    """Neither those of seeds that the front draws, wherever a request runs and whatever runs beside it."""
    outputs, before = [], queries(two)
    for llm in (one, two):
        llm._requests._seeds = np.random.default_rng(5)
        outputs.append([[c.token_ids for c in llm.generate(PROMPTS, params)] for _ in range(2)])
    assert all(now > then for now, then in zip(queries(two), before, strict=True))  # both had something to do
    assert outputs[0] == outputs[1]
    assert (outputs[0][0] == outputs[0][1]) == (params is GREEDY)


def test_streams_and_batches_at_once(one: LLM, two: LLM) -> None:
    wanted = [c.token_ids for c in one.generate(PROMPTS, GREEDY)]
    streams = [two.stream(prompt, GREEDY) for prompt in PROMPTS[:3]]
    got = [list(next(stream).token_ids) for stream in streams]
    assert [c.token_ids for c in two.generate(PROMPTS, GREEDY)] == wanted
    for stream, tokens in zip(streams, got, strict=True):
        for delta in stream:
            tokens += delta.token_ids
    assert got == wanted[:3]
    assert not two.front.busy and not two._streams
    np.testing.assert_allclose(two.logits(PROMPTS[0]), one.logits(PROMPTS[0]), atol=1e-6)


def test_a_prefix_is_found_where_it_is_cached(two: LLM) -> None:
    before = hits(two)
    prompts = [[*RNG.integers(0, 131, 260).tolist()] for _ in range(2)]
    for prompt in prompts:  # one after the other: with nothing queued both go to the first
        two.generate([prompt], GREEDY)
    for prompt in [*prompts, *prompts]:
        two.generate([[*prompt[:256], 9]], GREEDY)
    assert [now - then for now, then in zip(hits(two), before, strict=True)] == [4 * 256, 0]
    fresh = [[5, *RNG.integers(0, 131, 260).tolist()] for _ in range(2)]
    two.generate(fresh, GREEDY)  # together: to one each
    before = hits(two)
    for prompt in [fresh[1], fresh[0], fresh[1]]:
        two.generate([[*prompt[:256], 9]], GREEDY)
    assert sorted(now - then for now, then in zip(hits(two), before, strict=True)) == [256, 512]


def test_a_stream_that_is_closed_gives_everything_back(two: LLM) -> None:
    two.generate(PROMPTS[:4], LONG)  # compiles: neither replica is far ahead below
    streams = [two.stream(prompt, LONG) for prompt in PROMPTS[:4]]
    for stream in streams:
        next(stream)
    assert any(engine.scheduler.running for engine in two.engines)
    for stream in streams:
        stream.close()
    assert not two.front.busy
    held: list[int] = []
    two.front.run_on_all(lambda engine: held.append(engine.stats().pages_in_use))  # after what came before
    assert held == [0, 0]
    assert isinstance(two.front, Router)
    assert [(one.requests, one.prompt_pages) for one in two.front._members] == [(0, 0)] * 2
    (again,) = two.generate(PROMPTS[:1], GREEDY)
    assert len(again.token_ids) == 10


# --- faults -------------------------------------------------------------------------------------------------


def break_weights(llm: LLM, replica: int) -> None:
    """As if its devices were gone: every dispatch fails from now on."""
    for weight in llm.engines[replica].runner.weights:
        weight.delete()


def test_a_failed_dispatch_ends_what_ran_there_and_nothing_else(one: LLM) -> None:
    prompts, longest = [PROMPTS[i] for i in (0, 1, 3, 5)], replace(LONG, max_tokens=350)
    wanted = [c.token_ids for c in one.generate(prompts, longest)]
    with load(2) as llm:
        assert [c.token_ids for c in llm.generate(prompts, longest)] == wanted
        streams = [llm.stream(prompt, longest) for prompt in prompts]
        assert isinstance(llm.front, Router)
        got, at = [], []
        for stream in streams:
            got.append(list(next(stream).token_ids))
            at.append(llm.front._members.index([*llm.front._open.values()][-1].member))  # of the newest
        assert sorted(at) == [0, 0, 1, 1]

        def lose(engine: Any) -> None:
            for buffer in jax.tree.leaves(engine.runner.state):
                buffer.delete()

        llm.front._members[1].submit(lose).result()
        for stream, tokens, replica, expected in zip(streams, got, at, wanted, strict=False):
            *_, last = deltas = list(stream)
            tokens += [token for delta in deltas for token in delta.token_ids]
            if replica == 0:
                assert (tokens, last.finish_reason) == (expected, "length")
            else:
                assert last.finish_reason == "error" and "a dispatch failed" in str(last.error)
                assert tokens == expected[: len(tokens)]
        assert [status.error for status in llm.front.status()] == [None, None]
        assert [c.token_ids for c in llm.generate(prompts, longest)] == wanted


def test_a_replica_that_fails_takes_only_its_own_along(one: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """What waited there runs elsewhere; the other replica gets everything from now on."""
    wanted = [c.token_ids for c in one.generate(PROMPTS, GREEDY)]
    with load(2) as llm:
        llm.generate(PROMPTS, GREEDY)
        break_weights(llm, 0)
        answers = llm.generate(PROMPTS, GREEDY)
        ended = [c for c in answers if c.finish_reason == "error"]
        assert 1 <= len(ended) <= 2  # as many as there are slots
        assert all("a dispatch failed" in str(c.error) for c in ended)
        for answer, expected in zip(answers, wanted, strict=True):
            assert answer in ended or answer.token_ids == expected
        first, second = llm.front.status()
        assert first.error and "replica 0 has failed" in first.error and second.error is None
        assert "the others go on" in caplog.text
        assert llm.front.slots == 2
        assert [c.token_ids for c in llm.generate(PROMPTS, GREEDY)] == wanted
        assert llm.logits([1, 2]).shape == (2, 131)
        break_weights(llm, 1)
        assert "error" in {c.finish_reason for c in llm.generate(PROMPTS[:2], GREEDY)}
        with pytest.raises(EngineError, match="all 2 replicas have failed: replica 1 has failed"):
            llm.generate(PROMPTS, GREEDY)


def test_closing() -> None:
    llm = load(2)
    llm.generate(PROMPTS[:2], LONG)  # compiles
    streams = [llm.stream(prompt, LONG) for prompt in PROMPTS[:2]]
    for stream in streams:
        next(stream)
    llm.close()
    for stream in streams:
        *_, last = stream
        assert last.finish_reason == "error" and last.error == "the model was closed while this request ran"
    for call in (lambda: llm.generate([[1]]), lambda: llm.logits([1]), llm.warm_up, llm.explain):
        with pytest.raises(EngineError, match="the model is closed"):
            call()
    llm.close()
    for thread in threading.enumerate():
        if thread.name.startswith("tpjax-replica"):  # it ends when it has nothing more to do
            thread.join(60)
            assert not thread.is_alive()


# --- the server ---------------------------------------------------------------------------------------------


def test_the_server(tmp_path: Path) -> None:
    """Every second request has a stop string, which the replica's thread looks for."""
    directory = tiny_checkpoint(tmp_path)
    ask: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 30}
    prompts = [f"the quick brown fox {number}" for number in range(12)]
    with load_tiny(directory, tp=1) as alone:
        free = alone.generate(prompts, max_tokens=30, temperature=0, ignore_eos=True)
        stops = [c.text[9:12] if number % 2 else "no such text" for number, c in enumerate(free)]
        wanted = [c.text.split(stop)[0] for c, stop in zip(free, stops, strict=True)]
    with (
        running(lambda: load_tiny(directory, tp=1, dp=2)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        server.client() as http,
    ):
        answers: dict[int, str] = {}

        def ask_for(number: int) -> None:
            extra = {"ignore_eos": True}
            parts = client.completions.create(
                prompt=prompts[number], stop=stops[number], stream=True, extra_body=extra, **ask
            )
            answers[number] = "".join(part.choices[0].text for part in parts if part.choices)

        threads = [threading.Thread(target=ask_for, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answers[number] for number in range(len(prompts))] == wanted
        assert len(client.models.list().data) == 1
        metrics = http.get("/metrics").text
        for engine in "01":
            line = f'tpjax:prefix_cache_queries_total{{engine="{engine}",model_name="tiny"}} '
            assert float(metrics.split(line)[1].split()[0]) > 0
        assert http.get("/health").json() == {
            "status": "ready",
            "replicas": [{"state": "ready", "running": 0, "waiting": 0, "slots": 4}] * 2,
        }
        live = http.get("/stats").json()
        assert live["slots"] == 8 and live["pages"] == sum(
            status.stats.pages for status in server.service.replicas
        )

        # a client that goes away, and a replica that fails
        with http.stream(
            "POST",
            "/v1/completions",
            json=ask | {"prompt": "x", "max_tokens": 900, "stream": True, "ignore_eos": True},
        ) as response:
            next(response.iter_lines())
        server.until(lambda: not server.service.pending and not server.llm.front.busy)
        break_weights(server.llm, 0)
        statuses = [http.post("/v1/completions", json=ask | {"prompt": p}).status_code for p in prompts]
        # one of them, unless what the client that went away had dispatched was first to fail
        assert sorted(statuses) in ([200] * 11 + [500], [200] * 12)
        health = http.get("/health")
        assert health.status_code == 200
        assert [one["state"] for one in health.json()["replicas"]] == ["failed", "ready"]
        assert 'tpjax:engine_up{engine="0",model_name="tiny"} 0.0' in http.get("/metrics").text
        assert http.get("/ready").status_code == 200
        break_weights(server.llm, 1)
        assert http.post("/v1/completions", json=ask | {"prompt": "x"}).status_code == 500
        server.until(lambda: server.service.state == "failed")
        assert "all 2 replicas have failed" in str(server.service.error)


# --- the command line ---------------------------------------------------------------------------------------


def tpjax_command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tpjax", *words], capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_generate_with_dp(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt_token_ids": prompt, "max_tokens": 6, "ignore_eos": True} for prompt in PROMPTS]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    done = tpjax_command(
        "generate", "--prompts", str(prompts), "--model", str(GOLDENS / "llama"), "--dp", "2", "--tp", "2",
        "--max-model-len", "400", "--json", "--temperature", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [len(json.loads(line)["token_ids"]) for line in done.stdout.splitlines()] == [6] * len(PROMPTS)
    assert "dp=2 × tp=2" in done.stderr


def test_explain_counts_the_replicas() -> None:
    from tpjax.inspect.explain import explain_model
    from tpjax.inspect.topology import parse_topology

    alone, both = (explain_model(str(GOLDENS / "llama"), tp=2, max_model_len=400, dp=dp) for dp in (1, 2))
    assert (both.tp, both.dp) == (2, 2) and both.weight_bytes_per_device == alone.weight_bytes_per_device
    shown = io.StringIO()
    Console(file=shown, width=300).print(both)
    assert "llama (llama) at dp=2 × tp=2 on cpu" in shown.getvalue()
    assert "2 replicas, each as below on 2 devices of its own; nothing moves between them" in shown.getvalue()
    chips = parse_topology("v5e:2x4")
    assert chips.devices_of_meshes(None, 2) == (4,) and chips.devices_of_meshes(None) == (8,)
    with pytest.raises(ConfigError, match="dp=3 replicas of tp=4 are 12 devices, more than the 8 of v5e:2x4"):
        chips.devices_of_meshes(4, 3)
    with pytest.raises(ConfigError, match="the 8 devices of v5e:2x4 are not a multiple of dp=3"):
        chips.devices_of_meshes(None, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    (
        (("--dp", "0"), "'0' is not a whole number of replicas, 1 or more"),
        (("--dp", "40", "--tp", "2"), "dp=40 replicas of tp=2 are 80 devices, over 64"),
    ),
)
def test_mistakes_on_the_command_line(words: tuple[str, ...], message: str) -> None:
    done = tpjax_command("generate", "x", "--model", str(GOLDENS / "llama"), *words)
    assert done.returncode == 2 and message in " ".join(done.stderr.replace("│", " ").split())
