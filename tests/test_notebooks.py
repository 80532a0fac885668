"""The notebooks run from top to bottom and show what they showed when they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def shown(notebook: Any) -> list[str]:
    """Text of every output: streams joined, since where they break depends on timing."""
    return [
        "".join(output.get("text") or output["data"]["text/plain"] for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the notebook fakes its own devices
    monkeypatch.delenv("NPROC", raising=False)
    saved = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(fresh, timeout=200, kernel_name="python3").execute()
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    exact = shown(fresh)[:-1]  # the last is a rounding error: its digits are the machine's
    assert exact == shown(saved)[:-1]
    assert 0 < float(shown(fresh)[-1]) < 1e-4
