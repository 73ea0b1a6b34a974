"""``moetrace demo``: the shipped model from start to end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import moetrace
from moetrace.__main__ import COMMANDS, main

pytestmark = pytest.mark.runtime


def test_demo_records_the_shipped_model_and_shows_real_differences(
    runtime: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "-o", str(tmp_path), "-n", "8", "-np", "3", "-t", "1"]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^ +(\d)  \d\.\d{3}  \d\.\d{3}    (\d\.\d{3}) \((\d\.\d{3}) to", out, re.MULTILINE)
    assert [int(layer) for layer, *_ in rows] == list(range(8))
    assert float(rows[6][2]) > 0.01  # layer 6 tells the prompts' domains apart, its whole interval
    assert "Domains differ in which experts they use in layers" in out
    assert "llama.cpp did not compute" in out  # the last layer of prompt tokens
    commands = re.findall(r"moetrace (\w+) \S+demo.moet", out)
    assert set(commands) - {"report"} <= set(COMMANDS)
    with moetrace.open(tmp_path / "demo.moet") as trace:
        assert trace.facts["model"]["architecture"] == "olmoe"
        assert trace.requests["label"].nunique() == 5
        assert trace.loss.complete
