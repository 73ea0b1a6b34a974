"""``moetrace capture``."""

from __future__ import annotations

import argparse
import json
import sys

from moetrace.commands.capturing import (
    add_capture_options,
    add_intervene_option,
    capture_options,
    interventions_of,
    output_path,
    report_trace,
)
from moetrace.commands.info import facts_of
from moetrace.commands.options import add_option
from moetrace.commands.placement import add_placement, placement
from moetrace.commands.progress import progress_bar
from moetrace.commands.prompting import add_prompts, needed_prompts


class Capture:
    """Run a prompt set through a model, without a server, and record its routing.

    A line of a prompt file is a JSON object with prompt, messages or tokens, and optionally id, label and
    n_predict; of any other text the whole file is a prompt. Needs the llama-cpp-python runtime.

      moetrace capture -m model.gguf -f prompts.jsonl -n 64
      moetrace capture -m model.gguf -f code/*.py prose/*.txt -o t.moet
      moetrace capture -m model.gguf -p "Once upon a time" -n 100
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        add_option(parser, "-m", "--model", required=True, metavar="FILE", help="GGUF file")
        add_prompts(parser)
        add_option(
            parser, "-o", "--output", metavar="T.moet", help="the trace to write; default: MODEL-TIME.moet"
        )
        add_option(parser, "-n", "--n-predict", type=int, default=0, metavar="N", help="tokens to generate")
        add_option(parser, "-np", "--parallel", type=int, default=1, metavar="N", help="prompts at once")
        add_option(parser, "-c", "--ctx-size", type=int, metavar="N", help="positions; default: as needed")
        add_option(parser, "-b", "--batch-size", type=int, default=2048, metavar="N", help="logical batch")
        add_option(parser, "-ub", "--ubatch-size", type=int, default=512, metavar="N", help="physical batch")
        add_placement(parser)
        add_option(parser, "--temp", type=float, default=0.0, metavar="T", help="temperature; 0 is greedy")
        add_option(parser, "-s", "--seed", type=int, default=0, metavar="N", help="seed of the sampling")
        add_option(
            parser,
            "--all-outputs",
            action="store_true",
            help="compute the last layer for every token (llama.cpp leaves out what it needs no logits for)",
        )
        add_option(parser, "--force", action="store_true", help="replace the trace if it exists")
        add_option(parser, "-v", "--verbose", action="store_true", help="show llama.cpp's log")
        add_option(
            parser, "--json", action="store_true", help="print JSON: what `info --json` says of the trace"
        )
        add_capture_options(parser)
        add_intervene_option(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Capture."""
        from moetrace.host.inprocess import capture

        path = output_path(args, args.model)
        options = capture_options(args)
        with progress_bar("prompts") as update:
            capture(
                args.model,
                needed_prompts(args),
                path,
                n_predict=args.n_predict,
                intervene=interventions_of(args.intervene),
                channels=options.channels,
                n_parallel=args.parallel,
                n_ctx=args.ctx_size,
                n_batch=args.batch_size,
                n_ubatch=args.ubatch_size,
                **placement(args),
                temperature=args.temp,
                seed=args.seed,
                all_outputs=args.all_outputs,
                force=args.force,
                verbose=args.verbose,
                on_progress=update,
                layers=options.layers,
                collector=options.collector,
                on_full=options.on_full,
                ring_size=options.ring_size,
                block_ms=options.block_ms,
            ).close()
        report_trace(path, sys.stderr)
        if args.json:
            print(json.dumps(facts_of(path), indent=1))
        return 0
