"""A ring file, live or dead, as numpy sees it.

The host writes records, one reader takes them out. Records are seen in place: :meth:`Ring.pending` gives
views of the mapped file, valid until :meth:`Ring.release` hands their slots back.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import mmap
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import MoetraceError, RuntimeMissingError, TraceError
from moetrace.trace.jsonfile import parse_json, read_json
from moetrace.trace.record import (
    COUNTERS,
    N_COUNTERS,
    RECORD_HEAD,
    RING_FIELD,
    RING_HEADER,
    RING_MAGIC,
    RING_VERSION_MAJOR,
    RING_VERSION_MINOR,
    Field,
    OnFull,
    field_offset,
    record_dtype,
)
from moetrace.trace.storage import disk_error, files_error, is_locked
from moetrace.trace.store import META_NAME, RING_NAME

_FACTS = (
    *("header_size", "file_size", "data_offset", "capacity", "stride", "n_fields", "fields_offset"),
    *("meta_offset", "meta_size", "on_full", "block_ns", "epoch_ns", "host_pid", "crc"),
)
MAX_FIELDS = 1024
MAX_META = 64 << 20

Records = NDArray[np.void]


class _Atomics(Protocol):
    """The part of ``moetrace._native`` that the ring needs: single words of a writable buffer."""

    def load_acquire(self, buffer: Any, offset: int, /) -> int: ...
    def store_release(self, buffer: Any, offset: int, value: int, /) -> None: ...
    def load_acquire32(self, buffer: Any, offset: int, /) -> int: ...
    def store_release32(self, buffer: Any, offset: int, value: int, /) -> None: ...


def _atomics() -> _Atomics:
    try:
        return cast(_Atomics, importlib.import_module("moetrace._native"))
    except ImportError as e:
        raise RuntimeMissingError(
            "moetrace's native module is missing, so rings cannot be read",
            why=str(e),
            fix="install moetrace with `pip install .` (it needs a C++17 compiler); traces open without it",
        ) from e


def _offset(name: str) -> int:
    return field_offset(RING_HEADER, name)


def ring_is_ready(path: str | os.PathLike[str]) -> bool:
    """Say whether the host has finished writing the ring's header; False if there is no such file yet."""
    try:
        with Path(path).open("rb") as f:
            data = f.read(RING_HEADER.itemsize)
    except FileNotFoundError:
        return False
    if len(data) < RING_HEADER.itemsize:
        return False
    return bool(np.frombuffer(data, RING_HEADER)[0]["ready"] == 1)


def _peek(path: Path) -> np.void | None:
    try:
        with path.open("rb") as f:
            data = f.read(RING_HEADER.itemsize)
    except OSError:
        return None
    if len(data) < RING_HEADER.itemsize or not data.startswith(RING_MAGIC):
        return None
    header: np.void = np.frombuffer(data, RING_HEADER)[0]
    return header


def peek_counters(path: Path) -> list[int] | None:
    """Give the counters in a ring's header without mapping it, or None if there is no such ring."""
    header = _peek(path)
    return None if header is None else [int(n) for n in header["counters"]]


def peek_reader(path: Path) -> int | None:
    """Give the process number of a ring's reader (0: none), or None if there is no such ring."""
    header = _peek(path)
    return None if header is None else int(header["reader_pid"])


def peek_host(path: Path) -> int | None:
    """Give the process number of a ring's host (0: it has closed the ring), or None if there is no such ring."""
    header = _peek(path)
    return None if header is None else 0 if header["closed"] else int(header["host_pid"])


def peek_writer(path: Path) -> int:
    """Give the process number of a ring's host, whether it has closed the ring or not; 0 if there is no such ring."""
    header = _peek(path)
    return 0 if header is None else int(header["host_pid"])


def process_alive(pid: int) -> bool:
    """Say whether a process of this number runs (its name is not looked at); a zombie does not."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    try:
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # of a process that is killed the first thread may be gone while another still ends a write
        return facts[0] not in ("Z", "X") or int(facts[17]) > 1
    except (OSError, IndexError):  # where there is no /proc, a zombie counts until its parent has looked
        return True


def ring_paths(trace: Path) -> list[Path]:
    """Give the rings in a trace's folder, of contexts that it lists or does not; links lead elsewhere and are none."""
    return [path for path in sorted(trace.glob(f"ctx*/{RING_NAME}")) if not path.parent.is_symlink()]


def open_rings(trace: Path, stack: contextlib.ExitStack) -> list[Ring]:
    """Give the rings of a trace that is being recorded, open until ``stack`` closes them.

    Raises
    ------
    TraceError
        If the trace is not being recorded.
    """
    rings = []
    for path in ring_paths(trace):
        if ring_is_ready(path):
            try:
                rings.append(stack.enter_context(Ring(path)))
            except TraceError:
                if path.exists():  # else its context has just ended
                    raise
    if not rings:
        raise _not_recorded(trace)
    return rings


def live_rings(trace: Path) -> Iterator[Ring]:
    """Give the same one after the other."""
    with contextlib.ExitStack() as stack:
        yield from open_rings(trace, stack)


def _not_recorded(trace: Path) -> TraceError:
    why, fix = "there is no such trace", "give the folder that `moetrace run -o` writes"
    with contextlib.suppress(TraceError):
        state = read_json(trace / META_NAME).get("state")
        if state != "live":
            why = f"it is {state}: what was recorded has ended"
            fix = "start a recording with `moetrace run`"
        elif is_locked(trace):
            why = (
                "there is no llama context at the moment: the program has not computed anything yet, has freed its "
                "model, or is ending"
            )
            fix = "send the server a request, then try again"
        else:
            why = "its recorder died, and no program writes to it"
            fix = f"take what is left, and close it: moetrace recover {trace}"
    return TraceError(f"{trace} is not being recorded", why=why, fix=fix)


def stalled(rings: Sequence[Ring], seconds: float) -> list[Ring]:
    """Give those rings whose records nobody takes for so many seconds; returns at once if none is as old."""
    left = [(ring, ring.tail) for ring in rings if ring.oldest_s > seconds]
    deadline = time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        time.sleep(min(0.02, seconds))
        left = [(ring, tail) for ring, tail in left if ring.tail == tail]
    return [ring for ring, _ in left]


class Ring:
    """One mapped ring file.

    Parameters
    ----------
    path
        The ring file.
    claim
        Become its reader: ``reader_pid`` is set, so that the host (under ``block``) waits for us. Refused
        while another live process reads. Without it nothing but ``paused`` and ``intervention`` is ever
        written.

    Raises
    ------
    TraceError
        If the file is no ring, newer, cut short, not ready, damaged, or already has a reader. Every number of
        the header is checked against the file's size before it is used.

    Attributes
    ----------
    fields : tuple[Field, ...]
        The payload's columns.
    dtype : numpy.dtype
        One record; its itemsize is the stride.
    meta : dict
        The ring's JSON text (docs/format.md).
    capacity, on_full, block_ns, epoch_ns, host_pid
        From the header.
    """

    def __init__(self, path: str | os.PathLike[str], *, claim: bool = False) -> None:
        self.path = Path(path)
        self._claimed = False
        self._map: mmap.mmap | None = None
        atomics = _atomics()
        flags = os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        try:
            fd = os.open(self.path, flags)
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE):
                raise files_error(self.path, e) from e
            raise TraceError(
                f"cannot open the ring {self.path}",
                why=e.strerror or str(e),
                fix="give the path of a trace that is being recorded, as the user who records it",
            ) from e
        try:
            self._stat = os.fstat(fd)
            size = self._stat.st_size
            if size < RING_HEADER.itemsize:
                raise self._bad(f"it is {size} bytes long, its header alone takes {RING_HEADER.itemsize}")
            try:
                self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            except (OSError, ValueError, OverflowError) as e:
                if isinstance(e, OSError) and e.errno in (errno.EMFILE, errno.ENFILE):  # a map holds a file
                    raise files_error(self.path, e) from e
                if isinstance(e, OSError) and e.errno == errno.ENOMEM:
                    raise MoetraceError(
                        f"cannot map the ring {self.path}",
                        why=f"its {size / 2**20:.0f} MiB are more than this process may map (ulimit -v)",
                        fix="raise that limit, or record with a smaller --ring-size",
                    ) from e
                raise self._bad(f"it cannot be mapped: {e}") from e
        finally:
            os.close(fd)
        self._native = atomics
        try:
            self._read_header(size)
            if claim:
                self._claim()
        except BaseException:
            self.close()
            raise

    def _bad(self, why: str, fix: str = "") -> TraceError:
        return TraceError(
            f"{self.path} is not a ring that can be read",
            why=why,
            fix=fix or "give the ring of a moetrace trace",
        )

    @property
    def _buffer(self) -> mmap.mmap:
        if self._map is None:
            raise MoetraceError(f"the ring {self.path} has been closed", fix="open it again")
        return self._map

    def _read_header(self, size: int) -> None:
        raw = self._buffer[: RING_HEADER.itemsize]
        header = np.frombuffer(raw, RING_HEADER)[0]
        if raw[:8] != RING_MAGIC:
            raise self._bad("it does not begin with MOETRING")
        version = (int(header["version_major"]), int(header["version_minor"]))
        if version[0] != RING_VERSION_MAJOR:
            raise self._bad(
                f"it has format {version[0]}.{version[1]}; this moetrace reads "
                f"{RING_VERSION_MAJOR}.{RING_VERSION_MINOR}",
                fix="read it with the moetrace that wrote it, or a newer one",
            )
        if self._native.load_acquire32(self._buffer, _offset("ready")) != 1:
            raise self._bad("its host has not finished setting it up", fix="try again in a moment")
        fact = {name: int(header[name]) for name in _FACTS}
        if fact["header_size"] < RING_HEADER.itemsize:
            raise self._bad(f"it claims a header of {fact['header_size']} bytes")
        if fact["file_size"] != size:
            raise self._bad(f"it says that it is {fact['file_size']} bytes long, and is {size}")
        if fact["n_fields"] > MAX_FIELDS or fact["meta_size"] > MAX_META:
            raise self._bad(f"it claims {fact['n_fields']} fields and {fact['meta_size']} bytes of JSON")
        fields_end = fact["fields_offset"] + fact["n_fields"] * RING_FIELD.itemsize
        meta_end = fact["meta_offset"] + fact["meta_size"]
        if fact["stride"] < RECORD_HEAD.itemsize or fact["stride"] % 64 or not 1 <= fact["capacity"] <= size:
            raise self._bad(f"it claims {fact['capacity']} records of {fact['stride']} bytes")
        data_end = fact["data_offset"] + fact["capacity"] * fact["stride"]
        if (
            fact["fields_offset"] < fact["header_size"]
            or fact["meta_offset"] < fields_end
            or fact["data_offset"] < meta_end
            or fact["data_offset"] % 64
            or data_end > size
        ):
            raise self._bad("the parts that its header lists overlap or lie outside of it")
        table = self._buffer[fact["fields_offset"] : fields_end]
        text = self._buffer[fact["meta_offset"] : meta_end]
        if zlib.crc32(text, zlib.crc32(table, zlib.crc32(raw[: _offset("crc")]))) != fact["crc"]:
            raise self._bad(
                "its header does not fit its checksum", fix="nothing can be recovered from this ring"
            )
        if fact["on_full"] not in tuple(OnFull):
            raise self._bad(f"its on_full is {fact['on_full']}")
        self.version = version
        self.capacity = fact["capacity"]
        self.on_full = OnFull(fact["on_full"])
        self.block_ns = fact["block_ns"]
        self.epoch_ns = fact["epoch_ns"]
        self.host_pid = fact["host_pid"]
        self.meta: dict[str, Any] = parse_json(text.rstrip(b"\0"), f"the text of {self.path}")
        self.fields = tuple(self._field(row) for row in np.frombuffer(table, RING_FIELD))
        self.dtype = record_dtype(self.fields, fact["stride"])
        self._records: Records | None = np.frombuffer(
            self._buffer, self.dtype, count=self.capacity, offset=fact["data_offset"]
        )
        self._records.flags.writeable = False

    def _field(self, row: Any) -> Field:
        try:
            name, dtype = bytes(row["name"]).decode("ascii"), bytes(row["dtype"]).decode("ascii")
        except UnicodeDecodeError:
            raise self._bad("a field of it has no readable name") from None
        n_dims = int(row["n_dims"])
        shape = tuple(int(n) for n in row["shape"][: min(n_dims, 3)])
        if not name.isprintable() or not name or not 1 <= n_dims <= 3:
            raise self._bad(f"a field of it has the name {name!r} and {n_dims} dimensions")
        return Field(name, dtype, shape, int(row["offset"]))

    # -- the reader's role ---------------------------------------------------------------------------

    def _claim(self) -> None:
        pid = self._native.load_acquire32(self._buffer, _offset("reader_pid"))
        if pid not in (0, os.getpid()) and process_alive(pid):
            raise TraceError(
                f"the ring {self.path} already has a reader",
                why=f"process {pid} reads it",
                fix="read its trace instead of the ring; a ring has one reader at a time",
            )
        self._native.store_release32(self._buffer, _offset("reader_pid"), os.getpid())
        self._claimed = True
        self.beat()

    def beat(self) -> None:
        """Show the host that the reader lives; ``release`` does it too."""
        if self._claimed:
            self._native.store_release(self._buffer, _offset("reader_beat_ns"), time.monotonic_ns())

    # -- what the header says now --------------------------------------------------------------------

    @property
    def asleep(self) -> bool:
        """Whether no llama context is there that writes to it: its server has unloaded the model for now."""
        counters = self.counters
        return 0 < counters.get("contexts", 0) == counters.get("contexts_freed", 0)

    @property
    def counters(self) -> dict[str, int]:
        """The host's counters by name, in lower case (``rows_produced``, ...)."""
        offset = _offset("counters")
        names = self.meta.get("counter_names")
        if not (
            isinstance(names, list) and all(isinstance(n, str) for n in names) and len(names) <= N_COUNTERS
        ):
            names = list(COUNTERS)
        return {name: self._native.load_acquire(self._buffer, offset + 8 * i) for i, name in enumerate(names)}

    @property
    def closed(self) -> bool:
        """True once the context was freed or the tracer gave up: no record follows."""
        return self._native.load_acquire32(self._buffer, _offset("closed")) != 0

    @property
    def host_alive(self) -> bool:
        """True while the process that writes the ring runs."""
        return process_alive(self.host_pid)

    @property
    def status(self) -> str:
        """Why the tracer gave up; empty if it did not."""
        start = _offset("status")
        return self._buffer[start : start + 112].split(b"\0")[0].decode("utf-8", "replace")

    @property
    def oldest_s(self) -> float:
        """Seconds since the ubatch of the oldest record that was not released began; 0 if there is none."""
        head, tail = self.head, self.tail
        if self._records is None or tail >= head:
            return 0.0
        began = int(self._records["time_ns"][max(tail, head - self.capacity) % self.capacity])
        return max(0, time.monotonic_ns() - began) / 1e9

    @property
    def reader_silent_s(self) -> float:
        """Seconds since the reader's last sign of life; it gives one every half second."""
        beat = self._native.load_acquire(self._buffer, _offset("reader_beat_ns"))
        return max(0, time.monotonic_ns() - beat) / 1e9

    @property
    def reader_pid(self) -> int:
        """Process number of the reader, 0 if there is none."""
        return self._native.load_acquire32(self._buffer, _offset("reader_pid"))

    @property
    def paused(self) -> bool:
        """Whether recording is switched off; the host looks before each graph."""
        return self._native.load_acquire32(self._buffer, _offset("paused")) != 0

    @paused.setter
    def paused(self, value: bool) -> None:
        self._native.store_release32(self._buffer, _offset("paused"), int(value))

    @property
    def intervention(self) -> int:
        """Number of the intervention that shall be in force (moetrace/trace/intervention.py); 0: none."""
        return self._native.load_acquire32(self._buffer, _offset("intervention"))

    @intervention.setter
    def intervention(self, number: int) -> None:
        self._native.store_release32(self._buffer, _offset("intervention"), number)

    @property
    def intervention_active(self) -> int:
        """Number of the one in force; the host follows :attr:`intervention` before each graph."""
        return self._native.load_acquire32(self._buffer, _offset("intervention_active"))

    @property
    def intervention_refused(self) -> tuple[int, str]:
        """Number of the last one that the host refused, and why; (0, "") if it refused none."""
        number = self._native.load_acquire32(self._buffer, _offset("intervention_refused"))
        start = _offset("intervention_why")
        why = self._buffer[start : start + 48].split(b"\0")[0].decode("utf-8", "replace")
        return (number, why) if number else (0, "")

    @property
    def head(self) -> int:
        """Records committed since the start."""
        return self._native.load_acquire(self._buffer, _offset("head"))

    @property
    def tail(self) -> int:
        """Records released by the reader."""
        return self._native.load_acquire(self._buffer, _offset("tail"))

    # -- records -------------------------------------------------------------------------------------

    def _segments(self, start: int, stop: int) -> list[Records]:
        if self._records is None:
            raise MoetraceError(f"the ring {self.path} has been closed", fix="open it again")
        if start == stop:
            return []
        i, n = start % self.capacity, stop - start
        first = self._records[i : i + n]
        return [first] if len(first) == n else [first, self._records[: n - len(first)]]

    def pending(self) -> list[Records]:
        """Give the committed records that were not yet released, oldest first.

        Returns
        -------
        list of structured arrays, dtype :attr:`dtype`
            Zero, one or two read-only views of the mapped file, no copy. They hold until their records are
            released; afterwards the host overwrites them.

        Raises
        ------
        TraceError
            If head and tail contradict each other, or under ``overwrite`` (see :meth:`snapshot`).
        """
        if self.on_full == OnFull.OVERWRITE:
            raise TraceError(
                f"the ring {self.path} overwrites its oldest records",
                fix="take copies with Ring.snapshot() instead",
            )
        head, tail = self.head, self.tail
        if not 0 <= head - tail <= self.capacity:
            raise self._bad(
                f"its head {head} and tail {tail} contradict its capacity of {self.capacity} records"
            )
        return self._segments(tail, head)

    def snapshot(self) -> tuple[Records, int]:
        """Copy the records not yet released that still stand whole, under any policy.

        Returns
        -------
        records : structured array (n,), dtype :attr:`dtype`
            A copy, oldest first.
        overwritten : int
            Records since the tail that the host overwrote before they could be copied. They are gone;
            ``release(len(records) + overwritten)`` goes past all of them.
        """
        head, tail = self.head, self.tail
        if tail > head:
            raise self._bad(f"its head {head} lies before its tail {tail}")
        start = max(tail, head - self.capacity)
        parts = self._segments(start, head)
        before = [part["stamp"].copy() for part in parts]
        # the acquire load and the release store keep the copies between the two looks at the stamps
        self._native.load_acquire(self._buffer, _offset("head"))
        records = np.empty(head - start, self.dtype)  # not concatenate: it would pack the fields
        end = 0
        for part in parts:
            records[end : end + len(part)] = part
            end += len(part)
        self.beat()
        self._native.load_acquire(self._buffer, _offset("head"))
        after = [part["stamp"].copy() for part in parts]
        if not parts:
            return np.empty(0, self.dtype), head - tail
        want = np.arange(start + 1, head + 1, dtype=np.uint64)
        whole = (np.concatenate(before) == want) & (np.concatenate(after) == want)
        records = records[whole]
        return records, head - tail - len(records)

    def release(self, n: int) -> None:
        """Hand the oldest ``n`` records' slots back to the host.

        Raises
        ------
        ValueError
            If fewer than ``n`` records are pending.
        """
        tail = self.tail
        if not 0 <= n <= self.head - tail:
            raise ValueError(f"cannot release {n} records, {self.head - tail} are pending")
        self._native.store_release(self._buffer, _offset("tail"), tail + n)
        self.beat()

    def unlink(self) -> None:
        """Delete the file, if it is still ours that lies there; the host's map of it stays good.

        Raises
        ------
        MoetraceError
            If the disk does not allow it.
        """
        try:
            if os.path.samestat(self.path.lstat(), self._stat):
                self.path.unlink()
        except FileNotFoundError:
            pass
        except OSError as e:
            raise disk_error(self.path, e) from e

    # -- end -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the reader's role back and unmap the file; views that are still held keep the map alive."""
        if self._map is None:
            return
        if self._claimed:
            self._native.store_release32(self._map, _offset("reader_pid"), 0)
            self._claimed = False
        self._records = None
        with contextlib.suppress(BufferError):  # somebody holds a view: the map goes when the view goes
            self._map.close()
        self._map = None

    def __enter__(self) -> Ring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._map is None:
            return f"<Ring {self.path}, closed>"
        return f"<Ring {self.path}: {self.head - self.tail} of {self.capacity} records pending>"
