"""``moetrace status``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moetrace.commands.options import add_option, red
from moetrace.trace.loss import LOST_COUNTERS, LOST_EVENT_COUNTERS
from moetrace.trace.ring import live_rings


class Status:
    """Show how a live recording goes: rows, losses, whether it is paused or intervened on."""

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("trace", help="the trace folder that is being recorded")
        add_option(parser, "--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        states = []
        for ring in live_rings(Path(args.trace)):
            counters = ring.counters
            lost = sum(counters[name] for name in LOST_COUNTERS)
            events_lost = sum(counters[name] for name in LOST_EVENT_COUNTERS)
            state = "ended" if ring.closed else "paused" if ring.paused else "recording"
            states.append(
                {"context": ring.path.parent.name, "state": state, "status": ring.status, "lost": lost}
                | {"events_lost": events_lost}
                | {"intervention": ring.intervention_active, "refused": list(ring.intervention_refused)}
                | {"waiting": ring.head - ring.tail, "capacity": ring.capacity, "counters": counters}
            )
            if not args.json:
                full = 100 * (ring.head - ring.tail) / ring.capacity
                text = f"{lost:,} lost" + (f" and {events_lost:,} events" if events_lost else "")
                print(
                    f"{ring.path.parent.name}: {state}, {counters['rows_produced']:,} rows, "
                    f"{red(text) if lost or events_lost else text}, ring {full:.0f} % full"
                )
                if ring.intervention_active:
                    print(f"  intervention {ring.intervention_active} is in force")
                if ring.intervention_refused[0]:
                    print(red("  intervention {} was refused: {}".format(*ring.intervention_refused)))
                if ring.status:
                    print(f"  {red(ring.status)}")
        if args.json:
            print(json.dumps(states, indent=1))
        return 0
