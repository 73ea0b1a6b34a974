"""``moetrace place``."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace

from moetrace.commands.options import add_option
from moetrace.commands.selecting import add_choice
from moetrace.commands.showing import add_showing, opened, show, subject_of
from moetrace.findings.placement import Placement


class Place:
    """Say what to type so that a model's experts fit on the GPU as the recorded run used them.

    The same as `moetrace analyze placement`, which says how it is made: which layers' experts fit beside the other
    weights and the KV cache, which of them are read most, and how many bytes per token stay with the CPU.

      moetrace place t.moet -m model.gguf --vram 12GiB
      moetrace place t.moet -m model.gguf --vram 24GiB -c 32768 --phase all
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("trace", metavar="T.moet", help="a trace")
        add_option(parser, "-m", "--model", required=True, metavar="FILE", help="GGUF file")
        add_option(parser, "--vram", required=True, metavar="SIZE", help="memory of the GPU, as 12GiB")
        add_option(
            parser, "-c", "--ctx-size", type=int, default=8192, metavar="N", help="positions, over all slots"
        )
        add_option(
            parser, "-ub", "--ubatch-size", type=int, default=512, metavar="N", help="tokens computed at once"
        )
        add_option(
            parser, "--reserve", default="1GiB", metavar="SIZE", help="left for whatever else is on it"
        )
        add_choice(parser, by_model=False)
        add_showing(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Ask it."""
        asked = Placement(
            vram=args.vram, ctx_size=args.ctx_size, ubatch_size=args.ubatch_size, reserve=args.reserve
        )
        with ExitStack() as stack:
            subject = subject_of(opened([args.trace], args, stack), args, args.model)
            finding = asked.answer(subject)
        if args.format == "table":  # on one line, however long, so that it can be copied
            print(finding.sentences[0].removeprefix("Type: "), end="\n\n")
            finding = replace(finding, sentences=finding.sentences[1:])
        return show([finding], args)
