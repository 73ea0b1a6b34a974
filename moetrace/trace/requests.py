"""Which request does a row belong to, and was it prefill or decode?

llama.cpp knows sequences, not requests. :class:`RequestAssigner` follows every sequence through its rows and
the events between them; it is streaming, knows no files, and gives the same answer however its input is cut
into pieces.

The rules, per (context, sequence):

- A request begins at the sequence's first row, and at the first row after a LAUNCH of it (llama-server gives
  one when a slot starts and one when it ends; several without a row between count once). Once a context has
  seen a LAUNCH, nothing else begins a request: positions that fall back are then rejected speculation.
- In a context without LAUNCH, a request begins when the sequence was emptied since its last row; or when its
  tail was removed or its position fell back (no shift explains it), and its position is not beyond the last
  one or a row that is no output follows an output. Rejected speculation is the exception: an output row that
  falls back into the sequence's last batch, but not to its beginning, where that batch was decode and output
  all its rows, and the tail was removed no more than once (a new task of a slot removes it once more).
- Prefill lasts until the end of the batch that holds the request's first output row; what follows is decode.
  A request that begins with an output row on positions copied from another sequence has no prefill.
- Rows without a sequence, and batches that llama.cpp decodes for itself, belong to no request and have no
  phase.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.trace.record import EventCode, RowFlag
from moetrace.trace.rows import Columns, ColumnSpec


class Phase(IntEnum):
    """Column ``phase``."""

    PREFILL = 0
    DECODE = 1
    UNKNOWN = 2


#: the table ``requests``
REQUEST_TABLE: ColumnSpec = {
    "request": ("<i8", ()),
    "context": ("<u4", ()),
    "sequence": ("<i4", ()),
    "first_serial": ("<u8", ()),
    "last_serial": ("<u8", ()),
    "start_ns": ("<i8", ()),
    "end_ns": ("<i8", ()),
    "n_cached": ("<i4", ()),
    "n_prefill": ("<i4", ()),
    "n_decode": ("<i4", ()),
    "n_lost": ("<i4", ()),
    "n_rejected": ("<i4", ()),
    "n_shifts": ("<i4", ()),
    "n_unrecorded": ("<i4", ()),
    "n_events_lost": ("<i4", ()),
}
#: what traces of format 1.0 do not have of it
NOT_IN_1_0 = ("n_unrecorded", "n_events_lost")

#: the columns that :meth:`RequestAssigner.feed` reads
ROW_INPUTS = ("serial", "time_ns", "batch", "position", "sequence", "flags")
EVENT_INPUTS = ("serial", "code", "sequence", "p0", "p1", "arg")

CHUNK = 1 << 18  # rows looked at together
_END = 1 << 40  # beyond every position
_NEVER = -2  # before every batch, and before the one before the first

#: rows of one request that still stand: [first position, last position, rows at each position]
_Run = list[int]


@dataclass(slots=True)
class _Request:
    sequence: int
    first_serial: int
    start_ns: int
    n_cached: int
    id: int = -1
    last_serial: int = 0
    end_ns: int = 0
    first_output_batch: int = _NEVER
    n_prefill: int = 0
    n_decode: int = 0
    n_lost: int = 0
    n_rejected: int = 0
    n_shifts: int = 0
    n_unrecorded: int = 0
    n_events_lost: int = 0


@dataclass(slots=True)
class _Sequence:
    """What is known of one sequence between two of its rows."""

    number: int
    request: _Request | None = None  # None: the next row begins one
    own: list[_Run] = field(default_factory=list)
    last: int = -1  # position of the last row, shifts followed
    top: int = -1  # last position that still stands
    last_output: bool = False
    missing: int = 0  # rows missing in the context before the last row or LAUNCH
    batch: int = _NEVER  # of the last row
    batch_first: int = -1  # position of the batch's first row here, shifts followed
    batch_output: bool = False  # all the batch's rows here are outputs
    # since the last row:
    cuts: int = 0  # how often the tail went
    emptied: bool = False  # everything went
    copied: bool = False  # positions came from another sequence
    waiting: int = 0  # rows removed: rejected if the request goes on


@dataclass(slots=True)
class _Event:
    row: int  # it happened before this row of the feed
    launches: bool  # a LAUNCH has been seen in the context by then
    missing: int
    code: int
    sequence: int
    p0: int
    p1: int
    arg: int


@dataclass(slots=True)
class _Rows:
    """The rows of one sequence in one feed, and the answer for them."""

    serial: NDArray[np.int64]
    time_ns: NDArray[np.int64]
    batch: NDArray[np.int64]
    position: NDArray[np.int64]
    output: NDArray[np.bool_]
    missing: NDArray[np.int64]
    launches: NDArray[np.bool_]
    odd: NDArray[np.int64]  # rows whose position is not the previous one's plus 1
    falls: list[int]  # rows whose position is less than the previous one's
    request: NDArray[np.int64]
    phase: NDArray[np.uint8]


class RequestAssigner:
    """The streaming state machine of one context.

    Parameters
    ----------
    context
        Index of the context in the trace; goes into the requests' column ``context``.
    allot
        Gives the number of each new request. Contexts of one trace share it, so that numbers are unique.
    """

    def __init__(self, context: int = 0, allot: Callable[[], int] | None = None) -> None:
        self.context = context
        self._allot = allot if allot is not None else itertools.count().__next__
        self._sequences: dict[int, _Sequence] = {}
        self._launches = False
        self._n_rows = 0
        self._begun: list[_Request] = []  # in this feed
        self._touched: list[_Request] = []  # in this feed, once per piece of rows
        self._ended: list[_Request] = []

    def feed(
        self, rows: Mapping[str, NDArray[Any]], events: Mapping[str, NDArray[Any]] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Take the next rows and the events among them.

        Parameters
        ----------
        rows
            Columns of the table ``rows``, each (n,), in order; ``ROW_INPUTS`` are read. Serials ascend.
        events
            Columns of the table ``events``, in order. An event of serial s happened before the row of
            serial s; one that follows the last row may come with this feed or with the next.

        Returns
        -------
        request : int64 (n,)
            The number of each row's request, -1 for none. Numbers ascend in the order of first rows.
        phase : uint8 (n,)
            See :class:`Phase`.
        """
        n = len(rows["serial"])
        serial = np.asarray(rows["serial"]).astype(np.int64)
        # what llama.cpp decodes for itself belongs to no request
        trial = (np.asarray(rows["flags"]) & RowFlag.TRIAL) != 0
        sequence = np.where(trial, -1, rows["sequence"])
        columns = {name: np.asarray(rows[name]) for name in ROW_INPUTS}
        missing = serial - np.arange(self._n_rows, self._n_rows + n)
        happened = self._happened(events, serial)
        launches_from = 0 if self._launches else min((e.row for e in happened if e.launches), default=n)
        piece_of = np.full(n, -1, np.int64)
        phase = np.full(n, Phase.UNKNOWN, np.uint8)

        order = np.argsort(sequence, kind="stable")
        numbers, starts = np.unique(sequence[order], return_index=True)
        ends = [*starts[1:].tolist(), n][: len(starts)]
        index_of = {
            int(s): order[a:b] for s, a, b in zip(numbers, starts.tolist(), ends, strict=True) if s >= 0
        }
        events_of = self._events_of(happened, index_of.keys() | self._sequences.keys())
        for number in sorted(index_of.keys() | events_of.keys()):
            index = index_of.get(number, order[:0])
            position = columns["position"][index].astype(np.int64)
            step = np.diff(position)
            data = _Rows(
                serial=serial[index],
                time_ns=columns["time_ns"][index],
                batch=columns["batch"][index].astype(np.int64),
                position=position,
                output=(columns["flags"][index] & RowFlag.OUTPUT) != 0,
                missing=missing[index],
                launches=index >= launches_from,
                odd=np.flatnonzero(step != 1) + 1,
                falls=(np.flatnonzero(step < 0) + 1).tolist(),
                request=np.empty(len(index), np.int64),
                phase=np.empty(len(index), np.uint8),
            )
            self._follow(
                self._sequences.setdefault(number, _Sequence(number)), data, index, events_of.get(number, [])
            )
            piece_of[index] = data.request
            phase[index] = data.phase

        # requests are numbered in the order of their first rows, whatever their sequence
        for request in sorted(self._begun, key=lambda r: r.first_serial):
            request.id = self._allot()
        ids = np.array([*(r.id for r in self._touched), -1], np.int64)
        self._begun, self._touched = [], []
        self._launches = self._launches or any(e.launches for e in happened)
        self._n_rows += n
        return ids[piece_of], phase

    def take_ended(self) -> Columns:
        """Give the requests that ended since the last call: the columns of the table ``requests``."""
        ended = sorted(self._ended, key=lambda r: r.first_serial)
        self._ended = []
        return self._table(ended)

    def finish(self) -> Columns:
        """End all requests and give those not yet taken: the columns of the table ``requests``."""
        for state in self._sequences.values():
            self._end(state, keep_waiting=self._launches and not state.emptied)
        return self.take_ended()

    def _table(self, requests: list[_Request]) -> Columns:
        def value(request: _Request, name: str) -> int:
            return (
                self.context
                if name == "context"
                else request.id
                if name == "request"
                else getattr(request, name)
            )

        def column(name: str, dtype: str) -> NDArray[Any]:
            room = np.iinfo(dtype)  # rows that are damaged may say anything
            return np.array([min(max(value(r, name), room.min), room.max) for r in requests], dtype)

        return {name: column(name, dtype) for name, (dtype, _) in REQUEST_TABLE.items()}

    # -- events --------------------------------------------------------------------------------------

    def _happened(self, events: Mapping[str, NDArray[Any]] | None, serial: NDArray[np.int64]) -> list[_Event]:
        if events is None or len(events["serial"]) == 0:
            return []
        columns = [np.asarray(events[name]).astype(np.int64).tolist() for name in EVENT_INPUTS]
        before = np.searchsorted(serial, np.asarray(columns[0], np.int64)).tolist()
        launches, happened = self._launches, []
        for row, (number, code, sequence, p0, p1, arg) in zip(
            before, zip(*columns, strict=True), strict=True
        ):
            launches = launches or code == EventCode.LAUNCH
            missing = number - (self._n_rows + row)
            happened.append(
                _Event(row, launches, missing, code, sequence, max(p0, 0), p1 if p1 >= 0 else _END, arg)
            )
        return happened

    @staticmethod
    def _events_of(happened: list[_Event], known: Iterable[int]) -> dict[int, list[_Event]]:
        """Sort the events by the sequences that they concern, in order."""
        result: dict[int, list[_Event]] = {}
        # a LAUNCH, and a copy into it, matter to a sequence that has had no row yet
        known = set(known) | {e.sequence for e in happened if e.code == EventCode.LAUNCH and e.sequence >= 0}
        known |= {e.arg for e in happened if e.code == EventCode.SEQ_CP and e.arg >= 0}
        for event in happened:
            if event.code == EventCode.SEQ_CP:
                concerned = {event.arg} & known
            elif event.code == EventCode.SEQ_KEEP:
                concerned = known - {event.sequence}
            elif event.code == EventCode.CLEAR or event.sequence < 0:
                concerned = known
            else:
                concerned = {event.sequence} & known
            for number in concerned:
                result.setdefault(number, []).append(event)
        return result

    def _apply(self, state: _Sequence, event: _Event) -> None:
        code, p0, p1 = event.code, event.p0, event.p1
        if p0 >= p1 and code in (EventCode.SEQ_RM, EventCode.SEQ_ADD, EventCode.SEQ_DIV):
            return  # names no position
        if code == EventCode.LAUNCH:
            self._end(state, keep_waiting=not state.emptied)
            if event.sequence >= 0:
                state.missing = event.missing
        elif code in (EventCode.CLEAR, EventCode.SEQ_KEEP) or (
            code == EventCode.SEQ_RM and p0 == 0 and p1 == _END
        ):
            state.waiting += _count(state.own)
            state.own, state.top, state.emptied = [], -1, True
            state.cuts += 1
            if not event.launches:
                self._end(state, keep_waiting=False)
        elif code == EventCode.SEQ_RM and p1 > state.top:
            state.waiting += _count(state.own)
            state.own = _map(state.own, p0, _END, lambda p: None)
            state.waiting -= _count(state.own)
            state.top = min(state.top, p0 - 1)
            state.cuts += 1
        elif code == EventCode.SEQ_RM:  # a hole in the middle: a context shift begins so
            state.own = _map(state.own, p0, p1, lambda p: None)
        elif code in (EventCode.SEQ_ADD, EventCode.SEQ_DIV):
            arg = event.arg
            if code == EventCode.SEQ_DIV and arg < 1:
                return

            def moved(p: int) -> int:
                return p + arg if code == EventCode.SEQ_ADD else p // arg

            state.own = _map(state.own, p0, p1, moved)
            for name in ("last", "top", "batch_first"):
                p = getattr(state, name)
                setattr(state, name, moved(p) if p0 <= p < p1 else p)
            if state.request is not None and code == EventCode.SEQ_ADD and arg < 0:
                state.request.n_shifts += 1
        elif code == EventCode.SEQ_CP:
            state.copied = True
        elif code == EventCode.RESTORE:
            state.cuts += 2  # what was there before says nothing of what is there now

    # -- rows ----------------------------------------------------------------------------------------

    def _follow(self, state: _Sequence, data: _Rows, index: NDArray[np.intp], events: list[_Event]) -> None:
        """Go through one sequence's rows and events in order."""
        stops = np.searchsorted(index, [e.row for e in events]).tolist() if events else []
        start = 0
        for event, stop in zip(events, stops, strict=True):
            self._go(state, data, start, stop)
            self._apply(state, event)
            start = stop
        self._go(state, data, start, len(index))

    def _go(self, state: _Sequence, data: _Rows, start: int, stop: int) -> None:
        """Go through rows [start, stop) of one sequence, between which no event lies."""
        while start < stop:
            i = bisect.bisect_right(data.falls, start)
            end = min(stop, data.falls[i]) if i < len(data.falls) else stop
            self._piece(state, data, start, end)
            start = end

    def _begins(self, state: _Sequence, data: _Rows, i: int) -> bool:
        if state.request is None:
            return True
        if data.launches[i]:
            return False
        position = data.position[i]
        rejected = (
            data.output[i]
            and state.cuts <= 1
            and state.batch_first < position <= state.last
            and state.batch_output
            and state.batch > state.request.first_output_batch
        )
        return bool(
            (state.cuts or position < state.last)
            and (position <= state.last or (state.last_output and not data.output[i]))
            and not rejected
        )

    def _piece(self, state: _Sequence, data: _Rows, a: int, b: int) -> None:
        """Take rows [a, b), whose positions nowhere fall back."""
        first, last = int(data.position[a]), int(data.position[b - 1])
        missing = int(data.missing[a]) - state.missing
        if self._begins(state, data, a):
            self._end(state, keep_waiting=False)
            unknown = first < 0 or (first > 0 and missing > 0)
            state.request = _Request(
                state.number, int(data.serial[a]), int(data.time_ns[a]), n_cached=-1 if unknown else first
            )
            if state.copied and first > 0 and data.output[a]:
                # its prompt was computed in another sequence, and it begins with what was sampled there
                state.request.first_output_batch = int(data.batch[a]) - 1
            self._begun.append(state.request)
        else:
            assert state.request is not None
            request = state.request
            request.n_rejected += state.waiting
            if first < state.top:
                request.n_rejected += _count(state.own)
                state.own = _map(state.own, first, _END, lambda p: None)
                request.n_rejected -= _count(state.own)
            elif not state.copied:
                request.n_lost += max(0, min(first - state.top - 1, missing))
        request = state.request

        data.request[a:b] = len(self._touched)
        self._touched.append(request)
        lo, hi = np.searchsorted(data.odd, [a + 1, b]).tolist()
        odd = data.odd[lo:hi]
        if len(odd):
            gap = data.position[odd] - data.position[odd - 1] - 1
            gone = np.minimum(gap, data.missing[odd] - data.missing[odd - 1])
            request.n_lost += int(np.maximum(gone, 0).sum())
        for run in _runs(data.position[a:b], regular=len(odd) == 0):
            if state.own and state.own[-1][1] + 1 == run[0] and state.own[-1][2] == run[2]:
                state.own[-1][1] = run[1]
            else:
                state.own.append(run)

        n_decode = 0
        if request.first_output_batch == _NEVER:
            output = data.output[a:b]
            i = int(output.argmax())
            if output[i]:
                request.first_output_batch = int(data.batch[a + i])
        if request.first_output_batch == _NEVER:
            data.phase[a:b] = Phase.PREFILL
        else:
            decode = data.batch[a:b] > request.first_output_batch
            data.phase[a:b] = decode
            n_decode = int(np.count_nonzero(decode))
        request.n_decode += n_decode
        request.n_prefill += b - a - n_decode
        request.last_serial = int(data.serial[b - 1])
        request.end_ns = int(data.time_ns[b - 1])

        state.last = state.top = last
        state.last_output = bool(data.output[b - 1])
        state.missing = int(data.missing[b - 1])
        batch = int(data.batch[b - 1])
        k = a + int(np.searchsorted(data.batch[a:b], batch))
        if k > a or batch != state.batch:
            state.batch, state.batch_first, state.batch_output = batch, int(data.position[k]), True
        state.batch_output = state.batch_output and bool(data.output[k:b].all())
        state.cuts = 0
        state.emptied = state.copied = False
        state.waiting = 0

    def _end(self, state: _Sequence, *, keep_waiting: bool) -> None:
        if state.request is not None:
            if keep_waiting:
                state.request.n_rejected += state.waiting
            self._ended.append(state.request)
        state.request, state.own, state.waiting = None, [], 0


def _runs(positions: NDArray[np.int64], *, regular: bool) -> list[_Run]:
    """Describe ascending positions as runs; ``regular`` says that each is the previous one plus 1."""
    if regular:
        return [[int(positions[0]), int(positions[-1]), 1]]
    values, counts = np.unique(positions, return_counts=True)
    breaks = np.flatnonzero((np.diff(values) != 1) | (np.diff(counts) != 0)) + 1
    return [
        [int(v[0]), int(v[-1]), int(c[0])]
        for v, c in zip(np.split(values, breaks), np.split(counts, breaks), strict=True)
    ]


def _count(runs: list[_Run]) -> int:
    return sum((last - first + 1) * n for first, last, n in runs)


def _map(runs: list[_Run], p0: int, p1: int, moved: Callable[[int], int | None]) -> list[_Run]:
    """Move the positions in [p0, p1); ``moved`` keeps order, or gives None for positions that go."""
    result: list[_Run] = []
    for first, last, n in runs:
        if first < p0:
            result.append([first, min(last, p0 - 1), n])
        a, b = max(first, p0), min(last, p1 - 1)
        if a <= b:
            start, stop = moved(a), moved(b)
            if start is not None and stop is not None:
                if stop - start == b - a:
                    result.append([start, stop, n])
                else:  # divided: several positions fall together
                    many = [moved(p) for p in range(a, b + 1)]
                    result += [[r[0], r[1], r[2] * n] for r in _runs(np.array(many, np.int64), regular=False)]
        if last >= p1:
            result.append([max(first, p1), last, n])
    return result


def allot_again(request: NDArray[Any], then: Callable[[], int] | None = None) -> Callable[[], int]:
    """Allot a stored column ``request``'s numbers again, for :func:`replay`.

    What comes after them ``then`` allots; without it, numbers go on after the last.
    """
    stored = _first_seen(request)
    last = -1

    def allot() -> int:
        nonlocal last
        number = next(stored, None)
        if number is None:
            number = last + 1 if then is None else then()
        last = max(last, number)
        return number

    return allot


def _first_seen(request: NDArray[Any]) -> Iterator[int]:
    """Give the numbers in the order of their first rows."""
    seen: set[int] = set()
    for start in range(0, len(request), CHUNK):
        values, first = np.unique(request[start : start + CHUNK], return_index=True)
        for number in values[np.argsort(first)].tolist():
            if number >= 0 and number not in seen:
                seen.add(number)
                yield number


def replay(
    assigner: RequestAssigner, rows: Mapping[str, NDArray[Any]], events: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.uint8]]]:
    """Feed a whole table of rows and its events to an assigner, a piece at a time.

    Yields the first row of each piece, and what :meth:`RequestAssigner.feed` gave for it.
    """
    n, n_events = len(rows["serial"]), len(events["serial"])
    start = fed = 0
    while start < n or fed < n_events:
        stop = min(start + CHUNK, n)
        upto = n_events
        if stop < n:
            upto = int(np.searchsorted(events["serial"], rows["serial"][stop - 1], side="right"))
            upto = max(upto, fed)
        yield (
            start,
            *assigner.feed(
                {name: rows[name][start:stop] for name in ROW_INPUTS},
                {name: events[name][fed:upto] for name in EVENT_INPUTS},
            ),
        )
        start, fed = stop, upto
