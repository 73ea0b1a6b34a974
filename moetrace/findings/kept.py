"""Answers kept in a trace's folder, so that what was asked once is there at once."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moetrace
from moetrace import _native
from moetrace.errors import MoetraceError
from moetrace.findings.finding import Finding, Question
from moetrace.trace.vocabulary import model_path

if TYPE_CHECKING:
    from moetrace.findings.subject import Subject
    from moetrace.trace.trace import Trace

FOLDER = "answers"
#: answers of one question that are kept: other phases, layers, parameters
MANY = 16


class Kept:
    """Answers about these traces, in the folder of the first.

    They are found by what the traces hold (their sealed descriptions, labels and vocabularies, and when their columns
    were written), what is looked at, the question with its parameters, and this very version of moetrace: whatever
    changes, is asked anew. Nothing is kept of a trace that grows, with a model, of questions that others have written
    (whose code is not known to be the same), and where the folder cannot be written.
    """

    def __init__(self, folder: Path | None, key: str = "") -> None:
        self._folder, self._key = folder, key

    @classmethod
    def of(cls, subject: Subject) -> Kept:
        """Answers about a subject's traces."""
        traces = subject.traces
        if not traces or subject.model is not None or any(trace.live for trace in traces):
            return cls(None)
        try:
            seals = [[*trace.shown, trace.path.name, seal(trace.path), _models(trace)] for trace in traces]
        except OSError:
            return cls(None)
        return cls(traces[0].path / FOLDER, _digest([_moetrace(), seals, subject.looked_at]))

    def get(self, question: Question) -> Finding | None:
        """Give the answer if it is there, whole."""
        path = self._path(question)
        if path is None:
            return None
        try:
            return Finding.from_json(gzip.decompress(path.read_bytes()).decode(), str(path))
        except (OSError, EOFError, ValueError, MoetraceError):
            return None

    def put(self, question: Question, finding: Finding) -> None:
        """Keep an answer; of the same question's others the :data:`MANY` newest stay."""
        path = self._path(question)
        if path is None:
            return
        written = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(exist_ok=True)
            written.write_bytes(gzip.compress(finding.to_json().encode(), 1, mtime=0))
            written.replace(path)
            old = sorted(path.parent.glob(f"{question.name}-*.gz"), key=lambda p: p.stat().st_mtime_ns)
            for each in old[:-MANY]:
                each.unlink()
        except OSError:
            with contextlib.suppress(OSError):
                written.unlink(missing_ok=True)

    def _path(self, question: Question) -> Path | None:
        if self._folder is None or type(question).__module__.split(".")[0] != moetrace.__name__:
            return None
        key = _digest([self._key, question.parameters])
        return self._folder / f"{question.name}-{key}.json.gz"


def seal(path: Path) -> str:
    """What tells a trace's content apart: its descriptions, by content; columns by size and time of writing."""
    out: list[Any] = []
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if name.parts[0] == FOLDER or not file.is_file():
            continue
        stat = file.stat()
        small = len(name.parts) == 1 or name.name.endswith(".json")
        what: Any = hashlib.sha256(file.read_bytes()).hexdigest() if small else stat.st_mtime_ns
        out.append([str(name), stat.st_size, what])
    return _digest(out)


def _models(trace: Trace) -> list[Any]:
    """The model files that would be asked for the text of tokens, and whether they are the same: none where the trace
    has it."""
    if any(trace.path.glob("vocabulary*.json")):
        return []
    out = []
    for path in (model_path(trace.store, trace.store.context(name)) for name in trace.shown):
        stat = Path(path).stat() if path and Path(path).is_file() else None
        out.append([path, stat and [stat.st_size, stat.st_mtime_ns]])
    return out


@cache
def _moetrace() -> str:
    """This very code: what answered otherwise before it was mended is asked anew."""
    files = [*sorted(Path(moetrace.__file__).parent.rglob("*.py")), Path(_native.__file__)]
    return _digest(
        [moetrace.__version__, *([f.name, hashlib.sha256(f.read_bytes()).hexdigest()] for f in files)]
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]
