"""What clients said about requests: ``labels.jsonl``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moetrace.errors import TraceError
from moetrace.trace.jsonfile import checksum, parse_json, sealed
from moetrace.trace.storage import disk_error

LABELS_NAME = "labels.jsonl"


def append_labels(trace: Path, labels: Iterable[Mapping[str, Any]]) -> None:
    """Append one line per label; each has the key ``request`` (a number) and any others.

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


def read_labels(trace: Path) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Read the labels of a trace.

    Returns
    -------
    labels
        Request number -> its keys, later lines over earlier ones; empty if there is no file.
    damage
        One sentence per line that does not count.
    """
    path = trace / LABELS_NAME
    labels: dict[int, dict[str, Any]] = {}
    damage: list[str] = []
    try:
        with path.open("rb") as f:
            for number, line in enumerate(f, 1):
                where = f"{LABELS_NAME}, line {number}"
                try:
                    obj = parse_json(line, where)
                except TraceError as e:
                    damage.append(f"{where}: {e.what} ({e.why})" if e.why else f"{where}: {e.what}")
                    continue
                request = obj.pop("request", None)
                if type(request) is not int:
                    damage.append(f"{where}: no number under `request`")
                elif "crc" in obj and obj["crc"] != checksum({"request": request, **obj}):
                    damage.append(f"{where}: does not fit its checksum")
                else:
                    obj.pop("crc", None)
                    labels.setdefault(request, {}).update(obj)
    except FileNotFoundError:
        pass
    except OSError as e:
        raise TraceError(f"cannot read {path}", why=e.strerror or str(e)) from e
    return labels, damage
