"""Finding llama.cpp, and loading the tracer into it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moetrace.errors import RuntimeMissingError

PRELOAD = "DYLD_INSERT_LIBRARIES" if sys.platform == "darwin" else "LD_PRELOAD"
#: what the tracer reads from its environment (csrc/config.cpp)
VARIABLES = tuple(
    f"MOETRACE_{key}"
    for key in (
        *("TRACE", "CAPTURE", "LAYERS", "COLLECTOR", "ON_FULL", "RING_SIZE", "BLOCK_MS", "PAUSED"),
        "INTERVENTION",
    )
)
_INSTALL = "install the pinned runtime with `moetrace setup`, or name your own binary by its path"


def preload_path() -> Path:
    """Give the tracer's library, to be preloaded.

    Raises
    ------
    RuntimeMissingError
        If the package was not built with it.
    """
    folder = Path(__file__).resolve().parent.parent
    for name in ("libmoetrace.so", "libmoetrace.dylib"):
        if (folder / name).is_file():
            return folder / name
    # an editable install keeps the built libraries elsewhere on the package's path
    spec = importlib.util.find_spec("moetrace._native")
    if spec is not None and spec.origin is not None:
        for path in Path(spec.origin).parent.glob("libmoetrace.*"):
            return path
    raise RuntimeMissingError(
        "the tracer's library is missing from this installation",
        why=f"there is no libmoetrace in {folder}",
        fix="install moetrace with `pip install .`, which builds it",
    )


#: where else programs of llama.cpp are put
_PLACES = (
    "/home/linuxbrew/.linuxbrew/bin",
    "/opt/homebrew/bin",
    "/usr/local/bin",
    "~/llama.cpp/build/bin",
)


def find_tool(name: str) -> Path:
    """Find a llama.cpp program: a path as it is; else what MOETRACE_LLAMA_SERVER names, or lies beside it; else on
    PATH; else beside an installed llama-cpp-python; else where Homebrew, or llama.cpp's own build in one's home, puts
    it.

    Raises
    ------
    RuntimeMissingError
        If there is none.
    """
    if os.sep in name:
        if not Path(name).is_file():
            raise RuntimeMissingError(f"there is no program {name}", fix="check the path")
        return Path(name)
    told = os.environ.get("MOETRACE_LLAMA_SERVER", "")
    if told and name == "llama-server":
        return find_tool(os.path.abspath(told))  # noqa: PTH100 - it need not exist
    if told and (beside := Path(told).absolute().with_name(name)).is_file():
        return beside
    if found := shutil.which(name):
        return Path(found)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is not None and spec.origin is not None:
        beside = Path(spec.origin).parent.parent / "bin" / name
        if beside.is_file():
            return beside
    for place in _PLACES:
        if (found_there := Path(place).expanduser() / name).is_file():
            return found_there
    raise RuntimeMissingError(
        f"{name} was not found",
        why="it is neither on PATH, nor named by MOETRACE_LLAMA_SERVER, nor beside an installed llama-cpp-python",
        fix=_INSTALL,
    )


def preload_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Give ``base`` with the tracer's library added to the preload list, and without variables that steer it."""
    libraries = [str(preload_path()), base.get(PRELOAD, "")]
    kept = {name: value for name, value in base.items() if name not in VARIABLES}
    return {**kept, PRELOAD: ":".join(filter(None, libraries))}


def is_preloaded() -> bool:
    """Whether this process was started with the tracer's library."""
    return str(preload_path()) in os.environ.get(PRELOAD, "").split(":")


def load_tracer(mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL:
    """Load the tracer's library into this process; what its environment says is not for it."""
    with _hidden(() if is_preloaded() else VARIABLES):
        return ctypes.CDLL(str(preload_path()), mode=mode)


@contextlib.contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    old = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(old)


def loaded_libraries(program: Path) -> dict[str, str]:
    """Give the shared libraries that a program links: name -> path ("" if not found).

    Empty for a static program, a script, or where ``ldd`` is missing.
    """
    try:
        run = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    libraries = {}
    for line in run.stdout.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        if arrow:
            path = rest.rsplit(" (", 1)[0].strip()
            libraries[name] = "" if path == "not found" else path
    return libraries


@dataclass(frozen=True)
class Probe:
    """What the tracer finds in a llama.cpp (``moetrace doctor``).

    Attributes
    ----------
    attached
        Whether the layout of its tensors was recognised.
    error
        Why not.
    ggml
        Its version, as far as it tells.
    symbols
        Functions that the tracer takes over -> whether they exist.
    """

    attached: bool
    error: str
    ggml: str
    symbols: dict[str, bool]


def probe(libraries: Mapping[str, str]) -> Probe:
    """Load the libraries of :func:`loaded_libraries` in a fresh process and look at them; no model is loaded.

    Raises
    ------
    RuntimeMissingError
        If they cannot be loaded.
    """
    paths = [path for name, path in libraries.items() if path and ("ggml" in name or "llama" in name)]
    code = "from moetrace.host import runtime; import sys; runtime._probe_here(sys.argv[1:])"
    run = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False, timeout=120
    )
    if run.returncode != 0:
        raise RuntimeMissingError(
            "the libraries of llama.cpp cannot be loaded",
            why=(run.stderr.strip().splitlines() or ["the process died"])[-1],
            fix="run the program itself once: if it does not start either, reinstall it",
        )
    found = json.loads(run.stdout)
    return Probe(found["attached"], found["error"], found["ggml"], found["symbols"])


def _probe_here(paths: list[str]) -> None:
    for path in paths:
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    tracer = load_tracer()
    tracer.moetrace_probe.restype = ctypes.c_size_t
    buffer = ctypes.create_string_buffer(1 << 16)
    tracer.moetrace_probe(buffer, ctypes.c_size_t(len(buffer)))
    sys.stdout.write(buffer.value.decode())
