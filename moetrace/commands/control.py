"""Switching a live recording: what ``start``, ``stop`` and ``intervene`` share."""

from __future__ import annotations

import argparse
from pathlib import Path

from moetrace.commands.options import add_option
from moetrace.host.intervene import live_among
from moetrace.trace.control import remember, remember_paused
from moetrace.trace.ring import Ring, ring_is_ready, ring_paths
from moetrace.trace.storage import is_locked


def add_which(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and ``--context``."""
    add_option(parser, "--model", metavar="NAME", help="only contexts of this model: its name, alias or file")
    add_option(parser, "--context", metavar="NAME", help="only this llama context, for example ctx0")


def switch(args: argparse.Namespace, *, paused: bool) -> int:
    """Switch recording on or off in the contexts of a live trace that are named; in all, if none is."""
    trace = Path(args.trace)
    everything = args.model is None and args.context is None
    word = "paused" if paused else "recording"
    if everything and is_locked(trace) and not any(ring_is_ready(path) for path in ring_paths(trace)):
        remember_paused(trace, paused)
        print(f"no model is loaded now; those that are loaded from now on: {word}")
        return 0
    for path, _ in live_among(trace, args.model, args.context):
        with Ring(path) as ring:
            ring.paused = paused
            remember(ring)
            print(f"{path.parent.name}: {word}{' (asleep)' if ring.asleep else ''}")
    if everything:
        remember_paused(trace, paused)
    return 0
