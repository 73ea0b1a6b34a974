"""How often each test rejects where there is nothing to find, and what it finds where there is something.

    python tests/stats/calibration.py [--runs 1000] [--write docs/statistics.md]

Prints two Markdown tables; with --write puts them between the marks of that page.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from simulate import Routing, World  # noqa: E402

import moetrace.analysis as m  # noqa: E402
from moetrace.analysis.domains.domain import domain_counts  # noqa: E402
from moetrace.analysis.statistics import information as info  # noqa: E402

ALPHA = 0.05
PValues = dict[str, list[float]]

#: name of a test -> what it is, for the page
TESTS = {
    "published chi-square": "Pearson's chi-square on pooled picks, as the notebook",
    "domain_test jsd": "prompts permuted between domains, Jensen-Shannon divergence",
    "domain_test pseudo_f": "the same, PERMANOVA's pseudo-F",
    "domain_test entropy": "the same, spread of the domains' entropies",
    "domain_test p_family": "smallest of the layers' max-T p-values",
    "domain_test q_value": "smallest of the layers' Benjamini-Hochberg q-values",
    "domain_lift p_family": "smallest max-T p-value of a layer's experts and domains",
    "jsd at unequal words": "domain_test where domains differ in nothing but their words",
    "matched_separation": "the same worlds, at matched token ids",
    "shuffle_test overlap": "order of tokens, lags 1, 2 and 4, sets",
    "shuffle_test top1": "order of tokens, lags 1, 2 and 4, first experts",
    "shuffle_test p_family": "smallest max-T p-value over layers and lags",
}
#: these are expected to reject far too often
UNSOUND = ("published chi-square", "jsd at unequal words")


def counted(r: Routing, **more: Any) -> m.RoutingCounts:
    return m.count_routing(
        r.experts, r.request, r.position, n_expert=r.n_expert, prompts=r.prompts, labels=r.labels, **more
    )


def counted_tokens(r: Routing) -> m.TokenCounts:
    return m.count_tokens(
        r.experts, r.token, r.request, r.position, n_expert=r.n_expert, prompts=r.prompts, labels=r.labels
    )


def null_domains(world: World, seed: int, n_permutations: int) -> PValues:
    """Domains that do not differ; prompts that do; tokens that follow each other."""
    c = counted(world.trace(seed), max_lag=0)
    options: dict[str, Any] = {"n_permutations": n_permutations, "seed": seed}
    jsd = m.domain_test(c.included, c.labels, **options).table
    out = {
        "published chi-square": list(jsd["chi2_p"]),
        "domain_test jsd": list(jsd["p_value"]),
        "domain_test p_family": [jsd["p_family"].min()],
        "domain_test q_value": [jsd["q_value"].min()],
    }
    for statistic in ("pseudo_f", "entropy"):
        table = m.domain_test(c.included, c.labels, statistic=statistic, **options).table
        out[f"domain_test {statistic}"] = list(table["p_value"])
    lift = m.domain_lift(c.included, c.labels, n_boot=1, **options)
    out["domain_lift p_family"] = list(lift.groupby("layer")["p_family"].min())
    return out


def null_words(world: World, seed: int, n_permutations: int) -> PValues:
    """Domains that differ in their words and in nothing else."""
    tokens = counted_tokens(world.trace(seed))
    raw = m.domain_test(tokens.prompt_included, tokens.labels, n_permutations=n_permutations, seed=seed)
    matched = m.matched_separation(tokens, n_permutations=n_permutations, seed=seed)
    return {
        "jsd at unequal words": list(raw.table["p_value"]),
        "matched_separation": list(matched.table["p_value"]),
    }


def null_order(world: World, seed: int, n_permutations: int) -> PValues:
    """Prompts that differ, tokens without memory."""
    r = world.trace(seed)
    table = m.shuffle_test(
        r.experts,
        r.request,
        r.position,
        n_expert=r.n_expert,
        max_lag=4,
        n_permutations=n_permutations,
        seed=seed,
    )
    some = table[table["lag"].isin([1, 2, 4])]
    return {
        "shuffle_test overlap": list(some["overlap_p"]),
        "shuffle_test top1": list(some["top1_p"]),
        "shuffle_test p_family": [min(table["overlap_p_family"])],
    }


FULL = (
    (null_domains, World(), 1.0),
    (null_words, World(own_words=0.5, token_sd=0.7), 0.5),
    (null_order, World(memory=0.0, n_prompts=2, length=(80, 160)), 0.5),
)
SMALL_WORLD = World(n_domains=3, n_prompts=8, n_layers=2, n_expert=16)
SMALL = (
    (null_domains, SMALL_WORLD, 1.0),
    (null_words, replace(SMALL_WORLD, own_words=0.8, token_sd=1.0), 1.0),
    (null_order, World(n_domains=2, n_prompts=2, n_layers=2, memory=0.0, length=(80, 160)), 1.0),
)
Plan = tuple[tuple[Callable[[World, int, int], PValues], World, float], ...]


def calibrate(runs: int, plan: Plan = FULL, n_permutations: int = 399) -> pd.DataFrame:
    """Rejections at 5 %: ``test``, ``n`` p-values, ``rejected`` (share), ``low``, ``high`` (95 %, exact)."""
    found: dict[str, list[float]] = defaultdict(list)
    for work, world, part in plan:
        for seed in range(int(runs * part)):
            for name, values in work(world, seed, n_permutations).items():
                found[name] += values
    rows = []
    for name in TESTS:
        p = np.array(found[name])
        hits = int((p <= ALPHA).sum())
        interval = stats.binomtest(hits, p.size).proportion_ci(0.95)
        rows.append((name, p.size, hits / p.size, interval.low, interval.high))
    return pd.DataFrame(rows, columns=["test", "n", "rejected", "low", "high"])


def within(truth: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike) -> list[float]:
    return list(((np.asarray(low) <= truth) & (truth <= np.asarray(high))).ravel().astype(float))


def planted(
    runs: int, strength: float, n_permutations: int = 199, world: World | None = None
) -> pd.DataFrame:
    """Domains that differ by a logit of sd ``strength``: ``figure``, ``n``, ``share``.

    Power of the tests at 5 %, coverage of the 95 % intervals against the truth (1000 prompts of each domain),
    and how often a significant expert's preferred domain has a true lift above 1.
    """
    world = replace(world or World(), domain_sd=strength)
    big = counted(world.trace(10**6, n_prompts=1000), max_lag=2)
    names, table = domain_counts(big.included, big.labels)
    share = info.shares(table.transpose(1, 0, 2))
    true_jsd, true_v = info.jsd_bits(share), info.cramers_v(table.transpose(1, 0, 2))[0]
    true_entropy, true_lift = info.entropy_bits(share), share / share.mean(axis=1, keepdims=True)
    true_excess = m.persistence(big)["overlap_excess"].to_numpy()
    true_depth = true_jsd[-1] - true_jsd[0]
    got: dict[str, list[float]] = defaultdict(list)
    for seed in range(runs):
        r = world.trace(seed)
        c = counted(r, max_lag=2)
        options: dict[str, Any] = {"n_permutations": n_permutations, "seed": seed}
        test = m.domain_test(c.included, c.labels, **options).table
        got["power: domain_test jsd"] += list(test["p_value"] <= ALPHA)
        f = m.domain_test(c.included, c.labels, statistic="pseudo_f", **options).table
        got["power: domain_test pseudo_f"] += list(f["p_value"] <= ALPHA)
        matched = m.matched_separation(counted_tokens(r), **options).table
        got["power: matched_separation"] += list(matched["p_value"] <= ALPHA)
        got["coverage: jsd (jackknife)"] += within(true_jsd, test["jsd_low"], test["jsd_high"])
        got["coverage: Cramér's V (jackknife)"] += within(true_v, test["v_low"], test["v_high"])
        lift = m.domain_lift(c.included, c.labels, n_boot=500, **options)
        got["coverage: lift (cluster bootstrap)"] += within(true_lift.ravel(), lift["low"], lift["high"])
        special = m.specialists(lift).query("kind == 'specialist'")
        d = [names.index(n) for n in special["domain"]]
        got["right sign: specialists"] += list(true_lift[special["layer"], d, special["expert"]] > 1)
        e = m.domain_entropy(c.included, c.labels)
        got["coverage: entropy (jackknife)"] += within(true_entropy.ravel(), e["low"], e["high"])
        q = m.persistence(c)
        got["coverage: persistence excess"] += within(true_excess, q["overlap_low"], q["overlap_high"])
        depth = m.depth_contrast(c.included, c.labels)
        got["coverage: late − early jsd"] += within(true_depth, depth.low, depth.high)
    order = sorted(got, key=lambda name: (name.split(":")[0] != "power", name))
    return pd.DataFrame(
        [(n, len(got[n]), float(np.mean(got[n]))) for n in order], columns=["figure", "n", "share"]
    )


def page(runs: int, null: pd.DataFrame, weak: pd.DataFrame, strong: pd.DataFrame) -> str:
    """The two tables in Markdown."""
    lines = [
        f"Null worlds, {runs} runs (half as many for words and order), 399 permutations:",
        "",
        "| test | what it is | p-values | p ≤ 0.05 | 95 % interval |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in null.itertuples():
        lines.append(
            f"| {row.test} | {TESTS[str(row.test)]} | {row.n} | **{100 * row.rejected:.1f} %** "
            f"| {100 * row.low:.1f} to {100 * row.high:.1f} |"
        )
    both = weak.merge(strong, on="figure", suffixes=("_weak", "_strong"))
    lines += [
        "",
        f"Planted domain effects (sd of the domain's logit; prompts have 0.5), {max(runs // 5, 1)} runs:",
        "",
        "| figure | sd 0.15 | sd 0.4 |",
        "| --- | ---: | ---: |",
    ]
    for row in both.itertuples():
        lines.append(f"| {row.figure} | {100 * row.share_weak:.1f} % | {100 * row.share_strong:.1f} % |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    n = max(args.runs // 5, 1)
    text = page(args.runs, calibrate(args.runs), planted(n, 0.15), planted(n, 0.4))
    print(text)
    if args.write:
        start, end = "<!-- calibration -->", "<!-- /calibration -->"
        before, rest = args.write.read_text().split(start)
        after = rest.split(end)[1]
        args.write.write_text(f"{before}{start}\n{text}\n{end}{after}")


if __name__ == "__main__":
    main()
