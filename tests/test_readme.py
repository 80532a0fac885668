"""The README says what is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import tpjax
from tpjax import cli
from tpjax.families import FAMILIES
from tpjax.sampling_params import SamplingParams

README = (Path(tpjax.__file__).parent.parent / "README.md").read_text()


def test_table_of_families() -> None:
    rows = []
    for family in FAMILIES.values():
        formats = ["safetensors", *(f"GGUF `{gguf.name}`" for gguf in family.gguf)]
        rows.append(f"| `{family.model_type}` | {family.examples} | {', '.join(formats)} |")
    table = re.search(r"\| `model_type` \|.*\n\|[-|]+\n((?:\|.*\n)+)", README)
    assert table is not None
    assert table[1].splitlines() == rows


def test_sampling_parameters_are_all_named() -> None:
    listed = re.search(r"transformers use: (.*?)\. The same seed", README, re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == set(SamplingParams.__dataclass_fields__)


COMMANDS = re.findall(r"^\$ tpjax (.+)$", README, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shown_is_one(command: str) -> None:
    arguments = cli._parser().parse_args(shlex.split(command))
    assert callable(arguments.run)


def test_commands_are_shown() -> None:
    assert len(COMMANDS) >= 3
