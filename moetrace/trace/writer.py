"""A trace folder that grows: what a drain, an importer or a test writes (docs/format.md, section 1)."""

from __future__ import annotations

import contextlib
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

from moetrace.errors import GoneError, MoetraceError, TraceError
from moetrace.trace.attention import ATTENTION_TABLE, VALUES_TABLE, AttentionAssembler
from moetrace.trace.columns import Table, TableWriter
from moetrace.trace.jsonfile import read_json, write_json
from moetrace.trace.labels import LABELS_NAME
from moetrace.trace.loss import settle_counters
from moetrace.trace.record import OnFull
from moetrace.trace.requests import REQUEST_TABLE, RequestAssigner, allot_again, replay
from moetrace.trace.ring import Ring, ring_is_ready, ring_paths
from moetrace.trace.rows import Columns, Layout, events_from_records, rows_from_records
from moetrace.trace.storage import disk_error, lock_folder, refuse_links
from moetrace.trace.store import CONTEXT_NAME, FORMAT, META_NAME, VERSION, ContextStore, TraceStore

_TABLES = ("rows", "events", "attention_values", "attention")


class ContextWriter:
    """The tables of one llama context; made by :meth:`TraceWriter.add_context` and :meth:`TraceWriter.resume`.

    Rows and events are appended in the order in which they happened; requests are told apart on the way.
    Nothing counts until :meth:`seal`.

    Attributes
    ----------
    end
        The serial after the last row's.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        meta: Mapping[str, Any],
        trace: TraceWriter,
        assigner: RequestAssigner,
        tables: Mapping[str, TableWriter],
    ) -> None:
        self.path = path
        self.layout = layout
        self.meta = dict(meta)
        self._trace = trace
        self._assigner = assigner
        self.rows, self.events = tables["rows"], tables["events"]
        # rows last: events and attention that come before a row are sealed when it is
        order = ("events", "attention_values", "attention", "rows")
        self.tables = {name: tables[name] for name in order if name in tables}
        self._assembler: AttentionAssembler | None = None
        if "attention" in tables:
            self._assembler = AttentionAssembler(tables["attention_values"].sealed)
        self._waiting: Columns | None = None
        self.end = 0

    @classmethod
    def create(
        cls, path: Path, index: int, layout: Layout, meta: Mapping[str, Any], trace: TraceWriter
    ) -> ContextWriter:
        """Make the tables, empty."""
        specs = {"rows": layout.row_columns, "events": layout.event_columns}
        if "attention" in meta.get("channels", ()):
            specs |= {"attention_values": VALUES_TABLE, "attention": ATTENTION_TABLE}
        for (
            name
        ) in specs:  # of a recorder that died before it had listed the context: nothing is sealed there
            if (path / name).exists():
                shutil.rmtree(path / name)
        tables = {
            name: TableWriter.create(path / name, spec, fsync=trace.fsync) for name, spec in specs.items()
        }
        return cls(path, layout, meta, trace, RequestAssigner(index, trace.allot_request), tables)

    @classmethod
    def resume(cls, store: ContextStore, index: int, trace: TraceWriter) -> ContextWriter:
        """Open the tables to go on after the last sealed row; what was not sealed is cut off.

        Those of a context without a ring are closed again: nothing will be appended to them.
        """
        rows, events = store.rows, store.events
        end = int(rows["serial"][-1]) + 1 if rows.n_rows else 0
        # events beyond the last sealed row come before rows that are not there yet
        before = int(np.searchsorted(events["serial"], max(end - 1, 0), side="right")) if end else 0
        assigner = RequestAssigner(index, allot_again(rows["request"], trace.allot_request))
        for _ in replay(assigner, rows, {name: column[:before] for name, column in events.items()}):
            pass
        with contextlib.ExitStack() as opened:
            tables = {
                name: opened.enter_context(TableWriter.resume(store.path / name, fsync=trace.fsync))
                for name in _TABLES
                if (store.path / name).is_dir()
            }
            if store.ring.exists():
                opened.pop_all()
        writer = cls(store.path, store.layout, store.facts, trace, assigner, tables)
        writer.end = end
        writer._waiting = {name: np.array(column[before:]) for name, column in events.items()}
        trace.end_requests(assigner.take_ended())
        return writer

    @property
    def held(self) -> int:
        """Records at the end of those appended that are needed again should this process die."""
        return 0 if self._assembler is None else self._assembler.held

    def catch_up(self, records: NDArray[np.void]) -> int:
        """Append, after :meth:`resume`, what of the records in the ring is not sealed yet; gives the number of rows.

        Parameters
        ----------
        records
            Structured array (n,) of the ring's dtype: all that the ring holds; copied.
        """
        rows = rows_from_records(records, self.layout)
        events = events_from_records(records, self.layout)
        new = rows["serial"].astype(np.int64) >= self.end
        sealed = Table(self.events.path).overlap(events)
        if self._assembler is not None:
            index, values = self._assembler.feed(records)
            known = Table(self.tables["attention"].path)
            twice = known.overlap({name: column for name, column in index.items() if name != "offset"})
            n_twice = int((index["n_heads"][:twice].astype(np.int64) * index["n_keys"][:twice]).sum())
            index["offset"] -= np.uint64(n_twice)
            self._assembler.offset -= n_twice
            self.tables["attention_values"].append({"value": values["value"][n_twice:]})
            self.tables["attention"].append({name: column[twice:] for name, column in index.items()})
        return self.append_columns(
            {name: column[new] for name, column in rows.items()},
            {name: column[sealed:] for name, column in events.items()},
        )

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
        return self.append_columns(
            rows_from_records(records, self.layout), events_from_records(records, self.layout)
        )

    def append_columns(self, rows: Columns, events: Columns) -> int:
        """Append rows (all columns but ``request`` and ``phase``) and the events among them."""
        happened = events
        if self._waiting is not None:  # sealed by a recorder that died before the rows that they precede
            happened = {name: np.concatenate([self._waiting[name], events[name]]) for name in events}
            self._waiting = None
        request, phase = self._assigner.feed(rows, happened)
        if len(request):
            self.end = int(rows["serial"][-1]) + 1
        self.events.append(events)
        self.rows.append({**rows, "request": request, "phase": phase})
        self._trace.end_requests(self._assigner.take_ended())
        return len(request)

    def seal(self) -> int:
        """Seal what was appended; gives the number of rows sealed."""
        return [table.seal() for table in self.tables.values()][-1]

    def close(self, counters: Mapping[str, int] | None, status: str = "") -> None:
        """End all requests, seal, and write what is known at the end; without counters, nothing new is."""
        self._trace.end_requests(self._assigner.finish())
        self.seal()
        self._trace.seal_requests()
        if counters is not None:
            self._trace.stay()
            self.meta.update(counters=dict(counters), status=status)
            write_json(self.path / CONTEXT_NAME, self.meta, fsync=self._trace.fsync)
        self.detach()

    def set_model(
        self,
        model_path: str | None,
        vocabulary: str | None = None,
        fingerprint: Mapping[str, str] | None = None,
    ) -> None:
        """Record which file this context's model was read from, and what the file says.

        Parameters
        ----------
        model_path
            The file; None if it is not known.
        vocabulary
            The file in the trace that has the text of its tokens.
        fingerprint
            The model's digests (:attr:`moetrace.model.file.ModelFile.fingerprint`).
        """
        self.meta["model_path"] = model_path
        if vocabulary is not None:
            self.meta["vocabulary"] = vocabulary
        if fingerprint is not None:
            self.meta["fingerprint"] = dict(fingerprint)
        write_json(self.path / CONTEXT_NAME, self.meta, fsync=self._trace.fsync)

    def detach(self) -> None:
        """Let go of the files; what was not sealed is lost from them, and still in the ring."""
        for table in self.tables.values():
            table.close()

    def tampering(self) -> str:
        """Say what somebody else did to its files; empty if nothing."""
        return next(filter(None, (table.tampering() for table in self.tables.values())), "")

    def move(self, path: Path) -> None:
        """Take note that the context's folder is now at ``path``."""
        self.path = path
        for name, table in self.tables.items():
            table.path = path / name


def final_counters(ring: Ring, writer: ContextWriter) -> dict[str, int]:
    """Give what context.json says of a ring that is read to its end."""
    counters, n_rows, n_events = ring.counters, writer.rows.sealed, writer.events.sealed
    if ring.on_full == OnFull.OVERWRITE:
        # only the reader knows what it came too late for
        counters["rows_overwritten"] = max(counters["rows_committed"] - n_rows, 0)
        counters["events_overwritten"] = max(counters["events_committed"] - n_events, 0)
    return counters if ring.closed else settle_counters(counters, n_rows, n_events, writer.end)


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
    prompts
        How many prompts will be captured; None for a server, which answers whoever asks. See :meth:`count_done`.
    force
        Replace an existing trace; one that holds nothing is replaced in any case. Anything that is not a trace is
        left alone, forced or not.
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
        prompts: int | None = None,
        force: bool = False,
        fsync: bool = False,
    ) -> None:
        self._folder_was_there = _make_room(Path(path), force=force)
        try:
            Path(path).mkdir(mode=0o700, parents=True)
        except OSError as e:
            raise disk_error(Path(path), e) from e
        try:
            self._begin(Path(path), command, model_path, prompts, fsync)
        except BaseException:  # nobody needs half a folder
            shutil.rmtree(path, ignore_errors=True)
            raise

    def _begin(
        self, path: Path, command: Sequence[str], model_path: str | None, prompts: int | None, fsync: bool
    ) -> None:
        """Lock the folder, and write what makes it a trace."""
        from moetrace import __version__

        self.path = path
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
        if prompts is not None:
            self._meta["asked"] = {"prompts": prompts, "done": None}
        self._request_columns = tuple(REQUEST_TABLE)
        self._listed: NDArray[Any] = np.empty(0, np.int64)
        try:
            self._lock = lock_folder(path)
        except OSError as e:
            raise disk_error(path, e) from e
        try:
            self.requests = TableWriter.create(path / "requests", REQUEST_TABLE, fsync=fsync)
            self._write_meta()
        except BaseException:
            os.close(self._lock)
            raise

    @classmethod
    def adopt(cls, path: str | os.PathLike[str]) -> bool:
        """Make a trace of a folder into which a host writes rings by itself; False if it is no such folder.

        A host that was started with the tracer's library and ``MOETRACE_TRACE``, and not by moetrace, writes rings
        and nothing else. The trace is live, and has no context yet: :meth:`resume` it.

        Raises
        ------
        MoetraceError
            If it cannot be written.
        """
        folder = Path(path)
        if (folder / META_NAME).exists() or not any(map(ring_is_ready, ring_paths(folder))):
            return False
        writer = cls.__new__(cls)
        writer._folder_was_there = True
        writer._begin(folder, (), None, None, False)
        writer.detach()
        return True

    @classmethod
    def resume(cls, path: str | os.PathLike[str], *, fsync: bool = False) -> TraceWriter:
        """Open a trace whose recorder died, to go on with it.

        Each context's tables end at their last sealed block; :meth:`ContextWriter.catch_up` takes what its ring
        holds beyond. The caller sees to it that nobody else writes, and that nothing lies behind the last good
        block (:attr:`Table.hidden`): it would be overwritten.

        Raises
        ------
        TraceError
            If it is no trace, or its tables cannot be found.
        MoetraceError
            If it cannot be written.
        """
        store = TraceStore(path)
        writer = cls.__new__(cls)
        try:
            writer._lock = lock_folder(store.path)
        except OSError as e:
            raise disk_error(store.path, e) from e
        writer.path, writer.fsync, writer._meta = store.path, fsync, dict(store.meta)
        writer._folder_was_there = True
        try:
            writer._take_up(store)
        except BaseException:
            os.close(writer._lock)
            raise
        return writer

    def reopen(self) -> None:
        """Go back to the last sealed blocks, as :meth:`resume` does, after a write failed; the lock is kept.

        The contexts are new ones afterwards; those that meta.json does not list yet are gone, and must be added
        again.

        Raises
        ------
        MoetraceError
            If it cannot be done; it may be tried again.
        """
        self.stay()
        self._let_go()
        self._take_up(TraceStore(self.path))
        self._meta["contexts"] = [context.path.name for context in self.contexts]

    def _take_up(self, store: TraceStore) -> None:
        for name in ("", *store.context_names):
            refuse_links(store.path / name)
        self._request_columns = tuple(store.request_columns)
        self._listed = np.array(store.requests["request"])
        highest = [int(context.rows["request"].max(initial=-1)) for context in store.contexts]
        self._request_numbers = itertools.count(1 + max([*highest, int(self._listed.max(initial=-1))]))
        self.contexts = []
        self.requests = TableWriter.resume(store.path / "requests", fsync=self.fsync)
        try:
            for index, context in enumerate(store.contexts):
                self.contexts.append(ContextWriter.resume(context, index, self))
        except BaseException:
            self._let_go()
            raise

    def stay(self) -> bool:
        """See to it that :attr:`path` is the folder that this writes to; gives whether it was moved.

        Raises
        ------
        GoneError
            If the folder was deleted, or nobody says where it is.
        """
        if self.detached:
            raise GoneError(f"the trace {self.path} is not being written any more")
        ours = os.fstat(self._lock)
        with contextlib.suppress(OSError):
            if os.path.samestat(self.path.lstat(), ours):
                return False
        try:
            now = Path(f"/proc/self/fd/{self._lock}").readlink()
            if os.path.samestat(now.lstat(), ours):
                self._move(now)
                return True
        except OSError:
            pass
        raise GoneError(
            f"the trace {self.path} was deleted or replaced while it was being recorded",
            why="its folder is not there any more",
            fix="record again, into another folder",
        )

    def _move(self, path: Path) -> None:
        self.path = path
        self.requests.path = path / "requests"
        for context in self.contexts:
            context.move(path / context.path.name)

    def context(self, name: str) -> ContextWriter | None:
        """Give a context by its folder's name, or None if the trace does not have it."""
        return next((context for context in self.contexts if context.path.name == name), None)

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
        self.stay()
        context = ContextWriter.create(self.path / name, len(self.contexts), layout, facts, self)
        write_json(context.path / CONTEXT_NAME, facts, fsync=self.fsync)
        self.contexts.append(context)
        self._meta["contexts"].append(name)
        self._write_meta()
        return context

    def count_prompts(self, asked: int) -> None:
        """Note how many prompts shall be captured."""
        self._meta["asked"] = {"prompts": asked, "done": None}
        self._write_meta()

    def count_done(self, done: int) -> None:
        """Note how many of them are done; written when the trace is closed."""
        self._meta["asked"]["done"] = done

    def end_requests(self, requests: Columns) -> None:
        """Append requests that have ended; those that a resumed trace lists already are left out."""
        fresh = ~np.isin(requests["request"], self._listed)
        self.requests.append({name: requests[name][fresh] for name in self._request_columns})

    def tampering(self) -> str:
        """Say what somebody else did to its table of requests; empty if nothing. For contexts, ask them."""
        return self.requests.tampering()

    def seal_requests(self) -> None:
        """Seal the requests that have ended so far, of all contexts, and before them their rows.

        A request whose rows are not sealed would get another number from whoever takes them from the ring again.
        """
        for context in self.contexts:
            context.seal()
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
        self.detach()

    def discard(self) -> bool:
        """Remove the trace again if it holds nothing, and let go of it then; gives whether it is gone."""
        try:
            self.stay()
            if not is_empty(self.path):
                return False
            shutil.rmtree(self.path)
            if self._folder_was_there:
                self.path.mkdir()
        except GoneError:
            pass
        except OSError as e:
            raise disk_error(self.path, e) from e
        self.detach()
        return True

    def detach(self) -> None:
        """Let go of the files and of the trace as it is: somebody else may :meth:`resume` it."""
        self._let_go()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def detached(self) -> bool:
        """Whether :meth:`detach` or :meth:`close` was called."""
        return self._lock < 0

    def _let_go(self) -> None:
        self.requests.close()
        for context in self.contexts:
            context.detach()

    def _write_meta(self) -> None:
        self.stay()
        write_json(self.path / META_NAME, self._meta, fsync=self.fsync)


def is_trace(path: Path) -> bool:
    """Whether the folder looks like a trace of ours, whole or not."""
    try:
        return read_json(path / META_NAME, check=False).get("format") == FORMAT
    except TraceError:
        return False


_OURS = {META_NAME, LABELS_NAME, "requests", "interventions", "control"}  # there before any context


def is_empty(path: Path) -> bool:
    """Whether a trace of ours holds no context, and nothing that somebody else put there."""
    try:
        contexts = read_json(path / META_NAME, check=False).get("contexts")
    except TraceError:
        return False
    return contexts == [] and {p.name for p in path.iterdir()} <= _OURS


def _make_room(path: Path, *, force: bool) -> bool:
    """Remove what may be replaced; gives whether there was an empty folder."""
    if not path.is_symlink() and not path.exists():
        return False
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        path.rmdir()
        return True
    if path.is_symlink() or not is_trace(path):
        raise MoetraceError(
            f"{path} exists and is not a moetrace trace",
            fix="choose another name with -o; it is never overwritten",
        )
    if os.geteuid() not in (0, path.stat().st_uid):
        raise MoetraceError(
            f"the trace {path} belongs to another user",
            fix="choose another name with -o; it is never overwritten",
        )
    if not force and not is_empty(path):
        raise MoetraceError(
            f"the trace {path} exists", fix="choose another name with -o, or replace it with --force"
        )
    try:
        os.close(lock_folder(path))  # not while it is being recorded
        shutil.rmtree(path)
    except OSError as e:
        raise disk_error(path, e) from e
    return False
