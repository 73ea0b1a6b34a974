"""``moetrace compare``."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from moetrace.commands.selecting import add_choice
from moetrace.commands.showing import add_showing, opened, show, subject_of
from moetrace.findings import question


class Compare:
    """Compare two captures of the same text, token by token.

    Of one model at two precisions, say: which experts they have in common, layer by layer and by depth,
    beside chance, and how their usage differs in sum. Prompts are matched by id; a text counts up to the
    first token that differs.

      moetrace compare f16.moet q4.moet
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("a", metavar="A.moet", help="a trace")
        parser.add_argument("b", metavar="B.moet", help="another, of the same prompts")
        add_choice(parser)
        add_showing(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Compare."""
        with ExitStack() as stack:
            subject = subject_of(opened([args.a, args.b], args, stack), args)
            show([question("compare")().answer(subject)], args)
        return 0
