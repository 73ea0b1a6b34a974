"""``moetrace stats`` and ``moetrace report`` on traces at the size of real models, as whole processes.

    python benchmarks/bench_stats.py [--sizes 48x128 58x256 48x512 24x32] [--real FOLDER] [--folder build/bench]

Prints a Markdown table: seconds by the clock, CPU seconds, and the most memory of each command. The traces are made
once (benchmarks/traces.py) and kept in the folder. ``--real`` is a folder of DOMAIN.npz as that file says.
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


def measured(command: list[str]) -> str:
    """Run it; gives seconds, CPU seconds and peak as a cell, or how it ended."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    # a process of its own in between: the peak that the kernel tells is that of the largest child ever
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode;"
        "print(done, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    run = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    done, peak = run.stdout.split()[-2:]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    cell = f"{seconds:,.0f} s ({cpu:,.0f} CPU), {int(peak) / 2**20:.2f} GiB"
    return cell if done == "0" else f"{cell}, ended with {done}"


def main() -> None:
    """Make what is missing, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="*", default=list(traces.SIZES), choices=list(traces.SIZES))
    parser.add_argument("--real", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--only", default="", help="questions, as stats takes them")
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
    print("| trace | `moetrace stats` | `moetrace report` |\n| --- | ---: | ---: |", flush=True)
    moetrace = [sys.executable, "-m", "moetrace"]
    only = ["--only", args.only] if args.only else []
    for path in paths:
        stats = measured([*moetrace, "stats", str(path), *only])
        out = args.folder / "report"
        shutil.rmtree(out, ignore_errors=True)
        report = measured([*moetrace, "report", str(path), "-o", str(out), *only])
        print(f"| {path.stem} | {stats} | {report} |", flush=True)


if __name__ == "__main__":
    main()
