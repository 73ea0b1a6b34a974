"""``moetrace demo``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from moetrace import data
from moetrace.commands.capturing import report_trace
from moetrace.commands.options import add_option, paint
from moetrace.commands.progress import progress_bar
from moetrace.errors import MoetraceError
from moetrace.host.prompts import read_prompts
from moetrace.host.recording import record
from moetrace.host.runtime import find_tool
from moetrace.synthetic import write_model
from moetrace.trace.trace import Trace, open_trace

#: the shape of gpt-oss-20b, narrow, with random weights
_MODEL = {"n_layer": 24, "n_expert": 32, "n_expert_used": 4, "n_embd": 128, "n_ff_expert": 64, "seed": 0}


class Demo:
    """Record a small model from start to end: a server, prompts of five domains, a trace.

    Writes DIR/model.gguf (the shape of gpt-oss: 24 layers, 32 experts, top-4; random weights) and
    DIR/demo.moet. Needs llama-server.
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        add_option(parser, "-o", "--output", default="demo", metavar="DIR", help="folder to write to")
        add_option(parser, "-np", "--parallel", type=int, default=4, metavar="N", help="prompts at once")
        add_option(parser, "-n", "--n-predict", type=int, default=32, metavar="N", help="tokens to generate")
        add_option(parser, "-t", "--threads", type=int, metavar="N", help="threads of llama-server")

    def run(self, args: argparse.Namespace) -> int:
        """Run it."""
        find_tool("llama-server")
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        model, path = folder / "model.gguf", folder / "demo.moet"
        if not model.exists():
            say("Writing a model of gpt-oss's shape with random weights")
            write_model(model, "gpt-oss", **_MODEL)  # type: ignore[arg-type]
        prompts = read_prompts(data.prompts("domains"))
        arguments = ["-np", str(args.parallel), "-c", str(2048 * args.parallel)]
        if args.threads:
            arguments += ["-t", str(args.threads)]
        say(f"Starting llama-server with the tracer loaded, {args.parallel} slots")
        say(f"Sending {len(prompts)} prompts of {len({p.label for p in prompts})} domains over HTTP")
        with progress_bar("prompts") as update:
            record(
                model,
                prompts,
                path,
                n_predict=args.n_predict,
                arguments=arguments,
                on_progress=update,
                force=True,
            )
        with open_trace(path) as trace:
            show(trace)
        report_trace(path, sys.stdout)
        return 0


def say(text: str) -> None:
    """Say what is being done, on standard error."""
    print(paint("•", "1;36", sys.stderr), text, file=sys.stderr)


def show(trace: Trace, *, n_top: int = 4) -> None:
    """Print the most used experts of a few layers, domain by domain."""
    layers = [trace.layers[i] for i in (0, len(trace.layers) // 2, -1)]
    labels = sorted({label for label in trace.requests["label"] if label is not None})
    if not labels:
        raise MoetraceError("no request of the trace has a label", fix="see the messages above")
    print(f"\nMost used experts, in % of a domain's tokens (top-{max(trace.n_expert_used)} routing)\n")
    print(f"{'domain':<10}{'tokens':>8}  " + "".join(f"{f'layer {layer}':<40}" for layer in layers))
    for label in labels:
        cells = []
        for layer in layers:
            chosen = trace.sel(layer=layer, label=label)
            experts = np.asarray(chosen.experts)[np.asarray(chosen.state) == 1]
            share = np.bincount(experts.ravel(), minlength=max(trace.n_expert)) / max(len(experts), 1)
            top = np.argsort(-share, kind="stable")[:n_top]
            cells.append("  ".join(f"{e:>3} {100 * share[e]:>3.0f}%" for e in top))
        print(f"{label:<10}{len(trace.sel(label=label)):>8,}  " + "".join(f"{cell:<40}" for cell in cells))
    print()
