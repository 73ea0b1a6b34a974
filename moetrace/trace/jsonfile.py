"""JSON files that carry their own checksum, replaced as a whole or not at all."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrace.errors import TraceError
from moetrace.trace.storage import disk_error, write_all

MAX_BYTES = 256 << 20  # a JSON file of a trace is small; anything larger is not ours


def checksum(obj: Mapping[str, Any]) -> int:
    """Give the CRC-32 of ``obj`` without its key ``crc``: ASCII JSON, keys sorted, no spaces."""
    text = json.dumps({k: v for k, v in obj.items() if k != "crc"}, sort_keys=True, separators=(",", ":"))
    return zlib.crc32(text.encode("ascii"))


def sealed(obj: Mapping[str, Any]) -> dict[str, Any]:
    """Give a copy of ``obj`` with its checksum under ``crc``, last."""
    return {**{k: v for k, v in obj.items() if k != "crc"}, "crc": checksum(obj)}


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def parse_json(data: bytes, path: str) -> dict[str, Any]:
    """Parse one JSON object; NaN, infinities and anything but an object are refused with a TraceError."""
    try:
        obj = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as e:
        raise TraceError(
            f"{path} is not valid JSON", why=str(e)[:200], fix="restore the file from a copy"
        ) from None
    if not isinstance(obj, dict):
        raise TraceError(f"{path} holds no JSON object", fix="restore the file from a copy")
    return obj


def read_json(path: Path, *, check: bool = True) -> dict[str, Any]:
    """Read a JSON object and check its ``crc``.

    Raises
    ------
    TraceError
        If the file is missing, larger than 256 MiB, not JSON, or (with ``check``) its checksum does not fit.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TraceError(
                f"{path} is {path.stat().st_size} bytes long", why="no JSON file of a trace is that large"
            )
        data = path.read_bytes()
    except OSError as e:
        raise TraceError(
            f"cannot read {path}", why=e.strerror or str(e), fix="give the path of a moetrace trace"
        ) from e
    obj = parse_json(data, str(path))
    if check and obj.get("crc") != checksum(obj):
        raise TraceError(
            f"{path} does not fit its checksum",
            why=f"it says crc {obj.get('crc')!r}, its text gives {checksum(obj)}",
            fix="restore it from a copy; if you edited it by hand, undo that",
        )
    return obj


def write_json(path: Path, obj: Mapping[str, Any], *, fsync: bool = False) -> None:
    """Write ``obj`` with its checksum beside ``path`` and rename it into place.

    Raises
    ------
    MoetraceError
        If the disk is full or fails; the old file is then still whole.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    data = (json.dumps(sealed(obj), indent=1) + "\n").encode("ascii")
    try:
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            write_all(fd, data)
            if fsync:
                os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, e) from e
