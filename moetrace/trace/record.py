"""The ring file's layout as numpy sees it: the mirror of ``csrc/record.h``.

Nothing here opens a file. ``tests/unit/test_record.py`` compiles ``record.h`` and holds every constant,
offset and size of it against this module.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any

import numpy as np

from moetrace.errors import TraceError

RING_MAGIC = b"MOETRING"
RING_VERSION_MAJOR = 1
RING_VERSION_MINOR = 2
ATTENTION_PIECE = 1024


class OnFull(IntEnum):
    """What the producer does when the reader has not kept up (``ring_on_full``)."""

    BLOCK = 0
    DROP = 1
    OVERWRITE = 2


class RecordKind(IntEnum):
    """What a record is (``record_kind``)."""

    ROW = 0
    EVENT = 1
    ATTENTION = 2


class RowFlag(IntFlag):
    """Bits of the column ``flags`` (``record_flag``)."""

    OUTPUT = 1 << 0
    EMBEDDING_INPUT = 1 << 1
    ENCODE = 1 << 2
    INTERVENED = 1 << 3
    SEQUENCE_UNCERTAIN = 1 << 4
    UNIDENTIFIED = 1 << 5
    TRIAL = 1 << 6
    GENERATED = 1 << 7


class EventCode(IntEnum):
    """Column ``code`` of the table ``events`` (``event_code``)."""

    SEQ_RM = 1
    SEQ_ADD = 2
    SEQ_CP = 3
    SEQ_KEEP = 4
    SEQ_DIV = 5
    CLEAR = 6
    RESTORE = 7
    LAUNCH = 8
    PAUSE = 9
    RESUME = 10
    FAILED = 11
    INTERVENE = 12
    CONTEXT = 13


class State(IntEnum):
    """What became of one (token, layer): column ``state`` (``row_state``)."""

    LOST = 0
    PRESENT = 1
    NOT_COMPUTED = 2


class Counter(IntEnum):
    """Index into ``ring_header.counters`` (``ring_counter``); all only ever grow."""

    ROWS_PRODUCED = 0
    ROWS_COMMITTED = 1
    ROWS_LOST_FULL = 2
    ROWS_LOST_ERROR = 3
    ROWS_OVERWRITTEN = 4
    EVENTS_COMMITTED = 5
    EVENTS_LOST = 6
    EVENTS_OVERWRITTEN = 7
    ROWS_WARMUP = 8
    ROWS_PAUSED = 9
    ROWS_UNROUTED = 10
    ROWS_UNIDENTIFIED = 11
    GRAPHS = 12
    BATCHES = 13
    WAIT_NS = 14
    HOOK_NS = 15
    SYNC_NS = 16
    ATTENTION_LOST = 17
    ROWS_INTERVENED = 18
    GRAPHS_UNREAD = 19
    CONTEXTS = 20
    CONTEXTS_FREED = 21
    SYNCS = 22
    COPIES = 23
    COPIED_BYTES = 24
    GRAPHS_ELSEWHERE = 25


COUNTERS = tuple(counter.name.lower() for counter in Counter)  # as files name them
N_COUNTERS = 32  # room in the header; the Counter names so many of them


def _struct(size: int, **fields: tuple[Any, int]) -> np.dtype[np.void]:
    spec: Any = {
        "names": list(fields),
        "formats": [dtype for dtype, _ in fields.values()],
        "offsets": [offset for _, offset in fields.values()],
        "itemsize": size,
    }
    dtype: np.dtype[np.void] = np.dtype(spec)
    return dtype


def field_offset(dtype: np.dtype[np.void], name: str) -> int:
    """Give the offset of a field in a structured dtype, in bytes."""
    fields: Any = dtype.fields
    return int(fields[name][1])


#: ``ring_header``, 640 bytes
RING_HEADER = _struct(
    640,
    magic=("S8", 0),
    version_major=("<u2", 8),
    version_minor=("<u2", 10),
    header_size=("<u4", 12),
    file_size=("<u8", 16),
    data_offset=("<u8", 24),
    capacity=("<u8", 32),
    stride=("<u4", 40),
    n_fields=("<u4", 44),
    fields_offset=("<u4", 48),
    meta_offset=("<u4", 52),
    meta_size=("<u4", 56),
    on_full=("<u4", 60),
    block_ns=("<u8", 64),
    epoch_ns=("<i8", 72),
    host_pid=("<u4", 80),
    crc=("<u4", 84),
    reserved0=(("<u4", 6), 88),
    head=("<u8", 128),
    ready=("<u4", 136),
    closed=("<u4", 140),
    status=("S112", 144),
    counters=(("<u8", N_COUNTERS), 256),
    tail=("<u8", 512),
    reader_beat_ns=("<u8", 520),
    reader_pid=("<u4", 528),
    paused=("<u4", 576),
    intervention=("<u4", 580),
    intervention_active=("<u4", 584),
    intervention_refused=("<u4", 588),
    intervention_why=("S48", 592),
)

#: ``ring_field``, 72 bytes
RING_FIELD = _struct(
    72,
    name=("S40", 0),
    dtype=("S8", 40),
    offset=("<u4", 48),
    n_dims=("<u4", 52),
    shape=(("<u4", 3), 56),
    reserved=("<u4", 68),
)

#: ``record_head``, 64 bytes
RECORD_HEAD = _struct(
    64,
    stamp=("<u8", 0),
    serial=("<u8", 8),
    time_ns=("<i8", 16),
    step=("<u4", 24),
    batch=("<u4", 28),
    token=("<i4", 32),
    position=("<i4", 36),
    sequence=("<i4", 40),
    kind=("<u2", 44),
    n_sequences=("<u2", 46),
    flags=("<u4", 48),
    row=("<u4", 52),
    arg0=("<i4", 56),
    arg1=("<i4", 60),
)

#: numpy codes that a field may have; anything else is refused
FIELD_DTYPES = ("|u1", "<u2", "<u4", "<u8", "|i1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8")


@dataclass(frozen=True)
class Field:
    """One payload column of a record.

    ``offset`` counts bytes from the start of the record; ``shape`` is per token, outermost axis first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the field takes in one record."""
        n = np.dtype(self.dtype).itemsize
        for size in self.shape:
            n *= size
        return n


def record_dtype(fields: Iterable[Field], stride: int) -> np.dtype[np.void]:
    """Give the structured dtype of one record: the head's fields, then the payload's.

    Parameters
    ----------
    fields
        The field table; offsets are checked to lie in [64, stride) without overlapping.
    stride
        Bytes per record; becomes the dtype's itemsize.

    Raises
    ------
    TraceError
        If a field has an unknown dtype, an empty shape, a name that is taken, or does not fit.
    """
    names = list(RECORD_HEAD.names or ())
    formats: list[Any] = [RECORD_HEAD[name] for name in names]
    offsets = [field_offset(RECORD_HEAD, name) for name in names]
    end = RECORD_HEAD.itemsize
    if stride < end or stride % 64:
        raise TraceError(
            f"the ring's records are {stride} bytes long", why="a record takes a multiple of 64 bytes"
        )
    for field in sorted(fields, key=lambda f: f.offset):
        if field.name in names:
            raise TraceError(f"the ring names its field {field.name!r} twice")
        if field.dtype not in FIELD_DTYPES:
            raise TraceError(
                f"the ring's field {field.name!r} has the unknown type {field.dtype!r}",
                fix="read it with a moetrace as new as the one that wrote it",
            )
        if not 1 <= len(field.shape) <= 3 or min(field.shape) < 1:
            raise TraceError(f"the ring's field {field.name!r} has the impossible shape {field.shape}")
        if field.offset < end or field.offset + field.nbytes > stride:
            raise TraceError(
                f"the ring's field {field.name!r} takes {field.nbytes} bytes from byte {field.offset} on",
                why=f"it must lie between byte {end} and byte {stride} of the record",
            )
        end = field.offset + field.nbytes
        names.append(field.name)
        formats.append((field.dtype, field.shape))
        offsets.append(field.offset)
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": stride})
