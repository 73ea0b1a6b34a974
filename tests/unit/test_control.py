"""What was set for a recording outlives its rings: the last word counts, for whom it was said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moetrace.trace.control import remember, remember_for_all


def ring(trace: Path, model: object, role: str = "main") -> Any:
    return SimpleNamespace(path=trace / "ctx0" / "ring", meta={"model_id": model, "role": role})


def said(trace: Path) -> dict[str, list[str]]:
    return {path.name: path.read_text().splitlines() for path in sorted((trace / "control").iterdir())}


def test_each_setting_stands_by_itself(tmp_path: Path) -> None:
    one = ring(tmp_path, "0123abcd")
    remember(one, intervention=3)
    remember(one, paused=1)
    remember(one, paused=0)
    assert said(tmp_path) == {"0123abcd": ["intervention=3", "paused=0"]}


def test_what_is_said_of_all_is_newer_than_what_was_said_of_one(tmp_path: Path) -> None:
    one, two = ring(tmp_path, "0123abcd"), ring(tmp_path, "89abcdef")
    for each in (one, two):
        remember(each, paused=0, intervention=2)
    remember_for_all(tmp_path, paused=1)
    assert said(tmp_path) == {
        "0123abcd": ["intervention=2"],
        "89abcdef": ["intervention=2"],
        "all": ["paused=1"],
    }
    remember(two, paused=0)
    remember_for_all(tmp_path, intervention=0)
    assert said(tmp_path) == {"0123abcd": [], "89abcdef": ["paused=0"], "all": ["paused=1", "intervention=0"]}


def test_a_draft_of_the_same_model_is_another(tmp_path: Path) -> None:
    remember(ring(tmp_path, "0123abcd"), paused=1, intervention=4)
    remember(ring(tmp_path, "0123abcd", "draft"), paused=1)
    assert said(tmp_path) == {"0123abcd": ["paused=1", "intervention=4"], "0123abcd-draft": ["paused=1"]}
    remember_for_all(tmp_path, paused=0)
    assert said(tmp_path)["0123abcd-draft"] == []


def test_nothing_is_written_elsewhere(tmp_path: Path) -> None:
    for model, role in (("../../escape", "main"), (None, "main"), ("0123abcd", "../x")):
        remember(ring(tmp_path, model, role), paused=1)
    assert not (tmp_path / "control").exists()
