"""The tests themselves: what they share lies in plain modules, and each module has a name of its own."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]
MODULES = sorted(path for path in TESTS.rglob("*.py") if "golden" not in path.parts)


def test_no_helper_is_imported_from_a_test_module() -> None:
    """Such an import runs a module's fixtures and constants in another one, and ties the two together."""
    told = re.compile(r"^\s*(?:from|import) test_\w+.*", re.MULTILINE)
    found = {
        path.name: told.findall(path.read_text(encoding="utf-8"))
        for path in MODULES
        if path != Path(__file__)
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_every_module_has_a_name_of_its_own() -> None:
    """pytest imports test modules by their bare name: of two of one name the second is not run."""
    names = Counter(path.name for path in MODULES)
    assert {name for name, n in names.items() if n > 1} == {"conftest.py"}
