"""Tables: what is sealed stays, whatever fails."""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_reader import read_table

from moetrace.errors import MoetraceError, TraceError
from moetrace.trace import columns as columns_module
from moetrace.trace.columns import Table, TableWriter
from moetrace.trace.ledger import read_header

SPEC = {"a": ("<u8", ()), "time_ns": ("<i8", ()), "b": ("<f4", (3, 2))}


def rows(start: int, n: int) -> dict[str, np.ndarray]:
    a = np.arange(start, start + n, dtype="<u8")
    return {"a": a, "time_ns": -a.astype("<i8"), "b": np.arange(6 * n, dtype="<f4").reshape(n, 3, 2) + start}


def test_numpy_opens_a_column_without_us(tmp_path: Path) -> None:
    with TableWriter.create(tmp_path / "t", SPEC) as writer:
        writer.append(rows(0, 5))
        writer.append(rows(5, 2))
        assert writer.seal() == 7
        assert writer.seal() == 0
    column = np.load(tmp_path / "t" / "b.npy", mmap_mode="r")
    assert column.shape == (7, 3, 2)
    np.testing.assert_array_equal(column[:5], rows(0, 5)["b"])
    ledger = np.load(tmp_path / "t" / "blocks.npy")
    assert ledger["rows"].tolist() == [7]
    assert read_header(tmp_path / "t" / "a.npy").size == 192
    assert read_header(tmp_path / "t" / "blocks.npy").size == 1024


def test_columns_are_read_only_views_of_the_file(tmp_path: Path) -> None:
    with TableWriter.create(tmp_path / "t", SPEC) as writer:
        writer.append(rows(0, 4))
        writer.seal()
    table = Table(tmp_path / "t")
    column = table["b"]
    assert not column.flags.owndata
    with (tmp_path / "t" / "b.npy").open("r+b") as file:
        before = column.tobytes()
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
        file.flush()
        assert column.tobytes() == before[:-1] + bytes([last[0] ^ 1])
        file.seek(-1, 2)
        file.write(last)
    assert table["b"] is column
    with pytest.raises(ValueError, match="read-only"):
        column[0] = 1
    assert list(table) == ["a", "time_ns", "b"]
    assert list(table.verify()) == []


def test_a_column_outlives_its_table_and_keeps_no_file_open(tmp_path: Path) -> None:
    with TableWriter.create(tmp_path / "t", SPEC) as writer:
        writer.append(rows(0, 4))
        writer.seal()
    before = set(Path("/proc/self/fd").iterdir()) if sys.platform == "linux" else set()
    table = Table(tmp_path / "t")
    column, copy = table["b"], table["b"].copy()
    if sys.platform == "linux":
        assert set(Path("/proc/self/fd").iterdir()) == before
    table.close()
    del table
    gc.collect()
    np.testing.assert_array_equal(column, copy)


def test_what_is_not_sealed_does_not_count(tmp_path: Path) -> None:
    with TableWriter.create(tmp_path / "t", SPEC) as writer:
        writer.append(rows(0, 4))
        writer.seal()
        writer.append(rows(4, 3))
        assert len(writer) == 7
    assert Table(tmp_path / "t").n_rows == 4
    with TableWriter.resume(tmp_path / "t") as writer:
        assert len(writer) == 4
        writer.append(rows(4, 1))
        writer.seal()
    assert Table(tmp_path / "t")["a"].tolist() == [0, 1, 2, 3, 4]
    assert list(Table(tmp_path / "t").verify()) == []


def test_many_columns_need_a_longer_ledger_header(tmp_path: Path) -> None:
    spec = {f"tensor.a_rather_long_name_{i}": ("<f4", (1,)) for i in range(60)}
    with TableWriter.create(tmp_path / "t", spec) as writer:
        writer.append({name: np.ones((2, 1), "<f4") for name in spec})
        writer.seal()
    assert read_header(tmp_path / "t" / "blocks.npy").size % 1024 == 0
    assert Table(tmp_path / "t").n_rows == 2
    assert read_table(tmp_path / "t").keys() == spec.keys()


@pytest.mark.parametrize(
    "wrong",
    [
        {"a": np.zeros(2, "<u4")},
        {"b": np.zeros((2, 3), "<f4")},
        {"b": np.zeros((3, 3, 2), "<f4")},
        {"c": np.zeros(2)},
    ],
)
def test_wrong_columns_are_refused_before_anything_is_written(
    tmp_path: Path, wrong: dict[str, np.ndarray]
) -> None:
    with TableWriter.create(tmp_path / "t", SPEC) as writer:
        with pytest.raises(ValueError, match="column"):
            writer.append({**rows(0, 2), **wrong})
        writer.append(rows(0, 2))
        writer.seal()
    assert list(Table(tmp_path / "t").verify()) == []


def test_a_table_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    TableWriter.create(tmp_path / "t", SPEC).close()
    with pytest.raises(MoetraceError, match="cannot write"):
        TableWriter.create(tmp_path / "t", SPEC)


def test_a_planted_symlink_is_not_followed(tmp_path: Path) -> None:
    TableWriter.create(tmp_path / "t", SPEC).close()
    (tmp_path / "victim").write_bytes((tmp_path / "t" / "a.npy").read_bytes())
    (tmp_path / "t" / "a.npy").unlink()
    (tmp_path / "t" / "a.npy").symlink_to(tmp_path / "victim")
    before = (tmp_path / "victim").read_bytes()
    with pytest.raises(MoetraceError):
        TableWriter.resume(tmp_path / "t")
    assert (tmp_path / "victim").read_bytes() == before


class FailingDisk:
    """os.pwrite that fails, or writes short, at its nth call."""

    def __init__(self, at: int, what: int | str) -> None:
        self.at, self.what, self.calls, self.real = at, what, 0, os.pwrite

    def __call__(self, fd: int, data: bytes, offset: int) -> int:
        self.calls += 1
        if self.calls == self.at:
            if self.what == "short":
                return self.real(fd, memoryview(data)[: max(1, len(data) // 2)], offset)
            if self.what == "nothing":
                return 0
            assert isinstance(self.what, int)
            self.real(fd, memoryview(data)[: len(data) // 2], offset)  # half of it is there all the same
            raise OSError(self.what, os.strerror(self.what))
        return self.real(fd, data, offset)


@pytest.mark.parametrize("what", [errno.ENOSPC, errno.EIO, "nothing", "short"])
@pytest.mark.parametrize("at", range(1, 12))
def test_any_write_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, what: int | str
) -> None:
    """GIVEN a sealed block WHEN a later write fails THEN the table ends at a sealed block, and goes on."""
    with TableWriter.create(tmp_path / "t", SPEC) as writer:
        writer.append(rows(0, 4))
        writer.seal()
        disk = FailingDisk(at, what)
        monkeypatch.setattr(os, "pwrite", disk)
        if what == "short" or at > 8:
            writer.append(rows(4, 3))
            writer.seal()
        else:
            with pytest.raises(MoetraceError) as e:  # noqa: PT012 - either of the two may fail
                writer.append(rows(4, 3))
                writer.seal()
            assert str(tmp_path) in e.value.what
            assert e.value.fix
        monkeypatch.setattr(os, "pwrite", disk.real)
        table = Table(tmp_path / "t")
        assert table.n_rows in (4, 7)
        assert table.n_rows == writer.sealed == len(writer)
        done = table.n_rows
        writer.append(rows(done, 2))
        writer.seal()
    table = Table(tmp_path / "t")
    np.testing.assert_array_equal(table["a"], np.arange(done + 2))
    assert list(table.verify()) == []


def test_fsync_comes_before_the_ledger_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    real_sync, real_write = os.fdatasync, columns_module.write_at

    def sync(fd: int) -> None:
        done.append("sync")
        real_sync(fd)

    def write(fd: int, data: bytes, offset: int) -> None:
        done.append("write")
        real_write(fd, data, offset)

    with TableWriter.create(tmp_path / "t", SPEC, fsync=True) as writer:
        writer.append(rows(0, 1))
        monkeypatch.setattr(os, "fdatasync", sync)
        monkeypatch.setattr(columns_module, "write_at", write)
        writer.seal()
    assert done[:5] == ["sync"] * 3 + ["write", "sync"]


def cut_everywhere(path: Path, check: Callable[[int], None]) -> None:
    whole = path.read_bytes()
    for size in range(len(whole) - 1, -1, -1):
        os.truncate(path, size)
        check(size)
    path.write_bytes(whole)


@pytest.mark.parametrize("name", ["a", "b", "blocks"])
def test_cut_at_every_byte(tmp_path: Path, name: str) -> None:
    """GIVEN a file cut anywhere WHEN opened THEN a prefix of whole blocks, or a TraceError."""
    with TableWriter.create(tmp_path / "t", SPEC) as writer:
        for start in range(0, 12, 3):
            writer.append(rows(start, 3))
            writer.seal()

    def check(size: int) -> None:
        try:
            table = Table(tmp_path / "t")
        except TraceError:
            assert size < 1024
            return
        assert table.n_rows in (0, 3, 6, 9)
        np.testing.assert_array_equal(table["a"], np.arange(table.n_rows))
        np.testing.assert_array_equal(
            table["b"], np.concatenate([rows(s, 3)["b"] for s in range(0, 12, 3)])[: table.n_rows]
        )
        assert any(True for _ in table.verify())

    cut_everywhere(tmp_path / "t" / f"{name}.npy", check)


def test_a_killed_writer_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GIVEN a writer killed in the middle of any write WHEN resumed THEN it goes on at a sealed block."""

    class Killed(BaseException):
        pass

    for at in range(1, 17):
        folder = tmp_path / str(at)
        writer = TableWriter.create(folder, SPEC)
        disk = FailingDisk(at, 0)

        def kill(fd: int, data: bytes, offset: int, disk: FailingDisk = disk) -> int:
            disk.calls += 1
            if disk.calls == disk.at:
                disk.real(fd, memoryview(data)[: len(data) // 2], offset)
                raise Killed
            return disk.real(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", kill)
        sealed = 0
        with pytest.raises(Killed):  # noqa: PT012 - any of the calls may be the one
            for start in range(0, 100, 2):
                writer.append(rows(start, 2))
                writer.seal()
                sealed = start + 2
        monkeypatch.setattr(os, "pwrite", disk.real)
        writer.close()
        with TableWriter.resume(folder) as again:
            assert again.sealed in (sealed, sealed + 2)
        table = Table(folder)
        np.testing.assert_array_equal(table["a"], np.arange(table.n_rows))
        assert list(table.verify()) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=12))
def test_any_appends_and_seals(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("t") / "t"
    written = sealed = 0
    with TableWriter.create(folder, SPEC) as writer:
        for n, seal in steps:
            writer.append(rows(written, n))
            written += n
            if seal:
                writer.seal()
                sealed = written
            table = Table(folder)
            assert table.n_rows == sealed
    plain = read_table(folder)
    np.testing.assert_array_equal(plain["a"], np.arange(sealed))
    np.testing.assert_array_equal(plain["b"], Table(folder)["b"])
