"""The tracer in llama.cpp's other tools; llama-imatrix counts expert use itself and is the referee."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from running import TEXT

import moetrace
from moetrace.data import demo_model, prompts
from moetrace.model.imatrix import read_imatrix
from moetrace.trace.record import State
from moetrace.trace.verify import verify

pytestmark = pytest.mark.runtime


def traced(output: Path, *command: str | Path, collector: str = "tap") -> subprocess.CompletedProcess[str]:
    options = ["-o", output, "--collector", collector, "--"]
    result = subprocess.run(
        [sys.executable, "-m", "moetrace", "run", *options, *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 6)
    return path


@pytest.mark.parametrize("collector", ["tap", "callback"])
@pytest.mark.parametrize(
    "name", ["gpt-oss", "qwen3moe", "olmoe", "deepseek2-v3", "deepseek2-v2-fused", "qwen3moe-300"]
)
def test_counts_equal_those_of_imatrix(name, collector, runtime, model_file, text_file, tmp_path):
    """imatrix installs a callback of its own, which must go on working, and counts every expert's rows."""
    path, out = tmp_path / "t.moet", tmp_path / "out.gguf"
    arguments = ["-m", model_file(name), "-f", text_file, "-o", out, "-c", "256", "-t", "1", "--no-ppl"]
    traced(path, runtime.tool("llama-imatrix"), *arguments, collector=collector)
    stored = {tensor.name: np.asarray(tensor.data) for tensor in gguf.GGUFReader(out).tensors}
    counts = {
        name.removesuffix(".counts"): c.ravel() for name, c in stored.items() if name.endswith(".counts")
    }
    experts_counted = {name: c for name, c in counts.items() if "_exps" in name}
    trace = moetrace.open(path)
    ours = np.asarray(trace.experts)
    # imatrix does not count the two warm-up tokens
    rows = (trace.column("flags") & 64) == 0
    matrices = {matrix for layer in trace.facts["consumers"] for matrix in layer}
    assert len(experts_counted) == len(trace.layers) * len(matrices)
    for i, layer in enumerate(trace.layers):
        present = rows & (np.asarray(trace.state)[:, i] == State.PRESENT)
        used = np.bincount(ours[present, i].ravel(), minlength=trace.n_expert[i])
        assert used.sum() > 1000
        for matrix in trace.facts["consumers"][i]:
            np.testing.assert_array_equal(experts_counted[f"blk.{layer}.{matrix}.weight"], used)
    # and imatrix itself counted the same as without us
    plain = tmp_path / "plain.gguf"
    arguments[5] = plain
    subprocess.run([runtime.tool("llama-imatrix"), *arguments], capture_output=True, timeout=300, check=True)
    for tensor in gguf.GGUFReader(plain).tensors:
        np.testing.assert_array_equal(np.asarray(tensor.data), stored[tensor.name])
    assert verify(path).exit_code == 0


def test_perplexity(runtime, model_file, text_file, tmp_path):
    arguments = ["-m", model_file("olmoe"), "-f", text_file, "-c", "128", "-b", "512", "-t", "1"]
    command = [runtime.tool("llama-perplexity"), *arguments]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    result = traced(tmp_path / "t.moet", *command)
    # the estimate after each chunk; on a busy machine the tool may end before it has printed the last ones
    ours, theirs = (re.findall(r"\[\d+\][\d.]+,", r.stdout + r.stderr) for r in (result, plain))
    assert min(len(ours), len(theirs)) > 0
    assert all(a == b for a, b in zip(ours, theirs, strict=False))
    trace = moetrace.open(tmp_path / "t.moet")
    # four sequences of 128 tokens in a batch of 512
    assert set(np.unique(trace.column("sequence"))) >= {0, 1, 2, 3}
    assert not (trace.column("flags") & 0b110000).any()
    assert verify(tmp_path / "t.moet").exit_code == 0


def test_completion(runtime, model_file, tmp_path):
    arguments = ["-m", model_file("gpt-oss"), "-n", "8", "-c", "256", "-t", "1", "--temp", "0", "-no-cnv"]
    command = [runtime.tool("llama-completion"), *arguments, "-p", "Why is the sky blue?"]
    # its text is not looked at: on a busy machine llama-completion ends before it has printed all of it
    traced(tmp_path / "t.moet", *command)
    trace = moetrace.open(tmp_path / "t.moet")
    assert len(trace.requests) == 1
    (request,) = trace.requests.itertuples()
    assert request.n_decode == 7
    assert verify(tmp_path / "t.moet").exit_code == 0


def test_bench(runtime, model_file, tmp_path):
    arguments = ["-m", model_file("qwen3moe"), "-p", "64", "-n", "16", "-r", "2", "-t", "1"]
    traced(tmp_path / "t.moet", runtime.tool("llama-bench"), *arguments)
    trace = moetrace.open(tmp_path / "t.moet")
    # two tests, each warmed up once and repeated twice; llama-bench makes a context for each
    total = sum(len(trace.in_context(name)) for name in trace.contexts)
    assert total >= 2 * 64 + 2 * 16
    assert verify(tmp_path / "t.moet").exit_code == 0


def test_a_text_for_imatrix_that_leaves_no_expert_out(runtime, text_file, tmp_path):
    """What the calibration text did not reach is named as the tool itself does, and reached by the text chosen."""
    model, first, old, second = demo_model(), tmp_path / "a.gguf", tmp_path / "a.dat", tmp_path / "b.gguf"
    common = ["-m", model, "-c", "128", "-t", "1", "--no-ppl"]

    def imatrix(*arguments: str | Path) -> str:
        command = [runtime.tool("llama-imatrix"), *common, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stderr

    said = imatrix("-f", text_file, "-o", first)
    imatrix("-f", text_file, "-o", old, "--output-format", "dat")
    a, b = read_imatrix(first), read_imatrix(old)
    np.testing.assert_array_equal(a.missing, b.missing)
    partial = {int(n) for n in re.findall(r"blk\.(\d+)\.ffn_down_exps\.weight' has partial data", said)}
    assert partial == set(a.layers[a.missing.any(axis=1)].tolist())
    assert a.missing.any(), "the text reaches all experts: nothing is tested"
    # a recording of prompts to choose from
    pool = tmp_path / "pool.moet"
    command = [sys.executable, "-m", "moetrace"]
    run = [*command, "capture", "-m", model, "-f", prompts("domains"), "-n", "1", "-t", "1", "-o", pool]
    subprocess.run(run, capture_output=True, timeout=300, check=True)
    run = [*command, "coverage", first, "--pool", pool, "--min-tokens", "4", "--write", tmp_path / "c.txt"]
    out = subprocess.run(run, capture_output=True, text=True, timeout=300, check=True).stdout
    assert "--in-file" in out
    imatrix("-f", tmp_path / "c.txt", "--in-file", first, "-o", second)
    after = read_imatrix(second)
    assert after.missing.sum() < a.missing.sum() / 4
    with moetrace.open(pool) as trace:
        ids = trace.experts[np.asarray(trace.phase) == 0]
    reachable = (
        np.stack([np.bincount(ids[:, i].ravel(), minlength=32)[:32] for i in range(ids.shape[1])]) >= 8
    )
    assert not (after.missing & reachable).any()
