"""The README says what is so."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer

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
