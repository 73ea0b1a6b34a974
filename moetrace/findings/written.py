"""Files that a question's parameter ``write`` names."""

from __future__ import annotations

from pathlib import Path

from moetrace.errors import MoetraceError


def write_text(path: str, text: str) -> None:
    """Write a text as UTF-8. Raises MoetraceError if it cannot be."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as e:
        raise MoetraceError(f"{path} cannot be written", why=e.strerror or str(e)) from e
