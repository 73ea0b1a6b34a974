"""How often the tests of attention, contexts and early layers reject where there is nothing to find.

    python tests/stats/calibration_prediction.py [--runs 400] [--write docs/statistics.md]

Prints a Markdown table; with --write puts it between the marks of that page.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from attending import Attending  # noqa: E402

from moetrace.analysis.counts.routed import membership  # noqa: E402
from moetrace.analysis.prediction.context_attention_routing import context_attention_routing  # noqa: E402
from moetrace.analysis.prediction.predict import gain_test, position_basis  # noqa: E402

ALPHA = 0.05
#: name of a test -> what it is, for the page
TESTS = {
    "attention, nothing planted": "gain of attention over position",
    "attention, position planted": "the same where attention and routing both follow the position",
    "early layer, nothing planted": "gain of an early layer's experts over popularity",
    "contexts, nothing planted": "Mantel's test within strata of position",
    "contexts, position planted": "the same where attention and routing both follow the position",
    "contexts, position ignored": "Mantel's test without strata, where both follow the position",
}
#: these are expected to reject too often
UNSOUND = ("contexts, position ignored",)
EARLY = (("nothing", "early layer, nothing planted"), ("early", "early planted: early layer"))
PLANTED = {
    "attention planted: attention": "attention over position",
    "attention planted: contexts": "contexts alike in attention and routing",
    "early planted: early layer": "early experts over popularity",
}


class Plan(NamedTuple):
    """A world, and of how many prompts it is where contexts are compared, and where something is planted in them."""

    world: Attending
    contexts: int
    planted_contexts: int


FULL = Plan(Attending(), 40, 80)
SMALL = Plan(Attending(n_prompts=12, length=(12, 24), n_expert=8), 24, 60)


def run(seed: int, n_permutations: int, plan: Plan = FULL) -> dict[str, list[float]]:
    """One draw of every world: test -> p-values, one of each layer. Of planted worlds only every tenth is drawn."""
    out: dict[str, list[float]] = {}
    options = {"n_permutations": n_permutations, "seed": seed}
    planted = seed % 10 == 0
    for plant in ("nothing", "position", "attention")[: 3 if planted else 2]:
        drawn = replace(plan.world, plant=plant).draw(seed)
        features = drawn.features.reshape(len(drawn.prompt), -1)
        problems = [drawn.problem(seed, layer) for layer in range(2)]
        attends = [gain_test(p, features, position_basis(p.position), **options).p_value for p in problems]
        n = plan.planted_contexts if plant == "attention" else plan.contexts
        many = replace(plan.world, plant=plant, n_prompts=n).draw(seed)
        attention, routing, position = many.contexts(np.random.default_rng(seed))
        alike = [context_attention_routing(attention, r, position, **options).p_value for r in routing]
        if plant == "attention":
            out["attention planted: attention"], out["attention planted: contexts"] = attends, alike
        else:
            out[f"attention, {plant} planted"], out[f"contexts, {plant} planted"] = attends, alike
        if plant == "position":
            out["contexts, position ignored"] = [_without_strata(attention, r, **options) for r in routing]
    for plant, name in EARLY[: 2 if planted else 1]:
        drawn = replace(plan.world, plant=plant).draw(seed)
        early = [
            gain_test(
                drawn.problem(seed, layer), membership(drawn.experts[:, 1 - layer], drawn.n_expert), **options
            )
            for layer in range(2)
        ]
        out[name] = [test.p_value for test in early]
    return out


def _without_strata(x: np.ndarray, y: np.ndarray, n_permutations: int, seed: int) -> float:
    """Mantel's test as it stands in the textbooks."""
    rng, pairs = np.random.default_rng(seed), np.triu_indices(len(x), 1)
    a = x[pairs] - x[pairs].mean()
    reached = [a @ y[pairs]]
    for _ in range(n_permutations):
        order = rng.permutation(len(x))
        reached.append(a @ y[np.ix_(order, order)][pairs])
    return float(np.mean(np.array(reached) >= reached[0] - 1e-9))


def calibrate(runs: int | range, n_permutations: int = 59, plan: Plan = FULL) -> pd.DataFrame:
    """Rejections at 5 %: ``test``, ``n`` p-values, ``rejected`` (share), ``low``, ``high`` (95 %, exact)."""
    found: dict[str, list[float]] = defaultdict(list)
    for seed in range(runs) if isinstance(runs, int) else runs:
        for name, values in run(seed, n_permutations, plan).items():
            found[name] += values
    rows = []
    for name in (*TESTS, *PLANTED):
        p = np.array(found[name])
        hits = int((p <= ALPHA).sum())
        interval = stats.binomtest(hits, p.size).proportion_ci(0.95)
        rows.append((name, p.size, hits / p.size, interval.low, interval.high))
    return pd.DataFrame(rows, columns=["test", "n", "rejected", "low", "high"])


def page(runs: int, table: pd.DataFrame) -> str:
    """The table in Markdown."""
    lines = [
        f"{runs} runs, 59 permutations; both layers of each draw:",
        "",
        "| world | what is tested | p-values | p ≤ 0.05 | 95 % interval |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    what = {**TESTS, **PLANTED}
    for row in table.itertuples():
        lines.append(
            f"| {row.test} | {what[str(row.test)]} | {row.n} | **{100 * row.rejected:.1f} %** "
            f"| {100 * row.low:.1f} to {100 * row.high:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    text = page(args.runs, calibrate(args.runs))
    print(text)
    if args.write:
        start, end = "<!-- calibration-prediction -->", "<!-- /calibration-prediction -->"
        before, rest = args.write.read_text().split(start)
        args.write.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    main()
