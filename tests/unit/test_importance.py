"""What experts do for a model: against a slow count, on planted worlds, and as files without the least of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

import moetrace
from moetrace import data
from moetrace.__main__ import main
from moetrace.analysis import RoutedText, expert_importance, from_trace
from moetrace.commands.demo import unpack
from moetrace.errors import UsageError
from moetrace.model.experts import weights_before

E, K, L = 16, 4, 3


def world(
    rng: np.random.Generator, n_prompts: int = 12, length: int = 40
) -> tuple[RoutedText, list[NDArray[np.float32]]]:
    """Routing where expert e is chosen with odds of e + 1, and makes vectors of norm e; and the norms."""
    m = n_prompts * length
    score = np.log(np.arange(E) + 1.0) + rng.gumbel(size=(m, L, E))
    experts = np.argsort(-score, axis=2)[:, :, :K].astype(np.uint8)
    weights = -np.sort(-rng.dirichlet(np.ones(K), size=(m, L)).astype(np.float32), axis=2)
    text = RoutedText(experts, np.arange(0, m + 1, length), E, weights)
    return text, [experts[:, i].astype(np.float32) for i in range(L)]


def test_it_is_what_a_slow_count_gives() -> None:
    text, norms = world(np.random.default_rng(0))
    assert text.weights is not None
    found = expert_importance(text, norms).experts.set_index(["layer", "expert"])
    rows = [
        {"layer": i, "expert": int(e), "w": float(w), "rank": j, "made": float(w) * float(e)}
        for m in range(len(text))
        for i in range(L)
        for j, (e, w) in enumerate(zip(text.experts[m, i], text.weights[m, i], strict=True))
    ]
    slow = pd.DataFrame(rows).groupby(["layer", "expert"])
    np.testing.assert_array_equal(found["uses"], slow.size())
    np.testing.assert_allclose(found["share"], slow.size() / len(text))
    np.testing.assert_allclose(found["mean_weight"], slow["w"].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["mean_rank"], slow["rank"].mean())
    np.testing.assert_allclose(found["saliency"], slow["made"].mean(), rtol=1e-5)
    total = slow["w"].sum()
    np.testing.assert_allclose(
        found["weight_share"], total / total.groupby("layer").transform("sum"), rtol=1e-5
    )
    assert (found["share_low"] <= found["share"]).all()
    assert (found["saliency_low"] <= found["saliency_high"]).all()


def test_weights_that_are_in_the_outputs_are_not_taken_twice() -> None:
    text, norms = world(np.random.default_rng(6))
    assert text.weights is not None
    within = [norm * text.weights[:, i] for i, norm in enumerate(norms)]
    plain, weighed = (
        expert_importance(text, norms).experts,
        expert_importance(text, within, weighed=True).experts,
    )
    np.testing.assert_allclose(weighed["saliency"], plain["saliency"], rtol=1e-5)
    assert weights_before("llama4")
    assert not weights_before("qwen3moe")


def test_intervals_hold_what_they_promise() -> None:
    """Over 200 worlds, 95 % intervals hold the known share of an expert in 92 to 98 %."""
    rng = np.random.default_rng(1)
    big, norms = world(np.random.default_rng(2), n_prompts=3000)
    truth = expert_importance(big, norms, n_splits=1).experts
    covered: dict[str, list[float]] = {"share": [], "saliency": []}
    for _ in range(200):
        found = expert_importance(*world(rng), n_splits=1).experts
        for name, held in covered.items():
            inside = (found[f"{name}_low"] <= truth[name]) & (truth[name] <= found[f"{name}_high"])
            held.append(float(inside.mean()))
    for name, held in covered.items():
        assert 0.92 < np.mean(held) < 0.98, (name, np.mean(held))


def test_halves_of_noise_agree_by_chance_only() -> None:
    rng = np.random.default_rng(3)
    m = 400
    even = np.argsort(rng.random((m, 1, E)), axis=2)[:, :, :K].astype(np.uint8)
    text = RoutedText(even, np.arange(0, m + 1, 10), E)
    noise = [expert_importance(text, seed=i, n_splits=50).stability.iloc[0] for i in range(3)]
    # halves of one draw: where one half is above the mean, the other is not below it for that
    assert np.mean([row["overlap"] for row in noise]) < 0.45
    told = expert_importance(world(rng)[0]).stability
    assert (told["spearman"] > 0.85).all()
    assert (told["overlap"] > 0.6).all()
    assert (told["overlap_chance"] == 0.25).all()


def test_what_is_not_known_is_not_zero() -> None:
    text, norms = world(np.random.default_rng(4))
    without = expert_importance(RoutedText(text.experts, text.starts, E))
    assert "saliency" not in without.experts
    assert "weight_share" not in without.experts
    with pytest.raises(UsageError, match="cannot be ranked by 'saliency'"):
        without.values("saliency")
    norms[1][::2] = np.nan  # half of the tokens: the mean is over the others
    half = expert_importance(text, norms).experts
    mine = half[half["layer"] == 1]
    assert mine["saliency"].notna().all()
    assert (mine["saliency"] > 0).sum() >= E - 1  # expert 0 makes nothing
    alone = expert_importance(RoutedText(text.experts[:40], np.array([0, 40]), E)).experts
    assert alone["share_low"].isna().all()


def test_on_the_shipped_recording(tmp_path: Path) -> None:
    """Uses and mixing weights are those of the trace's own columns."""
    with moetrace.open(unpack(data.recorded_demo(), tmp_path)) as trace:
        routing = from_trace(trace, phase="decode")
        found = expert_importance(routing.text).experts
        chosen = routing.chosen[0]
        ids = trace.experts[chosen.keep]
        weight = trace.weights[chosen.keep]
        for i, layer in enumerate(trace.layers.tolist()):
            mine = found[found["layer"] == layer]
            valid = ids[:, i] != trace.sentinel
            uses = np.bincount(ids[:, i][valid], minlength=len(mine))
            np.testing.assert_array_equal(mine["uses"], uses)
            mass = np.bincount(ids[:, i][valid], weight[:, i][valid], minlength=len(mine))
            np.testing.assert_allclose(mine["weight_share"], mass / mass.sum(), rtol=1e-5)


def test_prune_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = str(unpack(data.recorded_demo(), tmp_path))
    line = ["prune", trace, "-m", str(data.demo_model()), "--write", str(tmp_path / "p.gguf")]
    assert main(line) == 2
    assert "give --keep N or --target SIZE" in capsys.readouterr().err
    assert main([*line, "--keep", "1"]) == 2
    assert "of which a token uses" in capsys.readouterr().err
    assert main([*line, "--keep", "12", "--by", "saliency"]) == 2
    assert "capture experts,weights,outputs" in capsys.readouterr().err
    assert main([*line, "--target", "1KiB"]) == 2
    assert "no file of 1KiB can be had" in capsys.readouterr().err
    assert main([*line, "--target", "1GiB"]) == 2
    assert "nothing is to be left out" in capsys.readouterr().err
    assert not (tmp_path / "p.gguf").exists()
