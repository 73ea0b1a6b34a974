"""Switching a live recording: what ``start``, ``stop`` and ``intervene`` share."""

from __future__ import annotations

import argparse
from pathlib import Path

from moetrace.commands.options import add_option
from moetrace.host.intervene import has_live, live_among, may_begin
from moetrace.trace.control import remember, remember_for_all
from moetrace.trace.ring import Ring


def add_which(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and ``--context``."""
    add_option(parser, "--model", metavar="NAME", help="only contexts of this model: its name, alias or file")
    add_option(parser, "--context", metavar="NAME", help="only this llama context, for example ctx0")


def switch(args: argparse.Namespace, *, paused: bool) -> int:
    """Switch recording on or off in the contexts of a live trace that are named; in all, if none is."""
    for line in switched(Path(args.trace), args.model, args.context, paused=paused):
        print(line)
    return 0


def switched(trace: Path, model: str | None, context: str | None, *, paused: bool) -> list[str]:
    """Switch recording on or off, and say what was done, a line for each context."""
    word = "paused" if paused else "recording"
    if model is None and context is None and may_begin(trace):
        remember_for_all(trace, paused=int(paused))
        if not has_live(trace):
            return [f"no model is loaded now; those that are loaded from now on: {word}"]
    said = []
    for path, _ in live_among(trace, model, context):
        with Ring(path) as ring:
            remember(ring, paused=int(paused))
            ring.paused = paused
            said.append(f"{path.parent.name}: {word}{' (asleep)' if ring.asleep else ''}")
    return said
