"""``moetrace export``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moetrace.analysis.counts.chosen import in_text
from moetrace.commands.options import add_option
from moetrace.commands.progress import progress_bar
from moetrace.commands.selecting import add_selection, open_chosen, select
from moetrace.errors import UsageError
from moetrace.trace.export import (
    FORMATS,
    ROUTED,
    TIMELINE,
    export,
    export_profile,
    export_routed,
    export_timeline,
)
from moetrace.trace.lake import PARTITIONS, write_lake
from moetrace.trace.profiles import PROFILES
from moetrace.trace.trace import open_trace


class Export:
    """Write a trace for other programs.

    csv, jsonl, parquet and arrow hold one row per token, layer and rank; npz holds the columns as they are. A folder
    (a name that ends in /, or --partition-by) is a lake: Parquet files of many traces, one row per token and layer,
    which `moetrace import` reads back as they were (docs/lake.md). parquet, arrow and lakes need pyarrow
    (pip install 'moetrace[arrow]'). routed-experts holds an array (tokens, layers, experts) of each request, for
    replay: .npz, or JSON lines with base64 (docs/live.md). timeline is JSON for Perfetto: requests by slot, and when.
    The last ones are profiles: how often each expert was used, as these engines take it to place experts
    (docs/import.md, "Profiles").
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("trace", nargs="+", help="a trace folder; several go into a lake")
        add_option(
            parser,
            "--format",
            choices=[*FORMATS, ROUTED, TIMELINE, *PROFILES],
            help="by default, what the output's name ends in",
        )
        add_option(parser, "-o", "--output", default="-", help="the file to write; - is stdout")
        add_option(parser, "--force", action="store_true", help="replace the file if it exists")
        help_ = f"folders of the lake: {','.join(PARTITIONS)} (the default), some of them, or none ('')"
        add_option(parser, "--partition-by", metavar="LIST", help=help_)
        add_selection(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Write it."""
        output = Path(args.output)
        if args.partition_by is not None or args.output.endswith("/"):
            return self._lake(args, output)
        if len(args.trace) > 1:
            raise UsageError(
                "a file takes one trace", fix="export them one by one, or into a lake: -o FOLDER/"
            )
        format_name = args.format or output.suffix[1:]
        if args.output == "-" and not args.format:
            raise UsageError("which format?", fix=f"give --format {'|'.join(FORMATS)}, or a file with -o")
        if args.output != "-" and output.exists() and not args.force:
            raise UsageError(f"{output} exists already", fix="give another name, or --force to replace it")
        if format_name in (ROUTED, TIMELINE):
            return self._whole(args, format_name)
        if format_name in PROFILES:
            return self._profile(args, format_name)
        with open_chosen(open_trace, args.trace[0], args) as trace:
            export(select(trace, args), args.output, format_name)
        if args.output != "-":
            print(f"Wrote {output} ({output.stat().st_size:,} bytes)", file=sys.stderr)
        return 0

    def _whole(self, args: argparse.Namespace, format_name: str) -> int:
        """Write whole requests, and say which are left out; or when they were."""
        selecting = ("layers", "label", "request", "phase")
        if chosen := [name for name in selecting if getattr(args, name) is not None]:
            raise UsageError(
                f"{format_name} holds whole requests: --{chosen[0]} chooses nothing",
                fix="choose when you read it",
            )
        with open_chosen(open_trace, args.trace[0], args) as trace:
            left = []
            if format_name == ROUTED:
                left = export_routed(trace, args.output)
            else:
                export_timeline(trace, args.output)
        for number, why in left:
            print(f"Request {number} is left out: {why}", file=sys.stderr)
        if args.output != "-":
            size = Path(args.output).stat().st_size
            print(f"Wrote {args.output} ({size:,} bytes)", file=sys.stderr)
        return 0

    def _profile(self, args: argparse.Namespace, profile: str) -> int:
        """Write how often each expert was used, and say what that rests on."""
        if args.layers is not None:
            raise UsageError(
                "a profile is of all layers: what is left out would be cold", fix="leave out --layers"
            )
        with open_chosen(open_trace, args.trace[0], args) as trace:
            n_layer = trace.facts.get("model", {}).get("n_layer") or 0
            said = export_profile(select(trace, args), args.output, profile, n_layer=n_layer)
        print(f"Wrote {args.output}: {said}" if args.output != "-" else said, file=sys.stderr)
        return 0

    def _lake(self, args: argparse.Namespace, lake: Path) -> int:
        """Add whole traces to a lake."""
        if args.output == "-" or args.format:
            raise UsageError("a lake is a folder of Parquet files", fix="give -o FOLDER/, without --format")
        selecting = ("context", "of_model", "layers", "label", "request", "phase")
        if chosen := [name.removeprefix("of_") for name in selecting if getattr(args, name) is not None]:
            raise UsageError(
                f"a lake holds whole traces: --{chosen[0]} chooses nothing", fix="choose when you read it"
            )
        partition_by = (
            PARTITIONS if args.partition_by is None else [p for p in args.partition_by.split(",") if p]
        )
        entries = 0
        for path in args.trace:
            with open_trace(path, 0) as trace, progress_bar(f"exporting {path}") as progress:
                done = write_lake(
                    trace,
                    lake,
                    partition_by=partition_by,
                    in_text=in_text,
                    force=args.force,
                    progress=progress,
                )
            entries += done.entries
        print(
            f"Wrote {entries:,} rows (token × layer) of {len(args.trace):,} traces into {lake}",
            file=sys.stderr,
        )
        return 0
