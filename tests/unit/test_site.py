"""The documentation as a site: built strictly, a page for everything, nothing fetched from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moetrace.__main__ import COMMANDS
from moetrace.findings import QUESTIONS

pytest.importorskip("material", reason="the site needs mkdocs-material: pip install 'moetrace[docs]'")
ROOT = Path(__file__).resolve().parents[2]


def test_the_site_is_built_and_whole(tmp_path: Path) -> None:
    """Strictly: every link leads somewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text("utf-8") for path in tmp_path.rglob("*.html")
    }
    for name in COMMANDS:
        assert "usage: moetrace" in pages[f"commands/{name}.html"]
    for name, asked in QUESTIONS.items():
        assert asked.title in pages[f"questions/{name}.html"]
    drawn = [path.stem for path in (tmp_path / "questions").glob("*.svg")]
    assert len(drawn) >= 15
    for name in drawn:
        assert f"{name}.svg" in pages[f"questions/{name.partition('--')[0]}.html"]
    for name, text in pages.items():
        taken = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?:[^"]+)"', text)
        assert [url for url in taken if "canonical" not in url] == [], name
        assert ":class:<code>" not in text, name
    api = pages["api.html"]
    for name in (
        "moetrace.Trace",
        "moetrace.analysis.expert_importance",
        "moetrace.plot.heatmap.heatmap",
        "moetrace.ask",
    ):
        assert f'id="{name}"' in api, name
