"""`scripts/on_gpu --dry-run`: the code that a GPU runs, on a CPU with tiny models; what its faults leave."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
SCRIPT = TESTS.parent / "scripts" / "on_gpu.py"


def call(folder: Path) -> Any:
    """What the last call has written."""
    return json.loads((folder / "results.json").read_text())["calls"][-1]


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    sections = ("kernels", "parity", "int4", "llama", "attention", "experts", "products")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--dry-run", "--out", tmp_path, "--only", *sections],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = call(tmp_path)
    assert results["sections"] == dict.fromkeys(("machine", *sections), "ok")
    assert results["machine"]["read_bytes_s"] > 0
    assert [row["batch"] for row in results["llama"]["decode"]] == [1, 2]
    assert results["llama"]["engine"]["compiled_meanwhile"] == 0
    profiles = results["llama"]["profile"]
    assert [rows[0]["kernel"] for rows in profiles.values()] == ["all"] * 2, profiles
    assert results["parity"]["llama"]["mean_rms"] < 1.5
    assert results["kernels"]["failed"] == results["kernels"]["not_run"] == []
    assert {row["kind"] for row in results["products"]["rows"]} == {"int4", "int8", "bfloat16"}
    assert 0 < results["int4"]["weight_bytes"] < results["llama"]["weight_bytes"]
    # a machine may give back no more than a few files
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "log.txt", "traces.zip"}


FAULTS = """
import os, sys, time
sys.path.insert(0, {scripts!r})
import on_gpu

def works(dry):
    return {{"device": "one"}}

def fails(dry):
    on_gpu.save({{"rows": [1]}})
    raise ValueError("as it happens")

def hangs(dry):
    on_gpu.save({{"process": os.getpid()}})
    time.sleep(60)

on_gpu.__file__ = __file__  # what a section's process runs
on_gpu.GROUPS = (
    {{"machine": on_gpu.Section(works, 20)}},
    {{"fails": on_gpu.Section(fails, 20), "hangs": on_gpu.Section(hangs, {limit})}},
    {{"after": on_gpu.Section(works, 20)}},
)
on_gpu.SECTIONS = {{name: one for group in on_gpu.GROUPS for name, one in group.items()}}
on_gpu.main()
"""


def faulty(folder: Path, limit: int) -> list[str]:
    """The command of a script with sections that fail and hang."""
    script = folder / "faults.py"
    script.write_text(FAULTS.format(scripts=str(SCRIPT.parent), limit=limit))
    return [sys.executable, str(script), "--dry-run", "--out", str(folder / "out")]


def test_sections_that_fail_or_hang_take_no_other_along(tmp_path: Path) -> None:
    """What they found until then is there, and where they were."""
    command = faulty(tmp_path, limit=2)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "failed: fails, hangs\n")
    results = call(tmp_path / "out")
    ends = {"machine": "ok", "fails": "exit 1", "hangs": "stopped after 2 s", "after": "ok"}
    assert results["sections"] == ends
    assert results["fails"] == {"rows": [1]} and results["after"] == {"device": "one"}
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "as it happens" in log and "in hangs" in log
    again = subprocess.run([*command, "--only", "after"], capture_output=True, timeout=60, check=False)
    calls = json.loads((tmp_path / "out" / "results.json").read_text())["calls"]
    assert again.returncode == 0 and calls[0] == results and set(calls[1]) == {"machine", "after", "sections"}


def test_an_end_from_outside_keeps_what_was_found(tmp_path: Path) -> None:
    """And leaves no process that holds the chip."""
    process = subprocess.Popen(faulty(tmp_path, limit=60), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
        results = tmp_path / "out" / "results.json"
        if results.exists() and {"hangs", "fails"} <= set(found := call(tmp_path / "out")):
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(found["hangs"]["process"], 0)
    assert call(tmp_path / "out")["fails"] == {"rows": [1]}


def test_what_did_not_run_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--dry-run", "--out", tmp_path, "--only", "experts", "--minutes", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == "not run: machine, experts; for another call: --only machine experts\n"
    assert done.stderr == "failed: machine, experts\n"


def test_the_tests_it_names_exist() -> None:
    """A name that does not would keep pytest from all the others."""

    def tree(file: Path) -> list[ast.stmt]:
        return ast.parse(file.read_text()).body

    (drawn,) = (one.value for one in tree(SCRIPT) if isinstance(one, ast.Assign) and "DRAWS" in ast.dump(one))
    named = ast.literal_eval(drawn)
    there = {one.name for one in tree(TESTS / "test_draws.py") if isinstance(one, ast.FunctionDef)}
    assert len(named) > 5 and set(named) <= there
