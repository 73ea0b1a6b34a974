"""Rings that the C++ producer writes, read through the real atomics while it writes."""

from __future__ import annotations

import importlib
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rings import make_layout, random_records

from moetrace.trace.record import OnFull
from moetrace.trace.ring import Ring, ring_is_ready

native: Any = importlib.import_module("moetrace._native")
pytestmark = pytest.mark.skipif(
    not hasattr(native, "RingWriter"), reason="moetrace's native module is not built here (pip install .)"
)

LAYOUT = make_layout()
N = 5_000


def produce(path: Path, capacity: int, on_full: OnFull) -> tuple[Any, np.ndarray]:
    """Make a ring and what is to go through it, laid out as the host wants it."""
    fields = [(f.name, f.dtype, list(f.shape)) for f in LAYOUT.fields]
    writer = native.RingWriter(str(path), fields, "{}", capacity, int(on_full), 10_000_000_000)
    assert ring_is_ready(path)
    with Ring(path) as ring:
        records = np.zeros(N, ring.dtype)
    told = random_records(LAYOUT, N, np.random.default_rng(4))
    for name in told.dtype.names or ():
        records[name] = told[name]
    return writer, records


@pytest.mark.parametrize("capacity", [2, 64, 4096])
@pytest.mark.parametrize("on_full", list(OnFull))
def test_produced_is_read_plus_lost(tmp_path: Path, capacity: int, on_full: OnFull) -> None:
    """GIVEN a C++ producer in a thread WHEN read meanwhile THEN each is whole, and read once or lost."""
    path = tmp_path / "ring"
    writer, records = produce(path, capacity, on_full)

    def push() -> None:
        for start in range(0, N, 50):
            writer.push(records[start : start + 50])
        writer.close()

    serials: list[np.ndarray] = []
    lost = 0
    with Ring(path, claim=True) as ring:
        thread = threading.Thread(target=push)
        thread.start()
        while True:
            done = ring.closed
            if on_full == OnFull.OVERWRITE:
                taken, overwritten = ring.snapshot()
                lost += overwritten
                parts, n = [taken], len(taken) + overwritten
            else:
                parts = ring.pending()
                n = sum(map(len, parts))
            for part in parts:
                serial = part["serial"].copy()
                np.testing.assert_array_equal(part["experts"], records["experts"][serial])
                np.testing.assert_array_equal(part["weights"], records["weights"][serial])
                serials.append(serial)
            del parts
            ring.release(n)
            if done and n == 0:
                break
            time.sleep(0.0002)
        thread.join()
        counters = ring.counters
    read = np.concatenate(serials)
    assert (np.diff(read.astype(np.int64)) > 0).all()
    assert counters["rows_produced"] == N
    assert len(read) + lost + counters["rows_lost_full"] == N
    if on_full == OnFull.BLOCK:
        assert len(read) == N
