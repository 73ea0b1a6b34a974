"""How large the stress tests are, and where their figures go.

`make test` runs them short; `make stress` sets MOETRACE_STRESS=whole and runs the same code whole. Each test
records its figures; `report.py` writes the table of docs/reliability.md from those of a whole run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIGURES = Path(os.environ.get("MOETRACE_FIGURES", ROOT / "build" / "stress"))
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
    "fuzz_examples": (60, 5_000),  # of each Python reader
    "race_records": (20_000, 10_000_000),
    "faults_of_host": (12, None),
    "faults_of_drain": (60, None),
    "models_of_each_release": (2, None),
    "load_seconds": (9, 600),  # on the plain server, and again on the traced one
    "lives_seconds": (18, 600),
    "lossy_lives_seconds": (9, 60),
}

Size = Callable[[str], int]
Figures = Callable[..., None]


def size_of(name: str) -> int:
    """Give how much to do of it in this run."""
    chosen = SIZES[name][WHOLE]
    return sys.maxsize if chosen is None else chosen


def record(item: str, **values: object) -> None:
    """Keep figures of a run: label -> figure."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    path = FIGURES / f"{item}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("whole") != WHOLE:
        known = {"whole": WHOLE, "figures": {}}
    known["figures"] |= values
    path.write_text(json.dumps(known, indent=1) + "\n")
