"""What the stress tests share: how large they are, and where their figures go.

`make test` runs them short; `make stress` sets MOETRACE_STRESS=whole and runs the same code whole. Each test
records its figures; `report.py` writes the table of docs/reliability.md from those of a whole run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit"))  # traces.py, rings.py, plain_reader.py

WHOLE = os.environ.get("MOETRACE_STRESS") == "whole"

#: how much each test does: (in `make test`, in `make stress`)
SIZES = {
    "kills_of_native_hosts": (24, 700),
    "kills_of_llama_server": (3, 300),
    "drains_per_llama_server": (1, 6),
    "cuts": (300, None),  # None: all
    "flips": (400, None),
    "edits": (200, 100_000),
    "fuzz_seconds": (0, 720),  # of each C++ target; 0: the stored inputs alone
    "fuzz_examples": (60, 20_000),  # of each Python reader
    "race_records": (100_000, 10_000_000),
    "faults_of_host": (12, None),
    "faults_of_drain": (60, None),
    "models_of_each_release": (2, None),
    "load_seconds": (15, 600),  # on the plain server, and again on the traced one
}

Figures = Callable[..., None]


@pytest.fixture(scope="session")
def size() -> Callable[[str], int]:
    """Return ``size(name)``: how much to do of it in this run."""

    def of(name: str) -> int:
        chosen = SIZES[name][WHOLE]
        return sys.maxsize if chosen is None else chosen

    return of


@pytest.fixture(scope="session")
def figures() -> Figures:
    """Return ``figures(item, label=value, ...)``: keeps a run's figures for the table."""
    folder = Path(os.environ.get("MOETRACE_FIGURES", ROOT / "build" / "stress"))

    def record(item: str, **values: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{item}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get("whole") != WHOLE:
            known = {"whole": WHOLE, "figures": {}}
        known["figures"] |= {label.replace("_", " "): value for label, value in values.items()}
        path.write_text(json.dumps(known, indent=1) + "\n")

    return record
