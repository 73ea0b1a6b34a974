"""``moetrace prune``."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from moetrace.commands.options import add_option
from moetrace.commands.placement import add_placement, placement
from moetrace.commands.progress import progress_line
from moetrace.commands.selecting import add_choice
from moetrace.commands.showing import RECORDINGS, add_leaving_out, add_showing, opened, show, subject_of
from moetrace.errors import UsageError
from moetrace.findings.pruning import Pruning


class Prune:
    """Write a model file without the experts that matter least for what was recorded, and measure what it loses.

    The same as `moetrace analyze pruning`, which says how it is made: the most important experts of each layer are
    kept, by saliency (if the channel outputs was captured), mixing weight or uses; the file is evaluated on held-out
    text, beside the other rankings and chance.

      moetrace capture -m model.gguf -f prompts.jsonl --capture experts,weights,outputs -o t.moet
      moetrace prune t.moet -m model.gguf --keep 96 --text heldout.jsonl --write pruned.gguf
      moetrace prune t.moet -m model.gguf --target 12GiB --by weight --write pruned.gguf
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("recordings", nargs="+", metavar="T.moet", help=RECORDINGS)
        add_option(
            parser, "-m", "--model", required=True, metavar="FILE", help="GGUF file, the first of its parts"
        )
        add_option(
            parser, "--keep", metavar="N", help="experts per layer to keep; of several, as 96,64, the first"
        )
        add_option(parser, "--target", metavar="SIZE", help="size that the file shall have at most, as 12GiB")
        add_option(
            parser,
            "--by",
            default="",
            metavar="RANKING",
            help="count, weight, saliency or contribution; default: the one that loses least of those captured",
        )
        add_option(parser, "--text", metavar="FILE", help="held-out text to evaluate on, JSON lines")
        add_option(parser, "--write", required=True, metavar="FILE", help="the pruned model")
        add_placement(parser)
        add_choice(parser, by_model=False)
        add_leaving_out(parser)
        add_showing(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Write and evaluate it."""
        if bool(args.keep) == bool(args.target):
            raise UsageError("how many experts shall stay?", fix="give --keep N or --target SIZE")
        asked = Pruning(
            keep=args.keep or "",
            target=args.target or "",
            by=args.by,
            text=args.text,
            write=args.write,
        )
        with ExitStack() as stack, progress_line() as progress:
            subject = subject_of(
                opened(args.recordings, args, stack), args, args.model, placement(args), progress
            )
            finding = asked.answer(subject)
        return show([finding], args)
