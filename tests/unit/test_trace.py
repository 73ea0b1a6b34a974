"""The trace as its users see it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from plain_reader import read_trace
from rings import context_of, make_layout
from traces import Context, server_records, small_trace, write_trace

import moetrace
from moetrace.errors import ChannelMissingError, InputError, TraceError, UsageError
from moetrace.trace.columns import TableWriter
from moetrace.trace.jsonfile import write_json
from moetrace.trace.ledger import column_path, npy_header
from moetrace.trace.requests import REQUEST_TABLE

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))

COLUMNS = (
    "serial",
    "time_ns",
    "step",
    "batch",
    "sequence",
    "n_sequences",
    "flags",
    "row",
    "phase",
    "request",
)
VIEWS = (*COLUMNS, "token_ids", "positions", "state", "experts", "weights", "logits", "scores", "gate_input")


@pytest.fixture
def golden() -> moetrace.Trace:
    return moetrace.open(GOLDEN / "two-contexts")


@pytest.mark.parametrize(
    "name", ["two-contexts", "two-contexts-1.0", "killed", "killed-1.0", "killed-1.0-ring-1.1"]
)
def test_the_plain_reader_reads_the_same(name: str) -> None:
    plain = read_trace(GOLDEN / name)
    trace = moetrace.open(GOLDEN / name)
    assert list(plain["contexts"]) == list(trace.contexts)
    for context in trace.contexts:
        mine, theirs = trace.in_context(context), plain["contexts"][context]
        assert mine.store_context.rows.keys() == theirs["rows"].keys()
        for table in ("rows", "events"):
            for column, values in theirs[table].items():
                ours = getattr(mine.store_context, table)[column]
                assert ours.dtype == values.dtype
                assert ours.tobytes() == values.tobytes()
    for column, values in plain["requests"].items():
        assert trace.store.requests[column].tobytes() == values.tobytes()
    assert trace.vocabulary == plain["vocabulary"]


def test_the_writer_still_writes_the_golden_traces(tmp_path: Path) -> None:
    import make

    make.make(tmp_path)
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        assert path.read_bytes() == (GOLDEN / path.relative_to(tmp_path)).read_bytes(), path.name


@pytest.mark.parametrize("name", VIEWS)
def test_columns_are_views_and_read_only(golden: moetrace.Trace, name: str) -> None:
    array = getattr(golden, name)
    column = {"token_ids": "token", "positions": "position"}.get(name, name)
    assert np.shares_memory(array, golden.store_context.rows[column])
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[:1] = 0


def test_shapes_and_facts(golden: moetrace.Trace) -> None:
    assert golden.experts.shape == (28, 3, 4)
    assert golden.experts.dtype == np.uint16
    assert golden.layers.tolist() == [1, 2, 3]
    assert golden.n_expert.tolist() == [300, 8, 300]
    assert golden.n_expert_used.tolist() == [4, 2, 4]
    assert golden.tensor("l_out").shape == (28, 4)
    assert golden.contexts == ("ctx0", "ctx1")
    assert golden.in_context("ctx1").experts.shape == (10, 2, 2)
    assert golden.in_context(1).facts["role"] == "draft"


def test_absent_is_never_zero(golden: moetrace.Trace) -> None:
    absent = ~golden.present
    assert absent.any()
    assert (golden.experts[absent] == golden.sentinel).all()
    assert np.isnan(golden.weights[absent]).all()


def test_a_missing_channel_names_the_option(golden: moetrace.Trace) -> None:
    draft = golden.in_context("ctx1")
    with pytest.raises(ChannelMissingError) as e:
        _ = draft.logits
    assert "--capture experts,logits" in e.value.fix
    with pytest.raises(ChannelMissingError) as e:
        draft.tensor("l_out")
    assert "--capture experts,tensor:l_out" in e.value.fix


def test_requests_join_labels(golden: moetrace.Trace) -> None:
    requests = golden.requests
    assert requests.index.tolist() == [0, 1, 2]
    assert requests["label"].tolist()[:2] == ["code", "arithmetic"]  # the later line wins
    assert requests["id"].tolist()[:2] == ["code-00", "math-00"]
    assert requests["label"].isna().tolist() == [False, False, True]
    assert requests["slot"].tolist() == [0, 1, 0]
    assert requests["n_prefill"].tolist() == [6, 5, 6]
    assert requests["n_prompt"].isna().tolist() == [True, True, False]  # rows of the first two were lost
    assert requests["n_prompt"][2] == 6
    assert requests["n_lost"].tolist() == [1, 1, 0]


def test_tokens(golden: moetrace.Trace) -> None:
    tokens = golden.tokens
    assert list(tokens) == [
        "token_id",
        "position",
        "sequence",
        "request",
        "step",
        "phase",
        "text",
        "context",
        "serial",
    ]
    assert len(tokens) == 28
    assert np.shares_memory(tokens["token_id"].to_numpy(), golden.token_ids)
    known = tokens[tokens["token_id"] >= 5]
    assert (known["text"] == "t" + known["token_id"].astype(str)).all()
    assert golden.text(np.array([0, 3, -1, 10**6], np.int32)).tolist() == ["<s>", "\ufffd", None, None]


def test_events(golden: moetrace.Trace) -> None:
    events = golden.events
    assert events["event"].tolist()[:3] == ["launch", "seq_rm", "launch"]
    assert len(events) == 9


def test_loss_adds_up(golden: moetrace.Trace) -> None:
    loss = golden.loss
    assert (loss.rows_produced, loss.rows, loss.rows_lost, loss.rows_waiting) == (30, 28, 2, 0)
    assert loss.produced == loss.present + loss.not_computed + loss.lost == 90
    assert not loss.complete
    total = golden.total_loss
    assert total.produced == 90 + 20
    assert golden.in_context(1).loss.complete


def test_activations_against_loops(golden: moetrace.Trace) -> None:
    want = []
    counts: dict[int, int] = {}
    labels = golden.requests["label"]
    for i in range(len(golden)):
        request = int(golden.request[i])
        ordinal = counts.get(request, 0)
        counts[request] = ordinal + 1
        for j, layer in enumerate(golden.layers.tolist()):
            for rank in range(4):
                expert = int(golden.experts[i, j, rank])
                if expert != 65535:
                    want.append((labels[request], ordinal, layer, "router", expert, rank, request))
    frame = golden.activations()
    assert list(frame)[:6] == ["domain", "token_id", "layer_id", "component", "expert_id", "position"]
    got = list(
        frame[["domain", "token_id", "layer_id", "component", "expert_id", "position", "request"]].itertuples(
            index=False, name=None
        )
    )
    assert [tuple(None if v is None or v != v else v for v in row) for row in got] == want
    pieces = list(golden.iter_activations(rows=5))
    assert len(pieces) > 3
    pd.testing.assert_frame_equal(pd.concat(pieces, ignore_index=True), frame)


def test_components_repeat_each_decision(golden: moetrace.Trace) -> None:
    once, thrice = golden.activations(), golden.activations(components=True)
    assert len(thrice) == 3 * len(once)
    counts = thrice["component"].value_counts()
    assert counts.to_dict() == dict.fromkeys(["ffn_gate", "ffn_up", "ffn_down"], len(once))
    down = thrice[thrice["component"] == "ffn_down"].reset_index(drop=True)
    pd.testing.assert_frame_equal(down.drop(columns="component"), once.drop(columns="component"))


def test_long_form(golden: moetrace.Trace) -> None:
    frame = golden.to_pandas()
    assert list(frame) == [
        *("request", "label", "token", "position", "phase", "layer", "expert", "rank", "weight", "serial")
    ]  # fmt: skip
    assert len(frame) == int((golden.experts != 65535).sum())
    assert not frame["weight"].isna().any()
    assert moetrace.open(GOLDEN / "two-contexts", "ctx1").to_pandas()["weight"].isna().all()


def test_arrow(golden: moetrace.Trace) -> None:
    pa = pytest.importorskip("pyarrow")
    table = golden.to_arrow()
    assert table.num_rows == len(golden.to_pandas())
    assert table.schema.field("phase").type == pa.dictionary(pa.int32(), pa.string())
    frame = golden.to_pandas()
    for name in frame:
        assert table[name].to_pylist() == [None if pd.isna(v) else v for v in frame[name].tolist()]
    again = pa.table(golden)
    assert again.equals(table)


def test_selecting_a_layer_is_a_view(golden: moetrace.Trace) -> None:
    part = golden.sel(layer=[1, 3])
    assert part.layers.tolist() == [1, 3]
    assert np.shares_memory(part.experts, golden.experts)
    np.testing.assert_array_equal(part.experts, golden.experts[:, [0, 2]])
    assert golden.sel(layer=2).experts.shape == (28, 1, 4)
    assert golden.sel(layer=slice(2, 9)).layers.tolist() == [2, 3]
    assert golden.sel(layer=[3, 1]).layers.tolist() == [3, 1]


def test_selecting_rows(golden: moetrace.Trace) -> None:
    one = golden.sel(request=1)
    assert np.shares_memory(one.experts, golden.experts)
    assert len(one) == 9
    assert set(golden.sel(label="code").request.tolist()) == {0}
    assert set(golden.sel(phase="decode").phase.tolist()) == {1}
    both = golden.sel(request=[0, 2], phase="decode")
    assert not np.shares_memory(both.experts, golden.experts)
    mask = np.isin(golden.request, [0, 2]) & (golden.phase == 1)
    np.testing.assert_array_equal(both.experts, golden.experts[mask])
    again = golden.sel(request=[0, 2]).sel(phase="decode", layer=3)
    np.testing.assert_array_equal(again.experts, golden.experts[mask][:, [2]])
    with pytest.raises(UsageError, match="no request 99"):
        golden.sel(request=99)
    assert golden.sel(sequence=1).sel(output=True).output.all()


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_selections_in_long_form(golden: moetrace.Trace, rows: int) -> None:
    for part in (golden.sel(request=[0, 2]), golden.sel(layer=3, phase="prefill"), golden.sel(request=1)):
        whole = golden.activations()
        keep = whole["request"].isin(part.request) & whole["layer_id"].isin(part.layers)
        if part.phase.min(initial=0) == part.phase.max(initial=0):
            keep &= whole["phase"] == ("prefill", "decode")[int(part.phase[0])]
        pieces = pd.concat(part.iter_activations(rows=rows), ignore_index=True)
        pd.testing.assert_frame_equal(pieces, whole[keep].reset_index(drop=True))


@pytest.mark.parametrize("what", [{"layer": 0}, {"layer": [1, 9]}, {"label": "nope"}, {"phase": "later"}])
def test_selecting_what_is_not_there(golden: moetrace.Trace, what: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as e:
        golden.sel(**what)
    assert e.value.fix.startswith("choose among")


def test_show(golden: moetrace.Trace) -> None:
    assert "28 tokens × 3 layers × top-4 of 300, closed" in repr(golden)
    assert "2 rows lost" in golden._repr_html_()
    assert "Selection" in repr(golden.sel(layer=1))


def test_views_outlive_the_trace(tmp_path: Path) -> None:
    with moetrace.open(small_trace(tmp_path / "t")) as trace:
        experts = trace.experts
        before = experts.copy()
    shutil.rmtree(tmp_path / "t")
    np.testing.assert_array_equal(experts, before)


def test_a_live_trace_grows(tmp_path: Path) -> None:
    layout = make_layout()
    records = server_records(layout, np.random.default_rng(3))
    context = Context(layout, records)
    path = write_trace(tmp_path / "t", [context], close=False, sealed=20)
    trace = moetrace.open(path)
    assert trace.live
    n = len(trace)
    assert trace.loss.rows_waiting == 30 - n
    assert trace.requests["running"].any()
    with TableWriter.resume(path / "ctx0" / "rows") as writer:
        writer.append({name: np.asarray(column[-1:]) for name, column in trace.store_context.rows.items()})
        writer.seal()
    before = trace.experts
    trace.refresh()
    assert len(trace) == n + 1
    assert len(before) == n


def test_running_requests_are_told_like_ended_ones(tmp_path: Path) -> None:
    """GIVEN one story, closed and live WHEN the live requests are derived THEN they are the closed ones."""
    closed = moetrace.open(small_trace(tmp_path / "a")).requests
    live = moetrace.open(small_trace(tmp_path / "b", close=False)).requests
    pd.testing.assert_frame_equal(live.drop(columns="running"), closed.drop(columns="running"))


@pytest.mark.parametrize("what", ["", "file", "empty"])
def test_what_is_no_trace(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    if what == "file":
        path.write_text("hello")
    elif what == "empty":
        path.mkdir()
    with pytest.raises((TraceError, InputError)) as e:  # a file could be a foreign recording
        moetrace.open(path)
    assert e.value.fix


def test_a_newer_major_version_is_refused_by_name(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t")
    meta = json.loads((path / "meta.json").read_text())
    write_json(path / "meta.json", {**meta, "version": [1, 9], "something": "new"})
    assert len(moetrace.open(path)) == 30
    write_json(path / "meta.json", {**meta, "version": [2, 0]})
    with pytest.raises(TraceError) as e:
        moetrace.open(path)
    assert "format 2.0" in e.value.why


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t")
    column = path / "ctx0" / "rows" / "experts.npy"
    np.save(column, np.array([print], object), allow_pickle=True)
    with pytest.raises(TraceError):
        moetrace.open(path)


def test_contexts_cannot_point_outside(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t")
    meta = json.loads((path / "meta.json").read_text())
    write_json(path / "meta.json", {**meta, "contexts": ["../t/ctx0"]})
    with pytest.raises(TraceError):
        moetrace.open(path)


def test_ten_gigabytes_open_without_reading_them(tmp_path: Path) -> None:
    """GIVEN a sparse trace of more than 10 GB WHEN opened THEN neither memory nor reads grow with it."""
    layout = make_layout(
        layers=tuple(range(24)), n_expert=128, k=8, channels=("experts", "weights", "logits")
    )
    path = write_trace(tmp_path / "t", [Context(layout, server_records(layout, np.random.default_rng(1)))])
    n = 10**10 // (24 * 128 * 4)
    folder = path / "ctx0" / "rows"
    with TableWriter.resume(folder) as writer:
        have = writer.sealed
        for name, (dtype, shape) in layout.row_columns.items():
            file = column_path(folder, name)
            size = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64)) * n
            os.truncate(file, 192 + size)
            assert npy_header(np.dtype(dtype), (n, *shape), 192)
        writer.unsealed = n - have
        writer.seal()
    script = (
        "import resource, sys, moetrace\n"
        "import moetrace.trace.trace\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "tr = moetrace.open(sys.argv[1])\n"
        "assert tr.logits.nbytes > 9.9e9 and tr.experts[-1].shape == (24, 8) and repr(tr)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(path)], check=True, capture_output=True, text=True
    )
    assert int(out.stdout) < 16 * 1024  # KiB


def test_importing_is_cheap() -> None:
    script = (
        "import sys, moetrace; print(sorted({'numpy', 'pandas', 'scipy', 'gguf', 'rich'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"
    assert {"open", "capture", "serve", "Trace", "__version__"} <= set(dir(moetrace))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = moetrace.nonsense


def test_an_empty_context(tmp_path: Path) -> None:
    layout = make_layout()
    none = server_records(layout, np.random.default_rng(1))[:0]
    trace = moetrace.open(write_trace(tmp_path / "t", [Context(layout, none)]))
    assert len(trace) == 0
    assert len(trace.activations()) == 0
    assert len(trace.requests) == 0
    assert trace.loss.complete
    assert trace.summary()
    assert len(trace.to_pandas()) == 0
    assert trace.store_context.facts["name"] == context_of(layout)["name"]
    assert set(REQUEST_TABLE) == set(trace.store.requests)
    assert set(layout.event_columns) == set(trace.store_context.events)


def test_pickled_it_is_opened_again(tmp_path: Path) -> None:
    """For other processes: by its path, never by its columns."""
    with moetrace.open(GOLDEN / "two-contexts", context=0) as trace:
        chosen = trace.sel(label="code", layer=[1, 3])
        for each in (trace, chosen):
            packed = pickle.dumps(each)
            assert len(packed) < 2000
            again = pickle.loads(packed)
            np.testing.assert_array_equal(again.experts, each.experts)
            np.testing.assert_array_equal(again.serial, each.serial)
            pd.testing.assert_frame_equal(again.requests, each.requests)


def test_masked_experts_are_never_counted_where_there_are_none(golden: moetrace.Trace) -> None:
    """GIVEN entries that are absent WHEN counted with numpy's own functions THEN the sentinel is not among them."""
    masked = golden.masked()
    assert np.shares_memory(masked.data, golden.experts)
    assert masked.mask.any()
    np.testing.assert_array_equal(
        masked.mask, (golden.experts == golden.sentinel) | ~golden.present[:, :, None]
    )
    assert np.ma.unique(masked).compressed().max() < max(golden.n_expert)
    n = np.bincount(masked.compressed(), minlength=max(golden.n_expert))
    frame = golden.to_pandas()["expert"].value_counts()
    assert {i: int(c) for i, c in enumerate(n) if c} == {int(str(i)): int(c) for i, c in frame.items()}
    assert not np.isnan(golden.masked("weights").compressed()).any()
    part = golden.sel(layer=int(golden.layers[0]))
    assert part.masked().shape == part.experts.shape


def test_as_xarray(golden: moetrace.Trace) -> None:
    data = golden.to_xarray()
    assert dict(data.sizes) == {
        "serial": len(golden), "layer": len(golden.layers), "rank": golden.experts.shape[2],
        **({"expert": golden.logits.shape[2]} if "logits" in golden.channels else {}),
        **({"width": golden.gate_input.shape[2]} if "gate_input" in golden.channels else {}),
    }  # fmt: skip
    assert int(data["experts"].min()) == -1
    layer = int(golden.layers[-1])
    np.testing.assert_array_equal(
        data["experts"].sel(layer=layer), golden.sel(layer=layer).masked()[:, 0].astype(int).filled(-1)
    )
    np.testing.assert_array_equal(data["request"], golden.request)
    assert set(np.unique(data["phase"])) <= {"prefill", "decode", "unknown"}
    np.testing.assert_array_equal(data.state, golden.state)
