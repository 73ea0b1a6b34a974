"""``moetrace import``: options to call, and what it says."""

import pytest
from recordings import write

import moetrace
from moetrace.__main__ import run as command_line
from moetrace.commands.options import typed
from moetrace.errors import MoetraceError, UsageError


def run(*argv):
    return command_line(["import", *map(str, argv)])


@pytest.fixture
def log(tmp_path):
    return write(
        tmp_path / "x.log",
        "layer_id,expert_ids",
        "0,3 1 0 2",
        "1,1 0 2 3",
        "0,1 2",
        "0,3 4",
        "1,5 6",
        "0,1 2",
        "1,0 3",
    )


def test_import(log, tmp_path, capsys):
    assert run(log, "-o", tmp_path / "t.moet", "--n-expert", 8, "--label", "code") == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"Wrote {tmp_path / 't.moet'}: 3 tokens of 1 requests, from expert-log",
        "Not in the source: weights, token, position, phase, time",
        "1 rows left out: they ran every expert, as llama.cpp's warm-up does",
        "1 records of the last layer left out: the source does not say whose they are",
        f"Next: {typed()} info {tmp_path / 't.moet'}",
    ]
    trace = moetrace.open(tmp_path / "t.moet")
    assert trace.n_expert.tolist() == [8, 8]
    assert trace.requests["label"].tolist() == ["code"]


def test_as_published(log, tmp_path, capsys):
    run(log, "-o", tmp_path / "t.moet", "--as-published")
    assert "left out" not in capsys.readouterr().out
    assert len(moetrace.open(tmp_path / "t.moet")) == 4


def test_force_replaces_a_trace_and_nothing_else(log, tmp_path):
    out = tmp_path / "t.moet"
    run(log, "-o", out)
    with pytest.raises(MoetraceError, match="cannot write"):
        run(log, "-o", out)
    run(log, "-o", out, "--force", "--n-expert", 9)
    assert moetrace.open(out).n_expert.tolist() == [9, 9]
    broken = write(tmp_path / "y.log", "0,1 2", "0,1 x")
    with pytest.raises(MoetraceError, match="is no whole number"):
        run(broken, "-o", out, "--force")
    assert len(moetrace.open(out)) == 3  # the old trace is still there
    other = tmp_path / "letters"
    write(other / "a.txt", "dear")
    with pytest.raises(MoetraceError, match="cannot write"):
        run(log, "-o", other, "--force")
    assert (other / "a.txt").exists()


def test_what_is_imported_verifies(log, tmp_path, capsys):
    run(log, "-o", tmp_path / "t.moet")
    assert command_line(["verify", str(tmp_path / "t.moet")]) == 0, capsys.readouterr().out
    assert command_line(["info", str(tmp_path / "t.moet")]) == 0


@pytest.mark.parametrize("option", ["--n-expert", "--n-expert-used"])
def test_nonsense(log, tmp_path, option):
    with pytest.raises(UsageError, match=f"{option} 0: there is at least one"):
        run(log, "-o", tmp_path / "t.moet", option, 0)
