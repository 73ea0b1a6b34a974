"""What watching a recording costs: decode speed with ``moetrace serve`` and ``live`` beside it, and without.

One llama-server with one slot; metrics are scraped and the page is told each second, and the terminal view runs.
Pairs are interleaved on the same server: for the runs without, the watchers are stopped (SIGSTOP). Prints the median
ratio with a bootstrap interval, the watchers' share of a core, and their own memory over the run. The model is that of
bench_overhead.py: random weights, and a token costs what it costs with a small real one; --demo takes the demo's, which
decodes twenty times as fast. With the defaults it takes some ten minutes.
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

from bench_overhead import SHAPE

import moetrace
from moetrace.data import demo_model
from moetrace.synthetic import write_model


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


def own_mib(pid: int) -> float:
    """Memory that a process has for itself: pages of the trace's files are nobody's."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", action="store_true", help="the demo's model, 12 times as many tokens")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=100)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="moetrace-bench-")
    trace = f"{folder}/t.moet"
    if args.demo:
        model, n = demo_model(), 12 * args.tokens
    else:
        model, n = (
            write_model(Path(folder, "model.gguf"), "gpt-oss", quantization="F16", **SHAPE),
            args.tokens,
        )
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

    with moetrace.serve(model, output=trace, arguments=["-np", "1", "-t", "1"]) as server:
        for _ in range(3):
            tokens_per_second(server.url, n)
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
        start = time.monotonic()
        for _ in range(args.pairs):
            speed = {}
            for how in random.sample(["alone", "watched"], 2):
                for watcher in watchers:
                    watcher.send_signal(signal.SIGSTOP if how == "alone" else signal.SIGCONT)
                time.sleep(0.5)
                used, began = sum(cpu_seconds(w.pid) for w in watchers), time.monotonic()
                speed[how] = statistics.median(tokens_per_second(server.url, n) for _ in range(3))
                if how == "watched":
                    now = sum(cpu_seconds(w.pid) for w in watchers)
                    shares.append((now - used) / (time.monotonic() - began))
            ratios.append(speed["watched"] / speed["alone"])
            memory.append(sum(own_mib(w.pid) for w in watchers))
        minutes = (time.monotonic() - start) / 60
        ended.set()
        for watcher in watchers:
            watcher.send_signal(signal.SIGCONT)
            watcher.terminate()
            watcher.wait()
    draws = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(2000))
    print(
        f"decode, watched over alone: {statistics.median(ratios):.3f} [{draws[50]:.3f}, {draws[1949]:.3f}]"
        f" ({len(ratios)} pairs, {speed['alone']:.0f} tokens a second); watchers"
        f" {statistics.mean(shares):.1%} of a core; MiB over {minutes:.0f} minutes:"
        f" {', '.join(f'{memory[len(memory) * i // 8]:.1f}' for i in range(8))}, {memory[-1]:.1f}"
    )


if __name__ == "__main__":
    main()
