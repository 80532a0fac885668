"""Words that tpjax used before the field's terms do not come back: ``tests/data/old_words.txt``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import tpjax
from tpjax.cli import app as cli

ROOT = Path(tpjax.__file__).parent.parent
WORDS = [
    line
    for line in (Path(__file__).parent / "data" / "old_words.txt").read_text().splitlines()
    if not line.startswith("#")
]
# where the former names are told or read
EXCEPTED = (
    "tpjax/checkpoints/config_file.py",  # reads format 1
    "tpjax/old_spellings.py",
    "scripts/rename.py",
    "tests/test_words.py",
    "tests/test_old_spellings.py",
)


def texts() -> Iterator[tuple[str, str]]:
    """Yields each source, document and notebook cell with its place."""
    files = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "tpjax").rglob("*.html"))]
    for folder in ("tpjax", "scripts", "tests"):
        files += sorted((ROOT / folder).rglob("*.py"))
    for file in files:
        name = str(file.relative_to(ROOT))
        if name not in EXCEPTED:
            yield name, file.read_text()
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for number, cell in enumerate(json.loads(file.read_text())["cells"]):
            yield f"{file.name}, cell {number}", "".join(cell["source"])
    for name, command in typer.main.get_command(cli.app).commands.items():
        context = typer.Context(command, info_name=name)
        yield f"tpjax {name} --help", command.get_help(context)


TEXTS = list(texts())


@pytest.mark.parametrize("word", WORDS)
def test_no_old_word(word: str) -> None:
    pattern = re.compile(word)
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for name, text in TEXTS
        for match in pattern.finditer(text)
    ]
    assert found == []


def test_the_list_is_used() -> None:
    assert len(TEXTS) > 200 and len(WORDS) > 40
