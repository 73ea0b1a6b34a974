"""docs/architecture.md and its picture say what is so: rooms, imports, a record's walk, and files that are there."""

from __future__ import annotations

import importlib.util
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("rooms", ROOT / "docs" / "images" / "rooms.py")
assert spec is not None
assert spec.loader is not None
rooms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rooms)

SVG = "{http://www.w3.org/2000/svg}"
PICTURE = ElementTree.parse(rooms.PICTURE).getroot()


def boxes() -> dict[str, tuple[float, float, float]]:
    """Of each box that is drawn: x of its left side, upper and lower end."""
    found = {}
    for group in PICTURE.iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        assert rect is not None
        x, y, height = (float(rect.get(name, "nan")) for name in ("x", "y", "height"))
        found[str(group.findtext(f"{SVG}text"))] = (x, y, y + height)
    return found


def arrows(kind: str) -> list[tuple[str, str]]:
    """Which boxes the arrows of a kind lead from and to, by where their ends lie."""
    found = []
    for path in PICTURE.iter(f"{SVG}path"):
        if path.get("class") == kind:
            numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.get("d", ""))]
            ends = [
                next(name for name, (_, top, end) in boxes().items() if top < y < end)
                for y in (numbers[1], numbers[-1])
            ]
            assert path.findtext(f"{SVG}title") == " → ".join(ends)
            found.append((ends[0], ends[1]))
    return found


def test_every_room_is_drawn() -> None:
    there = {path.parent.name for path in (ROOT / "moetrace").glob("*/__init__.py")}
    assert set(boxes()) == there | {"csrc"}


def test_the_imports_that_are_drawn_are_the_imports_that_there_are() -> None:
    """Redraw it with docs/images/rooms.py."""
    drawn = arrows("import")
    real = {edge for edge in rooms.imports() if edge[1] in boxes()}
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == real
    assert {b for _, b in rooms.imports()} - set(boxes()) <= set(rooms.EVERYWHERE)


def test_every_import_points_down() -> None:
    place = boxes()
    assert [(a, b) for a, b in arrows("import") if place[a][1] >= place[b][1]] == []


def test_a_record_goes_all_the_way_and_passes_each_room_once() -> None:
    walk = arrows("walk")
    assert walk[0][0] == "csrc"
    assert walk[-1][1] == "report"
    assert all(before[1] == after[0] for before, after in pairwise(walk))
    assert len({room for room, _ in walk}) == len(walk)


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_what_is_named_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"`((?:csrc|moetrace|tests|docs)/[\w./-]+)`", text)
    assert links
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    """Within functions, for annotations alone, of a package as a whole; not those of one's own room."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.py").write_text(
        "import moetrace.b.x\nfrom moetrace import c\nfrom moetrace.a import two\n"
        "def f():\n    from moetrace.d.y import z\n"
    )
    assert set(rooms.imports(tmp_path)) == {("a", "b"), ("a", "c"), ("a", "d")}
