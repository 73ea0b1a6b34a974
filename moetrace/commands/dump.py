"""``moetrace dump``."""

from __future__ import annotations

import argparse
import sys

from moetrace.commands.selecting import add_selection, open_chosen, select
from moetrace.trace.export import dump
from moetrace.trace.trace import open_trace


class Dump:
    """Print a trace as text: one line per token and layer.

    Tab-separated: context, serial, request, sequence, position, token, phase, layer, state, and expert:weight for each
    expert in the router's order. As JSON lines: moetrace export --format jsonl.
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("trace", help="a trace folder")
        add_selection(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        with open_chosen(open_trace, args.trace, args) as trace:
            dump(select(trace, args), sys.stdout)
        return 0
