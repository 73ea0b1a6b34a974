"""``moetrace export``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moetrace.commands.options import add_option
from moetrace.commands.selecting import add_selection, open_chosen, select
from moetrace.errors import UsageError
from moetrace.trace.export import FORMATS, export
from moetrace.trace.trace import open_trace


class Export:
    """Write a trace for other programs.

    csv, jsonl, parquet and arrow hold one row per token, layer and rank; npz holds the columns as they are.
    parquet and arrow need pyarrow (pip install 'moetrace[arrow]').
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("trace", help="a trace folder")
        add_option(parser, "--format", choices=FORMATS, help="by default, what the output's name ends in")
        add_option(parser, "-o", "--output", default="-", help="the file to write; - is stdout")
        add_option(parser, "--force", action="store_true", help="replace the file if it exists")
        add_selection(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Write it."""
        output = Path(args.output)
        format_name = args.format or output.suffix[1:]
        if args.output == "-" and not args.format:
            raise UsageError("which format?", fix=f"give --format {'|'.join(FORMATS)}, or a file with -o")
        if args.output != "-" and output.exists() and not args.force:
            raise UsageError(f"{output} exists already", fix="give another name, or --force to replace it")
        with open_chosen(open_trace, args.trace, args) as trace:
            export(select(trace, args), args.output, format_name)
        if args.output != "-":
            print(f"Wrote {output} ({output.stat().st_size:,} bytes)", file=sys.stderr)
        return 0
