"""``moetrace coverage``."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

import numpy as np

from moetrace.commands.options import add_option
from moetrace.commands.selecting import add_choice
from moetrace.commands.showing import add_leaving_out, add_showing, opened, show, subject_of
from moetrace.errors import UsageError
from moetrace.findings.coverage import Coverage as Question
from moetrace.trace.importers import CountTable

#: what is recorded where only an imatrix is looked at
NOTHING = CountTable((), np.empty(0, np.int64), np.empty((0, 0, 0), np.int64))


class Coverage:
    """Say which experts a calibration text has not reached, and write one that reaches them.

    The same as `moetrace analyze coverage`, which says how it is made. An imatrix alone is read, GGUF or the old
    format; beside it, or instead, a recording of prompts to choose from.

      moetrace coverage imatrix.gguf
      moetrace capture -m model.gguf -f pool.jsonl -n 1 -o pool.moet
      moetrace coverage imatrix.gguf --pool pool.moet --write calibration.txt
      llama-imatrix -m model.gguf -f calibration.txt -o new.gguf && moetrace coverage new.gguf
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument(
            "imatrix", nargs="?", default="", metavar="IMATRIX", help="a file of llama-imatrix"
        )
        add_option(
            parser,
            "--pool",
            nargs="+",
            default=[],
            metavar="T.moet",
            help="recordings of prompts to choose from",
        )
        add_option(
            parser,
            "--min-tokens",
            type=int,
            default=128,
            metavar="N",
            help="tokens that every expert should get",
        )
        add_option(
            parser, "--margin", type=float, default=1.25, metavar="X", help="so many times that is aimed at"
        )
        add_option(parser, "--write", default="", metavar="FILE", help="the chosen prompts' text")
        add_option(
            parser, "-m", "--model", metavar="FILE", help="GGUF file, for an imatrix of the old format"
        )
        add_choice(parser, by_model=False)
        add_leaving_out(parser)
        add_showing(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Ask it."""
        pool = args.pool.split(",") if isinstance(args.pool, str) else args.pool
        if not args.imatrix and not pool:
            raise UsageError(
                "what should be looked at?", fix="give a file of llama-imatrix, or --pool T.moet"
            )
        if args.write and not pool:
            raise UsageError(
                "there are no prompts to choose from", fix="give a recording of some: --pool T.moet"
            )
        asked = Question(args.imatrix, args.min_tokens, args.margin, args.write, max_tokens=0)
        with ExitStack() as stack:
            given = opened(pool, args, stack) if pool else [NOTHING]
            finding = asked.answer(subject_of(given, args, args.model))
        return show([finding], args)
