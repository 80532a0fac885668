#!/usr/bin/env python
"""Two replicas of tp=1 against one model over tp=2, on this machine, and what ``plan`` says of them.

    python scripts/bench_replicas.py                  # SmolLM2-135M, float32, 8 sequences at once

Both are loaded and take turns, so that a machine whose speed drifts drifts under both. Decode is timed from
the moment that all sequences have their first token; the batch is that of both replicas together.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tpjax
from tpjax.planning.timing import median_ratio, take_turns

if TYPE_CHECKING:
    from tpjax import LLM

LAYOUTS = {"2 replicas of tp=1": (1, 2), "tp=2": (2, 1)}  # tp, dp


def turn(llm: LLM, batch: int, prompt: int, tokens: int) -> Callable[[], float]:
    """Returns a function that decodes ``tokens`` of each sequence and returns tokens/s, all together."""
    import numpy as np

    from tpjax import SamplingParams
    from tpjax.engine.generation import Generation

    random = np.random.default_rng(0)
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)

    def decode() -> float:
        prompts = random.integers(0, llm.config.vocab_size, (batch, prompt)).tolist()
        generations = [Generation(llm.request(one, params), None) for one in prompts]
        for generation in generations:
            llm.front.add(generation)
        counts: dict[Any, int] = {}
        before, start = 0, 0.0
        while llm.front.busy:
            llm.front.step()
            while llm.front.deltas:
                generation, delta = llm.front.deltas.popleft()
                counts[generation] = counts.get(generation, 0) + len(delta.token_ids)
            if not start and len(counts) == batch:
                before, start = sum(counts.values()), time.perf_counter()
        return (batch * tokens - before) / (time.perf_counter() - start)

    return decode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=8, help="sequences at once (8)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (64)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate (128)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (5)")
    arguments = parser.parse_args()
    from tpjax.planning.measure import measured_hardware
    from tpjax.planning.plan import make_plan
    from tpjax.planning.workload import Workload
    from tpjax.runtime.counts import Counts

    hardware = measured_hardware(2)  # before this process starts JAX
    tpjax.fake_devices(2)
    from tpjax import LLM

    llms = {
        name: LLM(
            arguments.model, tp=tp, dp=dp, dtype="float32", max_model_len=512, max_slots=arguments.batch // dp
        )
        for name, (tp, dp) in LAYOUTS.items()
    }
    figures = take_turns(
        {name: turn(llm, arguments.batch, arguments.prompt, arguments.tokens) for name, llm in llms.items()},
        arguments.rounds,
    )
    context = arguments.prompt + arguments.tokens // 2
    workload = Workload(arguments.batch, context, arguments.prompt, "float32")
    counts = Counts(arguments.model, llms["tp=2"].config)
    predicted = {}
    print(
        f"{arguments.model}, float32, {arguments.batch} sequences: tokens/s, median, least, most; predicted"
    )
    for name, (tp, _) in LAYOUTS.items():
        predicted[name] = make_plan(counts, hardware, 2, tp, workload).tokens_per_s
        rates = figures[name]
        print(
            f"{name:20}{statistics.median(rates):8.1f}{min(rates):8.1f}{max(rates):8.1f}{predicted[name]:10.1f}"
        )
    replicas, tensor = LAYOUTS
    print(
        f"replicas over tp=2, within a round: {median_ratio(figures[replicas], figures[tensor]):.2f} times; "
        f"plan says {predicted[replicas] / predicted[tensor]:.2f}"
    )


if __name__ == "__main__":
    main()
