"""``moetrace stats`` and ``moetrace report`` on traces at the size of real models, as whole processes.

    python benchmarks/bench_stats.py [--sizes 48x128 58x256 48x512 24x32] [--real FOLDER] [--folder build/bench]

Prints a Markdown table: seconds by the clock, CPU seconds, and the most memory that each command's processes had for
themselves; no answers are kept but for the last column, a report after ``stats``. The traces are made once
(benchmarks/traces.py) and kept in the folder. ``--real`` is a folder of DOMAIN.npz as that file says.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import traces


def own_memory(pid: int) -> int:
    """Bytes that a process and those it started have for themselves: shared ones once, mapped files not at all."""
    total = 0
    for each in [pid, *descendants(pid)]:
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon"))
    return total


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they did."""
    try:
        found = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []
    return found + [other for child in found for other in descendants(child)]


def measured(command: list[str]) -> str:
    """Run it; gives seconds, CPU seconds and the most own memory as a cell, or how it ended."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None:
            peak = max(peak, own_memory(run.pid))
            time.sleep(0.2)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    cell = f"{seconds:,.0f} s ({cpu:,.0f} CPU), {peak / 2**30:.2f} GiB"
    return cell if run.returncode == 0 else f"{cell}, ended with {run.returncode}"


def main() -> None:
    """Make what is missing, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes",
        nargs="*",
        default=list(traces.SIZES)[:4],
        choices=list(traces.SIZES),
    )
    parser.add_argument("--real", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    paths = []
    if args.real:
        paths.append(args.folder / f"{args.real.name}.moet")
        if not paths[-1].exists():
            traces.mmlu(args.real, paths[-1])
    for name in args.sizes:
        paths.append(args.folder / f"{name}.moet")
        if not paths[-1].exists():
            print(f"making {paths[-1]}", file=sys.stderr)
            traces.made(name, paths[-1])
    print(
        "| trace | `moetrace stats` | `moetrace report` | report after stats |\n| --- | ---: | ---: | ---: |",
        flush=True,
    )
    moetrace = [sys.executable, "-m", "moetrace"]
    for path in paths:
        out = args.folder / "report"
        write = ["report", str(path), "-o", str(out)]
        shutil.rmtree(path / "answers", ignore_errors=True)
        report = measured([*moetrace, *write, "--no-keep"])
        stats = measured([*moetrace, "stats", str(path)])
        again = measured([*moetrace, *write])
        print(f"| {path.stem} | {stats} | {report} | {again} |", flush=True)
        shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
