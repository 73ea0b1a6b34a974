"""The options by which subcommands select rows and layers."""

from __future__ import annotations

import argparse

from moetrace.commands.options import add_option
from moetrace.errors import UsageError
from moetrace.trace.selection import Selection
from moetrace.trace.trace import Trace


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add ``--context``, ``--layers``, ``--label``, ``--request`` and ``--phase``."""
    add_option(
        parser, "--context", help="the llama context to look at, by name or number; the main one if not given"
    )
    add_option(parser, "--layers", help="layers, for example 0-5,23")
    add_option(parser, "--label", help="only requests with one of these labels, comma-separated")
    add_option(parser, "--request", help="only these requests, for example 0,7-9")
    add_option(parser, "--phase", choices=["prefill", "decode"], help="only this phase")


def context_of(args: argparse.Namespace) -> str | int | None:
    """Give the context that was asked for."""
    context: str | None = args.context
    return int(context) if context is not None and context.isdigit() else context


def select(trace: Trace, args: argparse.Namespace) -> Selection:
    """Select what was asked for."""
    return trace.sel(
        layer=numbers(args.layers, "--layers") if args.layers else None,
        label=args.label.split(",") if args.label else None,
        request=numbers(args.request, "--request") if args.request else None,
        phase=args.phase,
    )


def numbers(text: str, option: str) -> list[int]:
    """Read ``0-5,23`` as [0, 1, 2, 3, 4, 5, 23].

    Raises
    ------
    UsageError
        If it is no such list.
    """
    result: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or len(first) > 9 or len(last) > 9:
            raise UsageError(f"{option} {text} is no list of numbers", fix=f"write it like {option} 0-5,23")
        stop = int(last) if dash else int(first)
        if not 0 <= stop - int(first) < 1 << 20:
            raise UsageError(f"{option} {text} is no list of numbers", fix=f"write it like {option} 0-5,23")
        result += range(int(first), stop + 1)
    return result
