"""Going on after a recorder's death: the trace becomes what it would have become."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from plain_reader import read_trace
from rings import change_ring, make_layout, put
from traces import Context, server_records, write_trace

import moetrace
from moetrace.errors import MoetraceError, TraceError
from moetrace.host.resume import ResumedRecording
from moetrace.trace.attention import AttentionAssembler
from moetrace.trace.jsonfile import read_json, write_json
from moetrace.trace.record import Counter, Field, RecordKind, record_dtype
from moetrace.trace.recover import recover
from moetrace.trace.ring import Ring, process_alive
from moetrace.trace.store import TraceStore
from moetrace.trace.verify import verify
from moetrace.trace.writer import TraceWriter, final_counters

GOLDEN = Path(__file__).parents[1] / "golden"


def killed(folder: Path, sealed: int) -> tuple[Path, Path]:
    """Write a trace as it would have been closed, and the same one with its recorder killed and its host alive."""
    layout = make_layout()
    context = Context(layout, server_records(layout, np.random.default_rng(2), lose=(5,)), lost=1)
    whole = write_trace(folder / "whole", [context])
    path = write_trace(folder / "killed", [context], close=False, sealed=min(sealed, len(context.records)))
    change_ring(path / "ctx0" / "ring", host_pid=os.getpid())
    return whole, path


def same(a: Path, b: Path) -> None:
    one, two = read_trace(a), read_trace(b)
    for table in ("rows", "events"):
        for name, column in one["contexts"]["ctx0"][table].items():
            np.testing.assert_array_equal(column, two["contexts"]["ctx0"][table][name], err_msg=name)
    pd.testing.assert_frame_equal(moetrace.open(a).requests, moetrace.open(b).requests)


@pytest.mark.parametrize("sealed", range(0, 40, 4))
def test_resuming_gives_what_the_first_drain_would_have(tmp_path: Path, sealed: int) -> None:
    whole, path = killed(tmp_path, sealed)
    recording = ResumedRecording(path)
    assert recording.host_alive
    with pytest.raises(TraceError, match="is being recorded"):
        TraceWriter.resume(path)  # one at a time
    recording.finish()
    same(whole, path)
    assert verify(path).findings == ()
    assert not (path / "ctx0" / "ring").exists()
    assert moetrace.open(path).meta["state"] == "closed"


def test_letting_go_and_taking_up_again(tmp_path: Path) -> None:
    whole, path = killed(tmp_path, 12)
    for _ in range(3):
        recording = ResumedRecording(path)
        recording.detach()
        assert TraceStore(path).live
        assert (path / "ctx0" / "ring").exists()
    ResumedRecording(path).finish()
    same(whole, path)


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    whole, path = killed(tmp_path, 12)
    with pytest.raises(TraceError, match="is closed"):
        ResumedRecording(whole)
    ring = path / "ctx0" / "ring"
    change_ring(ring, reader_pid=os.getppid())
    with pytest.raises(TraceError, match="is being recorded"):
        ResumedRecording(path)
    change_ring(ring, reader_pid=0, host_pid=2**22 + 7)
    with pytest.raises(TraceError, match="has ended") as e:
        ResumedRecording(path)
    assert "moetrace recover" in e.value.fix
    ledger = path / "ctx0" / "rows" / "blocks.npy"
    data = bytearray(ledger.read_bytes())
    data[1030] ^= 1  # the first block, with good ones behind it
    ledger.write_bytes(data)
    change_ring(ring, host_pid=os.getpid())
    with pytest.raises(TraceError, match="is damaged"):
        ResumedRecording(path)


def test_a_context_that_was_never_listed(tmp_path: Path) -> None:
    """GIVEN a drain killed before it had listed a context WHEN recovered THEN the ring's rows are all there."""
    layout = make_layout()
    context = Context(layout, server_records(layout, np.random.default_rng(2)))
    whole = write_trace(tmp_path / "whole", [context])
    path = write_trace(tmp_path / "killed", [context], close=False, sealed=0)
    meta = read_json(path / "meta.json")
    write_json(path / "meta.json", {**meta, "contexts": []})
    (path / "ctx0" / "context.json").unlink()
    shutil.rmtree(path / "ctx0" / "events")
    (path / "ctx0" / "rows" / "token.npy").unlink()  # half made
    (done,) = recover(path).contexts
    assert done.recovered == 30
    same(whole, path)
    assert verify(path).findings == ()


def test_a_host_killed_before_it_counted(tmp_path: Path) -> None:
    """GIVEN rows in the ring that the host's counters lack WHEN recovered THEN the sum is exact again."""
    context = Context(make_layout(), server_records(make_layout(), np.random.default_rng(2)))
    path = write_trace(tmp_path / "t", [context], close=False, sealed=12)
    data = bytearray((path / "ctx0" / "ring").read_bytes())
    for counter in (Counter.ROWS_PRODUCED, Counter.ROWS_COMMITTED):
        put(data, "counters", 27, int(counter))
    put(data, "counters", 5, int(Counter.EVENTS_COMMITTED))
    (path / "ctx0" / "ring").write_bytes(data)
    recover(path)
    assert verify(path).findings == ()
    counters = moetrace.open(path).counters
    assert counters["rows_produced"] == counters["rows_committed"] == 30
    assert counters["events_committed"] == 9


def test_a_trace_being_written_is_not_replaced(tmp_path: Path) -> None:
    trace = TraceWriter(tmp_path / "t")
    with pytest.raises(MoetraceError, match="is being recorded"):
        TraceWriter(tmp_path / "t", force=True)
    trace.close()
    TraceWriter(tmp_path / "t", force=True).close()


def test_a_zombie_is_dead() -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("there is no /proc here")
    child = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 60
    while process_alive(child.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert child.wait() == 0


def test_pieces_of_an_attention_row_are_held() -> None:
    """GIVEN a row of attention cut by the end of a feed WHEN asked THEN its pieces are held, and nothing else."""
    dtype = record_dtype([Field("state", "|u1", (1,), 64), Field("attention", "<f4", (1024,), 128)], 4224)
    records = np.zeros(5, dtype)
    records["kind"] = [
        RecordKind.ROW,
        RecordKind.ATTENTION,
        RecordKind.ATTENTION,
        RecordKind.ATTENTION,
        RecordKind.ROW,
    ]
    records["n_sequences"], records["sequence"] = 1, 3000
    records["row"], records["arg0"] = [0, 0, 1024, 2048, 0], [0, 1024, 1024, 952, 0]
    assembler = AttentionAssembler()
    index, _ = assembler.feed(records[:3])
    assert len(index["serial"]) == 0
    assert assembler.held == 2
    index, values = assembler.feed(records[3:])
    assert assembler.held == 0
    assert index["n_keys"].tolist() == [3000]
    assert len(values["value"]) == 3000 == assembler.offset


def test_the_command_refuses_in_words(tmp_path: Path) -> None:
    path = tmp_path / "t"
    shutil.copytree(GOLDEN / "killed", path)
    command = [sys.executable, "-m", "moetrace", "resume", path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert "moetrace recover" in run.stderr
    assert "Traceback" not in run.stderr
    assert json.loads((path / "meta.json").read_text())["state"] == "live"


@pytest.mark.parametrize("upto", [1, 14, 27, 39])
def test_a_context_that_ends_while_another_goes_on(tmp_path: Path, upto: int) -> None:
    """GIVEN requests of one context whose rows are not sealed yet WHEN another one is closed, and then the recorder
    dies, THEN what it takes from the ring again is what it would have been.
    """
    layout = make_layout(numbered=True)
    context = Context(layout, server_records(layout, np.random.default_rng(2)))
    path = write_trace(tmp_path / "t", [context, context], close=False, sealed=0)
    trace = TraceWriter.resume(path)
    first, second = trace.contexts
    with Ring(first.path / "ring") as ring:
        first.append(ring.snapshot()[0][:upto])
    with Ring(second.path / "ring") as ring:
        second.append(ring.snapshot()[0])
        second.seal()
        second.close(final_counters(ring, second))
    (second.path / "ring").unlink()
    trace.detach()
    assert verify(path).exit_code == 3
    recover(path)
    assert verify(path).findings == ()
    with moetrace.open(path) as after:
        assert len(after.requests) == 6
        request = np.asarray(after.request)
        for number in after.requests.index:
            assert (request == number).sum() == 10
