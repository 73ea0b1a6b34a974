"""A finding: what one question about a trace gives, however it is shown.

A :class:`Question` is a named analysis with its parameters; asked of a :class:`~moetrace.findings.subject.Subject`
it gives a :class:`Finding`: sentences, caveats and tables. Figures are drawn from a finding's tables alone, so
that a finding that was saved draws the same figure as the one that was just made.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from moetrace.errors import InputError, MoetraceError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from moetrace.findings.subject import Subject
    from moetrace.plot import Theme


OUT_OF_MEMORY = (
    "there is not enough memory for it\n  fix: look at fewer layers (--layers) or at one phase (--phase)"
)


@dataclass(frozen=True, repr=False)
class Finding:
    """What one question gave.

    Attributes
    ----------
    name, title
        Of the question.
    sentences
        What can be concluded, with numbers and their uncertainty; most important first.
    caveats
        What it does not mean, and what limits it.
    tables
        Name -> table. Tidy: labels are columns, the index is 0, 1, … Names of tables made by published
        formulas, faults included, begin with ``as_published``.
    parameters
        With which it was asked: JSON values.
    concludes
        Whether the first sentence is a conclusion, not that the question is left open.
    phase_note
        Which rows were looked at; "" if that is not one phase of a subject.
    not_answered
        If it could not be answered: why, and what would help. Then there are no tables.
    failed
        Whether that is no fault of the recording's: memory ran out, or moetrace has a mistake.
    """

    name: str
    title: str
    sentences: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    concludes: bool = True
    phase_note: str = ""
    not_answered: str | None = None
    failed: bool = False

    def __post_init__(self) -> None:
        for name, table in self.tables.items():
            if not re.fullmatch(r"[a-z0-9_]+", name):
                raise ValueError(f"table name {name!r}: small letters, digits and _ only")
            if not table.index.equals(pd.RangeIndex(len(table))):
                raise ValueError(f"table {name}: labels belong into columns, not into the index")

    def __repr__(self) -> str:
        said = self.not_answered or next(iter(self.sentences), "nothing is said.")
        tables = ", ".join(f"{name} ({len(table):,})" for name, table in self.tables.items())
        return f"<Finding {self.name}: {said.splitlines()[0]}{f' Tables: {tables}' if tables else ''}>"

    def _repr_html_(self) -> str:
        """For notebooks: what is said, what it does not mean, and the beginnings of the tables."""
        if self.not_answered is not None:
            said = "<br>".join(escape(line) for line in self.not_answered.splitlines())
            return f"<p><b>{escape(self.title)}</b>: not answered. {said}</p>"
        notes = [*filter(None, [self.phase_note]), *self.caveats]
        return "".join(
            (
                f"<h4>{escape(self.title)}</h4>",
                *(f"<p>{escape(sentence)}</p>" for sentence in self.sentences),
                f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else "",
                *(
                    f"<details><summary>{escape(name)}: {len(table):,} rows</summary>"
                    f"{table.head(20).to_html(index=False, border=0)}</details>"
                    for name, table in self.tables.items()
                ),
            )
        )

    def to_json(self, beside: Mapping[str, str] = {}) -> str:
        """Give it as JSON: tables as ``columns``, their ``dtypes``, and rows of ``data``.

        Nothing of a number is lost; NaN and missing values become null, what is infinite "inf" or "-inf". Tables in
        ``beside`` stand in Parquet files, whose names it has, relative to where the JSON is: they are {"file": NAME}.
        """
        shallow = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        tables = {
            name: {"file": beside[name]} if name in beside else _table_json(table)
            for name, table in self.tables.items()
        }
        whole = {**shallow, "tables": tables, "parameters": dict(self.parameters)}
        return json.dumps(whole, allow_nan=False, default=str)

    @classmethod
    def from_json(cls, text: str, path: str = "the finding", folder: Path | None = None) -> Finding:
        """Read what :meth:`to_json` gave, and the files that it names from ``folder``; without one it may name none.

        Raises InputError if ``text`` is something else, OSError if a file cannot be read.
        """
        try:
            given = json.loads(text)
            tables = {name: _table_of(table, folder) for name, table in given.pop("tables").items()}
            given |= {key: tuple(given[key]) for key in ("sentences", "caveats")}
            return cls(**given, tables=tables)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(
                f"{path} holds no finding", why=str(e), fix="write it with `moetrace analyze -o`"
            ) from None


def _table_json(table: pd.DataFrame) -> dict[str, Any]:
    columns = [[_json_value(value) for value in table[name].tolist()] for name in table]
    return {
        "columns": [str(name) for name in table],
        "dtypes": [str(dtype) for dtype in table.dtypes],
        "data": list(map(list, zip(*columns, strict=True))),
    }


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, list | tuple):
        return [_json_value(one) for one in value]
    return None if value is pd.NA or value is pd.NaT else value


def _table_of(given: Mapping[str, Any], folder: Path | None) -> pd.DataFrame:
    if "file" in given:
        if folder is None:
            raise ValueError(f"a table is in {given['file']}, which is not beside it")
        return pd.read_parquet(folder / given["file"])
    table = pd.DataFrame(given["data"], columns=given["columns"], dtype=object)
    for name, dtype in zip(table, given["dtypes"], strict=True):
        table[name] = table[name].astype("object" if dtype in ("category", "str") else dtype)
    return table


@dataclass(frozen=True)
class Figure:
    """A figure of a finding.

    Attributes
    ----------
    draw
        Draws it into the axes that it is given, and returns them.
    caption
        What it shows, in a sentence that also serves those who cannot see it.
    size
        Width and height in inches.
    """

    draw: Callable[[Axes], Axes]
    caption: str
    size: tuple[float, float] = (7.0, 4.0)

    def canvas(self) -> Canvas:
        """Draw it, in the style in force; its layout is settled, so that it can be saved in many forms."""
        from matplotlib.figure import Figure as Canvas

        canvas = Canvas(figsize=self.size, layout="constrained")
        self.draw(canvas.add_subplot())
        engine = canvas.get_layout_engine()
        assert engine is not None
        engine.execute(canvas)
        canvas.set_layout_engine("none")
        return canvas

    def save(self, path: str | os.PathLike[str], *, theme: Theme = "light", dpi: float = 150) -> None:
        """Write it in our style, as the file's name ends: .svg, .pdf, .png, ….

        Raises ValueError for an ending that matplotlib does not know, OSError if the file cannot be written.
        """
        from moetrace import plot

        with plot.style(theme):
            self.canvas().savefig(path, dpi=dpi)

    def _repr_png_(self) -> bytes:
        """For notebooks."""
        from moetrace import plot

        out = io.BytesIO()
        with plot.style():
            self.canvas().savefig(out, format="png", dpi=100)
        return out.getvalue()


@dataclass(frozen=True)
class Widget:
    """An interactive figure of the report.

    Attributes
    ----------
    name
        As the page's script knows it; "explore" is the one of the page itself.
    table
        The finding's table that it is drawn from; "": from the subject's counts.
    replaces
        Beginnings of the names of static figures whose place it takes.
    """

    name: str
    table: str = ""
    replaces: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """How numbers are made: an entry of the report's appendix.

    Attributes
    ----------
    anchor, title, text
        Of the entry.
    words
        A regular expression: the first of these words in a text of the report leads to the entry.
    """

    anchor: str
    title: str
    words: str
    text: str


def parameter(default: Any, help: str, **metadata: Any) -> Any:  # noqa: A002
    """A field of a question that users may set: an option of the command line, an argument in Python.

    ``metadata`` may hold ``choices`` and ``metavar``.
    """
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Question(ABC):
    """A named analysis. Subclasses are frozen dataclasses; their fields are its parameters.

    The docstring is the help text: the first line what is asked, the rest how it is answered and by whom it was
    first asked.

    Attributes
    ----------
    name, title
        On the command line, and in the report.
    channels
        What a trace must hold beyond experts and weights.
    needs_model
        Whether it runs or reads the model (``subject.model``), so that a trace alone does not answer it.
    compares
        Whether it sets two traces against each other (``subject.pair``); others take traces together.
    place
        Where it stands in the report: the smaller the earlier; moetrace's own are 10, 20, ….
    slow
        How much longer it takes than most: the slowest is begun first, beside quick ones.
    widgets, methods
        Interactive figures of the report, and entries of its appendix, that it brings.
    actions
        What to do with the answer: a few words, and the command; {trace} in it stands for the trace.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    channels: ClassVar[tuple[str, ...]] = ()
    needs_model: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    place: ClassVar[int] = 1000
    slow: ClassVar[int] = 0
    widgets: ClassVar[tuple[Widget, ...]] = ()
    methods: ClassVar[tuple[Method, ...]] = ()
    actions: ClassVar[tuple[tuple[str, str], ...]] = ()

    @abstractmethod
    def answer(self, subject: Subject) -> Finding:
        """Answer it. Raises MoetraceError, saying what is missing, if the subject does not allow it."""

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Figures of a finding, from its tables alone. Name -> figure."""
        return {}

    def ask(self, subject: Subject) -> Finding:
        """Answer it, or say in the finding why it cannot be answered; a mistake's traceback goes to stderr."""
        try:
            return self.answer(subject)
        except MoetraceError as e:
            return self.not_answered(str(e))
        except MemoryError:
            return self.not_answered(OUT_OF_MEMORY, failed=True)
        except Exception as e:  # of whatever kind: it must not cost the other questions
            traceback.print_exc()
            return self.not_answered(f"moetrace failed: {type(e).__name__}: {e}", failed=True)

    def not_answered(self, why: str, *, failed: bool = False) -> Finding:
        """Make the finding of a question that could not be answered."""
        return Finding(
            self.name,
            self.title,
            parameters=self.parameters,
            concludes=False,
            not_answered=why,
            failed=failed,
        )

    def finding(
        self,
        subject: Subject,
        sentences: Sequence[str],
        tables: Mapping[str, pd.DataFrame],
        caveats: Sequence[str] = (),
        *,
        concludes: bool = True,
        of_phase: bool = True,
    ) -> Finding:
        """Make this question's finding; ``of_phase``: it is about the rows of the subject's phase."""
        return Finding(
            self.name,
            self.title,
            tuple(sentences),
            (*caveats, *(subject.copies if of_phase else ())),
            dict(tables),
            self.parameters,
            concludes=concludes and bool(sentences),
            phase_note=subject.phase_note if of_phase else "",
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
