"""Numbers as people write them in options, and read them in sentences."""

from __future__ import annotations

from moetrace.errors import UsageError


def numbers(text: str, option: str) -> list[int]:
    """Read ``0-5,23`` as [0, 1, 2, 3, 4, 5, 23]. Raises UsageError, naming the option, if it is no such list."""
    result: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or len(first) > 9 or len(last) > 9:
            raise UsageError(f"{option} {text} is no list of numbers", fix=f"write it like {option} 0-5,23")
        stop = int(last) if dash else int(first)
        if not 0 <= stop - int(first) < 1 << 20:
            raise UsageError(f"{option} {text} is no list of numbers", fix=f"write it like {option} 0-5,23")
        result += range(int(first), stop + 1)
    return result


def number(n: int, noun: str) -> str:
    """``1 prompt``, ``1,200 prompts``."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
