"""``moetrace report``."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from moetrace.commands.machines import add_machines, count_on
from moetrace.commands.options import add_option, paint
from moetrace.commands.placement import add_placement, placement
from moetrace.commands.progress import of_questions, progress_line
from moetrace.commands.selecting import add_choice
from moetrace.commands.showing import (
    RECORDINGS,
    add_keeping,
    add_leaving_out,
    add_units,
    opened,
    subject_of,
)
from moetrace.errors import InputError
from moetrace.findings import Finding, ask_each
from moetrace.report.files import Written, read_finding
from moetrace.trace.fleet import apart
from moetrace.trace.importers import CountTable
from moetrace.trace.trace import Trace


class Report:
    """Make a report of a trace: a page to look at, figures, tables.

    Asks every question that the recording can answer and writes into DIR: report.html, one file that needs no
    network and no other file; figures/ as SVG and PNG; tables/ as CSV, very long ones as Parquet where pyarrow is
    installed; each finding as JSON. Of a trace, of
    several taken together, of another program's recording (docs/import.md), or of a count table. Questions
    that need the model are asked if it is given (that takes a while); or ask them before, and name the folder:

      moetrace report t.moet
      moetrace analyze NAME -m model.gguf -o answers
      moetrace report t.moet --findings answers
      moetrace report t.moet --phase each
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("recordings", nargs="+", metavar="T.moet", help=RECORDINGS)
        add_leaving_out(parser)
        add_option(parser, "-o", "--output", metavar="DIR", help="folder; default: T-report")
        add_option(
            parser,
            "--phase",
            choices=["prefill", "decode", "unknown", "all", "each"],
            help="rows to look at; each: generated tokens, and prompts in a page of their own, linked",
        )
        add_option(
            parser, "--layers", metavar="LIST", help="layers to look at, for example 0-5,23; default: all"
        )
        add_units(parser)
        add_option(
            parser,
            "--findings",
            nargs="+",
            default=[],
            metavar="DIR",
            help="findings (JSON) that were made before",
        )
        add_option(
            parser,
            "-m",
            "--model",
            metavar="FILE",
            help="GGUF file: ask what needs the model, too; and look at the contexts of this model",
        )
        add_choice(parser, by_model=False)
        add_placement(parser)
        add_option(
            parser, "-s", "--seed", type=int, default=0, metavar="N", help="of permutations and bootstraps"
        )

        add_option(parser, "--no-texts", action="store_true", help="leave requests' texts out of the page")
        add_keeping(parser)
        add_machines(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Make it; 1 if a question failed."""
        from moetrace.report.page import write_part, write_report
        from moetrace.report.summary import summary

        # from the environment it comes as one text
        folders = args.findings.split(",") if isinstance(args.findings, str) else args.findings
        given = read_findings(folders)
        folder = Path(args.output or f"{Path(args.recordings[0]).stem}-report")
        failed = False
        with ExitStack() as stack:
            recordings = opened(args.recordings, args, stack)
            titles = _titles(recordings, args.recordings)
            for phase, where, others in _pages(args.phase):
                args.phase = phase
                with progress_line() as progress:
                    subject = subject_of(recordings, args, args.model, placement(args), progress)
                    count_on(args.on, subject, progress)
                    asked = ask_each(
                        subject,
                        given=given,
                        then=partial(write_part, folder=folder / where),
                        keep=not args.no_keep,
                        workers=None,
                        progress=of_questions(progress),
                    )
                    # one that ended too early wrote nothing
                    pairs = [(finding, part or Written(())) for finding, part in asked]
                findings, parts = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
                report = write_report(
                    subject,
                    findings,
                    folder / where,
                    titles,
                    parts,
                    with_texts=not args.no_texts,
                    others=others,
                )
                width = min(120, shutil.get_terminal_size().columns)
                sys.stdout.write(summary(report, width=width, paint=paint))
                failed |= any(finding.failed for finding in findings)
        return 1 if failed else 0


def _pages(phase: str | None) -> list[tuple[str | None, str, tuple[tuple[str, str], ...]]]:
    """Phase, folder, and links (words, address; "" is the page itself) of each page that is made."""
    if phase != "each":
        return [(phase, "", ())]
    generated, prompts = "generated tokens", "prompts"
    return [
        ("decode", "", ((generated, ""), (prompts, "prompts/report.html"))),
        ("prefill", "prompts", ((generated, "../report.html"), (prompts, ""))),
    ]


def _titles(recordings: Sequence[Trace | CountTable], given: Sequence[str]) -> list[str]:
    """What the recordings are called: as they were given, where each is one; else apart from each other."""
    if len(recordings) == len(given):
        return [Path(path).name for path in given]
    return apart([each.path for each in recordings if isinstance(each, Trace)])


def read_findings(paths: list[str]) -> list[Finding]:
    """Read findings from JSON files, or from all of them in a folder. Raises InputError if there are none."""
    out = []
    for path in map(Path, paths):
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not files:
            raise InputError(
                f"{path} holds no findings", fix="write them with `moetrace analyze NAME -o DIR`"
            )
        out += [read_finding(file) for file in files]
    return out
