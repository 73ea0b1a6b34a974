"""Findings as text: for a terminal, Markdown, CSV, JSON."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Iterable, Iterator

import pandas as pd
from tabulate import tabulate

from moetrace.findings import Finding
from moetrace.printable import printable

FORMATS = ("table", "md", "csv", "json")


def render(findings: Iterable[Finding], form: str, *, max_rows: int | None = None, width: int = 100) -> str:
    """Give findings in one of ``FORMATS``, as :func:`rendered` does, in one text."""
    return "".join(rendered(findings, form, max_rows=max_rows, width=width))


def rendered(
    findings: Iterable[Finding], form: str, *, max_rows: int | None = None, width: int = 100
) -> Iterator[str]:
    """Give findings in one of ``FORMATS``, piece by piece: each finding's when it comes.

    Parameters
    ----------
    max_rows
        Of a table, in "table" and "md"; what is left out is said. CSV and JSON are always whole.
    width
        Characters a line of sentences takes.
    """
    if form == "json":
        begin = "["
        for finding in findings:
            yield begin + finding.to_json()
            begin = ",\n"
        yield "[]\n" if begin == "[" else "]\n"
    elif form == "csv":
        yield from _csv(findings)
    else:
        for finding in findings:
            yield _text(finding, form, max_rows, width)


def _text(finding: Finding, form: str, max_rows: int | None, width: int) -> str:
    out = io.StringIO()
    out.write(f"## {finding.title}\n\n" if form == "md" else f"{finding.title}\n{'─' * len(finding.title)}\n")
    if finding.not_answered is not None:
        out.write(f"Not answered: {printable(finding.not_answered, keep=chr(10))}\n\n")
        return out.getvalue()
    for text in (*finding.sentences, *filter(None, [finding.phase_note]), *finding.caveats):
        out.write(f"- {printable(text)}\n" if form == "md" else _bullet(text, width))
    for name, table in finding.tables.items():
        out.write(f"\n{f'### {name}' if form == 'md' else name}\n")
        out.write(table_text(table, "github" if form == "md" else "simple", max_rows) + "\n")
    out.write("\n")
    return out.getvalue()


def table_text(table: pd.DataFrame, style: str = "simple", max_rows: int | None = None) -> str:
    """One table in a style of the tabulate package; NaN and None as an empty cell."""
    shown = table if max_rows is None else table.head(max_rows)
    rows = [[printable(_cell(value)) for value in row] for row in shown.to_numpy(dtype=object)]
    if style == "github":
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in table.dtypes]
    text = tabulate(
        rows,
        headers=[printable(str(c)) for c in table.columns],
        tablefmt=style,
        disable_numparse=True,
        colalign=["right" if n else "left" for n in numeric] if rows else None,
    )
    left_out = len(table) - len(shown)
    return text + (f"\n… {left_out:,} more rows; all of them with --format csv" if left_out else "")


def _cell(value: object) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.0f}"
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _bullet(text: str, width: int) -> str:
    return textwrap.fill(printable(text), width, initial_indent="• ", subsequent_indent="  ") + "\n"


def _csv(findings: Iterable[Finding]) -> Iterator[str]:
    """One table as it is; several as one, with ``question`` and ``table`` in front and every column that any has."""
    found = [(finding.name, *named) for finding in findings for named in finding.tables.items()]
    if len(found) == 1:
        yield found[0][2].to_csv(index=False)
    elif found:
        # as objects: a column that another table lacks must not make numbers of whole ones
        every = [table.astype(object).assign(question=q, table=name) for q, name, table in found]
        columns = dict.fromkeys(["question", "table", *(column for each in every for column in each)])
        for i, each in enumerate(every):
            yield each.reindex(columns=list(columns)).to_csv(index=False, header=not i)
