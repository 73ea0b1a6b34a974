"""Tables of plain ``.npy`` columns, appended to and sealed in blocks (docs/format.md, section 1).

:class:`TableWriter` writes, :class:`Table` reads. The ledger (``blocks.npy``) says how long a table is;
bytes beyond it count for nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace._native import map_file
from moetrace.errors import TraceError
from moetrace.trace.ledger import (
    COLUMN_HEADER,
    LEDGER_NAME,
    Header,
    column_path,
    ledger_dtype,
    ledger_header_size,
    npy_header,
    read_header,
    read_ledger,
    row_crc,
)
from moetrace.trace.rows import ColumnSpec
from moetrace.trace.storage import disk_error, files_error, write_at

_CHUNK = 4 << 20


class TableWriter:
    """A table that grows: append rows, seal them into blocks.

    Make one with :meth:`create` or :meth:`resume`. Whatever fails, the table on disk ends at a sealed block.

    Parameters
    ----------
    path
        The table's folder.
    columns
        name -> (dtype, shape per row).
    sealed
        Rows that are sealed already.
    ledger
        Blocks that are sealed already, as bytes.
    fsync
        After each seal, wait until the disk has it: survives a power cut, and is slow. Without it a table
        survives the death of any process, not that of the machine.
    """

    def __init__(self, path: Path, columns: ColumnSpec, sealed: int, ledger: bytes, *, fsync: bool) -> None:
        self.path = path
        self.columns = dict(columns)
        self.sealed = sealed
        self.unsealed = 0
        self.fsync = fsync
        self._dtype = ledger_dtype(list(columns))
        self._row_bytes = {name: _row_bytes(dtype, shape) for name, (dtype, shape) in columns.items()}
        self._ledger_header = ledger_header_size(self._dtype)
        self._n_blocks = len(ledger) // self._dtype.itemsize
        self._ledger_crc = zlib.crc32(np.frombuffer(ledger, self._dtype)["self"].tobytes())
        self._crc = dict.fromkeys(columns, 0)
        self._fds: dict[str, int] = {}

    @classmethod
    def create(cls, path: str | os.PathLike[str], columns: ColumnSpec, *, fsync: bool = False) -> TableWriter:
        """Make the folder ``path`` with empty columns.

        Raises
        ------
        MoetraceError
            If it exists, or cannot be written.
        """
        writer = cls(Path(path), columns, 0, b"", fsync=fsync)
        try:
            writer.path.mkdir(parents=True)
            for name in [*columns, LEDGER_NAME]:
                writer._open(name, os.O_CREAT | os.O_EXCL)
            writer._write_headers()
        except OSError as e:
            writer.close()
            raise disk_error(writer.path, e) from e
        return writer

    @classmethod
    def resume(cls, path: str | os.PathLike[str], *, fsync: bool = False) -> TableWriter:
        """Open a table to append to it; its unsealed remainder is cut off and its headers are set right.

        Raises
        ------
        TraceError
            If it is no table.
        MoetraceError
            If it cannot be written.
        """
        table = Table(path)
        ledger = table.ledger.tobytes()
        writer = cls(table.path, table.spec, table.n_rows, ledger, fsync=fsync)
        try:
            for name in [*writer.columns, LEDGER_NAME]:
                writer._open(name, 0)
            writer._cut()
            writer._write_headers()
        except OSError as e:
            writer.close()
            raise disk_error(writer.path, e) from e
        return writer

    def __len__(self) -> int:
        return self.sealed + self.unsealed

    @property
    def ledger_crc(self) -> int:
        """CRC-32 of the checksums (``self``) of the ledger's rows, for ``tables`` in meta.json."""
        return self._ledger_crc

    def append(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """Append rows; they count once they are sealed.

        Parameters
        ----------
        columns
            One array per column of the table, each (n, *shape). Arrays are copied to the file as they are;
            another dtype is an error.

        Raises
        ------
        ValueError
            If a column is missing, unknown, or has another dtype or shape; nothing is written then.
        MoetraceError
            If the disk is full or fails. The table then ends at the last sealed block: rows appended since
            are gone from it, and must be appended again.
        """
        if columns.keys() != self.columns.keys():
            odd = sorted(columns.keys() ^ self.columns.keys())
            raise ValueError(f"the columns {odd} are missing from, or unknown to, {self.path}")
        n = len(next(iter(columns.values())))
        for name, (dtype, shape) in self.columns.items():
            array = columns[name]
            if array.dtype != np.dtype(dtype) or array.shape != (n, *shape):
                raise ValueError(
                    f"column {name!r} of {self.path} takes {dtype} {(n, *shape)}, "
                    f"not {array.dtype.str} {array.shape}"
                )
        if n == 0:
            return
        crcs = {}
        try:
            for name, array in columns.items():
                data = np.ascontiguousarray(array).data.cast("B")
                write_at(self._fds[name], data, COLUMN_HEADER + len(self) * self._row_bytes[name])
                crcs[name] = zlib.crc32(data, self._crc[name])
        except OSError as e:
            self._forget()
            raise disk_error(self.path, e) from e
        self._crc = crcs
        self.unsealed += n

    def seal(self) -> int:
        """Make one block of the rows appended since the last seal; gives how many there were.

        Raises
        ------
        MoetraceError
            If the disk is full or fails. The block's rows are then gone from the table, as with
            :meth:`append`; if only the last step failed (headers), they are sealed all the same and only
            the headers lag behind.
        """
        n = self.unsealed
        if n == 0:
            return 0
        row = np.zeros(1, self._dtype)
        row["start"], row["rows"], row["time_ns"] = self.sealed, n, time.time_ns()
        for name, crc in self._crc.items():
            row["crc"][name] = crc
        row["self"] = row_crc(row[0])
        data = row.tobytes()
        try:
            if self.fsync:
                for name in self.columns:
                    os.fdatasync(self._fds[name])
            write_at(self._fds[LEDGER_NAME], data, self._ledger_header + self._n_blocks * len(data))
            if self.fsync:
                os.fdatasync(self._fds[LEDGER_NAME])
        except OSError as e:
            self._forget()
            raise disk_error(self.path, e) from e
        self.sealed += n
        self.unsealed = 0
        self._n_blocks += 1
        self._ledger_crc = zlib.crc32(row["self"].tobytes(), self._ledger_crc)
        self._crc = dict.fromkeys(self.columns, 0)
        try:
            self._write_headers()
        except OSError as e:
            raise disk_error(self.path, e) from e
        return n

    def tampering(self) -> str:
        """Say what somebody else did to its files since they were opened; empty if nothing."""
        sizes = {name: COLUMN_HEADER + self.sealed * n for name, n in self._row_bytes.items()}
        sizes[LEDGER_NAME] = self._ledger_header + self._n_blocks * self._dtype.itemsize
        for name, fd in self._fds.items():
            path, ours = column_path(self.path, name), os.fstat(fd)
            try:
                if not os.path.samestat(path.lstat(), ours):
                    return f"{path} was replaced"
            except OSError:
                return f"{path} was deleted or moved"
            if ours.st_size < sizes[name]:
                return f"{path} was cut short"
        return ""

    def close(self) -> None:
        """Close the files. Rows that were not sealed are lost."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}

    def _open(self, name: str, flags: int) -> None:
        flags |= os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        self._fds[name] = os.open(column_path(self.path, name), flags, 0o644)

    def _write_headers(self) -> None:
        for name, (dtype, shape) in self.columns.items():
            write_at(self._fds[name], npy_header(np.dtype(dtype), (self.sealed, *shape), COLUMN_HEADER), 0)
        write_at(self._fds[LEDGER_NAME], npy_header(self._dtype, (self._n_blocks,), self._ledger_header), 0)

    def _cut(self) -> None:
        """Cut the files off at the last sealed block."""
        for name, row_bytes in self._row_bytes.items():
            os.ftruncate(self._fds[name], COLUMN_HEADER + self.sealed * row_bytes)
        os.ftruncate(self._fds[LEDGER_NAME], self._ledger_header + self._n_blocks * self._dtype.itemsize)

    def _forget(self) -> None:
        """After a failed write: back to the last sealed block."""
        self.unsealed = 0
        self._crc = dict.fromkeys(self.columns, 0)
        # should this fail too: bytes beyond the ledger count for nothing, a torn ledger row fits no checksum
        with contextlib.suppress(OSError):
            self._cut()

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Damage:
    """Something that is wrong with a table.

    ``recoverable`` says that ``moetrace recover`` can mend it without losing a sealed row.
    """

    where: str
    what: str
    recoverable: bool


class Table(Mapping[str, NDArray[Any]]):
    """A table read-only: a mapping from column names to memory-mapped arrays.

    ``table["experts"]`` is a read-only view of the mapped file, opened when first asked for and cut to
    what the ledger says. Opening a table reads headers and the ledger, never a column.

    Parameters
    ----------
    path
        The table's folder.

    Raises
    ------
    TraceError
        If it is no table, or a header of it is damaged.

    Attributes
    ----------
    spec
        name -> (dtype, shape per row).
    ledger
        The blocks that count, structured array.
    ledger_damage, ledger_torn
        What stands behind those blocks in the ledger, if anything; and whether it looks like a write that was
        cut short, rather than like damage.
    missing_rows
        Rows that the ledger has sealed but whose bytes some column lacks (it was cut short); the table then
        ends at the last block that is whole.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._maps: dict[str, NDArray[Any]] = {}
        self.missing_rows = 0
        self.refresh()

    def refresh(self) -> None:
        """Look again how long the table is; arrays given out before keep their length."""
        names, ledger, self.ledger_damage, self.ledger_torn = read_ledger(self.path)
        self._headers: dict[str, Header] = {}
        whole = sealed = int(ledger["start"][-1] + ledger["rows"][-1]) if len(ledger) else 0
        for name in names:
            header = read_header(column_path(self.path, name))
            if header.dtype.names or header.dtype.hasobject or len(header.shape) < 1:
                raise TraceError(
                    f"{column_path(self.path, name)} is no column", why=f"it holds {header.dtype}"
                )
            self._headers[name] = header
            row_bytes = _row_bytes(header.dtype, header.shape[1:])
            whole = min(whole, (header.file_size - header.size) // row_bytes if row_bytes else 0)
        if whole < sealed:
            ends = ledger["start"] + ledger["rows"]
            ledger = ledger[: int(np.searchsorted(ends, whole, side="right"))]
        self.ledger = ledger
        self._length = int(ledger["start"][-1] + ledger["rows"][-1]) if len(ledger) else 0
        self.missing_rows = sealed - self._length
        self.spec: ColumnSpec = {
            name: (header.dtype.str, header.shape[1:]) for name, header in self._headers.items()
        }
        self._maps.clear()

    @property
    def n_rows(self) -> int:
        """Rows that are sealed and there."""
        return self._length

    @property
    def ledger_crc(self) -> int:
        """CRC-32 of the checksums (``self``) of the ledger's rows, for ``tables`` in meta.json."""
        return zlib.crc32(self.ledger["self"].tobytes())

    @property
    def hidden(self) -> str:
        """What of it would be gone for good if it were cut at its last good block; empty if nothing."""
        if self.missing_rows:
            return f"{self.missing_rows} sealed rows are missing from a column"
        if self.ledger_damage and not self.ledger_torn:
            return f"{self.ledger_damage}, with good ones behind them"
        return ""

    def overlap(self, columns: Mapping[str, NDArray[Any]]) -> int:
        """Count how many of these rows are in the table already: its longest end that they begin with.

        Parameters
        ----------
        columns
            Columns of the table, each (n, ...); those that are not given are not compared.
        """
        n = min(self.n_rows, len(next(iter(columns.values()))))
        if n == 0:
            return 0
        ends = {name: self[name][self.n_rows - n :] for name in columns}
        begins = np.ones(n, bool)
        for name, column in columns.items():
            begins &= ends[name] == column[0]
        for i in np.flatnonzero(begins).tolist():
            if all(np.array_equal(ends[name][i:], columns[name][: n - i]) for name in columns):
                return n - i
        return 0

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._maps:
            header = self._headers[name]
            shape = (self._length, *header.shape[1:])
            if self._length == 0:
                array: NDArray[Any] = np.empty(shape, header.dtype)
            else:
                path = column_path(self.path, name)
                try:
                    array = _mapped(path, header, shape)  # its base keeps the map
                except (OSError, ValueError) as e:
                    if isinstance(e, OSError) and e.errno == errno.EMFILE:
                        raise files_error(path, e) from e
                    raise TraceError(
                        f"cannot map {path}", why=str(e), fix="run `moetrace verify` on the trace"
                    ) from e
            array.flags.writeable = False
            self._maps[name] = array
        return self._maps[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        """Give the number of columns, as of any mapping; :attr:`n_rows` is the number of rows."""
        return len(self._headers)

    def __contains__(self, name: object) -> bool:
        return name in self._headers

    def close(self) -> None:
        """Let go of the maps; arrays given out keep theirs."""
        self._maps.clear()

    def verify(self) -> Iterator[Damage]:
        """Read every byte and compare it with the ledger's checksums; yields what is wrong."""
        if self.ledger_damage:
            yield Damage(
                f"{self.path.name}/{LEDGER_NAME}.npy", self.ledger_damage, recoverable=self.ledger_torn
            )
        if self.missing_rows:
            short = [
                name
                for name, h in self._headers.items()
                if (h.file_size - h.size) // max(_row_bytes(h.dtype, h.shape[1:]), 1)
                < self._length + self.missing_rows
            ]
            yield Damage(
                str(self.path.name),
                f"{self.missing_rows} sealed rows are gone: cut short are {', '.join(short)}",
                recoverable=False,
            )
        ledger_path = column_path(self.path, LEDGER_NAME)
        dtype = ledger_dtype(list(self._headers))
        yield from _verify_header(ledger_path, read_header(ledger_path), dtype, (), len(self.ledger))
        for name, header in self._headers.items():
            path = column_path(self.path, name)
            yield from _verify_header(path, header, header.dtype, header.shape[1:], self._length)
            row_bytes = _row_bytes(header.dtype, header.shape[1:])
            with path.open("rb") as f:
                f.seek(header.size)
                for i, block in enumerate(self.ledger):
                    crc, left = 0, int(block["rows"]) * row_bytes
                    while left and (data := f.read(min(left, _CHUNK))):
                        crc = zlib.crc32(data, crc)
                        left -= len(data)
                    if left or crc != block["crc"][name]:
                        rows = f"rows {block['start']} to {block['start'] + block['rows'] - 1}"
                        yield Damage(
                            str(path), f"block {i} ({rows}) does not fit its checksum", recoverable=False
                        )


def _mapped(path: Path, header: Header, shape: tuple[int, ...]) -> NDArray[Any]:
    size = _row_bytes(header.dtype, shape)
    if header.size + size > path.stat().st_size:
        raise ValueError("it is shorter than its ledger says")
    return map_file(str(path), header.size + size)[header.size :].view(header.dtype).reshape(shape)


def _row_bytes(dtype: str | np.dtype[Any], shape: tuple[int, ...]) -> int:
    n = np.dtype(dtype).itemsize
    for size in shape:
        n *= size
    return n


def _verify_header(
    path: Path, header: Header, dtype: np.dtype[Any], shape: tuple[int, ...], rows: int
) -> Iterator[Damage]:
    with path.open("rb") as f:
        data = f.read(header.size)
    if header.size % COLUMN_HEADER and header.size % 1024:
        yield Damage(str(path), f"its header is {header.size} bytes long", recoverable=False)
    elif data != npy_header(dtype, (header.shape[0], *shape), header.size):
        yield Damage(str(path), "its header is not spelt as moetrace spells it", recoverable=True)
    elif header.shape[0] != rows:
        yield Damage(
            str(path), f"its header says {header.shape[0]} rows, the ledger {rows}", recoverable=True
        )
