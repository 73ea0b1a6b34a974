"""``moetrace stats --on`` of many traces on 1, 2 and 4 processes: seconds, efficiency, memory, and what is sent.

    python benchmarks/bench_machines.py [--traces 10] [--workers 1 2 4] [--folder build/bench]

A trace holds a million tokens of 24 x 32 experts, top-4: 96 million activations, of 10,000 requests. Ten are made, of
different worlds; of more, the others are copies (hard links) with requests of their own. Prints a Markdown table:
seconds for the counting and for the questions after it, as `moetrace stats` runs them, the most memory that the process
that asks and the largest of those that count had for themselves, and the bytes that counting sends back.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import traces
from bench_stats import descendants

import moetrace
from moetrace.commands.machines import machines
from moetrace.findings import Subject
from moetrace.trace.labels import LABELS_NAME, append_labels

DISTINCT = 10
ASKED = "overview,expert-frequency,domain-separation,specialists,load-balance,persistence"


def fleet(folder: Path, n: int) -> list[Path]:
    """Make what is missing of n traces."""
    paths = []
    for i in range(n):
        path = folder / f"hour-{i:03d}.moet"
        paths.append(path)
        if path.exists():
            continue
        print(f"making {path}", file=sys.stderr)
        if i < DISTINCT:
            traces.made("24x32-hour", path, seed=i)
            continue
        original = folder / f"hour-{i % DISTINCT:03d}.moet"
        subprocess.run(["cp", "-rl", original, path], check=True)
        lines = [json.loads(line) for line in (original / LABELS_NAME).read_text().splitlines()]
        (path / LABELS_NAME).unlink()
        said = (
            {k: v for k, v in line.items() if k != "crc"} | {"id": f"c{i}-{line['id']}"} for line in lines
        )
        append_labels(path, said)
    return paths


def own(pid: int) -> int:
    """Bytes that one process has for itself."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_Dirty"))


class Weighed(Executor):
    """Another executor, of which is known how much it sends back."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self.sent = executor, 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit, and weigh what comes."""
        future = self.executor.submit(_weighed, fn, *args, **kwargs)
        out: Future[Any] = Future()

        def done(found: Future[Any]) -> None:
            if found.exception():
                out.set_exception(found.exception())
                return
            data = found.result()
            self.sent += len(data)
            out.set_result(pickle.loads(data))

        future.add_done_callback(done)
        return out


def _weighed(fn: Any, *args: Any) -> bytes:
    return pickle.dumps(fn(*args))


def count(paths: list[str], workers: int) -> None:
    """Count on so many processes; prints seconds and bytes as JSON."""
    opened = [moetrace.open(path) for path in paths]
    start = time.perf_counter()
    with machines(f"local:{workers}") as executor:
        assert executor is not None
        weighed = Weighed(executor)
        subject = Subject(opened, executor=weighed)
        subject.settle()
    print(json.dumps({"seconds": time.perf_counter() - start, "sent": weighed.sent}))


def watched(command: list[str]) -> tuple[str, float, int, int]:
    """Output, seconds, and the most own memory of the process and of the largest one that it started."""
    start, mine, theirs = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile() as out, subprocess.Popen(command, stdout=out) as run:
        while run.poll() is None:
            mine = max(mine, own(run.pid))
            theirs = max([theirs, *(own(child) for child in descendants(run.pid))])
            time.sleep(0.2)
        if run.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {run.returncode}")
        out.seek(0)
        return out.read().decode(), time.perf_counter() - start, mine, theirs


def main() -> None:
    """Make what is missing, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=int, default=DISTINCT)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--counting-only", action="store_true", help="without all of `moetrace stats`")
    parser.add_argument("--count", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count:
        count(args.count, args.workers[0])
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    paths = [str(path) for path in fleet(args.folder, args.traces)]
    activations = args.traces * 1_000_000 * 24 * 4
    print(f"{args.traces} traces, {activations:,} activations, {args.traces * 10_000:,} requests\n")
    print("| processes | counting | speed | of one | asks: memory | counts: memory | sent | all of `stats` |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    first = 0.0
    for n in args.workers:
        script = [sys.executable, __file__, "--workers", str(n), "--count", *paths]
        out, _, mine, theirs = watched(script)
        told = json.loads(out)
        seconds = told["seconds"]
        first = first or seconds * n
        stats = [sys.executable, "-m", "moetrace", "stats", *paths, "--no-keep", "--only", ASKED]
        whole = "" if args.counting_only else f"{watched([*stats, '--on', f'local:{n}'])[1]:,.0f} s"
        print(
            f"| {n} | {seconds:,.0f} s | {activations / seconds / 1e6:,.0f} M/s | {first / seconds / n:.0%}"
            f" | {mine / 2**30:.2f} GiB | {theirs / 2**30:.2f} GiB | {told['sent'] / 1e6:,.0f} MB | {whole} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
