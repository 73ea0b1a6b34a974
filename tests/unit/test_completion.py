"""Tab completion, in a real bash."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from moetrace.__main__ import COMMANDS, main
from moetrace.findings import QUESTIONS

TRY = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_shtab_moetrace
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "moetrace.bash"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        assert main(["completion", "bash"]) == 0
    return path


def completed(script: Path, *words: str) -> set[str]:
    run = subprocess.run(
        ["bash", "-c", TRY, "bash", str(script), "moetrace", *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=script.parent,
    )
    return set(run.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_commands_questions_options_and_files(script: Path) -> None:
    assert completed(script, "") >= set(COMMANDS)
    assert completed(script, "sta") == {"start", "status", "stats"}
    assert completed(script, "analyze", "") >= set(QUESTIONS)
    assert completed(script, "analyze", "expert-cache", "--gb") == {"--gb-per-s"}
    assert completed(script, "stats", "--format", "") == {"table", "md", "csv", "json"}
    (script.parent / "mine.moet").mkdir(exist_ok=True)
    assert completed(script, "verify", "mi") == {"mine.moet"}


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "moetrace" in capsys.readouterr().out
