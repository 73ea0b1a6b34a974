"""docs/findings.md is what docs/findings.py makes of others' recordings, and meets their published figures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROUTING = ROOT.parent / "shared" / "data" / "routing"


@pytest.mark.slow
@pytest.mark.skipif(not ROUTING.is_dir(), reason="the recordings are not at hand: ../shared/data/routing")
def test_the_page_is_what_its_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import findings

    monkeypatch.setattr(findings, "IMAGES", tmp_path)
    page = findings.page(ROUTING)
    del sys.modules["findings"]
    assert page == (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    for published in ("17.9 % | 17.9%", "38.0 % | 38.0%", "35.7 % | 35.7%", "0.1674", "0.4005", "0.5012"):
        assert published in page
    assert "most domain-specific" in page.lower()
    assert "12, 10, 11, 13" in page
