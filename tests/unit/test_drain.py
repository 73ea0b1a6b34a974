"""A drain in bad times: full disks, folders that go away, rings that nobody can read."""

from __future__ import annotations

import errno
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from plain_reader import read_trace
from rings import Producer, context_of, make_layout
from traces import Context, server_records, write_trace

import moetrace
from moetrace.errors import DiskError, GoneError, MoetraceError, TraceError
from moetrace.host import drain as drain_module
from moetrace.host.drain import Drain
from moetrace.trace.record import Counter, OnFull
from moetrace.trace.verify import verify
from moetrace.trace.writer import TraceWriter

native: Any = importlib.import_module("moetrace._native")
needs_native = pytest.mark.skipif(
    not hasattr(native, "RingWriter"), reason="moetrace's native module is not built here (pip install .)"
)

LAYOUT = make_layout()


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain that does not wait for long."""
    for name, seconds in {
        "SEAL_SECONDS": 0.01,
        "ATTACH_SECONDS": 0.001,
        "LOOK_SECONDS": 0.05,
        "RETRY_SECONDS": 0.02,
        "PATIENCE_SECONDS": 0.1,
    }.items():
        monkeypatch.setattr(drain_module, name, seconds)


class Disk:
    """Writes that fail while it is full, or by chance."""

    def __init__(self) -> None:
        self.full = False
        self.chance = 0.0
        self.failed = 0
        self.random = random.Random(5)

    def guard(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:
            if self.full or self.random.random() < self.chance:
                self.failed += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*arguments, **options)

        return guarded


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    for name in ("pwrite", "write", "posix_fallocate"):
        if hasattr(os, name):
            monkeypatch.setattr(os, name, made.guard(getattr(os, name)))
    return made


class Host:
    """moetrace's own producer, writing what a server would."""

    def __init__(self, trace: Path, name: str = "ctx0", capacity: int = 4096) -> None:
        folder = trace / name
        folder.mkdir()
        text = json.dumps({**context_of(LAYOUT), "counter_names": [c.name.lower() for c in Counter]})
        fields = [(f.name, f.dtype, list(f.shape)) for f in LAYOUT.fields]
        self.ring = folder / "ring"
        self.writer = native.RingWriter(str(self.ring), fields, text, capacity, int(OnFull.BLOCK), 10**7)
        with moetrace_ring(self.ring) as ring:
            self.dtype = ring.dtype

    def push(self, records: np.ndarray) -> None:
        laid_out = np.zeros(len(records), self.dtype)
        for name in records.dtype.names or ():
            laid_out[name] = records[name]
        self.writer.push(laid_out)


def moetrace_ring(path: Path) -> Any:
    from moetrace.trace.ring import Ring

    return Ring(path)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Told:
    """What a drain said."""

    def __init__(self) -> None:
        self.errors: list[MoetraceError] = []
        self.notes: list[str] = []

    def drain(self, trace: TraceWriter) -> Drain:
        drain = Drain(trace, self.errors.append, self.notes.append)
        drain.start()
        return drain


@pytest.fixture
def told() -> Told:
    return Told()


def same(whole: Path, path: Path) -> None:
    """Hold a trace against the one that was written in one go."""
    one, two = read_trace(whole), read_trace(path)
    for name, context in one["contexts"].items():
        for table in ("rows", "events"):
            for column, values in context[table].items():
                np.testing.assert_array_equal(values, two["contexts"][name][table][column], err_msg=column)
    pd.testing.assert_frame_equal(moetrace.open(whole).requests, moetrace.open(path).requests)
    assert verify(path).findings == ()


@needs_native
@pytest.mark.parametrize("seed", range(3))
def test_a_disk_that_fails_by_chance_costs_no_row(tmp_path: Path, disk: Disk, told: Told, seed: int) -> None:
    """GIVEN one write in a hundred that fails WHEN recording THEN the trace is the one of a disk that never did."""
    records = server_records(LAYOUT, np.random.default_rng(seed), n_requests=40)
    whole = write_trace(tmp_path / "whole", [Context(LAYOUT, records)])
    disk.random = random.Random(seed)
    trace = TraceWriter(tmp_path / "t")
    host = Host(trace.path)
    drain = told.drain(trace)
    until(lambda: bool(drain.contexts))
    disk.chance = 0.01
    for i, start in enumerate(range(0, len(records), 16)):
        host.push(records[start : start + 16])
        time.sleep(0.002)
        if i % 8 == 7:
            until(lambda: drain.waiting is None)
    disk.chance = 0.0
    host.writer.close("")
    until(lambda: all(context.ended for context in drain.contexts))
    drain.stop()
    trace.close()
    assert disk.failed > 0
    assert len(told.errors) == len(told.notes) > 0, "said when it begins, and when it goes on"
    assert all("nothing was lost" in note for note in told.notes)
    same(whole, trace.path)


@needs_native
def test_a_full_disk_is_waited_for(tmp_path: Path, disk: Disk, told: Told) -> None:
    """GIVEN a full disk WHEN rows find no room in the ring THEN they are lost and counted, and the rest is recorded."""
    records = server_records(LAYOUT, np.random.default_rng(1), n_requests=40)
    trace = TraceWriter(tmp_path / "t")
    host = Host(trace.path, capacity=128)
    drain = told.drain(trace)
    host.push(records[:50])
    until(lambda: drain.rows > 0)
    disk.full = True
    host.push(records[50:300])
    until(lambda: drain.waiting is not None)
    command = [sys.executable, "-m", "moetrace", "status", "--json", trace.path]
    (state,) = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert state["state"] == "waiting for the disk"
    assert "MiB free" in state["why"]
    run = subprocess.run(
        [sys.executable, "-m", "moetrace", "resume", trace.path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "goes on by itself" in run.stderr
    assert "kill" not in run.stderr
    disk.full = False
    until(lambda: drain.waiting is None)
    host.push(records[300:])
    host.writer.close("")
    drain.stop()
    trace.close()
    assert len(told.errors) == len(told.notes) == 1
    assert "No space left" in told.errors[0].why
    assert "rows were lost meanwhile" in told.notes[0]
    opened = moetrace.open(trace.path)
    assert 0 < opened.loss.rows_lost < 250
    assert len(opened) + opened.loss.rows_lost == 400
    assert verify(trace.path).findings == ()


@needs_native
def test_a_disk_that_stays_full(tmp_path: Path, disk: Disk, told: Told) -> None:
    """GIVEN a disk that is full to the end WHEN it has room again THEN recover takes the rest out of the ring."""
    records = server_records(LAYOUT, np.random.default_rng(1), n_requests=8)
    whole = write_trace(tmp_path / "whole", [Context(LAYOUT, records)])
    trace = TraceWriter(tmp_path / "t")
    host = Host(trace.path)
    drain = told.drain(trace)
    host.push(records[:50])
    until(lambda: drain.rows > 0)
    disk.full = True
    host.push(records[50:])
    host.writer.close("")
    until(lambda: drain.waiting is not None)
    with pytest.raises(MoetraceError, match="wait in the rings") as e:
        drain.stop()
    assert "moetrace recover" in e.value.fix
    assert trace.detached
    disk.full = False
    from moetrace.trace.recover import recover

    recover(trace.path)
    same(whole, trace.path)


@needs_native
def test_a_trace_that_is_moved_is_followed(tmp_path: Path, told: Told) -> None:
    records = server_records(LAYOUT, np.random.default_rng(1), n_requests=8)
    whole = write_trace(tmp_path / "whole", [Context(LAYOUT, records)])
    trace = TraceWriter(tmp_path / "t")
    host = Host(trace.path)
    drain = told.drain(trace)
    host.push(records[:50])
    until(lambda: drain.rows > 0)
    (tmp_path / "t").rename(tmp_path / "u")
    (tmp_path / "t").mkdir()  # somebody else's
    until(lambda: bool(told.notes))
    assert str(tmp_path / "u") in told.notes[0]
    host.push(records[50:])
    host.writer.close("")
    drain.stop()
    trace.close()
    assert trace.path == tmp_path / "u"
    same(whole, trace.path)
    assert list((tmp_path / "t").iterdir()) == []
    assert told.errors == []


@needs_native
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_a_trace_that_is_deleted(tmp_path: Path, told: Told, disk: Disk, again: bool, full: bool) -> None:
    """GIVEN a folder that goes away, perhaps for another WHEN recording THEN it is said, and nothing written."""
    trace = TraceWriter(tmp_path / "t")
    host = Host(trace.path)
    drain = told.drain(trace)
    records = server_records(LAYOUT, np.random.default_rng(1), n_requests=8)
    host.push(records[:50])
    until(lambda: drain.rows > 0)
    ring = moetrace_ring(host.ring)
    disk.full = full
    if full:
        host.push(records[50:60])
        until(lambda: drain.waiting is not None)
    shutil.rmtree(trace.path)
    if again:
        trace.path.mkdir()
    until(lambda: bool(told.errors) and isinstance(told.errors[-1], GoneError))
    assert drain.error is told.errors[-1]
    assert ring.paused, "the host need not wait for anybody"
    assert ring.reader_pid == 0
    ring.close()
    host.push(records[60:])
    host.writer.close("")
    with pytest.raises(GoneError):
        drain.stop()
    assert not trace.path.exists() or list(trace.path.iterdir()) == []


@needs_native
@pytest.mark.parametrize("how", ["cut", "deleted", "replaced"])
def test_files_that_are_tampered_with(tmp_path: Path, told: Told, how: str) -> None:
    trace = TraceWriter(tmp_path / "t")
    host = Host(trace.path)
    drain = told.drain(trace)
    host.push(server_records(LAYOUT, np.random.default_rng(1), n_requests=8))
    until(lambda: bool(drain.contexts) and drain.contexts[0].writer.rows.sealed == 80)
    token = trace.path / "ctx0" / "rows" / "token.npy"
    if how == "cut":
        os.truncate(token, 200)
    else:
        token.unlink()
    if how == "replaced":
        token.write_bytes(bytes(10_000))
    until(lambda: drain.error is not None)
    assert "token.npy was" in drain.error.what  # type: ignore[union-attr]
    with pytest.raises(TraceError, match=r"token.npy was"):
        drain.stop()
    host.writer.close("")
    if how == "replaced":
        assert token.read_bytes() == bytes(10_000)


def static_ring(folder: Path, records: np.ndarray, **numbers: int) -> None:
    """Write a ring whose host has ended."""
    folder.mkdir()
    producer = Producer(LAYOUT, 256, OnFull.BLOCK)
    producer.write(records)
    from rings import put

    for name, number in {"closed": 1, **numbers}.items():
        put(producer.data, name, number)
    (folder / "ring").write_bytes(producer.data)


def test_a_ring_that_cannot_be_read_ends_alone(tmp_path: Path, told: Told) -> None:
    """GIVEN rings that are damaged, half made, and gone at once WHEN recording THEN the good one is whole."""
    records = server_records(LAYOUT, np.random.default_rng(1), n_requests=4)
    whole = write_trace(tmp_path / "whole", [Context(LAYOUT, records)])
    trace = TraceWriter(tmp_path / "t")
    static_ring(trace.path / "ctx0", records)
    static_ring(trace.path / "ctx1", records, capacity=10**12)  # does not fit its checksum either
    static_ring(trace.path / "ctx2", records, ready=0)
    static_ring(trace.path / "ctx3", records, head=2, tail=5)  # contradict each other
    drain = told.drain(trace)
    until(lambda: len(told.errors) == 2)
    drain.stop()
    trace.close()
    assert sorted(error.what.split(" of ")[0] for error in told.errors) == ["ctx1", "ctx3"]
    assert drain.left_alone == told.errors
    assert not (trace.path / "ctx2").exists(), "there was nothing in it"
    np.testing.assert_array_equal(
        read_trace(whole)["contexts"]["ctx0"]["rows"]["token"],
        moetrace.open(trace.path, "ctx0").column("token"),
    )
    assert verify(trace.path).exit_code != 0, "what was left alone is missing"


@needs_native
def test_contexts_that_end_are_closed_at_once(tmp_path: Path, told: Told) -> None:
    """GIVEN a server that makes and frees contexts WHEN recording THEN each is closed, and its ring and files freed."""
    trace = TraceWriter(tmp_path / "t")
    drain = told.drain(trace)
    records = server_records(LAYOUT, np.random.default_rng(1), n_requests=2)
    n_files = 0

    def files() -> int:
        return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc").exists() else 0

    for i in range(30):
        host = Host(trace.path, f"ctx{i}", capacity=128)
        host.push(records)
        host.writer.close("")
        until(lambda n=i: len(drain.contexts) > n and drain.contexts[n].ended)  # type: ignore[misc]
        assert not host.ring.exists()
        n_files = n_files or files()
        # the drain may have one open this very moment
        until(lambda most=n_files: files() <= most)  # type: ignore[misc]
    drain.stop()
    trace.close()
    assert verify(trace.path).findings == ()
    assert [len(moetrace.open(trace.path, i)) for i in range(30)] == [20] * 30


@needs_native
def test_a_trace_is_fine_while_contexts_end(tmp_path: Path, told: Told) -> None:
    """GIVEN contexts that come and go, and a trace that is closed WHEN verified meanwhile THEN it is fine."""
    trace = TraceWriter(tmp_path / "t")
    drain = told.drain(trace)
    records = server_records(LAYOUT, np.random.default_rng(1), n_requests=2)
    found: list[Any] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            found.append(verify(trace.path))

    looking = threading.Thread(target=look)
    looking.start()
    for i in range(12):
        host = Host(trace.path, f"ctx{i}", capacity=128)
        host.push(records)
        time.sleep(0.03)
        host.writer.close("")
        until(lambda n=i: len(drain.contexts) > n and drain.contexts[n].ended)  # type: ignore[misc]
        looks = len(found)
        until(lambda n=looks: len(found) > n)  # type: ignore[misc]
    drain.stop()
    trace.close()
    ended.set()
    looking.join()
    assert len(found) > 5
    assert [result.findings for result in found if result.findings] == []
    assert found[0].live
    assert not verify(trace.path).live


@needs_native
def test_a_context_that_comes_and_goes_within_one_look(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GIVEN a context that appears and ends during a look WHEN it was half seen THEN the trace is looked at again."""
    trace = TraceWriter(tmp_path / "t")
    drain = told.drain(trace)
    records = server_records(LAYOUT, np.random.default_rng(1), n_requests=2)
    verifying: Any = sys.modules["moetrace.trace.verify"]
    ring_paths, counters = verifying.ring_paths, verifying._counters
    first, hosts = Host(trace.path, "ctx0", capacity=128), list[Host]()
    first.push(records)
    first.writer.close("")
    until(lambda: bool(drain.contexts) and drain.contexts[0].ended)

    def appear(path: Path) -> Any:
        before = ring_paths(path)
        if not hosts:
            hosts.append(Host(trace.path, "ctx1", capacity=128))
            hosts[0].push(records)
            until(lambda: len(drain.contexts) == 2)
        return before

    def end(context: Any) -> Any:
        seen = counters(context)
        if context.name == "ctx1" and not drain.contexts[1].ended:
            assert not seen
            hosts[0].writer.close("")
            until(lambda: drain.contexts[1].ended)
        return seen

    monkeypatch.setattr(verifying, "ring_paths", appear)
    monkeypatch.setattr(verifying, "_counters", end)
    assert verify(trace.path).findings == ()
    drain.stop()
    trace.close()


def test_no_room_for_files(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """GIVEN a process that may open no more files WHEN a ring appears THEN that is the reason, not a disk."""
    trace = TraceWriter(tmp_path / "t")
    real = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if "ctx0/rows" in str(path):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *arguments, **options)

    records = server_records(LAYOUT, np.random.default_rng(1), n_requests=4)
    whole = write_trace(tmp_path / "whole", [Context(LAYOUT, records)])
    static_ring(trace.path / "ctx0", records)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        drain = told.drain(trace)
        until(lambda: bool(told.errors))
    (error,) = told.errors
    assert "Too many open files" in error.why
    assert "ulimit -n" in error.fix
    assert not isinstance(error, DiskError)
    drain.stop()  # there is room again: what the ring held is taken
    trace.close()
    same(whole, trace.path)


@pytest.fixture(autouse=True)
def silent(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing but what is told: no traceback of a thread."""
    yield
    assert "Traceback" not in capsys.readouterr().err
