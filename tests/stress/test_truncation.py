"""Files cut short: what opens is a prefix, what is missing is told, and nothing crashes."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from plain_reader import read_trace
from scale import ROOT, Figures, Size
from traces import tiny_trace

import moetrace
from moetrace.errors import MoetraceError, TraceError
from moetrace.trace.recover import recover
from moetrace.trace.ring import Ring
from moetrace.trace.verify import verify

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600)]

GOLDEN = ROOT / "tests" / "golden"


def cuts(path: Path, wanted: int) -> Iterator[tuple[Path, int]]:
    """Cut each file at every byte but the last, longest first; or at some, the same in every run."""
    sizes = [
        (file, size)
        for file in sorted(path.rglob("*"))
        if file.is_file()
        for size in range(file.stat().st_size)
    ]
    if wanted < len(sizes):
        sizes = random.Random(6).sample(sizes, wanted)
    for file, size in sizes:
        whole = file.read_bytes()
        os.truncate(file, size)
        yield file, size
        file.write_bytes(whole)


def test_columns(tmp_path: Path, size: Size, figures: Figures) -> None:
    path = tiny_trace(tmp_path / "t")
    plain = read_trace(path)["contexts"]["ctx0"]["rows"]
    n_cut = n_opened = n_refused = 0
    for file, length in cuts(path, size("cuts")):
        n_cut += 1
        try:
            with moetrace.open(path) as trace:
                n = len(trace)
                assert n <= len(plain["serial"])
                assert trace.experts.tobytes() == plain["experts"][:n].tobytes()
                if length % 8 == 0:  # takes longer; one cut in eight will do
                    assert len(trace.activations()) == int((trace.experts != 255).sum())
                    _ = trace.requests, trace.events, trace.loss
            n_opened += 1
        except MoetraceError as e:
            n_refused += bool(e.why or e.fix)
        told = True
        with contextlib.suppress(TraceError):
            told = verify(path).exit_code in (3, 4)
        # labels and vocabulary need not be there; a line break at a file's end says nothing
        optional = length == 0 and file.name in ("labels.jsonl", "vocabulary.json")
        line_break = file.suffix in (".json", ".jsonl") and file.read_bytes().endswith(b"}")
        assert told or optional or line_break, f"{file.relative_to(path)} cut to {length}"
    assert verify(path).exit_code == 0
    figures(
        "truncation",
        **{
            "cuts of a trace's files": f"{n_cut:,}: {n_opened:,} open as a prefix, {n_refused:,} are refused with the "
            "reason; verify tells of all"
        },
    )


def test_rings(tmp_path: Path, size: Size, figures: Figures) -> None:
    """GIVEN a killed recording whose ring was cut WHEN recovered THEN what was sealed stays, and the ring too."""
    path = tmp_path / "t"
    shutil.copytree(GOLDEN / "killed", path)
    ring = path / "ctx0" / "ring"
    whole = ring.read_bytes()
    lengths = range(len(whole))
    chosen = lengths if size("cuts") > len(whole) else sorted(random.Random(7).sample(lengths, size("cuts")))
    for length in reversed(chosen):
        os.truncate(ring, length)
        with pytest.raises(TraceError) as e:
            Ring(ring)
        assert e.value.why
    n_recovered = 0
    for length in list(chosen)[:: max(1, len(chosen) // 40)]:
        again = tmp_path / "again"
        shutil.copytree(GOLDEN / "killed", again)
        os.truncate(again / "ctx0" / "ring", length)
        (done,) = recover(again).contexts
        assert "left alone" in done.note
        assert (again / "ctx0" / "ring").stat().st_size == length
        assert len(moetrace.open(again)) == done.sealed > 0
        shutil.rmtree(again)
        n_recovered += 1
    figures(
        "truncation",
        **{
            "cuts of a ring": f"{len(chosen):,}: all refused with the reason; {n_recovered} recovered to the last seal"
        },
    )
