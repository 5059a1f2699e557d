"""Write each notebook from its text twin: ``python tools/make_notebooks.py``. No outputs, fixed cell ids."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def notebook_of(twin: Path) -> str:
    """The notebook's JSON text of a text twin (jupytext, percent format)."""
    notebook = jupytext.read(twin)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i:02d}"
    notebook.metadata["language_info"] = {"name": "python"}
    return str(nbformat.writes(notebook, version=4)) + "\n"


if __name__ == "__main__":
    for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py")):
        path.with_suffix(".ipynb").write_text(notebook_of(path), encoding="utf-8")
        print(path.with_suffix(".ipynb").name)
