"""The tables of supported releases say what the releases' test found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_both_readmes_say_what_was_found() -> None:
    command = [sys.executable, ROOT / "llama.cpp" / "table.py", "--check"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr


def test_the_pinned_release_is_among_those_tried() -> None:
    pinned = (ROOT / "moetrace" / "host" / "pin.txt").read_text().strip()
    stated = (ROOT / "llama.cpp" / "releases.txt").read_text()
    found = json.loads((ROOT / "llama.cpp" / "releases.json").read_text())
    assert f"\n{pinned} " in stated
    assert pinned.replace("==", " ") in [one["release"] for one in found]
    assert all(f"\n{one['release'].replace(' ', '==')} " in stated for one in found)
