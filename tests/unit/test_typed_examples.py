"""What README, docs and notebooks show is typed: mypy, strict, finds nothing in it, and finds a misspelt option."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: names that a block takes for granted, and what they are
GIVEN = {
    "moetrace": "import moetrace",
    "server": "from moetrace.host.server import TracedServer\nserver: TracedServer",
    "texts": "texts: list[str]",
    "traces": "traces: list[moetrace.Trace]",
    "pool": "from concurrent.futures import Executor\npool: Executor",
}


def blocks() -> dict[str, str]:
    """Python of the README and of docs, block by block, and of each notebook."""
    found = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for i, text in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
            found[f"{page.stem}_{i}"] = text
    for book in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
        cells = [c for c in json.loads(book.read_text())["cells"] if c["cell_type"] == "code"]
        lines = "".join("".join(cell["source"]) + "\n" for cell in cells)
        found[f"notebook_{book.stem[0]}"] = "\n".join(
            line for line in lines.splitlines() if not line.startswith(("%", "!"))
        )
    return found


def checked(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        given = [
            code
            for word, code in GIVEN.items()
            if re.search(rf"\b{word}\b", text)
            and not re.search(rf"(\b{word}\b.* = |(as|import) {word}\b)", text)
        ]
        (folder / f"{name}.py").write_text("\n".join([*given, text]))
    run = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--config-file=", "--ignore-missing-imports"),
            *("--untyped-calls-exclude", "distributed"),
            *("--cache-dir", str(ROOT / ".mypy_cache"), "--no-incremental", "."),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout


def test_examples_are_typed_and_what_is_misspelt_is_found(tmp_path: Path) -> None:
    found = blocks()
    assert len(found) >= 6
    wrong = {
        "wrong_option": "import moetrace\nmoetrace.capture('m.gguf', ['x'], chanels='experts')\n",
        "wrong_column": "import moetrace\nwith moetrace.open('t.moet') as trace:\n    trace.exprts\n",
    }
    said = checked(tmp_path, found | wrong).splitlines()
    assert [line for line in said[:-1] if not line.startswith("wrong_")] == [], said
    assert any('Unexpected keyword argument "chanels"' in line for line in said)
    assert any('has no attribute "exprts"' in line for line in said)
