"""Recordings of other engines: route traces, fingerprints, arrays of routed experts; and what is none of them."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from routing import shared_data

import moetrace
from moetrace import data
from moetrace.__main__ import main
from moetrace.commands.demo import unpack
from moetrace.errors import InputError, UsageError
from moetrace.trace.importers import DESCRIBED, FORMATS, detect, import_trace, read_counts
from moetrace.trace.verify import verify

HEAD = """# route_trace v1
# model=/data/Tiny-Q4.gguf arch=qwen3moe n_layer=2 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=100 dense_bytes=7
# layer=1 expert_bytes=120 dense_bytes=7
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
"""
#: turn, phase, step, layer, experts
CELLS = [
    (0, 0, 0, 0, (3, 1)), (0, 0, 1, 0, (3, 5)), (0, 0, 1, 1, (7, 0)),  # the last layer of the last token only
    (0, 1, 2, 0, (1, 2)), (0, 1, 2, 1, (4, 6)),
    (1, 0, 0, 0, (2, 3)), (1, 0, 0, 1, (5, 1)), (1, 1, 1, 0, (0, 1)), (1, 1, 1, 1, (0, 7)),
]  # fmt: skip


def route(path: Path, cells: list[Any], head: str = HEAD) -> Path:
    lines = [
        f"{turn},{phase},{step},{layer},{slot},{expert},{0.7 - 0.4 * slot:.2f},0,100"
        for turn, phase, step, layer, experts in cells
        for slot, expert in enumerate(experts)
    ]
    path.write_text(head + "\n".join(lines) + "\n")
    return path


def test_a_route_trace_is_what_its_lines_say(tmp_path: Path) -> None:
    path = route(tmp_path / "chat.route.csv", CELLS)
    assert detect(path) == "route-trace"
    done = import_trace(path, tmp_path / "t.moet")
    assert done.missing == ("token", "time")
    assert verify(done.path).findings == ()
    with moetrace.open(done.path) as trace:
        assert trace.experts.tolist() == [
            [[3, 1], [255, 255]], [[3, 5], [7, 0]], [[1, 2], [4, 6]], [[2, 3], [5, 1]], [[0, 1], [0, 7]]
        ]  # fmt: skip
        np.testing.assert_allclose(trace.weights[1, 1], [0.7, 0.3])
        assert np.isnan(trace.weights[0, 1]).all()
        assert trace.state[0].tolist() == [1, 2], "the prompt's first token is not computed in the last layer"
        assert trace.phase.tolist() == [0, 0, 1, 0, 1]
        assert trace.positions.tolist() == [0, 1, 2, -1, -1]
        assert trace.requests["id"].tolist() == ["chat-0", "chat-1"]
        assert trace.n_expert.tolist() == [8, 8]
        assert trace.facts["expert_bytes"] == [100, 120]
        assert trace.model_name.startswith("Tiny-Q4")
        assert trace.loss.lost == 0


@pytest.mark.parametrize(
    ("cells", "head", "why"),
    [
        ([(0, 0, 0, 0, (3, 3))], HEAD, "twice"),
        ([*CELLS, (0, 1, 3, 0, (1, 2))], HEAD, "comes again"),
        ([(0, 0, 0, 0, (3, 9)), (0, 0, 0, 1, (3, 1))], HEAD, "9 is no expert of 8"),
        ([(0, 0, 0, 0, (3, 1)), (0, 0, 0, 1, (3,))], HEAD, "fewer than 2"),
        (CELLS, HEAD.replace("n_expert_used=2", "n_expert_used=4"), "tokens have 2 slots"),
        (CELLS, HEAD.replace("turn,phase", "turn,stage"), "does not begin with"),
        ([], HEAD, "no routing"),
    ],
)
def test_a_route_trace_that_contradicts_itself_is_refused(
    cells: list[Any], head: str, why: str, tmp_path: Path
) -> None:
    path = route(tmp_path / "x.csv", cells, head)
    with pytest.raises(InputError, match=why):
        import_trace(path, tmp_path / "t.moet")
    assert not (tmp_path / "t.moet").exists()


@pytest.mark.parametrize(("name", "published"), [("gptoss", 17.9), ("qwen", 38.0), ("gemma", 35.7)])
def test_real_route_traces_meet_the_published_overlap(name: str, published: float, tmp_path: Path) -> None:
    """Held against the file, read again by the csv module; the published figure is of the generated tokens."""
    path = shared_data(f"routing/bigmoeonedge/{name}.route.csv")
    done = import_trace(path, tmp_path / "t.moet")
    assert verify(done.path).findings == ()
    with path.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    chosen: dict[tuple[str, int, int], list[int]] = {}
    for row in rows:
        key = row["phase"], int(row["step"]), int(row["layer"])
        chosen.setdefault(key, []).append(int(row["expert"]))
    with moetrace.open(done.path) as trace:
        steps = sorted({step for _, step, _ in chosen})
        assert len(trace) == len(steps)
        for (_, step, layer), experts in chosen.items():
            at = int(np.flatnonzero(trace.layers == layer)[0])
            assert trace.experts[step, at].tolist() == experts
        told = trace.masked("weights").compressed()
        np.testing.assert_allclose(np.sort(told), np.sort([np.float32(r["weight"]) for r in rows]))
        experts = trace.sel(phase="decode").experts
        same = (experts[1:, :, :, None] == experts[:-1, :, None, :]).any(axis=3).mean()
    assert round(100 * float(same), 1) == published


def fingerprint(**more: Any) -> dict[str, Any]:
    def chosen(t: int, n: int) -> dict[str, Any]:
        return {"selected_experts": [t, 4 + n], "selected_probs": [0.75, 0.25]}

    tokens = [{f"token_{10 + t}": {f"layer_{n}": chosen(t, n) for n in (0, 1)}} for t in range(3)]
    return {
        "router_data": tokens,
        "category": "algebra",
        "row_index": 7,
        "generated_only": ["a", "b", "c"],
        **more,
    }


def test_fingerprints(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "one.json").write_text(json.dumps(fingerprint()))
    (tmp_path / "in" / "two.json").write_text(
        json.dumps([fingerprint(row_index=8), fingerprint(row_index=9)])
    )
    assert detect(tmp_path / "in") == detect(tmp_path / "in" / "two.json") == "fingerprint"
    done = import_trace(tmp_path / "in", tmp_path / "t.moet", n_expert=32)
    assert done.missing == ("token", "time")
    assert verify(done.path).findings == ()
    with moetrace.open(done.path) as trace:
        assert trace.requests["id"].tolist() == ["one-7", "two-8", "two-9"]
        assert trace.requests["label"].tolist() == ["algebra"] * 3
        assert trace.experts[:3].tolist() == [[[t, 4], [t, 5]] for t in range(3)]
        assert trace.positions[:3].tolist() == [10, 11, 12]
        assert set(trace.phase.tolist()) == {1}
        assert (trace.token_ids == -1).all()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ([{"token_1": {"layer_0": {"selected_experts": [3, 3]}}}], "twice"),
        ([{"token_1": {"layer_x": {"selected_experts": [3]}}}], "no layer_N"),
        ([{"token_1": {"layer_0": {"selected_experts": []}}}], "no list of experts"),
        ([{"tok": {}}], "no token_N"),
        ({"token_1": {}}, "no list of tokens"),
        ([], "holds no routing"),
    ],
)
def test_fingerprints_that_are_none(wrong: Any, why: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"router_data": wrong}))
    with pytest.raises(InputError, match=why):
        import_trace(tmp_path / "x.json", tmp_path / "t.moet")


def test_the_original_fingerprint_is_read(tmp_path: Path) -> None:
    path = shared_data("routing/gpt-oss-20b-mmlu/original_example.json")
    done = import_trace(path, tmp_path / "t.moet")
    raw = json.loads(path.read_text())["router_data"]
    with moetrace.open(done.path) as trace:
        assert len(trace) == len(raw) == 360
        (first,) = raw[5].values()
        assert trace.experts[5].tolist() == [first[f"layer_{n}"]["selected_experts"] for n in range(24)]
        np.testing.assert_allclose(trace.weights[5, 23], first["layer_23"]["selected_probs"], rtol=1e-6)


def test_arrays_of_routed_experts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one = np.argsort(rng.random((5, 3, 8)), axis=2)[:, :, :2].astype(np.int32)
    two = np.argsort(rng.random((4, 3, 8)), axis=2)[:, :, :2].astype(np.int32)
    two[0, 1] = -1
    np.savez(tmp_path / "both.npz", first=one, second=two)
    (tmp_path / "each").mkdir()
    np.save(tmp_path / "each" / "first.npy", one)
    np.save(tmp_path / "each" / "second.npy", two)
    for i, source in enumerate((tmp_path / "both.npz", tmp_path / "each")):
        assert detect(source) == "routed-experts"
        done = import_trace(source, tmp_path / f"{i}.moet", n_expert=8, label="x")
        assert done.missing == ("weights", "token", "position", "phase", "time")
        assert verify(done.path).findings == ()
        with moetrace.open(done.path) as trace:
            np.testing.assert_array_equal(trace.experts[:5], one)
            assert trace.requests["id"].tolist() == ["first", "second"]
            assert not trace.present[5, 1]
            assert trace.present.sum() == 26
    with moetrace.open(tmp_path / "each" / "first.npy") as alone:
        np.testing.assert_array_equal(alone.experts, one)


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros((4, 6, 1, 1), np.int32), "shape"),
        (np.zeros((4, 3, 2), np.float32), "float32"),
        (np.zeros((4, 3, 2), np.int32), "twice"),
        (np.full((4, 3, 1), 70000, np.int32), "beyond"),
        (np.full((4, 3, 1), -1, np.int32), "no routing"),
        (np.array([{"a": 1}], dtype=object), "cannot be read"),
    ],
)
def test_arrays_that_are_none(array: Any, why: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=why):
        import_trace(tmp_path / "x.npy", tmp_path / "t.moet")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"GGUF\x03\x00\x00\x00", "GGUF model"),
        (b"PAR1xxxx", "Parquet"),
        (b"PK\x03\x04xxxx", "zip archive"),
        (gzip.compress(b"layer_id,expert_ids", mtime=0), "gzip"),
        (pickle.dumps({"a": 1}), "pickle"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_looks_like(
    content: bytes, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    assert main(["import", str(tmp_path / "x.bin"), "-o", str(tmp_path / "t.moet")]) == 1
    said = capsys.readouterr().err
    assert "it looks like" in said
    assert what in said
    assert "import --list" in said


def test_the_list_shows_every_format_with_an_example_that_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{out}" for name in FORMATS)
    for name in ("expert-log", "gate-log", "route-trace", "olmoe", "position-log", "counts"):
        path = tmp_path / f"{name}.txt"
        path.write_text(DESCRIBED[name][1] + "\n")
        assert detect(path) == name
        if name != "counts":
            assert import_trace(path, tmp_path / f"{name}.moet").rows >= 1
    (tmp_path / "fingerprint.json").write_text(DESCRIBED["fingerprint"][1])
    assert import_trace(tmp_path / "fingerprint.json", tmp_path / "f.moet").rows == 1


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_arrays_that_are_damaged_are_refused(name: str, tmp_path: Path) -> None:
    """Cut anywhere, changed anywhere: read, or refused with the file's name."""
    path = tmp_path / name
    array = np.arange(5 * 2 * 4, dtype=np.int32).reshape(5, 2, 4)
    if name.endswith("y"):
        np.save(path, array)
    else:
        np.savez_compressed(path, a=array)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    pieces = [whole[:n] for n in (0, 1, 4, 6, 10, 64, 128, len(whole) - 1)]
    for at in rng.integers(0, len(whole), 200).tolist():
        changed = bytearray(whole)
        changed[at] ^= int(rng.integers(1, 256))
        pieces.append(bytes(changed))
    said = []
    for i, piece in enumerate(pieces):
        path.write_bytes(piece)
        try:
            import_trace(path, tmp_path / f"{i}.moet")
        except InputError as e:
            said.append(str(e))
    assert len(said) > 20
    assert all(name in text for text in said)


def test_routed_experts_of_responses(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    array = np.argsort(rng.random((5, 3, 8)), axis=2)[:, :, :2].astype(np.int32)
    array[2, 1] = -1
    raw, npy = base64.b64encode(array.tobytes()).decode(), io.BytesIO()
    np.save(npy, array)
    ways = {
        "lists": {"routed_experts": array.tolist()},
        "bytes": {"routed_experts": raw, "shape": [5, 3, 2], "layers": [1, 4, 7], "tokens": [9, 8, 7, 6, 5]},
        "npy": {"meta_info": {"routed_experts": base64.b64encode(npy.getvalue()).decode()}},
        "choices": {"choices": [{"routed_experts": array.tolist()}, {"routed_experts": array[:3].tolist()}]},
    }
    for name, said in ways.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"id": name} | said) + "\n")
        assert detect(path) == "routed-experts"
        done = import_trace(path, tmp_path / f"{name}.moet", n_expert=8)
        assert verify(done.path).findings == ()
        with moetrace.open(done.path) as trace:
            np.testing.assert_array_equal(
                np.where(trace.experts == trace.sentinel, -1, trace.experts.astype(int))[:5], array
            )
            names = ["choices-0", "choices-1"] if name == "choices" else [name]
            assert trace.requests["id"].tolist() == names
            assert ("token" in done.missing) == (name != "bytes")
            if name == "bytes":
                assert trace.layers.tolist() == [1, 4, 7]
                assert trace.token_ids.tolist() == [9, 8, 7, 6, 5]


def test_moetraces_own_json_lines_come_back(tmp_path: Path) -> None:
    recorded = unpack(data.recorded_demo(), tmp_path)
    assert main(["export", str(recorded), "--format", "routed-experts", "-o", str(tmp_path / "x.jsonl")]) == 0
    done = import_trace(tmp_path / "x.jsonl", tmp_path / "back.moet", n_expert=32)
    with moetrace.open(recorded) as before, moetrace.open(done.path) as after:
        assert len(after) > len(before)  # what the prompt cache held is filled in
        assert after.requests["id"].tolist() == [str(name) for name in before.requests["id"]] or (
            after.requests["id"].tolist() == [str(number) for number in before.requests.index]
        )
        for number in before.requests.index[::7]:
            rows = before.sel(request=int(number))
            order = np.argsort(rows.positions, kind="stable")
            mine = after.sel(request=int(number))
            computed = slice(len(mine) - len(rows), None)
            np.testing.assert_array_equal(mine.token_ids[computed], rows.token_ids[order])
            there = rows.present[order]
            np.testing.assert_array_equal(mine.present[computed], there)
            np.testing.assert_array_equal(mine.experts[computed][there], rows.experts[order][there])


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"routed_experts": "AAAA"}, "shape"),
        ({"routed_experts": "AAAA", "shape": [1, 2, 3]}, "has 3 bytes"),
        ({"routed_experts": "!"}, "base64"),
        ({"routed_experts": [[[1, 2]], [[3]]]}, "no array"),
        ({"routed_experts": [[[1, 2]]], "layers": [0, 1]}, "layers"),
        ({"routed_experts": [[[1, 2]]], "layers": [1, True]}, "whole numbers"),
        ({"routed_experts": [[[1, 2]]], "tokens": [1, 2]}, "tokens"),
        ({"routed_experts": [[[1, 1]]]}, "twice"),
        ({"routed_experts": [[[1.5, 1]]]}, "float64"),
        ({"meta_info": {"routed_experts": None}}, "is missing"),
        ({"routed_experts": base64.b64encode(b"\x93NUMPY\x01\x00").decode()}, "x.jsonl:1"),
        ({"routed_experts": base64.b64encode(pickle.dumps([1])).decode()}, "shape"),
    ],
)
def test_responses_that_are_none(said: dict[str, Any], why: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(said) + "\n")
    with pytest.raises(InputError, match=re.escape(why)):
        import_trace(path, tmp_path / "t.moet")


def test_router_logits_of_hugging_face(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(3, 7, 16)).astype(np.float16)
    np.savez(tmp_path / "by_layer.npz", *logits)
    np.savez(tmp_path / "one.npz", logits=logits)
    np.savez(
        tmp_path / "named.npz",
        **{f"model.layers.{n}": part for n, part in zip((11, 2, 5), logits, strict=True)},
    )
    for name, layers in (("by_layer", [0, 1, 2]), ("one", [0, 1, 2]), ("named", [2, 5, 11])):
        source = tmp_path / f"{name}.npz"
        assert detect(source) == "router-logits"
        with pytest.raises(UsageError, match="how many of the 16"):
            import_trace(source, tmp_path / "t.moet")
        done = import_trace(source, tmp_path / f"{name}.moet", n_expert_used=4)
        assert "n_expert" not in done.missing
        assert verify(done.path).findings == ()
        with moetrace.open(done.path) as trace:
            assert trace.layers.tolist() == layers
            of = [1, 2, 0] if name == "named" else [0, 1, 2]
            for i, layer in enumerate(of):
                best = np.sort(logits[layer], axis=1)[:, -4:][:, ::-1]
                np.testing.assert_array_equal(
                    np.take_along_axis(logits[layer], trace.experts[:, i], axis=1), best
                )
    np.savez(tmp_path / "bad.npz", *logits[:2], logits[2][:3])
    with pytest.raises(InputError, match="alike for each layer"):
        import_trace(tmp_path / "bad.npz", tmp_path / "t.moet", n_expert_used=4)
    logits[1, 3, 2] = np.nan
    np.savez(tmp_path / "nan.npz", *logits)
    with pytest.raises(InputError, match="not finite"):
        import_trace(tmp_path / "nan.npz", tmp_path / "t.moet", n_expert_used=4)


def test_lines_with_positions(tmp_path: Path) -> None:
    token_major = ["0,3,5,1", "0,4,2,0", "1,3,1,7", "1,4,-1,-1"]
    layer_major = ["0,3,5,1", "1,3,1,7", "0,4,2,0", "1,4,-1,-1"]
    for i, order in enumerate((token_major, layer_major)):
        path = tmp_path / f"{i}.csv"
        path.write_text("\n".join(["pos,layer,id0,id1", *order, "0,3,6,2", "0,4,1,0"]) + "\n")
        assert detect(path) == "position-log"
        done = import_trace(path, tmp_path / f"{i}.moet", n_expert=8)
        assert verify(done.path).findings == ()
        with moetrace.open(done.path) as trace:
            assert trace.layers.tolist() == [3, 4]
            assert trace.positions.tolist() == [0, 1, 0]
            assert trace.request.tolist() == [0, 0, 1]
            assert trace.experts[0].tolist() == [[5, 1], [2, 0]]
            assert trace.experts[1, 0].tolist() == [1, 7]
            assert trace.present.tolist() == [[True, True], [True, False], [True, True]]
    for line, why in (
        ("0,3,5", "has 3 values"),
        ("0,3,5,5", "twice"),
        ("0,3,x,1", "no whole number"),
        ("-1,3,5,1", "pos"),
    ):
        path.write_text(f"pos,layer,id0,id1\n0,0,1,2\n{line}\n")
        with pytest.raises(InputError, match=why):
            import_trace(path, tmp_path / "bad.moet")


def test_matrices_of_counts(tmp_path: Path) -> None:
    counts = np.arange(72).reshape(3, 24) * 5
    np.save(tmp_path / "either.npy", counts[:, :8])  # experts of a layer's tokens, or counts
    with pytest.raises(InputError, match="may be the experts of tokens"):
        read_counts(tmp_path / "either.npy")
    np.save(tmp_path / "heat.npy", counts.astype(np.float64))
    frame = pd.DataFrame(counts)
    frame.to_csv(tmp_path / "heat.csv", index_label="layer")
    frame.rename(columns=lambda e: f"expert_{e}", index=lambda n: f"layer_{n}").to_csv(tmp_path / "named.csv")
    for name in ("heat.npy", "heat.csv", "named.csv"):
        assert detect(tmp_path / name) == "counts"
        table = read_counts(tmp_path / name)
        np.testing.assert_array_equal(table.counts, counts[None])
        assert table.layers.tolist() == [0, 1, 2]
    assert main(["stats", str(tmp_path / "heat.csv"), "--only", "load-balance"]) == 0
    np.save(tmp_path / "shares.npy", counts / counts.sum())
    (frame / 7).to_csv(tmp_path / "shares.csv", index_label="layer")
    for name in ("shares.npy", "shares.csv"):
        with pytest.raises(InputError, match="whole number"):
            read_counts(tmp_path / name)
