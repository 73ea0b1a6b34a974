"""Building the tests' device (device.cpp), and running host.py on it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from conftest import Runtime

HERE = Path(__file__).parent
HOST = HERE / "host.py"
BUILD = HERE.parents[1] / "build" / "test-device"


@dataclass(frozen=True)
class Setup:
    """How the device behaves; see device.cpp."""

    order: str = ""
    count: int = 1
    fuse: bool = True
    stream: str = "50"

    def __str__(self) -> str:
        fuse = "" if self.fuse else "-unfused"
        return f"{self.order or 'as-is'}-{self.count}{fuse}-{self.stream}"

    def environment(self, library: Path, counts: Path | None = None) -> dict[str, str]:
        return {
            "GGML_BACKEND_PATH": str(library),
            "TEST_DEVICE_COUNT": str(self.count),
            "TEST_DEVICE_ORDER": self.order,
            "TEST_DEVICE_FUSE": str(int(self.fuse)),
            "TEST_DEVICE_STREAM": self.stream,
            "TEST_DEVICE_COUNTS": str(counts or ""),
        }


def build(runtime: Runtime, out: Path, *flags: str) -> Path:
    """Compile the device for the installed llama.cpp; what is newer than its sources is kept."""
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    installed = runtime.tools.parent
    if not (installed / "include" / "ggml-backend.h").is_file():
        pytest.skip(f"llama.cpp's headers are not installed in {installed / 'include'}")
    sources = sorted(HERE.glob("*.cpp"))
    needed = [*sources, *HERE.glob("*.h"), installed / "lib" / "libggml-base.so"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".lock").open("w") as lock:  # test processes run beside each other
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.is_file() or out.stat().st_mtime < max(path.stat().st_mtime for path in needed):
            part = out.with_suffix(".part")
            command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-shared"]
            paths = ["-fPIC", f"-I{installed / 'include'}", f"-L{installed / 'lib'}"]
            libraries = ["-lggml-base", "-lggml", "-pthread"]
            subprocess.run([*command, *flags, *paths, *sources, "-o", part, *libraries], check=True)
            part.replace(out)
    return out


@dataclass(frozen=True)
class Ran:
    """What one run of host.py left."""

    folder: Path
    name: str

    @property
    def trace(self) -> Path:
        return self.folder / f"{self.name}.moet"

    @property
    def logits(self) -> np.ndarray:
        """float32 (outputs, vocabulary)."""
        return np.load(self.folder / f"{self.name}.npy")

    @property
    def counts(self) -> dict[str, int]:
        """What the device counted during the run."""
        return json.loads((self.folder / f"{self.name}.json").read_text())

    @property
    def sent(self) -> list[list[int]]:
        """[token, position, sequence] of everything that was decoded, in order."""
        return json.loads((self.folder / f"{self.name}.sent").read_text())

    @property
    def error(self) -> str | None:
        """Why it was refused."""
        path = self.folder / f"{self.name}.error"
        return path.read_text() if path.is_file() else None


Runs = Mapping[str, Mapping[str, Any]]
Host = Callable[..., dict[str, Ran]]


def run_host(
    model: Path,
    folder: Path,
    prompts: list[dict[str, Any]],
    runs: Runs,
    *,
    traced: bool,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Ran]:
    """Run host.py once, with these runs; by default on the CPU alone."""
    folder.mkdir(parents=True)
    job = folder / "job.json"
    job.write_text(json.dumps({"model": str(model), "prompts": prompts, "traced": traced, "runs": runs}))
    command = [sys.executable, HOST, job]
    result = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return {name: Ran(folder, name) for name in runs}
