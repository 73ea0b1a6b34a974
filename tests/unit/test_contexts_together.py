"""Several llama contexts in one trace: of one model they are read as one, of different ones they must be chosen."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rings import context_of, make_layout
from traces import Context, labelled_records, server_records, write_trace

import moetrace
from moetrace.__main__ import main
from moetrace.analysis import compare_captures, from_trace
from moetrace.analysis.dynamics.temporal import shuffle_chosen
from moetrace.analysis.experts.gate import summary_by_prompt
from moetrace.analysis.experts.outputs import layer_rows
from moetrace.errors import TraceError, UsageError
from moetrace.host.model import store_models
from moetrace.model.file import ModelFile
from moetrace.synthetic import write_model
from moetrace.trace.attention import ATTENTION_TABLE, VALUES_TABLE
from moetrace.trace.columns import TableWriter
from moetrace.trace.jsonfile import read_json, write_json
from moetrace.trace.labels import resolve_labels
from moetrace.trace.record import RecordKind
from moetrace.trace.trace import Trace
from moetrace.trace.verify import verify
from moetrace.trace.writer import TraceWriter

DOMAINS = ("a", "b", "c")
CHANNELS = ("experts", "weights", "logits", "gate_input", "tensor.l_out")
LAYOUT = make_layout(layers=(1, 2, 4), n_expert=(8, 6, 8), channels=CHANNELS)
COLUMNS = (
    "experts",
    "weights",
    "logits",
    "gate_input",
    "state",
    "token_ids",
    "positions",
    "sequence",
    "phase",
)


def story(path: Path, cuts: Sequence[int], *, lose: tuple[int, ...] = ()) -> Path:
    """Write twelve requests of three domains, cut into contexts before these ones; rows in ``lose`` are lost."""
    layout = LAYOUT
    records, owner = labelled_records(layout, np.random.default_rng(5), all_outputs=False)
    edges = [0, *cuts, 12]
    contexts = []
    for first, stop in itertools.pairwise(edges):
        mine = records[(owner >= first) & (owner < stop)].copy()
        is_row = mine["kind"] == RecordKind.ROW
        mine["serial"] = np.cumsum(is_row) - is_row
        lost = is_row & np.isin(mine["serial"], lose)
        contexts.append(Context(layout, mine[~lost], lost=int(lost.sum()), facts={"pid": 100 + first}))
    said = [{"request": r, "id": f"p{r:02d}", "label": DOMAINS[r % 3]} for r in range(12)]
    return write_trace(path, contexts, block=64, labels=said)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same requests in one context, and in three."""
    folder = tmp_path_factory.mktemp("stories")
    return story(folder / "one.moet", []), story(folder / "three.moet", [4, 10])


@pytest.fixture
def one(paths: tuple[Path, Path]) -> Trace:
    return moetrace.open(paths[0])


@pytest.fixture
def three(paths: tuple[Path, Path]) -> Trace:
    return moetrace.open(paths[1])


def models(path: Path, *facts: dict[str, Any], layouts: Sequence[Any] = (), **options: Any) -> Path:
    """Write a trace with a context for each of these facts."""
    layout = make_layout()
    told = []
    for i, each in enumerate(facts):
        mine = layouts[i] if layouts else layout
        base = context_of(mine)["model"]
        told.append(
            Context(
                mine,
                server_records(mine, np.random.default_rng(i), n_requests=i + 1),
                facts={**each, "model": {**base, **each.get("model", {})}},
            )
        )
    return write_trace(path, told, **options)


def facts_of(file: Path) -> dict[str, Any]:
    """What a context of a model file says of its model, its layers' experts among it."""
    with ModelFile(file) as model:
        said = {
            "name": model.name, "architecture": model.architecture, "n_layer": model.n_layer,
            "n_embd": model.n_embd, "n_expert": model.n_expert, "description": "",
        }  # fmt: skip
        return {"model": said, "layers": model.moe_layers[:3]}


def of_files(path: Path, *files: tuple[Path, dict[str, Any]] | dict[str, Any]) -> Path:
    """Write a trace with a context for each model file and what else it says, or for facts without a file."""
    facts, layouts = [], []
    for each in files:
        told = {} if isinstance(each, dict) else facts_of(each[0])
        layers = tuple(told.pop("layers", (0, 1, 2)))
        layouts.append(make_layout(layers=layers, n_expert=told["model"]["n_expert"] if told else 8))
        facts.append({**told, **(each if isinstance(each, dict) else each[1])})
    return models(path, *facts, layouts=layouts)


def close(path: Path) -> None:
    """Store what the model files say, as a recorder does when it ends."""
    writer = TraceWriter.resume(path)
    store_models(writer, read_json(path / "meta.json")["model_path"])
    writer.close()


def long(rows: Any) -> pd.DataFrame:
    """The long form without serials, which count within a context."""
    frame: pd.DataFrame = rows.to_pandas()
    return frame.drop(columns="serial")


# -- one model ---------------------------------------------------------------------------------------


def test_all_contexts_are_shown_as_if_they_were_one(one: Trace, three: Trace) -> None:
    assert three.shown == ("ctx0", "ctx1", "ctx2")
    assert three.left_out == ()
    assert len(three) == len(one)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(three, name), getattr(one, name), name)
    np.testing.assert_array_equal(three.tensor("l_out"), one.tensor("l_out"))
    np.testing.assert_array_equal(three.request, one.request)
    pd.testing.assert_frame_equal(long(three), long(one))
    pd.testing.assert_frame_equal(three.activations(components=True), one.activations(components=True))
    pd.testing.assert_frame_equal(
        pd.concat(three.iter_activations(rows=7), ignore_index=True), one.activations()
    )
    left = ["first_serial", "last_serial", "context"]
    pd.testing.assert_frame_equal(three.requests.drop(columns=left), one.requests.drop(columns=left))
    assert three.requests["context"].tolist() == ["ctx0"] * 4 + ["ctx1"] * 6 + ["ctx2"] * 2
    left = ["serial", "context"]
    pd.testing.assert_frame_equal(three.events.drop(columns=left), one.events.drop(columns=left))
    pd.testing.assert_frame_equal(three.tokens.drop(columns=left), one.tokens.drop(columns=left))


def test_context_and_serial_tell_rows_apart(three: Trace) -> None:
    tokens = three.tokens
    assert tokens["serial"].duplicated().any()
    assert not tokens.duplicated(["context", "serial"]).any()
    first = three.requests.reset_index()[["request", "context", "first_serial"]]
    joined = first.merge(tokens, left_on=["context", "first_serial"], right_on=["context", "serial"])
    assert joined["request_x"].tolist() == joined["request_y"].tolist() == list(range(12))
    names = np.array(three.contexts)[three.column("context")]
    np.testing.assert_array_equal(names, tokens["context"])


def test_events_and_requests_of_a_context_are_its_own(three: Trace) -> None:
    for name in three.contexts:
        alone = three.in_context(name)
        ours = three.events[three.events["context"] == name].reset_index(drop=True)
        pd.testing.assert_frame_equal(ours, alone.events)
        pd.testing.assert_frame_equal(three.requests[three.requests["context"] == name], alone.requests)


@pytest.mark.parametrize(
    "piece",
    [
        slice(3, 9), slice(None), slice(50, None, 7), slice(-5, None), slice(None, None, -1), slice(20, 3, -4),
        slice(9, 9), np.array([0, -1, 90, 3, 90]), np.array([], int),
    ],
)  # fmt: skip
def test_pieces(one: Trace, three: Trace, piece: Any) -> None:
    for name in ("experts", "token", "state", "logits", "tensor.l_out", "request"):
        np.testing.assert_array_equal(three.column(name, piece), one.column(name, piece))
        np.testing.assert_array_equal(three.column(name, piece), three.column(name)[piece])
    some, same = one.sel(layer=[4, 1], phase="decode"), three.sel(layer=[4, 1], phase="decode")
    np.testing.assert_array_equal(same.column("weights", piece), some.column("weights", piece))
    np.testing.assert_array_equal(same.column("weights", piece), some.weights[piece])


def test_what_lies_within_a_context_is_a_view(three: Trace) -> None:
    parts = three.parts
    ends = np.cumsum([len(part) for part in parts])
    assert [part.shown for part in parts] == [("ctx0",), ("ctx1",), ("ctx2",)]
    inside = slice(int(ends[0]), int(ends[1]))
    for name in ("experts", "serial", "state"):
        mapped = parts[1].store_context.rows[name]
        assert np.shares_memory(three.column(name, inside), mapped)
        assert np.shares_memory(getattr(parts[1], name), mapped)
        assert not np.shares_memory(getattr(three, name), mapped)
        assert not getattr(three, name).flags.writeable
    piece = three.column("experts", slice(int(ends[0]) - 2, int(ends[0]) + 3))
    np.testing.assert_array_equal(piece, three.experts[ends[0] - 2 : ends[0] + 3])
    request = three.sel(request=5)
    whole = three.in_context("ctx1").store_context.rows["experts"]
    assert set(request.context_index) == {1}
    assert np.shares_memory(request.column("experts", slice(0, 1)), whole)


def test_selecting(one: Trace, three: Trace) -> None:
    for what in (
        {"label": "b"}, {"request": [1, 5, 11]}, {"phase": "decode", "layer": 4}, {"request": "p07"},
        {"output": False, "sequence": 1}, {"request": ["p00", 10]},
    ):  # fmt: skip
        a, b = one.sel(**what), three.sel(**what)
        assert len(a) == len(b) > 0
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(b, name), getattr(a, name))
        pd.testing.assert_frame_equal(long(b), long(a))
        assert [part.experts.tolist() for part in b.parts if len(part)] != []
        np.testing.assert_array_equal(np.concatenate([part.experts for part in b.parts]), a.experts)
    again = three.sel(label=["a", "b"]).sel(phase="prefill").sel(layer=[1])
    np.testing.assert_array_equal(
        again.experts, one.sel(label=["a", "b"]).sel(phase="prefill", layer=1).experts
    )


def test_loss_and_counters_are_sums(tmp_path: Path) -> None:
    trace = moetrace.open(story(tmp_path / "t", [6], lose=(3, 40)))
    each = [part.loss for part in trace.parts]
    assert trace.loss == each[0] + each[1] == trace.total_loss
    assert trace.loss.rows_lost == 4
    assert trace.counters["rows_produced"] == trace.loss.rows_produced == sum(loss.rows for loss in each) + 4
    assert verify(trace.path).exit_code == 0
    assert "4 rows lost" in dict(trace.summary())["completeness"]


def test_a_live_trace_takes_new_contexts_of_its_model_in(tmp_path: Path) -> None:
    path = story(tmp_path / "t", [4, 10])
    meta = read_json(path / "meta.json")
    write_json(path / "meta.json", {**meta, "contexts": ["ctx0"], "state": "live"})
    trace = moetrace.open(path)
    fixed = moetrace.open(path, "ctx0")
    n = len(trace)
    before = trace.experts
    assert trace.requests["running"].sum() == 0
    other = read_json(path / "ctx2" / "context.json")
    write_json(path / "ctx2" / "context.json", {**other, "model": {**other["model"], "name": "another"}})
    write_json(path / "meta.json", {**meta, "state": "live"})
    trace.refresh()
    fixed.refresh()
    assert trace.shown == ("ctx0", "ctx1")
    assert "ctx2" in trace.left_out[0]
    assert fixed.shown == ("ctx0",)
    assert len(trace) > n == len(before) == len(fixed)
    assert len(trace.requests) == 10


def test_labels_of_a_slot_and_a_time_reach_each_context(tmp_path: Path) -> None:
    layout = make_layout()
    contexts = []
    for i in range(2):
        records = server_records(layout, np.random.default_rng(i), n_requests=2)
        records["time_ns"] += 10**6 * i
        contexts.append(Context(layout, records))
    said = [
        {"sequence": 1, "from_ns": 10**6, "to_ns": 2 * 10**6, "id": "late", "label": "x"},
        {"sequence": 1, "from_ns": 0, "to_ns": 10**5, "id": "early", "label": "y"},
    ]
    trace = moetrace.open(write_trace(tmp_path / "t", contexts, labels=said))
    assert trace.requests["id"].tolist() == [None, "early", None, "late"]
    assert set(trace.sel(label="x").request) == {3}
    codes, labels = trace.label_codes(np.array([0, 1, 3, -1]))
    assert [labels[c] if c >= 0 else None for c in codes] == [None, "y", "x", None]


def test_attention_is_found_in_its_own_context(tmp_path: Path) -> None:
    """Serials collide: the row of context 1 must not be found under context 0's serial."""
    path = story(tmp_path / "t", [6])
    rng = np.random.default_rng(2)
    trace = moetrace.open(path)
    written: dict[tuple[str, int], np.ndarray] = {}
    for part in trace.parts:
        (name,) = part.shown
        values, rows, offset = [], [], 0
        for serial, position in zip(part.serial.tolist(), part.positions.tolist(), strict=True):
            weights = rng.random((2, position + 1)).astype("<f4")
            written[name, serial] = weights
            values.append(weights.ravel())
            rows.append((serial, 4, 2, position + 1, 0, offset))
            offset += weights.size
        with TableWriter.create(path / name / "attention", ATTENTION_TABLE) as table:
            columns = zip(ATTENTION_TABLE.items(), zip(*rows, strict=True), strict=True)
            table.append({key: np.array(column, spec[0]) for (key, spec), column in columns})
            table.seal()
        with TableWriter.create(path / name / "attention_values", VALUES_TABLE) as table:
            table.append({"value": np.concatenate(values)})
            table.seal()
    trace = moetrace.open(path)
    assert "attention" in trace.channels
    attention = trace.attention
    assert len(attention) == len(trace)
    for context, serial in zip(trace.tokens["context"], trace.serial.tolist(), strict=True):
        found = attention.row(serial, 4, context)
        assert found is not None
        np.testing.assert_array_equal(found[0], written[context, serial])
    for ask in (lambda: attention.row(0, 4), lambda: attention.index, lambda: attention.values):
        with pytest.raises(UsageError, match="which context"):
            ask()
    with pytest.raises(UsageError, match="no attention of ctx7"):
        attention.row(0, 4, "ctx7")
    # and the analyses look there: the rows of every token, whichever context it is of
    columns = from_trace(trace, phase="all").columns
    rows = columns.attention(columns.text, 4)
    at = [(source, row) for source, row in zip(columns.text.sources, columns.text.rows, strict=True)]
    for i, (source, row) in enumerate(at):
        part = trace.parts[source]
        np.testing.assert_array_equal(rows.row(i), written[part.shown[0], int(part.serial[row])])
    assert rows.known.all()
    pieces = np.concatenate([piece.p for piece in rows.pieces()])
    np.testing.assert_array_equal(pieces, np.concatenate([rows.row(i).ravel() for i in range(len(rows))]))


# -- analyses, reports, exports ----------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["prefill", "decode", "all"])
def test_analyses_count_the_same(one: Trace, three: Trace, phase: Any) -> None:
    a, b = from_trace(one, phase=phase), from_trace(three, phase=phase)
    for counts in ("counts", "token_counts"):
        mine, theirs = getattr(a, counts), getattr(b, counts)
        for name, value in vars(mine).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(getattr(theirs, name), value, name)
    for name in ("experts", "starts", "tokens", "positions", "runs", "weights", "labels", "prompts"):
        np.testing.assert_array_equal(getattr(b.text, name), getattr(a.text, name), name)
    pd.testing.assert_frame_equal(summary_by_prompt(b.chosen), summary_by_prompt(a.chosen))
    left, right = (shuffle_chosen(each.whole("a shuffle test"), n_permutations=20) for each in (b, a))
    pd.testing.assert_frame_equal(left, right)
    for at_most in (None, 31):
        for index in (0, 2):
            mine, theirs = layer_rows(a, index, at_most), layer_rows(b, index, at_most)
            for name, value in vars(mine).items():
                np.testing.assert_array_equal(getattr(theirs, name), value, name)
    same = compare_captures(a.whole("a comparison"), b.whole("a comparison"))
    assert (same.texts["stopped_at"] == -1).all()
    assert same.by_depth().query("metric == 'exact'")["mean"].eq(1).all()


def test_contexts_without_rows_of_a_phase(tmp_path: Path, one: Trace) -> None:
    """One was loaded and served nobody, another was stopped within its first prompt."""
    layout = LAYOUT
    records, owner = labelled_records(layout, np.random.default_rng(5), all_outputs=False)
    first = records[owner == 0]
    cut = first[: int(np.flatnonzero(first["kind"] == RecordKind.ROW)[2]) + 1]
    contexts = [Context(layout, part) for part in (records[:0], cut, records[:0], records)]
    is_row = contexts[3].records["kind"] == RecordKind.ROW
    contexts[3].records["serial"] = np.cumsum(is_row) - is_row
    path = write_trace(tmp_path / "t", contexts, block=64)
    assert verify(path).exit_code == 0
    trace = moetrace.open(path)
    assert [len(part) for part in trace.parts] == [0, 3, 0, len(one)]
    assert len(trace.requests) == 13
    whole, part = from_trace(trace).counts, from_trace(trace.parts[3]).counts
    np.testing.assert_array_equal(whole.included.sum(axis=0), part.included.sum(axis=0))
    np.testing.assert_array_equal(whole.transitions, part.transitions)
    assert from_trace(trace, phase="prefill").counts.prompts.size == 13
    assert len(from_trace(trace).text) == len(from_trace(trace.parts[3]).text)
    assert len(trace.to_pandas()) == sum(len(part.to_pandas()) for part in trace.parts)
    np.testing.assert_array_equal(trace.column("experts", slice(1, 6)), trace.experts[1:6])
    assert trace.column("experts", slice(2, 2)).shape == (0, 3, 2)


def test_stats_say_the_same_and_which_contexts(
    paths: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for path in paths:
        assert (
            main(["stats", str(path), "--only", "overview,load-balance,specialists", "--format", "json"]) == 0
        )
        said.append(capsys.readouterr().out)
    a, b = (json.loads(text) for text in said)
    names = [finding["name"] for finding in a]
    assert names == [finding["name"] for finding in b] == ["overview", "load-balance", "specialists"]
    for mine, theirs in zip(a[1:], b[1:], strict=True):
        assert mine["sentences"] == theirs["sentences"]
        assert mine["tables"] == theirs["tables"]
    assert a[0]["tables"] == b[0]["tables"]
    extra = [sentence for sentence in b[0]["sentences"] if sentence not in a[0]["sentences"]]
    assert extra == ["3 contexts of three.moet are taken together: ctx0, ctx1, ctx2."]


@pytest.mark.parametrize("what", ["csv", "jsonl", "npz"])
def test_exports_are_the_same(paths: tuple[Path, Path], tmp_path: Path, what: str) -> None:
    for path in paths:
        assert main(["export", str(path), "-o", str(tmp_path / f"{path.stem}.{what}")]) == 0
    files = [tmp_path / f"{path.stem}.{what}" for path in paths]
    if what != "npz":
        read = pd.read_csv if what == "csv" else partial(pd.read_json, lines=True)
        a, b = (read(file).drop(columns="serial") for file in files)
        pd.testing.assert_frame_equal(a, b)
        return
    with np.load(files[0]) as a, np.load(files[1]) as b:
        assert set(a.files) == set(b.files)
        for name in set(a.files) - {"serial", "context", "contexts"}:
            np.testing.assert_array_equal(a[name], b[name])
        assert b["contexts"].tolist() == ["ctx0", "ctx1", "ctx2"]
        assert np.bincount(b["context"]).tolist() == [len(part) for part in moetrace.open(paths[1]).parts]


def test_arrow(one: Trace, three: Trace) -> None:
    pytest.importorskip("pyarrow")
    assert three.to_arrow().drop_columns("serial").equals(one.to_arrow().drop_columns("serial"))


def test_dump_names_the_context(paths: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for path in paths:
        assert main(["dump", str(path), "--request", "p05,p11,2"]) == 0
        texts.append([line.split("\t") for line in capsys.readouterr().out.splitlines()])
    a, b = texts
    assert a[0][:2] == ["context", "serial"]
    assert [line[2:] for line in a] == [line[2:] for line in b]
    assert {line[0] for line in b[1:]} == {"ctx0", "ctx1", "ctx2"}
    assert {(line[0], line[2]) for line in b[1:]} == {("ctx0", "2"), ("ctx1", "5"), ("ctx2", "11")}


# -- which contexts ----------------------------------------------------------------------------------

CHAT = {"model": {"name": "chat", "architecture": "olmoe"}, "alias": "talk,small"}
CODE = {"model": {"name": "code", "architecture": "qwen3moe"}, "model_files": ["/m/Code-Q4.gguf"]}


def test_different_models_must_be_chosen(tmp_path: Path) -> None:
    path = models(tmp_path / "t", CHAT, CODE, CHAT)
    with pytest.raises(UsageError) as e:
        moetrace.open(path)
    for text in (
        "ctx0: chat · talk · small · olmoe (main, 10 rows)",
        "ctx1: code · Code-Q4",
        "ctx2",
        "30 rows",
    ):
        assert text in e.value.why
    assert "--context NAME or --model NAME" in e.value.fix
    for name in ("chat", "talk", "small"):
        assert moetrace.open(path, model=name).shown == ("ctx0", "ctx2")
    for name in ("code", "Code-Q4.gguf", "Code-Q4", "/m/Code-Q4.gguf"):
        assert moetrace.open(path, model=name).shown == ("ctx1",)
    assert moetrace.open(path, "ctx2").shown == moetrace.open(path, 2).shown == ("ctx2",)
    assert moetrace.open(path, "ctx1", "code").shown == ("ctx1",)
    with pytest.raises(UsageError, match="no context of the model Chat"):
        moetrace.open(path, model="Chat")
    with pytest.raises(UsageError, match=r"ctx1 of .* is not of the model chat"):
        moetrace.open(path, "ctx1", "chat")
    with pytest.raises(UsageError, match="no context ctx9"):
        moetrace.open(path, "ctx9")
    chosen = moetrace.open(path, model="chat")
    assert chosen.left_out == (
        "ctx1 (main, code · Code-Q4 · qwen3moe, 20 rows) is not shown: --context ctx1",
    )
    assert len(chosen.requests) == 4
    assert "of what is shown" in dict(chosen.summary())["completeness"]


@pytest.mark.parametrize(
    "changed",
    [
        {"model": {"name": "other"}}, {"model": {"architecture": "qwen3moe"}}, {"model": {"n_layer": 9}},
        {"model": {"n_embd": 9}}, {"model": {"description": "toy Q4_0"}}, {"model_files": ["/b.gguf"]},
        {"model_path": "/b.gguf"}, {"model_files": ["/a.gguf", "/b.gguf"]},
        {"fingerprint": {"weights": "b"}},
    ],
)  # fmt: skip
def test_what_makes_another_model(tmp_path: Path, changed: dict[str, Any]) -> None:
    files = {"model_files": ["/a.gguf"]} if "model_files" in changed else {}
    files |= {"model_path": "/a.gguf"} if "model_path" in changed else {}
    files |= {"fingerprint": {"weights": "a"}} if "fingerprint" in changed else {}
    path = models(tmp_path / "t", files, changed)
    with pytest.raises(UsageError, match="different models"):
        moetrace.open(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"pid": 99}, {"model": {"n_ctx": 1, "n_ubatch": 1, "n_seq_max": 9}}, {"alias": "x"},
        {"model_files": ["/a.gguf"], "model_path": "/a.gguf"}, {"epoch_ns": 5},
    ],
)  # fmt: skip
def test_what_does_not(tmp_path: Path, changed: dict[str, Any]) -> None:
    files = {"model_files": ["/a.gguf"]} if "model_files" in changed else {}
    assert moetrace.open(models(tmp_path / "t", files, changed)).shown == ("ctx0", "ctx1")


@pytest.mark.parametrize("role", ["draft", "mtp", "other"])
def test_a_draft_is_never_mixed_in(tmp_path: Path, role: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = models(tmp_path / "t", {}, {"role": role}, {})
    trace = moetrace.open(path)
    assert trace.shown == ("ctx0", "ctx2")
    assert f"ctx1 ({role}" in trace.left_out[0]
    assert moetrace.open(path, "ctx1").shown == ("ctx1",)
    assert moetrace.open(path, model="toy").shown == ("ctx0", "ctx2")
    assert main(["stats", str(path), "--only", "overview"]) == 0
    printed = capsys.readouterr()
    assert "is not shown: --context ctx1" in printed.err
    assert "is not shown: --context ctx1" in " ".join(printed.out.split())
    assert "Nothing lost of what is shown" in " ".join(printed.out.split())


def test_a_report_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models(tmp_path / "t", {}, {"role": "draft"}, {})
    assert main(["report", str(path), "-o", str(tmp_path / "r")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "entries of what is shown are accounted for, none lost" in text
    assert "is not shown: --context ctx1" in text
    page = (tmp_path / "r" / "report.html").read_text()
    assert "is not shown: --context ctx1" in page
    assert "ctx0, ctx2 of 3, taken together" in page


def test_a_damaged_context_does_not_hide_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models(tmp_path / "t", CHAT, CODE, vocabulary=[b"a"])
    (path / "ctx1" / "rows" / "experts.npy").write_bytes(b"nothing")
    with pytest.raises(TraceError):
        moetrace.open(path)
    trace = moetrace.open(path, "ctx0")
    assert "ctx1 cannot be read and is not shown" in trace.left_out[0]
    assert trace.vocabulary == [b"a"]
    assert main(["dump", str(path), "--context", "ctx0"]) == 0
    assert "ctx1 cannot be read" in capsys.readouterr().err
    assert main(["verify", str(path)]) == 4


def test_only_drafts(tmp_path: Path) -> None:
    path = models(tmp_path / "t", {"role": "draft"}, {"role": "draft"})
    assert moetrace.open(path).shown == ("ctx0", "ctx1")
    path = models(tmp_path / "u", {"role": "draft"}, {"role": "mtp"})
    with pytest.raises(UsageError, match="different roles"):
        moetrace.open(path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"k": 3}, "n_expert_used (2/2/2 and 3/3/3)"),
        ({"layers": (0, 1, 3)}, "layers (0, 1, 2 and 0, 1, 3)"),
        ({"n_expert": 9}, "n_expert (8"),
        ({"channels": ("experts",)}, "channels (state, experts, weights and state, experts)"),
        ({"channels": ("experts", "weights", "tensor.x")}, "channels"),
    ],
)
def test_layouts_of_one_model_that_do_not_fit(
    tmp_path: Path, changed: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts = [make_layout(), make_layout(**changed)]
    same = {"model": context_of(layouts[0])["model"]}
    path = models(tmp_path / "t", same, same, layouts=layouts)
    with pytest.raises(UsageError) as e:
        moetrace.open(path)
    assert "do not fit together" in e.value.what
    assert said.replace("2/2/2", "2, 2, 2").replace("3/3/3", "3, 3, 3") in e.value.why
    assert "--context NAME" in e.value.fix
    assert moetrace.open(path, "ctx1").shown == ("ctx1",)
    assert main(["stats", str(path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_model_file_chooses_by_its_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Old traces do not say which file a context was of: then the file that is given must fit."""
    file = write_model(tmp_path / "m.gguf", "olmoe")
    path = of_files(tmp_path / "t", (file, {}), CODE)
    assert moetrace.open(path, model=str(file)).shown == ("ctx0",)
    named = models(tmp_path / "u", {**CODE, "model_files": [str(file)]}, {**CODE, "model_files": ["/b.gguf"]})
    assert moetrace.open(named, model=str(file)).shown == ("ctx0",)
    assert main(["analyze", "load-balance", str(path), "--phase", "all"]) == 2
    assert "different models" in capsys.readouterr().err
    assert main(["analyze", "load-balance", str(path), "--phase", "all", "-m", str(file)]) == 0
    assert "ctx1" in capsys.readouterr().err


def test_split_files_and_shared_names(tmp_path: Path) -> None:
    parts = [f"/m/big-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    path = models(tmp_path / "t", {**CODE, "model_files": parts}, CHAT)
    for name in ("big", "big.gguf", *parts, "big-00001-of-00003.gguf"):
        assert moetrace.open(path, model=name).shown == ("ctx0",)
    # which of two files a context is of is not known: then neither names it
    path = models(tmp_path / "u", {**CODE, "model_files": ["/m/a.gguf", "/m/b.gguf"]}, CHAT)
    for name in ("a", "b", "/m/a.gguf"):
        with pytest.raises(UsageError, match="no context of the model"):
            moetrace.open(path, model=name)


def test_names_do_not_steer_a_terminal(tmp_path: Path) -> None:
    path = models(tmp_path / "t", {"model": {"name": "\x1b[2Jx"}}, CODE)
    with pytest.raises(UsageError) as e:
        moetrace.open(path)
    assert "\x1b" not in str(e.value)
    assert "\x1b" not in dict(moetrace.open(path, 0).summary())["model"]


# -- commands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["stats"], ["dump"], ["export", "--format", "csv"], ["report"], ["analyze", "overview"]]
)
def test_every_command_wants_a_choice(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(models(tmp_path / "t.moet", CHAT, CODE))
    assert main([*command, path]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert all(text in said.err for text in ("ctx0", "ctx1", "chat", "code", "--context", "--model"))
    if command == ["report"]:  # a page takes seconds, and says so elsewhere
        return
    assert main([*command, path, "--context", "ctx1"]) == 0
    assert "ctx0 (main, chat" in capsys.readouterr().err
    if command[0] != "analyze":  # its model is a file
        assert main([*command, path, "--model", "talk"]) == 0
        assert "ctx1 (main, code" in capsys.readouterr().err


def test_info_and_verify_speak_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(models(tmp_path / "t", CHAT, CODE, {**CHAT, "role": "draft"}))
    assert main(["info", path]) == 0
    text = capsys.readouterr().out
    for said in ("ctx0 of 3 (main)", "ctx1 of 3 (main)", "ctx2 of 3 (draft)", "chat", "code"):
        assert said in text
    assert text.count("requests") == text.count("completeness") == 3
    assert main(["info", path, "--json"]) == 0
    assert [c["rows"] for c in json.loads(capsys.readouterr().out)["contexts"]] == [10, 20, 30]
    assert main(["info", path, "--model", "code"]) == 0
    assert "ctx0 of 3" not in capsys.readouterr().out
    assert main(["verify", path]) == 0
    assert "60 rows in 3 contexts of 2 models" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["closed", "live"])
def test_a_trace_without_contexts_holds_nothing(
    tmp_path: Path, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_trace(tmp_path / "t", [], close=state == "closed")
    assert main(["verify", str(path)]) == (1 if state == "closed" else 3)
    said = capsys.readouterr().out
    assert "fine" not in said
    if state == "closed":
        assert "holds nothing" in said
        assert "no graph with experts was computed" in said
    for command in ("info", "stats", "dump", "report"):
        assert main([command, str(path)]) == 1
        error = capsys.readouterr().err
        assert "holds nothing" in error
        assert "fix:" in error
    with pytest.raises(TraceError, match="holds nothing"):
        moetrace.open(path)


def test_traces_that_do_not_fit_say_in_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {}
    for name, changed in {"a": {}, "k": {"k": 3}, "l": {"layers": (1, 2)}, "e": {"n_expert": 9}}.items():
        paths[name] = models(tmp_path / f"{name}.moet", {}, layouts=[make_layout(**changed)])
    for name, what in {
        "k": "experts used per token (2 in a, 3 in k)",
        "l": "layers",
        "e": "experts (8",
    }.items():
        assert main(["stats", str(paths["a"]), str(paths[name]), "--only", "load-balance"]) == 1
        text = " ".join((out := capsys.readouterr()).out.split())
        assert f"the traces a and {name} cannot be taken together" in text
        assert what in text
        assert "Traceback" not in out.err
        assert main(["analyze", "load-balance", str(paths["a"]), str(paths[name])]) == 2
        assert what in capsys.readouterr().err


def test_traces_of_different_models_of_one_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [
        str(models(tmp_path / f"{i}.moet", {"model": {"name": name, "description": text}}))
        for i, (name, text) in enumerate([("chat", "F16"), ("code", "F16"), ("chat", "Q4_0")])
    ]
    assert main(["analyze", "load-balance", *paths[:2]]) == 2
    error = capsys.readouterr().err
    assert "0.moet and 1.moet are of different models" in error
    assert "name (chat and code)" in error
    assert main(["stats", paths[0], paths[2], "--only", "overview"]) == 0
    assert "different files of the model: F16, Q4_0" in " ".join(capsys.readouterr().out.split())


def test_traces_of_models_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GIVEN files of one name and shape WHEN taken together THEN their routers and tokens say whether they may be."""
    prints = [
        {"routers": "a", "tokens": "t", "weights": "1"},
        {"routers": "b", "tokens": "t", "weights": "2"},
        {"routers": "a", "tokens": "u", "weights": "3"},
        {"routers": "a", "tokens": "t", "weights": "4"},
    ]
    paths = [str(models(tmp_path / f"{i}.moet", {"fingerprint": told})) for i, told in enumerate(prints)]
    for other, what in ((1, "routers' fingerprint (a and b)"), (2, "tokens' fingerprint (t and u)")):
        assert main(["analyze", "load-balance", paths[0], paths[other]]) == 2
        assert what in capsys.readouterr().err
    assert main(["stats", paths[0], paths[3], "--only", "overview"]) == 0
    assert "2 different files of the model, with the same routers" in " ".join(
        capsys.readouterr().out.split()
    )


def test_one_file_in_two_places(tmp_path: Path) -> None:
    """GIVEN servers that keep one model in different folders WHEN told apart THEN they are of one model."""
    facts = [{"model_path": f"/{i}/m.gguf", "fingerprint": {"weights": "1"}} for i in range(2)]
    paths = [models(tmp_path / f"{i}.moet", told) for i, told in enumerate(facts)]
    assert len(moetrace.open(f"{paths[0].parent}/*.moet").models) == 1


@pytest.mark.parametrize(
    ("asked", "near"),
    [("code-0", "code-00"), ("cod", "code-00"), (7, "0 to 2"), (-2, "0 to 2"), (["math-00", "x"], "math-00")],
)
def test_requests_that_are_not_there(asked: Any, near: str) -> None:
    golden = moetrace.open(Path(__file__).parents[1] / "golden" / "two-contexts")
    with pytest.raises(UsageError, match="there is no request") as e:
        golden.sel(request=asked)
    assert near in e.value.fix


def test_requests_by_the_clients_id(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "golden" / "two-contexts"
    golden = moetrace.open(path)
    assert set(golden.sel(request="code-00").request) == {0}
    assert set(golden.sel(request=["math-00", 2]).request) == {1, 2}
    assert set(golden.sel(request=np.int64(2)).request) == {2}
    assert len(golden.sel(request=[])) == 0
    assert len(golden.sel(request=-1)) == 0
    for text, numbers in {"code-00": {0}, "math-00,2": {1, 2}, "0-1": {0, 1}}.items():
        assert main(["dump", str(path), "--request", text]) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        assert {int(line.split("\t")[2]) for line in lines} == numbers
    assert main(["dump", str(path), "--request", "code-99"]) == 2
    assert "code-00" in capsys.readouterr().err


# -- token text --------------------------------------------------------------------------------------


def test_each_model_has_its_own_vocabulary(tmp_path: Path) -> None:
    a, b = write_model(tmp_path / "a.gguf", "olmoe"), write_model(tmp_path / "b.gguf", "qwen3moe")
    both = [str(a), str(b)]
    files = {"model_files": both}
    gone = {"model": {"name": "gone"}, "model_files": ["/gone.gguf"]}
    path = of_files(tmp_path / "t", (a, files), (b, files), (a, files), gone)
    close(path)
    facts = [read_json(path / f"ctx{i}" / "context.json") for i in range(4)]
    assert [f.get("model_path") for f in facts] == [str(a), str(b), str(a), None]
    assert [f.get("vocabulary") for f in facts] == [
        "vocabulary.json",
        "vocabulary-1.json",
        "vocabulary.json",
        None,
    ]
    words = {}
    for name, file in (("a", a), ("b", b)):
        with ModelFile(file) as model:
            words[name] = model.vocabulary
        file.unlink()  # the trace stands for itself
    assert moetrace.open(path, model=str(a)).shown == ("ctx0", "ctx2")
    assert moetrace.open(path, model="a").vocabulary == words["a"]
    assert moetrace.open(path, model="b").vocabulary == words["b"]
    assert moetrace.open(path, "ctx3").vocabulary is None
    assert set(moetrace.open(path, "ctx3").tokens["text"]) == {None}
    assert verify(path).exit_code == 0
    (path / "vocabulary-1.json").unlink()
    assert [finding.where for finding in verify(path).findings] == ["vocabulary-1.json"]


def test_the_traces_model_file_counts_only_if_it_fits(tmp_path: Path) -> None:
    file = write_model(tmp_path / "a.gguf", "olmoe")
    path = of_files(tmp_path / "t", (file, {}), CODE)
    write_json(path / "meta.json", {**read_json(path / "meta.json"), "model_path": str(file)})
    live = moetrace.open(path, "ctx0"), moetrace.open(path, "ctx1")
    assert live[0].vocabulary is not None
    assert live[1].vocabulary is None
    close(path)
    assert "vocabulary" in read_json(path / "ctx0" / "context.json")
    other = read_json(path / "ctx1" / "context.json")
    assert other["model_path"] is None
    assert "vocabulary" not in other


def test_an_old_traces_vocabulary_is_its_main_models(tmp_path: Path) -> None:
    path = models(
        tmp_path / "t", CHAT, {**CHAT, "role": "draft"}, {**CODE, "role": "draft"}, vocabulary=[b"a", b"b"]
    )
    assert [moetrace.open(path, i).vocabulary for i in range(3)] == [[b"a", b"b"], [b"a", b"b"], None]


@pytest.mark.parametrize("name", ["../x.json", "a/b", "", ".."])
def test_a_vocabulary_cannot_point_outside(tmp_path: Path, name: str) -> None:
    path = models(tmp_path / "t", {"vocabulary": name})
    with pytest.raises(TraceError):
        _ = moetrace.open(path).vocabulary
    assert verify(path).exit_code == 4


def test_labels_are_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes through a trace's contexts one by one does not match all labels with all contexts each time."""
    layout = make_layout()
    contexts = [Context(layout, server_records(layout, np.random.default_rng(n))) for n in range(5)]
    labels = [
        {"sequence": 0, "from_ns": 0, "to_ns": 10**9, "n_prompt": 1, "n_cached": 0, "tokens": [1], "id": "a"}
    ]
    path = write_trace(tmp_path / "t", contexts, labels=labels)
    calls = []

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return resolve_labels(*arguments)

    monkeypatch.setattr("moetrace.trace.trace.resolve_labels", counted)
    with moetrace.open(path, context=0) as trace:
        for name in trace.contexts:
            assert len(trace.in_context(name).requests) == 3
            assert trace.in_context(name).in_context(0).labelling is trace.labelling
    assert len(calls) == 1
