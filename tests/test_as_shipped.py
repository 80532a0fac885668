"""A part of the suite as users run it: compiled with XLA's own settings, where `conftest` has others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMPILE_FAST

HERE = Path(__file__).parent
SHIPPED = 3  # XLA's default
TESTS = (
    *(f"test_parity.py::test_parity_with_goldens[{name}-3]" for name in ("llama", "gemma3", "qwen3_moe")),
    *(f"test_parity.py::test_parity_with_goldens[{name}-3]" for name in ("deepseek_v3", "gpt_oss")),
    "test_parity.py::test_parity_of_a_real_model[smollm2_gguf-smollm2-135m-4]",
    "test_sampling.py",
    "test_draws.py::test_answers_by_a_schema_are_valid[smollm2-100-200]",
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_as_shipped() -> None:
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in COMPILE_FAST]
    flags = [*kept, f"--xla_backend_optimization_level={SHIPPED}"]
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "900"]
    done = subprocess.run(
        [*command, *(str(HERE / test) for test in TESTS)],
        env=environment, cwd=HERE.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "deselected" not in done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > len(TESTS)
