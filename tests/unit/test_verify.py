"""Verifying and recovering: damage is found, and what can be saved is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from plain_reader import read_trace
from rings import make_layout, put, reseal
from traces import Context, server_records, small_trace, write_trace

import moetrace
from moetrace.errors import MoetraceError, TraceError
from moetrace.trace.columns import TableWriter
from moetrace.trace.jsonfile import read_json, write_json
from moetrace.trace.recover import recover
from moetrace.trace.store import TraceStore
from moetrace.trace.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"


def rewrite(trace: Path, column: str, change: Callable[[np.ndarray], None]) -> None:
    """Change a column and seal it anew, checksums and all: only its meaning is wrong then."""
    folder = trace / "ctx0" / "rows"
    store = TraceStore(trace)
    columns = {name: np.array(c) for name, c in store.context("ctx0").rows.items()}
    spec = store.context("ctx0").rows.spec
    change(columns[column])
    shutil.rmtree(folder)
    with TableWriter.create(folder, spec) as writer:
        writer.append(columns)
        writer.seal()
    TraceStore(trace).close_as("closed")


def test_fine(tmp_path: Path) -> None:
    result = verify(small_trace(tmp_path / "t"))
    assert result.findings == ()
    assert result.exit_code == 0
    assert result.rows == 30


def test_the_golden_ones() -> None:
    assert verify(GOLDEN / "two-contexts").exit_code == 0
    assert verify(GOLDEN / "killed").exit_code == 3


def set_at(index: tuple[int, ...], value: float) -> Callable[[np.ndarray], None]:
    def change(column: np.ndarray) -> None:
        column[index] = value

    return change


@pytest.mark.parametrize(
    ("column", "change", "finding"),
    [
        ("experts", set_at((0, 0, 0), 8), "not below"),
        ("experts", set_at((0, 0, 0), 255), "none where something is"),
        ("experts", set_at((0, 2, 0), 1), "where nothing is present"),
        ("weights", set_at((0, 2, 0), 1.0), "where nothing is present"),
        ("state", set_at((0, 0), 3), "none of 0, 1, 2"),
        ("serial", set_at((4,), 1), "do not ascend"),
        ("serial", set_at((29,), 99), "only 30 were computed"),
        ("phase", set_at((0,), 1), "says n_prefill"),
        ("phase", set_at((0,), 2), "contradict"),
        ("request", set_at((0,), -1), "no request"),
        ("request", set_at((0,), 77), "not listed"),
    ],
)
def test_contents_that_contradict(
    tmp_path: Path, column: str, change: Callable[[np.ndarray], None], finding: str
) -> None:
    path = small_trace(tmp_path / "t")
    rewrite(path, column, change)
    result = verify(path)
    assert result.exit_code == 4
    assert any(finding in f.what for f in result.findings), result.findings


def test_an_expert_chosen_twice(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t")

    def twice(experts: np.ndarray) -> None:
        experts[3, 0, 1] = experts[3, 0, 0]

    rewrite(path, "experts", twice)
    assert any("twice" in f.what and "row 3" in f.what for f in verify(path).findings)


def test_counts_that_do_not_add_up(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t")
    facts = read_json(path / "ctx0" / "context.json")
    facts["counters"]["rows_produced"] += 1
    write_json(path / "ctx0" / "context.json", facts)
    result = verify(path)
    assert result.exit_code == 4
    assert "31 rows were computed, but 30 are here and 0 lost" in result.findings[0].what


def test_a_ledger_cut_short_is_noticed(tmp_path: Path) -> None:
    """GIVEN a closed trace whose last block is gone without a trace WHEN verified THEN meta.json tells."""
    path = small_trace(tmp_path / "t")
    for folder in ("rows", "events"):
        ledger = path / "ctx0" / folder / "blocks.npy"
        width = np.load(ledger).dtype.itemsize
        os.truncate(ledger, ledger.stat().st_size - width)
    assert verify(path).exit_code == 4
    with pytest.raises(TraceError, match="damaged"):
        recover(path)
    recover(path, cut=True)
    assert len(moetrace.open(path)) < 30


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


# -- recovering ------------------------------------------------------------------------------------------


def same(a: Path, b: Path) -> None:
    """Two traces hold the same rows, events and requests."""
    one, two = read_trace(a), read_trace(b)
    for table in ("rows", "events"):
        for name, column in one["contexts"]["ctx0"][table].items():
            np.testing.assert_array_equal(column, two["contexts"]["ctx0"][table][name], err_msg=name)
    first, second = moetrace.open(a).requests, moetrace.open(b).requests
    pd.testing.assert_frame_equal(first, second)


@pytest.mark.parametrize("sealed", range(0, 40, 3))
def test_recovering_gives_what_closing_would_have(tmp_path: Path, sealed: int) -> None:
    """GIVEN a recorder killed anywhere WHEN recovered THEN the trace is the one it would have closed."""
    layout = make_layout()
    records = server_records(layout, np.random.default_rng(2), lose=(5,))
    context = Context(layout, records, lost=1)
    whole = write_trace(tmp_path / "whole", [context])
    killed = write_trace(tmp_path / "killed", [context], close=False, sealed=min(sealed, len(records)))
    assert verify(killed).exit_code == 3
    result = recover(killed)
    (done,) = result.contexts
    assert done.sealed + done.recovered == 29
    assert (done.lost, done.torn) == (1, 0)
    same(whole, killed)
    assert verify(killed).findings == ()
    assert not (killed / "ctx0" / "ring").exists()
    assert moetrace.open(killed).meta["state"] == "recovered"
    again = recover(killed)
    assert again.contexts[0].recovered == 0


def test_recovering_twice_over_the_same_ring_changes_nothing(tmp_path: Path) -> None:
    """GIVEN a recovery killed just before it deletes the ring WHEN repeated THEN no row comes twice."""
    path = tmp_path / "t"
    shutil.copytree(GOLDEN / "killed", path)
    ring = (path / "ctx0" / "ring").read_bytes()
    recover(path)
    before = read_trace(path)["contexts"]["ctx0"]["rows"]["serial"].copy()
    (path / "ctx0" / "ring").write_bytes(ring)
    recover(path)
    np.testing.assert_array_equal(read_trace(path)["contexts"]["ctx0"]["rows"]["serial"], before)
    assert verify(path).findings == ()


def test_events_sealed_before_their_rows_come_once(tmp_path: Path) -> None:
    """GIVEN a recorder killed between sealing events and rows WHEN recovered THEN each event stands once."""
    layout = make_layout()
    records = server_records(layout, np.random.default_rng(2))
    context = Context(layout, records)
    whole = write_trace(tmp_path / "whole", [context])
    killed = write_trace(tmp_path / "killed", [context], close=False, sealed=16)
    events = TraceStore(whole).context("ctx0").events
    have = TraceStore(killed).context("ctx0").events.n_rows
    with TableWriter.resume(killed / "ctx0" / "events") as writer:
        writer.append({name: np.array(column[have : have + 2]) for name, column in events.items()})
        writer.seal()
    recover(killed)
    same(whole, killed)


def test_torn_records_are_left_out_and_told(tmp_path: Path) -> None:
    path = tmp_path / "t"
    shutil.copytree(GOLDEN / "killed", path)
    ring = path / "ctx0" / "ring"
    data = bytearray(ring.read_bytes())
    from moetrace.trace.ring import Ring

    with Ring(ring) as r:
        stride, start, head = r.dtype.itemsize, len(data) - r.capacity * r.dtype.itemsize, r.head
    data[start + (head - 2) * stride : start + (head - 2) * stride + 8] = bytes(8)
    ring.write_bytes(data)
    assert recover(path).contexts[0].torn == 1


def test_a_ring_that_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "t"
    shutil.copytree(GOLDEN / "killed", path)
    flip(path / "ctx0" / "ring", 8 * 33)
    (done,) = recover(path).contexts
    assert "left alone" in done.note
    assert (path / "ctx0" / "ring").exists()
    assert len(moetrace.open(path)) == done.sealed


def test_broken_headers_are_written_again(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t")
    before = read_trace(path)["contexts"]["ctx0"]["rows"]
    for name in ("experts", "blocks"):
        with (path / "ctx0" / "rows" / f"{name}.npy").open("r+b") as f:
            f.write(b"garbage" * 10)
    with pytest.raises(TraceError):
        moetrace.open(path)
    assert recover(path).headers == ("ctx0/rows/experts.npy", "ctx0/rows/blocks.npy")
    assert verify(path).findings == ()
    np.testing.assert_array_equal(moetrace.open(path).experts, before["experts"])


def test_damage_inside_is_not_cut_off_unasked(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t")
    flip(path / "ctx0" / "rows" / "blocks.npy", 8 * 1030)
    size = (path / "ctx0" / "rows" / "experts.npy").stat().st_size
    with pytest.raises(TraceError) as e:
        recover(path)
    assert "--cut" in e.value.fix
    assert (path / "ctx0" / "rows" / "experts.npy").stat().st_size == size


def test_a_trace_being_recorded_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "t"
    shutil.copytree(GOLDEN / "killed", path)
    ring = path / "ctx0" / "ring"
    data = bytearray(ring.read_bytes())
    put(data, "reader_pid", os.getppid())
    ring.write_bytes(data)
    with pytest.raises(TraceError, match="is being recorded"):
        recover(path)
    assert verify(path).live
    put(data, "reader_pid", 0)
    put(data, "host_pid", os.getppid())
    ring.write_bytes(reseal(data))
    with pytest.raises(MoetraceError, match="still runs"):
        recover(path)


def test_labels_count_only_if_whole(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t")
    with (path / "labels.jsonl").open("a") as f:
        f.write('{"request": 0, "label": "tampered", "crc": 1}\nnot json\n{"label": "whose?"}\n')
        f.write(json.dumps({"request": 2, "label": "by hand"}) + "\n")
    assert moetrace.open(path).requests["label"].tolist() == ["code", "math", "by hand"]
    assert len(verify(path).findings) == 4  # the last counts, but cannot be checked
