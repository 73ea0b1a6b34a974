"""What can be asked about a model's routing, question by question.

The step between the analyses, which are functions of arrays, and whatever shows their results: the command line,
the report, a notebook. ``QUESTIONS`` has them by name::

    finding = moetrace.ask("load-balance", moetrace.open("t.moet"))
    finding.sentences, finding.tables

Every :class:`Question` in a file of this package is one of them; so is every one that an installed distribution
names as an entry point of the group ``moetrace.questions``.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

from moetrace.analysis.counts.chosen import Phase
from moetrace.errors import UsageError
from moetrace.findings.asking import Progress, Then, answers
from moetrace.findings.finding import Figure, Finding, Method, Question, Widget, parameter
from moetrace.findings.kept import Kept
from moetrace.findings.subject import Subject
from moetrace.trace.importers.counts import CountTable
from moetrace.trace.trace import Trace

__all__ = [
    "QUESTIONS",
    "Figure",
    "Finding",
    "Method",
    "Question",
    "Subject",
    "Widget",
    "ask",
    "ask_all",
    "ask_each",
    "parameter",
    "question",
]


class _Questions(Mapping[str, type[Question]]):
    """Name -> question, in the order of the report; looked for at first use."""

    @cached_property
    def _found(self) -> dict[str, type[Question]]:
        found: dict[str, type[Question]] = {}
        for _, name, _ in pkgutil.iter_modules(__path__, f"{__name__}."):
            for value in list(vars(importlib.import_module(name)).values()):
                # the class that the file defines, not those that it imports; Question itself has no name
                mine = isinstance(value, type) and issubclass(value, Question) and value.__module__ == name
                if mine and "name" in vars(value):
                    found[value.name] = value
        for entry in entry_points(group="moetrace.questions"):
            try:
                value = entry.load()
                if not issubclass(value, Question) or value.name in found:
                    raise TypeError("it is no new question")
                found[value.name] = value
            except Exception as e:  # whatever somebody else's code raises: the other questions can be asked
                warnings.warn(
                    f"the question {entry.value} cannot be asked: {e}", RuntimeWarning, stacklevel=2
                )
        return dict(sorted(found.items(), key=lambda each: (each[1].place, each[0])))

    def __getitem__(self, name: str) -> type[Question]:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


QUESTIONS = _Questions()


def question(name: str) -> type[Question]:
    """Give the question of a name. Raises UsageError if there is none."""
    if name not in QUESTIONS:
        raise UsageError(f"there is no analysis {name!r}", fix=f"choose among: {', '.join(QUESTIONS)}")
    return QUESTIONS[name]


def ask(
    name: str,
    recordings: Trace | CountTable | Sequence[Trace | CountTable],
    *,
    phase: Phase | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    **parameters: Any,
) -> Finding:
    """Ask one question (``moetrace.ask``): ``ask("specialists", trace, permutations=9999)``.

    Parameters
    ----------
    name
        Of the question, as ``moetrace analyze`` lists them.
    recordings
        A trace, a count table, or several traces.
    phase, layers, seed
        As for :class:`Subject`.
    parameters
        Of the question.

    Raises
    ------
    UsageError
        If there is no such question or parameter.
    MoetraceError
        If it cannot be answered: what is missing.
    """
    asked = question(name)
    unknown = sorted(set(parameters) - {field.name for field in dataclasses.fields(asked)})
    if unknown:
        known = ", ".join(field.name for field in dataclasses.fields(asked)) or "none"
        raise UsageError(f"{name} has no parameter {', '.join(unknown)}", fix=f"it has {known}")
    return asked(**parameters).answer(Subject(recordings, phase=phase, layers=layers, seed=seed))


def ask_all(
    subject: Subject,
    only: Sequence[str] | None = None,
    given: Sequence[Finding] = (),
    *,
    keep: bool = False,
    workers: int | None = 1,
    progress: Progress = lambda asked, done, total: None,
) -> Iterator[Finding]:
    """Ask questions of the subject: those of these names, or else all; findings come in the order of the report.

    Of all, comparisons are asked of two traces only; what needs a model and has none says so. Findings in ``given``
    (made elsewhere) are not asked again; those of other questions follow. With ``keep`` answers are kept with the
    trace, and those kept are given (:class:`~moetrace.findings.kept.Kept`); ``workers`` as for
    :func:`~moetrace.findings.asking.answers`.
    """
    return (
        finding
        for finding, _ in ask_each(subject, only, given, keep=keep, workers=workers, progress=progress)
    )


def ask_each(
    subject: Subject,
    only: Sequence[str] | None = None,
    given: Sequence[Finding] = (),
    *,
    then: Then | None = None,
    keep: bool = False,
    workers: int | None = 1,
    progress: Progress = lambda asked, done, total: None,
) -> Iterator[tuple[Finding, Any]]:
    """Ask as :func:`ask_all`, and give with each finding what ``then`` gives of it, where it was made."""
    by_name = {finding.name: finding for finding in given}
    asked: list[Question | Finding] = [
        by_name.pop(name) if name in by_name else question(name)()
        for name in (QUESTIONS if only is None else only)
        if name in by_name or only is not None or not question(name).compares or len(subject.traces) == 2
    ]
    return answers(
        [*asked, *by_name.values()],
        subject,
        kept=Kept.of(subject) if keep else None,
        then=then,
        workers=workers,
        progress=progress,
    )
