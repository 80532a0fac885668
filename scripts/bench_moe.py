#!/usr/bin/env python
"""Decoding with a mixture of experts: the cost follows the experts a token uses, not those there are.

    python scripts/bench_moe.py
    python scripts/bench_moe.py --tp 2 --batch 4 --json out.json

Random models that differ only in their number of experts, or in how many of them compute a token, decode on
this machine in turns, round by round; every step feeds another token, so that other experts are chosen.
Figures are medians over the rounds; ratios are taken within a round before the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

from tpjax.planning.timing import median_ratio, seconds, take_turns

LAYERS, HIDDEN, EXPERT_WIDTH, VOCAB = 4, 1024, 512, 512
STEPS = 32
# (experts, experts per token); the first is what the others are compared with
MODELS = ((8, 2), (16, 2), (32, 2), (64, 2), (64, 1), (64, 4), (64, 8))


def decoder(experts: int, per_token: int, tp: int, batch: int) -> Callable[[], float]:
    """Returns a function that decodes and returns ms a step."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from tpjax.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig, NormConfig
    from tpjax.mesh import make_mesh
    from tpjax.model import Decoder
    from tpjax.runtime.limits import Limits
    from tpjax.runtime.rows import Row
    from tpjax.runtime.runner import Runner
    from tpjax.sampling_params import SamplingParams

    config = ModelConfig(
        model_type="mixtral",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        max_position_embeddings=256,
        moe=MoEConfig(
            num_experts=experts,
            experts_per_token=per_token,
            expert_width=EXPERT_WIDTH,
            sparse_layers=(True,) * LAYERS,
            norm_topk_prob=True,
        ),
        attention=AttentionConfig(
            num_heads=8,
            num_kv_heads=8,
            head_dim=64,
            query_scale=0.125,
            layer_types=("full_attention",) * LAYERS,
        ),
        mlp=MLPConfig(intermediate_size=EXPERT_WIDTH),
        norm=NormConfig(eps=1e-5),
    )
    mesh = make_mesh(tp)
    with jax.set_mesh(mesh):
        model = Decoder(config, tp, jnp.dtype("float32"))
        state = nnx.state(model, nnx.Param)
        key = jax.random.key(0)
        for number, leaf in enumerate(jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Param))):
            value = leaf.get_value()
            draw = jax.jit(
                lambda key, shape=value.shape: 0.05 * jax.random.normal(key, shape),
                out_shardings=value.sharding,
            )
            leaf.set_value(draw(jax.random.fold_in(key, number)))
        nnx.update(model, state)
    runner = Runner(
        model,
        mesh,
        Limits(max_slots=batch, max_model_len=256, num_pages=2 * batch + 1, steps=STEPS),
        jnp.dtype("float32"),
    )
    greedy = SamplingParams(temperature=1.0)
    rounds = iter(range(10**6))

    def decode() -> float:
        seed = next(rounds)
        rows = [
            Row(slot, 8, [[2 * slot + 1, 2 * slot + 2]], greedy, seed=seed * batch + slot, remaining=STEPS)
            for slot in range(batch)
        ]
        return seconds(lambda: jax.block_until_ready(runner.decode(rows, STEPS))) * 1e3 / STEPS

    return decode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="devices, faked on a CPU (1)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences decoded at once (1)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="rounds (9)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    arguments = parser.parse_args()

    from tpjax.mesh import ensure_devices

    ensure_devices(arguments.tp)
    contenders = {model: decoder(*model, arguments.tp, arguments.batch) for model in MODELS}
    times = take_turns(contenders, arguments.rounds)

    expert_mb = 3 * HIDDEN * EXPERT_WIDTH * 4 / 1e6
    report: list[dict[str, Any]] = [
        {
            "experts": experts,
            "experts_per_token": per_token,
            "total_mb": LAYERS * experts * expert_mb,
            "active_mb": LAYERS * per_token * expert_mb,
            "step_ms": statistics.median(times[experts, per_token]),
            "ratio": median_ratio(times[experts, per_token], times[MODELS[0]]),
        }
        for experts, per_token in MODELS
    ]
    print(f"tp={arguments.tp}, batch {arguments.batch}, float32, {LAYERS} layers, {arguments.rounds} rounds")
    print("experts  a token  all experts MB  of a token MB  ms a step   ratio")
    for line in report:
        print(
            f"{line['experts']:7}  {line['experts_per_token']:7}  {line['total_mb']:14.0f}  "
            f"{line['active_mb']:13.0f}  {line['step_ms']:9.2f}  {line['ratio']:5.2f}×"
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
