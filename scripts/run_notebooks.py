#!/usr/bin/env python
"""Runs notebooks from top to bottom and keeps what they show, as the tests expect it.

    python scripts/run_notebooks.py             # all of them
    python scripts/run_notebooks.py notebooks/1_matrix_product.ipynb

Needs the `notebook` extra. After a change to what a notebook shows, run it, and look at the difference.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    here = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources=here).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell ran
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)


def main() -> None:
    for path in map(Path, sys.argv[1:] or sorted(NOTEBOOKS.glob("*.ipynb"))):
        print(path.name, flush=True)
        run(path)


if __name__ == "__main__":
    main()
