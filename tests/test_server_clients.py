"""Clients that were not written for this server: schemathesis, lm-eval, and our own benchmark."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from serving import Running, load_tiny, running, tiny_checkpoint

from tpjax.cli import serving_benchmark as bench
from tpjax.cli.app import main
from tpjax.errors import ConfigError, RequestError
from tpjax.planning import serving_figures as figures


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Running]:
    with running(lambda: load_tiny(directory)) as one:
        yield one


# --- schemathesis


# the server's threads use `random`, too, while a strategy draws: hypothesis would blame the strategy
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
def test_no_500_whatever_the_document_allows(server: Running, request: pytest.FixtureRequest) -> None:
    """Every operation of the served document, with what it allows and what it does not."""
    count = 15 if request.config.getoption("--all") else 4
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tried: dict[str, set[int]] = {}
    for found in document.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:

            @settings(
                max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None
            )
            @given(operation.as_strategy(generation_mode=mode))
            def attempt(case: Any) -> None:
                answer = case.call(timeout=60)
                tried.setdefault(case.operation.label, set()).add(answer.status_code)
                assert answer.status_code < 500, case.as_curl_command()

            with contextlib.suppress(Unsatisfiable):  # what takes nothing cannot be asked wrongly
                attempt()
    assert {"POST /v1/completions", "POST /v1/chat/completions", "POST /tokenize"} <= set(tried)
    assert 400 in tried["POST /v1/completions"]  # whether one of a few is valid is chance
    valid = httpx2.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "x"}, timeout=60)
    assert valid.status_code == 200
    server.until(lambda: server.service.pending == 0)


# --- lm-eval


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install -e '.[parity]'")
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_gets_the_model_s_own_loglikelihoods(server: Running, directory: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    client = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="tiny", tokenizer=str(directory),
        tokenizer_backend="huggingface", max_length=512, batch_size=2,
    )  # fmt: skip
    pairs = [("the quick brown", " fox"), ("words and", " words become text"), ("the", " lazy dog over")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    answers = client.loglikelihood(asked)
    tokenizer = server.llm.tokenizer
    assert tokenizer is not None
    offline = load_tiny(directory, tp=1)
    for (context, continuation), (found, greedy) in zip(pairs, answers, strict=True):
        before, ids = len(tokenizer.encode(context)), tokenizer.encode(context + continuation)
        logits = offline.logits(ids).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = [logprobs[i - 1, ids[i]] for i in range(before, len(ids))]
        assert found == pytest.approx(sum(expected), abs=1e-3)
        assert greedy == all(logits[i - 1].argmax() == ids[i] for i in range(before, len(ids)))


# --- the benchmark


@pytest.mark.slow
def test_bench_serve(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--plot", str(tmp_path / "rates.png"), "--output", str(tmp_path / "rates.json")]
    sizes = ["--num-prompts", "6", "--input-len", "20", "--output-len", "8", "--range-ratio", "0.5"]
    rates = ["--request-rate", "50", "inf", "--goodput", "ttft:60000", "e2el:60000"]
    assert main(["bench", "serve", "--base-url", server.url, *sizes, *rates, *files]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Serving Benchmark Result") == 2 and "P99 TPOT (ms):" in printed
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "rates.json").read_text())
    assert [one["request_rate"] for one in figures] == [50, "inf"]
    for one in figures:
        assert one["completed"] == 6 and one["failed"] == 0
        assert 6 * 4 <= one["total_output_tokens"] <= 6 * 12 and 6 * 10 <= one["total_input_tokens"] <= 6 * 30
        assert one["request_goodput"] == one["request_throughput"]
        assert one["median_ttft_ms"] <= one["p99_ttft_ms"] <= one["p99_e2el_ms"]
        assert one["output_throughput"] == pytest.approx(one["total_output_tokens"] / one["duration"])


def test_bench_serve_failures(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--base-url", "http://127.0.0.1:9"]) == 2
    assert "http://127.0.0.1:9 does not answer" in capsys.readouterr().err
    assert main(["bench", "serve", "--base-url", server.url, "--model", "other"]) == 2
    assert "it has tiny, and not 'other'" in capsys.readouterr().err
    load = bench.LoadProfile(server.url, num_prompts=1, input_len=2000)
    (outcome,) = asyncio.run(bench.run(load, float("inf"), {})).outcomes
    assert outcome.error and "400" in outcome.error and "2000 tokens" in outcome.error


_CHUNKS = (
    # a line of the stream after the first token -> the error that is counted
    ('{"error": "gone"}', "gone"),
    ('{"error": {"code": 7}}', "{'code': 7}"),
    ('{"error": {"message": "full"}}', "full"),
    ("[]", "a chunk is no object: []"),
    ("5", "a chunk is no object: 5"),
    ("[" * 5000, ""),
    (
        '{"choices": [], "usage": {"prompt_tokens": null, "completion_tokens": 3}}',
        "usage has no counts of tokens",
    ),
    ('{"choices": [], "usage": [1]}', "usage has no counts of tokens: [1]"),
    ("{}", "KeyError: 'choices'"),
)


def canned(models: str, last: str = "[DONE]") -> httpx2.MockTransport:
    """A server of these models whose streams end with that line."""
    fine = '{"choices": [{}], "error": null, "usage": null}'
    usage = '{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}'
    stream = "".join(f"data: {line}\n\n" for line in (fine, usage, last, "[DONE]"))
    return httpx2.MockTransport(
        lambda request: httpx2.Response(200, text=models if request.url.path == "/v1/models" else stream)
    )


def measured(transport: httpx2.MockTransport, monkeypatch: pytest.MonkeyPatch) -> figures.Result:
    client = httpx2.AsyncClient(transport=transport, base_url="http://server")
    monkeypatch.setattr(bench, "open_client", lambda profile: client)
    return asyncio.run(bench.run(bench.LoadProfile("http://server", num_prompts=2), float("inf"), {}))


@pytest.mark.parametrize(("line", "error"), _CHUNKS)
def test_bench_counts_an_odd_reply_as_a_failed_request(line, error, monkeypatch) -> None:
    result = measured(canned('{"data": [{"id": "m", "vocab_size": null}]}', line), monkeypatch)
    assert result.summary()["failed"] == 2
    assert all(error in outcome.error for outcome in result.outcomes)


def test_bench_takes_what_has_no_error_and_no_usage_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = measured(canned('{"data": [{}, 5, {"id": "m"}]}'), monkeypatch).summary()
    assert (summary["completed"], summary["total_input_tokens"], summary["total_output_tokens"]) == (2, 10, 4)


@pytest.mark.parametrize(
    ("models", "error"),
    (
        ("[]", "/v1/models is no list of models: []"),
        ('{"data": null}', "/v1/models is no list of models: "),
        ('{"data": [{}, null]}', "/v1/models has no model with an id"),
        ('{"data": []}', "/v1/models has no model with an id"),
        ('{"data": [{"id": "m", "vocab_size": 0}]}', "the vocab_size of m is 0"),
        ('{"data": [{"id": "m", "vocab_size": "5"}]}', "the vocab_size of m is '5'"),
    ),
)
def test_bench_names_an_odd_list_of_models(models, error, monkeypatch) -> None:
    with pytest.raises(RequestError, match=r"^http://server does not answer as an OpenAI server: ") as raised:
        measured(canned(models), monkeypatch)
    assert error in str(raised.value)


def test_bench_refuses_an_address_or_a_key_that_cannot_be_sent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--base-url", "http://[::1"]) == 2
    assert "'http://[::1' is no URL of a server" in capsys.readouterr().err
    assert main(["bench", "serve", "--api-key", "\u043a\u043b\u044e\u0447"]) == 2
    assert "the API key has characters beyond ASCII" in capsys.readouterr().err


def test_bench_figures() -> None:
    fine = [
        figures.Outcome(10, 5, ttft=0.1, latency=0.5, itl=[0.1, 0.1, 0.1, 0.1]),
        figures.Outcome(10, 5, ttft=0.3, latency=1.1, itl=[0.2, 0.2, 0.2, 0.2]),
    ]
    result = figures.Result(2.0, 4.0, [*fine, figures.Outcome(error="refused")], {"ttft": 200, "tpot": 150})
    summary = result.summary()
    assert (summary["completed"], summary["failed"]) == (2, 1)
    assert summary["request_throughput"] == 0.5 and summary["request_goodput"] == 0.25
    assert summary["output_throughput"] == 2.5 and summary["total_token_throughput"] == 7.5
    assert summary["mean_ttft_ms"] == pytest.approx(200) and summary["p99_ttft_ms"] == pytest.approx(298)
    assert summary["median_tpot_ms"] == pytest.approx(150) and summary["mean_itl_ms"] == pytest.approx(150)
    assert figures.percentile([1.0, 2.0, 4.0], 50) == 2.0 and figures.percentile([1.0, 2.0, 4.0], 75) == 3.0
    assert figures.percentile([], 99) is None
    with pytest.raises(ConfigError, match=r"/nowhere/x\.png: No such file"):
        figures.plot([result], Path("/nowhere/x.png"))
