"""Switching a live recording: what ``start``, ``stop`` and ``status`` share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from moetrace.errors import TraceError
from moetrace.trace.ring import Ring, ring_is_ready
from moetrace.trace.store import ring_paths


def live_rings(trace: Path) -> Iterator[Ring]:
    """Give the rings of a trace that is being recorded, each open for the moment.

    Raises
    ------
    TraceError
        If the trace is not being recorded.
    """
    paths = [path for path in ring_paths(trace) if ring_is_ready(path)]
    if not paths:
        raise TraceError(
            f"{trace} is not being recorded",
            why="it has no live ring: the program has ended, or has not computed anything yet",
            fix="start a recording with `moetrace run`, and send the server a request",
        )
    for path in paths:
        with Ring(path) as ring:
            yield ring


def switch(args: argparse.Namespace, *, paused: bool) -> int:
    """Switch recording on or off in all contexts of a live trace."""
    trace = Path(args.trace)
    for ring in live_rings(trace):
        ring.paused = paused
        print(f"{ring.path.parent.name}: {'paused' if paused else 'recording'}")
    return 0
