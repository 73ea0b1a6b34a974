"""Many traces are one thing: found, told apart, named, and left out only if asked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
import traces

import moetrace
from moetrace.__main__ import main
from moetrace.analysis import from_trace
from moetrace.errors import InputError, MoetraceError, TraceError, UsageError
from moetrace.findings import Subject
from moetrace.trace.fleet import Traces, apart
from moetrace.trace.jsonfile import read_json, write_json

Capture = pytest.CaptureFixture[str]


def renamed(path: Path, name: str) -> Path:
    """The same trace, of another model."""
    facts = read_json(path / "ctx0" / "context.json")
    write_json(path / "ctx0" / "context.json", {**facts, "model": {**facts["model"], "name": name}})
    return path


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """Two days of two servers, whose traces are called alike; none of the requests has an id."""
    root = tmp_path / "fleet"
    for i, day in enumerate(("monday", "tuesday")):
        for j, server in enumerate(("a", "b")):
            path = traces.labelled_trace(root / day / f"{server}.moet", seed=2 * i + j)
            (path / "labels.jsonl").unlink()
    (root / "notes").mkdir()
    (root / "notes" / "meta.json").write_text("{}")
    (root / "monday" / "readme.txt").write_text("no trace")
    return root


@pytest.fixture(params=["folder", "pattern", "deep pattern", "file", "memory"])
def where(request: pytest.FixtureRequest, fleet: Path) -> Iterator[str]:
    match request.param:
        case "folder":
            yield str(fleet)
        case "pattern":
            yield f"{fleet}/*day/*.moet"
        case "deep pattern":
            yield f"{fleet}/**/*.moet"
        case "file":
            yield f"file://{fleet}"
        case _:
            files = fsspec.filesystem("memory")
            files.put(str(fleet), "/bucket/fleet", recursive=True)
            yield "memory://bucket/fleet"
            files.rm("/bucket", recursive=True)


def test_they_are_found_and_named(fleet: Path, where: str) -> None:
    with moetrace.open(where) as found:
        assert isinstance(found, Traces)
        assert found.names == ("monday/a", "monday/b", "tuesday/a", "tuesday/b")
        one_by_one = [moetrace.open(p) for p in sorted(fleet.glob("*/*.moet"))]
        for trace, single in zip(found, one_by_one, strict=True):
            np.testing.assert_array_equal(trace.experts, single.experts)
        assert found.left_out == ()
        requests = found.requests
        assert len(requests) == sum(len(trace.requests) for trace in one_by_one)
        assert requests.index.is_unique
        pd.testing.assert_frame_equal(requests.loc["tuesday/a"], one_by_one[2].requests, check_names=False)
        assert [len(found[:3]), found[:3].names[-1]] == [3, "tuesday/a"]
        # a request without an id is called after its server
        counts = Subject(found).counts
        assert {name.rsplit("#")[0] for name in counts.prompts} == set(found.names)
        together = from_trace(*one_by_one, names=found.names).counts
        np.testing.assert_array_equal(counts.included, together.included)


def test_models_are_told_apart(fleet: Path, capsys: Capture) -> None:
    for path in (fleet / "tuesday").glob("*.moet"):
        renamed(path, "other")
    with moetrace.open(fleet) as found:
        assert {name: of.names for name, of in found.models.items()} == {
            "toy": ("monday/a", "monday/b"),
            "other": ("tuesday/a", "tuesday/b"),
        }
    with moetrace.open(fleet, model="other") as found:
        assert found.names == ("tuesday/a", "tuesday/b") or found.names == ("a", "b")
        assert [Path(path).parent.name for path, _ in found.left_out] == ["monday", "monday"]
    with pytest.raises(UsageError, match="none of 4 traces"):
        moetrace.open(fleet, model="nobody")
    assert main(["stats", str(fleet), "--only", "load-balance"]) != 0
    assert "different models" in capsys.readouterr().out
    assert main(["stats", str(fleet), "--only", "load-balance", "--model", "other"]) == 0
    shown = capsys.readouterr()
    assert "Layer" in shown.out
    assert shown.err.count("is left out: it has no context of that model") == 2


def test_what_cannot_be_read_is_named_and_left_out_only_if_asked(fleet: Path, capsys: Capture) -> None:
    (fleet / "monday" / "b.moet" / "ctx0" / "context.json").write_text("{")
    with pytest.raises(TraceError, match="1 of 4 traces") as refused:
        moetrace.open(fleet)
    assert "b.moet" in str(refused.value.why)
    with moetrace.open(fleet, unreadable="leave out") as found:
        assert len(found) == 3
        assert [Path(path).name for path, _ in found.left_out] == ["b.moet"]
    assert main(["stats", str(fleet), "--only", "load-balance"]) == 1
    assert "--leave-out-unreadable" in capsys.readouterr().err
    assert main(["stats", str(fleet), "--only", "load-balance", "--leave-out-unreadable"]) == 0
    assert "b.moet is left out" in capsys.readouterr().err
    paths = [str(fleet / "monday" / "b.moet"), str(fleet / "monday" / "a.moet")]
    assert main(["stats", *paths, "--only", "load-balance"]) == 1
    assert main(["stats", *paths, "--only", "load-balance", "--leave-out-unreadable"]) == 0
    assert main(["stats", paths[0], "--only", "load-balance", "--leave-out-unreadable"]) == 1
    shutil.rmtree(fleet / "monday")
    shutil.rmtree(fleet / "tuesday")
    with pytest.raises(InputError):
        moetrace.open(fleet)


def test_what_is_no_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no trace"):
        moetrace.open(f"{tmp_path}/*.moet")
    with pytest.raises(MoetraceError, match="cannot be read"):
        moetrace.open("nosuchprotocol://bucket/fleet")
    with pytest.raises(InputError, match="holds no trace"):
        moetrace.open("memory://nothing/here")


def test_a_copy_from_afar_goes_nowhere_else(tmp_path: Path) -> None:
    """Names in a store are not paths: one with .. is refused."""
    files = fsspec.filesystem("memory")
    traces.small_trace(tmp_path / "t.moet")
    files.put(str(tmp_path / "t.moet"), "/evil/t.moet", recursive=True)
    files.store["/evil/t.moet/../../../../outside"] = files.store["/evil/t.moet/meta.json"]
    with pytest.raises(InputError, match="cannot be read") as refused:
        moetrace.open("memory://evil/t.moet")
    files.rm("/evil", recursive=True)
    assert "elsewhere" in str(refused.value.why)
    assert not (tmp_path.parent / "outside").exists()


def test_names_are_as_long_as_they_must_be() -> None:
    assert apart([Path("/x/a.moet"), Path("/y/b.moet")]) == ["a", "b"]
    assert apart([Path("/x/a.moet"), Path("/y/a.moet"), Path("/y/b.moet")]) == ["x/a", "y/a", "b"]
    assert apart([Path("/1/x/a.moet"), Path("/2/x/a.moet")]) == ["1/x/a", "2/x/a"]
    assert apart([Path("/x/a.moet"), Path("/x/a.moet")]) == ["a", "a"]
