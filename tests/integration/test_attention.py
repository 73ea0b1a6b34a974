"""Attention: ragged rows in the order of positions, held against the soft-max rules and against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from running import TEXT, capture

import moetrace
from moetrace.host.client import drive
from moetrace.host.prompts import Prompt
from moetrace.trace.verify import verify

pytestmark = pytest.mark.runtime


def rows_of(trace: moetrace.Trace, layer: int):
    """(serial, position, weights, first position) of every row that was served to a request."""
    for serial, position, request in zip(
        trace.column("serial"), trace.column("position"), trace.column("request"), strict=True
    ):
        if request >= 0:
            found = trace.attention.row(int(serial), layer)
            assert found is not None
            yield int(serial), int(position), *found


@pytest.mark.parametrize("name", ["qwen3moe", "olmoe", "deepseek2-v3"])
def test_rows_cover_the_keys_before_them_and_sum_to_one(name, runtime, model_file, tmp_path):
    path = tmp_path / "t.moet"
    prompts = [{"prompt": TEXT[:200], "n_predict": 5}, {"prompt": TEXT[300:420], "n_predict": 5}]
    capture(model_file(name), path, prompts, "--capture", "weights,attention", "-np", "2", "-ub", "32")
    trace = moetrace.open(path)
    assert "attention" in trace.channels
    n_head = 4
    for layer in range(4):
        n = 0
        for _, position, weights, first in rows_of(trace, layer):
            assert first == 0
            assert weights.shape == (n_head, position + 1)
            np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
            assert (weights >= 0).all()
            n += 1
        assert n > 50
    assert len(trace.attention) == len(trace) * 4
    assert verify(path).exit_code == 0


def test_attention_of_the_first_layer_equals_numpy(runtime, model_file, tmp_path):
    """Queries and keys of the first layer, captured by name, give the captured attention."""
    path = tmp_path / "t.moet"
    # after the rotation; llama.cpp calls the results of several steps by one name, the last one counts
    channels = "attention,tensor:Qcur-0,tensor:Kcur-0"
    capture(model_file("llama"), path, [{"prompt": TEXT[:150]}], "--capture", channels, "-ub", "512")
    trace = moetrace.open(path)
    n = len(trace)
    q = np.asarray(trace.column("tensor.Qcur-0")).reshape(n, 4, 16).astype(np.float64)
    k = np.asarray(trace.column("tensor.Kcur-0")).reshape(n, 2, 16).astype(np.float64)
    k = k.astype(np.float16).astype(np.float64)  # the KV cache is F16
    for _, position, weights, _ in rows_of(trace, 0):
        for head in range(4):
            scores = k[: position + 1, head // 2] @ q[position, head] / 4.0
            e = np.exp(scores - scores.max())
            np.testing.assert_allclose(weights[head], e / e.sum(), atol=2e-3)


def test_a_sliding_window_and_sinks(runtime, model_file, tmp_path):
    path = tmp_path / "t.moet"
    capture(model_file("gpt-oss"), path, [{"prompt": TEXT}], "--capture", "attention", "-ub", "64")
    trace = moetrace.open(path)
    window = 128
    seen, sums = set(), []
    for layer in range(4):
        for _, position, weights, first in rows_of(trace, layer):
            n_keys = weights.shape[1]
            assert first == position + 1 - n_keys
            assert n_keys in (position + 1, min(position + 1, window))
            seen.add((n_keys == position + 1, position >= window))
            sums.append(weights.sum(axis=1, dtype=np.float64))
    assert seen == {(True, False), (True, True), (False, True)}  # both kinds of layers
    total = np.concatenate(sums)
    assert (total < 1 + 1e-6).all()
    assert np.mean(total < 1 - 1e-5) > 0.9  # the rest is the sink's, which some heads hardly look at


@pytest.mark.parametrize("cache", ["-kvu", "-no-kvu"])
def test_slots_do_not_mix_and_shifts_are_followed(cache, runtime, model_file, tmp_path):
    path = tmp_path / "t.moet"
    # one cache for all slots is full before any of two slots shifts
    slots = ["-np", "1", "-c", "256"] if cache == "-kvu" else ["-np", "2", "-c", "512"]
    prompts = [Prompt(id=str(i), text=TEXT[80 * i : 80 * i + 60], n_predict=280) for i in range(2)]
    with moetrace.serve(
        model_file("qwen3moe"),
        output=path,
        channels="weights,attention",
        arguments=[*slots, "-t", "1", "-fa", "off", "--context-shift", cache],
        program=str(runtime.tool("llama-server")),
    ) as server:
        drive(server.client, prompts, settings={"temperature": 0.0, "ignore_eos": True})
    trace = moetrace.open(path)
    assert trace.requests["n_shifts"].sum() > 0
    for _, position, weights, first in rows_of(trace, 2):
        assert first == 0
        assert weights.shape[1] == position + 1
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-4)
    assert trace.counters["attention_lost"] == 0
    assert verify(path).exit_code == 0


def test_flash_attention_leaves_nothing_to_record(runtime, model_file, tmp_path):
    path = tmp_path / "t.moet"
    with moetrace.serve(
        model_file("qwen3moe"),
        output=path,
        channels="attention",
        arguments=["-np", "1", "-c", "512", "-t", "1", "-fa", "on"],
        program=str(runtime.tool("llama-server")),
    ) as server:
        drive(server.client, [Prompt(id="0", text=TEXT[:60], n_predict=2)])
    trace = moetrace.open(path)
    assert len(trace.attention) == 0
    assert trace.attention.row(0, 0) is None
