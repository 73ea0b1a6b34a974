"""What tracing costs where a device computes: whole processes, traced and not, in turn.

    python benchmarks/bench_device.py --model FILE [--repeats N] [--placement all,cpu-moe] [--write]

A device answers later than the call that asked it, so nothing can be switched from token to token as bench_overhead.py
does. Each process loads the model, computes a prompt a few times and then single tokens, each until its logits are
there, and says the median time of both. "untraced" processes do not load the tracer's library at all. Variants take
turns; ratios are of neighbours in time, intervals Student's t on their logarithms. ``--make FILE`` writes a model of
the size that people run (48 layers of 128 experts, top-8, 17 GB; its layers are alike).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from bench_overhead import ROOT, ratio, write_section

import moetrace
from moetrace.host import llama
from moetrace.host.inprocess import tracing
from moetrace.host.options import CaptureOptions
from moetrace.synthetic import write_model, writer
from moetrace.synthetic.architectures import Kind
from moetrace.trace.writer import TraceWriter

SHAPE = {"n_layer": 48, "n_embd": 2048, "n_head": 32, "n_head_kv": 4, "n_expert": 128, "n_expert_used": 8}
#: variant -> options of the capture; None: the tracer's library is not loaded
VARIANTS: dict[str, dict[str, Any] | None] = {
    "untraced": None,
    "tap: experts, weights": {"collector": "tap"},
    "callback: experts, weights": {"collector": "callback"},
    "tap: + logits": {"collector": "tap", "channels": "experts,weights,logits"},
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "all": {"n_gpu_layers": 999},
    "cpu-moe": {"n_gpu_layers": 999, "n_cpu_moe": 999},
    "half": {"n_gpu_layers": 24},
}


def make(path: Path) -> None:
    """Write the large model. Experts of a layer and layers are alike, since drawing them all takes many minutes."""
    drawn: dict[Any, Any] = {}
    values, pack = writer._values, writer.pack

    def few(tensor: Any, *rest: Any) -> Any:
        key = (tensor.shape, tensor.kind)
        if key not in drawn:
            one = tensor.kind is Kind.EXPERT
            drawn[key] = values(replace(tensor, shape=(1, *tensor.shape[1:])) if one else tensor, *rest)
        return (key, drawn[key])

    def packed(given: Any, qtype: Any) -> Any:
        (shape, kind), array = given
        if ("packed", shape, kind) not in drawn:
            done = pack(array, qtype)
            drawn["packed", shape, kind] = np.repeat(done, shape[0], axis=0) if kind is Kind.EXPERT else done
        return drawn["packed", shape, kind]

    with mock.patch.object(writer, "_values", few), mock.patch.object(writer, "pack", packed):
        write_model(path, "qwen3moe", n_ff_expert=768, quantization="Q4_K", **SHAPE)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run one process's work; gives seconds per prompt and per token, and what was counted."""
    options = VARIANTS[job["variant"]]
    if options is None:
        found = importlib.util.find_spec("llama_cpp")
        assert found is not None
        assert found.origin is not None
        itself = ctypes.CDLL(str(Path(found.origin).parent / "lib" / "libllama.so"), mode=ctypes.RTLD_GLOBAL)
        llama.tracer = lambda: itself
    n, n_decode = job["prefill"], job["decode"]
    tokens = np.random.default_rng(0).integers(0, 500, n + n_decode).tolist()
    folder = Path(tempfile.mkdtemp(prefix="moetrace-bench-"))
    result: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        trace = None
        if options is not None:
            trace = TraceWriter(folder / "t.moet")
            stack.enter_context(
                tracing(trace, CaptureOptions.of(**{"channels": "experts,weights", **options}))
            )
        sizes = {"n_ctx": n + n_decode, "n_batch": 512, "n_ubatch": 512, "n_threads": job["threads"]}
        model = stack.enter_context(llama.Llama(job["model"], **sizes, **PLACEMENTS[job["placement"]]))

        def timed(entries: list[tuple[int, int, int, bool]]) -> float:
            start = time.perf_counter()
            model.decode(entries)
            model.logits(len(entries) - 1)
            return time.perf_counter() - start

        prompts, singles = [], []
        for _ in range(4):
            model.forget(0)
            prompts.append(timed([(token, j, 0, j == n - 1) for j, token in enumerate(tokens[:n])]))
        for i, token in enumerate(tokens[n:], start=n):
            singles.append(timed([(token, i, 0, True)]))
        result.update(prefill=float(np.median(prompts[1:])), decode=float(np.median(singles[8:])))
    if trace is not None:
        trace.close()
        with moetrace.open(folder / "t.moet") as recorded:
            counters = recorded.counters
            result["lost"] = recorded.loss.rows_lost
            result |= {
                name: counters[name] / counters["graphs"] for name in ("syncs", "copies", "copied_bytes")
            }
    shutil.rmtree(folder, ignore_errors=True)
    return result


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Measure in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{job['variant']}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(measured: dict[str, dict[str, list[dict[str, Any]]]], prefill: int) -> list[str]:
    """Give the result as a Markdown table."""
    lines = [
        "| placement | | decode, tokens/s | ratio [95 %] | prefill, tokens/s | ratio [95 %] | per graph: our syncs "
        "| copies | KiB copied |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for placement, variants in measured.items():
        plain = variants["untraced"]
        for name, runs in variants.items():
            cells = [placement, name]
            for kind, n in (("decode", 1), ("prefill", prefill)):
                cells.append(f"{n / np.median([r[kind] for r in runs]):.1f}")
                pairs = [(r[kind], p[kind]) for r, p in zip(runs, plain, strict=True)]
                cells.append("" if runs is plain else "{:.4f} [{:.4f}, {:.4f}]".format(*ratio(pairs)))
            for key, unit in (("syncs", 1), ("copies", 1), ("copied_bytes", 1024)):
                n = np.median([r.get(key, math.nan) for r in runs]) / unit
                cells.append("" if math.isnan(n) else f"{n:.1f}")
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a GGUF file")
    parser.add_argument("--make", type=Path, metavar="FILE", help="write the model and do nothing else")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--placement", default="all,cpu-moe,half")
    parser.add_argument(
        "--variants",
        help="of VARIANTS, with two commas between them (default: all where all is on the device, else two)",
    )
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=128, help="tokens one by one")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(json.loads(args.job))))
        return
    if args.make:
        make(args.make)
        return
    if args.model is None:
        parser.error("--model, or --make to write one")
    measured: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for placement in args.placement.split(","):
        names = (
            args.variants.split(",,")
            if args.variants
            else list(VARIANTS)[: None if placement == "all" else 2]
        )
        measured[placement] = {name: [] for name in names}
        for repeat in range(args.repeats):
            print(f"{placement}: repeat {repeat + 1} of {args.repeats}", file=sys.stderr)
            for name in random.sample(list(measured[placement]), len(measured[placement])):
                job = {"model": str(args.model), "variant": name, "placement": placement}
                job |= {"threads": args.threads, "prefill": args.prefill, "decode": args.decode}
                measured[placement][name].append(run(job))
                print(f"  {name}: {measured[placement][name][-1]}", file=sys.stderr)
    devices = (
        subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        if shutil.which("nvidia-smi")
        else "no NVIDIA GPU"
    )
    head = (
        f"{devices}; {args.repeats} repeats, {args.threads} threads, "
        f"{args.model.stat().st_size / 2**30:.1f} GiB of weights, a prompt of {args.prefill} tokens "
        f"and {args.decode} one by one. Ratios are of speeds, traced to untraced."
    )
    text = [head, "", *table(measured, args.prefill)]
    print("\n".join(text))
    if args.write:
        write_section(ROOT / "docs" / "benchmarks.md", "gpu", text)


if __name__ == "__main__":
    main()
