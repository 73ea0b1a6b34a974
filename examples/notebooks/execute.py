"""Execute the notebooks in place: their outputs are what their code prints.

    python examples/notebooks/execute.py [NOTEBOOK ...]

Needs the extra ``notebooks`` (nbclient, nbformat, ipykernel) and the llama.cpp runtime. Each notebook runs in an
empty folder of its own; times of execution and kernel versions are not kept, so that what changes in a notebook is
what it says.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path: Path) -> nbformat.NotebookNode:
    """Run a notebook and give it with its outputs; raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            coalesce_streams=True,  # or where a stream is cut depends on the moment
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
        cell.metadata.pop("execution", None)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main(arguments: list[str]) -> None:
    """Execute those named, or all."""
    for path in [Path(a) for a in arguments] or sorted(HERE.glob("*.ipynb")):
        notebook = execute(path)
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {len(notebook.cells)} cells, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
