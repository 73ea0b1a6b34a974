"""The options by which subcommands select rows and layers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from moetrace.commands.options import add_option
from moetrace.errors import UsageError
from moetrace.numbers import numbers
from moetrace.trace.contexts import of_model
from moetrace.trace.selection import Selection
from moetrace.trace.store import META_NAME, TraceStore
from moetrace.trace.trace import Trace

Opened = TypeVar("Opened")


def add_choice(parser: argparse.ArgumentParser, *, by_model: bool = True) -> None:
    """Add ``--context`` and, for commands that take no model file, ``--model``."""
    add_option(
        parser,
        "--context",
        metavar="NAME",
        help="the llama context to look at, by name or number; default: the main ones, which must be of one model",
    )
    if by_model:
        add_option(
            parser,
            "--model",
            metavar="NAME",
            dest="of_model",
            help="only contexts of this model: its name, alias, or file (of a recording of several models)",
        )


def open_chosen(opener: Callable[..., Opened], path: str, args: argparse.Namespace) -> Opened:
    """Open a recording with the contexts that the options of :func:`add_choice` choose.

    ``opener`` takes a path, a context and a model. Contexts that are not shown are named on stderr. Where ``--model``
    is a model file (``args.model``), it chooses the contexts of that model, if there are such.
    """
    context: str | int | None = args.context
    if isinstance(context, str) and context.isdecimal():
        context = int(context)
    model = getattr(args, "of_model", None)
    file = getattr(args, "model", None)
    if file and context is None and (Path(path) / META_NAME).exists():
        store = TraceStore(path)
        model = file if of_model(store.contexts, file) else None
    opened = opener(path, context, model)
    for sentence in opened.left_out if isinstance(opened, Trace) else ():
        print(f"{path}: {sentence}", file=sys.stderr)
    return opened


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add ``--context``, ``--model``, ``--layers``, ``--label``, ``--request`` and ``--phase``."""
    add_choice(parser)
    add_option(parser, "--layers", help="layers, for example 0-5,23")
    add_option(parser, "--label", help="only requests with one of these labels, comma-separated")
    add_option(
        parser,
        "--request",
        help="only these requests, by number or the client's id, for example 0,7-9 or code-02",
    )
    add_option(parser, "--phase", choices=["prefill", "decode"], help="only this phase")


def select(trace: Trace, args: argparse.Namespace) -> Selection:
    """Select what was asked for."""
    return trace.sel(
        layer=numbers(args.layers, "--layers") if args.layers else None,
        label=args.label.split(",") if args.label else None,
        request=_requests(args.request, trace) if args.request else None,
        phase=args.phase,
    )


def _requests(text: str, trace: Trace) -> list[int | str]:
    """Read ``0,7-9`` as numbers, anything else as ids: the whole text if it is one, else each part."""
    try:
        return list(numbers(text, "--request"))
    except UsageError:
        if (trace.requests["id"].dropna().astype(str) == text).any():
            return [text]
    out: list[int | str] = []
    for part in text.split(","):
        try:
            out += numbers(part, "--request")
        except UsageError:
            out.append(part.strip())
    return out
