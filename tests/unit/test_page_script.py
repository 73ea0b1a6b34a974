"""The page's script: its modules under node, and what is made of them for the page.

What needs node (18 or later) is skipped, saying so, where there is none.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moetrace.report import script

TEMPLATES = Path(script.__file__).parent / "templates"


def run_node(*arguments: str | Path) -> None:
    """Run node, and show what it said if it fails."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node found: the page's script is not tested under it")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.strip().lstrip("v").split(".")[0]) < 18:
        pytest.skip(f"node {version.strip()} is too old to test the page's script (18 or later)")
    done = subprocess.run([node, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(p.name for p in (Path(__file__).parent / "page").glob("*.test.mjs")))
def test_modules_of_the_page(name: str) -> None:
    run_node("--test", Path(__file__).parent / "page" / name)


def test_every_module_is_a_part_of_the_script() -> None:
    assert sorted(script.MODULES) == sorted(path.name for path in TEMPLATES.glob("*.*js"))


def test_modules_come_after_those_that_they_import() -> None:
    for i, name in enumerate(script.MODULES):
        needed = re.findall(r'from "\./([a-z]+\.mjs)"', read(name))
        assert set(needed) <= set(script.MODULES[:i]), name


def test_the_script_is_one_script_without_modules(tmp_path: Path) -> None:
    text = script.page_script(read)
    assert text.startswith('"use strict";\n')
    assert not re.search(r"^(import|export)\b", text, re.MULTILINE)
    assert "</script" not in text
    # two modules that use one name for different things are refused here
    (tmp_path / "page.js").write_text(text, encoding="utf-8")
    run_node("--check", tmp_path / "page.js")


@pytest.mark.parametrize(
    "line",
    ['import x from "./data.mjs";', "export default 1;", 'export * from "./data.mjs";', "export { x };"],
)
def test_what_cannot_be_put_into_one_script_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"page\.mjs: .* cannot be put"):
        script.page_script(lambda name: line if name == "page.mjs" else "")
