"""What was set for a live recording and must outlive its rings: ``TRACE/control``.

A server that unloads a model and loads it again in another process makes another ring, which must not begin with what
``moetrace run`` was once told. The host reads ``control/all`` and then ``control/MODEL_ID`` (csrc/context.cpp), lines
of ``key=value``; ``model_id`` stands in the ring's text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from moetrace.trace.ring import Ring
from moetrace.trace.storage import disk_error

_FOLDER = "control"
_ALL = "all"


def remember_paused(trace: Path, paused: bool) -> None:
    """Let contexts that begin later, of whatever model, begin switched on or off.

    Raises
    ------
    MoetraceError
        If the disk is full or fails.
    """
    _write(trace, _ALL, {"paused": int(paused)})


def remember(ring: Ring) -> None:
    """Let contexts of the ring's model that begin later begin with what the ring says now.

    Raises
    ------
    MoetraceError
        If the disk is full or fails.
    """
    model = ring.meta.get("model_id")
    if isinstance(model, str) and re.fullmatch("[0-9a-f]{8}", model):
        settings = {"paused": int(ring.paused), "intervention": ring.intervention}
        _write(ring.path.parent.parent, model, settings)


def _write(trace: Path, name: str, settings: dict[str, int]) -> None:
    path = trace / _FOLDER / name
    partial = path.with_name(f".{name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(partial, flags, 0o600)
        try:
            os.write(fd, "".join(f"{key}={value}\n" for key, value in settings.items()).encode("ascii"))
        finally:
            os.close(fd)
        partial.replace(path)
    except OSError as e:
        raise disk_error(path, e) from e
