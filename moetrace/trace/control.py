"""What was set for a live recording and must outlive its rings: ``TRACE/control``.

A server that unloads a model and loads it again in another process makes another ring, which must not begin with what
``moetrace run`` was once told. The host reads ``control/all`` and then ``control/MODEL_ID`` (csrc/context.cpp), lines
of ``key=value``; ``model_id`` stands in the ring's text. A draft model's context, or MTP's, has a file of its own,
``MODEL_ID-ROLE``: it may be of the same model, and is not intervened on.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from moetrace.trace.ring import Ring
from moetrace.trace.storage import disk_error, write_all

_FOLDER = "control"
_ALL = "all"


def remember_for_all(trace: Path, **settings: int) -> None:
    """Let contexts that begin later, of whatever model, begin so: ``paused``, ``intervention``.

    What was set for a model before holds no longer. Call it before the rings that are there are looked at: a host
    makes its ring first and reads this afterwards, so that one of both sees the other.

    Raises
    ------
    MoetraceError
        If the disk is full or fails.
    """
    folder = trace / _FOLDER
    _write(folder / _ALL, {**_read(folder / _ALL), **settings})
    for path in [path for path in folder.iterdir() if re.fullmatch(r"[0-9a-f]{8}(-\w+)?", path.name)]:
        _write(path, {key: value for key, value in _read(path).items() if key not in settings})


def remember(ring: Ring, **settings: int) -> None:
    """Let contexts of the ring's model and role that begin later begin so. Call it before the ring itself is told.

    Raises
    ------
    MoetraceError
        If the disk is full or fails.
    """
    model, role = ring.meta.get("model_id"), str(ring.meta.get("role"))
    if isinstance(model, str) and re.fullmatch("[0-9a-f]{8}", model) and role.isalpha():
        path = ring.path.parent.parent / _FOLDER / (model if role == "main" else f"{model}-{role}")
        _write(path, {**_read(path), **settings})


def _read(path: Path) -> dict[str, int]:
    try:
        pairs = (line.split("=", 1) for line in path.read_text(encoding="ascii").splitlines() if "=" in line)
        return {key: int(value) for key, value in pairs if value.isdigit()}
    except (OSError, ValueError):
        return {}


def _write(path: Path, settings: dict[str, int]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(partial, flags, 0o600)
        try:
            write_all(fd, "".join(f"{key}={value}\n" for key, value in settings.items()).encode("ascii"))
        finally:
            os.close(fd)
        partial.replace(path)
    except OSError as e:
        partial.unlink(missing_ok=True)
        raise disk_error(path, e) from e
