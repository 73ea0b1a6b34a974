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
from moetrace.analysis.counts.clusters import text_clusters  # noqa: E402
from moetrace.analysis.domains.domain import domain_counts  # noqa: E402
from moetrace.analysis.domains.lengths import length_classes  # noqa: E402
from moetrace.analysis.statistics import information as info  # noqa: E402

ALPHA = 0.05
PValues = dict[str, list[float]]
Work = Callable[[World, int, int], PValues]
Plan = tuple[tuple[Work, World, float], ...]

#: name of a test -> what it is, for the page
TESTS = {
    "published chi-square": "Pearson's chi-square on pooled picks, as the notebook",
    "domain_test welch": "prompts permuted between domains, Welch's distance of means",
    "domain_test jsd": "the same, Jensen-Shannon divergence",
    "domain_test pseudo_f": "the same, PERMANOVA's pseudo-F",
    "domain_test entropy": "the same, spread of the domains' entropies",
    "domain_test p_family": "smallest of the layers' max-T p-values",
    "domain_test q_value": "smallest of the layers' Benjamini-Hochberg q-values",
    "domain_test dispersion": "whether prompts of some domains scatter more",
    "domain_lift p_family": "smallest max-T p-value of all layers' experts and domains",
    "jsd at unequal words": "domain_test where domains differ in nothing but their words",
    "matched_separation": "the same worlds, at matched token ids",
    "shuffle_test overlap": "order of tokens, lags 1, 2 and 4, sets",
    "shuffle_test top1": "order of tokens, lags 1, 2 and 4, first experts",
    "shuffle_test p_family": "smallest max-T p-value over layers and lags",
    **{
        f"{world}: {test}": text
        for world, text in {
            "copies": "4 texts of each domain, each three times; texts are exchanged",
            "copies taken for prompts": "the same, each copy by itself",
            "conversations": "3 of each domain, four turns each, which begin with what was said before",
            "turns taken for prompts": "the same, each turn by itself",
            "one domain 3 times longer": "prompts of it have 120 to 360 tokens",
            "one domain 8 times shorter": "prompts of it have 5 to 15 tokens, and differ little",
            "lengths of all sizes": "log-normal, sd 1.2",
            "40 prompts and 4 that scatter more": "sd .4 and 1",
            "24 layers": "any specialist of a recording",
        }.items()
        for test in {
            "copies taken for prompts": ("welch", "lift"),
            "turns taken for prompts": ("welch", "lift"),
            "one domain 8 times shorter": ("welch", "lift, as long", "jsd"),
            "one domain 3 times longer": ("welch", "lift"),
            "40 prompts and 4 that scatter more": ("welch", "dispersion", "jsd"),
            "24 layers": ("lift",),
        }.get(world, ("welch", "lift"))
    },
}
#: these are expected to reject far too often
UNSOUND = (
    "published chi-square",
    "jsd at unequal words",
    "copies taken for prompts: welch",
    "copies taken for prompts: lift",
    "turns taken for prompts: welch",
    "turns taken for prompts: lift",
    "one domain 8 times shorter: jsd",
    "40 prompts and 4 that scatter more: jsd",
)
#: this one finds what is there
FINDS = ("40 prompts and 4 that scatter more: dispersion",)


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
    welch = m.domain_test(c.included, c.labels, **options).table
    out = {
        "published chi-square": list(welch["chi2_p"]),
        "domain_test welch": list(welch["p_value"]),
        "domain_test dispersion": list(welch["dispersion_p"]),
        "domain_test p_family": [welch["p_family"].min()],
        "domain_test q_value": [welch["q_value"].min()],
    }
    for statistic in ("jsd", "pseudo_f", "entropy"):
        table = m.domain_test(c.included, c.labels, statistic=statistic, **options).table
        out[f"domain_test {statistic}"] = list(table["p_value"])
    lift = m.domain_lift(c.included, c.labels, n_boot=1, **options)
    out["domain_lift p_family"] = [lift["p_family"].min()]
    return out


def null_hostile(name: str, tests: tuple[str, ...], found: bool = False) -> Work:
    """Domains that do not differ, of prompts unlike those that tests wish for; ``found``: copies are found first."""

    def work(world: World, seed: int, n_permutations: int) -> PValues:
        r = world.trace(seed)
        if found:
            clusters = text_clusters(r.texts, [text.size for text in r.texts], r.labels)
            r = replace(r, prompts=[f"text-{code:04d}" for code in clusters.tolist()])
        c = counted(r, max_lag=0)
        options: dict[str, Any] = {"n_permutations": n_permutations, "seed": seed}
        out = {}
        if "welch" in tests:
            table = m.domain_test(c.included, c.labels, **options).table
            out["welch"] = list(table["p_value"])
            if "dispersion" in tests:
                out["dispersion"] = list(table["dispersion_p"])
        if "jsd" in tests:
            out["jsd"] = list(
                m.domain_test(c.included, c.labels, statistic="jsd", **options).table["p_value"]
            )
        for test in {"lift", "lift, as long"} & set(tests):
            classes = length_classes(c.tokens.max(axis=1), c.labels) if test == "lift, as long" else None
            strata = None if classes is None else classes.codes
            lift = m.domain_lift(c.included, c.labels, n_boot=1, strata=strata, **options)
            out[test] = [lift["p_family"].min()]
        return {f"{name}: {test}": values for test, values in out.items()}

    return work


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


FULL: Plan = (
    (null_domains, World(), 1.0),
    (null_words, World(own_words=0.5, token_sd=0.7), 0.5),
    (null_order, World(memory=0.0, n_prompts=2, length=(80, 160)), 0.5),
)


def hostile(world: World, layers: int = 24) -> tuple[tuple[Work, World, float], ...]:
    """Worlds that tests do not wish for; of ``world``'s layers and experts."""
    copies, turns = replace(world, copies=3), replace(world, turns=4)
    first = (1.0,) * (world.n_domains - 1)
    both = ("welch", "lift")
    return (
        (null_hostile("copies", both, found=True), copies, 1.0),
        (null_hostile("copies taken for prompts", both), copies, 1.0),
        (null_hostile("conversations", both, found=True), turns, 1.0),
        (null_hostile("turns taken for prompts", both), turns, 1.0),
        (null_hostile("one domain 3 times longer", both), replace(world, stretch=(*first, 3.0)), 1.0),
        (
            null_hostile("one domain 8 times shorter", ("welch", "lift, as long", "jsd")),
            replace(world, stretch=(*first, 0.125), prompt_sd=0.1),
            1.0,
        ),
        (null_hostile("lengths of all sizes", both), replace(world, length=(55, 55), tail=1.2), 1.0),
        (
            null_hostile("40 prompts and 4 that scatter more", ("welch", "dispersion", "jsd")),
            replace(world, n_domains=2, sizes=(40, 4), scatter=(0.4, 1.0)),
            1.0,
        ),
        (null_hostile("24 layers", ("lift",)), replace(world, n_layers=layers), 1.0),
    )


SMALL_WORLD = World(n_domains=3, n_prompts=8, n_layers=2, n_expert=16)
SMALL: Plan = (
    (null_domains, SMALL_WORLD, 1.0),
    (null_words, replace(SMALL_WORLD, own_words=0.8, token_sd=1.0), 1.0),
    (null_order, World(n_domains=2, n_prompts=2, n_layers=2, memory=0.0, length=(80, 160)), 1.0),
)
FULL += hostile(World(n_layers=2))
SMALL += hostile(World(n_layers=1, n_expert=16, length=(40, 80)), layers=6)


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
        got["power: domain_test welch"] += list(test["p_value"] <= ALPHA)
        for statistic in ("jsd", "pseudo_f"):
            other = m.domain_test(c.included, c.labels, statistic=statistic, **options).table
            got[f"power: domain_test {statistic}"] += list(other["p_value"] <= ALPHA)
        matched = m.matched_separation(counted_tokens(r), **options).table
        got["power: matched_separation"] += list(matched["p_value"] <= ALPHA)
        got["coverage: matched separation (jackknife)"] += within(
            true_jsd, matched["jsd_matched_low"], matched["jsd_matched_high"]
        )
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
