"""Hostile neighbours: planted links, lying headers, other people's folders, and things that would run."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rings import Producer, make_layout, put, random_records, reseal, ring_bytes
from scale import ROOT, Figures
from traces import small_trace

import moetrace
from moetrace.errors import MoetraceError, TraceError
from moetrace.host.drain import Drain
from moetrace.trace.importers.writer import import_trace
from moetrace.trace.jsonfile import read_json, write_json
from moetrace.trace.labels import append_labels
from moetrace.trace.record import RING_HEADER, OnFull
from moetrace.trace.recover import recover
from moetrace.trace.ring import Ring
from moetrace.trace.store import TraceStore
from moetrace.trace.verify import verify
from moetrace.trace.writer import TraceWriter

pytestmark = [pytest.mark.stress, pytest.mark.timeout(900)]

LAYOUT = make_layout()
NOBODY = 65534


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder: mode and bytes (or where a link leads)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        data = (
            os.fsencode(path.readlink())
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else b""
        )
        found[str(path.relative_to(folder))] = (path.lstat().st_mode, data)
    return found


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder that nothing may be written to: files that planted links lead to."""
    folder = tmp_path / "victim"
    folder.mkdir()
    for name in ("file", "meta.json", "ring", "labels.jsonl", "experts.npy"):
        (folder / name).write_text("precious\n")
    return folder


# -- links ---------------------------------------------------------------------------------------------------


def plant_output(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def plant_file(path: Path, victim: Path) -> None:
    path.symlink_to(victim / "file")


def plant_dangling(path: Path, victim: Path) -> None:
    path.symlink_to(victim / "new")


@pytest.mark.parametrize("plant", [plant_output, plant_file, plant_dangling])
@pytest.mark.parametrize("force", [False, True])
def test_links_planted_at_the_output(
    plant: Callable[[Path, Path], None], force: bool, victim: Path, tmp_path: Path
) -> None:
    """GIVEN a link where the trace is to be made WHEN recording THEN refused, forced or not; nothing is touched."""
    before = snapshot(victim)
    path = tmp_path / "t.moet"
    plant(path, victim)
    with pytest.raises(MoetraceError, match="not a moetrace trace"):
        TraceWriter(path, force=force)
    assert snapshot(victim) == before


def test_links_planted_in_the_trace_while_it_is_made(victim: Path, tmp_path: Path) -> None:
    """GIVEN links planted in the folder where tables, rings and JSON go WHEN recording THEN none is followed."""
    before = snapshot(victim)
    for name in ("ctx0/rows", "ctx0/events", "ctx0/context.json", "labels.jsonl", "vocabulary.json"):
        folder = tmp_path / "t"
        trace = TraceWriter(folder)
        (folder / "ctx0").mkdir()
        (folder / name).symlink_to(victim if "." not in name else victim / "file")
        told: list[MoetraceError] = []
        producer = Producer(LAYOUT, 64, OnFull.BLOCK)
        producer.write(random_records(LAYOUT, 20, np.random.default_rng(0)))
        producer.data[140] = 1
        producer.save(folder / "ctx0" / "ring")
        drain = Drain(trace, told.append)
        try:
            drain.start()
            drain.stop()
            trace.close()
            append_labels(folder, [{"request": 0, "label": "x"}])
        except MoetraceError as e:
            told.append(e)
        trace.detach()
        assert snapshot(victim) == before, name
        shutil.rmtree(folder)


def test_links_in_a_trace_that_is_mended(victim: Path, tmp_path: Path) -> None:
    """GIVEN a killed recording in which columns, ledger or ring became links WHEN recovered THEN none is written to."""
    before = snapshot(victim)
    for name in ("ctx0/rows/experts.npy", "ctx0/rows/blocks.npy", "ctx0/events/code.npy", "requests/request.npy",
                 "ctx0/ring", "ctx0/context.json", "meta.json", "ctx0/rows", "ctx0"):  # fmt: skip
        folder = tmp_path / "t"
        shutil.copytree(ROOT / "tests" / "golden" / "killed", folder)
        # what the link leads to is as good as what it replaces: only that it is a link tells
        target = victim / f"was-{name.replace('/', '-')}"
        (folder / name).rename(target)
        (folder / name).symlink_to(target)
        planted = snapshot(victim)
        with contextlib.suppress(MoetraceError):
            recover(folder)
        after = snapshot(victim)
        assert {k: v for k, v in after.items() if k in planted} == planted, name
        assert after.keys() == planted.keys(), name
        shutil.rmtree(folder)
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert snapshot(victim) == before


def test_rings_are_their_owners_alone(tmp_path: Path) -> None:
    """GIVEN a careless umask WHEN a recording is made THEN its folder is 0700 and its ring 0600."""
    native = pytest.importorskip("moetrace._native")
    if not hasattr(native, "RingWriter"):
        pytest.skip("moetrace's native module is not built here")
    old = os.umask(0)
    try:
        trace = TraceWriter(tmp_path / "t")
        (tmp_path / "t" / "ctx0").mkdir()
        writer = native.RingWriter(str(tmp_path / "t" / "ctx0" / "ring"), [("state", "|u1", [3])])
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "t" / "ctx0" / "ring").stat().st_mode) == 0o600
    writer.close("")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="open"):
        native.RingWriter(str(tmp_path / "link"), [("state", "|u1", [3])])
    assert not (tmp_path / "elsewhere").exists()
    trace.detach()


# -- other people's folders ------------------------------------------------------------------------------------


def as_nobody(act: Callable[[], object]) -> str:
    """Act as another user, in a process of its own; gives what came out of it. Skips where we may not become one."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    ours, theirs = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            told = repr(act())
        except BaseException as e:
            told = f"{type(e).__name__}: {e}"
        os.write(theirs, told.encode()[:4000])
        os._exit(0)
    os.close(theirs)
    os.waitpid(pid, 0)
    with os.fdopen(ours) as f:
        return f.read()


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_another_user(force: bool) -> None:
    """GIVEN a trace of another user that anybody may write to WHEN recording over it THEN it stays as it is."""
    with tempfile.TemporaryDirectory() as shared:
        Path(shared).chmod(0o755)
        theirs = small_trace(Path(shared) / "theirs.moet")
        for path in [theirs, *theirs.rglob("*")]:
            path.chmod(0o777 if path.is_dir() else 0o666)
        before = snapshot(theirs)
        told = as_nobody(lambda: TraceWriter(theirs, force=force))
        assert told.startswith("MoetraceError")
        assert "another user" in told
        told = as_nobody(lambda: TraceWriter(Path(shared) / "mine.moet"))
        assert "Permission denied" in told
        assert "fix:" in told
        assert snapshot(theirs) == before
        for path in [theirs, *theirs.rglob("*")]:
            path.chmod(0o700 if path.is_dir() else 0o600)
        told = as_nobody(lambda: moetrace.open(theirs))
        assert told.startswith(("MoetraceError", "TraceError", "PermissionError"))


def test_a_temporary_folder_that_all_may_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GIVEN names guessed and taken beforehand in /tmp WHEN a default output is chosen THEN it is another, and ours."""
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    first = Path(tempfile.mkdtemp(prefix="moetrace-"))
    assert stat.S_IMODE(first.stat().st_mode) == 0o700
    trace = TraceWriter(first / "t.moet")
    trace.detach()
    assert stat.S_IMODE((first / "t.moet").stat().st_mode) == 0o700


# -- numbers that lie --------------------------------------------------------------------------------------------

NEAR = [2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 1]


def test_ring_headers_that_lie(tmp_path: Path, figures: Figures) -> None:
    """GIVEN sizes, strides and counts near 2^63, checksums right, WHEN opened THEN refused, or nothing comes of it."""
    n = 0
    path = tmp_path / "ring"
    for name in RING_HEADER.names or ():
        if RING_HEADER[name].base.kind not in "ui" or name in ("version_major", "ready"):
            continue
        for value in NEAR:
            data = ring_bytes(LAYOUT, 4)
            base = RING_HEADER[name].base
            wrapped = np.array(value % 2 ** (8 * base.itemsize), f"<u{base.itemsize}").astype(base)
            put(data, name, int(wrapped))
            path.write_bytes(reseal(data))
            n += 1
            with contextlib.suppress(TraceError), Ring(path) as ring:
                _ = ring.counters, ring.status, ring.paused, ring.host_alive, ring.closed
                with contextlib.suppress(TraceError):
                    ring.pending()
                with contextlib.suppress(TraceError):
                    ring.snapshot()
    figures("hostile", **{"ring headers that lie": f"{n:,}: each refused with the reason, or without effect"})


@pytest.mark.parametrize("value", [-1, 2**31, 2**63, 1e300, "9" * 5000, None])
def test_json_that_lies(tmp_path: Path, value: Any) -> None:
    """GIVEN numbers in the JSON of a trace that lie, checksums right, WHEN read THEN a MoetraceError or an answer."""
    path = small_trace(tmp_path / "t")
    context, meta = read_json(path / "ctx0" / "context.json"), read_json(path / "meta.json")
    changed = [(path / "ctx0" / "context.json", {**context, key: value}) for key in context]
    changed += [
        (path / "ctx0" / "context.json", {**context, key: [value] * 3}) for key in ("layers", "n_expert")
    ]
    changed += [
        (
            path / "ctx0" / "context.json",
            {**context, "fields": [{"name": "state", "dtype": "|u1", "shape": value}]},
        ),
        (
            path / "ctx0" / "context.json",
            {**context, "fields": [{"name": value, "dtype": "O", "shape": [3]}]},
        ),
        (path / "ctx0" / "context.json", {**context, "counters": {"rows_produced": value}}),
    ]
    changed += [(path / "meta.json", {**meta, key: value}) for key in meta]
    changed += [
        (path / "meta.json", {**meta, "contexts": [name]}) for name in ("../../victim", "/etc", "..", "a\0b")
    ]
    whole = {file: file.read_bytes() for file in {file for file, _ in changed}}
    for file, text in changed:
        write_json(file, text)
        for read in (verify, moetrace.open):
            with contextlib.suppress(MoetraceError):
                result = read(path)
                if isinstance(result, moetrace.Trace):
                    _ = result.requests, result.loss, result.events, result.summary(), repr(result)
        file.write_bytes(whole[file])


# -- nothing runs --------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, at: Path) -> None:
        self.at = str(at)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.at, "w"))


def test_nothing_in_a_trace_is_run(tmp_path: Path, figures: Figures) -> None:
    """GIVEN pickles planted in every file of a trace, and as inputs, WHEN all is read THEN none goes off."""
    bomb = tmp_path / "went-off"
    pickle.loads(pickle.dumps(Bomb(bomb))).close()
    assert bomb.exists(), "the bomb does not work"
    bomb.unlink()
    charge = pickle.dumps(Bomb(bomb))
    array = np.array([Bomb(bomb)], object)
    np.save(tmp_path / "object.npy", array, allow_pickle=True)
    planted = (tmp_path / "object.npy").read_bytes()
    path = small_trace(tmp_path / "t", vocabulary=[b"a"])
    n = 0
    for i, file in enumerate(sorted(file for file in path.rglob("*") if file.is_file())):
        whole = file.read_bytes()
        for data in ((charge, planted, whole[:192] + charge)[i % 3],):
            file.write_bytes(data)
            n += 1
            with contextlib.suppress(MoetraceError), moetrace.open(path) as trace:
                _ = trace.requests, trace.events, trace.experts.sum(), trace.tokens, trace.loss
            with contextlib.suppress(MoetraceError):
                verify(path)
            copy = tmp_path / "copy"
            shutil.copytree(path, copy)
            with contextlib.suppress(MoetraceError):
                recover(copy, cut=True)
            shutil.rmtree(copy)
        file.write_bytes(whole)
    for name, data in (
        ("expert_log.csv", charge), ("gate_inputs.csv", charge), ("x.jsonl", charge), ("counts.csv", charge),
        ("x.pkl", charge), ("x.npy", planted),
    ):  # fmt: skip
        source = tmp_path / name
        source.write_bytes(data)
        n += 1
        for kind in (None, "expert-log", "gate-log", "olmoe", "counts"):
            with contextlib.suppress(MoetraceError):
                import_trace(source, tmp_path / "imported", format=kind)
            shutil.rmtree(tmp_path / "imported", ignore_errors=True)
    assert not bomb.exists()
    assert not zipfile.is_zipfile(path / "meta.json")
    figures("hostile", **{"pickles planted": f"{n:,}: none went off"})


def test_a_trace_does_not_name_programs_or_files_to_be_opened(tmp_path: Path) -> None:
    """GIVEN a trace that names a model elsewhere WHEN opened THEN that file is read as GGUF at most, never run."""
    path = small_trace(tmp_path / "t")
    marker = tmp_path / "ran"
    script = tmp_path / "model.gguf"
    script.write_text(f"#!/bin/sh\ntouch {marker}\n")
    script.chmod(0o755)
    meta = read_json(path / "meta.json")
    write_json(path / "meta.json", {**meta, "model_path": str(script), "command": [str(script)]})
    with moetrace.open(path) as trace, contextlib.suppress(MoetraceError):
        _ = trace.tokens
    assert not marker.exists()
    assert json.loads((path / "meta.json").read_text())["model_path"] == str(script)
    assert TraceStore(path).meta["command"] == [str(script)]
