"""Recording what a program of one's own computes with llama-cpp-python in this process, or makes a server compute."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from moetrace.errors import TraceError, UsageError
from moetrace.host import llama
from moetrace.host.inprocess import tracing
from moetrace.host.options import CaptureOptions, CaptureSettings
from moetrace.trace.selection import Selection
from moetrace.trace.trace import Trace, open_trace
from moetrace.trace.writer import TraceWriter

_SETTLED_S = 1.0  # rows are sealed twice a second


class Recording:
    """What :func:`record` gives: where it records to, and the trace when it has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._trace: Trace | None = None

    @property
    def trace(self) -> Trace:
        """The trace, opened. Raises TraceError if nothing was computed."""
        if self._trace is None:
            if not self.path.is_dir():
                raise TraceError(
                    "nothing was recorded",
                    why="llama.cpp computed nothing with experts in this process meanwhile",
                    fix="call llama_cpp within, after `import moetrace; moetrace.watch_llama_cpp()`",
                )
            self._trace = open_trace(self.path)
        return self._trace


def watch_llama_cpp() -> None:
    """Let llama-cpp-python's calls be seen by the tracer in this process: before it is imported, once.

    llama-cpp-python calls llama.cpp past anything in between; here its functions that tell of batches, sequences and
    caches are led through the tracer's, which call llama.cpp's. What is not recorded runs as before.

    Raises
    ------
    RuntimeMissingError
        If llama-cpp-python is missing, or was imported before.
    """
    library = llama.tracer()
    api = llama.python_binding()
    package = sys.modules["llama_cpp"]
    for name in dir(api):
        there = getattr(api, name)
        if not (name.startswith("llama_") and hasattr(there, "argtypes") and hasattr(library, name)):
            continue
        seen = getattr(library, name)
        seen.argtypes, seen.restype = there.argtypes, there.restype
        for module in (api, package):
            if getattr(module, name, None) is there:
                setattr(module, name, seen)


@contextlib.contextmanager
def record(
    output: str | os.PathLike[str] | None = None,
    *,
    model: str | os.PathLike[str] | None = None,
    channels: str | Sequence[str] = ("experts", "weights"),
    force: bool = False,
    **options: Unpack[CaptureSettings],
) -> Iterator[Recording]:
    """Record what llama-cpp-python computes in this process within the block::

        moetrace.watch_llama_cpp()
        from llama_cpp import Llama
        llm = Llama("model.gguf")
        with moetrace.record(model="model.gguf") as recording:
            llm("Once upon a time")
        recording.trace.requests

    Parameters
    ----------
    output
        Trace folder to make; by default one in the system's temporary folder.
    model
        The GGUF file, for its vocabulary and fingerprint: a model that was loaded before does not say it.
    channels, force, options
        See :class:`moetrace.host.options.CaptureOptions`; ``force`` replaces a trace.

    Raises
    ------
    MoetraceError
        If this process is recording already, or the trace cannot be written.
    """
    chosen = CaptureOptions.of(channels, **options)
    watch_llama_cpp()
    made = Path(output) if output is not None else Path(tempfile.mkdtemp(prefix="moetrace-")) / "cell.moet"
    path = None if model is None else os.fspath(model)
    writer = TraceWriter(made, command=["moetrace", "record"], model_path=path, force=force)
    with tracing(writer, chosen, path or ""):
        yield Recording(made)


@contextlib.contextmanager
def new_rows(trace: Trace) -> Iterator[list[Selection]]:
    """Gather the rows that a live trace gets within the block: the list has them when it ends, one of each context.

    Rows of other clients of the server are among them. Raises UsageError if the trace has ended.
    """
    if not trace.live:
        raise UsageError(f"{trace.path} has ended", fix="name a trace that is being recorded")
    trace.refresh()
    before = {part.shown[0]: len(part) for part in trace.parts}
    found: list[Selection] = []
    try:
        yield found
    finally:
        time.sleep(_SETTLED_S)
        trace.refresh()
        for part in trace.parts:
            start = before.get(part.shown[0], 0)
            if len(part) > start:
                found.append(Selection(part, slice(start, len(part)), slice(None)))


def model_of(namespace: dict[str, Any]) -> str | None:
    """The model file of the only ``llama_cpp.Llama`` among some names; None if there is none, or several."""
    kind = getattr(sys.modules.get("llama_cpp"), "Llama", ())
    paths = {str(each.model_path) for each in list(namespace.values()) if kind and isinstance(each, kind)}
    return paths.pop() if len(paths) == 1 else None


def total(selections: Sequence[Selection]) -> int:
    """Rows of all."""
    return int(np.sum([len(each) for each in selections], dtype=np.int64))
