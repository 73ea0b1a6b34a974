"""Writes the table of docs/reliability.md from the figures of a whole run: ``python tests/stress/report.py``."""

from __future__ import annotations

import json
import sys

from scale import FIGURES, ROOT

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- begin figures -->", "<!-- end figures -->"

#: item -> the test file that gives its figures
ITEMS = {
    "kill": "test_kill.py",
    "truncation": "test_truncation.py",
    "corruption": "test_corruption.py",
    "fuzz": "test_fuzz.py",
    "races": "test_races.py",
    "faults": "test_faults.py",
    "hostile": "test_hostile.py",
    "load": "test_load.py",
    "lives": "test_lives.py",
}


def table() -> str:
    """Give the table; an item that was not run whole says so."""
    lines = ["| | figure | command |", "| --- | --- | --- |"]
    for item, test in ITEMS.items():
        path = FIGURES / f"{item}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        figures = known.get("figures", {}) if known.get("whole") else {"not measured": ""}
        for label, figure in figures.items():
            text = f"{label}: {figure}" if figure != "" else label
            lines.append(f"| {item} | {text.replace('|', '/')} | `make stress T={test}` |")
            item = ""
    return "\n".join(lines)


def main() -> None:
    """Replace what stands between the marks."""
    page = PAGE.read_text()
    head, _, rest = page.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        sys.exit(f"{PAGE} has no {BEGIN} and {END}")
    PAGE.write_text(f"{head}{BEGIN}\n{table()}\n{END}{tail}")


if __name__ == "__main__":
    main()
