"""Published predictions, held against the published code's steps written down again in plain Python."""

from __future__ import annotations

from itertools import combinations
from math import comb, sqrt

import numpy as np
import pytest

from moetrace.analysis.published import prediction as published
from moetrace.errors import UsageError


def slow_features(row: np.ndarray) -> list[float]:
    """attention_prediction_service.py, extract_attention_features, for one position."""
    mean = [float(np.mean(column)) for column in row.T.astype(float)]
    w = [x + 1e-10 for x in mean]
    top = sorted(w, reverse=True)[: min(3, len(w))]
    return [
        mean[-1],
        -sum(x * float(np.log(x)) for x in w),
        sum(top),
        sum(w[-min(5, len(w)) :]),
        sum(w[: min(3, len(w))]),
    ]


@pytest.mark.parametrize("n", [1, 2, 4, 40])
def test_head_mean_features(n: int) -> None:
    row = np.random.default_rng(n).dirichlet(np.ones(n), 4)
    np.testing.assert_allclose(published.head_mean_features(row), slow_features(row), rtol=1e-12)


def slow_attention(features, routing, prompt, n_expert):
    """learn_mapping and evaluate_predictions, token by token."""
    half = (max(prompt) + 1) // 2
    total, matches, overlaps, correlations = 0, 0, [], []
    for layer in routing:
        xs, ys = [], []
        for i, p in enumerate(prompt):
            if p < half:
                y = np.zeros(n_expert)
                for e, w in zip(layer.experts[i], layer.weights[i], strict=True):
                    y[e] = w
                xs.append(features[i])
                ys.append(y)
        x, y = np.stack(xs), np.stack(ys)
        w = np.linalg.solve(x.T @ x + 0.01 * np.eye(5), x.T @ y).T
        for i, p in enumerate(prompt):
            if p < half:
                continue
            scores = w @ features[i]
            probs = np.exp(scores - scores.max())
            probs /= probs.sum()
            best = np.argsort(probs)[-layer.experts.shape[1] :][::-1]
            total += 1
            matches += int(best[0] == layer.experts[i][0])
            a, b = set(layer.experts[i].tolist()), set(best.tolist())
            overlaps.append(len(a & b) / len(a | b))
            common = a & b
            if len(common) > 1:
                actual = [layer.weights[i][layer.experts[i].tolist().index(e)] for e in common]
                predicted = [probs[e] / probs[best].sum() for e in common]
                r = np.corrcoef(actual, predicted)[0, 1]
                if not np.isnan(r):
                    correlations.append(r)
    return total, matches / total, np.mean(overlaps), np.mean(correlations)


def test_attention_prediction_is_the_published_one() -> None:
    rng = np.random.default_rng(1)
    prompt = np.repeat(np.arange(7), 12)
    features = rng.random((84, 5))
    routing = []
    for layer in (0, 5, 9):
        experts = np.argsort(rng.random((84, 12)) + np.linspace(0, 0.6, 12), axis=1)[:, :4]
        routing.append(published.LayerRouting(layer, experts, rng.dirichlet(np.ones(4), 84)))
    table, correlations = published.as_published_attention_prediction(features, routing, prompt, 12)
    n, top1, overlap, r = slow_attention(features, routing, prompt.tolist(), 12)
    whole = table.iloc[-1]
    assert whole["predictions"] == n
    np.testing.assert_allclose(
        whole[["top1_accuracy", "topk_overlap", "weight_correlation"]].to_numpy(float), [top1, overlap, r]
    )
    assert whole["predictability_score"] == pytest.approx(0.5 * top1 + 0.3 * overlap + 0.2 * max(0, r))
    # the misaligned pairing: the first n tokens' self-attention against the n weights of those who chose it
    one = correlations.iloc[3]
    layer = routing[0]
    taken = [w for ids, ws in zip(layer.experts, layer.weights, strict=True) for e, w in zip(ids, ws, strict=True)
             if e == one["expert"]]  # fmt: skip
    assert one["layer"] == 0
    assert one["self_attention_r"] == pytest.approx(np.corrcoef(features[: len(taken), 0], taken)[0, 1])
    few = published.LayerRouting(0, layer.experts[[0, 12]], layer.weights[[0, 12]])
    with pytest.raises(UsageError, match="made-up scores"):
        published.as_published_attention_prediction(features[[0, 12]], [few], [0, 1], 12)


def slow_context(contexts) -> float:
    """context_attention_routing_service.py: both similarities and Pearson's correlation, pair by pair."""
    xs, ys = [], []
    for a, b in combinations(contexts, 2):
        x = 0.0
        if len(a.attention) == len(b.attention):
            x = sum(p * q for p, q in zip(a.attention, b.attention, strict=True))
            x /= sqrt(sum(p * p for p in a.attention)) * sqrt(sum(q * q for q in b.attention))
        one, two = set(a.experts), set(b.experts)
        y = len(one & two) / len(one | two)
        xs.append(x)
        ys.append((y + 1) / 2 if a.experts[0] == b.experts[0] else y)
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    top = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True))
    return top / sqrt(sum((x - mx) ** 2 for x in xs) * sum((y - my) ** 2 for y in ys))


def test_context_correlation_is_the_published_one() -> None:
    rng = np.random.default_rng(2)
    contexts = [
        published.Context(rng.dirichlet(np.ones(n)), tuple(rng.permutation(8)[:3].tolist()))
        for n in (2, 3, 3, 4, 4, 4, 2, 3)
    ]
    found = published.as_published_context_attention_routing(contexts)
    assert found["correlation"] == pytest.approx(slow_context(contexts))
    assert found["pairs"] == 28
    assert found["zeroed"] == 28 - 1 - 3 - 3
    alike = [published.Context(np.ones(n), (0, 1)) for n in (2, 3)]
    assert published.as_published_context_attention_routing(alike)["correlation"] == 0


def test_probe_features_are_twenty_numbers_and_zeros() -> None:
    hidden = np.random.default_rng(3).normal(size=(6, 50))
    got = published.probe_features(hidden)
    mean = hidden.mean(axis=0)
    assert got.shape == (64,)
    assert (got[20:] == 0).all()
    np.testing.assert_allclose(
        got[:5], [mean.mean(), mean.std(), sqrt((mean**2).sum()), mean.max(), mean.min()]
    )
    largest = sorted(range(50), key=lambda i: abs(mean[i]))[-10:]
    np.testing.assert_allclose(got[5:15], np.array(largest) / 50)
    np.testing.assert_allclose(got[15:20], np.percentile(mean, [10, 25, 50, 75, 90]))


def slow_task(features, experts, n_expert):
    """train_probe and evaluate_predictions of one target layer, prompt by prompt."""
    half = len(experts) // 2
    y = []
    for ids in experts[:half]:
        counts = np.zeros(n_expert)
        for e in ids.ravel():
            counts[e] += 1
        y.append(counts / counts.sum())
    x = features[:half]
    w = np.linalg.solve(x.T @ x + 0.01 * np.eye(64), x.T @ np.stack(y))
    correct, precision, recall = [], [], []
    for f, ids in zip(features[half:], experts[half:], strict=True):
        best = set(np.argsort(f @ w)[-ids.shape[1] :][::-1].tolist())
        union = set(ids.ravel().tolist())
        correct.append(len(best & union) > 0)
        precision.append(len(best & union) / len(best))
        recall.append(len(best & union) / len(union))
    return np.mean(correct), np.mean(precision), np.mean(recall)


def random_prompts(seed: int, n_prompts: int, length: int) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    features = np.stack([published.probe_features(rng.normal(size=(length, 40))) for _ in range(n_prompts)])
    return features, [np.argsort(rng.random((length, 32)), axis=1)[:, :4] for _ in range(n_prompts)]


def test_task_prediction_is_the_published_one() -> None:
    features, experts = random_prompts(4, 24, 5)
    row = published.as_published_task_prediction(features, {7: experts}, 32).iloc[0]
    accuracy, precision, recall = slow_task(features, experts, 32)
    assert row["probe"] == "ridge"
    np.testing.assert_allclose(
        row[["accuracy", "precision", "recall", "prefetch_efficiency"]].to_numpy(float),
        [accuracy, precision, recall, precision],
    )


def test_what_random_picks_score_is_exact() -> None:
    """A union of 9 of 32 experts: 75 % of random picks of four are right; of 11: 83 %."""
    for union, expected in ((9, 0.754), (11, 0.834)):
        assert 1 - comb(32 - union, 4) / comb(32, 4) == pytest.approx(expected, abs=5e-4)
        ids = [np.arange(union).repeat(4)[: 4 * union].reshape(-1, 4)] * 4
        row = published.as_published_task_prediction(np.zeros((4, 64)), {0: ids}, 32).iloc[0]
        assert row["probe"] == "random"  # two prompts to fit on
        assert row["accuracy_random"] == pytest.approx(1 - comb(32 - union, 4) / comb(32, 4))
        assert row["precision_random"] == union / 32


def test_on_random_routing_the_published_accuracy_follows_the_prompts_length() -> None:
    """Nothing tells anything here; the sound recall@4 of the same routing is 12.5 % (docs/published.md)."""
    seen = []
    for length in (2, 3, 20):
        found = [
            published.as_published_task_prediction(*_named(random_prompts(seed, 40, length)), 32)[
                "accuracy"
            ].iloc[0]
            for seed in range(10)
        ]
        seen.append(float(np.mean(found)))
    assert 0.6 < seen[0] < 0.8 < seen[1] < 0.9 < seen[2]
    assert seen[2] == pytest.approx(1)


def _named(made: tuple[np.ndarray, list[np.ndarray]]) -> tuple[np.ndarray, dict[int, list[np.ndarray]]]:
    return made[0], {1: made[1]}
