"""Questions, findings, and how they are shown."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pandas as pd
import pytest
import traces

import moetrace
from moetrace.__main__ import main
from moetrace.analysis import load_balance
from moetrace.errors import InputError, UsageError
from moetrace.findings import QUESTIONS, Finding, Subject, question
from moetrace.report.files import write_finding
from moetrace.report.text import render, table_text

TABLE = pd.DataFrame({"layer": [0, 1], "value": [0.5e-12, float("nan")], "name": ["a", None]})


def test_a_finding_survives_json_with_its_missing_values() -> None:
    made = Finding(
        "load-balance", "Load balance", ("one",), ("two",), {"t": TABLE}, {"level": 0.95}, False, "Decode."
    )
    again = Finding.from_json(made.to_json())
    assert (again.concludes, again.phase_note, again.not_answered) == (False, "Decode.", None)
    assert again.sentences == ("one",)
    assert again.parameters == {"level": 0.95}
    assert again.tables["t"]["layer"].tolist() == [0, 1]
    assert again.tables["t"]["value"][0] == pytest.approx(0.5e-12, abs=0)
    assert again.tables["t"].isna().to_numpy().tolist() == TABLE.isna().to_numpy().tolist()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"tables": {"t": 3}}', '{"name": "x", "tables": {}, "a": 1}']
)
def test_what_is_no_finding_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="holds no finding"):
        Finding.from_json(text)


def test_labels_belong_into_columns() -> None:
    with pytest.raises(ValueError, match="index"):
        Finding("x", "X", tables={"t": TABLE.set_index("value")})
    with pytest.raises(ValueError, match="table name"):
        Finding("x", "X", tables={"No good": TABLE})


def test_missing_values_are_printed_as_nothing_not_as_zero() -> None:
    lines = table_text(TABLE).split("\n")
    assert lines[3].split() == ["1"]
    assert table_text(TABLE, max_rows=1).endswith("… 1 more rows; all of them with --format csv")


@pytest.mark.parametrize("form", ["table", "md"])
def test_what_others_wrote_does_not_steer_the_terminal_or_break_the_table(form: str) -> None:
    table = pd.DataFrame({"label": ["\x1b[2J\nred|"], "n": [1]})
    text = render([Finding("x", "X", ("\x1b[31mloud",), tables={"t": table})], form)
    assert "\x1b" not in text
    assert "�[2J red" in text
    assert ("red\\|" in text) == (form == "md")


def test_an_unknown_question_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="no analysis 'nope'"):
        question("nope")


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_is_described_and_named_after_its_file(name: str) -> None:
    asked = question(name)
    assert asked.name == name
    assert asked.title
    assert (asked.__doc__ or "").split("\n")[0].endswith("?")


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_that_cannot_be_answered_says_why(name: str) -> None:
    finding = question(name)().ask(Subject([]))
    assert finding.not_answered
    assert "fix:" in finding.not_answered
    assert "Not answered" in render([finding], "table")


def test_analyze_prints_every_format_and_writes_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = traces.small_trace(tmp_path / "t.moet")
    out = {}
    for form in ("table", "md", "csv", "json"):
        assert (
            main(["analyze", "load-balance", str(path), "--format", form, "-o", str(tmp_path / "out")]) == 0
        )
        out[form] = capsys.readouterr().out
    with moetrace.open(path) as trace:
        counts = Subject([trace]).counts
        expected = load_balance(counts.included, counts.tokens)
    assert "Load balance" in out["table"]
    assert "## Load balance" in out["md"]
    assert len(pd.read_csv(io.StringIO(out["csv"]))) == len(expected)
    finding = Finding.from_json(json.dumps(json.loads(out["json"])[0]))
    assert finding.tables["load_balance"]["tokens"].tolist() == expected["tokens"].tolist()
    names = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*"))
    assert names == [
        "figures/load-balance-jain.pdf",
        "figures/load-balance-jain.png",
        "figures/load-balance-jain.svg",
        "load-balance.json",
        "tables/load-balance-load_balance.csv",
    ]


def test_a_saved_finding_draws_the_same_figure(tmp_path: Path) -> None:
    with moetrace.open(traces.small_trace(tmp_path / "t.moet")) as trace:
        finding = question("load-balance")().answer(Subject([trace]))
    again = Finding.from_json(finding.to_json())
    for each, folder in ((finding, tmp_path / "a"), (again, tmp_path / "b")):
        write_finding(each, folder)
    png = Path("figures/load-balance-jain.png")
    assert (tmp_path / "a" / png).read_bytes() == (tmp_path / "b" / png).read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [[], ["t.moet", "-p", "hello"], ["t.moet", "--", "-ngl", "1"]],
)
def test_analyze_refuses_what_makes_no_sense(arguments: list[str]) -> None:
    assert main(["analyze", "load-balance", *arguments]) == 2


@pytest.mark.parametrize("name", QUESTIONS)
def test_no_parameter_takes_the_name_of_an_option_that_all_share(name: str) -> None:
    """They would clash on the command line."""
    shared = {
        "phase",
        "layers",
        "seed",
        "format",
        "max_rows",
        "output",
        "model",
        "prompt",
        "file",
        "n_predict",
    }
    assert not shared & set(question(name).__dataclass_fields__)


def test_a_single_prompt_concludes_nothing_that_needs_several(tmp_path: Path) -> None:
    """No layer is said to be none of those that an interval tells apart, where there is no interval."""
    path = traces.labelled_trace(tmp_path / "t.moet", ("a",), n_prompts=1, n_decode=(300, 301))
    with moetrace.open(path) as trace:
        subject = Subject([trace])
        found = {name: question(name)().ask(subject) for name in QUESTIONS}
    open_ones = (
        "domain-separation",
        "specialists",
        "deep-dive",
        "depth-contrast",
        "persistence",
        "domain-entropy",
    )
    assert [name for name in open_ones if found[name].concludes] == []
    said = {name: " ".join(f.sentences) for name, f in found.items() if f.not_answered is None}
    assert [name for name, text in said.items() if "in none of" in text] == []
    assert "no interval" in said["generation-dynamics"]
