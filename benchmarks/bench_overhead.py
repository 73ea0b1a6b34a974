"""What tracing costs, side by side in one process, and what others cost that people use for it today.

    python benchmarks/bench_overhead.py [--repeats N] [--threads T] [--model FILE] [--write]

A model of realistic cost (gpt-oss's shape: 24 layers, 32 experts, top-4, about 1.2 GB in F16, random weights) is
generated once and loaded once. Machines drift by more than what is measured, so what is compared lies as close in
time as can be: within a repeat of a recording variant, recording is switched off and on from token to token, and the
ratio is that of the medians of the two kinds of tokens (prompts likewise). "Loaded, paused" is compared with nothing
being traced (the library is loaded, its hooks pass through) moment by moment, and is less certain for it. The others'
callbacks (alternatives.c) are switched like ours; asking them about every node is in both of their figures, which is
to their advantage. llama-imatrix has no such switch: it runs in turn with llama-perplexity on the same text, plain and
traced, and their own clocks are read. Intervals are Student's t on the logarithms of the repeats' ratios. A drain
writes the trace meanwhile, as in a real recording.
``--write`` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import stats

import moetrace
from moetrace.host import llama
from moetrace.host.drain import Drain
from moetrace.host.inprocess import tracing
from moetrace.host.options import CaptureOptions
from moetrace.host.runtime import find_tool
from moetrace.synthetic import write_model
from moetrace.trace.writer import TraceWriter

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"n_layer": 24, "n_expert": 32, "n_expert_used": 4, "n_embd": 512, "n_ff_expert": 512}
#: variant -> options of the capture
VARIANTS: dict[str, dict[str, object]] = {
    "loaded, paused": {"channels": "experts,weights", "collector": "tap", "paused": True},
    "tap: experts, weights": {"channels": "experts,weights", "collector": "tap"},
    "callback: experts, weights": {"channels": "experts,weights", "collector": "callback"},
    "callback: + logits": {"channels": "experts,weights,logits", "collector": "callback"},
    "callback: + gate input": {"channels": "experts,weights,gate_input", "collector": "callback"},
}
#: what others do: the mode of alternatives.c
ALTERNATIVES = {"others: ffn_moe_topk printed as CSV": 1, "others: all router logits kept": 2}
#: whole processes on the same text
TOOLS = ("plain", "traced", "imatrix")


@dataclass
class Runs:
    """What was measured of one variant, one entry per repeat: seconds with it, and without."""

    decode: list[tuple[float, float]] = field(default_factory=list)
    prefill: list[tuple[float, float]] = field(default_factory=list)
    own_ns: list[float] = field(default_factory=list)  # per (token, layer), decoding and prefill together
    bytes_per_token: float = math.nan
    lost: int = 0

    def add(self, timing: Timing) -> None:
        """Take down one repeat."""
        self.prefill.append((timing[0], timing[2]))
        self.decode.append((timing[1], timing[3]))


Timing = tuple[float, float, float, float]  # prompt and token, switched on; prompt and token, switched off
Switch = Callable[[bool], None]


class Alternative:
    """A callback of alternatives.c, on or off."""

    def __init__(self, folder: Path) -> None:
        library = folder / "alternatives.so"
        source = Path(__file__).with_name("alternatives.c")
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        llama._llama_cpp()
        from llama_cpp._ggml import libggml

        ctypes.CDLL(libggml._name, ctypes.RTLD_GLOBAL)  # for the functions that the callback calls
        self._lib = ctypes.CDLL(str(library))
        self._lib.alternative_new.restype = ctypes.c_void_p
        path = os.fsencode(folder / "alternative.csv")
        self._data = ctypes.c_void_p(
            self._lib.alternative_new(SHAPE["n_expert"], SHAPE["n_expert_used"], path)
        )

    @property
    def eval_callback(self) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
        """As :class:`moetrace.host.llama.Llama` takes it."""
        return ctypes.cast(self._lib.alternative_eval, ctypes.c_void_p), self._data

    def set(self, mode: int) -> None:
        """Record (1: CSV, 2: logits) or not (0)."""
        self._lib.alternative_set(self._data, mode)

    def forget(self) -> None:
        """Free the logits that were kept."""
        self._lib.alternative_forget(self._data)


def run_moment(variant: str, model: llama.Llama, folder: Path, args: argparse.Namespace, runs: Runs) -> None:
    """Run one variant of ours for a moment and take its numbers down."""
    options = VARIANTS[variant]
    path = folder / "t.moet"
    shutil.rmtree(path, ignore_errors=True)
    trace = TraceWriter(path)
    if options.get("paused"):
        off = time_tokens(model, args)
        with tracing(trace, CaptureOptions.of(**options)):  # type: ignore[arg-type]
            on = time_tokens(model, args)
        timing: Timing = (on[0], on[1], off[0], off[1])
    else:
        with tracing(trace, CaptureOptions.of(**options)) as drain:  # type: ignore[arg-type]
            timing = time_tokens(model, args, pausing(drain))
    trace.close()
    runs.add(timing)
    if options.get("paused"):
        return
    with moetrace.open(path) as recorded:
        runs.own_ns.append(recorded.counters["hook_ns"] / len(recorded) / len(recorded.layers))
        runs.bytes_per_token = sum(recorded.column(c)[:1].nbytes for c in recorded.column_names)
        runs.lost += recorded.loss.rows_lost


def pausing(drain: Drain) -> Switch:
    """A switch that pauses what a drain records."""

    def switch(on: bool) -> None:
        while not on and not drain.contexts:
            time.sleep(0.001)  # the first prompt makes the ring
        if drain.contexts:
            drain.contexts[0].ring.paused = not on

    return switch


def time_tokens(model: llama.Llama, args: argparse.Namespace, switch: Switch | None = None) -> Timing:
    """Compute prompts and then single tokens, switched on and off by turns; gives median seconds of each kind.

    Without a switch both kinds are the same.
    """
    n, tokens = args.prefill, np.random.default_rng(0).integers(0, 500, args.prefill + args.decode).tolist()
    prompts: tuple[list[float], list[float]] = ([], [])
    singles: tuple[list[float], list[float]] = ([], [])

    def timed(entries: list[tuple[int, int, int, bool]], on: bool) -> float:
        if switch is not None:
            switch(on)
        start = time.perf_counter()
        model.decode(entries)
        return time.perf_counter() - start

    for i in range(4):
        model.forget(0)
        entries = [(token, j, 0, j == n - 1) for j, token in enumerate(tokens[:n])]
        prompts[i % 2].append(timed(entries, i % 2 == 0))
    for i, token in enumerate(tokens[n:], start=n):
        seconds = timed([(token, i, 0, True)], i % 2 == 0)
        if i >= n + 4:  # the first ones build their graph
            singles[i % 2].append(seconds)
    on, off = ((p[1:] or p, t) for p, t in zip(prompts, singles, strict=True))
    if switch is None:
        on = off = (on[0] + off[0], on[1] + off[1])
    return (*(float(np.median(x)) for x in on), *(float(np.median(x)) for x in off))  # type: ignore[return-value]


def time_tools(model: Path, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds per pass of llama-perplexity, of the same traced, and of llama-imatrix, as they say themselves."""
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40 * args.prefill, encoding="utf-8")
    common = ["-m", model, "-f", text, "-c", "512", "--chunks", "2", "-t", str(args.threads)]
    perplexity = [find_tool("llama-perplexity"), *common]
    commands = {
        "plain": perplexity,
        "traced": [
            *f"{sys.executable} -m moetrace run --force -o".split(),
            folder / "p.moet",
            "--",
            *perplexity,
        ],
        "imatrix": [find_tool("llama-imatrix"), *common, "-o", folder / "imatrix.gguf"],
    }
    seconds = {}
    for name in random.sample(TOOLS, len(TOOLS)):
        done = subprocess.run(commands[name], check=True, capture_output=True, text=True)
        found = re.search(r"([\d.]+) seconds per pass", done.stderr)
        if found is None:
            sys.exit(f"{name}: no time per pass in the log of the tool")
        seconds[name] = float(found[1])
    return seconds


def ratio(seconds: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Give the geometric mean of the speeds' ratios, with it to without it, and its 95 % interval."""
    logs = -np.diff(np.log(np.array(seconds)[:, ::-1]), axis=1).ravel()
    mean = logs.mean()
    if len(logs) < 2:
        return math.exp(mean), math.nan, math.nan
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def table(measured: dict[str, Runs], prefill: int) -> list[str]:
    """Give the result as a Markdown table."""
    lines = [
        "| | decode, tokens/s | ratio [95 %] | prefill, tokens/s | ratio [95 %] | bytes per token "
        "| own code, ns per (token, layer) | rows lost |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in measured.items():
        cells = [name]
        for seconds, n in ((runs.decode, 1), (runs.prefill, prefill)):
            cells.append(f"{n / np.median(np.array(seconds)[:, 0]):.1f}")
            cells.append("{:.4f} [{:.4f}, {:.4f}]".format(*ratio(seconds)))
        known = not math.isnan(runs.bytes_per_token)
        cells.append(f"{runs.bytes_per_token:,.0f}" if known else "")
        cells.append(f"{np.median(runs.own_ns):.0f}" if runs.own_ns else "")
        cells.append(str(runs.lost) if known else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--prefill", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=48, help="tokens one by one")
    parser.add_argument("--model", type=Path, help="a GGUF file; by default one is generated")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="moetrace-bench-"))
    try:
        path = args.model or write_model(folder / "model.gguf", "gpt-oss", quantization="F16", **SHAPE)
        size = path.stat().st_size
        measured = {name: Runs() for name in (*VARIANTS, *ALTERNATIVES)}
        tools: list[dict[str, float]] = []
        other = Alternative(folder)
        sizes = {"n_ctx": args.prefill + args.decode, "n_threads": args.threads}
        with (
            llama.Llama(path, **sizes) as model,
            llama.Llama(path, eval_callback=other.eval_callback, **sizes) as watched,
        ):
            for _ in range(2):  # the file is read, and the processor awake
                time_tokens(model, args)
            for repeat in range(args.repeats):
                print(f"repeat {repeat + 1} of {args.repeats}", file=sys.stderr)
                for name in random.sample(list(measured), len(measured)):
                    if name in VARIANTS:
                        run_moment(name, model, folder, args, measured[name])
                        continue
                    mode = ALTERNATIVES[name]
                    timing = time_tokens(watched, args, lambda on, mode=mode: other.set(mode if on else 0))
                    measured[name].add(timing)
                    other.set(0)
                    other.forget()
                tools.append(time_tools(path, folder, args))
        head = (
            f"{args.repeats} repeats, {args.threads} thread(s) of {os.cpu_count()} cores ({platform.machine()}), "
            f"{size / 2**30:.2f} GiB of weights, a prompt of {args.prefill} tokens "
            f"and {args.decode} one by one. Ratios are of speeds: recording to paused, and paused to not traced."
        )
        text = [head, "", *table(measured, args.prefill)]
        for name, what in (("traced", "llama-perplexity under moetrace"), ("imatrix", "llama-imatrix")):
            mean, low, high = ratio([(t[name], t["plain"]) for t in tools])
            against = "by the tool's own clock, to plain llama-perplexity on the same text"
            text += ["", f"{what}, {against}: {mean:.3f} [{low:.3f}, {high:.3f}]."]
        print("\n".join(text))
        if args.write:
            write_section(ROOT / "docs" / "benchmarks.md", "overhead", text)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_section(path: Path, name: str, lines: list[str]) -> None:
    """Replace what stands between the markers of a section."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    text = path.read_text()
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    path.write_text(before + "\n" + "\n".join(lines) + "\n" + after)


if __name__ == "__main__":
    main()
