"""LoRA adapters on the router: logits have them, as the choice does, whichever adapters are in force."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from running import TEXT

import moetrace
from moetrace.host.client import drive
from moetrace.host.prompts import Prompt
from moetrace.model.file import ModelFile
from moetrace.synthetic import ARCHITECTURES
from moetrace.trace.record import State
from moetrace.trace.verify import verify

pytestmark = pytest.mark.runtime

ALPHA, RANK = 8.0, 4


def write_adapter(path: Path, model: Path, seed: int) -> dict[int, np.ndarray]:
    """Write an adapter of every layer's router; gives what it adds to each router's matrix at scale 1."""
    rng = np.random.default_rng(seed)
    added = {}
    with ModelFile(model) as file:
        writer = gguf.GGUFWriter(path, file.architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", ALPHA)
        for layer in file.moe_layers:
            name = f"blk.{layer}.ffn_gate_inp.weight"
            n_expert, n_embd = file.shape(name)
            size = np.sqrt(np.abs(file.tensor(name)).mean())
            a = (size * rng.normal(size=(RANK, n_embd))).astype(np.float32)
            b = (size * rng.normal(size=(n_expert, RANK))).astype(np.float32)
            writer.add_tensor(f"{name}.lora_a", a)
            writer.add_tensor(f"{name}.lora_b", b)
            added[layer] = ALPHA / RANK * b @ a
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return added


@pytest.mark.parametrize("collector", ["tap", "callback"])
@pytest.mark.parametrize("name", ["gpt-oss", "olmoe", "deepseek2-v3"])
def test_logits_have_the_adapters(name, collector, runtime, model_file, tmp_path):
    """GIVEN two scaled adapters whose scales change WHEN served THEN logits are those that the choice was made on."""
    model, files = model_file(name), [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    deltas = [write_adapter(file, model, seed) for seed, file in enumerate(files)]
    scales = {"both": (1.0, 0.7), "one": (0.0, 1.5), "none": (0.0, 0.0)}
    with moetrace.serve(
        model,
        output=tmp_path / "t.moet",
        channels="experts,weights,logits,scores,gate_input",
        collector=collector,
        arguments=["-np", "2", "-t", "1", "--no-warmup", "--lora-scaled", f"{files[0]}:1.0,{files[1]}:0.7"],
        program=str(runtime.tool("llama-server")),
    ) as server:
        for label, pair in scales.items():
            server.client.call("/lora-adapters", [{"id": i, "scale": s} for i, s in enumerate(pair)])
            prompts = [
                Prompt(id=f"{label}{i}", text=TEXT[40 * i : 40 * i + 120], label=label) for i in range(3)
            ]
            answers = drive(server.client, prompts, n_predict=8)
            server.label([answer.label_line() for answer in answers])
    assert verify(tmp_path / "t.moet").findings == ()
    trace = moetrace.open(tmp_path / "t.moet")
    assert trace.facts["collector"] == collector
    with ModelFile(model) as file:
        routers = {layer: file.router(layer) for layer in trace.layers.tolist()}
    for label, pair in scales.items():
        rows = trace.sel(label=label)
        for i, layer in enumerate(trace.layers.tolist()):
            present = np.asarray(rows.state)[:, i] == State.PRESENT
            assert present.sum() >= 3 * 7
            logits, ids, read = (
                np.asarray(c)[present, i] for c in (rows.logits, rows.experts, rows.gate_input)
            )
            matrix = routers[layer].weight + sum(s * d[layer] for s, d in zip(pair, deltas, strict=True))
            bias = 0 if routers[layer].bias is None else routers[layer].bias
            expected = read.astype(np.float64) @ matrix.T + bias
            np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
            if routers[layer].selection_bias is None:  # else the choice is not by the logits alone
                k = ARCHITECTURES[name].n_expert_used
                np.testing.assert_array_equal(np.argsort(-logits, axis=1, kind="stable")[:, :k], ids)
    # the adapters do change the routing
    plain, changed = trace.sel(label="none").experts[:20], trace.sel(label="both").experts[:20]
    assert (np.sort(plain, axis=2) != np.sort(changed, axis=2)).any(axis=2).mean() > 0.2
