"""Profiles of experts' uses for other engines, read as their readers do, and counted again from the text dump."""

from __future__ import annotations

import collections
import io
import json
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moetrace
from moetrace import data
from moetrace.__main__ import main
from moetrace.commands.demo import unpack
from moetrace.trace.export import dump
from moetrace.trace.importers.torch_file import read_torch_file
from moetrace.trace.profiles import PROFILES, expert_uses

#: what torch.load(weights_only=True) reads: its unpickler knows no other opcodes
TORCH = {
    "PROTO", "STOP", "MARK", "EMPTY_DICT", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "GLOBAL", "REDUCE",
    "SETITEM", "SETITEMS", "BINUNICODE", "BININT", "BININT1", "BININT2", "NEWFALSE", "NEWTRUE", "NONE", "BINPERSID",
    "BINPUT", "BINGET", "LONG_BINPUT", "LONG_BINGET", "LONG1", "EMPTY_LIST", "APPEND", "APPENDS", "BUILD",
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(data.recorded_demo(), tmp_path_factory.mktemp("demo"))


def counted(trace: Any, **chosen: Any) -> np.ndarray[Any, Any]:
    """(layers, experts) uses, by the text of `dump`."""
    out = io.StringIO()
    dump(trace.sel(**chosen) if chosen else trace, out)
    counts = np.zeros((len(trace.layers), 32), np.int64)
    for line in out.getvalue().splitlines()[1:]:
        _, _, request, *_, layer, state, experts = line.split("\t")
        if state == "present" and request != "-1":  # llama.cpp's own trials are nobody's
            for pair in experts.split():
                counts[int(layer), int(pair.split(":")[0])] += 1
    return counts


def read_pt(path: Path) -> np.ndarray[Any, Any]:
    """As torch reads it: names are looked up among its own, a storage is (kind, key, place, size)."""

    class Reader(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            kind, dtype, key, place, size = pid
            assert (kind, dtype, place) == ("storage", "torch.LongStorage", "cpu")
            raw = archive.read(f"archive/data/{key}")
            assert len(raw) == 8 * size
            return struct.unpack(f"<{size}q", raw)

        def find_class(self, module: str, name: str) -> Any:
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return lambda storage, offset, shape, stride, grad, hooks: np.array(
                    [
                        [storage[offset + i * stride[0] + j * stride[1]] for j in range(shape[1])]
                        for i in range(shape[0])
                    ]
                )
            if (module, name) == ("collections", "OrderedDict"):
                return collections.OrderedDict
            return f"{module}.{name}"

    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        pickled = archive.read("archive/data.pkl")
        assert {op.name for op, _, _ in pickletools.genops(pickled)} <= TORCH
        found = Reader(io.BytesIO(pickled)).load()
    assert list(found) == ["logical_count"]
    return np.asarray(found["logical_count"])


def read(path: Path, profile: str) -> np.ndarray[Any, Any]:
    if profile == "ktransformers":
        return read_pt(path)
    if profile == "sglang":
        return np.array(json.loads(path.read_text())["logical_count"])
    if profile == "exllamav3":
        with np.load(path, allow_pickle=False) as file:
            return np.asarray(file["counts_decode"])
    counts = np.zeros((8, 32), np.int64)
    if profile == "colibri":
        for line in path.read_text().splitlines():
            layer, expert, n = map(int, line.split())
            counts[layer, expert] = n
        return counts
    header, *lines = path.read_text().splitlines()
    assert header == "layer,expert"
    for line in lines:
        counts[tuple(map(int, line.split(",")))] += 1
    return counts


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_counts_what_the_dump_says(
    profile: str, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "profile"
    chosen = ["--phase", "decode", "--label", "code"]
    assert main(["export", str(recorded), "--format", profile, "-o", str(out), *chosen]) == 0
    with moetrace.open(recorded) as trace:
        expected = counted(trace, phase="decode", label="code")
    assert expected.sum() > 1000
    np.testing.assert_array_equal(read(out, profile), expected)
    assert f"{expected.sum():,} uses" in capsys.readouterr().err


def test_the_phases_add_up_and_are_kept_apart(recorded: Path, tmp_path: Path) -> None:
    with moetrace.open(recorded) as trace:
        uses = expert_uses(trace)
        np.testing.assert_array_equal(sum(uses.values()), counted(trace))
    assert main(["export", str(recorded), "--format", "exllamav3", "-o", str(tmp_path / "p.npz")]) == 0
    with np.load(tmp_path / "p.npz") as file:
        np.testing.assert_array_equal(file["counts_prefill"], uses["prefill"])
        np.testing.assert_array_equal(file["counts_decode"], uses["decode"])


def test_a_moe_trace_is_read_back(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By our reader of llama.cpp's example, which wants to know how many experts a token has."""
    assert main(["export", str(recorded), "--format", "moe-trace", "-o", str(tmp_path / "m.csv")]) == 0
    assert (
        main(["import", str(tmp_path / "m.csv"), "--n-expert-used", "4", "-o", str(tmp_path / "m.moet")]) == 0
    )
    capsys.readouterr()
    with moetrace.open(recorded) as trace, moetrace.open(tmp_path / "m.moet") as again:
        np.testing.assert_array_equal(sum(expert_uses(again).values()), counted(trace))


def test_layers_without_counts_are_told_and_have_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GIVEN a model whose first layer is dense THEN engines that count layers from 0 find the others where they are."""
    source = tmp_path / "log.csv"
    source.write_text("layer_id,expert_ids\n" + "1,3 1\n2,0 2\n" * 3)
    assert (
        main(["export", str(moved(source, tmp_path)), "--format", "sglang", "-o", str(tmp_path / "p.json")])
        == 0
    )
    counts = json.loads((tmp_path / "p.json").read_text())["logical_count"]
    assert counts == [[0, 0, 0, 0], [0, 3, 0, 3], [3, 0, 3, 0]]
    said = capsys.readouterr().err
    assert "none of layers 0: dense, or not recorded" in said
    assert "so few rank experts by chance" in said


def moved(source: Path, folder: Path) -> Path:
    assert main(["import", str(source), "-o", str(folder / "t.moet")]) == 0
    return folder / "t.moet"


def test_a_profile_of_nothing_or_of_some_layers_is_refused(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["export", str(recorded), "--format", "colibri", "-o", str(tmp_path / "p")]
    assert main([*line, "--layers", "0-3"]) == 2
    assert "of all layers" in capsys.readouterr().err
    assert main([*line, "--label", "code", "--request", "math-01"]) == 2
    assert "no routing" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_torch_itself_reads_and_writes_such_files(recorded: Path, tmp_path: Path) -> None:
    """Where it is installed: our file, loaded as an engine does it; and its file, read by our reader."""
    torch = pytest.importorskip("torch")
    assert main(["export", str(recorded), "--format", "ktransformers", "-o", str(tmp_path / "p.pt")]) == 0
    loaded = torch.load(tmp_path / "p.pt", weights_only=True)["logical_count"]
    np.testing.assert_array_equal(loaded.numpy(), read_pt(tmp_path / "p.pt"))
    sums = torch.arange(48, dtype=torch.int32).reshape(2, 8, 3).transpose(1, 2)
    torch.save({"rank": 0, "logical_count": sums}, tmp_path / "sums.pt")
    np.testing.assert_array_equal(read_torch_file(tmp_path / "sums.pt")["logical_count"], sums.numpy())
