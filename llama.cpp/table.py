#!/usr/bin/env python3
"""Writes what tests/stress/test_releases.py found (releases.json) into the tables of README.md and llama.cpp/README.md.

python llama.cpp/table.py [--check]

The tables stand between two comment lines. ``--check`` writes nothing and fails if a table says something else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEGIN = "<!-- releases: written by llama.cpp/table.py -->"
END = "<!-- /releases -->"
COLUMNS = (
    "release",
    "of",
    "llama.cpp",
    "ggml",
    "traced",
    "does not load",
    "its own server fails",
    "requests",
    "attention's keys",
)


def full_table(found: list[dict[str, Any]]) -> str:
    """What was tried on each release, and what it cannot do."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for one in found:
        cells = [
            one["release"],
            one["month"],
            one["llama.cpp"] or "as packaged",
            one["ggml"] or "does not say",
            ", ".join(one["traced"]) or f"refused: {one['refused']}",
            ", ".join(one["unknown"]),
            ", ".join(one["broken"]),
            "announced by the server" if one["requests"] == "announced" else "told by positions",
            one["attention"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short_table(found: list[dict[str, Any]]) -> str:
    """Works or not."""
    lines = ["| llama.cpp as in | of | |", "| --- | --- | --- |"]
    for one in found:
        lines.append(f"| {one['release']} | {one['month']} | {'works' if one['traced'] else 'refused'} |")
    return "\n".join(lines)


def main() -> int:
    """Write or check both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a table is not as it should be"
    )
    args = parser.parse_args()
    found = json.loads((HERE / "releases.json").read_text())
    tables = {HERE / "README.md": full_table(found), HERE.parent / "README.md": short_table(found)}
    stale = False
    for path, table in tables.items():
        text = path.read_text()
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            sys.exit(f"{path} has no lines {BEGIN} and {END}")
        written = f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"
        if written == text:
            continue
        stale = True
        if args.check:
            print(
                f"{path}: the table is not what releases.json says; run python llama.cpp/table.py",
                file=sys.stderr,
            )
        else:
            path.write_text(written)
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
