"""Every synthetic model loads in llama.cpp, routes in a lively way and generates text."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from router_math import mixing_weights, selection_scores
from running import REFERENCE, TEXT

from moetrace.synthetic import ARCHITECTURES, QUANTIZATIONS

if TYPE_CHECKING:
    from conftest import Runtime

pytestmark = pytest.mark.runtime


def run(model: Path, folder: Path, text: str = TEXT, n_generate: int = 24) -> dict[str, np.ndarray]:
    out = folder / "routing.npz"
    command = [sys.executable, REFERENCE, model, out, str(n_generate)]
    result = subprocess.run(command, input=text.encode(), capture_output=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    with np.load(out) as saved:
        return dict(saved)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_model_routes_and_generates(name, runtime, model_file, tmp_path):
    arch = ARCHITECTURES[name]
    seen = run(model_file(name), tmp_path)
    n_tokens = len(seen["tokens"])
    assert 200 < n_tokens < 600
    assert seen["text"].tobytes().decode() == "<|bos|>" * arch.add_bos + TEXT

    layers = {int(key.removeprefix("order_")) for key in seen if key.startswith("order_")}
    assert layers == set(arch.moe_layers)
    for layer in arch.moe_layers:
        logits = seen[f"logits_{layer}"]
        assert logits.shape == seen[f"order_{layer}"].shape == (n_tokens, arch.n_expert)
        assert np.isfinite(logits).all()
        chosen = seen[f"order_{layer}"][:, : arch.n_expert_used]
        used = np.bincount(chosen.ravel(), minlength=arch.n_expert)
        if used.mean() > 20:
            assert used.min() > 0, f"layer {layer}: experts never used: {np.flatnonzero(used == 0)}"
        assert np.mean(used > 0) > 0.9
        assert used.max() < 8 * used.mean()
        n_sets = len({frozenset(row) for row in chosen.tolist()})
        assert n_sets > min(n_tokens / 10, math.comb(arch.n_expert, arch.n_expert_used) / 2)

    if arch.encoder:
        assert np.isfinite(seen["embeddings"]).all()
        assert seen["embeddings"].std(axis=0).min() > 0.1
        return
    assert np.isfinite(seen["logits"]).all()
    assert len(seen["generated"]) == 24, "generation ended early"
    assert len(set(seen["generated"].tolist())) > 6
    assert seen["generated_text"].tobytes().decode("ascii")
    other = run(model_file(name), tmp_path, "The tide was out when", 24)
    assert other["generated_text"].tobytes() != seen["generated_text"].tobytes()


@pytest.mark.parametrize("name", [name for name, arch in ARCHITECTURES.items() if arch.n_expert])
def test_experts_are_selected_and_mixed_as_the_architecture_says(name, runtime, model_file, tmp_path):
    arch, path = ARCHITECTURES[name], model_file(name)
    seen = run(path, tmp_path, n_generate=0)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    plain, differ = replace(arch, n_expert_groups=0), 0
    for layer in arch.moe_layers:
        logits = seen[f"logits_{layer}"] + stored.get(f"blk.{layer}.ffn_gate_inp.bias", 0)
        scores = selection_scores(arch, logits, stored.get(f"blk.{layer}.exp_probs_b.bias"))
        chosen = seen[f"order_{layer}"][:, : arch.n_expert_used]
        expected = np.argsort(-scores, axis=-1, kind="stable")[:, : arch.n_expert_used]
        gap = np.diff(-np.sort(-scores, axis=-1)[:, : arch.n_expert_used + 1], axis=-1).max(axis=-1)
        clear = gap < -1e-6  # the order of near-ties is rounding
        assert clear.mean() > 0.9
        assert np.array_equal(chosen[clear], expected[clear])
        weights = mixing_weights(arch, logits, chosen)
        np.testing.assert_allclose(seen[f"weights_{layer}"], weights, rtol=1e-4, atol=1e-6)
        unbiased = np.argsort(-selection_scores(plain, logits, None), axis=-1)[:, : arch.n_expert_used]
        differ += sum(set(a) != set(b) for a, b in zip(chosen.tolist(), unbiased.tolist(), strict=True))
    # a bias or a mask that changed nothing would test nothing
    assert (differ > 20) == (arch.selection_bias or arch.n_expert_groups > 0)


@pytest.mark.parametrize("quantization", [name for name in QUANTIZATIONS if name])
def test_quantised_experts_change_the_routing_little(quantization, runtime, model_file, tmp_path):
    sizes = {"n_layer": 2, "n_embd": 256, "n_ff_expert": 256, "n_expert": 8, "n_expert_used": 2}
    exact = run(model_file("gpt-oss", **sizes), tmp_path)
    packed = run(model_file("gpt-oss", **sizes, quantization=quantization), tmp_path)
    assert len(packed["generated"]) == 24
    agree = np.mean(packed["order_1"][:, 0] == exact["order_1"][:, 0])
    assert agree > 0.8  # chance is 1/8


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_server_serves_it(name, runtime, model_file):
    encoder = ARCHITECTURES[name].encoder
    with serve(runtime, model_file(name), *["--embedding"] * encoder) as address:
        if encoder:
            embedded = post(f"{address}/v1/embeddings", {"input": "Is it raining?"})
            assert len(embedded["data"][0]["embedding"]) == ARCHITECTURES[name].n_embd
            return
        messages = [{"role": "user", "content": "Is it raining?"}]
        applied = post(f"{address}/apply-template", {"messages": messages})
        expected = "<|im_start|>user\nIs it raining?<|im_end|>\n<|im_start|>assistant\n"
        assert applied["prompt"] == expected
        answer = post(f"{address}/v1/chat/completions", {"messages": messages, "max_tokens": 16})
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["choices"][0]["message"]["content"]
        assert answer["usage"]["completion_tokens"] == 16


@contextmanager
def serve(runtime: Runtime, model: Path, *options: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [runtime.tool("llama-server"), "-m", model, "-c", "512", "-t", "1", "-np", "1", *options]
    server = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not is_ready(address):
            assert server.poll() is None, "llama-server ended"
            assert time.monotonic() < deadline, "llama-server is not ready after a minute"
            time.sleep(0.02)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
