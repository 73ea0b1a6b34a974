"""Options that every recording command shares."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from moetrace.commands.options import Collect, add_option, red, typed
from moetrace.errors import InputError
from moetrace.host.options import CHANNELS, COLLECTORS, ON_FULL, CaptureOptions, human_size, parse_size
from moetrace.numbers import number
from moetrace.printable import printable
from moetrace.trace import naming
from moetrace.trace.remarks import remarks
from moetrace.trace.trace import Trace, open_trace


def add_capture_options(parser: argparse.ArgumentParser) -> None:
    """Add what to record, and how."""
    group = parser.add_argument_group("what to record")
    add_option(
        group,
        "--capture",
        metavar="CHANNELS",
        default="experts,weights",
        help=f"comma-separated: {', '.join(CHANNELS)}, tensor:NAME-PATTERN",
    )
    add_option(group, "--layers", metavar="LIST", default="", help="layers such as 0-5,23; default: all")
    add_option(group, "--collector", choices=COLLECTORS, default="auto", help="how tensors are read")
    group = parser.add_argument_group("the ring between llama.cpp and the trace")
    add_option(
        group,
        "--on-full",
        choices=ON_FULL,
        default="block",
        help="when the trace cannot be written fast enough: wait, lose the newest rows, or the oldest",
    )
    add_option(
        group, "--ring-size", metavar="SIZE", default="16MiB", help="memory of the ring of each context"
    )
    add_option(
        group, "--block-ms", metavar="N", type=int, default=10_000, help="longest wait of --on-full block"
    )


def add_intervene_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--intervene``, which may be given several times."""
    add_option(
        parser,
        "--intervene",
        action=Collect,
        metavar="SPEC",
        help="change the routing: ablate:7:3,12, force:*:5, bias:7:3=+1.5 or replay:OTHER.moet, with @slot=N or "
        "@request=ID for the tokens of one; @FILE: a file of them, one in each line; may be given several times",
    )


def interventions_of(given: Sequence[str] | None) -> list[str]:
    """What ``--intervene`` was given, with the lines of each ``@FILE`` in its place. A line that begins with # is a
    remark.

    Raises InputError if a file cannot be read or holds nothing.
    """
    out: list[str] = []
    for spec in given or []:
        if not spec.startswith("@"):
            out.append(spec)
            continue
        path = Path(spec[1:])
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{path} cannot be read", why=getattr(e, "strerror", None) or str(e)) from e
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise InputError(f"{path} holds no intervention", fix="write one in each line: bias:7:3=+0.1")
        out += found
    return out


def capture_options(args: argparse.Namespace, *, paused: bool = False) -> CaptureOptions:
    """Give the options that were chosen.

    Raises
    ------
    UsageError
        If one of them does not exist.
    """
    return CaptureOptions.of(
        args.capture,
        layers=args.layers,
        collector=args.collector,
        on_full=args.on_full,
        ring_size=parse_size(args.ring_size),
        block_ms=args.block_ms,
        paused=paused,
    )


def output_path(args: argparse.Namespace, model: str | None) -> Path:
    """Give ``-o``; without it, a name of the model's and the time: ``model-20260131-090500.moet``."""
    if args.output:
        return Path(args.output)
    stem = Path(model).stem if model else "routing"
    return Path(f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}.moet")


def report_trace(
    path: Path, stream: IO[str] = sys.stderr, *, following: Sequence[str] = ("info", "stats")
) -> None:
    """Say what was written, loudly what was lost, and what to type next: these subcommands."""
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    with open_trace(path, 0) as trace:
        several = len(trace.contexts) > 1
        if several:
            print(f"Wrote {path} ({human_size(size)}): {len(trace.contexts)} llama contexts", file=stream)
        for name in trace.contexts:
            context = trace.in_context(name)
            what = f"Wrote {path} ({human_size(size)})"
            if several:
                what = f"  {name} ({naming.role(context.facts)}, {context.model_name})"
            print(f"{what}: {_describe(context)}", file=stream)
            loss = context.loss
            lost = number(loss.rows_lost, "row")
            if loss.events_lost:
                lost += f" and {number(loss.events_lost, 'event')}"
            lost += " lost"
            bad = loss.rows_lost or loss.events_lost
            print(f"  {red(lost, stream) if bad else lost}; {_own_time(context)}", file=stream)
        for text in remarks(trace.store):
            print(f"  {red(printable(text), stream)}", file=stream)
    for i, command in enumerate(following):
        print(f"{'     ' if i else 'Next:'} {typed()} {command} {path}", file=stream)


def _describe(trace: Trace) -> str:
    requests = len(trace.requests)
    k = max(trace.n_expert_used)
    experts = max(trace.n_expert)
    return (
        f"{len(trace):,} tokens × {len(trace.layers)} layers × top-{k} of {experts} experts, "
        f"{number(requests, 'request')}"
    )


def _own_time(trace: Trace) -> str:
    counters = trace.facts.get("counters", {})
    entries = len(trace) * len(trace.layers)
    if not entries or "hook_ns" not in counters:
        return "no time measured"
    return f"the tracer's own code took {counters['hook_ns'] / entries:.0f} ns per token and layer"
