"""The notebook's own pandas method against this package, side by side, and counting at scale.

    python benchmarks/bench_analysis.py [--scales 1e7 1e9] [--threads 2] [--limit-gb 1]

Prints a Markdown table. Every measurement runs in a process of its own; "peak" is what that process itself
allocated (anonymous memory) above what it held after imports and inputs, and "read" the size of the routing
column. Large columns are generated into a temporary folder (--folder) and read memory-mapped; the counting
process may allocate no more than --limit-gb (RLIMIT_DATA), so that it fails instead of taking more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]

LAYERS, K, EXPERTS = 24, 4, 32
PROMPT = 1000  # tokens of a generated prompt
DOMAINS = ["code", "creative", "factual", "math", "mixed"]


def anonymous() -> int:
    """Bytes that this process has allocated and that are in memory, without files that it maps."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


def measured(work: Callable[[], Any], repeat: int = 1) -> dict[str, float]:
    """Best time of ``repeat`` runs, and the peak of what one run allocated (sampled every 20 ms).

    Short work is timed unwatched and run once more to be watched.
    """
    base, peak, stop = anonymous(), 0, threading.Event()
    best = float("inf")

    def timed() -> None:
        nonlocal best
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.02 if repeat == 1 else 0.001):
            peak = max(peak, anonymous() - base)

    if repeat > 1:
        for _ in range(repeat):
            timed()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        if repeat > 1:
            work()
        else:
            timed()
    finally:
        stop.set()
        watcher.join()
    return {"seconds": best, "peak": max(peak, anonymous() - base)}


def generate(path: Path, rows: int) -> None:
    """(rows, 24, 4) u1: skewed routing, the same mixture in every layer."""
    out = np.lib.format.open_memmap(path, "w+", np.uint8, (rows, LAYERS, K))
    rng = np.random.default_rng(0)
    step = 20_000
    for start in range(0, rows, step):
        n = min(step, rows - start)
        if start % (50 * step) == 0:
            logits = rng.normal(0, 0.5, (1, LAYERS, EXPERTS)) + rng.gumbel(size=(step, LAYERS, EXPERTS))
            block = np.argsort(-logits, axis=2)[:, :, :K].astype(np.uint8)
        out[start : start + n] = block[rng.permutation(step)[:n]]
    out.flush()
    np.save(path.with_name("request.npy"), np.arange(rows) // PROMPT)
    np.save(path.with_name("position.npy"), (np.arange(rows) % PROMPT).astype(np.int32))


def columns(file: Path) -> dict[str, Any]:
    """Request, position and domain of generated rows: prompts of 1000 tokens, 5 domains in turn."""
    request = np.load(file.with_name("request.npy"), mmap_mode="r")
    return {
        "request": request,
        "position": np.load(file.with_name("position.npy"), mmap_mode="r"),
        "labels": [DOMAINS[i % 5] for i in range(int(request[-1]) + 1)],
    }


def long_frame(experts: Any, domain: Any, token: Any) -> Any:
    """The notebook's table: every decision three times."""
    import pandas as pd

    n, layers, k = experts.shape
    t, layer, component, rank = np.indices((n, layers, 3, k), dtype=np.int64).reshape(4, -1)
    return pd.DataFrame(
        {
            "domain": np.asarray(domain)[t],
            "token_id": np.asarray(token)[t],
            "layer_id": layer,
            "component": np.array(["ffn_gate", "ffn_up", "ffn_down"])[component],
            "expert_id": experts[t, layer, rank].astype(np.int64),
            "position": rank,
        }
    )


def seeds(rows: int) -> tuple[Any, Any, Any]:
    """Experts, domains and token ids of the published shape; 505 rows are their 145,440 entries."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder) / "e.npy", rows)
        experts = np.load(Path(folder) / "e.npy")
    domain = np.repeat(DOMAINS, -(-rows // 5))[:rows]
    return experts, domain, np.arange(rows) % -(-rows // 5)


def published_parts(a: Any) -> None:
    """Parts 2 to 9, as ``notebook.run_all``."""
    from moetrace.analysis.published import notebook as p

    p.overview(a)
    p.frequency(a)
    p.chi_square(a)
    p.classification(a)
    best = p.most_specific(p.layer_separation(a))
    p.deep_dive(a, best[0])
    p.entropy(a)
    p.lag1(a, a.domains[0])


def job_notebook(rows: int, **_: Any) -> dict[str, float]:
    import notebook

    frame = long_frame(*seeds(rows))
    return measured(lambda: notebook.run_all(frame, range(LAYERS)), 5 if rows < 10_000 else 1)


def job_table(rows: int, **_: Any) -> dict[str, float]:
    """Part 1 from entries already parsed: one dict per rank, one frame of them."""
    import pandas as pd

    experts, domain, token = seeds(rows)
    entries = [
        (domain[row], int(token[row]), layer, component, ids)
        for row, of_row in enumerate(experts.tolist())
        for layer, ids in enumerate(of_row)
        for component in ("ffn_gate", "ffn_up", "ffn_down")
    ]
    names = ("domain", "token_id", "layer_id", "component", "expert_id", "position")

    def work() -> None:
        pd.DataFrame(
            [
                dict(zip(names, (*entry[:4], expert, rank), strict=True))
                for entry in entries
                for rank, expert in enumerate(entry[4])
            ]
        )

    return measured(work, 3)


def job_published(rows: int, **_: Any) -> dict[str, float]:
    from moetrace.analysis.published.notebook import Activations

    experts, domain, token = seeds(rows)
    codes = np.unique(domain, return_inverse=True)[1]  # a trace knows its domains as numbers

    def work() -> None:
        published_parts(Activations.from_rows(experts, codes, token, n_expert=EXPERTS))

    work()
    return measured(work, 100 if rows < 10_000 else 3)


def job_published_long(rows: int, **_: Any) -> dict[str, float]:
    from moetrace.analysis.published.notebook import Activations

    frame = long_frame(*seeds(rows))

    def work() -> None:
        published_parts(Activations.from_columns(*(frame[c] for c in frame.columns)))

    work()
    return measured(work, 10 if rows < 10_000 else 1)


def job_sound(rows: int, **_: Any) -> dict[str, float]:
    import moetrace.analysis as m

    experts, _, _ = seeds(rows)
    request = np.arange(rows) // -(-rows // 60)  # 60 prompts
    position = np.arange(rows)
    labels = [DOMAINS[i % 5] for i in range(60)]

    def work() -> None:
        c = m.count_routing(experts, request, position, n_expert=EXPERTS, labels=labels)
        m.domain_test(c.included, c.labels)
        m.domain_lift(c.included, c.labels)
        m.domain_entropy(c.included, c.labels)
        m.load_balance(c.included, c.tokens)
        m.persistence(c)

    return measured(work)


def job_counts(file: str, threads: int, limit_gb: float, **_: Any) -> dict[str, float]:
    from moetrace.analysis import count_routing

    experts = np.load(file, mmap_mode="r")
    given = columns(Path(file))
    if limit_gb:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gb * 2**30),) * 2)
    return measured(lambda: count_routing(experts, n_expert=EXPERTS, threads=threads, **given))


def job_domain(file: str, threads: int, **_: Any) -> dict[str, float]:
    """Everything about domains after counting: tests, lift, entropy, persistence."""
    import moetrace.analysis as m

    given = columns(Path(file))
    c = m.count_routing(np.load(file, mmap_mode="r"), n_expert=EXPERTS, threads=threads, **given)

    def work() -> None:
        m.domain_test(c.included, c.labels)
        m.persistence(c)
        m.domain_entropy(c.included, c.labels)
        m.load_balance(c.included, c.tokens)

    return measured(work)


def run(job: str, **options: Any) -> dict[str, float]:
    """One job in a process of its own."""
    command = [sys.executable, __file__, "--job", json.dumps({"job": job, **options})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def line(
    what: str, activations: int, result: dict[str, float], read: int | None, against: float | None
) -> None:
    seconds = result["seconds"]
    speed = f"{read / seconds / 1e9:.2f}" if read else ""
    ratio = f"{against / seconds:.0f}×" if against else ""
    shown = f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.1f} s"
    print(
        f"| {activations:,} | {what} | {shown} | {result['peak'] / 2**20:.0f} MiB | {speed} | {ratio} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scales", type=float, nargs="*", default=[1e7, 1e9], help="router decisions to generate"
    )
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--limit-gb", type=float, default=1.0, help="what counting may allocate; 0: no limit")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        options = json.loads(args.job)
        print(json.dumps(globals()[f"job_{options.pop('job')}"](**options)))
        return

    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; ",
        end="",
    )
    print(
        f"Python {platform.python_version()}, numpy {np.__version__}; {args.threads} threads for counting\n"
    )
    print("| activations | what | time | peak | GB/s | against the notebook |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    told = run("notebook", rows=505)
    table = run("table", rows=505)
    line("notebook, part 1: long table of parsed entries", 145_440, table, None, None)
    line("notebook (pandas), parts 2-9 on the long table", 145_440, told, None, None)
    line(
        "the same parts, published formulas, from that table",
        145_440,
        run("published_long", rows=505),
        None,
        told["seconds"],
    )
    ours = run("published", rows=505)
    both = table["seconds"] + told["seconds"]
    line("parts 1-9, published formulas, from a trace's rows", 145_440, ours, 505 * LAYERS * K, both)
    line("sound statistics, 999 permutations", 48_480, run("sound", rows=505), 505 * LAYERS * K, None)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for scale in args.scales:
            rows = int(scale) // (LAYERS * K)
            size = rows * LAYERS * K
            file = str(Path(folder) / "experts.npy")
            generate(Path(file), rows)
            against = None
            if scale <= 1e7:
                # The notebook counts each decision three times: a third of the rows makes as many entries.
                told = run("notebook", rows=rows // 3)
                line(
                    "notebook (pandas), parts 2-9 on the long table",
                    rows // 3 * LAYERS * K * 3,
                    told,
                    None,
                    None,
                )
                ours = run("published", rows=rows // 3)
                against = told["seconds"]
                line(
                    "parts 2-9, published formulas, from a trace's rows",
                    rows // 3 * LAYERS * K * 3,
                    ours,
                    size // 3,
                    against,
                )
            counted = run("counts", file=file, threads=args.threads, limit_gb=args.limit_gb)
            line("all counts (per prompt, transitions, lags 1-32)", size, counted, size, against)
            after = run("domain", file=file, threads=args.threads)
            line("then: domain test (999), persistence, entropy, load", size, after, None, None)
            Path(file).unlink()


if __name__ == "__main__":
    main()
