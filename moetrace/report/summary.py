"""The report in a terminal: what was captured, what can be concluded, what cannot, where the rest is."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable

from moetrace.findings.wording import listed
from moetrace.printable import printable
from moetrace.report.page import Report, by_chance
from moetrace.report.short import in_short

_TITLE = 32  # columns of titles
_SIGNS = {"bad": ("✕", "1;31"), "warn": ("!", "1;33"), "good": ("✓", "1;32"), "note": ("·", "2")}


def summary(
    report: Report, *, width: int = 100, paint: Callable[[str, str], str] = lambda text, code: text
) -> str:
    """Give it as text.

    Parameters
    ----------
    width
        Characters that a line may take.
    paint
        Gives a text in the colour of an ANSI code.
    """
    about = report.captured
    facts = dict(about.facts)
    out = [
        paint(listed(about.names, 5), "1"),
        *_wrapped(f"{facts['model']} · {' · '.join(f'{n} {unit}' for n, unit in about.tiles)}", "  ", width),
    ]
    for remark in about.completeness:
        sign, code = _SIGNS[remark.weight]
        first, *others = _wrapped(remark.text, "    ", width)
        if remark.weight == "bad":
            out += [paint(f"  {sign} {first[4:]}", code), *(paint(line, code) for line in others)]
        else:
            out += [f"  {paint(sign, code)} {first[4:]}", *others]
    if short := in_short(report.findings):
        out += ["", paint("In short", "1")]
        for each in short:
            out += _wrapped(each.text, "  ", width)
    shown = [f for f in report.answered if f.sentences and f.name != "overview"]
    if any(f.concludes for f in shown):
        out += ["", paint("What can be concluded", "1")]
        if "looked at here" in facts:
            out += _wrapped(facts["looked at here"], "  ", width)
    for finding in shown:
        if finding.concludes:
            out += _entry(finding.title, [finding.sentences[0]], width, lambda text: paint(text, "36"))
    if chance := by_chance(report.findings):
        out += _wrapped(chance, "  ", width)
    open_ones = [f for f in shown if not f.concludes]
    if about.limits or report.not_answered or open_ones:
        out += ["", paint("What cannot", "1")]
    for limit in about.limits:
        lines = _wrapped(limit, "    ", width)
        out += [f"  {paint('!', '1;33')} {lines[0][4:]}", *lines[1:]]
    for finding in open_ones:
        out += _entry(finding.title, [finding.sentences[0]], width, lambda text: paint(text, "33"))
    for titles, reason in report.not_answered:
        out += _entry(titles, reason.split("\n"), width, lambda text: paint(text, "2"))
    folder = report.page.parent
    count = {
        ending: sum(file.suffix == ending for file in report.files) for ending in (".png", ".csv", ".parquet")
    }
    size = report.page.stat().st_size / 1e6
    out += [
        "",
        f"Wrote {report.page} ({size:.1f} MB), {count['.png']} figures (SVG and PNG), {count['.csv']} tables (CSV)"
        + (f", {count['.parquet']} (Parquet)" if count[".parquet"] else "")
        + f" in {folder}{os.sep}",
        f"Next: open {report.page} in a browser",
    ]
    return "\n".join(out) + "\n"


def _entry(title: str, lines: list[str], width: int, color: Callable[[str], str]) -> list[str]:
    """A title, and beside it (below it where there is little room) what is to say."""
    beside = width >= 96
    indent = " " * (_TITLE + 2 if beside else 4)
    said = [part for line in lines for part in _wrapped(line.strip(), indent, width)]
    heads = textwrap.wrap(title, _TITLE - 2 if beside else width - 2)
    if not beside:
        return [*(f"  {color(head)}" for head in heads), *said]
    n = max(len(heads), len(said))
    heads, said = heads + [""] * (n - len(heads)), said + [""] * (n - len(said))
    rows = zip(heads, said, strict=True)
    return [f"  {color(h) if h else h}{' ' * (_TITLE - len(h))}{s[len(indent) :]}".rstrip() for h, s in rows]


def _wrapped(text: str, indent: str, width: int) -> list[str]:
    return textwrap.wrap(printable(text), width, initial_indent=indent, subsequent_indent=indent) or [indent]
