"""After a crash: take what is left in the rings, set headers right, close the trace."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.errors import MoetraceError, TraceError
from moetrace.trace.columns import Table
from moetrace.trace.jsonfile import read_json
from moetrace.trace.ledger import (
    COLUMN_HEADER,
    LEDGER_NAME,
    column_path,
    ledger_dtype,
    ledger_header_size,
    npy_header,
    read_header,
)
from moetrace.trace.ring import Ring, peek_host, peek_reader, process_alive, ring_is_ready, ring_paths
from moetrace.trace.rows import ColumnSpec, Layout
from moetrace.trace.storage import disk_error, refuse_links, write_at
from moetrace.trace.store import CONTEXT_NAME, RING_NAME, TraceStore
from moetrace.trace.writer import ContextWriter, TraceWriter, final_counters


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
    The rings are deleted once everything in them is sealed. A trace that is fine stays as it is. Rings that a host
    wrote without moetrace (``moetrace preload-path``) become a trace.

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
    TraceWriter.adopt(path)
    store = TraceStore(path)
    for ring in ring_paths(store.path):
        _refuse_if_busy(ring)
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
    trace = TraceWriter.resume(path, fsync=fsync)
    n_listed = len(store.requests["request"])
    lengths = _lengths(store)
    results = []
    for context in store.contexts:
        writer = trace.context(context.name)
        assert writer is not None
        results.append(_recover_context(context.ring, writer, context.facts))
    for ring in _unlisted_rings(store):
        results.append(_recover_unlisted(ring, trace))
    rings = [store.path / result.name / RING_NAME for result in results if not result.note]
    trace.seal_requests()
    n_requests = len(trace.requests) - n_listed
    if store.live or n_requests or cut or _lengths(TraceStore(path)) != lengths:
        trace.close(state="recovered", exit_code=store.meta.get("exit_code"))
    trace.detach()
    for ring in rings:
        ring.unlink(missing_ok=True)
    return Recovery(store.path, tuple(results), tuple(headers), n_requests)


def _lengths(store: TraceStore) -> dict[str, int]:
    return {name: table.n_rows for name, table in store.tables().items()}


def _unlisted_rings(store: TraceStore) -> list[Path]:
    """Give the rings of contexts whose recorder died before it had listed them."""
    return [
        ring
        for ring in ring_paths(store.path)
        if ring.parent.name not in store.context_names and ring_is_ready(ring)
    ]


def _refuse_if_busy(ring: Path) -> None:
    reader = peek_reader(ring)
    if reader is not None and reader != os.getpid() and process_alive(reader):
        raise TraceError(
            f"{ring.parent.parent} is being recorded",
            why=f"process {reader} writes it",
            fix="there is nothing to recover: it goes on by itself; see moetrace status",
        )
    host = peek_host(ring)
    if host and process_alive(host):
        raise MoetraceError(
            f"the host of {ring.parent} still runs",
            why=f"process {host} goes on writing to its ring",
            fix=f"take the recording up again: moetrace resume {ring.parent.parent}; or recover when it has ended",
        )


def _hidden(store: TraceStore, name: str, table: Table) -> str:
    """Say what cutting the table at its last good block would hide for good; empty if nothing."""
    said = store.meta.get("tables")
    closed = said.get(name, {}).get("rows") if isinstance(said, dict) else None
    if table.hidden:
        return table.hidden
    if isinstance(closed, int) and closed > table.n_rows:
        return f"it was closed with {closed} rows, and its ledger now ends at {table.n_rows}"
    return ""


def _mend_headers(store: TraceStore) -> list[str]:
    """Write headers again that cannot be read; what they must say follows from context.json."""
    for name in ("", *store.context_names):
        refuse_links(store.path / name)
    specs: list[tuple[Path, ColumnSpec]] = [(store.path / "requests", store.request_columns)]
    for name in store.context_names:
        layout = Layout.from_context(read_json(store.path / name / CONTEXT_NAME))
        specs += [
            (store.path / name / "rows", layout.row_columns),
            (store.path / name / "events", layout.event_columns),
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
            if path.is_symlink():
                continue  # opening the table will say so
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


def _recover_context(path: Path, writer: ContextWriter, facts: Mapping[str, Any]) -> RecoveredContext:
    sealed, torn, note, status = writer.rows.sealed, 0, "", ""
    counters: dict[str, int] | None = None
    if path.exists():
        try:
            with Ring(path, claim=True) as ring:
                torn = _take(ring, writer)
                writer.seal()
                counters, status = final_counters(ring, writer), ring.status
        except TraceError as e:
            note = f"its ring cannot be read, and was left alone: {e.why or e.what}"
    recovered = writer.rows.sealed - sealed
    writer.close(counters, status)
    stored = counters if counters is not None else facts.get("counters")
    known = isinstance(stored, dict) and "rows_produced" in stored
    lost = stored["rows_produced"] - sealed - recovered if known and isinstance(stored, dict) else None
    return RecoveredContext(path.parent.name, sealed, recovered, torn, lost, note)


def _recover_unlisted(path: Path, trace: TraceWriter) -> RecoveredContext:
    try:
        with Ring(path) as ring:
            layout = Layout.from_context(ring.meta, ring.fields)
            writer = trace.add_context(path.parent.name, ring.meta, layout, epoch_ns=ring.epoch_ns)
    except TraceError as e:
        note = f"its ring cannot be read, and was left alone: {e.why or e.what}"
        return RecoveredContext(path.parent.name, 0, 0, 0, None, note)
    return _recover_context(path, writer, {})


def _take(ring: Ring, writer: ContextWriter) -> int:
    """Append what the ring holds beyond the tables; gives the number of torn records."""
    layout = Layout.from_context(ring.meta, ring.fields)
    if layout.row_columns != writer.layout.row_columns:
        raise TraceError("the ring does not fit its context", why="it has another layout")
    records, gone = ring.snapshot()
    writer.catch_up(records)
    return gone - max(0, ring.head - ring.capacity - ring.tail)
