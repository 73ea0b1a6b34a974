"""Taking up the recording of a server whose drain died."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from moetrace.errors import MoetraceError, TraceError
from moetrace.host.drain import Drain, tell
from moetrace.host.hosts import running_hosts
from moetrace.host.model import store_models
from moetrace.trace.ring import peek_reader, peek_writer, process_alive, ring_paths
from moetrace.trace.storage import is_locked
from moetrace.trace.store import TraceStore
from moetrace.trace.writer import TraceWriter

#: how often the host is looked at, seconds
POLL_SECONDS = 0.2


class ResumedRecording:
    """A live recording with a new drain: the trace goes on where the old drain sealed it last.

    A folder into which a host writes rings by itself (``moetrace preload-path``) is taken up as a new trace. Nothing is
    lost that the rings still hold. What the host could not write while nobody read is counted as lost,
    as its policy says.

    Parameters
    ----------
    path
        The trace.
    on_error, on_note
        See :class:`moetrace.host.drain.Drain`.

    Attributes
    ----------
    rows_caught_up
        Rows that were in the rings and not yet sealed.

    Raises
    ------
    TraceError
        If there is nothing to take up: another process records it, the host has ended, or the trace is closed.
    MoetraceError
        If the trace cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        on_error: Callable[[MoetraceError], None] = tell,
        on_note: Callable[[str], None] = tell,
    ) -> None:
        TraceWriter.adopt(path)
        store = TraceStore(path)
        self._hosts = _hosts(store)
        self.trace = TraceWriter.resume(store.path)
        self.drain = Drain(self.trace, on_error, on_note)
        try:
            self.drain.attach()
        except BaseException:
            self.trace.detach()
            raise
        self.rows_caught_up = self.drain.rows
        self._model_path = store.meta.get("model_path")
        self.drain.start()

    @property
    def host_alive(self) -> bool:
        """Whether the process that is recorded still runs."""
        if not any(process_alive(pid) for pid in self._hosts):
            self._hosts |= running_hosts(self.trace.path).keys()  # what the server started meanwhile
        return any(process_alive(pid) for pid in self._hosts)

    def wait(self) -> None:
        """Wait until the host has ended, or draining has failed."""
        while self.host_alive and self.drain.error is None:
            time.sleep(POLL_SECONDS)

    def finish(self) -> None:
        """Drain what is left and close the trace; call it when the host has ended.

        Raises
        ------
        MoetraceError
            If draining failed. What was sealed is in the trace; the rest stays in the rings.
        """
        try:
            self.drain.stop()
            self.trace.stay()
            store_models(self.trace, self._model_path)
            self.trace.close()
        finally:
            self.trace.detach()

    def detach(self) -> None:
        """Let go; the host goes on, and may be taken up again."""
        self.drain.detach()


def _hosts(store: TraceStore) -> set[int]:
    """Give the processes that write the trace's rings; refuses a trace that cannot be taken up."""
    recover = f"moetrace recover {store.path}"
    if not store.live:
        raise TraceError(
            f"{store.path} is closed", why="its recording has ended", fix="record into another trace"
        )
    rings = ring_paths(store.path)
    readers = [
        pid for ring in rings if (pid := peek_reader(ring)) and pid != os.getpid() and process_alive(pid)
    ]
    if readers or is_locked(store.path):
        raise TraceError(
            f"{store.path} is being recorded",
            why=f"process {readers[0]} writes it" if readers else "another process writes it",
            fix="there is nothing to take up: it goes on by itself, also when a full disk has room again; "
            f"see moetrace status {store.path}",
        )
    hosts = {pid for ring in rings if process_alive(pid := peek_writer(ring))}
    hosts |= running_hosts(store.path).keys()
    if not hosts:
        raise TraceError(
            f"the server of {store.path} has ended",
            why="no process writes its rings" if rings else "it has no ring",
            fix=f"take what is left in them, and close the trace: {recover}",
        )
    for name, table in store.tables().items():
        if table.hidden:
            raise TraceError(
                f"{name} of {store.path} is damaged",
                why=table.hidden,
                fix=f"let the server serve on; when it has ended, see what `{recover}` says",
            )
    return hosts
