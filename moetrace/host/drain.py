"""The reader of live rings: records out of the rings, columns into the trace."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from moetrace.errors import MoetraceError
from moetrace.trace.record import OnFull
from moetrace.trace.ring import Ring, ring_is_ready, ring_paths
from moetrace.trace.rows import Layout
from moetrace.trace.storage import disk_error
from moetrace.trace.writer import ContextWriter, TraceWriter, final_counters

#: a block is sealed after so many seconds, or when it fills this share of the ring
SEAL_SECONDS = 0.5
SEAL_SHARE = 0.25
#: how long the drain sleeps when there was nothing to do, seconds
IDLE_SECONDS = 0.005


class ContextDrain:
    """One ring and the tables that it goes to.

    Records are appended as they come and released only once they are sealed: whatever dies in between, they
    are still in the ring.
    """

    def __init__(self, ring: Ring, writer: ContextWriter) -> None:
        self.ring = ring
        self.writer = writer
        self.rows = 0
        self._taken = 0  # records appended and not released
        self._sealed_at = time.monotonic()

    def catch_up(self) -> int:
        """Take over from a reader that died: seal what it did not; gives the number of rows."""
        records, gone = self.ring.snapshot()
        rows = self.writer.catch_up(records)
        self.rows += rows
        self._taken = len(records) + gone
        self._seal()
        return rows

    def step(self, *, seal: bool = False) -> int:
        """Take what is there; gives the number of records taken."""
        if self.ring.on_full == OnFull.OVERWRITE:
            records, overwritten = self.ring.snapshot()
            self.rows += self.writer.append(records)
            taken = len(records) + overwritten
            self._taken += taken
            if taken:
                self._seal()
            return taken
        taken = 0
        skip = self._taken
        for segment in self.ring.pending():
            fresh = segment[skip:]
            skip = max(0, skip - len(segment))
            if len(fresh):
                self.rows += self.writer.append(fresh)
                taken += len(fresh)
        self._taken += taken
        due = time.monotonic() - self._sealed_at > SEAL_SECONDS
        if self._taken and (seal or due or self._taken > self.ring.capacity * SEAL_SHARE):
            self._seal()
        elif due:
            self.ring.beat()
            self._sealed_at = time.monotonic()
        return taken

    def _seal(self) -> None:
        self.writer.seal()
        held = self.writer.held
        if self.ring.on_full == OnFull.OVERWRITE or held > self.ring.capacity / 2:
            held = 0  # nobody waits for these, or the host would wait for ever
        self.ring.release(self._taken - held)
        self._taken = held
        self._sealed_at = time.monotonic()

    def close(self) -> None:
        """Take the rest, seal, write the counters, and delete the ring."""
        while self.step(seal=True):
            pass
        self.writer.close(final_counters(self.ring, self.writer), self.ring.status)
        path = self.ring.path
        self.ring.close()
        try:
            path.unlink(missing_ok=True)
        except OSError as e:
            raise disk_error(path, e) from e

    def detach(self) -> None:
        """Seal what was taken and give the ring back; the host goes on writing to it."""
        self.step(seal=True)
        self.writer.detach()
        self.ring.close()


class Drain:
    """Drains every ring that appears in a trace folder, in a thread of its own.

    Parameters
    ----------
    trace
        The trace to write to; its folder is watched for ``ctx*/ring``.
    on_error
        Called once, in the drain's thread, if draining fails (for example a full disk). The host goes on; what
        is in the rings stays there for ``moetrace recover``.
    """

    def __init__(self, trace: TraceWriter, on_error: Callable[[MoetraceError], None] | None = None) -> None:
        self.trace = trace
        self.error: MoetraceError | None = None
        self.contexts: list[ContextDrain] = []
        self._on_error = on_error
        self._seen: set[Path] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moetrace-drain", daemon=True)

    @property
    def rows(self) -> int:
        """Rows taken so far, over all contexts."""
        return sum(context.rows for context in self.contexts)

    def start(self) -> None:
        """Begin to drain."""
        self._thread.start()

    def stop(self) -> None:
        """Take what is left in the rings and close the contexts; call it when the host is done.

        Raises
        ------
        MoetraceError
            If draining failed, now or before.
        """
        self._finish()
        if self.error is None:
            try:
                self.attach()
            except MoetraceError as e:
                self.error = e
            for context in self.contexts if self.error is None else ():
                try:
                    context.close()
                except MoetraceError as e:  # the other contexts are whole all the same
                    self.error = self.error or e
        if self.error is not None:
            raise self.error

    def _finish(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def detach(self) -> None:
        """Seal what was taken and let go of the rings and the trace, which stays live: the host goes on.

        Raises
        ------
        MoetraceError
            If draining failed, now or before.
        """
        self._finish()
        if self.error is not None:
            raise self.error
        for context in self.contexts:
            context.detach()
        self.trace.detach()

    def flush(self) -> None:
        """Wait until everything committed before this call is sealed (or draining has failed)."""
        targets = [(context, context.ring.head) for context in list(self.contexts)]
        deadline = time.monotonic() + 4 * SEAL_SECONDS + 10
        while self._thread.is_alive() and time.monotonic() < deadline:
            if all(context.ring.tail >= head for context, head in targets):
                return
            time.sleep(IDLE_SECONDS)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.attach()
                if not sum(context.step() for context in self.contexts):
                    self._stop.wait(IDLE_SECONDS)
        except MoetraceError as e:
            self.error = e
        except Exception as e:  # a bug in the drain must be loud, and must not end the host's run
            self.error = MoetraceError(
                f"draining failed: {type(e).__name__}: {e}", fix="`moetrace recover` the trace"
            )
        if self.error is not None and self._on_error is not None:
            self._on_error(self.error)

    def attach(self) -> None:
        """Take on every ring that has appeared since the last call."""
        for path in ring_paths(self.trace.path):
            if path in self._seen or not ring_is_ready(path):
                continue
            ring = Ring(path, claim=True)
            writer = self.trace.context(path.parent.name)
            if writer is None:
                layout = Layout.from_context(ring.meta, ring.fields)
                writer = self.trace.add_context(path.parent.name, ring.meta, layout, epoch_ns=ring.epoch_ns)
                self.contexts.append(ContextDrain(ring, writer))
            else:  # another drain had it, and died
                self.contexts.append(ContextDrain(ring, writer))
                self.contexts[-1].catch_up()
            self._seen.add(path)
