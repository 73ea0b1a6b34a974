"""Text that others wrote (labels, names in model files, paths), made fit for a terminal."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """Give the text without control characters, but those in ``keep``: it must not steer a terminal.

    Every place that prints what others wrote prints it through this.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else " " if c.isspace() else "�" for c in text)
