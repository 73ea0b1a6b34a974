"""Events that were lost, from the ring's records to what is said: requests stay apart, what is not certain is blank."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rings import Producer, change_ring, make_layout, number_records
from traces import Context, event, server_records, write_trace

import moetrace
from moetrace.__main__ import main
from moetrace.findings import Subject, question
from moetrace.host.resume import ResumedRecording
from moetrace.report.captured import captured
from moetrace.trace.columns import TableWriter
from moetrace.trace.jsonfile import read_json, write_json
from moetrace.trace.record import Counter, EventCode, OnFull, RecordKind
from moetrace.trace.recover import recover
from moetrace.trace.ring import Ring
from moetrace.trace.store import TraceStore
from moetrace.trace.verify import verify
from moetrace.trace.writer import TraceWriter, final_counters

LAYOUT = make_layout(numbered=True)
UNCERTAIN = ["n_cached", "n_rejected", "n_recomputed", "n_undecided", "n_shifts", "n_unrecorded"]


def told(*lost: int, layout=LAYOUT) -> Context:
    """Three requests on one slot; these of their events (LAUNCH, SEQ_RM, LAUNCH of each) are lost."""
    records = server_records(layout, np.random.default_rng(3), slots=1)
    event = np.flatnonzero(records["kind"] == RecordKind.EVENT)
    return Context(layout, np.delete(records, event[list(lost)]), events_lost=len(lost))


BETWEEN = (2, 3)  # the LAUNCH that ends the first request, and that of the second one


def test_requests_stay_apart_and_say_what_is_not_certain(tmp_path: Path) -> None:
    whole = moetrace.open(write_trace(tmp_path / "whole", [told()]))
    trace = moetrace.open(write_trace(tmp_path / "t", [told(*BETWEEN)]))
    for name in ("request", "phase", "serial"):
        np.testing.assert_array_equal(trace.column(name), whole.column(name))
    requests = trace.requests
    assert requests["n_events_lost"].tolist() == [0, 2, 0]
    assert requests[UNCERTAIN].isna().any(axis=1).tolist() == [True, True, False]
    assert requests.loc[1, [*UNCERTAIN, "n_prompt"]].isna().all()
    # of the first one only what happened to its memory after its last row
    assert requests.loc[0, UNCERTAIN].isna().tolist() == [name == "n_undecided" for name in UNCERTAIN]
    assert requests["n_prompt"].isna().tolist() == [False, True, False]
    assert not whole.requests[UNCERTAIN].isna().any(axis=None)
    assert requests[["n_prefill", "n_decode", "n_lost"]].values.tolist() == [[6, 4, 0]] * 3


def test_without_numbers_they_are_mixed_up_and_it_is_said(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", [told(*BETWEEN, 4, layout=make_layout())])
    trace = moetrace.open(path)
    assert len(trace.requests) == 2
    assert not trace.loss.complete
    assert "mixed up" in verify(path).remarks[0]
    assert "counted to another" in " ".join(question("overview")().answer(Subject([trace])).caveats)


def test_every_place_that_speaks_of_loss_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_trace(tmp_path / "t", [told(*BETWEEN)])
    trace = moetrace.open(path)
    assert (trace.loss.rows_lost, trace.loss.lost, trace.loss.events_lost) == (0, 0, 2)
    assert not trace.loss.complete
    assert dict(trace.summary())["completeness"] == "0 rows and 2 events lost"
    subject = Subject([trace])
    answer = question("overview")().answer(subject)
    assert "0 rows and 2 events lost" in answer.sentences[0]
    assert "2 events of slots and their memory were lost" in " ".join(answer.caveats)
    remarks = [(remark.weight, remark.text) for remark in captured(subject).completeness]
    assert "good" not in dict(remarks)
    assert remarks[0][0] == "warn"
    assert "where requests begin is known" in remarks[0][1]
    assert verify(path).exit_code == 0
    assert main(["verify", str(path)]) == 0
    assert "2 events of slots and their memory lost" in capsys.readouterr().out
    assert main(["info", str(path)]) == 0
    assert "0 rows and 2 events lost" in capsys.readouterr().out


def test_a_whole_one_says_nothing_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_trace(tmp_path / "t", [told()])
    assert moetrace.open(path).loss.complete
    assert verify(path).remarks == ()
    main(["verify", str(path)])
    assert "event" not in capsys.readouterr().out


@pytest.mark.parametrize("sealed", [0, 5, 13, 30])
@pytest.mark.parametrize("again", [recover, lambda path: ResumedRecording(path).finish()])
def test_recovering_and_resuming_give_what_closing_would_have(
    tmp_path: Path, sealed: int, again: Callable[[Path], object]
) -> None:
    context = told(*BETWEEN)
    whole = write_trace(tmp_path / "whole", [context])
    path = write_trace(tmp_path / "killed", [context], close=False, sealed=min(sealed, len(context.records)))
    before = moetrace.open(path).requests
    assert before["n_events_lost"].tolist() == [0, 2, 0][: len(before)]
    if again is not recover:
        change_ring(path / "ctx0" / "ring", host_pid=os.getpid())
    again(path)
    one, two = moetrace.open(whole), moetrace.open(path)
    pd.testing.assert_frame_equal(one.requests, two.requests)
    assert one.loss == two.loss
    assert verify(path).findings == ()


def test_an_event_whose_record_was_never_finished_is_lost(tmp_path: Path) -> None:
    """GIVEN a host that died over its last event WHEN recovered THEN that event is counted as lost."""
    context = told()
    path = write_trace(tmp_path / "t", [context], close=False, sealed=10)
    ring = path / "ctx0" / "ring"
    data = bytearray(ring.read_bytes())
    with Ring(ring) as r:
        stride, start, head = r.dtype.itemsize, len(data) - r.capacity * r.dtype.itemsize, r.head
    data[start + (head - 1) * stride : start + (head - 1) * stride + 8] = bytes(8)
    ring.write_bytes(data)
    assert recover(path).contexts[0].torn == 1
    trace = moetrace.open(path)
    assert (trace.loss.rows_lost, trace.loss.events_lost) == (0, 1)
    assert verify(path).findings == ()


def test_events_that_were_overwritten_are_counted(tmp_path: Path) -> None:
    """GIVEN a reader that came too late WHEN the trace is closed THEN the numbers missing are those it counts."""
    records = told().records
    producer = Producer(LAYOUT, 16, OnFull.OVERWRITE)
    producer.write(records)
    producer.save(tmp_path / "ring")
    with Ring(tmp_path / "ring") as ring:
        trace = TraceWriter(tmp_path / "t")
        context = trace.add_context("ctx0", ring.meta, LAYOUT, epoch_ns=ring.epoch_ns)
        context.append(ring.snapshot()[0])
        context.seal()
        context.close(final_counters(ring, context))
        trace.close()
    shown = moetrace.open(tmp_path / "t")
    kept = records[-16:]
    assert len(shown) == int((kept["kind"] == RecordKind.ROW).sum())
    assert shown.loss.events_lost == int((records[:-16]["kind"] == RecordKind.EVENT).sum()) > 0
    assert shown.requests["n_events_lost"].iloc[0] > 0
    assert verify(tmp_path / "t").findings == ()


def change(path: Path, table: str, column: str, row: int, by: int) -> None:
    """Change a number and seal the table anew: only its meaning is wrong then."""
    store = TraceStore(path)
    old = getattr(store.context("ctx0"), table)
    columns = {name: np.array(c) for name, c in old.items()}
    columns[column][row] += np.array(by).astype(columns[column].dtype)
    spec = old.spec
    shutil.rmtree(path / "ctx0" / table)
    with TableWriter.create(path / "ctx0" / table, spec) as writer:
        writer.append(columns)
        writer.seal()
    TraceStore(path).close_as("closed")


@pytest.mark.parametrize(
    ("table", "column", "row", "by", "finding"),
    [
        ("events", "number", 3, -1, "numbers of events do not ascend"),
        ("events", "number", -1, 5, "5 events more happened than were counted"),
        ("events", "arg", 3, -1, "LAUNCHes do not ascend"),
        ("rows", "events_before", 7, -1, "fewer events came before it than are here"),
        ("rows", "events_before", 7, 1, "the number of events before a row falls"),
        ("rows", "events_before", -1, 9, "events more happened than were counted"),
        ("rows", "task", 12, -1, "not the one that its sequence's LAUNCHes say"),
        ("rows", "task", 12, 1, "not the one that its sequence's LAUNCHes say"),
        ("rows", "task", 12, 1, "the task of a sequence falls"),
    ],
)
def test_numbers_that_contradict_each_other(
    tmp_path: Path, table: str, column: str, row: int, by: int, finding: str
) -> None:
    path = write_trace(tmp_path / "t", [told()])
    change(path, table, column, row, by)
    result = verify(path)
    assert result.exit_code == 4
    assert any(finding in f.what for f in result.findings), result.findings


def test_numbers_missing_that_nobody_counted(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", [told(*BETWEEN)])
    facts = read_json(path / "ctx0" / "context.json")
    facts["counters"]["events_lost"] = 1
    write_json(path / "ctx0" / "context.json", facts)
    result = verify(path)
    assert result.exit_code == 4
    assert "1 events more happened than were counted" in result.findings[0].what
    facts["counters"]["events_committed"] += 1
    write_json(path / "ctx0" / "context.json", facts)
    assert "8 events were written, but 7 are here" in verify(path).findings[0].what


def test_the_story_has_launches() -> None:
    """What the other tests lose."""
    records = told().records
    events = records[records["kind"] == RecordKind.EVENT]
    assert events["token"][list(BETWEEN)].tolist() == [EventCode.LAUNCH] * 2
    assert Counter.EVENTS_LOST == 6


@pytest.mark.parametrize("gone", [(4, 5, 6, 7, 8, 9), (8, 9), (6, 7, 8, 9), (9,), ()])
@pytest.mark.parametrize("paused", [False, True])
def test_a_prompt_whose_end_may_be_missing(tmp_path: Path, gone: tuple[int, ...], paused: bool) -> None:
    """GIVEN requests whose last rows were lost, or came while recording was off, WHEN nothing that they generated is
    there THEN how long their prompt was is not known.
    """
    records = server_records(LAYOUT, np.random.default_rng(3), slots=1, lose=() if paused else gone)
    lost = 0 if paused else len(gone)
    if paused and gone:  # off after the row before the first one gone, and on before the next request
        rows = (records["kind"] == RecordKind.ROW) & np.isin(records["serial"], gone)
        records = records[~rows]
        after = records["serial"] >= 10
        records["serial"][after] -= len(gone)
        at = np.flatnonzero(records["serial"] >= gone[0])[0]
        pair = np.concatenate(
            [event(LAYOUT, gone[0], code, -1) for code in (EventCode.PAUSE, EventCode.RESUME)]
        )
        records = np.insert(records, at, pair)
        number_records(records)
    trace = moetrace.open(write_trace(tmp_path / "t", [Context(LAYOUT, records, lost)]))
    requests = trace.requests
    assert len(requests) == 3
    assert requests["n_prompt"].isna().tolist() == [bool(gone) and gone[0] <= 6, False, False]
    assert requests["n_prefill"].tolist() == [6 if not gone else min(gone[0], 6), 6, 6]
    assert (requests["n_prompt"].iloc[1:] == 6).all()
    assert verify(trace.path).exit_code == 0
