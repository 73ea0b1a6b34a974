"""Switching a live recording: what ``start`` and ``stop`` share."""

from __future__ import annotations

import argparse
from pathlib import Path

from moetrace.trace.ring import live_rings


def switch(args: argparse.Namespace, *, paused: bool) -> int:
    """Switch recording on or off in all contexts of a live trace."""
    trace = Path(args.trace)
    for ring in live_rings(trace):
        ring.paused = paused
        print(f"{ring.path.parent.name}: {'paused' if paused else 'recording'}")
    return 0
