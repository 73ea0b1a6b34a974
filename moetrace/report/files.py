"""Findings as files: tables as CSV, figures as PNG and PDF, the whole as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moetrace.errors import InputError, MoetraceError
from moetrace.findings import QUESTIONS, Figure, Finding, question

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Canvas


def write_finding(finding: Finding, folder: Path) -> list[Path]:
    """Write NAME.json, tables/NAME-TABLE.csv and figures/NAME-FIGURE.{png,pdf}; gives the files.

    Raises MoetraceError if a file cannot be written.
    """
    from moetrace.plot.style import style

    written: list[Path] = []
    try:
        for sub in ("tables", "figures"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{finding.name}.json")
        written[-1].write_text(finding.to_json(), encoding="utf-8")
        for name, table in finding.tables.items():
            written.append(folder / "tables" / f"{finding.name}-{name}.csv")
            table.to_csv(written[-1], index=False)
        for name, figure in figures_of(finding).items():
            with style():
                canvas = drawn(figure)
                for ending in ("png", "pdf"):
                    written.append(folder / "figures" / f"{finding.name}-{name}.{ending}")
                    canvas.savefig(written[-1], dpi=150)
    except OSError as e:
        raise MoetraceError(f"{e.filename or folder} cannot be written", why=e.strerror or str(e)) from e
    return written


def figures_of(finding: Finding) -> dict[str, Figure]:
    """Figures of a finding; none if it was not answered, or is of a question that is not known.

    Raises InputError if it lacks a table or column that its figures are drawn from.
    """
    if finding.not_answered is not None or finding.name not in QUESTIONS:
        return {}
    with _whole(finding):
        return question(finding.name)().figures(finding)


def widget_tables(findings: Sequence[Finding]) -> dict[str, pd.DataFrame]:
    """The tables that interactive figures are drawn from, by the figure's name. Raises as :func:`figures_of`."""
    out: dict[str, pd.DataFrame] = {}
    for finding in findings:
        if finding.not_answered is None and finding.name in QUESTIONS:
            with _whole(finding):
                widgets = question(finding.name).widgets
                out |= {widget.name: finding.tables[widget.table] for widget in widgets if widget.table}
    return out


@contextmanager
def _whole(finding: Finding) -> Iterator[None]:
    try:
        yield
    except KeyError as e:
        raise InputError(
            f"the finding {finding.name} has no {e}",
            why="another version of moetrace wrote it, or someone edited it",
            fix=f"make it again: moetrace analyze {finding.name} -o DIR",
        ) from e


def drawn(figure: Figure) -> Canvas:
    """Draw a figure, in the style in force; its layout is settled, so that it can be saved in many forms."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=figure.size, layout="constrained")
    figure.draw(canvas.add_subplot())
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")
    return canvas
