"""The end of a live trace: what its new rows say is added up as they come."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
_OLD_S = 60.0  # what is older is kept in longer stretches: a bucket is layers × experts
HISTORY_S = 3600.0
LABEL_ROWS = 200_000
_SHARE = 0.25  # of experts, for `served`
_SHARE_OF_TIME = 0.02  # of tables of all requests and their labels
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
_PHASES = {Phase.PREFILL: "prefill", Phase.DECODE: "decode", Phase.UNKNOWN: "unknown"}


@dataclass
class _Bucket:
    """What came in some seconds."""

    began: float
    counts: NDArray[np.uint32]
    tokens: dict[str, int]


@dataclass
class _Seldom:
    """Work that grows with the trace: done again when it took no more than :data:`_SHARE_OF_TIME` of the time since.

    Attributes
    ----------
    least
        Seconds between two times, at least.
    """

    least: float
    _next: float = -np.inf

    def due(self, now: float) -> bool:
        return now >= self._next

    @contextlib.contextmanager
    def done(self, now: float) -> Iterator[None]:
        """Measure the work inside."""
        began = time.perf_counter()
        yield
        self._next = now + max(self.least, (time.perf_counter() - began) / _SHARE_OF_TIME)


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
class Active:
    """The latest request of a slot that got tokens in the last seconds.

    Attributes
    ----------
    request, slot
        Its number, and its slot's.
    name
        The client's id and label, as far as they are known already; "" if neither is. With very many requests they are
        looked up more seldom.
    phase
        Of its latest token.
    tokens
        How many it got while it was watched.
    """

    request: int
    slot: int
    name: str
    phase: str
    tokens: int


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
    active
        Of each slot that got tokens in the last seconds, the latest request.
    served
        Share of the last seconds' activations that the hottest quarter of each layer's experts, by the time before
        them, would have served; NaN where nothing was watched before.
    of_label
        (L, E) uint64 of the label that was asked for, in the latest :data:`LABEL_ROWS` rows; None if none was.
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
    active: tuple[Active, ...] = ()
    served: float = float("nan")
    of_label: NDArray[np.uint64] | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values, by layer: what the page draws."""
        return {
            "layers": self.layers.tolist(),
            "n_expert": self.n_expert.tolist(),
            "recent": self.recent.tolist(),
            "hour": self.hour.tolist(),
            "all": self.counts.tolist(),
            "tokens": self.tokens,
            "per_second": self.per_second,
            "by_domain": self.by_domain,
            "entries": self.entries,
            "cached": self.cached,
            "live": self.live,
            "served": None if np.isnan(self.served) else self.served,
            "active": [
                {
                    "slot": one.slot,
                    "request": one.request,
                    "name": one.name,
                    "phase": one.phase,
                    "tokens": one.tokens,
                }
                for one in self.active
            ],
            "contexts": [
                {
                    "name": context.name,
                    "state": context.state,
                    "ring_fill": None if np.isnan(context.ring_fill) else context.ring_fill,
                    "lost": context.lost,
                    "events_lost": context.events_lost,
                    "intervention": context.intervention,
                }
                for context in self.contexts
            ],
        }


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
    label
        Count the rows of this label apart; None: of none.
    every
        Seconds between looks, about: what comes while nobody looks for twice as long is of no known second.
    """

    path: Path
    model: str | None = None
    clock: Callable[[], float] = time.monotonic
    replay: float | None = None
    label: str | None = None
    every: float = 1.0
    _active: dict[int, tuple[float, int, int, int]] = field(default_factory=dict)
    _labelled: tuple[str | None, NDArray[np.uint64] | None] = (None, None)
    _by_label: _Seldom = field(default_factory=lambda: _Seldom(BUCKET_S))
    _began: float | None = None
    _trace: Trace | None = None
    _looked: float = -np.inf
    _seen: dict[str, int] = field(default_factory=dict)
    _buckets: deque[_Bucket] = field(default_factory=deque)  # the one that is filled, and the one before
    _old: deque[_Bucket] = field(default_factory=deque)
    _counts: NDArray[np.uint64] | None = None
    _tokens: dict[str, int] = field(default_factory=dict)
    _entries: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(State), np.int64))
    _requests: tuple[dict[str, int], int] = ({}, 0)
    _said: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    _totals: _Seldom = field(default_factory=lambda: _Seldom(BUCKET_S))
    _names: _Seldom = field(default_factory=lambda: _Seldom(0.0))

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
            self._old.clear()
        # after a time without looks: rows of that time are of no known second, as those before the first look are
        watched = self.replay is not None or now - self._looked < 2 * max(BUCKET_S, self.every)
        self._looked = now
        self._begin(now, shape, keep=2 if watched else 1)
        for part in trace.parts:
            self._count(part, part.shown[0], until, watched=watched)
        return self._snapshot(trace, now, until)

    def _begin(self, now: float, shape: tuple[int, ...], keep: int) -> None:
        """Begin a bucket if it is time; what is before the ``keep`` latest is old."""
        if not self._buckets or now - self._buckets[-1].began >= BUCKET_S:
            self._buckets.append(_Bucket(now, np.zeros(shape, np.uint32), {}))
        while len(self._buckets) > keep:
            before = self._buckets.popleft()
            if self._old and before.began - self._old[-1].began < _OLD_S:
                self._old[-1].counts += before.counts
            else:
                self._old.append(before)
        while self._old and now - self._old[0].began > HISTORY_S:
            self._old.popleft()

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
            if watched:
                self._note(part, rows, real)
            for phase, said in _PHASES.items():
                n = int((phases == phase).sum())
                if n:
                    self._tokens[said] = self._tokens.get(said, 0) + n
                    if watched:
                        tokens = self._buckets[-1].tokens
                        tokens[said] = tokens.get(said, 0) + n
        self._seen[name] = end

    def _note(self, part: Trace, rows: slice, real: NDArray[np.bool_]) -> None:
        """Remember which requests the rows are of."""
        request = np.asarray(part.request[rows])[real]
        slot, phase = np.asarray(part.sequence[rows])[real], np.asarray(part.phase[rows])[real]
        # the last row of each
        numbers, from_end, size = np.unique(request[::-1], return_index=True, return_counts=True)
        last = len(request) - 1 - from_end
        for number, at, n in zip(numbers.tolist(), last.tolist(), size.tolist(), strict=True):
            if number >= 0:
                before = self._active.get(number, (0.0, 0, 0, 0))[3]
                self._active[number] = (self._buckets[-1].began, int(slot[at]), int(phase[at]), before + n)

    def _count_label(self, trace: Trace) -> NDArray[np.uint64] | None:
        """Count the latest rows whose request has the label; at most :data:`BUCKET_S` old, or a little more."""
        if self.label is None:
            return None
        now = self.clock()
        label, counts = self._labelled
        if label == self.label and not self._by_label.due(now):
            return counts
        with self._by_label.done(now):
            assert self._counts is not None
            n_layers, e = self._counts.shape
            counts = np.zeros((n_layers, e), np.uint64)
            table = trace.requests
            mine = table.index[table["label"] == self.label].to_numpy()
            left = LABEL_ROWS
            for part in reversed(trace.parts):
                rows = slice(max(len(part) - left, 0), len(part))
                left -= rows.stop - rows.start
                chosen = rows.start + np.flatnonzero(np.isin(np.asarray(part.request[rows]), mine))
                for i in range(counts.shape[0]):
                    ids = np.asarray(part.column("experts", chosen))[:, i].astype(np.int64)
                    counts[i] += np.bincount(ids[ids != part.sentinel], minlength=counts.shape[1]).astype(
                        np.uint64
                    )
            self._labelled = (self.label, counts)
        return counts

    def _snapshot(self, trace: Trace, now: float, until: int | None) -> Snapshot:
        assert self._counts is not None
        latest = list(self._buckets)
        seconds = max(now - latest[0].began, 1e-9)
        tokens = {said: sum(b.tokens.get(said, 0) for b in latest) for said in _PHASES.values()}
        if until is not None or self._totals.due(now):
            with self._totals.done(now):
                self._requests = _of_requests(trace, until)
                _give_back()
        more = any(self._seen[part.shown[0]] < len(part.serial) for part in trace.parts)
        by_domain, cached = self._requests
        self._active = {n: a for n, a in self._active.items() if a[0] >= latest[0].began}
        if any(n not in self._said for n in self._active) and self._names.due(now):
            with self._names.done(now):
                said = trace.labelling.said
                self._said = {n: said[n] for n in self._active if n in said}
        recent = _sum(latest, self._counts.shape)
        hour = _sum(self._old, self._counts.shape) + recent
        return Snapshot(
            np.asarray(trace.layers),
            np.asarray(trace.n_expert),
            self._counts.copy(),
            dict(self._tokens),
            dict(by_domain),
            recent,
            hour,
            {said: n / seconds for said, n in tokens.items() if n},
            {state.name.lower(): int(self._entries[state]) for state in State},
            cached,
            tuple(_contexts(trace) if until is None else _replayed(trace, more)),
            trace.live if until is None else more,
            self._named(),
            served_by_hottest(hour - recent, recent, np.asarray(trace.n_expert)),
            self._count_label(trace),
        )

    def _named(self) -> tuple[Active, ...]:
        out = []
        for number, (_, slot, phase, tokens) in self._active.items():
            names = [self._said.get(number, {}).get(key) for key in ("id", "label")]
            name = " · ".join(str(text) for text in names if text)
            out.append(Active(number, slot, name, _PHASES[Phase(min(phase, 2))], tokens))
        latest = {one.slot: one for one in sorted(out, key=lambda one: one.request)}
        return tuple(latest[slot] for slot in sorted(latest))

    def close(self) -> None:
        """Let go of the trace."""
        if self._trace is not None:
            self._trace.close()


@dataclass
class Tails:
    """Follows every model of a recording, also those that are loaded while it goes on: a router's.

    Attributes
    ----------
    path, model, clock, replay, label, every
        As for :class:`Tail`; with ``model`` only that one is followed.
    """

    path: Path
    model: str | None = None
    clock: Callable[[], float] = time.monotonic
    replay: float | None = None
    label: str | None = None
    every: float = 1.0
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
        for tail in self._tails.values():
            tail.label = self.label
        return {name: tail.look() for name, tail in self._tails.items()}

    def _follow(self, name: str, model: str | None) -> None:
        if name not in self._tails:
            self._tails[name] = Tail(self.path, model, self.clock, self.replay, every=self.every)

    def _let_go(self, name: str) -> None:
        if tail := self._tails.pop(name, None):
            tail.close()

    def close(self) -> None:
        """Let go of the trace."""
        for tail in self._tails.values():
            tail.close()


def _give_back() -> None:
    """Give free memory back to the system: of tables that grow, C libraries keep what each left, in pieces."""
    if _TRIM is not None:
        _TRIM(0)


def keep_small() -> None:
    """Have what looks leave behind collected soon, in a process that does nothing else.

    Python looks for cycles of all ages only when a quarter has come to all there is, and most of that are libraries.
    """
    gc.collect()
    gc.freeze()
    gc.collect()


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


def served_by_hottest(
    before: NDArray[np.uint64], now: NDArray[np.uint64], n_expert: NDArray[np.int64], share: float = _SHARE
) -> float:
    """Share of ``now`` that each layer's hottest experts in ``before`` serve: (L, E) counts; NaN where one is empty."""
    there = (before.sum(axis=1) > 0) & (now.sum(axis=1) > 0)
    served = total = 0
    for i in np.flatnonzero(there).tolist():
        hottest = np.argsort(before[i].astype(np.int64) * -1, kind="stable")[
            : max(1, int(n_expert[i] * share))
        ]
        served += int(now[i, hottest].sum())
        total += int(now[i].sum())
    return served / total if total else float("nan")


def _sum(buckets: Iterable[_Bucket], shape: tuple[int, ...]) -> NDArray[np.uint64]:
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
