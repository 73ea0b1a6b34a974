"""Taking up the recording of a server whose drain died."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from moetrace.errors import MoetraceError, TraceError
from moetrace.host.drain import Drain
from moetrace.host.model import store_model_paths, store_vocabulary
from moetrace.trace.ring import peek_host, peek_reader, process_alive, ring_paths
from moetrace.trace.store import TraceStore
from moetrace.trace.writer import TraceWriter

#: how often the host is looked at, seconds
POLL_SECONDS = 0.2


class ResumedRecording:
    """A live recording with a new drain: the trace goes on where the old drain sealed it last.

    Nothing is lost that the rings still hold. What the host could not write while nobody read is counted as lost,
    as its policy says.

    Parameters
    ----------
    path
        The trace.
    on_error
        Called once, in the drain's thread, when draining fails.

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
        self, path: str | os.PathLike[str], on_error: Callable[[MoetraceError], None] | None = None
    ) -> None:
        store = TraceStore(path)
        self._hosts = _hosts(store)
        self.trace = TraceWriter.resume(store.path)
        self.drain = Drain(self.trace, on_error)
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
            store_model_paths(self.trace, self._model_path)
            store_vocabulary(self.trace.path, self._model_path)
        except MoetraceError:
            self.trace.detach()
            raise
        self.trace.close()

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
    for ring in rings:
        reader = peek_reader(ring)
        if reader and reader != os.getpid() and process_alive(reader):
            raise TraceError(
                f"{store.path} is being recorded",
                why=f"process {reader} writes it",
                fix=f"there is nothing to take up; to replace that process, end it first: kill {reader}",
            )
    hosts = {pid for ring in rings if (pid := peek_host(ring)) and process_alive(pid)}
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
                fix=f"stop the server (kill {min(hosts)}), then see what `{recover}` says",
            )
    return hosts
