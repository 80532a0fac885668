#!/usr/bin/env python
"""Host time of a dispatch: choosing rows, packing and uploading them, calling a program that does nothing.

    python scripts/bench_host.py             # 64 and 256 rows, contexts of up to 131,072 tokens

The engine dispatches decode steps of a model whose compiled program has been replaced by one that takes the
same arguments, donates the same state, and computes nothing. What is left is the host's work. Every row holds
the pages of a full context. Medians over many dispatches, each waited for.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

import tpjax

CONTEXT = 131_072
GOALS = {64: 0.5, 256: 1.5}  # milliseconds


def milliseconds(rows: int, rounds: int) -> list[float]:
    """Times dispatches of ``rows`` decode rows."""
    from tpjax.checkpoints.load import abstract_decoder
    from tpjax.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig
    from tpjax.engine.engine import Engine
    from tpjax.engine.request import Request
    from tpjax.engine.scheduler import Step
    from tpjax.mesh import make_mesh
    from tpjax.runtime.limits import Limits
    from tpjax.runtime.programs import ProgramSpec
    from tpjax.runtime.runner import Runner
    from tpjax.sampling_params import SamplingParams

    config = ModelConfig(
        model_type="llama",
        vocab_size=64,
        hidden_size=8,
        num_layers=1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        attention=AttentionConfig(
            num_heads=1, num_kv_heads=1, head_dim=8, query_scale=1.0, layer_types=("full_attention",)
        ),
        mlp=MLPConfig(intermediate_size=8),
        norm=NormConfig(eps=1e-5),
    )
    mesh, kind = make_mesh(1), jnp.dtype("float32")
    limits = Limits(max_slots=rows, max_model_len=CONTEXT, num_pages=CONTEXT // 128 + 1, steps=1)
    runner = Runner(abstract_decoder(config, mesh, kind), mesh, limits, kind)
    spec = ProgramSpec("decode", rows)
    _, *results = runner.programs.lower(spec).out_info

    def nothing(weights: object, state: object, *arguments: object) -> tuple[object, ...]:
        return state, *jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), results)

    state, arguments = runner.abstract_state(), runner.programs.program(spec).arguments
    compiled = jax.jit(nothing, donate_argnums=1, keep_unused=True).lower((), state, *arguments)
    runner.weights = ()
    runner.programs.compiled[spec] = compiled.compile()
    engine = Engine(runner)
    params = SamplingParams(max_tokens=CONTEXT // 2, temperature=0.7, top_p=0.9, top_k=40, seed=1)
    requests = [
        Request(range(CONTEXT // 2), params, seed=slot, stop_ids=(2, 3), slot=slot) for slot in range(rows)
    ]
    for request in requests:
        request.pages = [list(range(1, CONTEXT // 128 + 1))]
        request.prefilled, request.dispatched_tokens = len(request.prompt_token_ids), 1
    times = []
    for _ in range(rounds + 10):
        start = time.perf_counter()
        in_flight = engine._dispatch(Step(requests))
        jax.block_until_ready(in_flight.sampled)
        times.append(1e3 * (time.perf_counter() - start))
    return times[10:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256], metavar="N", help="(64 256)")
    parser.add_argument("--rounds", type=int, default=300, help="dispatches (300)")
    arguments = parser.parse_args()
    tpjax.fake_devices(1)
    print(f"decode rows with {CONTEXT // 128} pages each, ms a dispatch: median, least, most")
    for rows in arguments.rows:
        times = milliseconds(rows, arguments.rounds)
        figure = statistics.median(times)
        goal = f"  target <= {GOALS[rows]}" if rows in GOALS else ""
        print(f"{rows:4} rows{figure:9.3f}{min(times):9.3f}{max(times):9.3f}{goal}")


if __name__ == "__main__":
    main()
