"""``moetrace import``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

from moetrace.commands.options import add_option, typed
from moetrace.errors import UsageError
from moetrace.trace.importers import DESCRIBED, FORMATS, Imported, import_trace
from moetrace.trace.store import META_NAME

_LEFT_OUT = {
    "rows_all_experts": "{n:,} rows left out: they ran every expert, as llama.cpp's warm-up does",
    "records_unplaced": "{n:,} records of the last layer left out: the source does not say whose they are",
    "lines_left_out": "{n:,} lines of another kind left out: import them with another --format",
}


class Import:
    """Turn a recording of another program into a trace.

    Reads per-token JSON (DOMAIN/traces/token-NNNNN.json), `layer_id,expert_ids` and `gate_input` logs, route_trace,
    OLMoE's JSON lines, expert fingerprints, arrays of routed experts, and lakes of `moetrace export`; --list shows
    each. What the source does not say is marked missing; see docs/import.md.

      moetrace import --list
      moetrace import run.route.csv -o t.moet
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("source", metavar="SOURCE", nargs="?", help="the file or folder to read")
        add_option(parser, "-o", "--output", metavar="T.moet", help="the trace to make")
        add_option(parser, "--list", action="store_true", help="show what is read, with an example of each")
        add_option(parser, "--force", action="store_true", help="replace a trace of that name")
        formats = [name for name in FORMATS if name not in ("counts", "imatrix")]
        add_option(parser, "--format", choices=formats, help="default: found out from the source")
        help_ = "experts of a layer (default: the highest id seen + 1)"
        add_option(parser, "--n-expert", type=int, metavar="N", help=help_)
        help_ = "experts per token (default: 4 for token-json, the fewest on a line for expert-log, which lacks it if"
        help_ += " each line has one expert)"
        add_option(parser, "--n-expert-used", type=int, metavar="K", help=help_)
        help_ = "domain of the requests of a log (default: the file's name)"
        add_option(parser, "--label", default="", metavar="TEXT", help=help_)
        help_ = "keep the warm-up's rows and guess, as published analyses did (docs/import.md)"
        add_option(parser, "--as-published", action="store_true", help=help_)

        add_option(parser, "--trace", metavar="NAME", help="which trace of a lake (default: the only one)")
        add_option(
            parser, "--json", action="store_true", help="print JSON: what was read, and what was not there"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Import, and say what was not there and what was left out."""
        if args.list:
            for name, (what, example) in DESCRIBED.items():
                print(f"{name:<16}{what}\n" + textwrap.indent(example, " " * 16))
            return 0
        if not args.source or not args.output:
            raise UsageError("what should be imported, and where to?", fix="moetrace import SOURCE -o T.moet")
        for name in ("n_expert", "n_expert_used"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: there is at least one")
        on_terminal = sys.stderr.isatty()

        def progress(rows: int) -> None:
            if on_terminal:
                print(f"\r\x1b[K{rows:,} tokens …", end="", file=sys.stderr, flush=True)

        out = Path(args.output)
        replaces = args.force and (out / META_NAME).exists()
        done = import_trace(
            args.source,
            out.with_name(f".{out.name}.{os.getpid()}") if replaces else out,
            format=args.format,
            n_expert=args.n_expert,
            n_expert_used=args.n_expert_used,
            label=args.label,
            as_published=args.as_published,
            trace=args.trace,
            progress=progress,
        )
        if on_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if replaces:  # only now that the new one is whole
            shutil.rmtree(out)
            done.path.rename(out)
        if args.json:
            print(json.dumps({**asdict(done), "path": str(out)}, indent=1))
        else:
            print(summary(replace(done, path=out)))
        return 0


def summary(done: Imported) -> str:
    """What was read, what the source does not say, what was left out, and the next command."""
    lines = [
        f"Wrote {done.path}: {done.rows:,} tokens of {done.requests:,} requests, from {done.format}",
        *([f"Not in the source: {', '.join(done.missing)}"] if done.missing else []),
    ]
    lines += [text.format(n=n) for name, text in _LEFT_OUT.items() if (n := getattr(done.tally, name))]
    return "\n".join([*lines, f"Next: {typed()} info {done.path}"])
