"""What clients said about requests: ``labels.jsonl``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError
from moetrace.trace.jsonfile import checksum, parse_json, sealed
from moetrace.trace.rows import Columns
from moetrace.trace.storage import disk_error

LABELS_NAME = "labels.jsonl"
_WINDOW = ("sequence", "from_ns", "to_ns")


@dataclass(frozen=True)
class LabelLine:
    """One line: which request it speaks of, and what it says.

    Either ``request`` is set, or the line speaks of the request that began in ``sequence`` between ``from_ns``
    and ``to_ns`` (monotonic time, both included): a client does not know request numbers.
    """

    keys: Mapping[str, Any]
    request: int | None = None
    sequence: int = -1
    from_ns: int = 0
    to_ns: int = 0


def append_labels(trace: Path, labels: Iterable[Mapping[str, Any]]) -> None:
    """Append one line per label: ``request``, or ``sequence``, ``from_ns`` and ``to_ns``, and any other keys.

    Raises
    ------
    MoetraceError
        If the disk is full or fails.
    """
    path = trace / LABELS_NAME
    text = "".join(json.dumps(sealed(label)) + "\n" for label in labels)
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(path, flags, 0o644)
        try:
            view = memoryview(text.encode("ascii"))
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)
    except OSError as e:
        raise disk_error(path, e) from e


def read_labels(trace: Path) -> tuple[list[LabelLine], list[str]]:
    """Read the labels of a trace.

    Returns
    -------
    lines
        In the order of the file; empty if there is none.
    damage
        One sentence per line that does not count.
    """
    path = trace / LABELS_NAME
    lines: list[LabelLine] = []
    damage: list[str] = []
    try:
        with path.open("rb") as f:
            for number, text in enumerate(f, 1):
                where = f"{LABELS_NAME}, line {number}"
                try:
                    obj = parse_json(text, where)
                except TraceError as e:
                    damage.append(f"{where}: {e.what} ({e.why})" if e.why else f"{where}: {e.what}")
                    continue
                if "crc" in obj and obj["crc"] != checksum(obj):
                    damage.append(f"{where}: does not fit its checksum")
                elif (line := _line(obj)) is None:
                    damage.append(f"{where}: neither `request` nor `sequence`, `from_ns` and `to_ns`")
                else:
                    lines.append(line)
    except FileNotFoundError:
        pass
    except OSError as e:
        raise TraceError(f"cannot read {path}", why=e.strerror or str(e)) from e
    return lines, damage


def _line(obj: dict[str, Any]) -> LabelLine | None:
    request = obj.get("request")
    window = [obj.get(name) for name in _WINDOW]
    keys = {name: value for name, value in obj.items() if name not in ("request", "crc", *_WINDOW)}
    if type(request) is int:
        return LabelLine(keys, request=request)
    if all(type(n) is int for n in window):
        return LabelLine(keys, None, *window)  # type: ignore[arg-type]
    return None


def resolve_labels(lines: Iterable[LabelLine], requests: Columns) -> dict[int, dict[str, Any]]:
    """Give request number -> what the lines say of it, later lines over earlier ones, key by key.

    Parameters
    ----------
    requests
        Columns ``request``, ``sequence`` and ``start_ns`` of the context's requests, each (n,).
    """
    labels: dict[int, dict[str, Any]] = {}
    by_sequence: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}
    for sequence in np.unique(requests["sequence"]).tolist():
        mine = np.flatnonzero(requests["sequence"] == sequence)
        order = mine[np.argsort(requests["start_ns"][mine], kind="stable")]
        by_sequence[sequence] = (requests["start_ns"][order], requests["request"][order])
    for line in lines:
        if line.request is not None:
            labels.setdefault(line.request, {}).update(line.keys)
        elif line.sequence in by_sequence:
            starts, numbers = by_sequence[line.sequence]
            first, last = np.searchsorted(starts, line.from_ns), np.searchsorted(starts, line.to_ns, side="right")
            for number in numbers[first:last].tolist():
                labels.setdefault(number, {}).update(line.keys)
    return labels
