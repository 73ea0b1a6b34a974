"""``moetrace stats``."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from moetrace.commands.machines import add_machines, count_on
from moetrace.commands.options import add_option
from moetrace.commands.progress import of_questions, progress_line
from moetrace.commands.selecting import add_choice
from moetrace.commands.showing import (
    RECORDINGS,
    add_keeping,
    add_leaving_out,
    add_showing,
    opened,
    show,
    subject_of,
)
from moetrace.errors import UsageError
from moetrace.findings import QUESTIONS, ask_all, question


class Stats:
    """Print the statistics of a recording: every question that it can answer, with its tables.

    Of a trace, of several taken together (as if they were one), of another program's recording
    (docs/import.md), or of a count table. What cannot be answered says why. Tables named as_published
    hold published formulas, faults included, beside the sound ones.

      moetrace stats t.moet
      moetrace stats t.moet --only domain-separation,specialists --format csv > tables.csv
      moetrace stats monday.moet tuesday.moet -o results
      moetrace stats traces/ --as-published
      moetrace stats 'fleet/*.moet' --model NAME
      moetrace stats 'fleet/*.moet' --on tcp://scheduler:8786
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("recordings", nargs="+", metavar="T.moet", help=RECORDINGS)
        add_leaving_out(parser)
        add_option(
            parser,
            "--only",
            metavar="NAME,...",
            help="only these questions, as `moetrace analyze` names them",
        )
        add_option(
            parser,
            "--as-published",
            action="store_true",
            help="the published numbers alone: all phases together, and of per-token JSON the warm-up's rows",
        )
        add_choice(parser)
        add_showing(parser)
        add_keeping(parser)
        add_machines(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Ask every question; 1 if none could be answered, or one failed."""
        only = None if args.only is None else wanted(args.only)
        with ExitStack() as stack, progress_line() as progress:
            subject = subject_of(opened(args.recordings, args, stack), args, progress=progress)
            count_on(args.on, subject, progress)
            findings = ask_all(
                subject, only, keep=not args.no_keep, workers=None, progress=of_questions(progress)
            )
            return show(findings, args)


def wanted(only: str) -> list[str]:
    """The names in ``--only``, in the order given. Raises UsageError if there is no such question, or none at all."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--only {only!r} names no question", fix=f"choose among: {', '.join(QUESTIONS)}")
    return [question(name).name for name in names]
