"""Our own Parquet and Arrow files, read back: the same choices, whichever other program wrote them again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rings import make_layout
from traces import labelled_trace

import moetrace
from moetrace import data
from moetrace.__main__ import main
from moetrace.commands.demo import unpack
from moetrace.errors import InputError
from moetrace.trace.importers import detect, import_trace
from moetrace.trace.verify import verify

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

#: of the table of requests, what a file must give back
SAID = [
    "id", "label", "slot", "n_prompt", "n_cached", "n_prefill", "n_decode", "n_lost", "n_rejected", "n_shifts",
    "n_recomputed", "n_undecided", "n_unrecorded", "n_events_lost", "first_serial", "last_serial",
]  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout = make_layout(layers=tuple(range(8)), n_expert=32)
    return labelled_trace(tmp_path_factory.mktemp("small") / "t.moet", ("code", "math"), layout=layout)


@pytest.fixture(scope="module")
def exported(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "t.parquet"
    assert main(["export", str(recorded), "-o", str(out)]) == 0
    return out


def same_routing(a: Any, b: Any) -> None:
    pd.testing.assert_frame_equal(a.to_pandas(), b.to_pandas(), check_categorical=False)
    for name in ("experts", "weights", "state", "token_ids", "positions", "phase", "request", "serial"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def same_choices(a: Any, b: Any) -> None:
    """Where serials are counted anew."""
    mine, theirs = (each.to_pandas().drop(columns="serial") for each in (a, b))
    pd.testing.assert_frame_equal(mine, theirs, check_categorical=False)


@pytest.mark.parametrize(("form", "real"), [("parquet", True), ("parquet", False), ("arrow", False)])
def test_a_whole_trace_comes_back(form: str, real: bool, recorded: Path, tmp_path: Path) -> None:
    if real:
        recorded = unpack(data.recorded_demo(), tmp_path)
    out = tmp_path / f"t.{form}"
    assert main(["export", str(recorded), "-o", str(out)]) == 0
    assert detect(out) == "long-form"
    done = import_trace(out, tmp_path / "again.moet")
    assert done.missing == ("time",)
    assert verify(done.path).findings == ()
    with moetrace.open(recorded) as trace, moetrace.open(done.path) as again:
        same_routing(trace, again)
        pd.testing.assert_frame_equal(trace.requests[SAID], again.requests[SAID], check_dtype=False)
        assert again.n_expert.tolist() == trace.n_expert.tolist()
        told = trace.facts["model"]
        assert {name: again.facts["model"].get(name) for name in told} == told
        loss, there = again.loss, trace.loss
        assert (loss.rows, loss.lost, loss.not_computed) == (there.rows, there.lost, there.not_computed)
        # and once more: the same file
        second = tmp_path / f"second.{form}"
        assert main(["export", str(done.path), "-o", str(second)]) == 0
    read = (
        pq.read_table if form == "parquet" else lambda path: pa.ipc.open_stream(path.read_bytes()).read_all()
    )
    assert read(second).equals(read(out))


def test_rows_that_were_lost_stay_lost(recorded: Path, tmp_path: Path) -> None:
    """GIVEN a trace with gaps in its serials, and lost entries THEN they are counted again."""
    with moetrace.open(recorded) as trace:
        frame = trace.to_arrow().to_pandas()
        described = trace.described()
    gone = (frame["serial"] % 7 == 3) | ((frame["serial"] % 5 == 1) & (frame["layer"] == 2))
    table = pa.Table.from_pandas(frame[~gone], preserve_index=False).replace_schema_metadata(
        described.metadata()
    )
    pq.write_table(table, tmp_path / "filtered.parquet")
    done = import_trace(tmp_path / "filtered.parquet", tmp_path / "filtered.moet")
    assert done.missing == ("time", "loss"), "another program left rows out: that is no loss"
    with moetrace.open(done.path) as trace:
        assert trace.loss.rows_lost == 0
    described = replace(described, entries=int((frame.loc[~gone, "rank"] == 0).sum()))
    pq.write_table(table.replace_schema_metadata(described.metadata()), tmp_path / "holes.parquet")
    done = import_trace(tmp_path / "holes.parquet", tmp_path / "t.moet")
    assert verify(done.path).findings == ()
    with moetrace.open(done.path) as trace:
        assert trace.loss.rows_produced == described.produced
        assert trace.loss.rows_lost == described.produced - frame.loc[~gone, "serial"].nunique() > 0
        holes = np.asarray(trace.state)[np.asarray(trace.serial) % 5 == 1, 2]
        assert (holes == 0).all()


@pytest.mark.parametrize("option", [["--label", "code"], ["--phase", "decode"], ["--layers", "2,5"]])
def test_a_part_of_a_trace_is_no_loss(option: list[str], recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "part.parquet"
    assert main(["export", str(recorded), "-o", str(out), *option]) == 0
    done = import_trace(out, tmp_path / "t.moet")
    assert done.missing == ("time", "loss")
    assert verify(done.path).findings == ()
    with moetrace.open(done.path) as again:
        assert again.loss.rows_lost == 0
        ours, theirs = (frame.drop(columns="serial") for frame in (again.to_pandas(), pd.read_parquet(out)))
        pd.testing.assert_frame_equal(ours, theirs, check_categorical=False, check_dtype=False)


def test_what_other_programs_write_of_it_is_read(exported: Path, recorded: Path, tmp_path: Path) -> None:
    """GIVEN a file that went through a program that drops metadata and dictionaries, in row groups of its own."""
    frame = pd.read_parquet(exported).astype({"label": object, "phase": object})
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=1001)
    done = import_trace(tmp_path / "t.parquet", tmp_path / "t.moet")
    assert set(done.missing) == {"time", "loss", "n_expert"}
    assert verify(done.path).findings == ()
    with moetrace.open(recorded) as trace, moetrace.open(done.path) as again:
        same_choices(trace, again)
        assert again.requests["id"].isna().all()
        assert again.requests["n_cached"].isna().all()


def test_csv_is_read_as_far_as_it_says(recorded: Path, tmp_path: Path) -> None:
    assert main(["export", str(recorded), "-o", str(tmp_path / "t.csv")]) == 0
    assert detect(tmp_path / "t.csv") == "long-form"
    done = import_trace(tmp_path / "t.csv", tmp_path / "t.moet")
    assert set(done.missing) == {"time", "loss", "n_expert"}
    assert verify(done.path).findings == ()
    with moetrace.open(recorded) as trace, moetrace.open(done.path) as again:
        same_choices(trace, again)
    broken = (tmp_path / "t.csv").read_text().replace(",0,", ",zero,", 1)
    (tmp_path / "broken.csv").write_text(broken)
    with pytest.raises(InputError, match="cannot be read"):
        import_trace(tmp_path / "broken.csv", tmp_path / "b.moet")
    assert not (tmp_path / "b.moet").exists()


def test_several_contexts_follow_each_other(tmp_path: Path) -> None:
    """GIVEN rows of two contexts, whose serials begin again WHEN read THEN none is another's."""
    source = tmp_path / "log.jsonl"
    source.write_text('{"input_ids": [5, 9, 4], "exp_ids": [[[0, 7]], [[3, 1]], [[2, 6]]]}\n')
    with moetrace.open(source) as trace:
        table, described = trace.to_arrow(), trace.described()
    second = table.set_column(0, "request", pa.array([1] * len(table), table.schema.field("request").type))
    both = pa.concat_tables([table, second])
    for contexts, fine in ((2, True), (1, False)):
        said = type(described)(**{**vars(described), "contexts": contexts, "produced": None, "requests": {}})
        path = tmp_path / f"{contexts}.parquet"
        pq.write_table(both.replace_schema_metadata(said.metadata()), path)
        if fine:
            with moetrace.open(path) as again:
                assert again.experts.tolist() == [[[0], [7]], [[3], [1]], [[2], [6]]] * 2
                assert again.request.tolist() == [0, 0, 0, 1, 1, 1]
        else:
            with pytest.raises(InputError, match="not in the order"):
                import_trace(path, tmp_path / "no.moet")
    assert not (tmp_path / "no.moet").exists()


def change(frame: pd.DataFrame, **values: Any) -> pd.DataFrame:
    return frame.assign(**values)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (lambda f: f.sort_values(["expert", "serial"]), "not in the order"),
        (lambda f: pd.concat([f.iloc[:1], f]), "twice"),
        (lambda f: f.assign(token=np.arange(len(f))), "differ in token"),
        (lambda f: f.assign(expert=-1), "expert: is not from 0"),
        (lambda f: f.assign(layer=1 << 20), "layer: is not from 0"),
        (lambda f: f.assign(rank=300), "rank: is not from 0"),
        (lambda f: f.assign(phase="dreaming"), "'dreaming' is none"),
        (lambda f: f.assign(token=f["token"] + 0.5), "token: is not all whole"),
        (lambda f: f.iloc[:0], "no routing"),
    ],
)
def test_what_contradicts_itself_is_refused(broken: Any, why: str, exported: Path, tmp_path: Path) -> None:
    frame = pd.read_parquet(exported).iloc[:4000]
    pq.write_table(pa.Table.from_pandas(broken(frame), preserve_index=False), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=why):
        import_trace(tmp_path / "x.parquet", tmp_path / "t.moet")
    assert not (tmp_path / "t.moet").exists()


def test_damage_and_other_tables_are_called_what_they_are(exported: Path, tmp_path: Path) -> None:
    whole = exported.read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    for name in ("half.parquet", "other.parquet"):
        with pytest.raises(InputError, match="is no recording"):
            detect(tmp_path / name)
    table = pq.read_table(exported)
    for said in (b"{", b'{"layers": []}', b'{"layers": [0], "requests": {}, "absent": [[9, 0, 1, 0]]}'):
        pq.write_table(table.replace_schema_metadata({b"moetrace": said}), tmp_path / "said.parquet")
        with pytest.raises(InputError, match="metadata is damaged"):
            import_trace(tmp_path / "said.parquet", tmp_path / "t.moet")
