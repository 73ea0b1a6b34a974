"""What is planted in a model that llama.cpp runs is found by prediction, and what is not is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from running import capture

import moetrace
from moetrace.analysis import from_trace
from moetrace.analysis.counts.columns import TokenColumns
from moetrace.analysis.prediction.by_layer import attention_by_layer, task_by_layer
from moetrace.synthetic import distinct_tokens, write_planted

pytestmark = pytest.mark.runtime


def recorded(folder: Path, prompts: list[dict[str, Any]], **what: Any) -> TokenColumns:
    model = write_planted(folder / "m.gguf", **what)
    channels = "experts,weights,attention,gate_input"
    capture(model.path, folder / "t.moet", prompts, "--all-outputs", "-n", "1", "--capture", channels)
    return from_trace(moetrace.open(folder / "t.moet"), phase="prefill").columns


def test_a_circuit_is_told_from_its_first_layer_and_the_layer_it_skips_is_not(
    runtime: Any, tmp_path: Path
) -> None:
    found = recorded(tmp_path, distinct_tokens(18, 40), circuit=[(0, 2), (1, 5), (3, 7)])
    gains = task_by_layer(found, 0, n_permutations=99)[1]
    tested = gains[gains["p_value"].notna()].set_index("layer")
    assert (tested.loc[[1, 3], "p_value"] == 0.01).all()
    assert (tested.loc[[1, 3], "low"] > 0).all()
    assert tested.loc[2, "p_value"] > 0.05
    assert tested.loc[2, "low"] <= 0


def test_routing_by_position_is_told_by_position_and_not_by_attention(runtime: Any, tmp_path: Path) -> None:
    found = recorded(tmp_path, distinct_tokens(18, 40, begin=True), by_position=True)
    recall, gains = attention_by_layer(found, n_permutations=99)
    scores = recall[recall["m"] == 2].set_index(["predictor", "layer"])["recall"]
    assert (scores["position"] == 1).all()
    tested = gains[gains["p_value"].notna()]
    assert len(tested) == 4
    assert (tested["p_value"] > 0.0125).all()  # Bonferroni over the four layers
