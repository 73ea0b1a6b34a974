"""``moetrace recover``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from moetrace.commands.options import add_option, red, typed
from moetrace.printable import printable
from moetrace.trace.recover import recover


class Recover:
    """Mend a trace whose recorder died, and close it.

    What the host had committed is read out of the ring, requests that ran are listed, headers are set right.
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("trace", help="a trace folder")
        add_option(
            parser,
            "--cut",
            action="store_true",
            help="where a table is damaged inside, give up what lies behind the damage",
        )

        add_option(parser, "--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Recover, and say what was."""
        result = recover(args.trace, cut=args.cut)
        if args.json:
            print(json.dumps({**asdict(result), "path": str(result.path)}, indent=1))
            return 0
        for name in result.headers:
            print(f"header set right: {name}")
        for context in result.contexts:
            line = f"{context.name}: {context.sealed:,} rows were safe, {context.recovered:,} recovered"
            if context.torn:
                line += ", " + red(f"{context.torn:,} records were not whole")
            if context.lost is None:
                line += ", " + red("how many were lost is not known")
            elif context.lost:
                line += ", " + red(f"{context.lost:,} lost")
            else:
                line += ", nothing lost"
            print(printable(line, keep="\x1b"))
            if context.note:
                print(red(printable(f"{context.name}: {context.note}")))
        print(f"Next: {typed()} verify {result.path}")
        return 0
