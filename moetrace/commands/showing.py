"""What the commands that answer questions share: which rows to look at, and how findings are shown."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from moetrace.commands.options import add_option
from moetrace.commands.selecting import open_chosen
from moetrace.errors import MoetraceError, TraceError
from moetrace.findings import Finding, Subject
from moetrace.numbers import numbers
from moetrace.printable import printable
from moetrace.report.files import write_finding
from moetrace.report.text import FORMATS, rendered
from moetrace.trace.fleet import Traces, apart
from moetrace.trace.importers import CountTable, open_source
from moetrace.trace.trace import Trace


def add_showing(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_option(parser, "--phase", choices=["prefill", "decode", "unknown", "all"], help="rows to look at")
    add_option(parser, "--layers", metavar="LIST", help="layers to look at, for example 0-5,23; default: all")
    add_option(
        parser, "-s", "--seed", type=int, default=0, metavar="N", help="of permutations and bootstraps"
    )
    add_units(parser)
    add_option(parser, "--format", choices=FORMATS, default="table", help="of what is printed")
    add_option(
        parser, "--max-rows", type=int, default=20, metavar="N", help="rows of a printed table; 0: all"
    )
    add_option(parser, "-o", "--output", metavar="DIR", help="write JSON, CSV and figures there")


def add_units(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which prompts are one observation, and which can be exchanged."""
    add_option(
        parser,
        "--group-key",
        metavar="KEY",
        help="prompts whose lines in the prompts file have the same KEY are one observation; id: each by itself;"
        " default: those of one group, and those whose texts begin alike",
    )
    add_option(
        parser,
        "--strata",
        default="auto",
        metavar="KEY",
        help="tests exchange prompts with the same KEY only; length: those about as long; none: all; auto: length where"
        " domains' prompts differ in it",
    )


def add_keeping(parser: argparse.ArgumentParser) -> None:
    """Add the option of those who ask many questions."""
    add_option(
        parser,
        "--no-keep",
        action="store_true",
        help="ask all anew, and keep no answers in the trace's folder",
    )


#: what commands that take many are given
RECORDINGS = "traces of one model, or recordings; patterns, folders or addresses (s3://…) of traces"


def add_leaving_out(parser: argparse.ArgumentParser) -> None:
    """Add the option of those who open many."""
    help_ = "go on without traces that cannot be read, naming them"
    add_option(parser, "--leave-out-unreadable", action="store_true", help=help_)


def opened(paths: Sequence[str], args: argparse.Namespace, stack: ExitStack) -> list[Trace | CountTable]:
    """Open traces, other programs' recordings and count tables, as ``args`` choose; ``stack`` closes them."""
    leave_out = getattr(args, "leave_out_unreadable", False)
    out: list[Trace | CountTable] = []
    failed: MoetraceError | None = None
    for path in paths:
        opener = partial(
            open_source,
            unreadable="leave out" if leave_out else "raise",
            as_published=getattr(args, "as_published", False),
        )
        try:
            recording: Trace | CountTable | Traces = open_chosen(opener, path, args)
        except TraceError as e:
            if not leave_out:
                raise
            failed = e
            print(f"{printable(path)} is left out: {printable(e.why or e.what)}", file=sys.stderr)
            continue
        if isinstance(recording, CountTable):
            out.append(recording)
            continue
        stack.enter_context(recording)
        if isinstance(recording, Trace):
            out.append(recording)
            continue
        for left in recording.left_out:
            print(f"{printable(left[0])} is left out: {printable(left[1])}", file=sys.stderr)
        out += recording
    if failed is not None and not out:
        raise failed
    return out


def subject_of(
    recordings: Sequence[Trace | CountTable],
    args: argparse.Namespace,
    model: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Subject:
    """The subject that the options of :func:`add_showing` describe."""
    return Subject(
        recordings,
        names=apart([r.path for r in recordings if isinstance(r, Trace)]),
        phase=args.phase or ("all" if getattr(args, "as_published", False) else None),
        model=Path(model) if model else None,
        model_options=model_options,
        seed=args.seed,
        layers=numbers(args.layers, "--layers") if args.layers else None,
        group_key=args.group_key,
        strata=args.strata,
        progress=progress,
    )


AS_PUBLISHED = "as_published_"


def as_published(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Of those that have published tables, these alone."""
    for finding in findings:
        tables = {name: table for name, table in finding.tables.items() if name.startswith(AS_PUBLISHED)}
        if finding.not_answered is not None or tables:
            said = ("Published formulas, faults included (docs/published.md): no intervals, no sound tests.",)
            yield dataclasses.replace(finding, tables=tables, sentences=said if tables else (), caveats=())


def show(findings: Iterable[Finding], args: argparse.Namespace) -> int:
    """Print findings as they come, and write them where ``-o`` says; gives the exit code.

    That is 1 if none was answered, or one failed.
    """
    answered = failed = False

    def written() -> Iterator[Finding]:
        nonlocal answered, failed
        for finding in findings:
            answered |= finding.not_answered is None
            failed |= finding.failed
            yield finding
            if args.output:
                for path in write_finding(finding, Path(args.output)).files:
                    print(f"Wrote {path}", file=sys.stderr)

    shown = as_published(written()) if getattr(args, "as_published", False) else written()
    for piece in rendered(shown, args.format, max_rows=args.max_rows or None):
        raw = args.format in ("csv", "json") and sys.stdout.isatty()  # names that others chose, as they are
        sys.stdout.write(printable(piece, keep="\n") if raw else piece)
        sys.stdout.flush()
    return 0 if answered and not failed else 1
