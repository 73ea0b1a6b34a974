"""Names that others chose: as long as a drawing has room for, all different, and whole under the pointer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import takewhile

from matplotlib.text import Text

from moetrace.printable import printable

#: What marks, in an SVG group's id, the whole name of a text that is cut.
HOVER = "whole name: "


def short(text: str, at_most: int = 24) -> str:
    """Give a name as one that fits a legend, on one line, cut in the middle."""
    return _cut(_on_one_line(text), at_most)


def shortened(names: Iterable[object], at_most: int = 24) -> dict[str, str]:
    """Give a short form of each name, as :func:`short`; no two are the same.

    Where names that are cut look alike, what they have in common is left out instead; what is alike even so gets a
    number.
    """
    out: dict[str, str] = {}
    for form, alike in _by(sorted({str(name) for name in names}), at_most).items():
        if len(alike) == 1:
            out[alike[0]] = form
            continue
        begin = _in_common(alike)
        end = min(_in_common([name[::-1] for name in alike]), min(map(len, alike)) - begin)
        room = at_most - 2 - max(map(len, alike)) + begin + end
        apart = {name: _around(name, begin, end, room) for name in alike}
        for cut, same in _by(alike, at_most, apart).items():
            numbered = [f"{i} {cut}" for i, _ in enumerate(same, 1)] if len(same) > 1 else [cut]
            out |= dict(zip(same, numbered, strict=True))
    if len(set(out.values())) < len(out):  # a name of someone's is what another was cut to
        out = {name: short(f"{i} {form}", at_most) for i, (name, form) in enumerate(out.items(), 1)}
    return {name: out[name] for name in sorted(out)}


def stand_for(text: Text, whole: str) -> None:
    """Let ``text`` be a name: $ is no mathematics in it, and a page shows the whole under the pointer if it is cut."""
    text.set_parse_math(False)
    if text.get_text() != whole:
        text.set_gid(HOVER + whole)


def _in_common(names: list[str]) -> int:
    """How many characters all of them begin with, in whole words."""
    n = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False)))
    while n and names[0][n - 1].isalnum():
        n -= 1
    return n


def _around(name: str, begin: int, end: int, room: int) -> str:
    """Give what lies between ``begin`` and ``end`` (from the end), and of what lies around it as much as has room."""
    each = max(0, room) // (2 if begin and end else 1)
    head, tail = name[:begin], name[len(name) - end :]
    head = head if len(head) <= each + 1 else f"{head[:each]}…"
    tail = tail if len(tail) <= each + 1 else f"…{tail[len(tail) - each :]}"
    return head + name[begin : len(name) - end] + tail


def _by(names: Iterable[str], at_most: int, forms: dict[str, str] | None = None) -> dict[str, list[str]]:
    out: dict[str, list[str]] = defaultdict(list)
    for name in names:
        out[short((forms or {}).get(name, name), at_most)].append(name)
    return out


def _on_one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _cut(text: str, at_most: int) -> str:
    if len(text) <= at_most:
        return text
    head = (at_most - 1) // 2
    return f"{text[:head]}…{text[head + 1 - at_most :]}"
