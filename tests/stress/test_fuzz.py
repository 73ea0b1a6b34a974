"""Fuzzing: the C++ that reads what others wrote, and the Python readers and importers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from scale import ROOT, Figures, Size

pytestmark = pytest.mark.stress

TARGETS = ("batch", "graph", "layout", "ring", "text")
CORPUS = ROOT / "tests" / "cpp" / "fuzz" / "corpus"


def compiler() -> str:
    """Find a clang with libFuzzer."""
    for name in ("clang++", *(f"clang++-{version}" for version in range(22, 11, -1))):
        if path := shutil.which(name):
            return path
    pytest.skip("libFuzzer needs clang (apt-get install clang)")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the fuzz targets with libFuzzer, AddressSanitizer and UBSan."""
    folder = Path(os.environ.get("MOETRACE_FUZZ_BUILD", tmp_path_factory.mktemp("fuzz")))
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DMOETRACE_TESTS=ON", "-DMOETRACE_FUZZ=ON"]
    subprocess.run([*configure, f"-DCMAKE_CXX_COMPILER={compiler()}"], check=True, stdout=subprocess.DEVNULL)
    targets = [f"fuzz-{target}" for target in TARGETS]
    command = ["cmake", "--build", folder, "--parallel", "2", "--target", *targets]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "tests" / "cpp"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", TARGETS)
def test_cpp(
    target: str, size: Size, figures: Figures, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """GIVEN bytes that nobody meant WHEN the C++ reads them THEN no sanitizer says a word, and no check fails."""
    seconds = size("fuzz_seconds")
    if seconds == 0:
        pytest.skip("`make test-cpp` runs the stored inputs; fuzzing is for `make stress`")
    build: Path = request.getfixturevalue("build")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    command = [
        build / f"fuzz-{target}", corpus, CORPUS / target, f"-max_total_time={seconds}", "-timeout=60",
        "-rss_limit_mb=2048", "-print_final_stats=1", "-close_fd_mask=1",
    ]  # fmt: skip
    # rings are files: in memory, if there is room
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(tmp_path)
    run = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "TMPDIR": fast}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    (executions,) = re.findall(r"stat::number_of_executed_units: (\d+)", run.stderr)
    inputs = len(list((CORPUS / target).iterdir()))
    figures(
        "fuzz",
        **{
            f"libFuzzer, {target}": f"{int(executions):,} executions in {seconds} s from {inputs} inputs, "
            f"{len(list(corpus.iterdir())):,} in the end; 0 crashes, hangs or reports"
        },
    )
