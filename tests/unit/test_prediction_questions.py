"""Attention, contexts, early layers and caches, asked of whole traces in which the truth is known."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import traces
from rings import make_layout

import moetrace
from moetrace.__main__ import main
from moetrace.analysis import from_trace
from moetrace.analysis.prediction.by_layer import attention_by_layer, task_by_layer
from moetrace.analysis.published import prediction as published
from moetrace.errors import ChannelMissingError, UsageError
from moetrace.findings import Finding, Subject, question
from moetrace.model.file import ModelFile
from moetrace.report.text import render
from moetrace.trace.attention import ATTENTION_TABLE, VALUES_TABLE
from moetrace.trace.columns import TableWriter
from moetrace.trace.record import RecordKind

HEADS = 2
QUICK: dict[str, Any] = {"permutations": 39}
NAMES = ("attention-prediction", "context-attention-routing", "task-prediction", "expert-cache")


def write_attending(path: Path, *, attention: bool = True, gate_input: bool = True, seed: int = 0) -> Path:
    """24 requests. Layer 1's experts follow a token's sharpness of attention there, layer 2's those of layer 1 with
    experts renamed; layer 0's are random.
    """
    rng = np.random.default_rng(seed)
    channels = ("experts", "weights", *(["gate_input"] if gate_input else []))
    layout = make_layout(channels=channels, n_embd=16)
    records, owner = traces.labelled_records(
        layout, rng, n_domains=2, n_prompts=12, effect=0.0, n_prompt=12, n_decode=(12, 14)
    )
    is_row = records["kind"] == RecordKind.ROW
    rows = np.flatnonzero(is_row)
    sharp = rng.normal(size=(rows.size, HEADS))
    logits = 3 * sharp @ rng.normal(size=(HEADS, 8)) + rng.gumbel(size=(rows.size, 8))
    one = np.argsort(-logits, axis=1)[:, :2]
    renamed = rng.permutation(8)
    for layer, ids in enumerate((np.argsort(rng.random((rows.size, 8)), axis=1)[:, :2], one, renamed[one])):
        records["experts"][rows, layer] = ids
    if gate_input:
        records["gate_input"][rows, 1] = np.hstack((logits, rng.normal(size=(rows.size, 8))))
    traces.write_labelled(path, layout, records, owner, domains="ab")
    if attention:
        with moetrace.open(path) as trace:
            serial, position = np.asarray(trace.serial), np.asarray(trace.positions).astype(int)
        index: dict[str, list[int]] = {name: [] for name in ATTENTION_TABLE}
        values, offset = [], 0
        for s, p, t in zip(serial.tolist(), position.tolist(), sharp, strict=True):
            for layer in range(3):
                scale = t if layer == 1 else rng.normal(size=HEADS)
                x = np.exp(scale)[:, None] * -np.log1p(np.arange(p + 1)[::-1])[None] + rng.normal(
                    0, 0.1, (HEADS, p + 1)
                )
                w = np.exp(x - x.max(axis=1, keepdims=True))
                values.append((w / w.sum(axis=1, keepdims=True)).reshape(-1))
                row = {"serial": s, "layer": layer, "n_heads": HEADS, "n_keys": p + 1, "first_position": 0}
                for name, value in {**row, "offset": offset}.items():
                    index[name].append(value)
                offset += HEADS * (p + 1)
        for name, spec, columns in (
            ("attention", ATTENTION_TABLE, index),
            ("attention_values", VALUES_TABLE, {"value": np.concatenate(values)}),
        ):
            table = TableWriter.create(path / "ctx0" / name, spec)
            table.append({n: np.asarray(c).astype(spec[n][0]) for n, c in columns.items()})
            table.seal()
            table.close()
    return path


@pytest.fixture(scope="module")
def attending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_attending(tmp_path_factory.mktemp("attending") / "t.moet")


def answer(name: str, path: Path, subject: dict[str, Any] | None = None, **given: Any) -> Finding:
    asked = question(name)
    quick = {k: v for k, v in QUICK.items() if k in asked.__dataclass_fields__}
    with moetrace.open(path) as trace:
        finding = asked(**(quick | given)).ask(Subject([trace], phase="all", **(subject or {})))
    said = " ".join((*finding.sentences, *finding.caveats))
    assert not any(word in said.replace("(", " ").split() for word in ("nan", "inf", "nan%")), said
    assert render([finding], "table", max_rows=3)
    assert list(Finding.from_json(finding.to_json()).tables) == list(finding.tables)
    return finding


def test_attention_that_decides_is_found_where_it_decides(attending: Path) -> None:
    finding = answer("attention-prediction", attending, permutations=99)
    gains = finding.tables["gains"].set_index(["layer", "better"])
    # layer 2 follows layer 1's attention, of which its own knows nothing
    assert [gains.loc[(n, "attention"), "p_value"] <= 0.05 for n in range(3)] == [False, True, False]
    assert gains.loc[(1, "attention"), "low"] > 0.1
    assert gains.loc[(1, "token and attention"), "low"] > 0.1
    recall = finding.tables["recall"].query("m == 2").set_index(["layer", "predictor"])["recall"]
    assert recall[(1, "hidden")] > 0.75
    assert recall[(0, "hidden")] < 0.4
    assert "in layer 1 (1 of 3)" in finding.sentences[1]
    published = finding.tables["as_published_evaluation"]
    assert published["layer"].tolist() == [0, 1, 2, -1]


def test_contexts_alike_in_attention_are_alike_in_routing_where_it_decides(attending: Path) -> None:
    finding = answer("context-attention-routing", attending, tokens=3, length=8, permutations=199)
    table = finding.tables["contexts"]
    mean = table.groupby("layer")["partial"].mean()
    assert mean.idxmax() == 1
    assert mean[1] > 0.15 > abs(mean[0])
    assert (table.query("layer == 1")["p_value"] <= 0.05).all()
    assert (table["contexts"] <= 24).all()
    assert finding.tables["as_published"]["contexts"].max() <= 24


def test_an_early_layer_that_decides_is_found(attending: Path, tmp_path: Path) -> None:
    finding = answer("task-prediction", attending, early_layer=1)
    recall = finding.tables["recall"].query("m == 2").set_index("predictor")["recall"]
    assert recall["experts"] == 1
    assert recall["popularity"] < 0.6
    assert recall["hidden"] > 0.75
    gains = finding.tables["gains"]
    assert gains["p_value"].dropna().tolist() == [0.025]
    prefetch = finding.tables["prefetch"]
    assert (prefetch["useful"] + prefetch["missing"]).to_numpy() == pytest.approx(2)
    assert finding.tables["as_published"]["probe"].tolist() == ["ridge"] * 2
    # layer 0 tells nothing; layer 4 is not there, and the one before it is taken
    nothing = answer("task-prediction", attending, early_layer=0)
    assert (nothing.tables["gains"]["p_value"].dropna() > 0.05).all()
    assert any("layer 1 predicts" in c for c in answer("task-prediction", attending).caveats)


def test_what_is_missing_is_said_with_the_option_that_adds_it(tmp_path: Path) -> None:
    bare = write_attending(tmp_path / "bare.moet", attention=False, gate_input=False)
    for name in NAMES[:2]:
        missing = answer(name, bare).not_answered
        assert missing is not None
        assert "has no attention" in missing
        assert "--capture experts,weights,attention" in missing
    finding = answer("task-prediction", bare)
    assert "as_published" not in finding.tables
    assert sum("--capture" in caveat for caveat in finding.caveats) == 2
    with moetrace.open(bare) as trace, pytest.raises(ChannelMissingError):
        published.task_by_layer(from_trace(trace, phase="all").columns, 1)
    half = write_attending(tmp_path / "half.moet", gate_input=False)
    assert any("--capture attention,gate_input" in c for c in answer("attention-prediction", half).caveats)


def test_attention_rows_that_are_not_there(tmp_path: Path) -> None:
    path = write_attending(tmp_path / "t.moet", attention=False)
    for name, spec in (("attention", ATTENTION_TABLE), ("attention_values", VALUES_TABLE)):
        TableWriter.create(path / "ctx0" / name, spec).close()
    missing = answer("attention-prediction", path).not_answered
    assert missing is not None
    assert "-fa off" in missing


def test_find_gives_the_entries_of_many_tokens(attending: Path) -> None:
    with moetrace.open(attending) as trace:
        serial = np.asarray(trace.serial)[5:9]
        found = trace.attention.find(np.append(serial, np.uint64(10**6)), 2)
        assert found[-1] == -1
        for at, s in zip(found, serial.tolist(), strict=False):
            row = trace.attention.row(s, 2)
            assert row is not None
            start = int(trace.attention.index["offset"][at])
            np.testing.assert_array_equal(
                trace.attention.values[start : start + row[0].size], row[0].reshape(-1)
            )


def test_selected_layers_and_several_traces(attending: Path, tmp_path: Path) -> None:
    finding = answer("attention-prediction", attending, {"layers": [1, 2]})
    assert finding.tables["recall"]["layer"].unique().tolist() == [1, 2]
    other = write_attending(tmp_path / "u.moet", seed=1)
    with moetrace.open(attending) as one, moetrace.open(other) as two:
        both = from_trace(one, two, phase="all").columns
        assert np.unique(both.text.sources).size == 1  # requests of one id are one prompt
        assert len(both.text) == len(from_trace(one, phase="all").text)
        with pytest.raises(UsageError, match="no MoE layer 9"):
            attention_by_layer(both, [9])
        with pytest.raises(UsageError, match="no MoE layer with others after it"):
            task_by_layer(both, 2)


def test_the_cache_question_in_experts_and_in_bytes(attending: Path, tmp_path: Path, model_file: Any) -> None:
    finding = answer("expert-cache", attending, slots="2,4,8")
    assert finding.tables["cache"]["slots"].unique().tolist() == [2, 4, 8, 6, 12, 24]
    assert "memory_bytes" not in finding.tables["cache"]
    assert any("-m model.gguf" in caveat for caveat in finding.caveats)
    assert "hot set" in finding.sentences[0]
    at = finding.tables["cache"].query("cache == 'layer' and slots == 2").set_index("policy")
    apart = at.loc["lru", "low"] > at.loc["pinned", "high"], at.loc["pinned", "low"] > at.loc["lru", "high"]
    said = {(True, False): "Keep what", (False, True): "Pin a", (False, False): "Pinning a"}[apart]
    assert finding.sentences[0].startswith(said)
    model = model_file("olmoe", n_layer=3, n_expert=8, n_expert_used=2)
    with ModelFile(model) as file:
        names = [n for n in file.tensor_names if n.startswith("blk.0.") and "exps" in n]
        size = sum(file.stored(n)[0].nbytes for n in names) // file.n_expert
        assert file.expert_bytes(0) == size
    theirs = traces.say_model(Path(shutil.copytree(attending, tmp_path / "t.moet")), model)
    told = answer("expert-cache", theirs, {"model": model}, slots="2", policies="lru")
    curve = told.tables["cache"].set_index("cache")
    assert curve.loc["layer", "memory_bytes"] == 2 * 3 * size
    assert curve.loc["layer", "fetched_bytes"] == pytest.approx(curve.loc["layer", "fetched"] * size)
    assert "KiB" in " ".join(told.sentences)
    for wrong in ({"slots": "many"}, {"slots": "9"}, {"policies": "fifo"}):
        missing = answer("expert-cache", attending, **wrong).not_answered
        assert missing is not None
        assert "fix:" in missing


def test_on_the_command_line_with_figures(attending: Path, tmp_path: Path, capsys: Any) -> None:
    for name in NAMES:
        options = ["--permutations", "9"] if name != "expert-cache" else []
        code = main(
            [
                "analyze",
                name,
                str(attending),
                "--phase",
                "all",
                *options,
                "-o",
                str(tmp_path),
                "--max-rows",
                "2",
            ]
        )
        assert code == 0, capsys.readouterr().err
    figures = {p.name for p in (tmp_path / "figures").glob("*.png")}
    assert figures == {
        "attention-prediction-recall.png",
        "attention-prediction-gain.png",
        "context-attention-routing-correlation.png",
        "context-attention-routing-attention.png",
        "context-attention-routing-routing.png",
        "task-prediction-recall.png",
        "task-prediction-fetched.png",
        "expert-cache-layer_slots.png",
        "expert-cache-shared_slots.png",
    }
