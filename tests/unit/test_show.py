"""A request's text, token by token, with its experts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traces import labelled_trace

import moetrace
from moetrace import data
from moetrace.__main__ import main
from moetrace.commands import show as show_module
from moetrace.commands.demo import unpack


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(data.recorded_demo(), tmp_path_factory.mktemp("demo"))


def test_a_line_for_each_token_without_colours(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(demo), "--request", "math-03", "--layer", "5"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    with moetrace.open(demo) as trace:
        rows = trace.sel(request="math-03", layer=5)
        order = np.argsort(rows.positions, kind="stable")
        assert head.startswith(f"request {int(rows.request[0])} (math-03), math: layer 5, {len(rows)} tokens")
        cells = [line.split("\t") for line in lines]
        assert [int(cell[0]) for cell in cells] == rows.positions[order].tolist()
        assert [[int(e.split(":")[0]) for e in cell[3].split()] for cell in cells] == rows.experts[
            order, 0
        ].tolist()
        weights = [[float(e.split(":")[1]) for e in cell[3].split()] for cell in cells]
        np.testing.assert_allclose(weights, rows.weights[order, 0], atol=6e-4)
        assert [cell[1] for cell in cells] == [("prefill", "decode")[p] for p in rows.phase[order]]


def test_in_colours_it_is_the_text(
    demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show_module, "use_color", lambda stream: True)
    for more in ([], ["--expert", "9"]):
        assert main(["show", str(demo), "--request", "code-04", "--layer", "3", *more]) == 0
        out = capsys.readouterr().out
        text = re.sub(r"\x1b\[[0-9;]*m", "", out)
        with moetrace.open(demo) as trace:
            rows = trace.sel(request="code-04", layer=3)
            prompt = trace.requests.loc[int(rows.request[0]), "prompt"]
            used = int((rows.experts[:, 0] == 9).any(axis=1).sum())
        assert prompt.strip()[:60] in text.replace("▸", "")
        if more:
            assert f"used by {used} of {len(rows)} tokens" in text
        else:
            assert re.search(r" 9  +\d+%", text)


def test_json_is_what_the_lines_say(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["show", str(demo), "--request", "math-03", "--layer", "7"]
    assert main([*line, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert main(line) == 0
    lines = [text.split("\t") for text in capsys.readouterr().out.splitlines()[1:]]
    assert said["positions"] == [int(cells[0]) for cells in lines]
    assert said["generated"] == [cells[1] == "decode" for cells in lines]
    shown = [[] if "not" in cells[3] else [int(e.split(":")[0]) for e in cells[3].split()] for cells in lines]
    assert [[e for e in row if e >= 0] for row in said["experts"]] == shown
    assert (said["id"], said["label"], said["layer"]) == ("math-03", "math", 7)


def test_what_is_not_there_is_said(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(demo), "--layer", "7"]) == 0  # llama.cpp computes it for outputs only
    assert "not computed or lost" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--layer", "99"], "no layer 99"),
        (["--expert", "32"], "no expert 32"),
        (["--request", "nobody"], "nobody"),
    ],
)
def test_what_does_not_exist_is_refused(
    demo: Path, arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(demo), *arguments]) == 2
    assert why in capsys.readouterr().err


def test_a_trace_without_words_or_ids(tmp_path: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    path = labelled_trace(tmp_path / "t.moet")
    assert main(["show", str(path), "--request", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("request 1")
    assert len(out.splitlines()) > 2
