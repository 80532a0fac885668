"""`scripts/on_gpu --dry-run`: the code that a GPU runs, on a CPU with tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "on_gpu.py"


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    sections = ("llama", "attention", "experts", "products", "int4", "parity", "kernels")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--dry-run", "--out", tmp_path, "--only", *sections],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("machine", *sections)}
    assert results["machine"]["read_bytes_s"] > 0
    assert [row["batch"] for row in results["llama"]["decode"]] == [1, 2]
    assert results["llama"]["engine"]["compiled_meanwhile"] == 0
    assert results["parity"]["llama"]["mean_rms"] < 1.5
    assert results["kernels"]["failed"] == []
    assert {row["kind"] for row in results["products"]["rows"]} == {"int4", "int8", "bfloat16"}
    assert 0 < results["int4"]["weight_bytes"] < results["llama"]["weight_bytes"]


def test_a_section_that_fails_is_named(tmp_path: Path) -> None:
    """Its result is missing; the others are there, and the exit status says so."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--dry-run", "--out", tmp_path, "--only", "experts", "--minutes", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "failed: machine, experts\n"
