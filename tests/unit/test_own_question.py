"""A question from another distribution is asked, shown and explained as moetrace's own are."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import traces

from moetrace.__main__ import main
from moetrace.findings import QUESTIONS, Finding, question
from moetrace.report import methods

EXAMPLE = Path(__file__).resolve().parents[1] / "example_question"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sys.path that holds what installing the example would put there."""
    folder = tmp_path_factory.mktemp("site")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    (folder / "share_of_busiest.py").write_bytes((EXAMPLE / "share_of_busiest.py").read_bytes())
    said = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    said.mkdir()
    (said / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"]
    lines = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items()
    ]
    (said / "entry_points.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def looked_for_anew() -> Iterator[None]:
    """Questions are looked for when they are first asked for, once in a process."""

    def forget() -> None:
        QUESTIONS.__dict__.pop("_found", None)
        methods.methods.cache_clear()
        methods._words.cache_clear()

    forget()
    yield
    forget()


def test_it_is_asked_by_name_and_has_its_place_in_the_report(
    installed: Path,
    looked_for_anew: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(installed))
    path = str(traces.labelled_trace(tmp_path / "t.moet"))
    assert main(["analyze", "share-of-busiest", path, "--n", "3", "--format", "json"]) == 0
    (finding,) = json.loads(capsys.readouterr().out)
    assert finding["sentences"][0].startswith("The 3 busiest experts get most in layer")
    assert finding["parameters"] == {"n": 3}
    names = list(QUESTIONS)
    assert names[names.index("share-of-busiest") - 1] == "load-balance"
    made = tmp_path / "made"
    made.mkdir()
    for name in set(names) - {"share-of-busiest"}:  # all others were asked before, so to speak
        (made / f"{name}.json").write_text(Finding(name, name, not_answered="not now").to_json())
    assert main(["report", path, "-o", str(tmp_path / "out"), "--findings", str(made)]) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert 'id="q-share-of-busiest"' in page
    assert 'id="m-busiest"' in page
    assert 'href="#m-busiest"' in page
    assert (tmp_path / "out" / "figures" / "share-of-busiest-share.png").is_file()
    assert (tmp_path / "out" / "tables" / "share-of-busiest-share.csv").is_file()


def test_one_that_is_broken_is_said_and_the_others_are_asked(
    looked_for_anew: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "site" / "broken-1.0.dist-info"
    said.mkdir(parents=True)
    (said / "METADATA").write_text("Name: broken\nVersion: 1.0\n")
    (said / "entry_points.txt").write_text(
        "[moetrace.questions]\nx = no_such_module:X\ny = json:JSONDecoder\n"
    )
    monkeypatch.syspath_prepend(str(said.parent))
    with pytest.warns(RuntimeWarning) as warned:
        assert question("load-balance").title == "Load balance"
    assert [str(each.message) for each in warned] == [
        "the question no_such_module:X cannot be asked: No module named 'no_such_module'",
        "the question json:JSONDecoder cannot be asked: it is no new question",
    ]
