"""What tracing costs: llama-bench with and without the tracer, side by side.

    python benchmarks/bench_overhead.py [--repeats N] [--threads T] [--model FILE] [--write]

A model of realistic cost (gpt-oss's shape: 24 layers, 32 experts, top-4, about 1.2 GB in F16, random weights)
is generated once. Each repeat runs every variant once, in random order; a variant's ratio to the untraced run
of the same repeat is one observation, and the 95 % interval is Student's t on the logarithms. The tracer's
own time per (token, layer) comes from its counters. ``--write`` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import stats

import moetrace
from moetrace.host.options import CaptureOptions
from moetrace.host.runtime import find_tool
from moetrace.host.server import TracedProcess
from moetrace.synthetic import write_model

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"n_layer": 24, "n_expert": 32, "n_expert_used": 4, "n_embd": 512, "n_ff_expert": 512}
#: variant -> options of the capture; None: no tracer
VARIANTS: dict[str, dict[str, object] | None] = {
    "no tracer": None,
    "loaded, paused": {"channels": "experts,weights", "collector": "tap", "paused": True},
    "tap: experts, weights": {"channels": "experts,weights", "collector": "tap"},
    "callback: experts, weights": {"channels": "experts,weights", "collector": "callback"},
    "callback: + logits": {"channels": "experts,weights,logits", "collector": "callback"},
    "callback: + gate input": {"channels": "experts,weights,gate_input", "collector": "callback"},
}


@dataclass
class Runs:
    """What was measured of one variant; tokens/s by test, in the order of the repeats."""

    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    own_decode_ns: list[float] = field(default_factory=list)
    own_prefill_ns: list[float] = field(default_factory=list)
    bytes_per_token: float = math.nan
    lost: int = 0


def run_once(variant: str, model: Path, folder: Path, args: argparse.Namespace, runs: Runs) -> None:
    """Run llama-bench once and take its numbers down."""
    options = VARIANTS[variant]
    command = [
        str(find_tool("llama-bench")),
        "-m",
        str(model),
        "-t",
        str(args.threads),
        "-o",
        "json",
        "-r",
        "1",
    ]
    command += ["-p", str(args.prefill), "-n", str(args.decode)]
    out = folder / "out.json"
    if options is None:
        with out.open("wb") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.DEVNULL, check=True)
    else:
        path = folder / "t.moet"
        shutil.rmtree(path, ignore_errors=True)
        with out.open("wb") as log:
            traced = TracedProcess(command, path, CaptureOptions.of(**options), log=log)  # type: ignore[arg-type]
            code = traced.wait()
        traced.finish(code)
        if code != 0:
            sys.exit(f"llama-bench failed with {code}")
        if not options.get("paused"):
            trace_numbers(path, runs)
    # llama-bench's messages and its JSON share the file
    text = out.read_text(errors="replace")
    for test in json.loads(text[text.index("[") :]):
        (runs.prefill if test["n_prompt"] else runs.decode).append(test["avg_ts"])


def trace_numbers(path: Path, runs: Runs) -> None:
    """Take down what the trace says of its own cost."""
    rows = size = 0
    with moetrace.open(path) as trace:
        for name in trace.contexts:  # llama-bench makes a context for each of its tests
            context = trace.in_context(name)
            rows += len(context)
            own = context.counters["hook_ns"] / len(context) / len(context.layers)
            one_by_one = len(context) == context.counters["graphs"]
            (runs.own_decode_ns if one_by_one else runs.own_prefill_ns).append(own)
            size += sum(context.column(c)[:1].nbytes for c in context.column_names) * len(context)
            runs.lost += context.loss.rows_lost
    runs.bytes_per_token = size / rows


def ratio(traced: list[float], plain: list[float]) -> tuple[float, float, float]:
    """Give the geometric mean of paired ratios and its 95 % interval."""
    logs = np.log(np.array(traced) / np.array(plain))
    mean = logs.mean()
    if len(logs) < 2:
        return math.exp(mean), math.nan, math.nan
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def table(measured: dict[str, Runs]) -> list[str]:
    """Give the result as a Markdown table."""
    plain = measured["no tracer"]
    lines = [
        "| | decode, tokens/s | ratio [95 %] | prefill, tokens/s | ratio [95 %] | bytes per token | own code, ns per"
        " (token, layer): decode | prefill | rows lost |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in measured.items():
        cells = [name]
        for mine, theirs in ((runs.decode, plain.decode), (runs.prefill, plain.prefill)):
            cells.append(f"{np.median(mine):.1f}")
            mean, low, high = ratio(mine, theirs)
            cells.append("1" if runs is plain else f"{mean:.3f} [{low:.3f}, {high:.3f}]")
        known = not math.isnan(runs.bytes_per_token)
        cells.append(f"{runs.bytes_per_token:,.0f}" if known else "")
        for own in (runs.own_decode_ns, runs.own_prefill_ns):
            cells.append(f"{np.median(own):.0f}" if own else "")
        cells.append(str(runs.lost) if known else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--model", type=Path, help="a GGUF file; by default one is generated")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    parser.add_argument(
        "--section", choices=("overhead", "gpu"), default="overhead", help="where to write it"
    )
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="moetrace-bench-"))
    try:
        model = args.model or write_model(folder / "model.gguf", "gpt-oss", quantization="F16", **SHAPE)
        size = model.stat().st_size
        measured = {name: Runs() for name in VARIANTS}
        for repeat in range(args.repeats):
            for name in random.sample(list(VARIANTS), len(VARIANTS)):
                print(f"repeat {repeat + 1} of {args.repeats}: {name}", file=sys.stderr)
                run_once(name, model, folder, args, measured[name])
        head = (
            f"{args.repeats} repeats, {args.threads} thread(s) of {os.cpu_count()} cores ({platform.machine()}), "
            f"{size / 2**30:.2f} GiB of weights, llama-bench -p {args.prefill} -n {args.decode}; "
            "ratios are to the untraced run of the same repeat, with Student's t interval on logarithms."
        )
        text = [head, "", *table(measured)]
        print("\n".join(text))
        if args.write:
            write_section(ROOT / "docs" / "benchmarks.md", args.section, text)
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
