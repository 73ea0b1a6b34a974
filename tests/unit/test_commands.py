"""The command line: what it prints, and how it leaves."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from traces import labelled_trace, small_trace

import moetrace
from moetrace.__main__ import COMMANDS, load, main, split
from moetrace.commands.options import typed
from moetrace.errors import MoetraceError, RuntimeMissingError, UsageError
from moetrace.host.options import human_size, parse_size
from moetrace.host.runtime import VARIABLES, find_tool, preload_environment
from moetrace.numbers import numbers
from moetrace.trace.jsonfile import read_json, write_json
from moetrace.trace.labels import append_labels
from moetrace.trace.writer import TraceWriter

GOLDEN = str(Path(__file__).parents[1] / "golden" / "two-contexts")
KILLED = str(Path(__file__).parents[1] / "golden" / "killed")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("MOETRACE_")]:
        monkeypatch.delenv(name)


def test_split_at_the_first_dashes() -> None:
    assert split(["run", "-o", "x", "--", "llama-server", "--", "-m"]) == (
        ["run", "-o", "x"],
        ["llama-server", "--", "-m"],
    )
    assert split(["info", "x"]) == (["info", "x"], None)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_variables(name: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as e:
        main([name, "--help"])
    assert e.value.code == 0
    out = capsys.readouterr().out
    parser = argparse.ArgumentParser()
    load(name).prepare_parser(parser)
    options = {option for action in parser._actions for option in action.option_strings if option[:2] == "--"}
    options.discard("--help")
    for option in options:
        assert f"MOETRACE_{option[2:].upper().replace('-', '_')}" in out, option
    assert (load(name).__doc__ or "").split("\n")[0] in out


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["info"], ["info", "a", "b"], ["info", GOLDEN, "--", "x"]]
)
def test_wrong_usage(argv: list[str], capsys: Capture) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error:" in captured.err
    assert "fix:" in captured.err


def test_errors_have_no_traceback(capsys: Capture) -> None:
    assert main(["info", "/nowhere/t.moet"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: /nowhere/t.moet does not exist")
    assert "Traceback" not in err


def test_version(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"moetrace {moetrace.__version__}\n"


def test_info(capsys: Capture) -> None:
    assert main(["info", GOLDEN]) == 0
    out = capsys.readouterr().out
    assert "2 rows lost" in out
    assert "90 = 70 present + 14 not computed + 6 lost" in out
    assert "\x1b" not in out
    assert main(["info", "--json", GOLDEN]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["contexts"][0]["loss"]["lost"] == 6


def test_verify_exit_codes(tmp_path: Path, capsys: Capture) -> None:
    assert main(["verify", GOLDEN]) == 0
    assert "fine" in capsys.readouterr().out
    assert main(["verify", "-q", GOLDEN]) == 0
    assert capsys.readouterr().out == ""
    assert main(["verify", KILLED]) == 3
    assert f"Next: {typed()} recover {KILLED}" in capsys.readouterr().out
    path = small_trace(tmp_path / "t")
    (path / "labels.jsonl").write_text("nonsense\n")
    assert main(["verify", str(path)]) == 4


def test_recover(tmp_path: Path, capsys: Capture) -> None:
    path = small_trace(tmp_path / "t", close=False, sealed=11)
    assert main(["recover", str(path)]) == 0
    out = capsys.readouterr().out
    assert "ctx0: 9 rows were safe, 21 recovered, nothing lost" in out
    assert main(["verify", str(path)]) == 0


def test_recover_and_import_say_it_as_json(tmp_path: Path, capsys: Capture) -> None:
    path = small_trace(tmp_path / "t", close=False, sealed=11)
    assert main(["recover", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["contexts"] == [
        {"name": "ctx0", "sealed": 9, "recovered": 21, "torn": 0, "lost": 0, "note": ""}
    ]
    (tmp_path / "log.csv").write_text("layer_id,expert_ids\n0,3 1\n")
    assert main(["import", str(tmp_path / "log.csv"), "-o", str(tmp_path / "i.moet"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["format"], said["rows"], said["path"]) == ("expert-log", 1, str(tmp_path / "i.moet"))
    assert "weights" in said["missing"]


def test_dump_is_one_line_per_token_and_layer(capsys: Capture) -> None:
    assert main(["dump", GOLDEN]) == 0
    lines = list(csv.DictReader(capsys.readouterr().out.splitlines(), delimiter="\t"))
    trace = moetrace.open(GOLDEN)
    assert len(lines) == 28 * 3
    for n, line in enumerate(lines):
        i, j = divmod(n, 3)
        assert int(line["serial"]) == trace.serial[i]
        assert int(line["layer"]) == trace.layers[j]
        chosen = [] if line["experts"] == "-" else [pair.split(":") for pair in line["experts"].split()]
        want = [int(e) for e in trace.experts[i, j] if e != 65535]
        assert [int(e) for e, _ in chosen] == want
        np.testing.assert_allclose([float(w) for _, w in chosen], trace.weights[i, j, : len(want)], rtol=1e-5)


def test_dump_of_a_selection(capsys: Capture) -> None:
    assert main(["dump", GOLDEN, "--layers", "3", "--request", "1-2", "--phase", "decode"]) == 0
    lines = list(csv.DictReader(capsys.readouterr().out.splitlines(), delimiter="\t"))
    assert {line["layer"] for line in lines} == {"3"}
    assert {line["phase"] for line in lines} == {"decode"}
    assert main(["dump", GOLDEN, "--context", "ctx1"]) == 0
    assert ":" not in capsys.readouterr().out


@pytest.mark.parametrize("format_name", ["csv", "jsonl", "parquet", "arrow"])
def test_export_in_long_form(tmp_path: Path, format_name: str, capsys: Capture) -> None:
    if format_name in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")
    output = tmp_path / f"x.{format_name}"
    assert main(["export", GOLDEN, "-o", str(output), "--layers", "1,3"]) == 0
    assert f"Wrote {output}" in capsys.readouterr().err
    want = moetrace.open(GOLDEN).sel(layer=[1, 3]).to_pandas()
    if format_name == "csv":
        got = pd.read_csv(output)
    elif format_name == "jsonl":
        got = pd.read_json(output, lines=True)
    elif format_name == "parquet":
        got = pd.read_parquet(output)
    else:
        import pyarrow as pa

        with pa.ipc.open_stream(output) as reader:
            got = reader.read_pandas()
    assert list(got) == list(want)
    for name in ("request", "token", "position", "layer", "expert", "rank"):
        np.testing.assert_array_equal(got[name], want[name])
    np.testing.assert_array_equal(got["weight"].astype(np.float32), want["weight"])
    assert got["phase"].astype(str).tolist() == want["phase"].astype(str).tolist()
    assert main(["export", GOLDEN, "-o", str(output)]) == 2
    assert main(["export", GOLDEN, "-o", str(output), "--force"]) == 0


def test_export_npz_holds_the_columns(tmp_path: Path) -> None:
    output = tmp_path / "x.npz"
    assert main(["export", GOLDEN, "-o", str(output), "--request", "0,2"]) == 0
    part = moetrace.open(GOLDEN).sel(request=[0, 2])
    with np.load(output) as got:
        assert {"layers", "n_expert", "n_expert_used", "contexts", *part.column_names} == set(got.files)
        for name in part.column_names:
            np.testing.assert_array_equal(got[name], part.column(name))


def test_export_to_stdout_needs_a_format(capsys: Capture) -> None:
    assert main(["export", GOLDEN]) == 2
    assert main(["export", GOLDEN, "--format", "npz"]) == 2
    assert "cannot be written to stdout" in capsys.readouterr().err


def test_variables(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("MOETRACE_LAYERS", "3")
    monkeypatch.setenv("MOETRACE_JSON", "1")
    assert main(["dump", GOLDEN]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 28
    assert main(["dump", GOLDEN, "--layers", "1,2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 56
    assert main(["info", GOLDEN]) == 0
    assert json.loads(capsys.readouterr().out)
    monkeypatch.setenv("MOETRACE_JSON", "0")
    assert main(["info", GOLDEN]) == 0
    assert capsys.readouterr().out.startswith("trace")
    monkeypatch.setenv("MOETRACE_PHASE", "later")
    assert main(["dump", GOLDEN]) == 2
    assert "MOETRACE_PHASE" in capsys.readouterr().err


def test_lists_of_numbers() -> None:
    assert numbers("0-2,7", "--layers") == [0, 1, 2, 7]
    for text in ("", "a", "3-1", "1-", "-1", "0-99999999", "1,,2"):
        with pytest.raises(UsageError):
            numbers(text, "--layers")


def run(*argv: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moetrace", *argv], capture_output=True, text=True, check=False, **options
    )  # type: ignore[call-overload]


def test_sizes_are_told_in_the_largest_unit_and_read_back() -> None:
    told = {0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 64 << 20: "64.0 MiB", 5 << 40: "5120.0 GiB"}
    assert {n: human_size(n) for n in told} == told
    assert parse_size(human_size(64 << 20).replace(".0", "")) == 64 << 20


def test_a_reader_that_leaves_is_no_error() -> None:
    script = f"{sys.executable} -m moetrace dump {GOLDEN} --layers 1; echo rc ${{PIPESTATUS[0]}} >&2"
    done = subprocess.run(
        ["bash", "-c", f"({script}) | head -n 1"], capture_output=True, text=True, check=True
    )
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_no_color() -> None:
    done = run("info", GOLDEN, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0
    assert "\x1b" not in done.stdout


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moetrace.commands.info.open_trace", interrupt)
    assert main(["info", GOLDEN]) == 130


def test_an_option_given_again_adds_up_and_wins_over_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETRACE_INTERVENE", "force:*:1")
    parser = argparse.ArgumentParser()
    load("run").prepare_parser(parser)
    assert parser.parse_args([]).intervene == ["force:*:1"]
    given = parser.parse_args(["--intervene", "ablate:0:1", "--intervene", "ablate:0:2"])
    assert given.intervene == ["ablate:0:1", "ablate:0:2"]


ESCAPE = "\x1b]0;PWNED\x07\x1b[2J"


def test_what_others_wrote_does_not_steer_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    """GIVEN names, a status and labels with escape sequences WHEN shown THEN no control character comes out."""
    path = tmp_path / "t"
    shutil.copytree(GOLDEN, path)
    facts = read_json(path / "ctx0" / "context.json")
    facts["model"]["name"] = facts["status"] = ESCAPE + "evil"
    write_json(path / "ctx0" / "context.json", facts)
    append_labels(path, [{"request": 0, "label": ESCAPE}])
    with (path / "labels.jsonl").open("a") as file:
        file.write(json.dumps({"request": 1, ESCAPE: ESCAPE, "crc": 1}) + "\n")
    for argv in (
        ["info"],
        ["verify"],
        ["dump"],
        ["dump", "--label", ESCAPE],
        ["stats"],
        ["dump", "--layers", ESCAPE],
    ):
        main([argv[0], str(path), *argv[1:]])
        shown = capsys.readouterr()
        text = (shown.out + shown.err).replace("\n", "").replace("\t", "")
        assert "\x1b" not in text, argv
        assert "\x07" not in text, argv
    main(["info", str(path)])
    assert "PWNED" in capsys.readouterr().out, "it is shown, only made harmless"


def test_the_tracers_variables_are_known() -> None:
    """GIVEN the keys that the tracer reads from its environment THEN Python hides these, and no others."""
    source = (Path(__file__).parents[2] / "csrc" / "config.cpp").read_text()
    keys = re.search(r"KEYS\[\] = \{(.*?)\}", source, re.DOTALL)
    assert keys is not None
    assert {f"MOETRACE_{key.upper()}" for key in re.findall(r'"(\w+)"', keys[1])} == set(VARIABLES)
    kept = preload_environment({"MOETRACE_LAYERS": "0", "MOETRACE_URL": "x", "PATH": "/bin"})
    assert "MOETRACE_LAYERS" not in kept
    assert kept["MOETRACE_URL"] == "x"


def test_an_empty_trace_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "t"
    TraceWriter(path).close()
    TraceWriter(path).close()
    (path / "mine.txt").write_text("not empty any more")
    with pytest.raises(MoetraceError, match="exists"):
        TraceWriter(path)
    (path / "mine.txt").unlink()
    trace = TraceWriter(path)
    assert trace.discard()
    assert not path.exists()
    path.mkdir()
    assert TraceWriter(path).discard()
    assert path.is_dir(), "it was there before"


@pytest.mark.parametrize(
    ("typed", "fix"),
    [
        (["stat", "t.moet"], "did you mean stats? Or see moetrace --help"),
        (["run", "llama-server", "-m", "x"], "moetrace run -- llama-server -m x"),
        (["doctor", "llama-server"], "moetrace doctor -- llama-server"),
        (["analyze", "load-balanc", "t"], "did you mean load-balance? Or see moetrace analyze --help"),
        (["analyze", "specialists", "t", "--permutation", "9"], "did you mean --permutations?"),
        (["stats", "t", "--phse", "decode"], "did you mean --phase? Or see moetrace stats --help"),
        (["stats", "t", "--phase", "decoding"], "did you mean decode?"),
        (["stats", "t", "--zzzz"], "see moetrace stats --help"),
        (["xyzzy"], "see moetrace --help"),
    ],
)
def test_what_was_most_likely_meant_is_said(typed: list[str], fix: str, capsys: Capture) -> None:
    assert main(typed) == 2
    error = capsys.readouterr().err
    assert fix in error
    assert ("did you mean" in error) == ("did you mean" in fix)


@pytest.mark.parametrize("form", ["csv", "jsonl", "stats"])
def test_labels_of_others_do_not_steer_a_terminal(tmp_path: Path, form: str) -> None:
    """On a terminal control characters are shown as what they are; a pipe gets every byte."""
    hostile = "a\x1b]0;owned\x07"
    path = labelled_trace(tmp_path / "t.moet", (hostile, "b"), n_prompts=3)
    command = (
        ["stats", "--only", "overview", "--format", "csv"]
        if form == "stats"
        else ["export", "--format", form]
    )
    typed = [sys.executable, "-m", "moetrace", command[0], str(path), *command[1:]]
    ours, theirs = os.openpty()
    with subprocess.Popen(typed, stdout=theirs, stderr=subprocess.DEVNULL) as run:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # the other end is gone
            while part := os.read(ours, 1 << 16):
                seen += part
    os.close(ours)
    assert run.returncode == 0
    assert b"owned" in seen
    assert b"\x1b" not in seen
    assert b"\x07" not in seen
    piped = subprocess.run(typed, capture_output=True, check=True).stdout
    assert hostile.encode() in piped or b"u001b" in piped


def test_setup_runs_the_build_for_this_python_and_says_what_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []
    server = tmp_path / "llama-server"
    server.touch(0o755)
    monkeypatch.setenv("MOETRACE_LLAMA_SERVER", str(server))

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 0 if "cuda" in command else 1)

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["setup", "cuda"]) == 0
    assert Path(ran[0][1]).is_file()
    assert ran[0][2:] == ["cuda", sys.executable]
    assert capsys.readouterr().out == f"llama-server is {server}\n"
    assert main(["setup"]) == 1
    assert "was not installed" in capsys.readouterr().err
    assert main(["setup", "opencl"]) == 2


def test_a_named_server_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = tmp_path / "mine"
    monkeypatch.setenv("MOETRACE_LLAMA_SERVER", str(server))
    with pytest.raises(RuntimeMissingError, match="no program"):
        find_tool("llama-server")
    server.touch(0o755)
    assert find_tool("llama-server") == server
    assert find_tool("python3") != server
