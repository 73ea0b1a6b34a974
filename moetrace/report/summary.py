"""The report in a terminal: what was captured, what can be concluded, what cannot, where the rest is."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable

from moetrace.report.page import Report

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
        paint(", ".join(about.names), "1"),
        *_wrapped(f"{facts['model']} · {' · '.join(f'{n} {unit}' for n, unit in about.tiles)}", "  ", width),
    ]
    for remark in about.completeness:
        sign, code = _SIGNS[remark.weight]
        lines = _wrapped(remark.text, "    ", width)
        out += [f"  {paint(sign, code)} {lines[0][4:]}", *lines[1:]]
        if remark.weight == "bad":
            out[-len(lines) :] = [paint(line, code) for line in out[-len(lines) :]]
    shown = [f for f in report.answered if f.sentences and f.name != "overview"]
    if shown:
        out += ["", paint("What can be concluded", "1")]
        if "looked at here" in facts:
            out += _wrapped(facts["looked at here"], "  ", width)
    for finding in shown:
        out += [f"  {paint(finding.title, '36')}", *_wrapped(finding.sentences[0], "    ", width)]
    if about.limits or report.missing:
        out += ["", paint("What cannot", "1")]
    for limit in about.limits:
        lines = _wrapped(limit, "    ", width)
        out += [f"  {paint('!', '1;33')} {lines[0][4:]}", *lines[1:]]
    for finding in report.missing:
        what, *rest = (finding.missing or "").split("\n")
        out += [f"  {finding.title}: {what}"] if len(finding.title) + len(what) + 4 <= width else [
            f"  {finding.title}:", *_wrapped(what, "    ", width),
        ]  # fmt: skip
        for line in rest:
            out += _wrapped(line.strip(), "    ", width)
    folder = report.page.parent
    count = {ending: sum(file.suffix == ending for file in report.files) for ending in (".png", ".csv")}
    size = report.page.stat().st_size / 1e6
    out += [
        "",
        f"Wrote {report.page} ({size:.1f} MB), {count['.png']} figures (PNG and PDF), {count['.csv']} tables (CSV)"
        f" in {folder}{os.sep}",
        f"Next: open {report.page} in a browser",
    ]
    return "\n".join(out) + "\n"


def _wrapped(text: str, indent: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False
    ) or [indent]
