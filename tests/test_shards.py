"""How the page says that weights are sharded, held to what the tensors are: by their canonical names."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest
from conftest import GOLDENS

from tpjax.checkpoints.parameters import abstract_decoder, parameters
from tpjax.families.registry import config_from_hf
from tpjax.inspect.reasons import reason
from tpjax.mesh import make_mesh
from tpjax.server.shards import cut

FAMILIES = ("llama", "gpt2", "cohere", "mixtral", "gpt_oss", "deepseek_v3", "qwen2_moe", "starcoder2")
NAMES = (
    (r"embed_tokens", {"vocabulary"}),
    (r"lm_head", {"column"}),
    (r"experts?\.", {"experts", "width"}),
    (r"(o_proj|down_proj|dense_4h_to_h)\.", {"row"}),
    (r"(qkv|q|k|v|q_b|kv_b|gate|up|gate_up)_proj\.", {"column"}),
    (r"sinks|_norm", {"heads"}),
)


@pytest.mark.parametrize("tp", (2, 5))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_sharded_weight_is_named_right(family: str, tp: int) -> None:
    config = config_from_hf(json.loads((GOLDENS / family / "config.json").read_text()))
    mesh = make_mesh(tp)
    model = abstract_decoder(config, mesh, jnp.dtype("float32"))
    seen = set()
    for one in parameters(model, mesh):
        replicated = one.sharding.is_fully_replicated
        row: Any = SimpleNamespace(replicated=replicated, why=reason(one, model, tp))
        if replicated:
            assert cut(row) == "replicated"
            continue
        wanted = next((cuts for pattern, cuts in NAMES if re.search(pattern, one.name)), None)
        assert wanted is not None and cut(row) in wanted, (one.name, row.why)
        seen.add(cut(row))
    assert {"vocabulary", "row", "column"} <= seen
