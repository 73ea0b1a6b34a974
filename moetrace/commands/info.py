"""``moetrace info``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from moetrace.commands.options import add_option, red
from moetrace.commands.selecting import add_choice, open_chosen
from moetrace.printable import printable
from moetrace.trace import naming
from moetrace.trace.remarks import remarks
from moetrace.trace.trace import Trace, open_trace


class Info:
    """Show what a trace holds, and what it lacks.

    Of several llama contexts each by itself: its model, what it is for, its rows, requests and loss. Loss, and what
    else one must know of it, is shown in red. With --json, everything as one JSON object.
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("trace", help="a trace folder")
        add_choice(parser)
        add_option(parser, "--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        chosen = args.context is not None or args.of_model is not None
        # all of them, of whatever models
        with open_chosen(open_trace, args.trace, args) if chosen else open_trace(args.trace, 0) as trace:
            contexts = list(trace.parts) if chosen else [trace.in_context(name) for name in trace.contexts]
            if args.json:
                print(json.dumps(_facts(trace, contexts), indent=1))
                return 0
            for i, context in enumerate(contexts):
                if i:
                    print()
                for name, value in context.summary():
                    if name == "not shown":
                        continue
                    if name == "context" and len(trace.contexts) > 1:
                        value += f" ({naming.role(context.facts)})"
                    bad = name == "completeness" and (context.loss.lost or context.loss.events_lost)
                    shown = printable(value)
                    print(f"{name:<13} {red(shown) if bad else shown}")
                loss = context.loss
                print(
                    f"{'entries':<13} {loss.produced:,} = {loss.present:,} present"
                    f" + {loss.not_computed:,} not computed + {loss.lost:,} lost"
                    + (f" + {loss.waiting:,} waiting" if loss.waiting else "")
                )
                print(f"{'cached':<13} {loss.cached:,} positions served from the prompt cache")
                if n := int(context.intervened.sum()):
                    rules = context.interventions["rules"].dropna().unique()
                    print(f"{'intervened':<13} {n:,} rows: {printable('; '.join(rules))}")
                if status := context.facts.get("status"):
                    print(f"{'tracer':<13} {red(printable(str(status)))}")
            for text in remarks(trace.store):
                print(f"{'note':<13} {red(printable(text))}")
        return 0


def facts_of(path: Path) -> dict[str, object]:
    """Everything that --json says of a trace."""
    with open_trace(path, 0) as trace:
        return _facts(trace, [trace.in_context(name) for name in trace.contexts])


def _facts(trace: Trace, contexts: list[Trace]) -> dict[str, object]:
    return {
        "path": str(trace.path),
        "meta": trace.meta,
        "remarks": remarks(trace.store),
        "contexts": [
            {
                **context.facts,
                "rows": len(context),
                "requests": context.n_requests,
                "loss": dataclasses.asdict(context.loss),
            }
            for context in contexts
        ],
    }
