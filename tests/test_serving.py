"""Serving on a virtual clock: against queueing by hand, against conservation, and from the command line."""

import importlib
import itertools
import json
import math
import random
import re
import statistics
import time
from pathlib import Path

import numpy as np
import pytest

from tpjax.cli import app as cli
from tpjax.errors import ConfigError, RequestError
from tpjax.hardware import HARDWARE
from tpjax.planning.arrivals import Arrival, at_rate, poisson, read_trace
from tpjax.planning.cost_model import CostModel
from tpjax.planning.published import published_config
from tpjax.planning.serving import ServerModel, plan_server, simulate
from tpjax.planning.workload import Workload
from tpjax.runtime.counts import Counts
from tpjax.runtime.limits import Limits
from tpjax.step_time import StepTokens

ROOT = Path(cli.__file__).parents[2]


def server(
    seconds=lambda tokens: 1.0, *, slots: int = 4, length: int = 1024, pages: int = 64, steps: int = 1
) -> ServerModel:
    limits = Limits(max_slots=slots, max_model_len=length, num_pages=pages + 1, steps=steps)
    return ServerModel(limits, seconds, lambda rows, context, tokens, before: 1.0)


def costs(model: str = "llama-3-8b", chip: str = "v6e", tp: int = 4) -> CostModel:
    return CostModel(Counts(model, published_config(model)), HARDWARE[chip].device, tp, Workload())


# --- by hand -----------------------------------------------------------------------------------------------


def test_one_request_takes_a_prefill_and_a_step_for_each_further_token():
    (outcome,) = simulate(server(), [Arrival(5.0, 30, 4)]).result.outcomes
    assert outcome.ttft == 1.0 and outcome.latency == 4.0 and outcome.itl == [1.0, 1.0, 1.0]
    assert (outcome.prompt_tokens, outcome.output_tokens) == (30, 4)


def test_a_long_prompt_runs_in_chunks_beside_decode_rows():
    seen: list[StepTokens] = []

    def seconds(tokens: StepTokens) -> float:
        seen.append(tokens)
        return 1.0

    arrivals = [Arrival(0.0, 30, 40), Arrival(2.5, 700, 1)]
    first, second = simulate(server(seconds), arrivals).result.outcomes
    mixed = [tokens for tokens in seen if tokens.chunks and tokens.rows]
    assert [tokens.prompt_tokens for tokens in mixed] == [64] * 10 + [700 - 640]  # the last is padded
    assert all(tokens.total == tokens.rows + tokens.padding_rows + 64 for tokens in mixed)
    assert second.ttft == pytest.approx(4 + 11 - 2.5) and second.output_tokens == 1
    assert first.latency == 40.0  # every step decodes it, whatever runs beside


def test_a_request_that_comes_meanwhile_waits_for_the_dispatches_in_flight():
    # at 2.5 s the step until 3 s runs and the next has been dispatched: its prompt runs from 4 s on
    first, second = simulate(server(), [Arrival(0.0, 30, 9), Arrival(2.5, 30, 2)]).result.outcomes
    assert second.ttft == pytest.approx(5 - 2.5)
    assert first.output_tokens == 9 and second.output_tokens == 2


def test_rows_of_padding_attend_to_nothing_and_choose_no_expert():
    """Five sequences in a program of sixteen rows: the window is of each, and experts are chosen by five."""
    seen: list[StepTokens] = []

    def seconds(tokens: StepTokens) -> float:
        seen.append(tokens)
        return 1.0

    simulate(server(seconds, slots=64), [Arrival(0.0, 32, 9)] * 5)
    tokens = next(one for one in seen if one.rows == 5)
    assert (tokens.context, tokens.total, tokens.sampled) == (33, 16, 16)
    for name in ("gemma-3-4b", "qwen3-30b-a3b"):
        model = costs(name)
        five, sixteen = StepTokens(5, 4096), StepTokens(5, 4096, padding_rows=11)
        assert model.step(sixteen).cache == model.step(five).cache
        assert model.step(sixteen).weights == pytest.approx(model.step(five).weights)
        assert model.step(sixteen).collectives == model.decode(16, 4096).collectives


def test_several_steps_of_a_dispatch_come_at_once():
    (outcome,) = simulate(server(steps=4), [Arrival(0.0, 30, 9)]).result.outcomes
    assert outcome.itl == [4.0, 4.0] and outcome.latency == 9.0


def test_the_host_makes_every_dispatch_longer():
    plain = server()
    slow = ServerModel(plain.limits, plain.step_s, plain.predict, overhead_s=0.5)
    (outcome,) = simulate(slow, [Arrival(0.0, 30, 4)]).result.outcomes
    assert outcome.latency == pytest.approx(4 * 1.5)


def test_a_closed_loop_keeps_so_many_in_flight():
    run = simulate(server(), [Arrival(0.0, 30, 3)] * 6, max_concurrency=2)
    open_loop = simulate(server(), [Arrival(0.0, 30, 3)] * 6)
    assert max(one.ttft for one in run.result.outcomes) < max(one.ttft for one in open_loop.result.outcomes)
    assert run.result.duration >= open_loop.result.duration


def test_replicas_share_the_requests():
    one = simulate(server(slots=1), [Arrival(0.0, 30, 3)] * 4)
    two = simulate(server(slots=1), [Arrival(0.0, 30, 3)] * 4, replicas=2)
    assert two.result.duration == pytest.approx(one.result.duration / 2, rel=0.2)
    assert two.summary()["total_output_tokens"] == 12


def test_a_request_goes_to_the_replica_with_least_to_do():
    """The third would wait for the first, were they dealt in turn."""
    arrivals = [Arrival(0.0, 30, 50), Arrival(0.5, 30, 2), Arrival(10.0, 30, 2), Arrival(20.0, 30, 2)]
    run = simulate(server(slots=1), arrivals, replicas=2)
    by_length = sorted(run.result.outcomes, key=lambda one: one.output_tokens)
    assert [one.ttft for one in by_length] == [1.0, 1.0, 1.0, 1.0] and by_length[-1].latency == 50.0


def test_a_full_cache_preempts_and_still_answers_all():
    arrivals = [Arrival(0.0, 120, 200)] * 4
    run = simulate(server(pages=6, length=384), arrivals)
    assert run.preemptions > 0 and run.peak_cache_usage == 1.0
    assert run.summary()["total_output_tokens"] == 4 * 200
    roomy = simulate(server(pages=64), arrivals)
    assert roomy.preemptions == 0 and 0 < roomy.mean_cache_usage < roomy.peak_cache_usage < 1
    assert roomy.result.duration < run.result.duration


def test_a_request_that_never_fits_is_an_error():
    with pytest.raises(RequestError, match="max_model_len=1024"):
        simulate(server(), [Arrival(0.0, 1000, 100)])


# --- from formulas -----------------------------------------------------------------------------------------


def test_a_saturated_server_decodes_as_fast_as_its_steps():
    """With all slots full all the time, output tokens a second are slots over the step's seconds."""
    model = costs()
    limits = Limits(max_slots=32, max_model_len=2048, num_pages=32 * 16 + 1, steps=1)
    one = ServerModel(limits, lambda tokens: model.step(tokens).total, model.seconds)
    run = simulate(one, poisson(32, math.inf, 16, 1500, 0.0, random.Random(0)))
    step = model.decode(32, 16 + 750).total
    assert run.summary()["output_throughput"] == pytest.approx(32 / step, rel=0.05)  # prompts come first
    assert run.summary()["median_tpot_ms"] == pytest.approx(1e3 * step, rel=0.03)


@pytest.mark.parametrize("chip", ["v6e", "h100-sxm", "tpu7x"])
def test_more_requests_a_second_wait_longer(chip):
    one = plan_server(costs(chip=chip), max_slots=16)
    figures = []
    for rate in (0.5, 2.0, 50.0, math.inf):
        arrivals = poisson(48, rate, 256, 64, 0.5, random.Random(1))
        figures.append(simulate(one, arrivals, rate=rate, goals={"ttft": 1000, "tpot": 50}).summary())
    for name in ("median_ttft_ms", "p99_ttft_ms", "output_throughput"):
        values = [one[name] for one in figures]
        assert all(after > 0.95 * before for before, after in itertools.pairwise(values)), name
        assert values[-1] > 2 * values[0], name
    assert figures[0]["request_goodput"] == pytest.approx(figures[0]["request_throughput"])
    for one in figures:
        assert one["completed"] == 48 and one["median_itl_ms"] <= one["p90_itl_ms"] <= one["p99_itl_ms"]


def test_the_planned_server_fills_the_memory():
    model = costs()
    one = plan_server(model, max_model_len=8192)
    pages = one.limits.num_pages
    page = model.sequence_bytes(128)
    need = model.memory(256, 1)
    assert need.weights + need.workspace + pages * page <= model.hardware.usable_bytes
    assert need.weights + need.workspace + (pages + 1) * page > model.hardware.usable_bytes
    assert one.limits.max_slots == 256 and one.limits.max_model_len == 8192
    # unless told, each slot has pages for 1,024 tokens, as in the engine
    tight = costs("llama-3-8b", "v5e", 2)
    limits = plan_server(tight).limits
    assert limits.max_slots == 64 and 64 * 8 < limits.num_pages <= 128 * 8
    assert plan_server(tight, max_slots=256).limits.max_slots == 256
    with pytest.raises(ConfigError, match=r"llama-3-70b at tp=1 leaves room for 0 cache pages"):
        plan_server(costs("llama-3-70b", tp=1))


# --- arrivals ----------------------------------------------------------------------------------------------


def test_poisson_arrivals_come_at_their_rate():
    arrivals = poisson(4000, 8.0, 100, 20, 0.5, random.Random(3))
    assert arrivals[0].at == 0 and arrivals == sorted(arrivals, key=lambda one: one.at)
    assert arrivals[-1].at == pytest.approx(4000 / 8.0, rel=0.05)
    gaps = [b.at - a.at for a, b in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.15)
    assert {one.input_len for one in arrivals} == set(range(50, 151))
    assert all(10 <= one.output_len <= 30 for one in arrivals)
    assert {one.at for one in poisson(5, math.inf, 1, 1, 0.0, random.Random(0))} == {0.0}
    again = at_rate(arrivals[:3], math.inf, random.Random(0))
    assert [(one.input_len, one.at) for one in again] == [(one.input_len, 0.0) for one in arrivals[:3]]


def test_traces_of_both_kinds(tmp_path):
    mooncake = tmp_path / "mooncake.jsonl"
    mooncake.write_text(
        '{"timestamp": 3000, "input_length": 6955, "output_length": 52, "hash_ids": [1]}\n\n'
        '{"timestamp": 0, "input_length": 10, "output_length": 5}\n'
    )
    assert read_trace(mooncake) == [Arrival(0.0, 10, 5), Arrival(3.0, 6955, 52)]
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:05.4799600,110,27\n"
    )
    first, second = read_trace(azure)
    assert (first.at, first.input_len, second.output_len) == (0.0, 4808, 27)
    assert second.at == pytest.approx(1.5)


def test_times_of_a_trace_keep_their_offset(tmp_path, monkeypatch):
    """With a fraction or without, on a machine of whatever zone; without an offset they are UTC's."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        trace = tmp_path / "trace.csv"
        times = ("00:00:00.0099301+00:00", "01:00:01+01:00", "00:00:02", "00:00:03.5+00:00")
        rows = "".join(f"2024-03-10 {one},10,10\n" for one in times)
        trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
        found = [one.at for one in read_trace(trace)]
    finally:
        monkeypatch.undo()
        time.tzset()
    np.testing.assert_allclose(found, [0, 0.99007, 1.99007, 3.49007], atol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no requests"),
        ('{"timestamp": 0, "input_length": 3}', r"line 1 has none of output_length, GeneratedTokens"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 3}', r"line 1: 0 is not a number of tokens"),
        ('{"timestamp": "soon", "input_length": 1, "output_length": 3}', r"'soon' is neither a number nor a"),
        ('{"timestamp": 1e999, "input_length": 1, "output_length": 3}', r"inf is not a time"),
        ('{"timestamp": 0,', r"line 1 is not JSON"),
        ("a,b\n1,2\n", r"line 2 has none of timestamp, TIMESTAMP, at"),
        ('{"timestamp": 0, "input_length": true, "output_length": 3}', r"line 1: True is not a number of"),
        ('{"timestamp": 0, "input_length": 3.9, "output_length": 3}', r"line 1: 3.9 is not a number of"),
        (
            'at,input_len,output_len\n1,"2,3\n' + "1,2,3\n" * 30_000,
            r"line \d+: field larger than ",
        ),
    ],
)
def test_a_wrong_trace_is_one_line(tmp_path, text, message):
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_trace(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "none")


# --- published servers -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_published_servers_are_met(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("validate_serving")
    points = json.loads((ROOT / "scripts" / "data" / "served_points.json").read_text())["points"]
    errors = [abs(simulated / published - 1) for *_, simulated, published in script.compare(points)]
    assert len(errors) == 8 and statistics.median(errors) <= 0.20


# --- the command -------------------------------------------------------------------------------------------


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        status = cli.main(["plan", *arguments])
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    return status, out, err


def test_serve_as_json(capsys, tmp_path):
    command = "llama-3-8b --hardware tpu7x:2 --serve --rate 2 inf --lengths 200:20 --num-prompts 12 --tp 2"
    plot = tmp_path / "rates.svg"
    status, out, err = run(capsys, *command.split(), "--json", "--plot", str(plot))
    data = json.loads(out)
    assert (status, err) == (0, "") and plot.read_text().lstrip().startswith("<?xml")
    assert (data["chips"], data["devices"], data["tp"], data["replicas"]) == (2, 4, 2, 2)
    assert [one["request_rate"] for one in data["runs"]] == [2.0, "inf"]
    for one in data["runs"]:
        assert one["completed"] == 12 and one["total_input_tokens"] == 2400
        assert one["total_output_tokens"] == 240 and one["preemptions"] == 0
    assert data["goodput_objective_ms"] == {"ttft": 1000.0, "tpot": 100.0}
    assert any("virtual clock" in text for text in data["assumptions"])


def test_serve_a_trace_as_tables(capsys, tmp_path):
    trace = tmp_path / "requests.jsonl"
    lines = [{"timestamp": 1000 * n, "input_length": 100, "output_length": 8} for n in range(5)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    command = f"qwen3-8b --hardware v6e:4 --serve --trace {trace} --goodput ttft:250"
    status, out, _ = run(capsys, *command.split())
    assert status == 0 and "TTFT median" in out and "within ttft of 250 ms" in out
    assert f"5 of {trace}" in " ".join(out.split()).replace("- ", "") or "requests.jsonl" in out
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["1"])
    assert row[1] == row[2]  # all requests are good ones


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"timestamp": 1, "input_length": 1e999, "output_length": 2}',
            "inf is not a number of tokens, 1 to",
        ),
        (
            '{"timestamp": 1, "input_length": 2, "output_length": 10000000000}',
            "10000000000 is not a number of",
        ),
        ('{"timestamp": 1, "input_length": 0, "output_length": 2}', "0 is not a number of tokens, 1 to 10"),
        ('{"timestamp": 1%s, "input_length": 1, "output_length": 2}' % ("0" * 400), "is not a time"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 2}', "nan is not a time"),
        ('{"a": ' * 50_000, "line 1 is not JSON: "),
    ],
)
def test_a_bad_trace_is_told_by_its_line(tmp_path, line, message):
    trace = tmp_path / "requests.jsonl"
    trace.write_text(line)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        read_trace(trace)
    assert str(error.value).startswith(f"--trace {trace}: line 1") and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lengths 5", "'5' is not IN:OUT"),
        (f"--batch {10**400}", "is not a whole number of sequences, 999999999999999 at most"),
        ("--lengths 5:0", "'0' is not a whole number of tokens"),
        ("--rate 0", "'0' is not a rate above 0, or inf"),
        ("--goodput itl:3", "'itl:3' is not ttft:MS, tpot:MS or e2el:MS"),
        ("--trace nowhere.csv", "--trace nowhere.csv: No such file"),
        ("--lengths 8000:1000", "together 9000, over max_model_len=8192"),
        ("--context 4096", "--context means nothing with --serve, whose requests have lengths of their own"),
        ("--trace a.csv --num-prompts 3", "--num-prompts means nothing with --trace, which has its own"),
    ],
)
def test_wrong_values_are_one_line(capsys, arguments, message):
    status, out, err = run(capsys, "llama-3-8b", "--hardware", "v6e:4", "--serve", *arguments.split())
    assert status == 2 and message in " ".join(err.split()) and not out
