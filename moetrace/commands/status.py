"""``moetrace status``."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

from moetrace.commands.options import add_option, red
from moetrace.printable import printable
from moetrace.trace.loss import LOST_COUNTERS, LOST_EVENT_COUNTERS
from moetrace.trace.ring import Ring, open_rings, process_alive, stalled
from moetrace.trace.storage import free_space, is_locked

#: a recorder that lives takes records at least every half second, and shows that it lives as often
STALLED_SECONDS = 1.5
SILENT_SECONDS = 2.0


class Status:
    """Show how a live recording goes: rows, losses, whether it is paused or intervened on.

    It also says when the recorder waits for a disk that cannot be written, or does not answer.
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("trace", help="the trace folder that is being recorded")
        add_option(parser, "--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        trace = Path(args.trace)
        states = []
        with contextlib.ExitStack() as stack:
            rings = open_rings(trace, stack)
            waiting = stalled([ring for ring in rings if not ring.closed], STALLED_SECONDS)
            for ring in rings:
                counters = ring.counters
                lost = sum(counters[name] for name in LOST_COUNTERS)
                events_lost = sum(counters.get(name, 0) for name in LOST_EVENT_COUNTERS)
                state, why = _state(ring, trace, ring in waiting)
                states.append(
                    {"context": ring.path.parent.name, "state": state, "why": why, "status": ring.status}
                    | {"lost": lost, "events_lost": events_lost, "intervention": ring.intervention_active}
                    | {"refused": list(ring.intervention_refused), "waiting": ring.head - ring.tail}
                    | {"capacity": ring.capacity, "counters": counters}
                )
                if not args.json:
                    _show(ring, state, why, lost, events_lost)
        if args.json:
            print(json.dumps(states, indent=1))
        return 0


def _state(ring: Ring, trace: Path, waits: bool) -> tuple[str, str]:
    """Give what becomes of a context's rows, in a word, and why."""
    if ring.closed:
        return "ended", ""
    if not process_alive(ring.reader_pid) and is_locked(trace):
        return "not read", "its recorder runs, and has not taken it on"
    if not process_alive(ring.reader_pid):
        return "not read", f"its recorder died; go on with: moetrace resume {trace}"
    if waits and ring.reader_silent_s > SILENT_SECONDS:
        return (
            "not read",
            f"its recorder (process {ring.reader_pid}) does not answer: it is stopped, or its disk is",
        )
    if waits:
        return "waiting for the disk", f"{free_space(trace)}; it goes on by itself"
    state = "paused" if ring.paused else "recording"
    return (f"{state} (asleep)" if ring.asleep else state), ""


def _show(ring: Ring, state: str, why: str, lost: int, events_lost: int) -> None:
    produced = ring.counters["rows_produced"]
    text = f"{lost:,} lost" + (f" and {events_lost:,} events" if events_lost else "")
    full = 100 * (ring.head - ring.tail) / ring.capacity
    said = red(printable(f"{state}: {why}")) if why else state
    print(
        f"{printable(ring.path.parent.name)}: {said}, {produced:,} rows, {red(text) if lost or events_lost else text}, "
        f"ring {full:.0f} % full"
    )
    if ring.intervention_active:
        print(f"  intervention {ring.intervention_active} is in force")
    if ring.intervention_refused[0]:
        print(red(printable("  intervention {} was refused: {}".format(*ring.intervention_refused))))
    if ring.status:
        print(f"  {red(printable(ring.status))}")
