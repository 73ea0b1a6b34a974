"""Damage: every flipped bit of a trace is found, and no edit crashes a reader, hangs it or makes it fat."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scale import Figures, Size
from traces import tiny_trace

import moetrace
from moetrace.errors import MoetraceError, TraceError
from moetrace.trace.verify import verify

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600)]

MEMORY = 64 << 20


def peak_memory() -> int:
    """Give the largest resident size of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


@contextlib.contextmanager
def bounded(path: Path) -> Iterator[None]:
    """No more memory than the trace's size and 64 MB beyond what reading it whole once takes."""
    survey(path, everything=True)
    before = peak_memory()
    yield
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert peak_memory() - before <= size + MEMORY


def survey(path: Path, *, everything: bool) -> int:
    """Verify, and open too if asked; gives verify's exit code. Only MoetraceErrors may come out of either."""
    try:
        code = verify(path).exit_code
    except TraceError:
        code = 4
    if everything:
        with contextlib.suppress(MoetraceError), moetrace.open(path) as trace:
            _ = trace.requests, trace.events, trace.loss, trace.experts.sum()
    return code


def meaning(file: Path, data: bytes) -> object:
    """Give what a file says; \\udcff and \\udcfF are one character, and a label said twice is said once."""
    try:
        if file.suffix == ".json":
            return json.loads(data)
        if file.suffix == ".jsonl":
            return {json.dumps(json.loads(line), sort_keys=True) for line in data.splitlines()}
    except (ValueError, RecursionError):
        pass
    return data


def is_harmless(file: Path, old: bytes, new: bytes) -> bool:
    """Whether the edit says nothing else: by the format, bytes behind a column's last block count for nothing."""
    before, after = meaning(file, old), meaning(file, new)
    if file.suffix == ".jsonl" and isinstance(before, set) and isinstance(after, set):
        return after <= before  # how many labels there were is written nowhere
    return before == after or (file.suffix == ".npy" and new.startswith(old))


def test_flipped_bits(tmp_path: Path, size: Size, figures: Figures) -> None:
    path = tiny_trace(tmp_path / "t")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    picks = [(file, bit) for file in files for bit in range(8 * file.stat().st_size)]
    if size("flips") < len(picks):
        picks = random.Random(5).sample(picks, size("flips"))
    n_same = 0
    with bounded(path):
        for file, bit in picks:
            old = file.read_bytes()
            new = bytearray(old)
            new[bit // 8] ^= 1 << bit % 8
            with file.open("r+b") as f:
                f.write(new)
            # opening takes longer: one bit of each byte will do
            code = survey(path, everything=bit % 8 == bit // 8 % 8)
            same = is_harmless(file, old, bytes(new))
            n_same += same
            assert same or code in (3, 4), f"bit {bit} of {file.relative_to(path)}"
            with file.open("r+b") as f:
                f.write(old)
    assert verify(path).exit_code == 0
    figures(
        "corruption",
        **{
            "flipped bits": f"{len(picks):,}, {n_same:,} of which change no meaning; {len(picks) - n_same:,} found"
        },
    )


def edited(data: bytes, others: list[bytes], choose: random.Random) -> bytes:
    """Overwrite, insert, remove, repeat, splice or swap some bytes."""
    at, n = choose.randrange(len(data) + 1), min(choose.choice([1, 2, 4, 8, 64, 1024]), len(data))
    kind = choose.randrange(7)
    if kind == 0:
        return data[:at] + choose.randbytes(n) + data[at + n :]
    if kind == 1:
        return data[:at] + choose.randbytes(n) + data[at:]
    if kind == 2:
        return data[:at] + data[at + n :]
    if kind == 3:
        return data[:at] + data[at : at + n] * 2 + data[at + n :]
    if kind == 4:
        return data[:at] + choose.choice([b"\0", b"\xff", b"9", b"\x7f"]) * n + data[at + n :]
    if kind == 5:
        return data[:at] + choose.choice(others)[at:]
    return data[at:] + data[:at]


def test_random_edits(tmp_path: Path, size: Size, figures: Figures) -> None:
    path = tiny_trace(tmp_path / "t")
    whole = {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    choose = random.Random(8)
    n_found = n_same = 0
    with bounded(path):
        for i in range(size("edits")):
            changed = {file: edited(whole[file], list(whole.values()), choose)
                       for file in choose.sample(list(whole), choose.choice([1, 1, 1, 2]))}  # fmt: skip
            for file, data in changed.items():
                file.write_bytes(data)
            code = survey(path, everything=i % 8 == 0)
            same = all(is_harmless(file, whole[file], data) for file, data in changed.items())
            n_same += same
            n_found += not same
            assert same or code in (3, 4), [file.relative_to(path) for file in changed]
            for file in changed:
                file.write_bytes(whole[file])
    assert verify(path).exit_code == 0
    figures(
        "corruption",
        **{
            "random edits": f"{n_found + n_same:,}, {n_same:,} of which change no meaning; {n_found:,} found",
            "memory": f"within the trace's size and {MEMORY >> 20} MiB",
        },
    )
