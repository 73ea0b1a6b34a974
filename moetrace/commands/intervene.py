"""``moetrace intervene``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moetrace.commands.capturing import interventions_of
from moetrace.commands.control import add_which
from moetrace.errors import UsageError
from moetrace.host.intervene import switch


class Intervene:
    """Change the routing of a live recording, from the next graph on: ablate, force or bias experts, or replay.

    What is given replaces what was in force before. SPEC is off, or one or more of

      ablate:LAYERS:EXPERTS         these experts are never chosen
      force:LAYERS:EXPERTS          these are always chosen
      bias:LAYERS:EXPERTS=NUMBER    the number is added to the scores that they are selected by
      replay:TRACE or replay:LAYERS:TRACE or replay:TRACE#ID
                                    each token gets the experts recorded at its position of the request

    LAYERS is * or a list such as 0-3,7, EXPERTS a list such as 3,12 or 0-7. @slot=N behind it limits it to the
    tokens of one slot. What the model cannot do is refused, with the reason, and changes nothing. Of several
    models that are recorded one has to be named. The trace marks the rows that were intervened on.

      moetrace intervene t.moet ablate:7:3,12 force:*:5@slot=1
      moetrace intervene t.moet ablate:0:0-7 --model qwen3
      moetrace intervene t.moet @steering.txt
      moetrace intervene t.moet off
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("trace", help="the trace folder that is being recorded")
        parser.add_argument(
            "spec", nargs="+", metavar="SPEC", help="what to change; @FILE: a file of them; or off"
        )
        add_which(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Switch."""
        if "off" in args.spec and len(args.spec) > 1:
            raise UsageError("off, and something else", fix="give off alone, or what shall be in force")
        specs = [] if args.spec == ["off"] else interventions_of(args.spec)
        number = switch(Path(args.trace), specs, model=args.model, context=args.context)
        if args.json:
            print(json.dumps({"intervention": number, "specs": specs}))
        else:
            print(f"intervention {number}: {' '.join(specs)}" if number else "no intervention")
        return 0
