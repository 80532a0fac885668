"""bfloat16, the default on chips: no farther from float32 than 1.5 times transformers' own bfloat16 is.

`tests/goldens/bfloat16.json` (``scripts/make_goldens.py``) has the distances of transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDENS
from rounding import distance, prompts
from stepwise import Stepwise

from tpjax import LLM

OF_TRANSFORMERS = json.loads((GOLDENS / "bfloat16.json").read_text())
FAMILIES = sorted(golden.parent.name for golden in GOLDENS.glob("*/golden.npz"))
NOW = ("deepseek_v3", "gemma2", "llama", "olmo2", "qwen3_moe")  # the others are slow together
AT_MOST = 1.5


def check(found: dict[str, float], reference: dict[str, float]) -> None:
    ratios = {name: round(found[name] / reference[name], 2) for name in reference}
    print("RATIO", ratios)
    assert max(ratios.values()) <= AT_MOST, ratios
    assert min(ratios.values()) > 0.05, f"{ratios}: is this bfloat16 at all?"


def test_every_golden_has_its_distance() -> None:
    missing = sorted(set(FAMILIES) - set(OF_TRANSFORMERS))
    assert not missing, f"{missing}: run `python scripts/make_goldens.py --bfloat16`"


def logits(name: str, tp: int, dtype: str) -> list[np.ndarray]:
    model = Stepwise(name, tp, max_length=Stepwise.PAGE, dtype=dtype)
    found = []
    for prompt in prompts(model.vocab_size):
        model.length = 0
        found.append(model(prompt))
    return found


@pytest.mark.parametrize(
    "name", (pytest.param(n, marks=() if n in NOW else pytest.mark.slow) for n in FAMILIES)
)
def test_bfloat16_is_as_close_as_transformers(name: str) -> None:
    """Float32 is our own here: test_parity holds it to transformers', far closer than bfloat16 is."""
    exact = logits(name, 1, "float32")
    for tp in (1, 3):
        check(distance(logits(name, tp, "bfloat16"), exact), OF_TRANSFORMERS[name])


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ("smollm2_gguf", "gemma3_gguf"))
def test_bfloat16_of_a_real_model(fixture: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(fixture)
    name = {"smollm2_gguf": "smollm2-135m", "gemma3_gguf": "gemma3-270m"}[fixture]
    golden = np.load(GOLDENS / f"{name}.npz")
    llm = LLM(path, tp=2, dtype="bfloat16", max_model_len=128, max_slots=1)
    found = llm.logits(golden["prompt"].tolist())[:, golden["kept"]]
    check(distance([found], [golden["logits"]]), OF_TRANSFORMERS[name])
