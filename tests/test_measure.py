"""Measuring this machine at toy sizes, keeping the figures, and predicting from them."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from serving import WAIT_S

from tpjax.cli import console
from tpjax.errors import DeviceError
from tpjax.mesh import make_mesh, make_meshes
from tpjax.planning import measure, step_benchmark
from tpjax.planning.plan import make_plan, recommend
from tpjax.planning.published import published_config
from tpjax.planning.report import PlanReport
from tpjax.planning.workload import Workload
from tpjax.runtime.counts import Counts

TINY = {
    **measure._LAYER,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
FIGURES = {
    "device": "abacus",
    "shared": True,
    "memory_bytes": 8e9,
    "bandwidth_bytes_s": 32e9,
    "flops": 200e9,
    "all_reduce_s": [[1024, 20e-6], [1 << 20, 300e-6]],
    "layer_us": 50.0,
    "token_us": 2.0,
    "row_us": 4.0,
    "product_s": [[1, 4 / 32e9], [8, 5 / 32e9], [256, 2 * 256 / 200e9]],
    "dispatch_us": 300.0,
}


SMALL = {  # sizes at which measuring takes seconds
    "_PAIRS": 1,
    "_WIDTH": 64,
    "_INNER": 126,
    "_DEPTHS": (1, 2),
    "_PROMPT": 32,
    "_TOKENS": (1, 2, 8, 32),
    "_ROUNDS": 1,
    "_STEPS": 4,
    "_MESSAGES": (1024, 4096),
    "_LAYER": TINY,
}


@pytest.fixture
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(measure, name, value)


def test_measure_gives_positive_figures(small):
    figures = measure.measure(make_mesh(3))  # does not divide 126
    assert figures["shared"] is True and figures["device"] == "cpu"
    for name in ("memory_bytes", "bandwidth_bytes_s", "flops"):
        assert figures[name] > 0
    assert [size for size, _ in figures["all_reduce_s"]] == [1024, 4096]
    assert all(0 < seconds < WAIT_S for _, seconds in figures["all_reduce_s"])
    assert figures["layer_us"] >= 0 and figures["token_us"] >= 0 and figures["dispatch_us"] >= 0
    assert json.loads(json.dumps(figures)) is not None  # it travels between processes


def test_figures_come_back_from_the_times_they_explain():
    """Times made of known rates, by the formulas of a machine whose two faked devices share it."""
    bandwidth, flops, reduce_s, layer_s, token_s, dispatch_s = 20e9, 100e9, 50e-6, 80e-6, 3e-6, 400e-6
    row_s, element_s = 7e-6, {1: 4 / 20e9, 2: 12 / 20e9, 8: 5 / 20e9, 32: 8 / 20e9}
    element_s |= {64: 15 / 20e9, 80: 25 / 20e9, 128: 35 / 20e9}
    width, inner, prompt = measure._WIDTH, measure._INNER, measure._PROMPT
    elements = 512 * 64 * (2 * 8 + 2 * 4) + 3 * 512 * 1408  # q, k, v, o; gate, up, down
    seconds = {f"reduce {size}": measure._CHAIN * reduce_s for size in measure._MESSAGES}
    element_s[prompt] = 2 * prompt / flops
    for tokens, each_s in element_s.items():
        seconds[f"multiply {tokens}"] = measure._PAIRS * (2 * each_s * width * inner + reduce_s)
    for depth in measure._DEPTHS:
        step = dispatch_s + depth * (4 * elements / bandwidth + 2 * reduce_s + layer_s + row_s)
        seconds[f"decode {depth}"] = measure._STEPS * step
        rows = elements * element_s[measure._BATCH] + measure._BATCH * row_s
        step = dispatch_s + depth * (rows + 2 * reduce_s + layer_s)
        seconds[f"decode {depth} of {measure._BATCH}"] = measure._STEPS * step
        computed = 2 * prompt * elements / flops + 2 * reduce_s + prompt * token_s
        seconds[f"prefill {depth}"] = 0.1 + depth * computed
    figures = measure.fit(seconds, 2, machine=1)
    assert figures["bandwidth_bytes_s"] == pytest.approx(bandwidth)
    assert figures["flops"] == pytest.approx(flops)
    assert figures["layer_us"] == pytest.approx(80.0) and figures["token_us"] == pytest.approx(3.0)
    assert figures["dispatch_us"] == pytest.approx(400.0) and figures["row_us"] == pytest.approx(7.0)
    assert dict(figures["product_s"]) == pytest.approx(element_s)
    assert measure.fit(seconds, 2, machine=2)["flops"] == pytest.approx(flops / 2)  # of each of two chips


def test_predictions_follow_the_figures():
    hardware = measure.hardware_from(FIGURES)
    counts = Counts("smollm2-135m", published_config("smollm2-135m"))
    plan = make_plan(counts, hardware, 2, 2, Workload(1, 128, 256, "float32"))
    attention = 576 * 64 * 2 * (2 * 3 + 2)  # two slots of three queries a device: one is padding
    padded = 2 * 30 * (attention + 3 * 576 * 768) + 576 * 49152
    assert plan.decode.weights == pytest.approx(4 * padded / 32e9)  # both devices read from one memory
    message = 20e-6 + (300e-6 - 20e-6) * (4 * 576 - 1024) / (2**20 - 1024)
    assert plan.decode.collectives == pytest.approx(61 * message + 20e-6)
    assert plan.decode.fixed == pytest.approx(30 * 54e-6 + 300e-6)
    assert plan.prefill.fixed == pytest.approx(30 * (50e-6 + 256 * 2e-6) + 300e-6)


def test_products_take_as_long_as_they_were_measured():
    hardware = measure.hardware_from(FIGURES)
    counts = Counts("smollm2-135m", published_config("smollm2-135m"))
    model = make_plan(counts, hardware, 1, 1, Workload(1, 128, 256, "float32")).model
    elements = model.held.layer_matrices + model.held.embedding
    one, eight = model.decode(1, 100), model.decode(8, 100)
    assert one.weights == eight.weights == pytest.approx(elements * 4 / 32e9)
    assert one.compute == pytest.approx(0) and eight.compute == pytest.approx(elements / 32e9)
    assert eight.fixed - one.fixed == pytest.approx(30 * 7 * 4e-6)


def test_calls_take_turns_for_as_many_rounds_as_asked():
    calls = []
    measure.best_s({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3  # the first compiles


def test_figures_are_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TPJAX_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "cache" / "measured.json"
    for tp in (2, 3):
        measure.keep(file, tp, FIGURES | {"device": f"abacus {tp}"})
    assert [measure.measured_hardware(tp).name for tp in (2, 3)] == ["abacus 2", "abacus 3"]
    file.write_text("{")
    measure.keep(file, 2, FIGURES)
    assert measure.measured_hardware(2) == measure.hardware_from(FIGURES)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("others", "kept"), ((0.04, True), (0.4, False)))
def test_figures_of_a_busy_machine_are_not_kept(others, kept, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TPJAX_CACHE", str(tmp_path))
    measured = measure._measure_and_cache(1, None, lambda rounds: FIGURES | {"others": others})
    assert measured == FIGURES
    assert (tmp_path / "measured.json").exists() == kept
    told = "tpjax: other programs took 40% of the processors meanwhile: these figures are not kept\n"
    assert (told in capsys.readouterr().err) == (not kept)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells how busy all processors are")
def test_other_programs_are_noticed():
    others = measure.OtherPrograms()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        time.sleep(1)
        busy.kill()
    assert others.share() > 0.3 / os.cpu_count()


def test_a_failed_measurement_says_why(monkeypatch):
    monkeypatch.setattr(measure.sys, "executable", "/bin/false")
    with pytest.raises(DeviceError, match="measuring at tp=2 failed: status 1"):
        measure._measure_apart(2, None)


@pytest.mark.parametrize("others", (0.04, 0.4))
def test_bench_sets_measured_next_to_predicted(others, small, monkeypatch, capsys):
    monkeypatch.setattr(measure.OtherPrograms, "share", lambda self: others)
    runner = measure._zeros_runner(make_mesh(2), 1)
    hardware, counts = measure.hardware_from(FIGURES), Counts("toy", runner.config)
    plan = make_plan(counts, hardware, 2, 2, Workload(1, 64, 32, "float32"))
    report = step_benchmark.run(runner, plan, rounds=1)
    data = report.to_dict()
    assert (data["model"], data["tp"], data["context"], data["prompt_len"]) == ("toy", 2, 64, 32)
    assert data["decode"]["measured_ms"] > 0 and data["prefill"]["measured_ms"] > 0
    assert data["decode"]["predicted_ms"] == pytest.approx(plan.decode.total * 1e3)
    assert data["prefill"]["predicted_ms"] == pytest.approx(plan.prefill.total * 1e3)
    assert step_benchmark.longest(plan.workload) == 64 + 64
    console.show(report)
    table, told = capsys.readouterr()
    assert "toy at tp=2 on abacus, float32" in table and "predicted / measured" in table
    busy = "tpjax: other programs took 40% of the processors meanwhile: measured times may be too long\n"
    assert told == (busy if others > 0.1 else "")


def test_bench_of_replicas_times_them_at_once(small, capsys):
    first, *others = (measure._zeros_runner(mesh, 1) for mesh in make_meshes(1, 2))
    hardware, counts = measure.hardware_from(FIGURES), Counts("toy", first.config)
    plan = make_plan(counts, hardware, 2, 1, Workload(2, 64, 32, "float32"))
    report = step_benchmark.run(first, plan, rounds=1, beside=others)
    assert (report.to_dict()["tp"], report.to_dict()["dp"]) == (1, 2)
    console.show(report)
    table = capsys.readouterr().out
    speed = f"{2 * 1e3 / report.decode_ms:.1f}"  # of both
    assert "toy at dp=2 × tp=1 on abacus, float32" in table and speed in table


def test_on_faked_devices_one_is_recommended():
    hardware, counts = measure.hardware_from(FIGURES), Counts("toy", published_config("smollm2-135m"))
    plans = [make_plan(counts, hardware, tp, tp, Workload(dtype="float32")) for tp in range(1, 5)]
    best, reason = recommend(plans)
    assert best.tp == 1  # faked devices share the machine: tp gains nothing
    shown = io.StringIO()
    Console(width=100, file=shown).print(PlanReport(plans, best, reason))
    assert "faked devices share this machine's bandwidth" in shown.getvalue()
