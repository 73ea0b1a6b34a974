"""docs/quickstart.md: every block is run, in order, in one folder, with the demo model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "quickstart.md"


@pytest.mark.runtime
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_block_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```(sh|python)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    script = "set -e\n" + "".join(
        code if kind == "sh" else f"python - <<'PYTHON'\n{code}PYTHON\n" for kind, code in blocks
    )
    run = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "llama-server -m demo.gguf" in run.stdout
    assert "are specialists" in run.stdout
    assert (tmp_path / "demo" / "report" / "report.html").is_file()
