"""The engines of published measurements: how they run prompts, and the simulation of such a measurement."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpjax.hardware import parse_hardware
from tpjax.planning.arrivals import Arrival, poisson
from tpjax.planning.plan import Plan, make_plan
from tpjax.planning.published import published_config
from tpjax.planning.serving import ServerModel, Simulation, simulate
from tpjax.planning.workload import Workload
from tpjax.runtime.counts import Counts
from tpjax.runtime.limits import PAGE_SIZE, ChunkShape, Limits

DATA = Path(__file__).parent / "data"
WAVES = 3  # requests of a closed loop over its concurrency, as sglang-jax's and vLLM's benchmarks send them
# Mean tokens of prompts and answers in ShareGPT with Llama's tokenizer, as vLLM's benchmark samples it:
# 217,393 and 201,847 in 1,000 requests. Lengths vary widely.
SHAREGPT = (217, 202)


@dataclass(frozen=True)
class MeasuredEngine:
    """What is known of an engine.

    Attributes:
        chunk_tokens: prompt tokens of a step, at most.
        token_us: what a layer takes for each token in addition to products and memory traffic.
    """

    chunk_tokens: int = 2048
    token_us: float = 0.0


# ``--chunked-prefill-size 2048`` in its published recipes. Its cost of a token is fitted to its Qwen3 tables
# (extra_points.json), together with v6e's figures: prompts take three to four times as long as their
# products, and decode steps grow with the batch by as much a token. No served point was used.
ENGINES = {"sglang-jax": MeasuredEngine(token_us=0.81)}


_CHUNKS = tuple(ChunkShape(chunks, PAGE_SIZE) for chunks in (1, 2, 4, 8, 16))


def points(name: str) -> list[dict[str, Any]]:
    """Returns the measurements in a file of `scripts/data`."""
    return json.loads((DATA / f"{name}.json").read_text())["points"]


def plan(point: Mapping[str, Any]) -> Plan:
    """Returns the plan of a point, with what its engine adds to each token."""
    engine = ENGINES.get(point.get("engine", ""), MeasuredEngine())
    chip, chips = parse_hardware(f"{point['hardware']}:{point['chips']}")
    efficiency = replace(chip.efficiency, token_us=engine.token_us, row_us=engine.token_us)
    batch, context = point.get("batch", point.get("concurrency", 1)), point.get("context", 1024)
    counts = Counts(point["model"], published_config(point["model"]))
    workload = Workload(batch, context, dtype=point["dtype"])
    return make_plan(counts, replace(chip, efficiency=efficiency), chips, point["tp"], workload)


def requests(point: Mapping[str, Any], concurrency: int, waves: int) -> list[Arrival]:
    """Returns the requests of a point: of fixed lengths if these are round, else they vary around the mean.

    Benchmarks are given round lengths; what is not round is the mean of what they sampled.
    """
    prompt, answer = SHAREGPT if point.get("lengths") == "ShareGPT" else (point["input"], point["output"])
    fixed = all(length & (length - 1) == 0 for length in (prompt, answer)) and "random" not in point["source"]
    spread = 0.0 if fixed else 1.0
    return poisson(concurrency * waves, float("inf"), prompt, answer, spread, random.Random(0))


def simulate_point(point: Mapping[str, Any], overhead_s: float = 0.0, waves: int = WAVES) -> Simulation:
    """Simulates a measurement: a closed loop, or requests at a rate.

    Args:
        point: the measurement.
        overhead_s: seconds of each dispatch that the devices wait for the host.
        waves: requests over the concurrency.
    """
    concurrency = point.get("concurrency", point.get("batch"))
    arrivals = requests(point, concurrency, waves)
    longest = max(one.input_len + one.output_len for one in arrivals)
    engine, model = ENGINES.get(point["engine"], MeasuredEngine()), plan(point).model
    shapes = tuple(shape for shape in _CHUNKS if shape.tokens <= engine.chunk_tokens)
    limits = Limits(
        max_slots=concurrency,
        max_model_len=longest,
        num_pages=concurrency * -(-longest // PAGE_SIZE) + 1,
        chunk_shapes=shapes,
        mixed_shapes=shapes,
        steps=1,
    )
    step_s = lambda tokens: model.step(tokens).total  # noqa: E731
    # these engines fill a step with as many prompt tokens as they may
    server = ServerModel(limits, step_s, lambda rows, context, tokens, before: 1.0, overhead_s)
    return simulate(server, arrivals, max_concurrency=concurrency)
