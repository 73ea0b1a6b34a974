"""The reader of live rings: records out of the rings, columns into the trace."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moetrace.errors import DiskError, GoneError, MoetraceError, TraceError
from moetrace.host.hosts import maps_file
from moetrace.printable import printable
from moetrace.trace.record import OnFull
from moetrace.trace.ring import Ring, peek_writer, process_alive, ring_is_ready, ring_paths
from moetrace.trace.rows import Layout
from moetrace.trace.storage import try_disk
from moetrace.trace.writer import ContextWriter, TraceWriter, final_counters

#: a block is sealed after so many seconds, or when it fills this share of the ring
SEAL_SECONDS = 0.5
SEAL_SHARE = 0.25
#: how long the drain sleeps when there was nothing to do, seconds
IDLE_SECONDS = 0.005
#: how often it looks for new rings, and whether the trace is where it was and its hosts live
ATTACH_SECONDS = 0.05
LOOK_SECONDS = 1.0
#: how often it tries a disk that failed, at first and at most; how often it shows the hosts that it lives meanwhile
RETRY_SECONDS = 1.0
RETRY_SECONDS_MAX = 60.0
BEAT_SECONDS = 0.1
#: how long a ring may be unreadable before that is said
PATIENCE_SECONDS = 2.0


class ContextDrain:
    """One ring and the tables that it goes to.

    Records are appended as they come and released only once they are sealed: whatever dies in between, they
    are still in the ring.

    Attributes
    ----------
    ended
        Whether :meth:`close` has taken the last of it.
    refused
        Number of the last intervention that the host refused, and why, as of :meth:`close`.
    """

    def __init__(self, ring: Ring, writer: ContextWriter) -> None:
        self.ring = ring
        self.writer = writer
        self.ended = False
        self.refused = (0, "")
        self._began = len(writer.rows)
        self._host_is_near = maps_file(ring.host_pid, ring.path)
        self._taken = 0  # records appended and not released
        self._sealed_at = time.monotonic()

    @property
    def name(self) -> str:
        """The context's folder within the trace."""
        return self.ring.path.parent.name

    @property
    def rows(self) -> int:
        """Rows taken so far."""
        return len(self.writer.rows) - self._began

    @property
    def host_has_ended(self) -> bool:
        """Whether no record follows: the ring was closed, or its host, which was seen to run here, has ended."""
        return self.ring.closed or (self._host_is_near and not self.ring.host_alive)

    def catch_up(self, writer: ContextWriter | None = None) -> None:
        """Seal what the ring holds beyond the tables: of a reader that died, or of ours before a write failed."""
        if writer is not None:
            self.writer = writer
        records, gone = self.ring.snapshot()
        self.writer.catch_up(records)
        self._taken = len(records) + gone
        self._seal()

    def step(self, *, seal: bool = False) -> int:
        """Take what is there; gives the number of records taken."""
        if self.ring.on_full == OnFull.OVERWRITE:
            records, overwritten = self.ring.snapshot()
            self.writer.append(records)
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
                self.writer.append(fresh)
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
        self.refused = self.ring.intervention_refused
        self.ring.unlink()
        self.ring.close()
        self.ended = True

    def detach(self) -> None:
        """Seal what was taken and give the ring back; the host goes on writing to it."""
        self.step(seal=True)
        self.writer.detach()
        self.ring.close()


def tell(said: MoetraceError | str) -> None:
    """Say on standard error what becomes of the recording."""
    print(f"moetrace: {printable(str(said), keep=chr(10))}", file=sys.stderr, flush=True)


def _unfailing(say: Callable[[Any], None]) -> Callable[[Any], None]:
    """What is said may go to a file on the very disk that is full: that must not end the drain."""

    def said(what: Any) -> None:
        with contextlib.suppress(
            OSError
        ):  # it stays in the stream's buffer, and is written with what is said next
            say(what)

    return said


class Drain:
    """Drains every ring that appears in a trace folder, in a thread of its own.

    A disk that fails is tried again: until it can be written, rows wait in the rings, whose policy says what
    becomes of those that find no room. A ring that cannot be read is left alone, and the others go on. A trace
    that is moved is followed.

    Parameters
    ----------
    trace
        The trace to write to; its folder is watched for ``ctx*/ring``.
    on_error
        Called in the drain's thread when something goes wrong: once each time that the disk fails, once for each
        ring that cannot be read, and once if draining has ended (:attr:`error`). The host goes on in any case; what
        is in the rings stays there for ``moetrace recover``. By default it is said on standard error.
    on_note
        Called likewise with a sentence when recording goes on after the disk failed, or elsewhere.

    Attributes
    ----------
    contexts
        All that were taken on, those included that have ended.
    waiting
        Why the disk cannot be written at the moment; None if it can.
    error
        Why draining has ended; None if it has not.
    """

    def __init__(
        self,
        trace: TraceWriter,
        on_error: Callable[[MoetraceError], None] = tell,
        on_note: Callable[[str], None] = tell,
    ) -> None:
        self.trace = trace
        self.error: MoetraceError | None = None
        self.waiting: DiskError | None = None
        self.contexts: list[ContextDrain] = []
        self._on_error = _unfailing(on_error)
        self._on_note = _unfailing(on_note)
        self._place = trace.path
        self._unreadable: dict[str, float] = {}  # ring -> since when
        self._left_alone: dict[str, MoetraceError] = {}
        self._said_of: dict[str, MoetraceError] = {}
        self._claimed: dict[str, Ring] = {}  # rings whose context the disk did not take yet
        self._next_attach = self._next_look = self._next_try = 0.0
        self._lost_before = 0
        self._waiting_told = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moetrace-drain", daemon=True)

    @property
    def rows(self) -> int:
        """Rows taken so far, over all contexts."""
        return sum(context.rows for context in self.contexts)

    @property
    def left_alone(self) -> list[MoetraceError]:
        """What was said of rings that could not be read."""
        return list(self._left_alone.values())

    @property
    def _rings(self) -> list[Ring]:
        return [*(context.ring for context in self._open), *self._claimed.values()]

    @property
    def _open(self) -> list[ContextDrain]:
        return [context for context in self.contexts if not context.ended]

    def start(self) -> None:
        """Begin to drain."""
        self._thread.start()

    def stop(self) -> None:
        """Take what is left in the rings and close the contexts; call it when the host is done.

        Raises
        ------
        MoetraceError
            If draining failed. The trace is let go of then, live as it is.
        """
        self._finish()
        for last in (False, True) if self.error is None else ():  # what failed once may succeed
            try:
                self._end()
                break
            except DiskError as e:
                self.waiting = e
                if last:
                    self._give_up(
                        MoetraceError(
                            f"the last rows could not be written, and wait in the rings of {self.trace.path}",
                            why=e.why,
                            fix=f"free some space there, then: moetrace recover {self.trace.path}",
                        )
                    )
            except MoetraceError as e:
                self._give_up(e)
                break
        if self.error is not None:
            raise self.error

    def _end(self) -> None:
        if self.waiting is not None:
            self._take_up_again()
        self.attach()
        self._close(self._open)
        taken_on = {context.name for context in self.contexts}
        for name in self._left_alone.keys() - taken_on:  # there may be room for these now
            del self._left_alone[name]
        self.attach()
        self._close(self._open)
        self._remove_unfinished()

    def _close(self, contexts: list[ContextDrain]) -> None:
        for context in contexts:
            with self._apart(context):
                context.close()

    @contextlib.contextmanager
    def _apart(self, context: ContextDrain) -> Iterator[None]:
        """What is wrong with one ring ends with it: the other contexts are whole all the same."""
        try:
            yield
        except GoneError:
            raise
        except TraceError as e:
            self._leave_alone(context.ring.path, e)
            context.ring.close()
            context.writer.detach()
            context.ended = True

    def _remove_unfinished(self) -> None:
        """Remove rings whose hosts ended while they made them: there is nothing in them."""
        for path in ring_paths(self.trace.path):
            if not ring_is_ready(path) and not process_alive(peek_writer(path)):
                with contextlib.suppress(OSError):
                    path.unlink()
                    path.parent.rmdir()

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
        for context in self._open if self.waiting is None else ():
            context.detach()
        for ring in self._rings:
            ring.close()
        self.trace.detach()

    def flush(self) -> None:
        """Wait until everything committed before this call is sealed (or draining has failed, or waits)."""
        deadline = time.monotonic() + 4 * SEAL_SECONDS + 10

        def may_wait() -> bool:
            return self._thread.is_alive() and self.waiting is None and time.monotonic() < deadline

        with contextlib.suppress(MoetraceError):  # a ring that was closed meanwhile has been read to its end
            while may_wait() and self._new_rings():
                time.sleep(IDLE_SECONDS)
            targets = [(context, context.ring.head) for context in self._open]
            while may_wait():
                if all(context.ended or context.ring.tail >= head for context, head in targets):
                    return
                time.sleep(IDLE_SECONDS)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._look()
                if self.waiting is not None:
                    self._wait_for_disk()
                    continue
                self.attach()
                n = 0
                for context in self._open:
                    with self._apart(context):
                        n += context.step()
                self._close([context for context in self._open if context.ring.closed])
            except DiskError as e:
                self._begin_to_wait(e)
                continue
            except MoetraceError as e:
                self._give_up(e)
                return
            except Exception as e:  # a bug in the drain must be loud, and must not end the host's run
                self._give_up(
                    MoetraceError(
                        f"draining failed: {type(e).__name__}: {e}",
                        fix=f"when the program has ended: moetrace recover {self.trace.path}",
                    )
                )
                return
            if not n:
                self._stop.wait(IDLE_SECONDS)

    def _look(self) -> None:
        """See whether the trace is what and where it was, and its hosts live."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        self._follow()
        if self.waiting is None:
            looked_at = [self.trace.tampering(), *(context.writer.tampering() for context in self._open)]
            for what in looked_at:
                if what:
                    raise TraceError(
                        f"recording has ended: {what} while it was being written",
                        fix=f"when the program has ended, see what is left: moetrace recover {self.trace.path}",
                    )
            self._close([context for context in self._open if context.host_has_ended])

    def _follow(self) -> bool:
        """Go where the trace was moved to; gives whether it was."""
        self.trace.stay()
        if self.trace.path == self._place:
            return False
        for ring in self._rings:
            ring.path = self.trace.path / ring.path.parent.name / ring.path.name
        self._on_note(
            f"{self._place} was moved to {self.trace.path}: recording goes on there, without llama contexts "
            "that are made from now on"
        )
        self._place = self.trace.path
        return True

    # -- a disk that fails -----------------------------------------------------------------------------

    def _begin_to_wait(self, error: DiskError) -> None:
        try:
            moved = self._follow()
        except GoneError as e:  # that is why
            self._give_up(e)
            self._stop.set()
            return
        self.waiting = error
        self._lost_before = self._lost()
        if moved:  # that is why: there is nothing to wait for
            self._next_try = 0.0
        else:
            self._say_that_it_waits(error)
            self._next_try = time.monotonic() + RETRY_SECONDS

    def _say_that_it_waits(self, error: DiskError) -> None:
        self._waiting_told = True
        self._on_error(
            DiskError(
                f"recording waits for the disk: {error.what}",
                why=error.why,
                fix=f"{error.fix}. Recording goes on by itself; until then rows wait in memory, and those that "
                "find no room there are lost, and counted",
            )
        )

    def _wait_for_disk(self) -> None:
        began = time.monotonic()
        if began < self._next_try:
            for ring in self._rings:
                ring.beat()
            self._stop.wait(BEAT_SECONDS)
            return
        try:
            try_disk(self.trace.path)
        except OSError:
            self._next_try = time.monotonic() + RETRY_SECONDS
            return
        try:
            self._take_up_again()
        except DiskError as e:
            if not self._waiting_told:
                self._say_that_it_waits(e)
            took = time.monotonic() - began
            self._next_try = began + min(max(10 * took, RETRY_SECONDS), RETRY_SECONDS_MAX)
            return
        if not self._waiting_told:
            return
        self._waiting_told = False
        lost = self._lost() - self._lost_before
        self._on_note(
            "the disk can be written again: recording goes on, "
            + (f"{lost:,} rows were lost meanwhile" if lost else "nothing was lost")
        )

    def _take_up_again(self) -> None:
        """Go back to what is sealed and take the rest out of the rings again, as after a reader's death."""
        self.trace.reopen()
        for context in self._open:
            writer = self.trace.context(context.name)
            if writer is None:  # it could not be listed
                self._claimed[context.name] = context.ring
                self.contexts.remove(context)
            else:
                context.catch_up(writer)
        self.waiting = None

    def _lost(self) -> int:
        names = ("rows_lost_full", "rows_overwritten")
        return sum(ring.counters[name] for ring in self._rings for name in names)

    def _give_up(self, error: MoetraceError) -> None:
        for ring in self._rings:
            if isinstance(error, GoneError):
                ring.paused = True  # nobody will ever read it: the host need not wait
            ring.close()
        self.trace.detach()
        self.error = error
        self._on_error(error)

    # -- rings -----------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Take on every ring that has appeared since the last call."""
        now = time.monotonic()
        if now < self._next_attach and not self._stop.is_set():
            return
        self._next_attach = now + ATTACH_SECONDS
        for path in self._new_rings():
            try:
                self._take_on(path)
                self._unreadable.pop(path.parent.name, None)
            except (DiskError, GoneError):
                raise
            except TraceError as e:
                since = self._unreadable.setdefault(path.parent.name, now)
                if self._stop.is_set() or now - since > PATIENCE_SECONDS:
                    self._leave_alone(path, e)
            except MoetraceError as e:
                self._leave_alone(path, e)

    def _new_rings(self) -> list[Path]:
        """Give the rings that are finished and not taken on."""
        known = {context.name for context in self.contexts} | self._left_alone.keys()
        found = [path for path in ring_paths(self.trace.path) if path.parent.name not in known]
        return [path for path in found if ring_is_ready(path)]

    def _take_on(self, path: Path) -> None:
        ring = self._claimed.pop(path.parent.name, None) or Ring(path, claim=True)
        try:
            writer = self.trace.context(path.parent.name)
            if writer is None:
                layout = Layout.from_context(ring.meta, ring.fields)
                writer = self.trace.add_context(path.parent.name, ring.meta, layout, epoch_ns=ring.epoch_ns)
                context = ContextDrain(ring, writer)
            else:  # another drain had it, and died
                context = ContextDrain(ring, writer)
                context.catch_up()
        except DiskError:
            self._claimed[path.parent.name] = ring  # its host may know that somebody will read it
            raise
        except BaseException:
            ring.close()
            raise
        self.contexts.append(context)

    def _leave_alone(self, path: Path, error: MoetraceError) -> None:
        """Say once that a ring cannot be read; the others go on."""
        if not path.exists():
            return
        said = MoetraceError(
            f"{path.parent.name} of {self.trace.path} is not recorded: {error.what}",
            why=error.why,
            fix=error.fix,
        )
        name = path.parent.name
        self._left_alone[name] = self._said_of.setdefault(name, said)
        if self._said_of[name] is said:
            self._on_error(said)
