"""What is captured is right: held against numpy, against an independent recorder, and against itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from router_math import check_routing, mixing_weights
from running import MOE, REFERENCE, ROUTER, TEXT, capture

import moetrace
from moetrace.synthetic import ARCHITECTURES
from moetrace.trace.record import State
from moetrace.trace.verify import verify

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="session")
def router_traces(runtime, model_file, tmp_path_factory):
    """``router_traces(architecture)``: the same prompts captured by (tap, callback), every router channel."""
    folder = tmp_path_factory.mktemp("router")
    prompts = [{"prompt": TEXT, "n_predict": 0}] + [
        {"prompt": f"Number {i}: " + TEXT[40 * i : 40 * i + 120], "n_predict": 6} for i in range(5)
    ]
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            for collector in ("tap", "callback"):
                if ARCHITECTURES[name].encoder:  # an encoder takes a sequence at once and generates nothing
                    options = ["-np", "1"]
                    items = [{**prompt, "n_predict": 0} for prompt in prompts]
                else:
                    options, items = ["-np", "3", "-ub", "64"], prompts
                path = folder / f"{name}-{collector}.moet"
                capture(
                    model_file(name), path, items, "--collector", collector, "--capture", ROUTER, *options
                )
            made[name] = (folder / f"{name}-tap.moet", folder / f"{name}-callback.moet")
        return made[name]

    return make


@pytest.mark.parametrize("name", MOE)
def test_both_collectors_give_the_same_bytes(name, router_traces):
    tap, callback = (moetrace.open(path) for path in router_traces(name))
    assert tap.facts["collector"] == "tap"
    assert callback.facts["collector"] == "callback"
    assert len(tap) == len(callback) > 500
    for column in set(tap.column_names) - {"time_ns"}:
        assert tap.column(column).tobytes() == callback.column(column).tobytes(), column


@pytest.mark.parametrize("name", MOE)
def test_ids_are_the_top_k_of_scores_and_scores_follow_from_the_gate_input(name, router_traces, model_file):
    arch = ARCHITECTURES[name]
    trace = moetrace.open(router_traces(name)[0])
    assert set(trace.n_expert) == {arch.n_expert}
    check_routing(trace, name, model_file(name))
    for i in range(len(trace.layers)):
        present = np.asarray(trace.state)[:, i] == State.PRESENT
        ids, logits, weights = (
            np.asarray(column)[present, i] for column in (trace.experts, trace.logits, trace.weights)
        )
        np.testing.assert_allclose(
            weights, mixing_weights(arch, logits, ids.astype(int)), rtol=2e-4, atol=1e-6
        )


@pytest.mark.parametrize("name", MOE)
def test_every_entry_is_accounted_for(name, router_traces, model_file):
    for path in router_traces(name):
        result = verify(path)
        assert result.exit_code == 0, result
        trace = moetrace.open(path)
        assert trace.facts["model_path"] == str(model_file(name))
        loss = trace.loss
        assert loss.rows_lost == loss.lost == 0
        assert loss.produced == len(trace) * len(trace.layers) == loss.present + loss.not_computed
        # only the last layer may be left out, and exactly for the rows that are no outputs
        state = np.asarray(trace.state)
        assert (state[:, :-1] == State.PRESENT).all()
        left_out = state[:, -1] == State.NOT_COMPUTED
        if left_out.any():
            np.testing.assert_array_equal(left_out, (np.asarray(trace.column("flags")) & 1) == 0)
        sentinel = 255 if max(trace.n_expert) <= 255 else 65535
        assert (np.asarray(trace.experts)[left_out, -1] == sentinel).all()
        assert np.isnan(np.asarray(trace.weights)[left_out, -1]).all()


@pytest.mark.parametrize("name", MOE)
def test_an_independent_recorder_sees_the_same(name, router_traces, model_file, tmp_path):
    arch = ARCHITECTURES[name]
    out = tmp_path / "seen.npz"
    command = [sys.executable, REFERENCE, model_file(name), out, "0"]
    subprocess.run(command, input=TEXT.encode(), capture_output=True, timeout=120, check=True)
    seen = np.load(out)
    path = tmp_path / "whole.moet"
    capture(model_file(name), path, [{"prompt": TEXT}], "--all-outputs", "--ubatch-size", "2048")
    trace = moetrace.open(path)
    np.testing.assert_array_equal(trace.column("token"), seen["tokens"])
    np.testing.assert_array_equal(trace.column("position"), np.arange(len(trace)))
    assert (np.asarray(trace.state) == State.PRESENT).all()
    for i, layer in enumerate(trace.layers):
        order = seen[f"order_{layer}"][:, : arch.n_expert_used]
        np.testing.assert_array_equal(np.asarray(trace.experts)[:, i], order)
        np.testing.assert_array_equal(np.asarray(trace.weights)[:, i], seen[f"weights_{layer}"])


def test_expert_matrices_that_consumed_the_ids(router_traces):
    separate = moetrace.open(router_traces("deepseek2-v2")[0])
    fused = moetrace.open(router_traces("deepseek2-v2-fused")[0])
    assert set(map(tuple, separate.facts["consumers"])) == {("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")}
    assert set(map(tuple, fused.facts["consumers"])) == {("ffn_gate_up_exps", "ffn_down_exps")}


def test_chosen_layers_only(runtime, model_file, tmp_path):
    path = tmp_path / "layers.moet"
    capture(model_file("gpt-oss"), path, [{"prompt": TEXT}], "--layers", "1,3")
    trace = moetrace.open(path)
    assert list(trace.layers) == [1, 3]
    whole = tmp_path / "whole.moet"
    capture(model_file("gpt-oss"), whole, [{"prompt": TEXT}])
    np.testing.assert_array_equal(
        np.asarray(trace.experts), np.asarray(moetrace.open(whole).experts)[:, [1, 3]]
    )


def test_named_tensors(runtime, model_file, tmp_path):
    path = tmp_path / "tensors.moet"
    options = ["--capture", "weights,gate_input,tensor:attn_norm-1,tensor:l_out-*,tensor:kq_soft_max-*"]
    error = capture(model_file("qwen3moe"), path, [{"prompt": TEXT[:200], "n_predict": 4}], *options)
    trace = moetrace.open(path)
    # attention is no row per token: it is refused by name, not stored askew
    assert "kq_soft_max" not in " ".join(trace.column_names)
    out = np.asarray(trace.column("tensor.l_out-0"))
    assert out.shape == (len(trace), 64)
    assert np.isfinite(out).all()
    # the last layer's output exists only where logits were asked for
    last = np.asarray(trace.column("tensor.l_out-3"))
    is_output = (np.asarray(trace.column("flags")) & 1) == 1
    assert np.isfinite(last[is_output]).all()
    assert np.isnan(last[~is_output]).all()
    # an RMS norm has a mean square of one: these are that tensor's values, not some others'
    norm = np.asarray(trace.column("tensor.attn_norm-1"))
    weight = {t.name: t.data for t in gguf.GGUFReader(model_file("qwen3moe")).tensors}[
        "blk.1.attn_norm.weight"
    ]
    expected = out / np.sqrt(np.mean(out.astype(np.float64) ** 2, axis=1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(norm, expected, rtol=1e-3, atol=1e-4)
    assert error


@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_K", "MXFP4"])
def test_quantised_experts(quantization, runtime, model_file, tmp_path):
    sizes = {"n_layer": 2, "n_embd": 256, "n_ff_expert": 256, "n_expert": 8, "n_expert_used": 2}
    model = model_file("gpt-oss", **sizes, quantization=quantization)
    traces = []
    for collector in ("tap", "callback"):
        path = tmp_path / f"{collector}.moet"
        capture(
            model, path, [{"prompt": TEXT, "n_predict": 4}], "--collector", collector, "--capture", ROUTER
        )
        traces.append(moetrace.open(path))
    for column in set(traces[0].column_names) - {"time_ns"}:
        assert traces[0].column(column).tobytes() == traces[1].column(column).tobytes()
    scores = np.asarray(traces[0].scores)
    ids = np.asarray(traces[0].experts).astype(int)
    top = np.sort(scores, axis=-1)[..., ::-1][..., :2]
    np.testing.assert_array_equal(np.take_along_axis(scores, ids, axis=-1), top)


def test_a_dense_model_is_refused(runtime, model_file, tmp_path):
    error = capture(model_file("llama-dense"), tmp_path / "t.moet", [{"prompt": "Hello"}], ok=False)
    assert "dense" in error
    assert "fix:" in error
    assert "Traceback" not in error
