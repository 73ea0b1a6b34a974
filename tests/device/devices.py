"""Building the tests' device (device.cpp), and running host.py on it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from conftest import Runtime

HERE = Path(__file__).parent
HOST = HERE / "host.py"
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "test-device"


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


def compiled(runtime: Runtime, out: Path, sources: list[Path], *flags: str) -> Path:
    """Compile a backend for the installed llama.cpp; what is newer than its sources is kept."""
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    installed = runtime.tools.parent
    if not (installed / "include" / "ggml-backend.h").is_file():
        pytest.skip(f"llama.cpp's headers are not installed in {installed / 'include'}")
    headers = [path for folder in {source.parent for source in sources} for path in folder.glob("*.h")]
    needed = [*sources, *headers, installed / "lib" / "libggml-base.so"]
    with locked(out):
        if not out.is_file() or out.stat().st_mtime < max(path.stat().st_mtime for path in needed):
            part = out.with_suffix(".part")
            command = [
                compiler,
                "-std=c++17",
                "-O2",
                "-shared",
                "-fPIC",
                *flags,
                f"-I{installed / 'include'}",
                *sources,
            ]
            libraries = [f"-L{installed / 'lib'}", "-lggml-base", "-lggml", "-pthread"]
            subprocess.run([*command, "-o", part, *libraries], check=True)
            part.replace(out)
    return out


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make something once, though test processes run beside each other."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(out.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(runtime: Runtime, out: Path, *flags: str) -> Path:
    """Compile the tests' device."""
    strict = ["-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
    return compiled(runtime, out, sorted(HERE.glob("*.cpp")), *strict, *flags)


def ggml_source() -> Path:
    """Give ggml's folder of the pinned source package, fetched once; skips if it cannot be had."""
    root = BUILD / "source"
    with locked(root):
        folder = root / "vendor" / "llama.cpp" / "ggml"
        if not folder.is_dir():
            shutil.rmtree(root, ignore_errors=True)
            pin = (ROOT / "moetrace" / "host" / "pin.txt").read_text().strip()
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--no-build-isolation",
            ]
            where = ["--no-binary", ":all:", "--dest", str(root), pin]
            fetched = subprocess.run(
                [*command, *where], capture_output=True, text=True, timeout=300, check=False
            )
            if fetched.returncode != 0:
                pytest.skip(f"the source package of {pin} cannot be had: {fetched.stderr.strip()[-200:]}")
            (archive,) = root.glob("*.tar.gz")
            with tarfile.open(archive) as package:
                for member in package.getmembers():
                    member.name = member.name.partition("/")[2]
                    if member.name.startswith("vendor/llama.cpp/ggml/"):
                        package.extract(member, root, filter="data")
            archive.unlink()
    return folder


def build_rpc(runtime: Runtime) -> Path:
    """Compile llama.cpp's RPC backend as a library for ``GGML_BACKEND_PATH``."""
    source = ggml_source() / "src"
    files = [source / "ggml-rpc" / name for name in ("ggml-rpc.cpp", "transport.cpp")]
    flags = [
        "-DGGML_BACKEND_DL",
        "-DGGML_BACKEND_BUILD",
        "-DGGML_BACKEND_SHARED",
        "-DGGML_SHARED",
        f"-I{source}",
    ]
    return compiled(runtime, BUILD / "libggml-rpc.so", files, *flags)


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
    device: str | None = None,
    rpc: str | None = None,
) -> dict[str, Ran]:
    """Run host.py once, with these runs; by default on the CPU alone."""
    folder.mkdir(parents=True)
    job = folder / "job.json"
    job.write_text(
        json.dumps(
            {
                "model": str(model),
                "prompts": prompts,
                "traced": traced,
                "device": device,
                "rpc": rpc,
                "runs": runs,
            }
        )
    )
    command = [sys.executable, HOST, job]
    result = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, f"exit code {result.returncode}: {result.stderr[-4000:]}"
    return {name: Ran(folder, name) for name in runs}


def build_vulkan(runtime: Runtime) -> Path:
    """Build llama.cpp's Vulkan backend, once (twenty minutes on two cores); skips where what it needs is not there."""
    for name, what in (("glslc", "glslc"), ("cmake", "cmake"), ("ninja", "ninja-build")):
        if shutil.which(name) is None:
            pytest.skip(f"there is no {name}: apt-get install {what}")
    for package, file in (
        ("libvulkan-dev", "/usr/include/vulkan/vulkan.h"),
        ("spirv-headers", "/usr/share/cmake/SPIRV-Headers/SPIRV-HeadersConfig.cmake"),
        ("mesa-vulkan-drivers", LAVAPIPE),
    ):
        if not Path(file).exists():
            pytest.skip(f"there is no {file}: apt-get install {package}")
    source, folder = ggml_source(), BUILD / "vulkan"
    library = folder / "bin" / "libggml-vulkan.so"
    with locked(folder):
        if not library.is_file():
            log = BUILD / "vulkan.log"
            configure = ["cmake", "-G", "Ninja", "-S", HERE / "vulkan", "-B", folder, f"-DGGML={source}"]
            make = [
                "cmake",
                "--build",
                folder,
                "--target",
                "ggml-vulkan",
                "--parallel",
                str(os.cpu_count() or 1),
            ]
            with log.open("w") as said:
                for command in ([*configure, "-DCMAKE_BUILD_TYPE=Release"], make):
                    result = subprocess.run(command, stdout=said, stderr=said, check=False)
                    if result.returncode != 0:
                        pytest.skip(f"the Vulkan backend could not be built: see {log}")
    return library


#: the driver that computes on the CPU
LAVAPIPE = "/usr/share/vulkan/icd.d/lvp_icd.x86_64.json"
