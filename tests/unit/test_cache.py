"""The cache simulator, held against a plain simulation and against what must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.analysis import RoutedText
from moetrace.analysis.placement import cache
from moetrace.errors import UsageError


def simulate(stream: list[int], slots: int, policy: str) -> list[bool]:
    """One cache, access by access, with a dictionary: which accesses hit."""
    held: dict[int, int] = {}  # item -> time of its last use
    uses: dict[int, int] = {}
    out = []
    for t, item in enumerate(stream):
        uses[item] = uses.get(item, 0) + 1
        out.append(item in held)
        if item not in held and len(held) == slots:
            if policy == "lru":
                gone = min(held, key=lambda e: held[e])
            elif policy == "lfu":
                gone = min(held, key=lambda e: (uses[e], held[e]))
            else:
                rest = stream[t + 1 :]
                gone = max(held, key=lambda e: (rest.index(e) if e in rest else len(stream), -e))
            del held[gone]
        held[item] = t
    return out


streams = st.lists(st.integers(0, 7), min_size=1, max_size=60)


@pytest.mark.parametrize("policy", ["lru", "lfu", "oracle"])
@given(first=streams, second=streams)
@settings(deadline=None, max_examples=60)
def test_hits_are_those_of_a_plain_simulation(policy: Any, first: list[int], second: list[int]) -> None:
    """Two streams side by side, of different lengths and with gaps, and every number of slots."""
    side = np.full((2, len(first) + len(second)), -1)
    side[0, : len(first)] = first
    side[1, len(first) :] = second
    hits = cache.cache_hits(side, 8, policy, range(1, 9))
    assert not hits[:, side < 0].any()
    for slots, of_size in enumerate(hits, start=1):
        for mine, row, stream in zip(of_size, side, (first, second), strict=True):
            assert mine[row >= 0].tolist() == simulate(stream, slots, policy)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize(("n", "n_items"), [(3000, 3), (3000, 40), (4000, 700)])
def test_long_streams(n: int, n_items: int, policy: Any) -> None:
    stream = (np.random.default_rng(1).zipf(1.3, n) % n_items).tolist()
    sizes = (1, n_items // 2, n_items - 1)
    for slots, mine in zip(sizes, cache.cache_hits([stream], n_items, policy, sizes), strict=True):
        assert mine[0].tolist() == simulate(stream, slots, policy)


def test_no_policy_beats_the_oracle_and_more_slots_never_hurt() -> None:
    side = np.random.default_rng(2).integers(0, 20, (3, 2000)) ** 2 // 20
    hits = {
        policy: cache.cache_hits(side, 20, policy, range(1, 21)).sum(axis=(1, 2))
        for policy in ("lru", "lfu", "oracle")
    }
    for policy in ("lru", "lfu"):
        assert (hits["oracle"] >= hits[policy]).all()
        assert (np.diff(hits[policy]) >= 0).all()
    different = sum(len(np.unique(row)) for row in side)
    assert {int(h[-1]) for h in hits.values()} == {side.size - different}


def test_a_stream_of_unknown_items_is_refused() -> None:
    with pytest.raises(UsageError, match="0 to 3"):
        cache.cache_hits([[0, 4]], 4, "lru", [1])


def skewed(seed: int, n_prompts: int = 12, length: int = 30, n_expert: int = 16, k: int = 2) -> RoutedText:
    """Some experts are hotter than others, the same ones in all prompts."""
    rng = np.random.default_rng(seed)
    logits = np.linspace(0, 3, n_expert) + rng.gumbel(size=(n_prompts * length, 3, n_expert))
    experts = np.argsort(-logits, axis=2)[:, :, :k].astype(np.uint8)
    return RoutedText(experts, np.arange(n_prompts + 1) * length, n_expert)


def test_a_cache_of_all_experts_misses_nothing_and_one_of_none_is_refused() -> None:
    out = cache.expert_cache(skewed(0)).curve
    full = out[out["slots"] == np.where(out["cache"] == "layer", 16, 48)]
    assert len(full) == 2 * len(cache.POLICIES)
    np.testing.assert_allclose(full["hit_rate"], 1, atol=0.02)  # an expert may be new after the warm-up
    with pytest.raises(UsageError, match="16 experts"):
        cache.expert_cache(skewed(0), [17])
    with pytest.raises(UsageError, match="no cache policy"):
        cache.expert_cache(skewed(0), policies=["fifo"])
    with pytest.raises(UsageError, match="prompts"):
        cache.expert_cache(skewed(0, n_prompts=1))


def test_the_hot_set_is_found_and_is_worth_less_on_other_prompts_than_on_its_own() -> None:
    out = cache.expert_cache(skewed(3), [4, 8])
    curve = out.curve.set_index(["cache", "policy", "slots"])
    for slots in (4, 8):
        rate = curve.loc["layer"]["hit_rate"].xs(slots, level="slots")
        assert slots / 16 + 0.2 < rate["pinned"] <= rate["pinned (same prompts)"]
        assert rate["oracle"] >= rate.max()
    assert (out.hot["for_80"] < out.hot["even_80"]).all()


def test_even_routing_has_no_hot_set() -> None:
    rng = np.random.default_rng(4)
    experts = np.argsort(rng.random((4000, 2, 16)), axis=2)[:, :, :2].astype(np.uint8)
    text = RoutedText(experts, np.arange(0, 4001, 100), 16)
    curve = cache.expert_cache(text, [4, 8], policies=["pinned", "lru"], shared=False).curve
    pinned = curve[curve["policy"] == "pinned"]
    assert (
        (pinned["low"] - 0.01 <= pinned["slots"] / 16) & (pinned["slots"] / 16 <= pinned["high"] + 0.01)
    ).all()


def test_bytes_follow_from_misses_and_sizes() -> None:
    text = skewed(5)
    sizes = np.array([100.0, 200.0, 300.0])
    out = cache.expert_cache(text, [4], policies=["lru"], expert_bytes=sizes)
    curve = out.curve.set_index("cache")
    held = 6 * 30
    misses = (1 - out.layers.set_index("layer")["hit_rate"].to_numpy()) * held * 2
    np.testing.assert_allclose(curve.loc["layer", "fetched_bytes"], (misses * sizes).sum() / held)
    np.testing.assert_allclose(curve.loc["layer", "fetched"], misses.sum() / held)
    assert curve.loc["layer", "memory_bytes"] == 4 * 600
    assert curve.loc["shared", "memory_bytes"] == 12 * 200


def test_an_absent_layer_is_no_access() -> None:
    text = skewed(6)
    experts = text.experts.copy()
    experts[:, 1] = 255
    out = cache.expert_cache(RoutedText(experts, text.starts, 16), [4])
    assert out.layers.loc[out.layers["layer"] == 1, "hit_rate"].isna().all()
    alone = cache.expert_cache(RoutedText(text.experts[:, [0, 2]], text.starts, 16), [4], shared=False)
    a = out.curve[out.curve["cache"] == "layer"]["hit_rate"].to_numpy()
    np.testing.assert_allclose(a, alone.curve["hit_rate"].to_numpy())
