"""SGLang's recorder files, written here as torch.save writes them, without torch."""

from __future__ import annotations

import io
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import moetrace
from moetrace.__main__ import main
from moetrace.errors import InputError
from moetrace.trace.importers import CountTable, detect, import_trace
from moetrace.trace.importers.torch_file import read_torch_file
from moetrace.trace.verify import verify

L, E, K = 4, 8, 2
Ints = NDArray[np.int32]


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of torch's names, with what a pickle of its tensors names."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("IntStorage", "LongStorage", "FloatStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*_: Any) -> None:
        raise AssertionError("nothing is rebuilt here")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return torch


def save(path: Path, content: Any) -> Path:
    """torch.save: arrays as tensors, a column-major one as a transposed tensor."""
    torch, utils = sys.modules["torch"], sys.modules["torch._utils"]
    storages: list[bytes] = []
    kinds = {"i4": "IntStorage", "i8": "LongStorage", "f4": "FloatStorage"}

    class Storage:
        def __init__(self, array: NDArray[Any]) -> None:
            self.kind = getattr(torch, kinds[array.dtype.str[1:]])
            self.key, self.n = str(len(storages)), array.size
            storages.append(array.ravel(order="K").tobytes())

    class Tensor:
        def __init__(self, array: NDArray[Any]) -> None:
            self.array = array

        def __reduce__(self) -> Any:
            steps = tuple(step // self.array.itemsize for step in self.array.strides)
            made = (Storage(self.array), 0, self.array.shape, steps, False, None)
            return utils._rebuild_tensor_v2, made

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", value.kind, value.key, "cpu", value.n) if isinstance(value, Storage) else None

    def wrapped(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: wrapped(each) for key, each in value.items()}
        if isinstance(value, list):
            return [wrapped(each) for each in value]
        return Tensor(value) if isinstance(value, np.ndarray) else value

    out = io.BytesIO()
    Pickler(out, 2).dump(wrapped(content))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", out.getvalue())
        archive.writestr("archive/byteorder", "little")
        for i, data in enumerate(storages):
            archive.writestr(f"archive/data/{i}", data)
    return path


def ids(rng: np.random.Generator, n: int) -> Ints:
    """(L, n, 8) as SGLang gives them: layer 0 is dense, ranks beyond k are -1."""
    found = np.full((L, n, 8), -1, np.int32)
    found[1:, :, :K] = np.argsort(rng.random((L - 1, n, E)), axis=2)[:, :, :K]
    return found


def record(
    experts: Ints, tokens: list[int], positions: list[int], lengths: list[int] | None
) -> dict[str, Any]:
    return {
        "forward_pass_id": 3, "rank": 0, "gatherer_key": "primary", "input_ids": tokens, "positions": positions,
        "extend_seq_lens": lengths, "forward_mode": 1 if lengths else 2, "topk_ids_of_layer": experts,
        "misc_objects": [],
    }  # fmt: skip


def test_tokens_become_a_trace(torch: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    passes = [ids(rng, n) for n in (7, 2, 2, 2, 1)]
    content = {
        "records": [
            record(passes[0], list(range(10, 17)), [0, 1, 2, 0, 1, 2, 3], [3, 4]),
            record(passes[1], [20, 21], [3, 4], None),  # one of each text
            record(passes[2], [22, 23], [4, 5], None),
            record(passes[3], [30, 31], [0, 1], [2]),  # a third
            record(passes[4], [24], [6], None),  # of the second, the only one that goes on
        ],
        "last_physical_to_logical_map": np.tile(np.arange(E)[::-1], (L, 1)).astype(np.int64),
    }
    path = save(tmp_path / "x.pt", content)
    assert detect(path) == "recorder"
    done = import_trace(path, tmp_path / "t.moet", label="chat")
    assert verify(done.path).findings == ()
    assert done.missing == ("weights", "time")
    with moetrace.open(path) as trace:
        assert trace.layers.tolist() == [1, 2, 3]  # the dense one is none
        assert trace.n_expert.tolist() == [E] * 3
        assert trace.requests["id"].tolist() == ["text-0", "text-1", "text-2"]
        assert trace.sel(request="text-0").token_ids.tolist() == [10, 11, 12, 20, 22]
        assert trace.sel(request="text-1").token_ids.tolist() == [13, 14, 15, 16, 21, 23, 24]
        assert trace.sel(request="text-2").token_ids.tolist() == [30, 31]
        assert trace.sel(request="text-1").phase.tolist() == [0, 0, 0, 0, 1, 1, 1]
        expected = (
            E - 1 - np.concatenate([passes[0][1:, 3:, :K], passes[1][1:, 1:, :K]], axis=1).transpose(1, 0, 2)
        )
        np.testing.assert_array_equal(trace.sel(request="text-1").experts[:5], expected)


def test_whose_token_it_is_is_not_guessed(torch: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    content = {
        "records": [
            record(ids(rng, 4), [1, 2, 3, 4], [0, 1, 0, 1], [2, 2]),  # two that end alike
            record(ids(rng, 3), [5, 6, 7], [0, 1, 2], [3]),
            record(ids(rng, 3), [8, 9, 10], [2, 2, 3], None),
            record(ids(rng, 3), [11, 12, 13], [3, 3, 4], None),
            record(ids(rng, 2), [14, 15], [4, 5], None),
        ]
    }
    with moetrace.open(save(tmp_path / "x.pt", content)) as trace:
        of = {name: trace.sel(request=name).token_ids.tolist() for name in trace.requests["id"]}
    # 13 at position 4 may be of the third text alone, and of what was not told apart nothing ends before it
    assert of == {
        "text-0": [1, 2], "text-1": [3, 4], "text-2": [5, 6, 7, 10, 13, 15], "unassigned": [8, 9, 11, 12, 14],
    }  # fmt: skip


def test_sums_are_counts(torch: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    sums = rng.integers(0, 9, (3, L, E)).astype(np.int64)
    sums[:, 0] = 0  # dense
    place = np.stack([np.r_[rng.permutation(E), 0, 1] for _ in range(L)]).astype(
        np.int64
    )  # two experts twice
    passes = [rng.integers(0, 9, (L, E + 2)).astype(np.int32) for _ in range(2)]
    contents = {
        "stat": {"rank": 0, "logical_count": sums},
        "pass": {
            "records": [
                {"forward_pass_id": i, "global_physical_count": each} for i, each in enumerate(passes)
            ],
            "last_physical_to_logical_map": place,
        },
    }
    for name, content in contents.items():
        path = save(tmp_path / f"{name}.pt", content)
        table = moetrace.open(path)
        assert isinstance(table, CountTable)
        if name == "stat":
            assert table.layers.tolist() == [1, 2, 3]
            np.testing.assert_array_equal(table.counts[0], sums.sum(axis=0)[1:])
        else:
            slow = np.zeros((L, E), int)
            for each in passes:
                for layer in range(L):
                    for physical in range(E + 2):
                        slow[layer, place[layer, physical]] += each[layer, physical]
            np.testing.assert_array_equal(table.counts[0], slow)
        assert main(["stats", str(path), "--only", "load-balance"]) == 0
        with pytest.raises(InputError, match="sums, not tokens"):
            import_trace(path, tmp_path / "t.moet")


def test_tensors_are_read_as_they_lie(torch: Any, tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    content = {
        "a": array,
        "b": np.asfortranarray(array),
        "c": [1, "x", None, 2.5],
        "d": np.empty((0, 3), np.float32),
    }
    read = read_torch_file(save(tmp_path / "x.pt", content))
    np.testing.assert_array_equal(read["a"], array)
    np.testing.assert_array_equal(read["b"], array)
    assert read["c"] == content["c"]
    assert read["d"].shape == (0, 3)


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def test_nothing_is_run(torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in ({"records": _Runs()}, {"logical_count": np.float64(1)}, [types.SimpleNamespace()]):
        path = save(tmp_path / "x.pt", content)
        with pytest.raises(InputError, match="is not run"):
            moetrace.open(path)
    assert not (tmp_path / "owned").exists()


def test_damage_is_refused(torch: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    good = record(ids(rng, 2), [1, 2], [0, 1], [2])
    wrong = [
        good | {"positions": [0]},
        good | {"extend_seq_lens": [1]},
        good | {"forward_mode": 3},
        good | {"topk_ids_of_layer": good["topk_ids_of_layer"][0]},
        good | {"topk_ids_of_layer": good["topk_ids_of_layer"] + 70000},
    ]
    for one in wrong:
        with pytest.raises(InputError, match="record 0"):
            import_trace(save(tmp_path / "x.pt", {"records": [one]}), tmp_path / "t.moet")
    for content in ({}, {"records": []}, [1], {"records": [1]}):
        with pytest.raises(InputError, match="no recorder's file"):
            moetrace.open(save(tmp_path / "x.pt", content))
    whole = save(tmp_path / "x.pt", {"records": [good]}).read_bytes()
    said = 0
    for i, at in enumerate(rng.integers(0, len(whole), 300).tolist()):
        changed = bytearray(whole)
        changed[at] ^= int(rng.integers(1, 256))
        (tmp_path / "y.pt").write_bytes(bytes(changed))
        try:
            import_trace(tmp_path / "y.pt", tmp_path / f"{i}.moet")
        except InputError:
            said += 1
    assert said > 100
