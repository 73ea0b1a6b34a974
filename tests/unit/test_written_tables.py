"""Tables that tests write say what these found: of releases, and of hosts and devices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", ["llama.cpp/table.py", "docs/hosts.py"])
def test_what_was_found_is_what_stands_there(script: str) -> None:
    command = [sys.executable, ROOT / script, "--check"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr


def test_the_pinned_release_is_among_those_tried() -> None:
    pinned = (ROOT / "moetrace" / "host" / "pin.txt").read_text().strip()
    stated = (ROOT / "llama.cpp" / "releases.txt").read_text()
    found = json.loads((ROOT / "llama.cpp" / "releases.json").read_text())
    assert f"\n{pinned} " in stated
    assert pinned.replace("==", " ") in [one["release"] for one in found]
    assert all(f"\n{one['release'].replace(' ', '==')} " in stated for one in found)
