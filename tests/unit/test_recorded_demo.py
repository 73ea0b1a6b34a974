"""The recording that is shipped: it is whole, of the shipped model and prompts, and says nothing of a machine."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

import pytest

import moetrace
from moetrace import data
from moetrace.__main__ import main
from moetrace.commands.demo import unpack
from moetrace.errors import InputError
from moetrace.model.file import ModelFile
from moetrace.trace.verify import verify


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(data.recorded_demo(), tmp_path_factory.mktemp("demo"))


def test_it_is_whole_and_of_what_is_shipped(demo: Path) -> None:
    assert verify(demo).exit_code == 0
    lines = data.prompts("domains").read_text().splitlines()
    asked = {line["id"]: line["prompt"] for line in map(json.loads, lines)}
    with moetrace.open(demo) as trace, ModelFile(data.demo_model()) as model:
        assert trace.loss.rows_lost == 0
        said = trace.requests
        assert dict(zip(said["id"], said["prompt"], strict=True)) == asked
        assert trace.facts["fingerprint"] == model.fingerprint
        assert trace.vocabulary == model.vocabulary


def test_it_names_no_machine_and_is_small(demo: Path) -> None:
    for file in (demo / "meta.json", demo / "ctx0" / "context.json", demo / "labels.jsonl"):
        assert not re.search(r'"/|/home/|/root|\.venv', file.read_text()), file
    packed = data.recorded_demo()
    assert packed.stat().st_size < 3_000_000
    with tarfile.open(packed) as archive:
        assert {(m.uid, m.uname, m.mtime) for m in archive} == {(0, "", 0)}


def test_it_is_shown_with_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d").mkdir()
    unpack(data.recorded_demo(), tmp_path / "d")  # what an earlier call unpacked is replaced
    assert main(["demo", "--recorded", "-o", str(tmp_path / "d")]) == 0
    out = capsys.readouterr().out
    assert "How far apart the domains' experts are" in out
    assert "specialists" in out
    assert (tmp_path / "d" / "report" / "report.html").stat().st_size > 100_000


def test_what_is_no_trace_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "demo.moet").mkdir()
    (tmp_path / "demo.moet" / "mine").touch()
    with pytest.raises(InputError, match="in the way"):
        unpack(data.recorded_demo(), tmp_path)
    assert (tmp_path / "demo.moet" / "mine").exists()
