"""What a router should choose and how it should weight, computed in numpy."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from scipy.special import expit, softmax

import moetrace
from moetrace.synthetic import ARCHITECTURES, Architecture, Gating
from moetrace.trace.record import State


def selection_scores(arch: Architecture, logits: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """What top-k should select on, computed in numpy: (tokens, n_expert)."""
    scores = logits.astype(np.float64)
    if arch.gating is Gating.SIGMOID and not arch.weights_before_experts:
        scores = expit(scores)
    if bias is not None:
        scores = scores + bias
    return within_groups(arch, scores)


def within_groups(arch: Architecture, scores: np.ndarray) -> np.ndarray:
    """Scores (tokens, n_expert), −∞ outside the groups of experts that are chosen first, where there are any."""
    if not arch.n_expert_groups:
        return scores
    groups = scores.reshape(len(scores), arch.n_expert_groups, -1)
    rank = np.argsort(-np.sort(groups, axis=-1)[..., -2:].sum(axis=-1), axis=-1, kind="stable")
    kept = np.zeros(rank.shape, bool)
    np.put_along_axis(kept, rank[:, : arch.n_group_used], True, axis=-1)
    return np.where(kept[..., None], groups, -np.inf).reshape(scores.shape)


def mixing_weights(arch: Architecture, logits: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """What should mix the chosen experts, computed in numpy: (tokens, n_expert_used)."""
    logits = logits.astype(np.float64)
    if arch.gating is Gating.SOFTMAX_WEIGHT:
        return softmax(np.take_along_axis(logits, chosen, axis=1), axis=1)
    probabilities = expit(logits) if arch.gating is Gating.SIGMOID else softmax(logits, axis=1)
    weights = np.take_along_axis(probabilities, chosen, axis=1)
    if arch.normalise_weights:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return weights * arch.weights_scale


def check_routing(trace: moetrace.Trace, name: str, model: Path) -> None:
    """Ids are the top-k of the scores; scores follow in numpy from the gate input and the model's router."""
    arch = ARCHITECTURES[name]
    assert list(trace.layers) == list(arch.moe_layers)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(model).tensors}
    for i, layer in enumerate(trace.layers):
        present = np.asarray(trace.state)[:, i] == State.PRESENT
        ids = np.asarray(trace.experts)[present, i].astype(int)
        scores, logits = (np.asarray(column)[present, i] for column in (trace.scores, trace.logits))
        best = -np.sort(-scores, axis=1)[:, : arch.n_expert_used]
        np.testing.assert_array_equal(np.take_along_axis(scores, ids, axis=1), best)
        assert all(len(set(row)) == arch.n_expert_used for row in ids.tolist())
        router = stored[f"blk.{layer}.ffn_gate_inp.weight"].astype(np.float64)
        gate_input = np.asarray(trace.gate_input)[present, i].astype(np.float64)
        expected = gate_input @ router.T + stored.get(f"blk.{layer}.ffn_gate_inp.bias", 0)
        np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())
        selected_on = selection_scores(arch, logits, stored.get(f"blk.{layer}.exp_probs_b.bias"))
        if arch.gating.name == "SOFTMAX":  # selection_scores leaves the monotone softmax out
            e = np.exp(selected_on - selected_on.max(axis=1, keepdims=True))
            selected_on = e / e.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(scores, selected_on, rtol=1e-4, atol=1e-6)


def scores_of(arch: Architecture, logits: np.ndarray) -> np.ndarray:
    """What top-k selects on, before any bias of the selection and any group: (tokens, n_expert), float64."""
    logits = logits.astype(np.float64)
    if arch.weights_before_experts or arch.gating is Gating.SOFTMAX_WEIGHT:
        return logits
    return expit(logits) if arch.gating is Gating.SIGMOID else softmax(logits, axis=1)


def choice(arch: Architecture, scores: np.ndarray, *, ablated=(), forced=(), bias=()) -> np.ndarray:
    """The experts that should be chosen, computed in numpy."""
    scores = scores.copy()
    for expert, value in bias:
        scores[:, expert] += value
    scores[:, list(ablated)] = -np.inf
    scores = within_groups(arch, scores)
    for expert in forced:
        scores[:, expert] = 1e9 + np.nan_to_num(scores[:, expert], neginf=-1.0)
    return np.argsort(-scores, axis=1, kind="stable")[:, : arch.n_expert_used]
