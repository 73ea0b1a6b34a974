"""Findings as files: tables as CSV, figures as SVG, PNG and PDF, the whole as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from moetrace.errors import InputError, MoetraceError
from moetrace.findings import QUESTIONS, Figure, Finding, question

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Written:
    """What was written of a finding: the files, and figures as elements of a page (name -> ``<svg>``)."""

    files: tuple[Path, ...]
    inline: Mapping[str, str] = field(default_factory=dict)


#: tables of so many rows are no text
MANY_ROWS = 100_000


def write_finding(
    finding: Finding,
    folder: Path,
    inline: Callable[[str], bool] = lambda name: False,
    forms: Sequence[str] = ("svg", "png", "pdf"),
) -> Written:
    """Write NAME.json, tables/NAME-TABLE.csv and figures/NAME-FIGURE.{svg,png,pdf}, those of ``forms``.

    A table of :data:`MANY_ROWS` rows or more becomes a Parquet file instead, where pyarrow is installed, and NAME.json
    says where it is. Figures of which ``inline`` says so are given for a page, too. What an earlier finding of this
    name left in the folder and this one does not write is removed: it would be taken for a part of it.

    Raises MoetraceError if a file cannot be written.
    """
    from moetrace.plot.style import style
    from moetrace.report.svg import inline_svg, svg

    files: list[Path] = []
    elements: dict[str, str] = {}
    try:
        for sub in ("tables", "figures"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        beside = {}
        for name, table in finding.tables.items():
            path = folder / table_file(finding, name)
            if path.suffix == ".parquet":
                table.to_parquet(path, index=False)
                beside[name] = str(path.relative_to(folder))
            else:
                table.to_csv(path, index=False)
            files.append(path)
        files.insert(0, folder / f"{finding.name}.json")
        files[0].write_text(finding.to_json(beside), encoding="utf-8")
        for name, figure in figures_of(finding).items():
            with style():
                canvas = figure.canvas()
                canvas.set_layout_engine(None)  # with one that does nothing each form would be drawn twice
                text = svg(canvas)
                for form in forms:
                    files.append(folder / "figures" / f"{finding.name}-{name}.{form}")
                    if form == "svg":
                        files[-1].write_text(text, encoding="utf-8")
                    else:
                        with _fonts_of_laid_out_text() if form == "pdf" else nullcontext():
                            canvas.savefig(files[-1], dpi=150)
                if inline(name):
                    elements[name] = inline_svg(text, figure, f"{finding.name}-{name}-")
        for old in _of_name(folder, finding.name) - set(files):
            old.unlink()
    except OSError as e:
        raise MoetraceError(f"{e.filename or folder} cannot be written", why=e.strerror or str(e)) from e
    return Written(tuple(files), elements)


@contextmanager
def _fonts_of_laid_out_text() -> Iterator[None]:
    """Put fonts into PDFs without their tables of ligatures and kerning.

    Text is placed glyph by glyph there, and reading these tables takes most of the time of a figure.
    """
    from fontTools.subset import Options

    default = Options._drop_tables_default
    Options._drop_tables_default = [*default, "GDEF", "GPOS", "GSUB"]
    try:
        yield
    finally:
        Options._drop_tables_default = default


def _of_name(folder: Path, name: str) -> set[Path]:
    """Tables and figures in a folder that are of the finding of this name, and of no other whose name begins so."""
    others = tuple(f"{other}-" for other in QUESTIONS if other.startswith(f"{name}-"))
    found = {
        path
        for sub, forms in (("tables", ("csv", "parquet")), ("figures", ("svg", "png", "pdf")))
        for form in forms
        for path in (folder / sub).glob(f"{name}-*.{form}")
    }
    return {path for path in found if not path.name.startswith(others)}


def table_file(finding: Finding, name: str) -> str:
    """Where :func:`write_finding` puts a table, relative to the folder."""
    large = len(finding.tables[name]) >= MANY_ROWS and find_spec("pyarrow") is not None
    return f"tables/{finding.name}-{name}.{'parquet' if large else 'csv'}"


def read_finding(path: Path) -> Finding:
    """Read NAME.json as :func:`write_finding` wrote it, with what stands beside it.

    Raises InputError if it cannot be read.
    """
    try:
        return Finding.from_json(path.read_text(encoding="utf-8"), str(path), path.parent)
    except (OSError, UnicodeDecodeError, ImportError) as e:
        raise InputError(f"{path} cannot be read", why=str(e)) from e


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
