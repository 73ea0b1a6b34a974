"""The rooms of the house: who may import whom, without circles."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "moetrace"

#: a room may import from those before it; the package itself (its version) from anywhere
ROOMS = (
    "errors", "printable", "numbers", "data", "synthetic", "model", "trace", "analysis", "host", "plot", "findings",
    "report", "live",
    "commands", "__main__",
)  # fmt: skip
#: analyses stand beside the host, and neither knows the other
BESIDE = {("host", "analysis")}
#: the same within analysis
DOORS = (
    "statistics", "counts", "domains", "dynamics", "text", "circuits", "experts", "placement", "prediction",
    "published",
)  # fmt: skip

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(name: str, *, annotations: bool) -> Iterator[str]:
    """Modules of moetrace that one imports, wherever in the file; those for annotations alone if asked for."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test) and not annotations:
                continue
            if isinstance(child, ast.ImportFrom) and child.module:
                assert not child.level, name
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    yield full if full in MODULES else child.module
            elif isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            yield from walk(child)

    for found in walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if found in MODULES and found != name:
            yield found


def misplaced(order: tuple[str, ...], depth: int, within: str) -> list[str]:
    """Imports from a later place of the order: the part of a module's name at ``depth``."""
    wrong = []
    for name in MODULES:
        if name.startswith(within) and name.count(".") >= depth:
            mine = name.split(".")[depth]
            for found in imports(name, annotations=True):
                if found.startswith(within) and found.count(".") >= depth:
                    theirs = found.split(".")[depth]
                    if order.index(theirs) > order.index(mine) or (mine, theirs) in BESIDE:
                        wrong.append(f"{name} imports {found}")
    return wrong


def test_nothing_is_imported_from_a_room_above() -> None:
    assert misplaced(ROOMS, 1, "moetrace.") == []


def test_nor_within_analysis() -> None:
    assert misplaced(DOORS, 2, "moetrace.analysis.") == []


def test_questions_leave_drawing_to_plot() -> None:
    """They name and caption figures; what is drawn stands in one room."""
    for name, path in MODULES.items():
        if name.startswith("moetrace.findings."):
            drawn = {found for found in imports(name, annotations=True) if found.startswith("moetrace.plot")}
            assert drawn <= {"moetrace.plot"}, name
            text = path.read_text(encoding="utf-8")
            assert "import matplotlib" not in text, name
            assert not [line for line in text.splitlines() if re.search(r"\bax\.\w", line)], name


def test_there_are_no_circles() -> None:
    graph = {name: set(imports(name, annotations=False)) for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_room_is_known_and_analysis_has_few_doors() -> None:
    there = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert there - {"__init__"} == set(ROOMS)
    top = {
        p.stem for p in (PACKAGE / "analysis").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()
    }
    assert top - {"__init__"} == set(DOORS)
    assert len(top) <= 12
