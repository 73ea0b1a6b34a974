"""Questions asked in processes of their own, and answers that are kept."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import traces
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure as Canvas

import moetrace
from moetrace.__main__ import main
from moetrace.errors import MoetraceError, UsageError
from moetrace.findings import Finding, Subject, ask_all, question
from moetrace.findings.asking import answers
from moetrace.findings.finding import Question
from moetrace.findings.kept import FOLDER, Kept
from moetrace.report import files
from moetrace.report.files import read_finding, write_finding
from moetrace.trace.labels import append_labels


@dataclass(frozen=True)
class Asked(Question):
    """What happens?"""

    name: ClassVar[str] = "asked"
    title: ClassVar[str] = "Asked"

    what: str = "fine"

    def answer(self, subject: Subject) -> Finding:
        """Do what it says."""
        if self.what == "memory":
            raise MemoryError
        if self.what == "mistake":
            raise ZeroDivisionError("a mistake")
        if self.what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "slow":
            time.sleep(0.5)
        if self.what == "cannot":
            raise MoetraceError("it has no such thing", fix="record it")
        return self.finding(subject, [self.what, str(os.getpid())], {"t": pd.DataFrame({"a": [1.5, None]})})


@pytest.fixture
def subject(tmp_path: Path) -> Iterator[Subject]:
    with moetrace.open(traces.small_trace(tmp_path / "t.moet")) as trace:
        yield Subject([trace])


@pytest.mark.parametrize("workers", [1, 3])
def test_one_that_fails_costs_no_other(
    subject: Subject, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ["slow", "memory", "mistake", "cannot", "killed", "fine"]
    if workers == 1:
        asked.remove("killed")
    found = dict(
        zip(asked, [f for f, _ in answers([Asked(w) for w in asked], subject, workers=workers)], strict=True)
    )
    assert [f.parameters["what"] for f in found.values()] == asked  # in order, though the first was the last
    assert found["fine"].sentences[0] == "fine"
    assert (found["fine"].sentences[1] == str(os.getpid())) == (workers == 1)
    assert {w for w, f in found.items() if f.failed} == {"memory", "mistake", "killed"} & set(asked)
    assert "not enough memory" in str(found["memory"].not_answered)
    assert "ZeroDivisionError: a mistake" in str(found["mistake"].not_answered)
    assert "Traceback" in capfd.readouterr().err
    assert "fix: record it" in str(found["cannot"].not_answered)


def test_what_is_done_with_each_is_done_where_it_was_made(subject: Subject) -> None:
    made = list(
        answers([Asked("a"), Asked("b")], subject, workers=2, then=lambda f: (f.sentences[0], os.getpid()))
    )
    assert [more[0] for _, more in made] == ["a", "b"]
    assert all(more[1] != os.getpid() for _, more in made)

    def refuse(finding: Finding) -> None:
        raise MoetraceError("no room")

    with pytest.raises(MoetraceError, match="no room"):
        list(answers([Asked("a"), Asked("b")], subject, workers=2, then=refuse))


def test_answers_in_other_processes_are_those_in_this(subject: Subject) -> None:
    for one, two in zip(ask_all(subject, workers=1), ask_all(subject, workers=2), strict=True):
        assert (one.name, one.sentences, one.caveats) == (two.name, two.sentences, two.caveats)
        for name, table in one.tables.items():
            pd.testing.assert_frame_equal(two.tables[name], table, check_exact=True)


def test_a_kept_answer_is_the_answer_to_the_last_digit(subject: Subject) -> None:
    first = list(ask_all(subject, keep=True))
    kept = Kept.of(subject)
    for finding in first:
        again = kept.get(question(finding.name)())
        assert again is not None
        assert (again.sentences, again.caveats, again.phase_note, again.not_answered) == (
            finding.sentences, finding.caveats, finding.phase_note, finding.not_answered,
        )  # fmt: skip
        for name, table in finding.tables.items():
            strings = {c: "object" for c, t in table.dtypes.items() if str(t) in ("str", "category")}
            pd.testing.assert_frame_equal(again.tables[name], table.astype(strings), check_exact=True)


def test_what_failed_is_asked_again(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kept, "_path", lambda self, question: Path("never"))
    put: list[Finding] = []
    monkeypatch.setattr(Kept, "put", lambda self, question, finding: put.append(finding))
    asked = [Asked(what) for what in ("mistake", "cannot", "fine")]
    list(answers(asked, subject, kept=Kept.of(subject), workers=1))
    assert [finding.parameters["what"] for finding in put] == ["cannot", "fine"]


def kept_of(path: Path, **options: object) -> Kept:
    with moetrace.open(path) as trace:
        return Kept.of(Subject([trace], **options))  # type: ignore[arg-type]


def test_what_changes_is_asked_anew(tmp_path: Path) -> None:
    path = traces.small_trace(tmp_path / "t.moet")
    with moetrace.open(path) as trace:
        asked = question("load-balance")()
        finding = asked.answer(Subject([trace]))
    kept_of(path).put(asked, finding)
    assert kept_of(path).get(asked) is not None
    assert kept_of(path).get(question("domain-separation")()) is None
    tested = [question("domain-separation")(permutations=n) for n in (19, 99)]  # type: ignore[call-arg]
    kept_of(path).put(tested[0], finding)
    assert kept_of(path).get(tested[0]) is not None
    assert kept_of(path).get(tested[1]) is None
    assert kept_of(path, seed=1).get(asked) is None
    assert kept_of(path, phase="prefill").get(asked) is None
    assert kept_of(path, layers=[0]).get(asked) is None
    column = next(path.glob("ctx0/rows/experts*"))
    before = column.stat()
    data = column.read_bytes()
    column.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert kept_of(path).get(asked) is None
    column.write_bytes(data)
    os.utime(column, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert kept_of(path).get(asked) is not None
    append_labels(path, [{"request": 0, "id": "new", "label": "new"}])
    assert kept_of(path).get(asked) is None


def test_a_broken_answer_is_none_and_a_folder_that_cannot_be_written_keeps_none(tmp_path: Path) -> None:
    path = traces.small_trace(tmp_path / "t.moet")
    with moetrace.open(path) as trace:
        asked = question("load-balance")()
        finding = asked.answer(Subject([trace]))
    kept_of(path).put(asked, finding)
    (file,) = (path / FOLDER).iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert kept_of(path).get(asked) is None
    file.unlink()
    (path / FOLDER).rmdir()
    (path / FOLDER).touch()  # no folder can be made of that name
    kept_of(path).put(asked, finding)
    assert kept_of(path).get(asked) is None


def test_what_others_ask_is_not_kept(tmp_path: Path) -> None:
    """Their code may have changed, and nobody could tell."""
    path = traces.small_trace(tmp_path / "t.moet")
    with moetrace.open(path) as trace:
        finding = Asked("a").answer(Subject([trace]))
    kept_of(path).put(Asked("a"), finding)
    assert kept_of(path).get(Asked("a")) is None
    assert not (path / FOLDER).exists()


def test_a_kept_answer_names_no_files(tmp_path: Path) -> None:
    path = traces.small_trace(tmp_path / "t.moet")
    with moetrace.open(path) as trace:
        asked = question("load-balance")()
        finding = asked.answer(Subject([trace]))
    kept_of(path).put(asked, finding)
    (file,) = (path / FOLDER).iterdir()
    file.write_bytes(gzip.compress(finding.to_json({"load_balance": "elsewhere.parquet"}).encode()))
    assert kept_of(path).get(asked) is None


def test_a_long_table_is_a_parquet_file_that_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    path = traces.small_trace(tmp_path / "t.moet")
    monkeypatch.setattr(files, "MANY_ROWS", 3)
    with moetrace.open(path) as trace:
        finding = question("load-balance")().answer(Subject([trace]))
    written = write_finding(finding, tmp_path / "out")
    assert len(finding.tables["load_balance"]) >= 3
    assert {file.suffix for file in written.files} == {".json", ".parquet", ".svg", ".png", ".pdf"}
    again = read_finding(tmp_path / "out" / "load-balance.json")
    pd.testing.assert_frame_equal(again.tables["load_balance"], finding.tables["load_balance"])


def test_what_an_earlier_answer_left_in_the_folder_and_this_one_has_not_goes(tmp_path: Path) -> None:
    path, out = traces.small_trace(tmp_path / "t.moet"), tmp_path / "out"
    with moetrace.open(path) as trace:
        finding = question("load-balance")().answer(Subject([trace]))
    write_finding(finding, out)
    theirs = [out / "figures" / "load-balance.svg", out / "tables" / "load-notes.csv"]
    for file in theirs:
        file.write_text("somebody's own")
    left = {file.name for file in out.glob("*/*")}
    assert {file.name for file in write_finding(finding, out).files} < left | {"load-balance.json"}
    unanswered = Finding(
        "load-balance", finding.title, parameters={}, concludes=False, not_answered="no rows"
    )
    (now,) = write_finding(unanswered, out).files
    assert [now, *sorted(out.glob("*/*"))] == [out / "load-balance.json", *theirs]


def test_each_form_of_a_figure_is_drawn_once_and_a_pdf_has_its_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = traces.small_trace(tmp_path / "t.moet")
    with moetrace.open(path) as trace:
        finding = question("load-balance")().answer(Subject([trace]))
    drawn: list[str] = []
    draw = Canvas.draw

    def counted(self: Canvas, renderer: RendererBase) -> None:
        drawn.append(type(renderer).__name__)
        draw(self, renderer)

    monkeypatch.setattr(Canvas, "draw", counted)
    (pdf,) = (file for file in write_finding(finding, tmp_path / "out").files if file.suffix == ".pdf")
    assert len(drawn) == 3
    # text of TrueType outlines, which a reader can select, with the widths of its letters
    assert pdf.read_bytes().count(b"/CIDFontType2") >= 1
    assert pdf.read_bytes().count(b"/FontFile2") >= 1


def test_a_report_leaves_with_1_if_a_question_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = traces.small_trace(tmp_path / "t.moet")

    def fail(self: object, subject: object) -> None:
        raise MemoryError

    monkeypatch.setattr(question("load-balance"), "answer", fail)
    assert main(["report", str(path), "-o", str(tmp_path / "out")]) == 1
    assert (tmp_path / "out" / "report.html").exists()


def test_stats_asks_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = traces.small_trace(tmp_path / "t.moet")
    out = []
    for more in ([], [], ["--no-keep"]):
        assert main(["stats", str(path), "--only", "load-balance", "--format", "json", *more]) == 0
        out.append(capsys.readouterr().out)
    assert out[0] == out[1] == out[2]
    (file,) = (path / FOLDER).iterdir()
    assert file.name.startswith("load-balance-")
    assert main(["verify", str(path)]) == 0


def test_stats_prints_each_when_it_is_there_and_leaves_with_1_if_one_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = traces.small_trace(tmp_path / "t.moet")

    def fail(self: object, subject: object) -> None:
        raise MemoryError

    monkeypatch.setattr(question("load-balance"), "answer", fail)
    assert main(["stats", str(path), "--only", "overview,load-balance", "--format", "json"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert first["not_answered"] is None
    assert second["failed"]
    assert np.all([file.name.startswith("overview") for file in (path / FOLDER).iterdir()])


def test_one_question_of_one_trace(tmp_path: Path) -> None:
    with moetrace.open(traces.labelled_trace(tmp_path / "t.moet")) as trace:
        finding = moetrace.ask("domain-separation", trace, permutations=19)
        same = question("domain-separation")(permutations=19).answer(Subject([trace]))  # type: ignore[call-arg]
        assert finding.sentences == same.sentences
        with pytest.raises(UsageError, match="no parameter colour"):
            moetrace.ask("domain-separation", trace, colour=1)
        with pytest.raises(UsageError, match="no analysis"):
            moetrace.ask("nothing", trace)
    assert finding.sentences[0] in repr(finding)
    assert len(repr(finding)) < 500
    shown = finding._repr_html_()
    assert finding.sentences[0].split(",")[0] in shown
    assert "<table" in shown
    hostile = Finding("x", "<b>", ("<script>",), ("&",), {"t": pd.DataFrame({"<i>": ["<u>"]})})
    assert not {"<b>", "<script>", "<i>", "<u>"} & set(re.findall("<[a-z]+>", hostile._repr_html_()))
    assert "not answered" in Finding("x", "t", not_answered="no\n  fix: it")._repr_html_()


@pytest.mark.parametrize(("ending", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_a_figure_is_saved_as_its_name_ends(tmp_path: Path, ending: str, begins: bytes) -> None:
    with moetrace.open(traces.labelled_trace(tmp_path / "t.moet")) as trace:
        finding = moetrace.ask("load-balance", trace)
    figure = question("load-balance")().figures(finding)["jain"]
    figure.save(tmp_path / f"f.{ending}", theme="dark")
    assert (tmp_path / f"f.{ending}").read_bytes().startswith(begins)
    assert figure._repr_png_().startswith(b"\x89PNG")
