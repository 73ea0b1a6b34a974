"""The routed experts of one request, position by position: what replays of routing take."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moetrace.errors import UsageError
from moetrace.trace.loss import LOST_EVENT_COUNTERS
from moetrace.trace.record import EventCode, RowFlag, State
from moetrace.trace.trace import Trace

#: events after which a slot's memory still is what it was; while recording was paused anything may have happened
_HARMLESS = {code.name.lower() for code in (EventCode.LAUNCH, EventCode.INTERVENE)}


@dataclass(frozen=True)
class RoutedExperts:
    """Which experts the tokens of a request used.

    Attributes
    ----------
    request
        Its number in the trace.
    layers
        (L,) int64 layer numbers.
    experts
        (T, L, k) int32, by position; −1 where it is not known: see the next four.
    tokens
        (T,) int32 token ids; −1 not known.
    lost
        Entries (position, layer) that were lost.
    not_computed
        Entries that llama.cpp did not compute: of its last layer, for tokens of the prompt whose output nobody asked
        for.
    cached
        Positions served from the prompt cache whose rows are not known for sure.
    from_cache
        Positions served from the prompt cache, whose experts are those of the earlier request that computed them: of
        the same slot, and nothing happened to its memory since.
    running
        Whether the request goes on: more positions will follow.
    """

    request: int
    layers: NDArray[np.int64]
    experts: NDArray[np.int32]
    tokens: NDArray[np.int32]
    lost: int
    not_computed: int
    cached: int
    from_cache: int
    running: bool

    @property
    def complete(self) -> bool:
        """Whether the request ended, and nothing that was computed for it is missing."""
        return not (self.running or self.lost or self.cached)

    def npy(self) -> bytes:
        """:attr:`experts` as a .npy file."""
        out = io.BytesIO()
        np.save(out, self.experts)
        return out.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; ``routed_experts`` is base64 of the array's little-endian int32 in C order."""
        return {
            "request": self.request,
            "shape": list(self.experts.shape),
            "dtype": "int32",
            "layers": self.layers.tolist(),
            "routed_experts": base64.b64encode(self.experts.astype("<i4").tobytes()).decode(),
            "tokens": self.tokens.tolist(),
            "complete": self.complete,
            "running": self.running,
            "lost": self.lost,
            "not_computed": self.not_computed,
            "cached": self.cached,
            "from_cache": self.from_cache,
        }


def routed_experts(trace: Trace, request: int, n_tokens: int | None = None) -> RoutedExperts:
    """Put the experts of a request's tokens together, by position; of a position computed twice, the later ones.

    A token that was generated last is never decoded, and has no row. Arrays are new.

    Parameters
    ----------
    n_tokens
        How many tokens the request had, prompt and answer, as its client was told: then it has ended where all but
        the last are there. Otherwise the trace says it: when the slot was given another, or was recorded to the end.

    Raises UsageError if there is no such request, its positions are not known, or its context was shifted (a position
    then is several tokens').
    """
    table = trace.requests
    if request not in table.index:
        raise UsageError(f"there is no request {request}", fix="see the trace's requests: moetrace info")
    row: dict[str, Any] = {str(name): value for name, value in table.loc[request].items()}
    unknown = {name for name, value in row.items() if value is None or value is pd.NA}
    part = next(part for part in trace.parts if part.shown[0] == row["context"])
    if "n_shifts" in unknown or row["n_shifts"] != 0:
        raise UsageError(
            f"the context of request {request} was shifted, or events that say so were lost",
            why="a position then is not one token's",
            fix="give the server a larger context (-c)",
        )
    serial = np.asarray(part.serial)
    first, last = (int(row[name]) for name in ("first_serial", "last_serial"))
    low, high = np.searchsorted(serial, first), np.searchsorted(serial, last, "right")
    mine = low + np.flatnonzero(np.asarray(part.request[low:high]) == request)
    mine = mine[(np.asarray(part.flags)[mine] & RowFlag.TRIAL) == 0]
    undecided = 0 if "n_undecided" in unknown else int(row["n_undecided"])
    mine = mine[: len(mine) - undecided] if undecided else mine
    if not len(mine) or (np.asarray(part.positions)[mine] < 0).any():
        raise UsageError(f"the positions of request {request} are not known", fix="record it with moetrace")
    position = np.asarray(part.positions)
    # where events were lost, nobody knows how much was cached, nor what happened to it
    known_cache = "n_cached" not in unknown
    n_cached = int(row["n_cached"]) if known_cache else int(position[mine].min())
    certain = (
        known_cache and n_cached > 0 and not any(part.counters.get(name) for name in LOST_EVENT_COUNTERS)
    )
    earlier = _cached_rows(part, int(row["slot"]), first, n_cached) if certain else np.empty(0, np.int64)
    length = max(int(position[mine].max()) + 1, n_cached)
    source = np.full(length, -1, np.int64)
    for rows in (earlier, mine):
        source[position[rows]] = rows  # ascending in time: the later one stays
    known = source >= 0
    experts = np.full((length, len(part.layers), int(max(part.n_expert_used))), -1, np.int32)
    tokens = np.full(length, -1, np.int32)
    state = np.full((length, len(part.layers)), State.PRESENT, np.uint8)
    if known.any():
        ids = np.asarray(part.experts[source[known]])
        experts[known] = np.where(ids == part.sentinel, -1, ids.astype(np.int32))
        tokens[known] = part.token_ids[source[known]]
        state[known] = part.state[source[known]]
    n_lost = 0 if "n_lost" in unknown else int(row["n_lost"])
    gaps = max(int((~known[n_cached:]).sum()), n_lost)
    return RoutedExperts(
        request=request,
        layers=np.asarray(part.layers),
        experts=experts,
        tokens=tokens,
        lost=int((state == State.LOST).sum()) + gaps * len(part.layers),
        not_computed=int((state == State.NOT_COMPUTED).sum()),
        cached=int((~known[:n_cached]).sum()),
        from_cache=int(np.isin(source[:n_cached], earlier).sum()),
        running=_is_running(part, row, length, n_tokens),
    )


def _is_running(part: Trace, row: dict[str, Any], length: int, n_tokens: int | None) -> bool:
    if n_tokens is not None:
        return length < n_tokens - 1
    if not row["running"]:
        return False
    events = part.events
    later = (events["event"] == "launch") & (events["sequence"] == row["slot"])
    return not bool((later & (events["serial"] > row["last_serial"])).any())


def _cached_rows(part: Trace, slot: int, first: int, n_cached: int) -> NDArray[np.int64]:
    """Rows of a slot that computed the positions before ``n_cached`` that it still holds at serial ``first``."""
    end = int(np.searchsorted(np.asarray(part.serial), first))
    rows = np.flatnonzero(np.asarray(part.sequence[:end]) == slot)
    position = np.asarray(part.positions)[rows]
    fits = (position >= 0) & (position < n_cached) & ((np.asarray(part.flags)[rows] & RowFlag.TRIAL) == 0)
    rows, position = rows[fits], position[fits]
    # the latest row of each position
    _, from_end = np.unique(position[::-1], return_index=True)
    rows = rows[::-1][from_end]
    position = np.asarray(part.positions)[rows]
    when = np.asarray(part.serial)[rows]
    # an event of serial s happened before the row of serial s
    kept = np.ones(len(rows), bool)
    events = part.events
    columns = ("serial", "event", "sequence", "p0", "p1")
    for at, event, sequence, p0, p1 in zip(*(events[name].tolist() for name in columns), strict=True):
        if at > first or sequence not in (slot, -1) or event in _HARMLESS:
            continue
        gone = when < at
        if event == "seq_rm":  # else copied, moved, restored or cleared: what is there now is not known
            gone &= (position >= p0) & ((position < p1) | (p1 < 0))
        kept &= ~gone
    return np.sort(rows[kept])
