"""The report: one self-contained HTML file, with figures and tables beside it."""

from __future__ import annotations

import base64
import hashlib
import inspect
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

import moetrace
from moetrace.errors import MoetraceError
from moetrace.findings import QUESTIONS, Figure, Finding, Subject, question
from moetrace.findings.wording import listed
from moetrace.plot.style import style
from moetrace.report.captured import Captured, captured
from moetrace.report.explorer import explorer, pack, table_json
from moetrace.report.files import Written, figures_of, table_file, write_finding
from moetrace.report.methods import linked, methods
from moetrace.report.script import page_script
from moetrace.report.short import in_short
from moetrace.report.svg import inline_svg, svg
from moetrace.report.texts import texts

#: The page is made smaller until it is at most this large: fewer experts in transition matrices, fewer rows, only
#: intervals of what is significant, fewer and shorter texts.
MAX_BYTES = 5_000_000
_SMALLER = ((64, 1000, 1.0, 250_000), (48, 300, 1.0, 120_000), (24, 60, 0.05, 60_000), (8, 20, 0.05, 0))


@dataclass(frozen=True)
class Report:
    """What was made: the page, the files beside it, and what they say."""

    page: Path
    files: tuple[Path, ...]
    captured: Captured
    findings: tuple[Finding, ...]

    @property
    def answered(self) -> tuple[Finding, ...]:
        """Findings of the questions that could be answered."""
        return tuple(f for f in self.findings if f.not_answered is None)

    @property
    def not_answered(self) -> tuple[tuple[str, str], ...]:
        """Reason and fix why questions could not be answered, and the titles of those."""
        return unanswered(self.findings)


def unanswered(findings: Sequence[Finding]) -> tuple[tuple[str, str], ...]:
    """Titles of the questions that could not be answered, those of one reason together; and the reason."""
    why: dict[str, list[str]] = {}
    for finding in findings:
        if finding.not_answered is not None:
            why.setdefault(finding.not_answered, []).append(finding.title)
    return tuple((", ".join(titles), reason) for reason, titles in why.items())


def by_chance(findings: Sequence[Finding]) -> str:
    """How often so many tests reject where there is nothing: a sentence, or "" if fewer than two questions test."""
    columns = ("p_value", "q_value", "p_family")
    n = sum(
        any(name in table and table[name].notna().any() for table in f.tables.values() for name in columns)
        for f in findings
        if f.not_answered is None
    )
    if n < 2:
        return ""
    return (
        f"{n} questions test something, each by itself at 5 %: where there is nothing to find, {n / 20:.1f} of them"
        f" still find something on average, and one or more do in {1 - 0.95**n:.0%} of reports (if they were"
        " independent)."
    )


def write_part(finding: Finding, folder: Path) -> Written:
    """Write a finding's JSON, figures and tables into the report's folder; nothing of one that was not answered.

    Raises MoetraceError if a file cannot be written.
    """
    if finding.not_answered is not None:
        return Written(())
    replaced = _replaced(finding)
    return write_finding(finding, folder, lambda name: not name.startswith(replaced), ("svg", "png"))


def write_report(
    subject: Subject,
    findings: Sequence[Finding],
    folder: Path,
    names: Sequence[str] = (),
    parts: Sequence[Written] | None = None,
    *,
    with_texts: bool = True,
    others: Sequence[tuple[str, str]] = (),
) -> Report:
    """Write report.html, and each finding's JSON, figures/ and tables/, into ``folder``.

    ``names`` are what the recordings are called, if not by their folders; ``parts`` what :func:`write_part` gave of
    each finding, if that was done; ``with_texts`` and ``others`` as for :func:`render_page`.

    Raises MoetraceError if a file cannot be written.
    """
    about = captured(subject, names)
    if parts is None:
        parts = [write_part(finding, folder) for finding in findings]
    files = [file for part in parts for file in part.files]
    inline = {finding.name: part.inline for finding, part in zip(findings, parts, strict=True)}
    text = render_page(subject, findings, about, inline, with_texts=with_texts, others=others)
    page = folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
    except OSError as e:
        raise MoetraceError(f"{page} cannot be written", why=e.strerror or str(e)) from e
    return Report(page, tuple(files), about, tuple(findings))


def render_page(
    subject: Subject,
    findings: Sequence[Finding],
    about: Captured,
    inline: Mapping[str, Mapping[str, str]] | None = None,
    *,
    with_texts: bool = True,
    others: Sequence[tuple[str, str]] = (),
) -> str:
    """Give the page as HTML, at most :data:`MAX_BYTES` if that can be reached by leaving out detail.

    ``inline`` are the figures of each question, as :func:`write_part` gave them; they are drawn if it is not given.
    ``with_texts``: whether some requests' texts stand in it, to be read token by token.
    ``others``: words and address of the pages that are switched between, the address "" for this one.
    """
    answered = [f for f in findings if f.not_answered is None]
    trace = about.names[0] if len(about.names) == 1 else "T.moet"
    sections = [
        _section(f, subject.phase_note, trace, None if inline is None else inline[f.name]) for f in answered
    ]
    opening = next((s for s in sections if s["name"] == "overview"), None)
    sections = [s for s in sections if s is not opening]
    for max_experts, max_rows, max_p, max_entries in _SMALLER:
        head, arrays = explorer(subject, answered, max_experts=max_experts, max_p=max_p)
        told, read = texts(subject.traces, max_entries if with_texts else 0)
        head, arrays = head | told, arrays | read
        head["tables"] = {
            f"{f.name}-{name}": table_json(table, max_rows)
            for f in answered
            for name, table in f.tables.items()
        }
        text = _render(subject, opening, sections, findings, about, pack(head, arrays), bool(told), others)
        if len(text.encode()) <= MAX_BYTES:
            break
    return text


def _render(
    subject: Subject,
    opening: dict[str, Any] | None,
    sections: list[dict[str, Any]],
    findings: Sequence[Finding],
    about: Captured,
    data: bytes,
    has_texts: bool,
    others: Sequence[tuple[str, str]],
) -> str:
    environment = _environment()
    loader = environment.loader
    assert loader is not None
    script = page_script(lambda name: loader.get_source(environment, name)[0])
    created = subject.traces[0].meta.get("created_ns") if subject.traces else None
    facts = dict(about.facts)
    return environment.get_template("report.html.j2").render(
        name=listed(about.names, 5),
        captured=about,
        short=in_short(findings),
        loud=[r for i, r in enumerate(about.completeness) if not i or r.weight in ("bad", "warn")],
        experts_line=f"{facts['layers'].split(' ')[0]} layers, {facts['experts']}",
        opening=opening,
        phase_note=subject.phase_note,
        sections=sections,
        has_texts=has_texts,
        others=others,
        missing=unanswered(findings),
        by_chance=by_chance(findings),
        n_missing=sum(f.not_answered is not None for f in findings),
        methods=methods(),
        linked=linked,
        plain_table=plain_table,
        version=moetrace.__version__,
        created=datetime.fromtimestamp(created / 1e9, UTC).strftime("%Y-%m-%d %H:%M UTC") if created else "",
        seed=subject.seed,
        css=Markup(loader.get_source(environment, "report.css")[0]),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=base64.b64encode(data).decode(),
    )


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("moetrace.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # the hash of the script is that of its text, to the last byte
        keep_trailing_newline=True,
        newline_sequence="\n",
    )


def _replaced(finding: Finding) -> tuple[str, ...]:
    """Beginnings of the names of figures in whose place the page has interactive ones."""
    widgets = question(finding.name).widgets if finding.name in QUESTIONS else ()
    return tuple(name for widget in widgets for name in widget.replaces)


def _drawn(finding: Finding, name: str, figure: Figure) -> str:
    with style():
        return inline_svg(svg(figure.canvas()), figure, f"{finding.name}-{name}-")


def _section(
    finding: Finding, phase_note: str, trace: str, inline: Mapping[str, str] | None
) -> dict[str, Any]:
    """What the template needs of an answered question; ``phase_note``, the page's own, is said once, above all."""
    known = finding.name in QUESTIONS
    doc = inspect.cleandoc(question(finding.name).__doc__ or "") if known else ""
    asks, _, how = doc.partition("\n")
    widgets = question(finding.name).widgets if known else ()
    replaced = _replaced(finding)
    return {
        "name": finding.name,
        "title": finding.title,
        "asks": asks,
        "how": " ".join(how.split()),
        "sentences": finding.sentences,
        "concludes": finding.concludes,
        "caveats": [*({finding.phase_note} - {"", phase_note}), *finding.caveats],
        "parameters": ", ".join(f"{n} {v}" for n, v in finding.parameters.items() if v not in ("", -1, None)),
        "widgets": [widget.name for widget in widgets],
        "actions": [
            (said, command.format(trace=shlex.quote(trace)))
            for said, command in (question(finding.name).actions if known else ())
        ],
        "figures": [
            {
                "svg": Markup(_drawn(finding, name, figure) if inline is None else inline[name]),
                "caption": figure.caption,
                "name": name,
            }
            for name, figure in figures_of(finding).items()
            if not name.startswith(replaced)
        ],
        "tables": [
            {
                "key": f"{finding.name}-{name}",
                "name": _table_name(name),
                "size": f"{len(table):,} rows × {len(table.columns)} columns",
                "file": table_file(finding, name),
            }
            for name, table in finding.tables.items()
        ],
    }


def _table_name(name: str) -> str:
    said = name.replace("_", " ")
    return f"as published: {said[13:]}" if name.startswith("as_published_") else said


def plain_table(table: pd.DataFrame, caption: str) -> Markup:
    """A small table as HTML; numbers to the right, nothing where a value is missing."""
    numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in table.dtypes]

    def cells(tag: str, values: Sequence[object]) -> Markup:
        return Markup("").join(
            Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), Markup(' class="n"') if n else "", v)
            for v, n in zip(values, numeric, strict=True)
        )

    def shown(value: object) -> object:
        return f"{value:,}" if isinstance(value, int) else textwrap.shorten(str(value), 80, placeholder="…")

    rows = Markup("").join(
        Markup("<tr>{}</tr>").format(cells("td", [shown(v) for v in row]))
        for row in table.itertuples(index=False)
    )
    head = cells("th", [str(c).replace("_", " ") for c in table.columns])
    return Markup(
        '<div class="wide"><table><caption>{}</caption><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(caption, head, rows)
