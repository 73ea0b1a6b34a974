"""What watching a recording costs: decode speed with ``moetrace serve`` and ``live`` beside it, and without.

One llama-server with one slot; metrics are scraped and the page is told each second, and the terminal view runs.
Pairs are interleaved on the same server: for the runs without, the watchers are stopped (SIGSTOP). Prints the median
ratio with a bootstrap interval, the watchers' share of a core, and their memory at the beginning and the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import moetrace
from moetrace.data import demo_model


def tokens_per_second(url: str, n: int) -> float:
    """Decode speed of one request, by the server's own clock."""
    body = {
        "prompt": "Once upon a time there was a",
        "n_predict": n,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return float(json.load(answer)["timings"]["predicted_per_second"])


def cpu_seconds(pid: int) -> float:
    """Processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    """Memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(demo_model()))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=600)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="moetrace-bench-")
    trace = f"{folder}/t.moet"
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(1):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read()

    def look() -> None:
        while not ended.is_set():
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/events", timeout=5) as told,
            ):
                while not ended.is_set():
                    told.readline()
            time.sleep(0.2)

    with moetrace.serve(args.model, output=trace, arguments=["-np", "1", "-t", "1"]) as server:
        for _ in range(3):
            tokens_per_second(server.url, args.tokens)
        command = [sys.executable, "-m", "moetrace"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        watchers = [
            subprocess.Popen([*command, "serve", trace, "--listen", f"127.0.0.1:{port}"], **quiet),
            subprocess.Popen([*command, "live", trace], **quiet),
        ]
        time.sleep(4)
        for target in (scrape, look):
            threading.Thread(target=target, daemon=True).start()
        ratios, shares, memory = [], [], []
        for _ in range(args.pairs):
            speed = {}
            for how in random.sample(["alone", "watched"], 2):
                for watcher in watchers:
                    watcher.send_signal(signal.SIGSTOP if how == "alone" else signal.SIGCONT)
                time.sleep(0.5)
                used, began = sum(cpu_seconds(w.pid) for w in watchers), time.monotonic()
                speed[how] = statistics.median(tokens_per_second(server.url, args.tokens) for _ in range(3))
                if how == "watched":
                    now = sum(cpu_seconds(w.pid) for w in watchers)
                    shares.append((now - used) / (time.monotonic() - began))
            ratios.append(speed["watched"] / speed["alone"])
            memory.append(sum(resident_mib(w.pid) for w in watchers))
        ended.set()
        for watcher in watchers:
            watcher.send_signal(signal.SIGCONT)
            watcher.terminate()
            watcher.wait()
    draws = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(2000))
    print(
        f"decode, watched over alone: {statistics.median(ratios):.3f} [{draws[50]:.3f}, {draws[1949]:.3f}]"
        f" ({len(ratios)} pairs, {speed['alone']:.0f} tokens a second); watchers"
        f" {statistics.mean(shares):.1%} of a core, {memory[0]:.0f} MiB at first, {memory[-1]:.0f} at last"
    )


if __name__ == "__main__":
    main()
