"""Rings: what a reader sees, hands back, and refuses."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from rings import Producer, make_layout, put, random_records, reseal, ring_bytes

from moetrace.errors import TraceError
from moetrace.trace.record import RING_HEADER, Counter, OnFull, RecordKind, field_offset
from moetrace.trace.ring import Ring, ring_is_ready
from moetrace.trace.rows import Layout, events_from_records, rows_from_records

LAYOUT = make_layout()
BIG = [2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def test_pending_is_a_view_of_the_file(tmp_path: Path, rng: np.random.Generator) -> None:
    producer = Producer(LAYOUT, 8)
    records = random_records(LAYOUT, 5, rng)
    producer.write(records)
    with Ring(producer.save(tmp_path / "ring")) as ring:
        (view,) = ring.pending()
        assert not view.flags.owndata
        assert not view.flags.writeable
        assert np.shares_memory(view, np.frombuffer(ring._buffer, np.uint8))
        np.testing.assert_array_equal(view["experts"], records["experts"])
        np.testing.assert_array_equal(view["stamp"], np.arange(1, 6))
        assert ring.counters["rows_committed"] == 5
        assert not ring.closed
        assert ring.status == ""
        del view


def test_pending_wraps_around(tmp_path: Path, rng: np.random.Generator) -> None:
    producer = Producer(LAYOUT, 8)
    records = random_records(LAYOUT, 12, rng)
    producer.write(records)
    put(producer.data, "tail", 5)
    with Ring(producer.save(tmp_path / "ring"), claim=True) as ring:
        segments = ring.pending()
        assert [len(s) for s in segments] == [3, 4]
        assert np.concatenate([s["serial"] for s in segments]).tolist() == list(range(5, 12))
        ring.release(3)
        (rest,) = ring.pending()
        assert rest["serial"].tolist() == [8, 9, 10, 11]
        with pytest.raises(ValueError, match="cannot release 5"):
            ring.release(5)
        del segments, rest
    data = (tmp_path / "ring").read_bytes()
    header = np.frombuffer(data[:640], RING_HEADER)[0]
    assert header["tail"] == 8
    assert header["reader_pid"] == 0
    assert header["reader_beat_ns"] > 0


def test_paused_is_written_through(tmp_path: Path) -> None:
    path = Producer(LAYOUT, 2).save(tmp_path / "ring")
    with Ring(path) as ring, Ring(path) as other:
        ring.paused = True
        assert other.paused
        other.paused = False
        assert not ring.paused


def test_one_reader_at_a_time(tmp_path: Path) -> None:
    producer = Producer(LAYOUT, 2)
    put(producer.data, "reader_pid", os.getppid())
    path = producer.save(tmp_path / "ring")
    with pytest.raises(TraceError, match="already has a reader"):
        Ring(path, claim=True)
    with Ring(path) as ring:
        assert ring.reader_pid == os.getppid()


def test_a_dead_reader_is_succeeded(tmp_path: Path) -> None:
    producer = Producer(LAYOUT, 2)
    put(producer.data, "reader_pid", 2**22 + 5)  # beyond Linux's largest process number
    with Ring(producer.save(tmp_path / "ring"), claim=True) as ring:
        assert ring.reader_pid == os.getpid()


def test_snapshot_counts_what_was_overwritten(tmp_path: Path, rng: np.random.Generator) -> None:
    producer = Producer(LAYOUT, 4, OnFull.OVERWRITE)
    producer.write(random_records(LAYOUT, 11, rng))
    with Ring(producer.save(tmp_path / "ring"), claim=True) as ring:
        with pytest.raises(TraceError, match="snapshot"):
            ring.pending()
        records, overwritten = ring.snapshot()
        assert records["serial"].tolist() == [7, 8, 9, 10]
        assert overwritten == 7
        ring.release(len(records) + overwritten)
        assert ring.snapshot()[1] == 0
        assert len(ring.snapshot()[0]) == 0


def test_snapshot_leaves_out_a_record_being_written(tmp_path: Path, rng: np.random.Generator) -> None:
    producer = Producer(LAYOUT, 4, OnFull.OVERWRITE)
    producer.write(random_records(LAYOUT, 6, rng))
    stamp = producer._start + 2 * producer.dtype.itemsize  # the oldest record's slot
    producer.data[stamp : stamp + 8] = bytes(8)
    with Ring(producer.save(tmp_path / "ring")) as ring:
        records, overwritten = ring.snapshot()
        assert records["serial"].tolist() == [3, 4, 5]
        assert overwritten == 3


def test_ready(tmp_path: Path) -> None:
    assert not ring_is_ready(tmp_path / "ring")
    data = ring_bytes(LAYOUT, 2)
    put(data, "ready", 0)
    (tmp_path / "ring").write_bytes(data)
    assert not ring_is_ready(tmp_path / "ring")
    with pytest.raises(TraceError, match="not finished"):
        Ring(tmp_path / "ring")
    put(data, "ready", 1)
    (tmp_path / "ring").write_bytes(data)
    assert ring_is_ready(tmp_path / "ring")


def test_newer_major_version_is_refused_by_name(tmp_path: Path) -> None:
    data = ring_bytes(LAYOUT, 2)
    put(data, "version_major", 2)
    (tmp_path / "ring").write_bytes(reseal(data))
    with pytest.raises(TraceError, match=r"format 2\.\d+; this moetrace reads 1\.\d+"):
        Ring(tmp_path / "ring")


def test_newer_minor_version_opens(tmp_path: Path) -> None:
    data = ring_bytes(LAYOUT, 2)
    put(data, "version_minor", 7)
    (tmp_path / "ring").write_bytes(reseal(data))
    with Ring(tmp_path / "ring") as ring:
        assert ring.version == (1, 7)


FACTS = ("header_size", "file_size", "data_offset", "capacity", "stride", "n_fields", "fields_offset")
HARMLESS = {("capacity", 1), ("on_full", 0), ("on_full", 1), ("n_fields", 0), ("n_fields", 1)}


@pytest.mark.parametrize("value", [0, 1, 63, *BIG])
@pytest.mark.parametrize("name", [*FACTS, "meta_offset", "meta_size", "on_full"])
def test_lying_headers_are_refused(tmp_path: Path, name: str, value: int) -> None:
    """GIVEN a number that lies, under a checksum that fits WHEN opened THEN refused, or true after all."""
    data = ring_bytes(LAYOUT, 4)
    value %= 1 << (8 * RING_HEADER[name].itemsize)
    put(data, name, value)
    (tmp_path / "ring").write_bytes(reseal(data))
    if (name, value) in HARMLESS:
        Ring(tmp_path / "ring").close()
    else:
        with pytest.raises(TraceError):
            Ring(tmp_path / "ring")


@pytest.mark.parametrize("value", BIG)
@pytest.mark.parametrize("part", ["offset", "n_dims", "shape"])
def test_lying_fields_are_refused(tmp_path: Path, part: str, value: int) -> None:
    data = ring_bytes(LAYOUT, 4)
    at = 640 + {"offset": 48, "n_dims": 52, "shape": 56}[part]
    data[at : at + 4] = (value % 2**32).to_bytes(4, "little")
    (tmp_path / "ring").write_bytes(reseal(data))
    with pytest.raises(TraceError):
        Ring(tmp_path / "ring")


@pytest.mark.parametrize(
    ("head", "tail"), [(0, 1), (9, 0), (2**64 - 1, 0), (0, 2**64 - 1), (2**63, 2**63 - 9)]
)
def test_head_and_tail_that_contradict(tmp_path: Path, head: int, tail: int) -> None:
    data = ring_bytes(LAYOUT, 8)
    put(data, "head", head)
    put(data, "tail", tail)
    (tmp_path / "ring").write_bytes(data)
    with Ring(tmp_path / "ring") as ring, pytest.raises(TraceError, match="head"):
        ring.pending()


def test_every_bit_of_the_constants_is_checked(tmp_path: Path) -> None:
    whole = ring_bytes(LAYOUT, 1)
    fields_end = int(np.frombuffer(bytes(whole[:640]), RING_HEADER)[0]["meta_offset"])
    text_end = fields_end + int(np.frombuffer(bytes(whole[:640]), RING_HEADER)[0]["meta_size"])
    crc_end = field_offset(RING_HEADER, "crc") + 4
    path = tmp_path / "ring"
    for at in [*range(crc_end), *range(640, text_end)]:
        data = bytearray(whole)
        data[at] ^= 1 << (at % 8)
        path.write_bytes(data)
        with pytest.raises(TraceError):
            Ring(path)


def test_cut_at_every_byte(tmp_path: Path) -> None:
    whole = ring_bytes(LAYOUT, 1)
    path = tmp_path / "ring"
    path.write_bytes(whole)
    for size in range(len(whole) - 1, -1, -1):
        os.truncate(path, size)
        with pytest.raises(TraceError):
            Ring(path)


def test_a_symlink_is_not_followed(tmp_path: Path) -> None:
    Producer(LAYOUT, 2).save(tmp_path / "real")
    (tmp_path / "ring").symlink_to(tmp_path / "real")
    with pytest.raises(TraceError):
        Ring(tmp_path / "ring")


# -- rows out of records ---------------------------------------------------------------------------------


def test_rows_and_events_are_told_apart(rng: np.random.Generator) -> None:
    records = random_records(LAYOUT, 4, rng)
    records["kind"][1] = RecordKind.EVENT
    records["token"][1], records["position"][1], records["arg0"][1], records["arg1"][1] = 2, 3, 9, -4
    rows, events = rows_from_records(records, LAYOUT), events_from_records(records, LAYOUT)
    assert rows["serial"].tolist() == [0, 2, 3]
    assert rows["experts"].dtype == np.uint8
    assert rows["experts"].shape == (3, 3, 2)
    assert {n: events[n].tolist() for n in ("code", "p0", "p1", "arg")} == {
        "code": [2],
        "p0": [3],
        "p1": [9],
        "arg": [-4],
    }


def test_rows_are_copies_even_of_one_record(rng: np.random.Generator) -> None:
    records = random_records(LAYOUT, 1, rng)
    rows = rows_from_records(records, LAYOUT)
    assert not any(np.shares_memory(column, records) for column in rows.values())


def test_absent_layers_hold_sentinels_whatever_the_record_held(rng: np.random.Generator) -> None:
    layout = make_layout(channels=("experts", "weights", "logits", "gate_input", "tensor.x"))
    records = random_records(layout, 3, rng)
    records["state"][0, 2] = 2
    records["state"][1, 0] = 0
    rows = rows_from_records(records, layout)
    for i, layer in ((0, 2), (1, 0)):
        assert (rows["experts"][i, layer] == 255).all()
        for name in ("weights", "logits", "gate_input"):
            assert np.isnan(rows[name][i, layer]).all()
    assert not np.isnan(rows["tensor.x"]).any()
    np.testing.assert_array_equal(rows["experts"][2], records["experts"][2])


def test_layers_that_differ_are_filled_up(rng: np.random.Generator) -> None:
    layout = make_layout(n_expert=(300, 8, 300), k=(4, 2, 4), channels=("experts", "weights", "logits"))
    rows = rows_from_records(random_records(layout, 5, rng), layout)
    assert layout.sentinel == 65535
    assert (rows["experts"][:, 1, 2:] == 65535).all()
    assert (rows["experts"][:, 1, :2] < 8).all()
    assert np.isnan(rows["weights"][:, 1, 2:]).all()
    assert np.isnan(rows["logits"][:, 1, 8:]).all()
    assert not np.isnan(rows["logits"][:, 0]).any()


@pytest.mark.parametrize(
    "change",
    [
        {"layers": []},
        {"layers": [2, 1, 0]},
        {"layers": [0, 1]},
        {"layers": [0, 1, "2"]},
        {"n_expert": [8, 8, 10**9]},
        {"n_expert_used": [2, 2, 9]},
        {"n_expert_used": [2, 2, True]},
        {"layers": None},
    ],
)
def test_layouts_that_make_no_sense(change: dict[str, object]) -> None:
    good = {"layers": [0, 1, 2], "n_expert": [8, 8, 8], "n_expert_used": [2, 2, 2]}
    Layout.from_context(good, LAYOUT.fields)
    with pytest.raises(TraceError):
        Layout.from_context({**good, **change}, LAYOUT.fields)


def test_counter_names_come_from_the_ring(tmp_path: Path) -> None:
    producer = Producer(LAYOUT, 2, counter_names=["rows_produced", "rows_committed", "something_new"])
    producer.count(Counter(2), 5)
    with Ring(producer.save(tmp_path / "ring")) as ring:
        assert ring.counters == {"rows_produced": 0, "rows_committed": 0, "something_new": 5}
