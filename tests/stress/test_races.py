"""The ring's producer and its readers under ThreadSanitizer."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import pytest
from scale import ROOT, Figures, Size

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600)]

POLICIES = ("block", "drop", "overwrite")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build tests/cpp/test-ring.cpp under ThreadSanitizer."""
    out = Path(os.environ.get("MOETRACE_RACE_BUILD", tmp_path_factory.mktemp("races"))) / "test-ring"
    sources = [ROOT / "tests" / "cpp" / "test-ring.cpp", ROOT / "csrc" / "ring.cpp"]
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-Wno-tsan", "-pthread", f"-I{ROOT / 'csrc'}"]
    built = subprocess.run(
        [compiler, *flags, *sources, "-o", out], capture_output=True, text=True, check=False
    )
    if built.returncode:
        pytest.skip(f"{compiler} cannot build for ThreadSanitizer: {built.stderr.strip()[-200:]}")
    return out


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # ThreadSanitizer wants memory where it expects it: no randomised addresses
    command = ["setarch", platform.machine(), "-R", str(program), *arguments]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_sanitizer_sees_a_race(program: Path) -> None:
    """GIVEN a consumer that does not wait for the records it was told of WHEN it reads THEN that is reported."""
    result = run(program, "100000", "racy")
    assert result.returncode != 0
    assert "data race" in result.stderr


def test_produced_is_read_plus_lost(program: Path, size: Size, figures: Figures) -> None:
    """GIVEN rings of all sizes and policies WHEN written and read at once THEN no race, and every record told."""
    records = size("race_records")
    result = run(program, str(records))
    assert result.returncode == 0, result.stderr[-4000:]
    cases = re.findall(
        r"policy (\d), (\d+) records of room: (\d+) produced = (\d+) read \+ (\d+) lost \+ (\d+) overwritten; "
        r"a second reader saw (\d+)",
        result.stdout,
    )
    assert len(cases) == 9
    told = {}
    for policy, room, produced, read, lost, overwritten, seen in (map(int, case) for case in cases):
        assert produced == records == read + lost + overwritten
        assert seen > 0
        name = f"{POLICIES[policy]}, {room:,} records of room"
        told[name] = f"{produced:,} produced = {read:,} read + {lost + overwritten:,} lost"
    figures("races", **told, **{"reports of ThreadSanitizer": 0})
