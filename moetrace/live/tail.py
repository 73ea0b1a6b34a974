"""The end of a live trace: what its new rows say is added up as they come."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import MoetraceError, UsageError
from moetrace.trace import naming
from moetrace.trace.loss import LOST_COUNTERS, LOST_EVENT_COUNTERS
from moetrace.trace.record import RowFlag, State
from moetrace.trace.requests import Phase
from moetrace.trace.ring import Ring
from moetrace.trace.store import TraceStore
from moetrace.trace.trace import Trace, open_trace

_ROWS = 1 << 13  # counted at a time
BUCKET_S = 10.0
HISTORY_S = 3600.0
_PHASES = {Phase.PREFILL: "prefill", Phase.DECODE: "decode", Phase.UNKNOWN: "unknown"}


@dataclass
class _Bucket:
    """What came in some seconds."""

    began: float
    counts: NDArray[np.uint32]
    tokens: dict[str, int]


@dataclass(frozen=True)
class Context:
    """How the recording of one llama context goes.

    Attributes
    ----------
    name
        Its folder's.
    state
        recording, paused, ended, or not read.
    ring_fill
        Share of the ring that waits to be read; NaN where there is no ring any more.
    counters
        The host's, by name.
    lost, events_lost
        Rows and events that were lost.
    intervention
        Number of the one that is in force; 0: none.
    """

    name: str
    state: str
    ring_fill: float
    counters: dict[str, int]
    lost: int
    events_lost: int
    intervention: int


@dataclass(frozen=True)
class Snapshot:
    """What is known now.

    Attributes
    ----------
    layers, n_expert
        (L,) layer numbers, and experts of each.
    counts
        (L, E) uint64 tokens that each expert got since the trace began.
    tokens
        Phase -> tokens since then.
    by_domain
        Label -> tokens; "" has none.
    recent
        (L, E) uint64 of about the last :data:`BUCKET_S` seconds to 2 × that.
    hour
        (L, E) uint64 of the last hour, as far as it was watched.
    per_second
        Phase -> tokens per second, in the same seconds as ``recent``.
    entries
        What became of them -> entries (token, layer) of the rows that are there.
    cached
        Positions served from the prompt cache, as far as it is known. As ``by_domain`` at most :data:`BUCKET_S` old.
    contexts
        How the recording goes.
    live
        Whether the trace still grows.
    """

    layers: NDArray[np.int64]
    n_expert: NDArray[np.int64]
    counts: NDArray[np.uint64]
    tokens: dict[str, int]
    by_domain: dict[str, int]
    recent: NDArray[np.uint64]
    hour: NDArray[np.uint64]
    per_second: dict[str, float]
    entries: dict[str, int]
    cached: int
    contexts: tuple[Context, ...]
    live: bool


@dataclass
class Tail:
    """Follows a trace; :meth:`look` counts what is new. Memory does not grow with the trace.

    Attributes
    ----------
    path
        The trace's folder.
    model
        Which of several models; None: there is one.
    clock
        Seconds; for tests.
    replay
        Show a recording that has ended as it went, so many times as fast; None: as it is now.
    """

    path: Path
    model: str | None = None
    clock: Callable[[], float] = time.monotonic
    replay: float | None = None
    _began: float | None = None
    _trace: Trace | None = None
    _seen: dict[str, int] = field(default_factory=dict)
    _buckets: deque[_Bucket] = field(default_factory=deque)
    _counts: NDArray[np.uint64] | None = None
    _tokens: dict[str, int] = field(default_factory=dict)
    _entries: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(State), np.int64))
    _requests: tuple[float, dict[str, int], int] = (-np.inf, {}, 0)

    @property
    def trace(self) -> Trace:
        """The trace as of the last look. Raises MoetraceError if it cannot be opened (yet)."""
        if self._trace is None:
            self._trace = open_trace(self.path, None, self.model)
        return self._trace

    def look(self) -> Snapshot:
        """Count what is new, and say what is known. Raises MoetraceError if there is no trace (yet)."""
        trace = self.trace
        if trace.live:
            trace.refresh()
        now, until = self._times(trace)
        shape = (len(trace.layers), int(max(trace.n_expert)))
        if self._counts is None or self._counts.shape != shape:
            self._counts, self._tokens, self._seen = np.zeros(shape, np.uint64), {}, {}
            self._entries[:] = 0
            self._buckets.clear()
        if not self._buckets or now - self._buckets[-1].began >= BUCKET_S:
            self._buckets.append(_Bucket(now, np.zeros(shape, np.uint32), {}))
        while now - self._buckets[0].began > HISTORY_S:
            self._buckets.popleft()
        watched = bool(self._seen) or self.replay is not None
        for part in trace.parts:
            self._count(part, part.shown[0], until, watched=watched)
        return self._snapshot(trace, now, until)

    def _times(self, trace: Trace) -> tuple[float, int | None]:
        """Seconds of the clock, or of the recording; and the time of the rows that are seen, None: all."""
        now = self.clock()
        if self.replay is None:
            return now, None
        if trace.live:
            raise UsageError(f"{self.path} is being recorded", fix="watch it as it goes: leave out --replay")
        if self._began is None:
            self._began = now
        now = (now - self._began) * self.replay
        first = min((int(part.time_ns[0]) for part in trace.parts if len(part.time_ns)), default=0)
        return now, first + int(now * 1e9)

    def _count(self, part: Trace, name: str, until: int | None, *, watched: bool) -> None:
        """Count a context's new rows; those that were there before anybody looked are of no known second."""
        assert self._counts is not None
        e = self._counts.shape[1]
        times = np.asarray(part.time_ns)
        # rows are in the order of their times, but for those of other threads by a hair
        end = len(times) if until is None else int(np.searchsorted(times, until, "right"))
        for start in range(self._seen.get(name, 0), end, _ROWS):
            rows = slice(start, min(start + _ROWS, end))
            real = (np.asarray(part.flags[rows]) & RowFlag.TRIAL) == 0
            ids = np.asarray(part.experts[rows])[real].astype(np.int64)
            phases = np.asarray(part.phase[rows])[real]
            states = np.asarray(part.state[rows])[real]
            self._entries += np.bincount(states.ravel(), minlength=len(State))[: len(State)]
            for i in range(ids.shape[1]):
                mine = ids[:, i][ids[:, i] != part.sentinel]
                found = np.bincount(mine, minlength=e)
                self._counts[i] += found.astype(np.uint64)
                if watched:
                    self._buckets[-1].counts[i] += found.astype(np.uint32)
            for phase, said in _PHASES.items():
                n = int((phases == phase).sum())
                if n:
                    self._tokens[said] = self._tokens.get(said, 0) + n
                    if watched:
                        tokens = self._buckets[-1].tokens
                        tokens[said] = tokens.get(said, 0) + n
        self._seen[name] = end

    def _snapshot(self, trace: Trace, now: float, until: int | None) -> Snapshot:
        assert self._counts is not None
        latest = list(self._buckets)[-2:]
        seconds = max(now - latest[0].began, 1e-9)
        tokens = {said: sum(b.tokens.get(said, 0) for b in latest) for said in _PHASES.values()}
        if until is not None or now - self._requests[0] >= BUCKET_S:
            self._requests = (now, *_of_requests(trace, until))
        more = any(self._seen[part.shown[0]] < len(part.serial) for part in trace.parts)
        _, by_domain, cached = self._requests
        return Snapshot(
            np.asarray(trace.layers),
            np.asarray(trace.n_expert),
            self._counts.copy(),
            dict(self._tokens),
            dict(by_domain),
            _sum(latest, self._counts.shape),
            _sum(list(self._buckets), self._counts.shape),
            {said: n / seconds for said, n in tokens.items() if n},
            {state.name.lower(): int(self._entries[state]) for state in State},
            cached,
            tuple(_contexts(trace) if until is None else _replayed(trace, more)),
            trace.live if until is None else more,
        )

    def close(self) -> None:
        """Let go of the trace."""
        if self._trace is not None:
            self._trace.close()


@dataclass
class Tails:
    """Follows every model of a recording, also those that are loaded while it goes on: a router's.

    Attributes
    ----------
    path, model, clock, replay
        As for :class:`Tail`; with ``model`` only that one is followed.
    """

    path: Path
    model: str | None = None
    clock: Callable[[], float] = time.monotonic
    replay: float | None = None
    _tails: dict[str, Tail] = field(default_factory=dict)
    _listed: float = -np.inf

    def look(self) -> dict[str, Snapshot]:
        """What is known of each model, by its name; "" where there is one, or ``model`` said which.

        Raises MoetraceError if there is no trace (yet).
        """
        if self.model is not None:
            self._follow("", self.model)
        elif self.clock() - self._listed >= BUCKET_S or not self._tails:
            self._listed = self.clock()
            found = models_of(self.path)
            if len(found) > 1:
                self._let_go("")
            for name in found:
                self._follow(name if len(found) > 1 else "", name if len(found) > 1 else None)
            if not found:
                self._follow("", None)  # says what is wrong
        return {name: tail.look() for name, tail in self._tails.items()}

    def _follow(self, name: str, model: str | None) -> None:
        if name not in self._tails:
            self._tails[name] = Tail(self.path, model, self.clock, self.replay)

    def _let_go(self, name: str) -> None:
        if tail := self._tails.pop(name, None):
            tail.close()

    def close(self) -> None:
        """Let go of the trace."""
        for tail in self._tails.values():
            tail.close()


def models_of(path: Path) -> list[str]:
    """What the models of a recording's main contexts are called, as ``--model`` takes it, in their order."""
    found: list[dict[str, object]] = []
    store = TraceStore(path)
    for context in store.contexts:
        if naming.role(context.facts) == "main" and not any(
            naming.same_model(context.facts, f) for f in found
        ):
            found.append(dict(context.facts))
    store.close()
    return list(dict.fromkeys(naming.called(facts) for facts in found))


def _of_requests(trace: Trace, until: int | None) -> tuple[dict[str, int], int]:
    """Tokens of each label, and positions that were cached; of the requests that had ended by then."""
    requests = trace.requests
    if until is not None:
        requests = requests[requests["end_ns"] <= until]
    sizes = requests["n_prefill"] + requests["n_decode"]
    by_domain: dict[str, int] = {}
    for label, size in zip(requests["label"].tolist(), sizes.tolist(), strict=True):
        name = label if isinstance(label, str) else ""
        by_domain[name] = by_domain.get(name, 0) + int(size)
    return by_domain, int(requests["n_cached"].fillna(0).sum())


def _sum(buckets: list[_Bucket], shape: tuple[int, ...]) -> NDArray[np.uint64]:
    out = np.zeros(shape, np.uint64)
    for bucket in buckets:
        out += bucket.counts
    return out


def _replayed(trace: Trace, more: bool) -> list[Context]:
    """Contexts of a recording that is replayed: what was lost is not known by time, and said at the end."""
    return [
        Context(
            c.name,
            "replayed",
            c.ring_fill,
            c.counters,
            0 if more else c.lost,
            0 if more else c.events_lost,
            0,
        )
        for c in _contexts(trace)
    ]


def _contexts(trace: Trace) -> list[Context]:
    out = []
    for part in trace.parts:
        counters, fill, intervention = part.counters, float("nan"), 0
        state = "recording" if trace.live else "ended"
        with contextlib.suppress(MoetraceError, OSError), Ring(part.store_context.ring) as ring:
            counters, intervention = ring.counters, ring.intervention_active
            fill = (ring.head - ring.tail) / ring.capacity
            state = "ended" if ring.closed else "paused" if ring.paused else state
        out.append(
            Context(
                part.shown[0],
                state,
                fill,
                counters,
                sum(counters.get(name, 0) for name in LOST_COUNTERS),
                sum(counters.get(name, 0) for name in LOST_EVENT_COUNTERS),
                intervention,
            )
        )
    return out
