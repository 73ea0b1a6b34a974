"""Lakes: nothing is lost on the way there and back, and other programs' sums are moetrace's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import duckdb
import lakes
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import traces
from rings import make_layout

import moetrace
from moetrace.__main__ import main
from moetrace.analysis import from_trace
from moetrace.errors import InputError, MoetraceError, UsageError
from moetrace.trace.importers import import_trace
from moetrace.trace.jsonfile import read_json, write_json
from moetrace.trace.store import TraceStore
from moetrace.trace.trace import open_trace
from moetrace.trace.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"


def same_trace(one: Path, two: Path) -> None:
    """Every column of every table is the same to the last bit, and so is everything said."""
    first, second = TraceStore(one), TraceStore(two)
    assert first.meta["contexts"] == second.meta["contexts"]
    tables, others = first.tables(), second.tables()
    assert tables.keys() == others.keys()
    for name, table in tables.items():
        assert table.spec == others[name].spec
        for column in table:
            mine, theirs = np.asarray(table[column]), np.asarray(others[name][column])
            assert mine.tobytes() == theirs.tobytes(), (name, column)
    for context in first.meta["contexts"]:
        assert read_json(one / context / "context.json") == read_json(two / context / "context.json")
    for file in [*one.glob("*.json"), *one.glob("*.jsonl")]:
        if file.name != "meta.json":
            assert file.read_bytes() == (two / file.name).read_bytes()
    left, right = (
        {k: v for k, v in store.meta.items() if k not in ("tables", "crc")} for store in (first, second)
    )
    assert left == right


@pytest.mark.parametrize("partition_by", [(), ("model",), ("model", "day", "server")])
@pytest.mark.parametrize("name", ["two-contexts", "two-contexts-1.0"])
def test_there_and_back(tmp_path: Path, name: str, partition_by: tuple[str, ...]) -> None:
    """Uneven layers, two-byte ids, every channel, lost rows, a draft's context."""
    lakes.fill(tmp_path / "lake", [GOLDEN / name], partition_by=partition_by)
    done = import_trace(tmp_path / "lake", tmp_path / "again.moet")
    same_trace(GOLDEN / name, done.path)
    assert verify(done.path).findings == verify(GOLDEN / name).findings
    pd.testing.assert_frame_equal(open_trace(done.path, 0).requests, open_trace(GOLDEN / name, 0).requests)


def test_what_was_not_computed_or_is_lost(tmp_path: Path) -> None:
    path = traces.labelled_trace(tmp_path / "t.moet", all_outputs=False, lose=(3, 30, 31), seed=3)
    lakes.fill(tmp_path / "lake", [path])
    same_trace(path, import_trace(tmp_path / "lake", tmp_path / "again.moet").path)
    lake = f"'{tmp_path}/lake/entries/**/*.parquet'"
    entries = duckdb.execute(
        f"SELECT state, count(*) AS n, count(experts) AS known FROM {lake} GROUP BY state"
    ).df()
    loss = open_trace(path).loss
    n = entries.set_index("state")["n"]
    assert n["present"] == loss.present
    assert n["not computed"] == loss.not_computed
    assert entries.set_index("state")["known"].to_dict() == {"present": loss.present, "not computed": 0}
    (facts,) = pq.read_table(tmp_path / "lake" / "traces").to_pylist()
    assert (facts["lost"], facts["rows_lost"]) == (loss.lost, loss.rows_lost) == (9, 3)


def fleet(tmp_path: Path, **world: Any) -> list[Path]:
    """Traces whose requests have the same numbers; a day apart; of one the requests have no ids."""
    out = []
    for i in range(3):
        path = traces.labelled_trace(tmp_path / f"server{i}.moet", ("code", "math", "prose"), seed=i, **world)
        if i == 2:
            (path / "labels.jsonl").unlink()
        meta, facts = read_json(path / "meta.json"), read_json(path / "ctx0" / "context.json")
        write_json(
            path / "meta.json", {**meta, "created_ns": meta["created_ns"] + i, "host": f"host/{i}=a b"}
        )
        day = 86_400 * 10**9
        write_json(path / "ctx0" / "context.json", {**facts, "epoch_ns": (20_000 + i) * day - 10**6})
        out.append(path)
    return out


def test_the_documented_questions_in_duckdb(tmp_path: Path) -> None:
    layout = make_layout(layers=(0, 1, 4), n_expert=(8, 16, 12), k=(2, 4, 3))
    paths = fleet(tmp_path, layout=layout, all_outputs=False)
    lakes.fill(tmp_path / "lake", paths)
    db = duckdb.connect()
    for statement in lakes.statements(lakes.documented()["duckdb"], tmp_path / "lake"):
        db.execute(statement)
    with moetrace.open(paths[0]) as a, moetrace.open(paths[1]) as b, moetrace.open(paths[2]) as c:
        lakes.check(lambda sql: db.execute(sql).df(), from_trace(a, b, c))
    days = db.execute("SELECT DISTINCT day, server FROM entries ORDER BY ALL").fetchall()
    assert len({str(day) for day, _ in days}) > 1
    assert {server for _, server in days} == {f"host/{i}=a b" for i in range(3)}


def test_what_is_no_text_is_marked(tmp_path: Path) -> None:
    """A draft that was rejected is in the lake, and in no sum."""
    path = traces.labelled_trace(tmp_path / "t.moet")
    trace = open_trace(path)
    lakes.fill(tmp_path / "lake", [path])
    marked = lakes.in_text(trace)
    assert 0 < marked.sum() <= len(trace)
    got = duckdb.execute(
        f"SELECT count(*) FROM '{tmp_path}/lake/entries/**/*.parquet' WHERE in_text AND layer = 0"
    ).fetchone()
    assert got == (int(marked.sum()),)


def test_a_trace_is_there_once(tmp_path: Path) -> None:
    paths = fleet(tmp_path)
    lake = tmp_path / "lake"
    lakes.fill(lake, paths)
    files = {f: f.stat().st_mtime_ns for f in lake.glob("**/*.parquet")}
    with pytest.raises(UsageError, match=r"has server0\.moet already"):
        lakes.fill(lake, paths[:1])
    assert {f: f.stat().st_mtime_ns for f in lake.glob("**/*.parquet")} == files
    lakes.fill(lake, paths[:1], force=True)
    assert set(lake.glob("**/*.parquet")) == set(files)
    with pytest.raises(UsageError, match="partitioned by model,day,server"):
        lakes.fill(lake, paths[:1], force=True, partition_by=())
    with pytest.raises(UsageError, match="not partitioned by colour"):
        lakes.fill(lake, paths[:1], partition_by=("colour",))


def test_one_that_was_growing_is_replaced(tmp_path: Path) -> None:
    path = shutil.copytree(GOLDEN / "killed", tmp_path / "k.moet")
    lakes.fill(tmp_path / "lake", [path])
    lakes.fill(tmp_path / "lake", [path])
    (facts,) = pq.read_table(tmp_path / "lake" / "traces").to_pylist()
    assert facts["live"]
    assert facts["rows"] == open_trace(path).chain.n_rows > 0


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = traces.small_trace(tmp_path / "t.moet")
    written = pq.ParquetWriter.write_batch

    def full(self: pq.ParquetWriter, batch: Any, *more: Any) -> None:
        if "state" not in batch.schema.names:
            raise OSError(28, "No space left on device")
        written(self, batch, *more)

    monkeypatch.setattr(pq.ParquetWriter, "write_batch", full)
    with pytest.raises(MoetraceError, match="cannot write"):
        lakes.fill(tmp_path / "lake", [path])
    assert [f for f in (tmp_path / "lake").rglob("*") if f.is_file()] == []


def test_a_part_that_is_missing_is_found(tmp_path: Path) -> None:
    path = traces.small_trace(tmp_path / "t.moet")
    lakes.fill(tmp_path / "lake", [path])
    (entries,) = (tmp_path / "lake" / "entries").rglob("*.parquet")
    table = pq.ParquetFile(entries).read()
    pq.write_table(table.slice(0, table.num_rows - 3), entries)
    with pytest.raises(InputError, match="lacks a part"):
        import_trace(tmp_path / "lake", tmp_path / "again.moet")
    assert not (tmp_path / "again.moet").exists()


def test_a_file_that_lies_outside_is_refused(tmp_path: Path) -> None:
    path = traces.small_trace(tmp_path / "t.moet")
    lakes.fill(tmp_path / "lake", [path])
    (files,) = (tmp_path / "lake" / "files").glob("*.parquet")
    table = pq.ParquetFile(files).read()
    evil = ["../../outside", *table["path"].to_pylist()[1:]]
    pq.write_table(table.set_column(table.schema.get_field_index("path"), "path", [evil]), files)
    with pytest.raises(InputError, match="cannot be read"):
        import_trace(tmp_path / "lake", tmp_path / "deep" / "again.moet")
    assert not (tmp_path / "outside").exists()


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(p) for p in fleet(tmp_path)]
    lake = f"{tmp_path}/lake/"
    assert main(["export", *paths, "-o", lake]) == 0
    assert "of 3 traces into" in capsys.readouterr().err
    assert main(["export", paths[0], "-o", lake]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["export", paths[0], "-o", lake, "--layers", "1"]) == 2
    assert main(["export", *paths, "-o", f"{tmp_path}/x.parquet"]) == 2
    capsys.readouterr()
    assert main(["import", lake, "-o", f"{tmp_path}/again.moet"]) == 2
    assert "server1.moet (" in capsys.readouterr().err
    assert main(["import", lake, "--trace", "server1.moet", "-o", f"{tmp_path}/again.moet"]) == 0
    same_trace(Path(paths[1]), tmp_path / "again.moet")
    assert json.loads((tmp_path / "again.moet" / "meta.json").read_text())["host"] == "host/1=a b"
