"""Which request does a row belong to, and was it prefill or decode?

llama.cpp knows sequences, not requests. :class:`RequestAssigner` follows every sequence through its rows and
the events between them; it is streaming, knows no files, and gives the same answer however its input is cut
into pieces.

The rules, per (context, sequence):

- A request begins at the sequence's first row, and at the first row after a LAUNCH of it (llama-server gives
  one when a slot starts and one when it ends; several without a row between count once). Once a context has
  seen a LAUNCH, nothing else begins a request: positions that fall back are then rejected speculation.
  Rows of another ``task`` than the sequence's last one begin one too: their LAUNCH was lost.
- In a context without LAUNCH, a request begins when the sequence was emptied since its last row; or when its
  tail was removed or its position fell back (no shift explains it), and its position is not beyond the last
  one or a row that is no output follows an output. Rejected speculation is the exception: an output row that
  falls back into the sequence's last batch, but not to its beginning, where that batch was decode and output
  all its rows, and the tail was removed no more than once (a new task of a slot removes it once more).
- Prefill lasts until the request's first row that is GENERATED; that row and what follows is decode. A request
  that begins with an output row on positions copied from another sequence has no prefill.
- Rows removed from a sequence's end wait for what its request computes next. As long as that is the same
  tokens at the same positions, they were computed again; from the first other token on they were rejected
  drafts. Where nothing follows, or not where they began, it is undecided.
- A CONTEXT ends all requests, and nothing is left in any sequence's memory.
- Rows without a sequence, and batches that llama.cpp decodes for itself, belong to no request and have no
  phase.

Contexts that do not number (``Layout.numbered``) have neither ``task`` nor GENERATED nor CONTEXT. There prefill
lasts until the end of the batch that holds the request's first output row, and all rows removed from the end
are rejected if the request goes on, or a LAUNCH ends it.
"""

from __future__ import annotations

import bisect
import copy
import itertools
from collections import deque
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
    "n_recomputed": ("<i4", ()),
    "n_undecided": ("<i4", ()),
    "n_unrecorded": ("<i4", ()),
    "n_events_lost": ("<i4", ()),
}
#: what traces of format 1.0 do not have of it
NOT_IN_1_0 = ("n_recomputed", "n_undecided", "n_unrecorded", "n_events_lost")
#: what is not certain of a request while events were lost
UNCERTAIN = ("n_cached", "n_rejected", "n_recomputed", "n_undecided", "n_shifts", "n_unrecorded")

#: the columns that :meth:`RequestAssigner.feed` reads
ROW_INPUTS = ("serial", "time_ns", "batch", "position", "sequence", "flags")
EVENT_INPUTS = ("serial", "code", "sequence", "p0", "p1", "arg")
#: and those that it reads too of contexts that number
NUMBERED_ROW_INPUTS = ("token", "task", "events_before")
NUMBERED_EVENT_INPUTS = ("number",)
ROW_COLUMNS = (*ROW_INPUTS, *NUMBERED_ROW_INPUTS)

CHUNK = 1 << 18  # rows looked at together
_END = 1 << 40  # beyond every position
_NEVER = -2  # before every batch, and before the one before the first
_NONE = np.empty((2, 0), np.int64)
_OF_ALL = (EventCode.CLEAR, EventCode.RESUME, EventCode.CONTEXT)  # whatever sequence they name


@dataclass(slots=True)
class _Request:
    sequence: int
    first_serial: int
    start_ns: int
    n_cached: int
    lost_before: int  # events lost in the context before the sequence's row before its first
    id: int = -1
    last_serial: int = 0
    end_ns: int = 0
    first_output_batch: int = _NEVER  # where rows are not numbered
    decoding: bool = False  # where they are
    n_prefill: int = 0
    n_decode: int = 0
    n_lost: int = 0
    n_rejected: int = 0
    n_shifts: int = 0
    n_recomputed: int = -1  # -1: not numbered, not known
    n_undecided: int = -1
    n_unrecorded: int = -1
    n_events_lost: int = -1


class _Standing:
    """Position and token of a request's rows that still stand in memory, as they were computed."""

    __slots__ = ("_room", "n")

    def __init__(self) -> None:
        self._room, self.n = _NONE, 0

    @property
    def position(self) -> NDArray[np.int64]:
        return self._room[0, : self.n]

    def add(self, position: NDArray[np.int64], token: NDArray[np.int64]) -> None:
        old, self.n = self.n, self.n + len(position)
        if self.n > self._room.shape[1]:
            room = np.empty((2, 2 * self.n), np.int64)
            room[:, :old] = self._room[:, :old]
            self._room = room
        self._room[:, old : self.n] = position, token

    def remove(self, gone: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Remove these, and give their positions and tokens, (2, n)."""
        if not gone.any():
            return _NONE
        rows = self._room[:, : self.n]
        removed, kept = rows[:, gone], rows[:, ~gone]
        self.n = kept.shape[1]
        self._room[:, : self.n] = kept
        return removed


@dataclass(slots=True)
class _Sequence:
    """What is known of one sequence between two of its rows."""

    number: int
    request: _Request | None = None  # None: the next row begins one
    own: _Standing = field(default_factory=_Standing)
    last: int = -1  # position of the last row, shifts followed
    top: int = -1  # last position that still stands
    last_output: bool = False
    missing: int = 0  # rows missing in the context before the last row or LAUNCH
    unrecorded: int = 0  # likewise: rows that went by while recording was off
    lost: int = 0  # events lost in the context before the last row
    task: int = 0  # of the last row
    batch: int = _NEVER  # of the last row
    batch_first: int = -1  # position of the batch's first row here, shifts followed
    batch_output: bool = False  # all the batch's rows here are outputs
    batch_decode: bool = False  # its first row here was decode; where rows are numbered
    # since the last row:
    cuts: int = 0  # how often the tail went
    emptied: bool = False  # everything went
    copied: bool = False  # positions came from another sequence
    shifts: int = 0  # context shifts, which count when the request goes on; where events are numbered
    cut: NDArray[np.int64] = field(default_factory=_NONE.copy)  # (2, n): rows removed, to be judged
    loose: int = 0  # of these, removed before everything went

    def set_aside(self, gone: NDArray[np.bool_], *, all_of_it: bool = False) -> None:
        """Remove rows from the end; what comes next says what they were."""
        removed = self.own.remove(gone)
        if removed.shape[1]:
            self.cut = np.concatenate([removed, self.cut], axis=1)
        if not all_of_it:
            self.loose += removed.shape[1]


@dataclass(slots=True)
class _Event:
    row: int  # it happened before this row of the feed
    launches: bool  # a LAUNCH has been seen in the context by then
    missing: int
    unrecorded: int
    lost: int
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
    token: NDArray[np.int64]
    generated: NDArray[np.bool_]
    task: NDArray[np.int64]
    missing: NDArray[np.int64]
    unrecorded: NDArray[np.int64]
    lost: NDArray[np.int64]
    launches: NDArray[np.bool_]
    odd: NDArray[np.int64]  # rows whose position is not the previous one's plus 1
    splits: list[int]  # rows whose position is less than the previous one's, or whose task is another
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
        self._numbered = False
        self._launches = False
        self._n_rows = 0
        self._n_events = 0
        self._unrecorded = 0
        self._lost = 0  # events
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
            Columns of the table ``rows``, each (n,), in order; ``ROW_INPUTS`` are read, and
            ``NUMBERED_ROW_INPUTS`` if they have ``task``. Serials ascend.
        events
            Columns of the table ``events``, in order; ``EVENT_INPUTS`` are read, and
            ``NUMBERED_EVENT_INPUTS`` if the rows have ``task``. An event of serial s happened before the row of
            serial s; one that follows the last row may come with this feed or with the next.

        Returns
        -------
        request : int64 (n,)
            The number of each row's request, -1 for none. Numbers ascend in the order of first rows.
        phase : uint8 (n,)
            See :class:`Phase`.
        """
        n = len(rows["serial"])
        self._numbered = self._numbered or "task" in rows
        serial = np.asarray(rows["serial"]).astype(np.int64)
        # what llama.cpp decodes for itself belongs to no request
        trial = (np.asarray(rows["flags"]) & RowFlag.TRIAL) != 0
        sequence = np.where(trial, -1, rows["sequence"])
        columns = {name: np.asarray(rows[name]) for name in ROW_INPUTS}
        counted = {"missing": serial - np.arange(self._n_rows, self._n_rows + n)}
        zeros = np.zeros(n, np.int64)
        token = task = zeros
        launches_from = n
        if self._numbered:
            token, task = (np.asarray(rows[name]).astype(np.int64) for name in ("token", "task"))
            # a LAUNCH that was lost has left its number
            told = np.flatnonzero((task > 0) & (sequence >= 0))
            launches_from = int(told[0]) if len(told) else n
        launches_from = 0 if self._launches else launches_from
        happened = self._happened(events, serial, launches_from)
        launches_from = min((launches_from, *(e.row for e in happened if e.launches)))
        # before each row: how many events of this feed, and what they had counted
        upto = np.searchsorted([e.row for e in happened], np.arange(n), side="right") if happened else zeros
        counted["unrecorded"] = np.array([self._unrecorded, *(e.unrecorded for e in happened)])[upto]
        counted["lost"] = (
            _gone(np.asarray(rows["events_before"]).astype(np.int64) - (self._n_events + upto))
            if self._numbered
            else zeros
        )
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
                token=token[index],
                generated=(columns["flags"][index] & RowFlag.GENERATED) != 0,
                task=task[index],
                **{name: values[index] for name, values in counted.items()},
                launches=index >= launches_from,
                odd=np.flatnonzero(step != 1) + 1,
                splits=(np.flatnonzero((step < 0) | (np.diff(task[index]) != 0)) + 1).tolist(),
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
        self._launches = self._launches or launches_from < n or any(e.launches for e in happened)
        self._n_rows += n
        self._n_events += len(happened)
        self._unrecorded = happened[-1].unrecorded if happened else self._unrecorded
        self._lost = max((self._lost, int(counted["lost"].max(initial=0)), *(e.lost for e in happened)))
        return ids[piece_of], phase

    def take_ended(self) -> Columns:
        """Give the requests that ended since the last call: the columns of the table ``requests``."""
        ended = sorted(self._ended, key=lambda r: r.first_serial)
        self._ended = []
        return self._table(ended)

    def finish(self) -> Columns:
        """End all requests and give those not yet taken: the columns of the table ``requests``."""
        for state in self._sequences.values():
            known = self._lost == state.lost
            self._end(state, (self._left(state) if known else -1) if self._launches else 0)
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

    def _happened(
        self, events: Mapping[str, NDArray[Any]] | None, serial: NDArray[np.int64], launches_from: int
    ) -> list[_Event]:
        if events is None or len(events["serial"]) == 0:
            return []
        columns = [np.asarray(events[name]).astype(np.int64) for name in EVENT_INPUTS]
        before = np.maximum.accumulate(np.searchsorted(serial, columns[0]))
        if self._numbered:
            seen = np.arange(self._n_events, self._n_events + len(before))
            lost = _gone(np.asarray(events["number"]).astype(np.int64) - seen)
        else:
            lost = np.zeros(len(before), np.int64)
        launches, unrecorded, happened = False, self._unrecorded, []
        for row, gone, number, code, sequence, p0, p1, arg in zip(
            *(column.tolist() for column in (before, lost, *columns)), strict=True
        ):
            launches = launches or code == EventCode.LAUNCH or launches_from < row or self._launches
            missing = number - (self._n_rows + row)
            if code == EventCode.RESUME and self._numbered:
                unrecorded += max(p1, 0)
            happened.append(
                _Event(
                    row,
                    launches,
                    missing,
                    unrecorded,
                    gone,
                    code,
                    sequence,
                    max(p0, 0),
                    p1 if p1 >= 0 else _END,
                    arg,
                )
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
            elif event.code in _OF_ALL or event.sequence < 0:
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
            # the next one of its sequence, and nothing lost since the last row: what was removed is known
            known = event.lost == state.lost and event.arg == state.task + 1
            self._end(state, self._left(state) if known or not self._numbered else -1)
            if event.sequence >= 0:
                state.missing, state.unrecorded = event.missing, event.unrecorded
        elif code == EventCode.CONTEXT and self._numbered:
            self._end(state, self._left(state) if event.lost == state.lost else -1)
            state.last = state.top = -1
            state.batch, state.cuts = _NEVER, 0
            state.emptied = state.copied = False
        elif code in (EventCode.CLEAR, EventCode.SEQ_KEEP) or (
            code == EventCode.SEQ_RM and p0 == 0 and p1 == _END
        ):
            state.set_aside(np.ones(state.own.n, bool), all_of_it=True)
            state.top, state.emptied = -1, True
            state.cuts += 1
            if not event.launches:
                self._end(state)
        elif code == EventCode.SEQ_RM and p1 > state.top:
            state.set_aside(state.own.position >= p0)
            state.top = min(state.top, p0 - 1)
            state.cuts += 1
        elif code == EventCode.SEQ_RM:  # a hole in the middle: a context shift begins so
            state.own.remove((state.own.position >= p0) & (state.own.position < p1))
        elif code in (EventCode.SEQ_ADD, EventCode.SEQ_DIV):
            arg = event.arg
            if code == EventCode.SEQ_DIV and arg < 1:
                return
            where = state.own.position
            inside = (where >= p0) & (where < p1)
            where[inside] = where[inside] + arg if code == EventCode.SEQ_ADD else where[inside] // arg
            top = state.top
            for name in ("last", "top", "batch_first"):
                p = getattr(state, name)
                if p0 <= p < p1:
                    setattr(state, name, p + arg if code == EventCode.SEQ_ADD else p // arg)
            # what was removed lay behind the top
            state.cut = state.cut + np.array([[state.top - top], [0]])
            if state.request is not None and code == EventCode.SEQ_ADD and arg < 0:
                state.shifts += 1
                if not self._numbered:
                    state.request.n_shifts, state.shifts = state.request.n_shifts + 1, 0
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
            i = bisect.bisect_right(data.splits, start)
            end = min(stop, data.splits[i]) if i < len(data.splits) else stop
            self._piece(state, data, start, end)
            start = end

    def _begins(self, state: _Sequence, data: _Rows, i: int) -> bool:
        if state.request is None or data.task[i] != state.task:
            return True
        if data.launches[i]:
            return False
        position = data.position[i]
        decode = state.batch_decode if self._numbered else state.batch > state.request.first_output_batch
        rejected = (
            data.output[i]
            and state.cuts <= 1
            and state.batch_first < position <= state.last
            and state.batch_output
            and decode
        )
        return bool(
            (state.cuts or position < state.last)
            and (position <= state.last or (state.last_output and not data.output[i]))
            and not rejected
        )

    def _piece(self, state: _Sequence, data: _Rows, a: int, b: int) -> None:
        """Take rows [a, b), whose positions nowhere fall back, all of one task."""
        first, last = int(data.position[a]), int(data.position[b - 1])
        missing = int(data.missing[a]) - state.missing
        unrecorded = int(data.unrecorded[a]) - state.unrecorded
        if self._begins(state, data, a):
            # a task without its LAUNCH: what was removed before it may be its own doing
            self._end(state, -1 if data.task[a] != state.task else 0)
            unknown = first < 0 or (first > 0 and (missing > 0 or unrecorded > 0))
            request = state.request = _Request(
                state.number,
                int(data.serial[a]),
                int(data.time_ns[a]),
                n_cached=-1 if unknown else first,
                lost_before=state.lost,
            )
            if self._numbered:
                request.n_recomputed = request.n_undecided = request.n_unrecorded = 0
            if state.copied and first > 0 and data.output[a]:
                # its prompt was computed in another sequence, and it begins with what was sampled there
                request.first_output_batch = int(data.batch[a]) - 1
                request.decoding = True
            self._begun.append(request)
        else:
            assert state.request is not None
            request = state.request
            if first < state.top:
                state.set_aside(state.own.position >= first)
            elif not state.copied:
                gap = max(first - state.top - 1, 0)
                request.n_lost += max(min(gap, missing), 0)
                request.n_unrecorded += max(min(gap - max(missing, 0), unrecorded), 0)
            request.n_shifts += state.shifts
            self._judge(state, request, data.position[a:b], data.token[a:b])

        data.request[a:b] = len(self._touched)
        self._touched.append(request)
        lo, hi = np.searchsorted(data.odd, [a + 1, b]).tolist()
        odd = data.odd[lo:hi]
        if len(odd):
            skipped = data.position[odd] - data.position[odd - 1] - 1
            gone = np.minimum(skipped, data.missing[odd] - data.missing[odd - 1])
            request.n_lost += int(np.maximum(gone, 0).sum())
        state.own.add(data.position[a:b], data.token[a:b])

        decode = self._decoded(request, data, a, b)
        data.phase[a:b] = decode
        n_decode = int(np.count_nonzero(decode))
        request.n_decode += n_decode
        request.n_prefill += b - a - n_decode
        request.last_serial = int(data.serial[b - 1])
        request.end_ns = int(data.time_ns[b - 1])
        if self._numbered:
            request.n_events_lost = max(int(data.lost[b - 1]) - request.lost_before, 0)

        state.last = state.top = last
        state.last_output = bool(data.output[b - 1])
        state.missing, state.unrecorded = int(data.missing[b - 1]), int(data.unrecorded[b - 1])
        state.lost, state.task = int(data.lost[b - 1]), int(data.task[b - 1])
        batch = int(data.batch[b - 1])
        k = a + int(np.searchsorted(data.batch[a:b], batch))
        if k > a or batch != state.batch:
            state.batch, state.batch_first, state.batch_output = batch, int(data.position[k]), True
            state.batch_decode = bool(decode[k - a])
        state.batch_output = state.batch_output and bool(data.output[k:b].all())
        state.cuts = state.shifts = 0
        state.emptied = state.copied = False

    def _decoded(self, request: _Request, data: _Rows, a: int, b: int) -> NDArray[np.bool_]:
        """Say which of rows [a, b) are decode."""
        if self._numbered:
            decode = np.logical_or.accumulate(data.generated[a:b]) | request.decoding
            request.decoding = bool(decode[-1])
            return decode
        if request.first_output_batch == _NEVER:
            output = data.output[a:b]
            i = int(output.argmax())
            if not output[i]:
                return np.zeros(b - a, bool)
            request.first_output_batch = int(data.batch[a + i])
        return data.batch[a:b] > request.first_output_batch

    def _judge(
        self,
        state: _Sequence,
        request: _Request,
        position: NDArray[np.int64],
        token: NDArray[np.int64],
    ) -> None:
        """Hold the rows that were removed against what comes instead."""
        cut = state.cut
        n = cut.shape[1]
        if n == 0:
            return
        if self._numbered:
            m = min(n, len(position))
            same = np.logical_and.accumulate((cut[0, :m] == position[:m]) & (cut[1, :m] == token[:m]))
            k = int(np.count_nonzero(same))
            request.n_recomputed += k
            if k == m:  # no other token yet
                n = k
            elif cut[0, k] == position[k]:
                request.n_rejected += n - k
            else:
                request.n_undecided += n - k
        else:
            request.n_rejected += n
        state.cut = cut[:, n:]
        state.loose = state.cut.shape[1]

    def _left(self, state: _Sequence) -> int:
        """Give how many removed rows are to be counted where a request ends."""
        return 0 if state.emptied and not self._numbered else state.loose

    def _end(self, state: _Sequence, left: int = 0) -> None:
        """End the sequence's request, if there is one; ``left`` rows were removed at last, -1: unknown."""
        request = state.request
        if request is not None:
            if not self._numbered:
                request.n_rejected += max(left, 0)
            else:
                request.n_undecided = -1 if left < 0 else request.n_undecided + left
            self._ended.append(request)
        state.request, state.own, state.cut = None, _Standing(), _NONE
        state.loose = state.shifts = 0


def _gone(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give how many were lost, of differences modulo 2³²; rows that are damaged may say anything."""
    wrapped: NDArray[np.int64] = ((numbers + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
    return np.maximum(wrapped, 0)


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


class Following:
    """The requests of a context that is being recorded, brought up to date by what is new of it.

    Parameters
    ----------
    context
        Index of the context in the trace.
    """

    def __init__(self, context: int) -> None:
        self._context = context
        self._begin()

    def _begin(self) -> None:
        self._stored: deque[int] = deque()  # numbers that rows have, of requests that are not allotted yet
        self._seen: set[int] = set()
        self._rows = self._events = 0
        self._last_serial = self._last = -1
        self._ended: list[Columns] = []
        self._assigner = RequestAssigner(self._context, self._allot)

    def _allot(self) -> int:
        number = self._stored.popleft() if self._stored else self._last + 1
        self._last = max(self._last, number)
        return number

    def requests(
        self,
        rows: Mapping[str, NDArray[Any]],
        events: Mapping[str, NDArray[Any]],
        listed: NDArray[np.int64],
    ) -> Columns:
        """Give the requests that have rows in these tables and are not ``listed`` (numbers, (n,)), as if they ended.

        The tables are those of the last call with what was sealed since; only that is read, unless an event came late.
        """
        serial, at = np.asarray(rows["serial"]), np.asarray(events["serial"])
        late = at[self._events : self._events + 1].astype(np.int64) <= self._last_serial
        if len(serial) < self._rows or len(at) < self._events or late.any():
            self._begin()
        # what happened after the last row waits for the next one
        n, upto = len(serial), self._events
        if n > self._rows:
            upto = max(upto, int(np.searchsorted(at, serial[-1], side="right")))
        for number in _first_seen(rows["request"][self._rows :]):
            if number not in self._seen:
                self._seen.add(number)
                self._stored.append(number)
        new = {name: rows[name][self._rows :] for name in rows if name in ROW_COLUMNS}
        for _ in replay(self._assigner, new, {name: events[name][self._events : upto] for name in events}):
            pass
        self._rows, self._events = n, upto
        self._last_serial = int(serial[-1]) if n else -1
        ended = [*self._ended, self._assigner.take_ended()]  # before it is copied: there may be many
        running = copy.deepcopy(self._assigner, {id(self._assigner._allot): None})
        for _ in replay(
            running, {name: c[n:] for name, c in rows.items()}, {name: c[upto:] for name, c in events.items()}
        ):
            pass
        self._ended = [_without(columns, listed) for columns in ended if len(columns["request"])]
        theirs = _without(running.finish(), np.concatenate([listed, *(c["request"] for c in self._ended)]))
        return {
            name: np.concatenate([columns[name] for columns in (*self._ended, theirs)]) for name in theirs
        }


def _without(columns: Columns, numbers: NDArray[np.int64]) -> Columns:
    """Requests that are not among these."""
    mine = ~np.isin(columns["request"], numbers)
    return {name: column[mine] for name, column in columns.items()}


def replay(
    assigner: RequestAssigner, rows: Mapping[str, NDArray[Any]], events: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.uint8]]]:
    """Feed a whole table of rows and its events to an assigner, a piece at a time.

    Yields the first row of each piece, and what :meth:`RequestAssigner.feed` gave for it.
    """
    numbered = "task" in rows
    row_inputs = (*ROW_INPUTS, *(NUMBERED_ROW_INPUTS if numbered else ()))
    event_inputs = (*EVENT_INPUTS, *(NUMBERED_EVENT_INPUTS if numbered else ()))
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
                {name: rows[name][start:stop] for name in row_inputs},
                {name: events[name][fed:upto] for name in event_inputs},
            ),
        )
        start, fed = stop, upto


def cut_off(
    requests: Mapping[str, NDArray[Any]],
    serial: NDArray[np.uint64],
    events: Mapping[str, NDArray[Any]],
    n_produced: int,
) -> NDArray[np.bool_]:
    """Say of which requests the last rows may be missing: rows were lost, or recording stopped, before it ended.

    A request ends with the next LAUNCH of its sequence, or the next row of another request in it.

    Parameters
    ----------
    requests
        Columns ``sequence``, ``first_serial`` and ``last_serial``, each (n,): of one context, in any order.
    serial
        (N,), ascending: the rows that are there.
    events
        Columns ``serial`` (ascending), ``code`` and ``sequence``, each (M,).
    n_produced
        How many rows the host counted.

    Returns
    -------
    NDArray
        bool (n,).
    """
    after = requests["last_serial"].astype(np.int64) + 1
    # row that follows in the sequence, and LAUNCH or CONTEXT that ends it before that
    n_produced = min(n_produced, int(np.iinfo(np.int64).max))  # a damaged file may say more
    until = np.full(len(after), n_produced, np.int64)
    order = np.lexsort((requests["first_serial"], requests["sequence"]))
    same = requests["sequence"][order][1:] == requests["sequence"][order][:-1]
    until[order[:-1][same]] = requests["first_serial"][order[1:][same]]
    at, code = np.asarray(events["serial"]).astype(np.int64), np.asarray(events["code"])
    begin, end = np.searchsorted(at, after), np.searchsorted(at, until, side="right")
    of_all = np.flatnonzero(code == EventCode.CONTEXT)
    for sequence in np.unique(requests["sequence"]).tolist():
        mine = np.flatnonzero(requests["sequence"] == sequence)
        launches = np.flatnonzero((code == EventCode.LAUNCH) & (events["sequence"] == sequence))
        ends = np.sort(np.concatenate([launches, of_all]))
        k = np.searchsorted(ends, begin[mine])
        found = np.append(ends, len(code))[k]
        earlier = found < end[mine]
        end[mine] = np.where(earlier, found, end[mine])
        until[mine] = np.where(earlier, np.append(at, n_produced)[found], until[mine])
    present = np.searchsorted(serial, until.astype(np.uint64)) - np.searchsorted(
        serial, after.astype(np.uint64)
    )
    pauses = np.flatnonzero(code == EventCode.PAUSE)
    paused = np.searchsorted(pauses, end) > np.searchsorted(pauses, begin)
    return np.asarray((until - after > present) | paused)
