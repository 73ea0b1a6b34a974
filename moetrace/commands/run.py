"""``moetrace run``."""

from __future__ import annotations

import argparse
import contextlib
import sys

from moetrace.commands.capturing import (
    add_capture_options,
    add_intervene_option,
    capture_options,
    interventions_of,
    output_path,
    report_trace,
)
from moetrace.commands.options import add_option, red
from moetrace.commands.serve import add_listen, address, served
from moetrace.errors import MoetraceError, UsageError
from moetrace.host.server import TracedProcess, model_argument
from moetrace.printable import printable


class Run:
    """Run llama-server, or another program of llama.cpp, and record its routing.

    What stands right of -- is the program and its arguments; they are not touched. The program keeps its
    terminal, its signals and its exit code. Ctrl-C stops it as usual; what was recorded is kept. If moetrace
    itself is killed, the program goes on serving.

      moetrace run -o t.moet -- llama-server -m model.gguf -np 4 -c 8192
    """

    passthrough = True

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        add_option(
            parser, "-o", "--output", metavar="T.moet", help="the trace to write; default: MODEL-TIME.moet"
        )
        add_option(parser, "--force", action="store_true", help="replace the trace if it exists")
        add_option(
            parser, "--paused", action="store_true", help="begin without recording; see moetrace start"
        )
        add_option(parser, "-q", "--quiet", action="store_true", help="print nothing but errors and loss")
        add_capture_options(parser)
        add_intervene_option(parser)
        add_listen(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Run it."""
        if not args.rest:
            raise UsageError("what should run?", fix="moetrace run -o t.moet -- llama-server -m model.gguf")
        if args.listen:
            address(args.listen)  # before anything runs
        path = output_path(args, model_argument(args.rest))
        options = capture_options(args, paused=args.paused)
        told: list[MoetraceError] = []

        def on_error(error: MoetraceError) -> None:
            told.append(error)
            warn(error)

        traced = TracedProcess(
            args.rest,
            path,
            options,
            force=args.force,
            intervene=interventions_of(args.intervene),
            on_error=on_error,
            on_note=note,
        )
        with served(args, path):
            code = traced.wait()
        trouble: MoetraceError | None = None
        try:
            traced.finish(code)
            trouble = traced.nothing_seen()
        except MoetraceError as e:
            trouble = e
        if trouble is not None:
            if trouble not in told:
                warn(trouble)
            code = code or trouble.exit_code
        if not args.quiet and traced.recorded:
            with contextlib.suppress(OSError):  # standard error may be a file on a full disk
                report_trace(traced.trace.path)
        return code


def warn(trouble: MoetraceError) -> None:
    """Say at once what went wrong; the program goes on."""
    said = printable(str(trouble), keep="\n")
    print(f"{red('moetrace:', sys.stderr)} {said}", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Say at once what becomes of the recording."""
    print(f"moetrace: {printable(text)}", file=sys.stderr, flush=True)
