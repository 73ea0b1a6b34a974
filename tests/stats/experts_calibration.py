"""How often the tests of experts, pairs and searches reject where there is nothing to find.

    python tests/stats/experts_calibration.py [--runs 1000] [--write docs/statistics.md]

Prints a Markdown table; with --write puts it between the marks of that page. Null worlds: experts drawn independently
of each other, so that none resembles another; inputs are correlated and far from zero mean, and prompts differ;
searches that are the same search.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import moetrace.analysis as m  # noqa: E402
from moetrace.analysis.experts.manipulation import sign_flips  # noqa: E402
from moetrace.analysis.experts.outputs import chosen_outputs  # noqa: E402
from moetrace.analysis.statistics import nulls  # noqa: E402
from moetrace.model.experts import Expert  # noqa: E402

#: name of a test -> what it is
TESTS = {
    "weight_similarity p_family": "smallest max-T p-value of a layer's pairs, neurons matched",
    "combination p_value": "a layer's experts add up or cancel",
    "pair_compatibility p_family": "smallest max-T p-value of a layer's pairs, outputs where both are used",
    "routing_manipulation p_value": "inputs that two searches of one kind need, targets paired",
    "routing_manipulation p_family": "smallest max-T p-value of two such searches",
    "sign_flips": "differences with heavy tails",
}


def drawn_expert(rng: np.random.Generator, n_ff: int, width: int) -> Expert:
    def some(*shape: int) -> npt.NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    return Expert(some(n_ff, width), some(width, n_ff), some(n_ff, width))


def weights(seed: int) -> float:
    rng = np.random.default_rng(seed)
    experts = [drawn_expert(rng, 8, 12) for _ in range(6)]
    return float(m.weight_similarity(experts, n_null=39, seed=seed + 1)["p_family"].min())


def contributions(seed: int) -> tuple[float, float]:
    """Tokens of prompts that have a direction of their own, routed by a random router."""
    rng = np.random.default_rng(seed)
    width, n_expert, k, n_prompts, n = 24, 8, 3, 10, 240
    prompts = np.repeat(np.arange(n_prompts), n // n_prompts)
    centre = 1.0 + rng.standard_normal((n_prompts, width))
    x = (centre[prompts] + rng.standard_normal((n, width)) @ rng.standard_normal((width, width)) / 5).astype(
        np.float32
    )
    logits = x @ rng.standard_normal((width, n_expert)).astype(np.float32)
    ids = np.argsort(-logits, axis=1)[:, :k]
    mix = np.exp(np.take_along_axis(logits - logits.max(axis=1, keepdims=True), ids, axis=1) / 4)
    parts = chosen_outputs(
        [drawn_expert(rng, 10, width) for _ in range(n_expert)], x, ids, mix.astype(np.float32)
    )
    whole = m.combination(parts, ids, prompts, n_null=99, seed=seed + 1)["p_value"]
    pairs = m.pair_compatibility(parts, ids, prompts, n_null=99, seed=seed + 1)["p_family"]
    return float(whole), float(pairs.min())


def searches(seed: int) -> tuple[float, float]:
    """Random search against random search: each target is hit with a probability of its own."""
    rng = np.random.default_rng(seed)
    chance = rng.uniform(0.002, 0.2, 16)
    needed = rng.geometric(chance, (3, 16)).astype(np.float64)
    runs = pd.DataFrame(
        {
            "target": np.tile(np.arange(16), 3),
            "method": np.repeat(["random", "greedy", "beam"], 16),
            "reached_at": np.where(needed <= 256, needed, np.nan).ravel(),
        }
    )
    table = m.routing_manipulation(runs, budget=256, n_permutations=399, seed=seed).set_index("method")
    return float(table.loc["beam", "p_value"]), float(table["p_family"].min())


def calibrate(runs: int) -> pd.DataFrame:
    """One row per test: ``test``, ``what``, ``n``, ``rejected`` (share of p ≤ .05), ``low``, ``high``."""
    found: dict[str, list[float]] = defaultdict(list)
    for run in range(runs):
        seed = 1000 * run
        found["weight_similarity p_family"].append(weights(seed))
        whole, pairs = contributions(seed)
        found["combination p_value"].append(whole)
        found["pair_compatibility p_family"].append(pairs)
        one, family = searches(seed)
        found["routing_manipulation p_value"].append(one)
        found["routing_manipulation p_family"].append(family)
        d = np.random.default_rng(seed).standard_t(3, 15)
        found["sign_flips"].append(
            float(nulls.permutation_p(sign_flips(d[:, None], n_permutations=399, seed=seed))[0])
        )
    rows = []
    for name, what in TESTS.items():
        hits = int((np.array(found[name]) <= 0.05).sum())
        interval = stats.binomtest(hits, runs).proportion_ci()
        rows.append((name, what, runs, hits / runs, interval.low, interval.high))
    return pd.DataFrame(rows, columns=["test", "what", "n", "rejected", "low", "high"])


def markdown(table: pd.DataFrame) -> str:
    lines = ["| test | what it is | runs | p ≤ 0.05 | 95 % interval |", "| --- | --- | ---: | ---: | ---: |"]
    lines += [
        f"| {r.test} | {r.what} | {r.n} | **{r.rejected:.1%}** | {r.low:.1%} to {r.high:.1%} |".replace(
            "%", " %"
        )
        for r in table.itertuples()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--write", type=Path, metavar="PAGE")
    args = parser.parse_args()
    text = markdown(calibrate(args.runs))
    print(text)
    if args.write:
        start, end = "<!-- experts-calibration -->", "<!-- /experts-calibration -->"
        before, _, rest = args.write.read_text(encoding="utf-8").partition(start)
        _, found, after = rest.partition(end)
        if not found:
            sys.exit(f"{args.write} has no marks {start} … {end}")
        args.write.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")
