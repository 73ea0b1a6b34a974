"""A recording as a timeline, in the trace event format that Perfetto and Chrome read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moetrace.trace.record import RowFlag
from moetrace.trace.requests import Phase
from moetrace.trace.trace import Trace

_PHASES = {Phase.PREFILL: "prefill", Phase.DECODE: "decode", Phase.UNKNOWN: "unknown"}


def timeline(trace: Trace) -> Iterator[dict[str, Any]]:
    """Give the events: a process for each context, a thread for each slot.

    A slice for each request, from its first row to its last, within it one for its prompt and one for its answer; an
    instant for each event (launch, seq_rm, …); and a counter of the tokens that each ubatch had. Times are microseconds
    since the first row; what was lost has none.
    """
    parts = [part for part in trace.parts if len(part.serial)]
    origin = min((int(part.time_ns[0]) for part in parts), default=0)
    requests = trace.requests
    for pid, part in enumerate(parts, start=1):
        name = part.shown[0]
        yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": f"{name}: {part.model_name}"}}
        mine = requests[requests["context"] == name]
        for slot in sorted({int(slot) for slot in mine["slot"].tolist()}):
            yield {
                "ph": "M",
                "pid": pid,
                "tid": slot,
                "name": "thread_name",
                "args": {"name": f"slot {slot}"},
            }
        time, request, phase = part.time_ns, part.request, part.phase
        order = np.argsort(request, kind="stable")
        order = order[request[order] >= 0]
        edges = np.flatnonzero(np.diff(request[order], prepend=-2))
        for rows in np.split(order, edges[1:]) if len(order) else ():
            number = int(request[rows[0]])
            said: dict[str, Any] = {str(key): value for key, value in mine.loc[number].items()}
            known = {key: said[key] for key in ("id", "label") if isinstance(said[key], str)}
            sizes = {key: int(said[key]) for key in ("n_prefill", "n_decode", "n_lost")}
            common = {"pid": pid, "tid": int(said["slot"]), "cat": "request"}
            yield {
                **common,
                **_slice(time[rows], origin),
                "name": str(known.get("id", f"request {number}")),
                "args": {"request": number, **known, **sizes},
            }
            for code, told in _PHASES.items():
                of_phase = rows[phase[rows] == code]
                if len(of_phase):
                    yield {
                        **common,
                        **_slice(time[of_phase], origin),
                        "name": told,
                        "args": {"tokens": len(of_phase)},
                    }
        real = (np.asarray(part.flags) & RowFlag.TRIAL) == 0
        _, first, tokens = np.unique(np.asarray(part.step)[real], return_index=True, return_counts=True)
        for at, n in zip(time[real][first].tolist(), tokens.tolist(), strict=True):
            yield {
                "ph": "C",
                "pid": pid,
                "name": "tokens",
                "ts": (at - origin) / 1000,
                "args": {"in a ubatch": n},
            }
        happened = part.events
        columns = ("time_ns", "event", "sequence", "p0", "p1")
        for at, event, sequence, p0, p1 in zip(*(happened[c].tolist() for c in columns), strict=True):
            yield {
                "ph": "i",
                "s": "t",
                "pid": pid,
                "tid": sequence,
                "cat": "event",
                "name": event,
                "ts": (at - origin) / 1000,
                "args": {"p0": p0, "p1": p1},
            }


def _slice(time: np.ndarray[Any, Any], origin: int) -> dict[str, Any]:
    begin, end = int(time.min()), int(time.max())
    return {"ph": "X", "ts": (begin - origin) / 1000, "dur": max((end - begin) / 1000, 0.001)}
