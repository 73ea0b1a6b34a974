"""Interventions that steer, and files of them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from moetrace import data
from moetrace.__main__ import main
from moetrace.commands.capturing import interventions_of
from moetrace.commands.demo import unpack
from moetrace.errors import InputError
from moetrace.findings.steering import interventions
from moetrace.trace.intervention import parse_interventions


def test_biases_are_what_intervene_takes() -> None:
    experts = pd.DataFrame(
        {
            "layer": [3, 3, 5, 3],
            "expert": [4, 9, 1, 0],
            "kind": ["favoured", "favoured", "against", "against"],
        }
    )
    said = interventions(experts, 0.25)
    assert said == ["bias:3:0=-0.25", "bias:3:4,9=+0.25", "bias:5:1=-0.25"]
    assert [str(one) for one in parse_interventions(said)] == said


def test_a_file_of_interventions(tmp_path: Path) -> None:
    path = tmp_path / "steer.txt"
    path.write_text("# toward code\nbias:3:4=+0.1\n\nreplay:other.moet#7\n")
    assert interventions_of(["ablate:1:2", f"@{path}"]) == [
        "ablate:1:2",
        "bias:3:4=+0.1",
        "replay:other.moet#7",
    ]
    assert interventions_of(None) == []
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match="holds no intervention"):
        interventions_of([f"@{path}"])
    with pytest.raises(InputError, match="cannot be read"):
        interventions_of([f"@{tmp_path / 'none'}"])


def test_it_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = str(unpack(data.recorded_demo(), tmp_path))
    line = ["analyze", "steering", trace, "-m", str(data.demo_model())]
    for more, why in (
        (["--toward", "poetry"], "choose among: code"),
        (["--strengths", "0"], "numbers above 0"),
        (["--strengths", "a"], "numbers above 0"),
    ):
        assert main([*line, *more]) == 2
        assert why in capsys.readouterr().err
