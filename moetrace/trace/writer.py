"""A trace folder that grows: what a drain, an importer or a test writes (docs/format.md, section 1)."""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import MoetraceError, TraceError
from moetrace.trace.attention import ATTENTION_TABLE, VALUES_TABLE, AttentionAssembler
from moetrace.trace.columns import TableWriter
from moetrace.trace.jsonfile import read_json, write_json
from moetrace.trace.requests import REQUEST_TABLE, RequestAssigner
from moetrace.trace.rows import EVENT_COLUMNS, Columns, Layout, events_from_records, rows_from_records
from moetrace.trace.storage import disk_error
from moetrace.trace.store import FORMAT, META_NAME, VERSION


class ContextWriter:
    """The tables of one llama context.

    Rows and events are appended in the order in which they happened; requests are told apart on the way.
    Nothing counts until :meth:`seal`.
    """

    def __init__(
        self, path: Path, index: int, layout: Layout, meta: Mapping[str, Any], trace: TraceWriter
    ) -> None:
        self.path = path
        self.layout = layout
        self.meta = dict(meta)
        self._trace = trace
        self._assigner = RequestAssigner(index, trace.allot_request)
        self.rows = TableWriter.create(path / "rows", layout.row_columns, fsync=trace.fsync)
        self.events = TableWriter.create(path / "events", EVENT_COLUMNS, fsync=trace.fsync)
        self.tables = {"events": self.events}
        self._assembler: AttentionAssembler | None = None
        if "attention" in meta.get("channels", ()):
            self._assembler = AttentionAssembler()
            for name, columns in (("attention_values", VALUES_TABLE), ("attention", ATTENTION_TABLE)):
                self.tables[name] = TableWriter.create(path / name, columns, fsync=trace.fsync)
        self.tables["rows"] = self.rows

    def append(self, records: NDArray[np.void]) -> int:
        """Append ring records; gives the number of rows among them.

        Parameters
        ----------
        records
            Structured array (n,) of the ring's dtype; copied.
        """
        if self._assembler is not None:
            index, values = self._assembler.feed(records)
            self.tables["attention_values"].append(values)
            self.tables["attention"].append(index)
        return self.append_columns(rows_from_records(records, self.layout), events_from_records(records))

    def append_columns(self, rows: Columns, events: Columns) -> int:
        """Append rows (all columns but ``request`` and ``phase``) and the events among them."""
        request, phase = self._assigner.feed(rows, events)
        self.events.append(events)
        self.rows.append({**rows, "request": request, "phase": phase})
        self._trace.end_requests(self._assigner.take_ended())
        return len(request)

    def seal(self) -> int:
        """Seal what was appended; gives the number of rows sealed."""
        # rows last: events and attention that come before a row are sealed when it is
        return [table.seal() for table in self.tables.values()][-1]

    def close(self, counters: Mapping[str, int], status: str = "") -> None:
        """End all requests, seal, and write what is known at the end."""
        self._trace.end_requests(self._assigner.finish())
        self.seal()
        self._trace.seal_requests()
        self.meta.update(counters=dict(counters), status=status)
        write_json(self.path / "context.json", self.meta, fsync=self._trace.fsync)
        for table in self.tables.values():
            table.close()


class TraceWriter:
    """A trace folder being written.

    Parameters
    ----------
    path
        The folder; it is made, readable by its owner only.
    command
        The command that is traced, as an argument list.
    model_path
        The model file, if known.
    force
        Replace an existing trace. Anything that is not a trace is left alone, forced or not.
    fsync
        Wait for the disk at each seal: survives a power cut, and is slow.

    Raises
    ------
    MoetraceError
        If the folder exists (without ``force``), is not a trace, or cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        command: Sequence[str] = (),
        model_path: str | None = None,
        force: bool = False,
        fsync: bool = False,
    ) -> None:
        from moetrace import __version__

        self.path = Path(path)
        self.fsync = fsync
        self.contexts: list[ContextWriter] = []
        self._request_numbers = itertools.count()
        self._meta: dict[str, Any] = {
            "format": FORMAT,
            "version": list(VERSION),
            "created_ns": time.time_ns(),
            "moetrace": __version__,
            "command": list(command),
            "host": f"{platform.system()} {platform.machine()}",
            "model_path": model_path,
            "state": "live",
            "exit_code": None,
            "contexts": [],
            "tables": {},
        }
        _make_room(self.path, force=force)
        try:
            self.path.mkdir(mode=0o700, parents=True)
        except OSError as e:
            raise disk_error(self.path, e) from e
        self.requests = TableWriter.create(self.path / "requests", REQUEST_TABLE, fsync=fsync)
        self._write_meta()

    def allot_request(self) -> int:
        """Give the next request number; unique in the trace."""
        return next(self._request_numbers)

    def add_context(
        self, name: str, meta: Mapping[str, Any], layout: Layout, *, epoch_ns: int
    ) -> ContextWriter:
        """Add a context.

        Parameters
        ----------
        name
            Folder within the trace, for example ``ctx0``.
        meta
            The ring's JSON text, or the same keys from elsewhere (docs/format.md, context.json).
        layout
            Its columns.
        epoch_ns
            What to add to a row's ``time_ns`` to get nanoseconds since the epoch.
        """
        facts = {
            **{key: value for key, value in meta.items() if key != "counter_names"},
            "name": name,
            "layers": list(layout.layers),
            "n_expert": list(layout.n_expert),
            "n_expert_used": list(layout.n_expert_used),
            "fields": [{"name": f.name, "dtype": f.dtype, "shape": list(f.shape)} for f in layout.fields],
            "epoch_ns": epoch_ns,
            "status": "",
        }
        context = ContextWriter(self.path / name, len(self.contexts), layout, facts, self)
        write_json(context.path / "context.json", facts, fsync=self.fsync)
        self.contexts.append(context)
        self._meta["contexts"].append(name)
        self._write_meta()
        return context

    def set_model_path(self, model_path: str) -> None:
        """Record which file the model was read from."""
        self._meta["model_path"] = model_path
        self._write_meta()

    def end_requests(self, requests: Columns) -> None:
        """Append requests that have ended."""
        self.requests.append(requests)

    def seal_requests(self) -> None:
        """Seal the requests that have ended so far."""
        self.requests.seal()

    def close(self, *, exit_code: int | None = None, state: str = "closed") -> None:
        """Seal what is left and write meta.json for the last time. The contexts must be closed before."""
        self.seal_requests()
        tables = {"requests": self.requests}
        for context in self.contexts:
            tables |= {f"{context.path.name}/{name}": table for name, table in context.tables.items()}
        self._meta["tables"] = {
            name: {"rows": table.sealed, "crc": table.ledger_crc} for name, table in tables.items()
        }
        self._meta.update(exit_code=exit_code, state=state)
        self._write_meta()
        self.requests.close()

    def _write_meta(self) -> None:
        write_json(self.path / META_NAME, self._meta, fsync=self.fsync)


def is_trace(path: Path) -> bool:
    """Whether the folder looks like a trace of ours, whole or not."""
    try:
        return read_json(path / META_NAME, check=False).get("format") == FORMAT
    except TraceError:
        return False


def _make_room(path: Path, *, force: bool) -> None:
    if not path.is_symlink() and not path.exists():
        return
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        path.rmdir()
        return
    if path.is_symlink() or not is_trace(path):
        raise MoetraceError(
            f"{path} exists and is not a moetrace trace",
            fix="choose another name with -o; it is never overwritten",
        )
    if not force:
        raise MoetraceError(
            f"the trace {path} exists", fix="choose another name with -o, or replace it with --force"
        )
    try:
        shutil.rmtree(path)
    except OSError as e:
        raise disk_error(path, e) from e
