"""The README says what is so."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import typer
from serving import WAIT_S

import tpjax
from tpjax.cli import app as cli
from tpjax.families.registry import FAMILIES
from tpjax.sampling_params import SamplingParams

ROOT = Path(tpjax.__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_table_of_families() -> None:
    """``python scripts/readme_families.py`` writes it."""
    script = runpy.run_path(str(ROOT / "scripts" / "readme_families.py"))
    assert script["MARKED"].search(README) is not None
    assert script["rewritten"](README) == README
    assert all(f"\n| `{model_type}` | " in README for model_type in FAMILIES)


def test_sampling_parameters_are_all_named() -> None:
    listed = re.search(r"transformers use: (.*?)\. The same seed", README, re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == set(SamplingParams.__dataclass_fields__)


COMMANDS = re.findall(r"^\$ tpjax (.+)$", README, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shown_is_one(command: str) -> None:
    words = shlex.split(command)
    name = "bench serve" if words[:2] == ["bench", "serve"] else words[0]
    subcommand = typer.main.get_command(cli.app).commands[name]
    subcommand.make_context(name, words[len(name.split()) :])


def test_commands_are_shown() -> None:
    assert len(COMMANDS) >= 3


# --- every block runs --------------------------------------------------------------------------------------

TRANSCRIPTS = runpy.run_path(str(ROOT / "scripts" / "readme_transcripts.py"))
BLOCKS = TRANSCRIPTS["blocks"](README)
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LANGUAGES = set(re.findall(r"^```(\w+)$", README, re.MULTILINE))


def environment() -> dict[str, str]:
    """A shell's, without the devices that this process fakes."""
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    return {**kept, "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}


def test_what_takes_longer_on_another_machine_is_comparable() -> None:
    comparable = TRANSCRIPTS["comparable"]
    assert comparable(" compiled in    9.9 s   7.6 s\n") == comparable(" compiled in   10.1 s  11.6 s\n")
    assert comparable(" bytes   9.9 GiB  7.6 s\n") != comparable(" bytes  10.1 GiB  7.6 s\n")


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=[next(block.commands())[0][:50] for block in BLOCKS])
@pytest.mark.usefixtures("smollm2_gguf")  # fetched before: no transcript shows that
def test_transcripts_are_what_the_commands_print(block: Any) -> None:
    """``python scripts/readme_transcripts.py`` writes them."""
    if not block.runs_here:
        pytest.skip(f"needs {block.needs}: pip install -e '.[aot-tpu]'")
    assert TRANSCRIPTS["comparable"](block.run()) == TRANSCRIPTS["comparable"](block.text)


@pytest.mark.slow
def test_the_example_in_python_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PYTHON[0]],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer, first, *others = done.stdout.splitlines()
    assert f"print(answer.text)  # {answer}\n" in PYTHON[0]
    assert first.startswith(" Paris") and len("".join(others)) > 200


@pytest.mark.slow
def test_the_server_s_example_runs(tmp_path: Path) -> None:
    """The command, on a port of its own, and the client."""
    (command,) = re.findall(r"^tpjax (serve [^#\n]+)", README, re.MULTILINE)
    assert "--port" not in command and "127.0.0.1:8000" in PYTHON[1]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [sys.executable, "-m", "tpjax", *command.split(), "--port", str(port)]
    server = subprocess.Popen(arguments, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 6 * WAIT_S
        while not _ready(f"http://127.0.0.1:{port}/ready"):
            assert server.poll() is None and time.monotonic() < until
            time.sleep(0.5)
        client = PYTHON[1].replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        done = subprocess.run([sys.executable, "-c", client], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert f"print(answer.choices[0].message.content)  # {done.stdout}" in f"{PYTHON[1]}"
    finally:
        server.terminate()
        server.wait(WAIT_S)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
            return bool(answer.status == 200)
    except urllib.error.URLError:
        return False


def test_no_block_is_left_out() -> None:
    """bash blocks are what CI and a newcomer run: the quickstart and installations."""
    assert {"bash", "console", "python"} == LANGUAGES and len(PYTHON) == 2
    shell = "".join(re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
    commands = {line.partition("#")[0].strip() for line in shell.splitlines()}
    assert commands == {
        "git clone URL tpjax && cd tpjax",
        "scripts/quickstart",
        'pip install -e ".[serve]" openai',
        "tpjax serve smollm2-135m --tp 4",
    }
