"""The notebooks run from top to bottom and show what they showed when they were saved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tpjax.inspect.topology import extra_problem

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|var|usr|opt|Users|mnt)/|site-packages")
FEWEST_PICTURES = {"1": 10, "2": 7, "3": 6, "4": 3}

nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[notebook]'")
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: Any) -> str:
    """Text of a cell's outputs: streams joined, since where they break depends on timing."""
    return "".join(output.get("text") or output["data"]["text/plain"] for output in cell.outputs)


def pictures(notebook: Any) -> int:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@every_notebook
def test_saved(path: Path) -> None:
    """Outputs are kept, from one run from top to bottom, and name nothing of the machine it was made on."""
    saved = nbformat.read(path, as_version=4)
    cells = code_cells(saved)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert pictures(saved) >= FEWEST_PICTURES[path.stem[0]]
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
            if html := "".join(output.get("data", {}).get("text/html", "")):  # a table, wherever it is shown
                assert "white-space:pre;" in html and "monospace" in html
            texts = [output.get("text", ""), *map(str, output.get("data", {}).values())]
            kinds = ["", *output.get("data", {})]
            for kind, text in zip(kinds, texts, strict=True):
                assert kind.startswith("image/") or PATH.search(text) is None


@pytest.mark.slow
@every_notebook
def test_notebook(path: Path, smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[notebook]'")
    if path.stem.startswith("4_") and (problem := extra_problem("tpu") or extra_problem("gpu")):
        pytest.skip(problem)
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the notebook fakes its own devices
    monkeypatch.delenv("NPROC", raising=False)
    saved, fresh = (nbformat.read(path, as_version=4) for _ in range(2))
    here = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(fresh, timeout=540, kernel_name="python3", resources=here).execute()
    assert pictures(fresh) == pictures(saved)
    for before, after in zip(code_cells(saved), code_cells(fresh), strict=True):
        after.outputs = [output for output in after.outputs if output.get("name") != "stderr"]
        if "measured" not in before.metadata.get("tags", ()):  # times are the machine's
            assert shown(after) == shown(before)
