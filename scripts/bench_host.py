#!/usr/bin/env python
"""Host time of a dispatch: choosing rows, packing and uploading them, calling a program that does nothing.

    python scripts/bench_host.py             # 64 and 256 rows, contexts of up to 131,072 tokens
    python scripts/bench_host.py --pp 2 --tp 2         # and of two pipeline stages beside a single one
    python scripts/bench_host.py --dp 4      # and how many dispatches four replicas' threads do together
    python scripts/bench_host.py --dp 4 --processes    # and how many if each were a process

The engine dispatches decode steps of a model whose compiled programs have been replaced by ones that take the
same arguments, donate the same state, and compute nothing. What is left is the host's work. Every row holds
the pages of a full context. Medians over many dispatches, each waited for.

With ``--pp`` dispatches of a pipeline, whose hidden states and tokens do move between its stages, take turns
with those of a model in one piece.

With ``--dp`` replicas run behind the router, full, for a second at a time in turn with a single one, and the
results of each dispatch are there ``--step-ms`` after those of the one before, as if devices took that long:
waiting for them leaves the interpreter to the other threads, as waiting for a device does. With
``--processes`` each replica is a process of its own, with a router of its own. Nothing passes between them:
no front could have more of this machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

import tpjax

CONTEXT = 131_072
SHORT_CONTEXT = 8192  # of --dp
GOALS = {64: 0.5, 256: 1.5}  # milliseconds
GOAL = 3.2  # times the dispatches of one replica, at dp=4


def null_engine(
    rows: int, context: int, num_pages: int, device: jax.Device | None = None, tp: int = 1, pp: int = 1
) -> Any:
    """Returns an engine whose programs do nothing; ``runner.step_s`` sets when their results are there."""
    from tpjax.checkpoints.parameters import abstract_decoder
    from tpjax.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig
    from tpjax.engine.engine import Engine
    from tpjax.mesh import AXIS
    from tpjax.runtime.limits import Limits
    from tpjax.runtime.programs import ProgramSpec
    from tpjax.runtime.runner import Runner
    from tpjax.runtime.stage import Stage

    class Results:
        """Tokens that are there at a given time."""

        def __init__(self, tokens: Any, ready: float) -> None:
            self._tokens, self._ready = tokens, ready

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            time.sleep(max(0.0, self._ready - time.perf_counter()))
            return np.asarray(self._tokens)

    class NullRunner(Runner):
        dispatches, step_s, ready = 0, 0.0, 0.0

        def _dispatch_all(self, spec: ProgramSpec, calls: Sequence[Sequence[Any]]) -> list[Any]:
            for stage in self.stages:
                if (own := stage.own(spec)) not in stage.programs.compiled and (
                    stage is self or spec.takes_weights
                ):
                    stage.programs.compiled[own] = null_program(stage, own)
            results = super()._dispatch_all(spec, calls)
            self.dispatches += 1
            if not self.step_s:
                return results
            self.ready = max(self.ready, time.perf_counter()) + self.step_s
            return [dataclasses.replace(one, tokens=Results(one.tokens, self.ready)) for one in results]

    def null_program(stage: Stage, spec: ProgramSpec) -> Any:
        stage.weights = ()
        _, *results = stage.programs.lower(spec).out_info
        program = stage.programs.program(spec)

        def nothing(weights: object, state: object, *arguments: object) -> tuple[object, ...]:
            return state, *jax.tree.map(lambda one: jnp.ones(one.shape, one.dtype), results)

        state, arguments = stage.abstract_state(), (*program.arguments, *program.inputs)
        null = jax.jit(
            nothing,
            donate_argnums=1,
            keep_unused=True,
            out_shardings=(
                jax.tree.map(lambda one: one.sharding, state),
                *(NamedSharding(stage.mesh, spec) for spec in program.results),
            ),
        )
        with jax.set_mesh(stage.mesh):
            return null.lower((), state, *arguments).compile()

    config = ModelConfig(
        model_type="llama",
        vocab_size=64,
        hidden_size=8,
        num_layers=pp,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        attention=AttentionConfig(
            num_heads=1, num_kv_heads=1, head_dim=8, query_scale=1.0, layer_types=("full_attention",) * pp
        ),
        mlp=MLPConfig(intermediate_size=8),
        norm=NormConfig(eps=1e-5),
    )
    devices = jax.devices() if device is None else [device]
    meshes = [
        jax.make_mesh((tp,), (AXIS,), devices=devices[at : at + tp], axis_types=(jax.sharding.AxisType.Auto,))
        for at in range(0, tp * pp, tp)
    ]
    kind = jnp.dtype("float32")
    decoders = [
        abstract_decoder(config, mesh, kind, layers=range(number, number + 1))
        for number, mesh in enumerate(meshes)
    ]
    slots = rows * pp  # so that a dispatch has as many rows at any pp
    limits = Limits(max_slots=slots, max_model_len=context, num_pages=num_pages, steps=1, stages=pp)
    return Engine(NullRunner.of_stages(decoders, meshes, limits, kind))


def dispatching(rows: int, tp: int = 1, pp: int = 1) -> Callable[[], float]:
    """Returns what times a dispatch of ``rows`` decode rows, in milliseconds."""
    from tpjax.engine.request import Request
    from tpjax.engine.scheduler import Step
    from tpjax.sampling_params import SamplingParams

    engine = null_engine(rows, CONTEXT, CONTEXT // 128 + 1, tp=tp, pp=pp)
    params = SamplingParams(max_tokens=CONTEXT // 2, temperature=0.7, top_p=0.9, top_k=40, seed=1)
    requests = [
        Request(range(CONTEXT // 2), params, seed=slot, stop_ids=(2, 3), slot=slot) for slot in range(rows)
    ]
    for request in requests:
        request.pages = [list(range(1, CONTEXT // 128 + 1))]
        request.prefilled, request.dispatched_tokens = len(request.prompt_token_ids), 1

    def milliseconds() -> float:
        start = time.perf_counter()
        in_flight = engine._dispatch(Step(requests))
        jax.block_until_ready(in_flight.sampled)
        return 1e3 * (time.perf_counter() - start)

    for _ in range(10):
        milliseconds()
    return milliseconds


def compare_stages(rows: int, tp: int, pp: int, rounds: int) -> None:
    """Prints what a dispatch takes in one piece and in ``pp`` stages, in turns."""
    one, several = dispatching(rows, tp), dispatching(rows, tp, pp)
    pairs = [(one(), several()) for _ in range(rounds)]
    first, second, ratio = medians(pairs)
    print(f"{rows:4} rows, tp={tp}: {first:.3f} ms, pp={pp}: {second:.3f} ms, {ratio:.2f} times")


class Replicas:
    """Replicas with null programs behind a router, each with all its slots taken."""

    def __init__(self, dp: int, rows: int) -> None:
        from tpjax.engine.router import Router

        self.rows = rows * dp
        pages = rows * SHORT_CONTEXT // 128 + 1
        self.engines = [null_engine(rows, SHORT_CONTEXT, pages, device) for device in jax.devices()[:dp]]
        self.router = Router(self.engines)
        self._left = 0

    def rate(self, step_ms: float, seconds: float = 0.5) -> float:
        """Returns the dispatches a second."""
        for engine in self.engines:
            engine.runner.step_s = 0.0
        self._fill()
        before = [engine.runner.dispatches for engine in self.engines]
        while any(map(self._starting, self.engines, before)):
            self._step()
        for engine in self.engines:
            engine.runner.step_s = step_ms / 1e3
        first, start = self._dispatches(), time.perf_counter()
        while time.perf_counter() - start < seconds:
            self._step()
        return (self._dispatches() - first) / (time.perf_counter() - start)

    @staticmethod
    def _starting(engine: Any, before: int) -> bool:
        """Whether programs are compiled or prompts run."""
        scheduler = engine.scheduler
        prompts = scheduler.waiting or any(one.prefilling for one in scheduler.running)
        return bool(prompts) or engine.runner.dispatches < before + 20

    def _dispatches(self) -> int:
        return sum(engine.runner.dispatches for engine in self.engines)

    def _step(self) -> None:
        self.router.step()
        self._left -= sum(delta.finish_reason is not None for _, delta in self.router.deltas)
        self.router.deltas.clear()
        self._fill()

    def _fill(self) -> None:
        from tpjax.engine.generation import Generation
        from tpjax.engine.request import Request
        from tpjax.sampling_params import SamplingParams

        params = SamplingParams(max_tokens=SHORT_CONTEXT - 64, temperature=0.7, top_p=0.9, top_k=40, seed=1)
        for _ in range(self.rows - self._left):
            self.router.add(Generation(Request(range(2, 20), params, seed=1), None))
        self._left = self.rows


def replicas(dp: int, rows: int, step_ms: float, rounds: int) -> tuple[float, float, float]:
    """Returns dispatches a second of one replica and of ``dp``, and their ratio; medians over rounds."""
    one, several = Replicas(1, rows), Replicas(dp, rows)
    pairs = [(one.rate(step_ms), several.rate(step_ms)) for _ in range(rounds)]
    one.router.close()
    several.router.close()
    return medians(pairs)


def medians(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Returns the medians of one, of the other, and of their ratios within a pair."""
    alone, together = zip(*pairs, strict=True)
    return statistics.median(alone), statistics.median(together), statistics.median(b / a for a, b in pairs)


class Processes:
    """Processes with one replica each, which measure when they are asked."""

    def __init__(self, count: int) -> None:
        words, pipe = [sys.executable, __file__, "--worker"], subprocess.PIPE
        self._all = [subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) for _ in range(count)]

    def rates(self, count: int, rows: int, step_ms: float) -> float:
        """Returns the dispatches a second of the first ``count`` of them together."""
        asked = self._all[:count]
        for one in asked:
            assert one.stdin is not None
            print(rows, step_ms, file=one.stdin, flush=True)
        return sum(float(one.stdout.readline()) for one in asked if one.stdout is not None)

    def compare(self, rows: int, step_ms: float, rounds: int) -> tuple[float, float, float]:
        """Does what :func:`replicas` does."""
        self.rates(len(self._all), rows, step_ms)  # compiles
        pairs = [
            (self.rates(1, rows, step_ms), self.rates(len(self._all), rows, step_ms)) for _ in range(rounds)
        ]
        return medians(pairs)

    def close(self) -> None:
        """Ends the processes."""
        for one in self._all:
            one.communicate()


def work() -> None:
    """Measures one replica for each line of stdin: rows, and milliseconds of a step."""
    held: dict[str, Replicas] = {}
    for line in sys.stdin:
        rows, step_ms = line.split()
        if rows not in held:
            held[rows] = Replicas(1, int(rows))
        print(held[rows].rate(float(step_ms), seconds=1.0), flush=True)
    for one in held.values():
        one.router.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256], metavar="N", help="(64 256)")
    parser.add_argument("--rounds", type=int, default=300, help="dispatches, or pairs with --dp (300, 5)")
    parser.add_argument("--dp", type=int, metavar="N", help="compare N replicas with one")
    parser.add_argument("--pp", type=int, metavar="N", help="compare N pipeline stages with one")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="devices of a stage, with --pp (1)")
    parser.add_argument(
        "--step-ms", type=float, nargs="+", default=[0, 1, 2, 4, 8, 16], metavar="T", help="of a device"
    )
    parser.add_argument("--processes", action="store_true", help="with --dp: N processes in place of threads")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work()
    if arguments.dp:
        compare, apart = partial(replicas, arguments.dp), None
        if arguments.processes:
            apart = Processes(arguments.dp)
            compare = apart.compare
        else:
            tpjax.fake_devices(arguments.dp)
        rounds = 5 if arguments.rounds == 300 else arguments.rounds
        cores = f"{os.cpu_count()} cores"
        print(f"dispatches a second of one replica and of {arguments.dp}, {cores}; goal at dp=4: {GOAL}")
        for rows in arguments.rows:
            for step_ms in arguments.step_ms:
                one, several, ratio = compare(rows, step_ms, rounds)
                print(f"{rows:4} rows, {step_ms:4g} ms{one:9.0f}{several:9.0f}{ratio:7.2f} times", flush=True)
        if apart is not None:
            apart.close()
        return
    if arguments.pp:
        tpjax.fake_devices(arguments.tp * arguments.pp)
        print("medians of a dispatch in one piece, in stages, and of their ratio, in turns")
        for rows in arguments.rows:
            compare_stages(rows, arguments.tp, arguments.pp, arguments.rounds)
        return
    print(f"decode rows with {CONTEXT // 128} pages each, ms a dispatch: median, least, most")
    for rows in arguments.rows:
        dispatch = dispatching(rows)
        times = [dispatch() for _ in range(arguments.rounds)]
        figure = statistics.median(times)
        goal = f"  target <= {GOALS[rows]}" if rows in GOALS else ""
        print(f"{rows:4} rows{figure:9.3f}{min(times):9.3f}{max(times):9.3f}{goal}")


if __name__ == "__main__":
    main()
