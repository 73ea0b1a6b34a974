#!/usr/bin/env python3
"""Writes what the tests marked ``host`` found (docs/hosts.json) into README's table of hosts and devices.

    MOETRACE_HOSTS=docs/hosts.json python -m pytest tests/device tests/integration/test_foreign_builds.py
    python docs/hosts.py [--check]

The first adds to the file what it ran; ``make hosts`` does both. ``--check`` writes nothing and fails if the table says
something else. What no test has run is "not yet verified".
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN = "<!-- hosts: written by docs/hosts.py -->"
END = "<!-- /hosts -->"
#: the name in the marks of tests -> what it is; in the table's order
HOSTS = {
    "llama-server": "the pinned release on the CPU, four slots, overlapping requests",
    "without /dev/shm": "llama-server in a mount namespace that has none, as some containers",
    "device": "memory of its own, late answers, fused and reordered nodes, one to three of them; every architecture,"
    " collector, placement and intervention",
    "RPC": "llama.cpp's RPC backend on loopback",
    "Vulkan": "llama.cpp's Vulkan backend on Mesa's lavapipe, which computes on the CPU",
    "CUDA": "all layers, a part, experts or routers elsewhere",
    "Metal": "",
    "node-llama-cpp": "npm; backends by dlopen, all CPU variants; contexts in turn, and in threads at once",
    "llama-cpp-python": "as `moetrace.capture` runs it, and in a program of one's own",
    "xllamacpp": "a server in Python",
    "llama-cpp-py-sync": "cffi: rows without sequence and request, which is said",
    "ik-llama-cpp-python": "ik_llama.cpp in Python",
    "two llama.cpp": "xllamacpp and llama-cpp-python in one process, in either order",
    "static": "cyllama, which has llama.cpp inside",
}
#: how the row is called where it is not the name
CALLED = {
    "device": "a device of the tests' own",
    "RPC": "RPC",
    "two llama.cpp": "two llama.cpp in one process",
    "static": "linked statically",
    "without /dev/shm": "no /dev/shm",
}
#: what else is known where no test has run
BESIDE = {"CUDA": "not yet verified by these tests; once by hand, see below"}
#: what the tests of a row show, if they pass
SHOWN = {
    "static": "refused, with the reason",
    "two llama.cpp": "the first is recorded, the other counted and left alone",
}


def table(found: dict[str, Any]) -> str:
    """The table."""
    lines = ["| host or device | tried | |", "| --- | --- | --- |"]
    for name, what in HOSTS.items():
        one = found.get(name, {"passed": 0, "failed": 0, "why": "", "versions": []})
        called = " ".join([CALLED.get(name, name), *one["versions"][-1:]])
        n = one["passed"] + one["failed"]
        if one["failed"]:
            said = f"{one['failed']} of {n} tests fail"
        elif n:
            said = f"{SHOWN.get(name, 'recorded right')} ({n} {'test' if n == 1 else 'tests'}"
            said += f"; {one['skipped']} skipped: {one['why']})" if one["skipped"] else ")"
        else:
            said = BESIDE.get(name, "not yet verified" + (f": {one['why']}" if one["why"] else ""))
        lines.append(f"| {called} | {what} | {said} |")
    return "\n".join(lines)


def main() -> int:
    """Write the table, or compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = README.read_text()
    head, found, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not found or not end:
        print(f"{README} has no lines {BEGIN} and {END}", file=sys.stderr)
        return 1
    new = f"{head}{BEGIN}\n\n{table(json.loads((HERE / 'hosts.json').read_text()))}\n\n{END}{tail}"
    if args.check:
        if new != text:
            print(
                "README's table of hosts is not what docs/hosts.json says: python docs/hosts.py",
                file=sys.stderr,
            )
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
