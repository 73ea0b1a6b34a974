"""``moetrace start``."""

from __future__ import annotations

import argparse

from moetrace.commands.control import add_which, switch


class Start:
    """Switch a live recording on: one that was begun with run --paused, or stopped.

    The change holds from the next graph on, in every context of the trace, or in those that are named.
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("trace", help="the trace folder that is being recorded")
        add_which(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Switch."""
        return switch(args, paused=False)
