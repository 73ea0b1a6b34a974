"""Completeness: what became of everything that the model computed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moetrace.numbers import number
from moetrace.trace.record import State
from moetrace.trace.store import ContextStore

_CHUNK = 1 << 16  # rows looked at together
LOST_COUNTERS = ("rows_lost_full", "rows_lost_error", "rows_overwritten")
LOST_EVENT_COUNTERS = ("events_lost", "events_overwritten")


@dataclass(frozen=True)
class Loss:
    """What became of everything that the model computed.

    A row is one token's way through the model; an entry is one (token, layer). Exactly:
    ``rows_produced = rows + rows_lost + rows_waiting``, and
    ``produced = rows_produced × L = present + not_computed + lost + waiting``.

    Attributes
    ----------
    rows_produced
        Rows that the model computed while recording was on.
    rows
        Rows in the trace.
    rows_lost
        Rows known to be lost: no room in the ring, overwritten, or unreadable.
    rows_waiting
        Rows of a live trace that are not sealed yet. Not known to be lost.
    produced, present, not_computed, lost, waiting
        The same in entries. Not computed: llama.cpp left the entry out (the last layer of rows that are no
        outputs).
    cached
        Positions served from the prompt cache: the model did not compute them, they are beside this sum.
        Requests whose number is unknown add nothing.
    events_lost
        Events known to be lost: what a server did to its slots and their memory. Rows are none of them; but what
        they say of requests is then not certain (``n_events_lost`` of these).
    """

    rows_produced: int
    rows: int
    rows_lost: int
    rows_waiting: int
    produced: int
    present: int
    not_computed: int
    lost: int
    waiting: int
    cached: int
    events_lost: int

    @property
    def complete(self) -> bool:
        """True if nothing is lost, no event either, and nothing is waiting."""
        return self.lost == 0 and self.waiting == 0 and self.events_lost == 0

    @property
    def told(self) -> str:
        """What is missing, in a phrase: ``nothing lost``, ``2 rows lost (0.33% of all entries), 5 not sealed yet``."""
        entries = self.lost and not self.rows_lost
        what = f"{self.lost:,} entries" if entries else number(self.rows_lost, "row")
        what += f" and {number(self.events_lost, 'event')}" if self.events_lost else ""
        text = f"{what} lost" if self.lost or self.events_lost else "nothing lost"
        if self.lost:
            text += f" ({self.lost / self.produced:.2%} of all entries)"
        return text + (f", {self.rows_waiting:,} not sealed yet" if self.rows_waiting else "")

    def __add__(self, other: Loss) -> Loss:
        return Loss(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def _values(self) -> list[int]:
        return [getattr(self, name) for name in self.__dataclass_fields__]


def settle_counters(counters: dict[str, int], n_rows: int, n_events: int, end: int) -> dict[str, int]:
    """Give the counters that a host would have left, had it not died before it counted its last ubatch.

    A host writes the rows of a ubatch first and counts them afterwards.

    Parameters
    ----------
    counters
        As they stand in the ring of a host that died; under ``overwrite`` with the reader's own count of what it
        came too late for.
    n_rows, n_events
        What of them is in the tables.
    end
        The last row's serial plus 1.
    """
    settled = dict(counters)
    settled["rows_produced"] = max(counters["rows_produced"], end)
    settled["rows_lost_error"] += max(
        0, settled["rows_produced"] - n_rows - sum(settled[name] for name in LOST_COUNTERS)
    )
    lost_by_host = settled["rows_lost_full"] + settled["rows_lost_error"]
    settled["rows_committed"] = settled["rows_produced"] - lost_by_host
    # and events whose record it never finished
    events = max(counters["events_committed"], n_events + counters["events_overwritten"])
    settled["events_committed"] = n_events + counters["events_overwritten"]
    settled["events_lost"] += events - settled["events_committed"]
    return settled


def count_loss(context: ContextStore, counters: dict[str, int], cached: int) -> Loss:
    """Count one context's rows and entries.

    Parameters
    ----------
    context
        Its tables.
    counters
        The host's counters by name; without ``rows_produced``, only the table's rows are known of.
    cached
        Positions served from the prompt cache.
    """
    n_rows, n_layers = context.rows.n_rows, len(context.layout.layers)
    states = np.zeros(256, np.int64)
    for start in range(0, n_rows, _CHUNK):
        states += np.bincount(context.rows["state"][start : start + _CHUNK].ravel(), minlength=256)
    rows_lost = sum(counters.get(name, 0) for name in LOST_COUNTERS)
    produced = counters.get("rows_produced", n_rows + rows_lost)
    waiting = produced - n_rows - rows_lost
    return Loss(
        rows_produced=produced,
        rows=n_rows,
        rows_lost=rows_lost,
        rows_waiting=waiting,
        produced=produced * n_layers,
        present=int(states[State.PRESENT]),
        not_computed=int(states[State.NOT_COMPUTED]),
        lost=int(states[State.LOST]) + rows_lost * n_layers,
        waiting=waiting * n_layers,
        cached=cached,
        events_lost=sum(counters.get(name, 0) for name in LOST_EVENT_COUNTERS),
    )
