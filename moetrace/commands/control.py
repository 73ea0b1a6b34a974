"""Switching a live recording: what ``start``, ``stop`` and ``intervene`` share."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from moetrace.commands.options import add_option
from moetrace.host.intervene import has_live, live_among, may_begin
from moetrace.trace.control import remember, remember_for_all
from moetrace.trace.ring import Ring


def add_which(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``, ``--context`` and ``--json``."""
    add_option(parser, "--model", metavar="NAME", help="only contexts of this model: its name, alias or file")
    add_option(parser, "--context", metavar="NAME", help="only this llama context, for example ctx0")
    add_option(parser, "--json", action="store_true", help="print JSON")


@dataclass(frozen=True)
class Switched:
    """What became of a context; ``context`` is None where none is loaded, and of those to come it will hold."""

    context: str | None
    state: str
    asleep: bool = False

    def __str__(self) -> str:
        if self.context is None:
            return f"no model is loaded now; those that are loaded from now on: {self.state}"
        return f"{self.context}: {self.state}{' (asleep)' if self.asleep else ''}"


def switch(args: argparse.Namespace, *, paused: bool) -> int:
    """Switch recording on or off in the contexts of a live trace that are named; in all, if none is."""
    done = switched(Path(args.trace), args.model, args.context, paused=paused)
    print(json.dumps([asdict(one) for one in done]) if args.json else "\n".join(map(str, done)))
    return 0


def switched(trace: Path, model: str | None, context: str | None, *, paused: bool) -> list[Switched]:
    """Switch recording on or off, and say what was done of each context."""
    state = "paused" if paused else "recording"
    if model is None and context is None and may_begin(trace):
        remember_for_all(trace, paused=int(paused))
        if not has_live(trace):
            return [Switched(None, state)]
    done = []
    for path, _ in live_among(trace, model, context):
        with Ring(path) as ring:
            remember(ring, paused=int(paused))
            ring.paused = paused
            done.append(Switched(path.parent.name, state, ring.asleep))
    return done
