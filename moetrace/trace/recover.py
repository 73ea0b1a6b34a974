"""After a crash: take what is left in the rings, set headers right, close the trace."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.errors import MoetraceError, TraceError
from moetrace.trace.columns import Table, TableWriter
from moetrace.trace.jsonfile import read_json, write_json
from moetrace.trace.ledger import (
    COLUMN_HEADER,
    LEDGER_NAME,
    column_path,
    ledger_dtype,
    ledger_header_size,
    npy_header,
    read_header,
)
from moetrace.trace.record import OnFull
from moetrace.trace.requests import REQUEST_TABLE, RequestAssigner, allot_again, replay
from moetrace.trace.ring import Ring, peek_reader, process_alive
from moetrace.trace.rows import (
    EVENT_COLUMNS,
    Columns,
    ColumnSpec,
    Layout,
    events_from_records,
    rows_from_records,
)
from moetrace.trace.storage import disk_error, write_at
from moetrace.trace.store import CONTEXT_NAME, RING_NAME, ContextStore, TraceStore


@dataclass(frozen=True)
class RecoveredContext:
    """What became of one context.

    Attributes
    ----------
    sealed
        Rows that were safe already.
    recovered
        Rows taken out of the ring.
    torn
        Records of the ring that were not whole; nothing of them is kept.
    lost
        Rows that the host computed and that are nowhere, by its counters; None if there are no counters.
    note
        What could not be done, or empty.
    """

    name: str
    sealed: int
    recovered: int
    torn: int
    lost: int | None
    note: str


@dataclass(frozen=True)
class Recovery:
    """What :func:`recover` did; ``headers`` names the files whose headers it set right."""

    path: Path
    contexts: tuple[RecoveredContext, ...]
    headers: tuple[str, ...]
    requests: int


def recover(path: str | os.PathLike[str], *, cut: bool = False, fsync: bool = False) -> Recovery:
    """Mend a trace whose recorder died, and close it.

    The unsealed remainder is read again from each context's ring (rows whose serial is beyond the last sealed
    one), requests that had not ended are listed, headers are set right, and ``meta.json`` says ``recovered``.
    The rings are deleted once everything in them is sealed. A trace that is fine stays as it is.

    Parameters
    ----------
    path
        The trace's folder.
    cut
        Also cut tables off where they are damaged inside: rows that the damage hides are then gone for good.
    fsync
        Wait until the disk has it.

    Raises
    ------
    TraceError
        If it is no trace, is still being recorded, or is damaged in a way that this would make worse.
    MoetraceError
        If the disk is full or fails.
    """
    store = TraceStore(path)
    for name in store.context_names:
        _refuse_if_busy(store.path / name / RING_NAME)
    headers = _mend_headers(store)
    store = TraceStore(path)
    for name, table in store.tables().items():
        hidden = _hidden(store, name, table)
        if hidden and not cut:
            raise TraceError(
                f"{table.path} is damaged",
                why=hidden,
                fix=f"restore it from a copy, or give up what lies behind: moetrace recover --cut {path}",
            )
    requests = TableWriter.resume(store.path / "requests", fsync=fsync)
    known = set(np.asarray(store.requests["request"]).tolist())
    results, rings, n_requests = [], [], 0
    with requests:
        next_number = 1 + max([-1, *known, *(int(c.rows["request"].max(initial=-1)) for c in store.contexts)])
        for index, context in enumerate(store.contexts):
            result, ended, next_number = _recover_context(context, index, next_number, fsync=fsync)
            fresh = ~np.isin(ended["request"], list(known))
            requests.append({name: column[fresh] for name, column in ended.items()})
            n_requests += int(fresh.sum())
            results.append(result)
            if context.ring.exists() and not result.note:
                rings.append(context.ring)
        requests.seal()
    if store.live or n_requests or cut or any(result.recovered for result in results):
        store.close_as("recovered", fsync=fsync)
    for ring in rings:
        ring.unlink()
    return Recovery(store.path, tuple(results), tuple(headers), n_requests)


def _refuse_if_busy(ring: Path) -> None:
    reader = peek_reader(ring)
    if reader is not None and reader != os.getpid() and process_alive(reader):
        raise TraceError(
            f"{ring.parent.parent} is being recorded",
            why=f"process {reader} writes it",
            fix="stop the recording first",
        )


def _hidden(store: TraceStore, name: str, table: Table) -> str:
    """Say what cutting the table at its last good block would hide for good; empty if nothing."""
    said = store.meta.get("tables")
    closed = said.get(name, {}).get("rows") if isinstance(said, dict) else None
    if table.missing_rows:
        return f"{table.missing_rows} sealed rows are missing from a column"
    if table.ledger_damage and not table.ledger_torn:
        return f"{table.ledger_damage}, with good ones behind them"
    if isinstance(closed, int) and closed > table.n_rows:
        return f"it was closed with {closed} rows, and its ledger now ends at {table.n_rows}"
    return ""


def _mend_headers(store: TraceStore) -> list[str]:
    """Write headers again that cannot be read; what they must say follows from context.json."""
    specs: list[tuple[Path, ColumnSpec]] = [(store.path / "requests", REQUEST_TABLE)]
    for name in store.context_names:
        layout = Layout.from_context(read_json(store.path / name / CONTEXT_NAME))
        specs += [
            (store.path / name / "rows", layout.row_columns),
            (store.path / name / "events", EVENT_COLUMNS),
        ]
    mended = []
    for folder, spec in specs:
        ledger = ledger_dtype(list(spec))
        wanted: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]] = {
            name: (np.dtype(dtype), shape, COLUMN_HEADER) for name, (dtype, shape) in spec.items()
        }
        wanted[LEDGER_NAME] = (ledger, (), ledger_header_size(ledger))
        for name, (dtype, shape, size) in wanted.items():
            path = column_path(folder, name)
            try:
                header = read_header(path)
                if header.dtype == dtype and header.shape[1:] == shape and header.size == size:
                    continue
            except TraceError:
                pass
            try:
                with path.open("r+b") as f:
                    if os.fstat(f.fileno()).st_size < size:
                        continue  # cut within its header: nothing of it is left
                    write_at(f.fileno(), npy_header(dtype, (0, *shape), size), 0)
            except FileNotFoundError:
                continue  # opening the table will say so
            except OSError as e:
                raise disk_error(path, e) from e
            mended.append(str(path.relative_to(store.path)))
    return mended


def _recover_context(
    context: ContextStore, index: int, next_number: int, *, fsync: bool
) -> tuple[RecoveredContext, Columns, int]:
    sealed = context.rows.n_rows
    last = int(context.rows["serial"][-1]) if sealed else -1
    allot = allot_again(context.rows["request"])

    def number() -> int:
        nonlocal next_number
        stored = allot()
        if stored in known:
            return stored
        next_number += 1
        return next_number - 1

    known = set(np.unique(context.rows["request"]).tolist())
    assigner = RequestAssigner(index, number)
    rows, events, torn, counters, note = _left_in_ring(context)
    events = {name: column[_overlap(context.events, events) :] for name, column in events.items()}
    new = rows["serial"].astype(np.int64) > last
    rows = {name: column[new] for name, column in rows.items()}
    with (
        TableWriter.resume(context.events.path, fsync=fsync) as event_writer,
        TableWriter.resume(context.rows.path, fsync=fsync) as row_writer,
    ):
        for _ in replay(assigner, context.rows, context.events):
            pass
        rows["request"], rows["phase"] = assigner.feed(rows, events)
        event_writer.append(events)
        event_writer.seal()
        row_writer.append({name: rows[name] for name in row_writer.columns})
        row_writer.seal()
    recovered = len(rows["serial"])
    if counters is not None:
        if counters["rows_overwritten"] < 0:
            counters["rows_overwritten"] = counters["rows_committed"] - sealed - recovered
            counters["events_overwritten"] = counters["events_committed"] - event_writer.sealed
        context.facts["counters"] = counters
        write_json(context.path / CONTEXT_NAME, context.facts, fsync=fsync)
    stored = context.facts.get("counters")
    lost = stored["rows_produced"] - sealed - recovered if isinstance(stored, dict) else None
    return RecoveredContext(context.name, sealed, recovered, torn, lost, note), assigner.finish(), next_number


def _left_in_ring(context: ContextStore) -> tuple[Columns, Columns, int, dict[str, int] | None, str]:
    """Give the rows and events left, how many records were torn, the counters, and what went wrong."""
    spec = context.layout.row_columns
    rows: Columns = {name: np.empty((0, *shape), dtype) for name, (dtype, shape) in spec.items()}
    events: Columns = {name: np.empty(0, dtype) for name, (dtype, _) in EVENT_COLUMNS.items()}
    if not context.ring.exists():
        return rows, events, 0, None, ""
    try:
        with Ring(context.ring, claim=True) as ring:
            if ring.host_alive and not ring.closed:
                raise MoetraceError(
                    f"the host of {context.path} still runs",
                    why=f"process {ring.host_pid} goes on writing to its ring",
                    fix=f"stop it first: kill {ring.host_pid}",
                )
            layout = Layout.from_context(ring.meta, ring.fields)
            if layout.row_columns != context.layout.row_columns:
                return rows, events, 0, None, "its ring has another layout, and was left alone"
            records, gone = ring.snapshot()
            overwritten = max(0, ring.head - ring.capacity - ring.tail)
            counters = ring.counters
            if ring.on_full == OnFull.OVERWRITE:  # then the reader's count is the one that holds
                counters["rows_overwritten"] = counters["events_overwritten"] = -1
            return (
                rows_from_records(records, layout),
                events_from_records(records),
                gone - overwritten,
                counters,
                "",
            )
    except TraceError as e:
        return rows, events, 0, None, f"its ring cannot be read, and was left alone: {e.why or e.what}"


def _overlap(table: Table, events: Columns) -> int:
    """Count the ring's events that were sealed already: the longest end of the table that begins them."""
    n = min(table.n_rows, len(events["serial"]))
    for m in range(n, 0, -1):
        if all(np.array_equal(table[name][table.n_rows - m :], events[name][:m]) for name in events):
            return m
    return 0
