"""The headers of ``.npy`` files as moetrace spells them, and the ledger of a table's blocks."""

from __future__ import annotations

import functools
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from moetrace.errors import TraceError

COLUMN_HEADER = 192
LEDGER_HEADER = 1024
LEDGER_NAME = "blocks"
MAX_HEADER = 1 << 16  # what version 1.0 can say


@dataclass(frozen=True)
class Header:
    """What the header of an ``.npy`` file says; ``size`` is where its data begin, in bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    size: int
    file_size: int


def column_path(table: Path, name: str) -> Path:
    """Give the file of a column, or of the ledger (``blocks``)."""
    return table / f"{name}.npy"


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...], size: int) -> bytes:
    """Spell a version-1.0 header of exactly ``size`` bytes, padded with spaces."""
    spec = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(int(n) for n in shape)}
    text = "{" + ", ".join(f"{key!r}: {value!r}" for key, value in spec.items()) + ", }"
    room = size - 10
    if len(text) + 1 > room:
        raise ValueError(f"a header of {len(text)} bytes does not fit into {room}")
    return (
        npy.MAGIC_PREFIX
        + b"\x01\x00"
        + room.to_bytes(2, "little")
        + text.ljust(room - 1).encode("ascii")
        + b"\n"
    )


@functools.lru_cache(maxsize=256)  # a trace has few, and reading them again is most of opening it again
def _parse_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    return npy.read_array_header_1_0(io.BytesIO(data), max_header_size=MAX_HEADER)


def read_header(path: Path) -> Header:
    """Read the header of a column or ledger; nothing in it is executed, object arrays are refused.

    Raises
    ------
    TraceError
        If the file is missing, is no version-1.0 ``.npy`` in C order, or its header is cut short or damaged.
    """

    def bad(why: str) -> TraceError:
        return TraceError(f"{path} cannot be read", why=why, fix="run `moetrace recover` on the trace")

    try:
        with path.open("rb") as f:
            file_size = path.stat().st_size
            start = f.read(10)
            if start[:8] != npy.MAGIC_PREFIX + b"\x01\x00":
                raise bad(
                    "it is no version-1.0 .npy file" if len(start) == 10 else "it ends within its header"
                )
            size = 10 + int.from_bytes(start[8:10], "little")
            if size > file_size:
                raise bad("it ends within its header")
            try:
                shape, fortran, dtype = _parse_header(start[8:] + f.read(size - 10))
            except Exception as e:  # numpy lets errors of all kinds out of a damaged header
                raise bad(f"its header is damaged: {str(e)[:120]}") from None
    except OSError as e:
        raise bad(e.strerror or str(e)) from e
    if fortran or dtype.hasobject or dtype.itemsize == 0 or any(n < 0 or n > 1 << 62 for n in shape):
        raise bad(f"it holds {dtype} {shape}, which no column does")
    return Header(dtype, shape, size, file_size)


def ledger_dtype(columns: Sequence[str]) -> np.dtype[np.void]:
    """Give the dtype of a ledger row for a table with these columns."""
    crc = np.dtype([(name, "<u4") for name in columns])
    return np.dtype([("start", "<u8"), ("rows", "<u8"), ("time_ns", "<i8"), ("crc", crc), ("self", "<u4")])


def ledger_header_size(dtype: np.dtype[np.void]) -> int:
    """Give the ledger's header size: 1024 bytes, or as many times that as its columns' names need."""
    size = LEDGER_HEADER
    while size <= MAX_HEADER:
        try:
            npy_header(dtype, (10**19,), size)
        except ValueError:
            size += LEDGER_HEADER
        else:
            return size
    raise ValueError("the table has too many columns for one ledger")


def row_crc(row: np.void) -> int:
    """Give the CRC-32 that belongs into a ledger row's field ``self``."""
    return zlib.crc32(row.tobytes()[:-4])


def read_ledger(table: Path) -> tuple[list[str], NDArray[np.void], str, bool]:
    """Read the ledger of a table.

    Returns
    -------
    columns
        The names of the table's columns.
    rows
        The rows that count: from the first on, as long as each fits its checksum and follows the one before.
    damage
        What stands behind them, if anything does; empty if the ledger ends there.
    torn
        True if it only looks as if the last write was cut short: no good row stands behind a bad one.

    Raises
    ------
    TraceError
        If there is no ledger, or its header is damaged.
    """
    path = column_path(table, LEDGER_NAME)
    header = read_header(path)
    names = list((header.dtype["crc"].names or ()) if "crc" in (header.dtype.names or ()) else ())
    if not names or header.dtype != ledger_dtype(names) or len(header.shape) != 1:
        raise TraceError(
            f"{path} is no ledger", why=f"its rows are {header.dtype}", fix="restore it from a copy"
        )
    for name in names:
        if "/" in name or "\0" in name or name.startswith("."):
            raise TraceError(
                f"{path} is no ledger", why=f"it names the column {name!r}", fix="restore it from a copy"
            )
    n = (header.file_size - header.size) // header.dtype.itemsize
    with path.open("rb") as f:
        f.seek(header.size)
        data = f.read(n * header.dtype.itemsize)
        behind = len(f.read(1 << 16))
    rows = np.frombuffer(data, header.dtype, count=len(data) // header.dtype.itemsize)
    width, end, good = header.dtype.itemsize, 0, 0
    fits = [zlib.crc32(data[i * width : (i + 1) * width - 4]) == row["self"] for i, row in enumerate(rows)]
    for fit, start, n_rows in zip(fits, rows["start"].tolist(), rows["rows"].tolist(), strict=True):
        if not fit or start != end or not 1 <= n_rows < 1 << 40:
            break
        end += n_rows
        good += 1
    damage = ""
    if good < len(rows):
        damage = f"{len(rows) - good} of its {len(rows)} blocks do not fit their checksums"
    elif behind:
        damage = "its last block is cut short"
    return names, rows[:good], damage, not any(fits[good:])
