"""``moetrace bits``."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from moetrace.commands.options import add_option
from moetrace.commands.placement import add_placement, placement
from moetrace.commands.progress import progress_line
from moetrace.commands.selecting import add_choice
from moetrace.commands.showing import RECORDINGS, add_leaving_out, add_showing, opened, show, subject_of
from moetrace.findings.bits import Bits as Question


class Bits:
    """Choose a type for each layer's expert matrices, for llama-quantize, and measure whether that is better.

    The same as `moetrace analyze bits`, which says how it is made: layers whose experts add more for what was recorded
    get more bits, in a file no larger than with one type for all; both are made and compared on held-out text.

      moetrace capture -m model-f16.gguf -f prompts.jsonl --capture experts,weights,outputs -o t.moet
      moetrace bits t.moet -m model-f16.gguf --like q4_k --text heldout.jsonl --write plan.txt
      llama-quantize --tensor-type-file plan.txt model-f16.gguf model.gguf Q8_0
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("recordings", nargs="+", metavar="T.moet", help=RECORDINGS)
        add_option(
            parser, "-m", "--model", required=True, metavar="FILE", help="GGUF file, the first of its parts"
        )
        add_option(parser, "--like", default="", metavar="TYPE", help="as small as with this type for all")
        add_option(parser, "--target", default="", metavar="SIZE", help="or: at most this size, as 12GiB")
        add_option(
            parser, "--types", default="", metavar="TYPES", help="types to choose from, as q3_k,q4_k,q6_k"
        )
        add_option(parser, "--by", default="share,random", metavar="PLANS", help="share, kl (slow), random")
        add_option(parser, "--others", default="Q8_0", metavar="TYPE", help="type of what is not an expert")
        add_option(parser, "--imatrix", metavar="FILE", help="importance matrix for llama-quantize")
        add_option(parser, "--text", metavar="FILE", help="held-out text to evaluate on, JSON lines")
        add_option(parser, "--write", metavar="FILE", help="the plan, for llama-quantize --tensor-type-file")
        add_placement(parser)
        add_choice(parser, by_model=False)
        add_leaving_out(parser)
        add_showing(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Choose and evaluate."""
        names = ("like", "target", "types", "by", "others", "imatrix", "text", "write")
        asked = Question(**{name: getattr(args, name) for name in names})
        with ExitStack() as stack, progress_line() as progress:
            subject = subject_of(
                opened(args.recordings, args, stack), args, args.model, placement(args), progress
            )
            finding = asked.answer(subject)
        return show([finding], args)
