"""The example notebooks: their cells run as they stand, and the outputs in them are of a run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def test_there_are_three() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3"]


@each
def test_outputs_are_of_one_run_and_name_no_machine(path: Path) -> None:
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds <= {"stream", "execute_result", "display_data"}
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell["outputs"])
    text = path.read_text()
    assert not re.search(r"/(home|root|tmp|Users|work|opt|usr|var)/", text)
    assert path.stat().st_size < 200_000


@each
@pytest.mark.runtime
def test_code_cells_run_as_plain_python(path: Path, runtime: object, tmp_path: Path) -> None:
    """In a process of their own: llama.cpp's libraries must stay out of the test process."""
    code = "\n".join("".join(cell["source"]) for cell in code_cells(path))
    # pyplot's show() says that there is no window
    options = ["-W", "error", "-W", "ignore:FigureCanvasAgg is non-interactive"]
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    run = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


@each
@pytest.mark.slow
@pytest.mark.runtime
def test_notebooks_execute(path: Path, runtime: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same kinds of output as those in the file, cell by cell; numbers may differ between machines."""
    pytest.importorskip("nbclient", reason="needs the extra notebooks")
    monkeypatch.syspath_prepend(str(FOLDER))
    from execute import execute

    def kinds(cells: list[Any]) -> list[list[str]]:
        return [[output["output_type"] for output in cell["outputs"]] for cell in cells]

    made = [cell for cell in execute(path).cells if cell.cell_type == "code"]
    assert kinds(made) == kinds(code_cells(path))
