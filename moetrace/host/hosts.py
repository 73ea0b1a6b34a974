"""The processes that are recorded: which they are, which still run, and which run without the tracer.

A program that is run need not be llama.cpp itself: it may be a shell, a wrapper, or start servers of its own. What
/proc says of their memory and environment tells; where there is none, only the rings do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moetrace.host.runtime import PRELOAD
from moetrace.trace.ring import peek_writer, process_alive, ring_paths

_PROC = Path("/proc")
_PRELOAD = f"{PRELOAD}=".encode()


@dataclass(frozen=True)
class Process:
    """What is known of a process that computes with llama.cpp.

    Attributes
    ----------
    pid, name
        Its number, and its program's name ("" if nobody says).
    traced
        Whether the tracer's library is loaded in it.
    told
        Whether its environment names the tracer's library.
    """

    pid: int
    name: str
    traced: bool
    told: bool


def maps_file(pid: int, path: Path) -> bool:
    """Whether a process that is seen from here has a file mapped."""
    try:
        return f" {path.resolve()}\n" in (_PROC / str(pid) / "maps").read_text(errors="replace")
    except OSError:
        return False


def running_hosts(trace: Path) -> dict[int, str]:
    """Give the processes that record into a trace, or may yet, and run: number -> program.

    Those that have made a ring there, and those that were started to record there and have loaded llama.cpp.
    """
    hosts = {
        pid for path in ring_paths(trace) if process_alive(pid := peek_writer(path)) and _may_write(pid, path)
    }
    hosts |= {pid for pid in _started_for(trace) if process_alive(pid) and _llama_in(_maps(pid))}
    return {pid: _name(pid) for pid in sorted(hosts - {os.getpid()})}


def starting_hosts(trace: Path) -> bool:
    """Whether a process runs that was started to record into a trace, and has not loaded llama.cpp, or not yet."""
    return any(process_alive(pid) and not _llama_in(_maps(pid)) for pid in _started_for(trace))


def _started_for(trace: Path) -> Iterator[int]:
    """Give the processes whose environment has the tracer's library in it and names the trace."""
    setting = f"MOETRACE_TRACE={trace.absolute()}".encode()
    for pid in _processes():
        variables = _read(pid, "environ").split(b"\0")
        if setting in variables and any(b"libmoetrace" in v for v in variables if v.startswith(_PRELOAD)):
            yield pid


def _may_write(pid: int, ring: Path) -> bool:
    """Whether a process can be what made a ring: its number may be another's by now."""
    maps = _maps(pid)
    return not maps or "/libmoetrace" in maps or str(ring.resolve()) in maps


def llama_processes(pid: int) -> list[Process]:
    """Give those of a process and its descendants that have loaded llama.cpp as a library."""
    found, left = [], [pid]
    while left:
        pid = left.pop()
        maps = _maps(pid)
        if _llama_in(maps):
            told = b"libmoetrace" in _read(pid, "environ")
            found.append(Process(pid, _name(pid), "/libmoetrace" in maps, told))
        left += _children(pid)
    return found


def _processes() -> list[int]:
    try:
        return [int(path.name) for path in _PROC.iterdir() if path.name.isdigit()]
    except OSError:
        return []


def _children(pid: int) -> list[int]:
    children: list[int] = []
    try:
        for thread in (_PROC / str(pid) / "task").iterdir():
            children += map(int, (thread / "children").read_text().split())
    except OSError:
        pass
    return children


def _read(pid: int, name: str) -> bytes:
    try:
        return (_PROC / str(pid) / name).read_bytes()
    except OSError:
        return b""


def _maps(pid: int) -> str:
    return _read(pid, "maps").decode("utf-8", "replace")


def _llama_in(maps: str) -> bool:
    return "/libggml" in maps or "/libllama" in maps


def _name(pid: int) -> str:
    return _read(pid, "comm").decode("utf-8", "replace").strip()
