"""Switching a live recording: what ``start``, ``stop`` and ``intervene`` share."""

from __future__ import annotations

import argparse
from pathlib import Path

from moetrace.commands.options import add_option
from moetrace.host.intervene import live_among
from moetrace.trace.ring import Ring


def add_which(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and ``--context``."""
    add_option(parser, "--model", metavar="NAME", help="only contexts of this model: its name, alias or file")
    add_option(parser, "--context", metavar="NAME", help="only this llama context, for example ctx0")


def switch(args: argparse.Namespace, *, paused: bool) -> int:
    """Switch recording on or off in the contexts of a live trace that are named; in all, if none is."""
    for path, _ in live_among(Path(args.trace), args.model, args.context):
        with Ring(path) as ring:
            ring.paused = paused
            print(f"{path.parent.name}: {'paused' if paused else 'recording'}")
    return 0
