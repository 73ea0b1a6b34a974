"""How often the tests of patterns, circuits and dynamics reject where there is nothing to find, and what the
published definitions find there.

    python tests/stats/calibration_dynamics.py [--runs 1000] [--write docs/published.md] [--keep FOLDER]

Prints two Markdown tables; with --write puts them between the marks of that page.
"""

from __future__ import annotations

import argparse
import json
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
from moetrace.analysis.circuits import path_test  # noqa: E402
from moetrace.analysis.counts.routed import exchange  # noqa: E402
from moetrace.analysis.dynamics import generation as dynamics  # noqa: E402
from moetrace.analysis.placement.cold_experts import cold_experts, tokens_needed  # noqa: E402
from moetrace.analysis.text.association import associate, indicator  # noqa: E402
from moetrace.analysis.text.lexicon import type_words  # noqa: E402
from moetrace.analysis.text.token_patterns import (  # noqa: E402
    counts_of,
    types_beyond_words,
)

ALPHA = 0.05
PValues = dict[str, list[float]]

#: name of a test -> what it is, for the page
TESTS = {
    "circuits: layers": "mutual information of two layers, tokens turned round within prompts",
    "circuits: layers, family": "the same, smallest max-T p-value over pairs of layers",
    "circuits: edge": "two much used experts of neighbouring layers",
    "circuits: edges, family": "smallest max-T p-value over all pairs of experts of all layers",
    "circuits: path": "a path of much used experts given beforehand, all layers turned round",
    "circuits: paths, family": "smallest max-T p-value over such paths",
    "patterns: trigram": "a frequent trigram of types and a much used expert, prompts exchanged",
    "patterns: types, family": "smallest max-T p-value over experts, types and layers",
    "patterns: trigrams, family": "the same over trigrams",
    "patterns: types beyond words, family": "types handed out anew among words, where routing follows from the word",
    "patterns: vocabulary": "vocabulary specialisation, prompts exchanged",
    "patterns: beginnings, family": "smallest max-T p-value over first tokens, prompts turned round",
    "patterns: ends, family": "the same over last tokens",
    "patterns: repetition, family": "smallest max-T p-value over repetition, prompts exchanged",
    "phases: common": "largest divergence over steps, all prompts together, some read backwards",
    "prefill against decode": "usage of the two exchanged within prompts",
    "prefill against decode, family": "smallest max-T p-value over layers",
    "right against wrong": "features of right and wrong outputs, exchanged between prompts",
    "right against wrong, family": "smallest max-T p-value over features",
}

#: what stands for each token id: words of all types, so that text of ids has types
_FREQUENT = """the of a to in is and it was for that with on at by he she we this are 0 1 2 3 4 5 6 7 8 9 12 15 20
37 100 + - * / = < > ( ) [ ] { } . , ; : ? ! def class return if else import while x y n i"""
WORDS = (
    *_FREQUENT.split(),
    *(f"{a}{b}" for a in ("Ba", "Do", "Fe", "Ki") for b in ("ra", "lo", "mi", "nu", "te")),
    *(f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("ven", "lor")),
)


def text_of(r: Routing) -> m.RoutedText:
    """Requests of a simulated trace as texts."""
    starts = np.concatenate((np.flatnonzero(r.position == 0), [r.position.size]))
    return m.RoutedText(r.experts, starts, r.n_expert, tokens=r.token, prompts=r.prompts, labels=r.labels)


def typed(text: m.RoutedText, types: npt.NDArray[np.int64] | None = None) -> Any:
    """Types of the words that stand for ids; ``types``, if given, says which word stands for which id."""
    which = np.arange(len(WORDS)) if types is None else types
    pieces = [b" " + WORDS[which[t % len(WORDS)]].encode() for t in np.asarray(text.tokens).tolist()]
    return type_words(m.join_words(pieces, text.starts))


def counted(text: m.RoutedText, max_lag: int = 1) -> m.RoutingCounts:
    return m.count_routing(
        text.experts, text.owner, np.asarray(text.positions), n_expert=text.n_expert, max_lag=max_lag,
        prompts=list(text.prompts),
    )  # fmt: skip


def null_circuits(world: World, seed: int, n_permutations: int) -> PValues:
    """Layers that know nothing of each other; prompts that differ, tokens that follow each other."""
    text = text_of(world.trace(seed))
    found = m.expert_circuits(text, n_permutations=n_permutations, max_edges=10**6, seed=seed)
    rng = np.random.default_rng(seed)
    # What a handful of tokens does has a handful of values, and can only reject too rarely.
    most_used = np.argsort(-counts_of(text)[0].sum(axis=0), axis=1)[:, :4]
    paths = [tuple(enumerate(rng.permuted(most_used, axis=1)[:, 0].tolist())) for _ in range(5)]
    tested = path_test(text, paths, n_permutations=n_permutations, seed=seed)
    edges = found.edges.set_index(["layer", "expert", "to_layer", "to_expert"])["p_value"]
    return {
        "circuits: edge": [float(edges[(*paths[0][0], *paths[0][1])])],
        "circuits: layers": list(found.layers["p_value"]),
        "circuits: layers, family": [found.layers["p_family"].min()],
        "circuits: edges, family": [found.edges["p_family"].min()],
        "circuits: path": list(tested["p_value"][:1]),
        "circuits: paths, family": [tested["p_family"].min()],
    }


def null_patterns(world: World, seed: int, n_permutations: int) -> PValues:
    """Routing that knows nothing of the words."""
    text = text_of(world.trace(seed))
    kinds = typed(text)
    options: dict[str, Any] = {"n_permutations": n_permutations, "seed": seed}
    limits = {"min_activity": 5, "min_support": 5, "min_prompts": 3}
    families = {}
    for name, codes in (("types", kinds.kind), ("trigrams", kinds.trigram)):
        names, code = np.unique(codes, return_inverse=True)
        families[name] = associate(text, indicator(code, names.size), exchange, **limits, **options)
    vocabulary = m.vocabulary_specialisation(text, **options)
    trigrams = families["trigrams"]
    of_kind = np.asarray(trigrams.member.sum(axis=1)).ravel()
    of_expert = np.stack([text.member(layer).sum(axis=0) for layer in range(text.experts.shape[1])])
    expected = of_kind[None, :, None] * of_expert[:, None, :]
    frequent = np.unravel_index(expected.argmax(), expected.shape)
    return {
        "patterns: trigram": [float(trigrams.p_value[frequent])],
        "patterns: types, family": [np.nanmin(families["types"].p_family)],
        "patterns: trigrams, family": [np.nanmin(families["trigrams"].p_family)],
        "patterns: vocabulary": list(vocabulary["p_value"]),
    }


def null_places(world: World, seed: int, n_permutations: int) -> PValues:
    """Routing that knows nothing of places and repetition."""
    table, _ = m.sequence_patterns(text_of(world.trace(seed)), n_permutations=n_permutations, seed=seed)
    kind = table["pattern"]
    return {
        "patterns: beginnings, family": [table.loc[kind.isin(["first", "start"]), "p_family"].min()],
        "patterns: ends, family": [table.loc[kind.isin(["last", "end"]), "p_family"].min()],
        "patterns: repetition, family": [table.loc[kind.str.startswith("repeat"), "p_family"].min()],
    }


def null_words(world: World, seed: int, n_permutations: int) -> PValues:
    """Routing that follows from the word, whatever its type."""
    text = text_of(replace(world, seed=seed).trace(seed))
    words = np.random.default_rng(seed).permutation(len(WORDS))
    p = types_beyond_words(text, typed(text, words), n_permutations, seed)
    return {"patterns: types beyond words, family": [p.min()]}


def null_dynamics(world: World, seed: int, n_permutations: int) -> PValues:
    """Generations without phases; right and wrong at random."""
    text = text_of(world.trace(seed))
    options: dict[str, Any] = {"n_permutations": n_permutations, "seed": seed}
    phases = m.generation_phases(text, min_steps=8, **options)
    sizes = np.diff(text.starts)
    cut = sizes // 3
    early = np.asarray(text.positions) < np.repeat(cut, sizes)
    sides = [
        m.RoutedText(
            text.experts[rows], np.concatenate(([0], np.cumsum(n))), text.n_expert, prompts=text.prompts
        )
        for rows, n in ((early, cut), (~early, sizes - cut))
    ]
    compared = m.phase_comparison(*sides, **options)
    right = np.random.default_rng(seed).permutation(text.n_requests) % 2 == 0
    features = m.correctness_features(counted(text), right.tolist(), **options)
    return {
        "phases: common": [phases.common["p_value"].iloc[0]],
        "prefill against decode": list(compared["p_value"]),
        "prefill against decode, family": [compared["p_family"].min()],
        "right against wrong": list(features["p_value"][:3]),
        "right against wrong, family": [features["p_family"].min()],
    }


Plan = tuple[tuple[Callable[[World, int, int], PValues], World], ...]
_SIZES: dict[str, Any] = {"n_domains": 1, "n_layers": 3, "n_expert": 12, "n_expert_used": 2}
PLAN: Plan = (
    (null_circuits, World(**_SIZES, n_prompts=10, length=(30, 60))),
    (null_patterns, World(**_SIZES, n_prompts=24, length=(30, 60), vocabulary=len(WORDS))),
    (null_places, World(**_SIZES, n_prompts=16, length=(30, 60))),
    (null_words, World(**_SIZES, n_prompts=12, length=(30, 60), vocabulary=len(WORDS), token_sd=1.5)),
    (null_dynamics, World(**_SIZES, n_prompts=12, length=(40, 60))),
)
_SMALL: dict[str, Any] = {"n_domains": 1, "n_expert": 6, "n_expert_used": 2}
SMALL: Plan = (
    (null_circuits, World(**_SMALL, n_layers=3, n_prompts=8, length=(24, 40))),
    (null_patterns, World(**_SMALL, n_layers=2, n_prompts=14, length=(16, 32), vocabulary=len(WORDS))),
    (null_places, World(**_SMALL, n_layers=2, n_prompts=10, length=(16, 32))),
    (
        null_words,
        World(**_SMALL, n_layers=2, n_prompts=12, length=(24, 40), vocabulary=len(WORDS), token_sd=1.5),
    ),
    (null_dynamics, World(**_SMALL, n_layers=2, n_prompts=12, length=(30, 45))),
)


def calibrate(
    runs: int, n_permutations: int = 99, plan: Plan = PLAN, keep: Path | None = None
) -> pd.DataFrame:
    """Rejections at 5 %: ``test``, ``n`` p-values, ``rejected`` (share), ``low``, ``high`` (95 %, exact).

    ``keep``: a folder for the p-values of each world, which are taken from there if they are as many.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for work, world in plan:
        file = None if keep is None else keep / f"{work.__name__}-{runs}.json"
        if file is not None and file.exists():
            values = json.loads(file.read_text())
        else:
            values = defaultdict(list)
            for seed in range(runs):
                for name, some in work(world, seed, n_permutations).items():
                    values[name] += [float(p) for p in some]
            if file is not None:
                file.write_text(json.dumps(values))
        for name, some in values.items():
            found[name] += some
    rows = []
    for name in TESTS:
        p = np.array(found[name])
        p = p[~np.isnan(p)]
        hits = int((p <= ALPHA).sum())
        interval = stats.binomtest(hits, p.size).proportion_ci(0.95)
        rows.append((name, p.size, hits / p.size, interval.low, interval.high))
    return pd.DataFrame(rows, columns=["test", "n", "rejected", "low", "high"])


# -- side by side --------------------------------------------------------------------------------------


def random_routing(
    n_prompts: int, n_tokens: int, n_layers: int, n_expert: int, k: int, seed: int, zipf: bool = False
) -> m.RoutedText:
    """Routing that is random in every token and layer, with weights; token ids are random words."""
    rng = np.random.default_rng(seed)
    n = n_prompts * n_tokens
    logits = rng.standard_normal((n, n_layers, n_expert))
    top = np.argsort(-logits, axis=2)[:, :, :k]
    weights = np.exp(np.take_along_axis(logits, top, axis=2))
    p = 1.0 / np.arange(1, len(WORDS) + 1)
    tokens = rng.choice(len(WORDS), n, p=p / p.sum() if zipf else None)
    return m.RoutedText(
        top.astype(np.uint8 if n_expert < 256 else np.uint16),
        np.arange(0, n + 1, n_tokens),
        n_expert,
        weights=(weights / weights.sum(axis=2, keepdims=True)).astype(np.float32),
        tokens=tokens.astype(np.int32),
    )


def side_by_side(seed: int = 0, n_permutations: int = 199) -> pd.DataFrame:
    """What is found on random routing: ``question``, ``routing``, ``as published``, ``sound``."""
    rows: list[tuple[str, str, str, str]] = []
    for n in (5, 1000):
        text = random_routing(1 if n == 5 else 20, 5 if n == 5 else 50, 24, 32, 4, seed)
        assert text.weights is not None
        old = m.as_published_circuits(text.experts, text.weights, 32)
        new = m.expert_circuits(text, n_permutations=n_permutations, min_support=1, seed=seed)
        top = old.pipelines["consistency"].max() if len(old.pipelines) else float("nan")
        rows.append(
            (
                "expert-circuits",
                f"{n:,} tokens, 4 of 32 experts, 24 layers",
                f"{len(old.pipelines)} pipelines"
                + (
                    f", the best of consistency {top:.2f}; global consistency {old.global_consistency:.2f}"
                    if len(old.pipelines)
                    else f"; global consistency {old.global_consistency:.2f}"
                ),
                f"{int((new.edges['p_family'] <= ALPHA).sum())} of {new.edges_tested:,} edges,"
                f" {int((new.layers['p_family'] <= ALPHA).sum())} of {len(new.layers)} pairs of layers,"
                f" {int(new.paths['replicated'].sum())} paths",
            )
        )
    for n_prompts in (2, 10):
        text = random_routing(n_prompts, 20, 16, 64, 8, seed, zipf=True)
        pieces = [WORDS[t] for t in np.asarray(text.tokens).tolist()]
        published = m.as_published_pattern_summary(text, pieces)
        sound = m.pattern_summary(text, typed(text), n_permutations=n_permutations, min_support=5, seed=seed)
        first = published.iloc[0]
        strong = int((published["concentration"] >= 0.3).sum())
        rows.append(
            (
                "token-patterns",
                f"{20 * n_prompts} tokens, 8 of 64 experts, 16 layers",
                f"a specialist of {first['top_pattern']} with concentration {first['concentration']:.2f},"
                f' {strong} of the 50 listed at 0.30 or more, where "random" is said to be 0.03',
                f"{len(sound.specialists)} specialists in {sum(sound.tested):,} tests",
            )
        )
    for n_tokens, n_expert, k in ((110, 128, 4), (tokens_needed(32, 4, 24) + 200, 32, 4)):
        text = random_routing(1, n_tokens, 24, n_expert, k, seed)
        included, tokens = counts_of(text)
        old_rates = m.as_published_cold_experts(included, tokens)
        new_rates = cold_experts(included, tokens, n_expert_used=k)
        rows.append(
            (
                "cold-experts",
                f"{n_tokens:,} tokens, {k} of {n_expert} experts, 24 layers",
                f"{int(old_rates['prune'].sum())} of {len(old_rates):,} experts safe to prune",
                f"{int(new_rates['cold'].sum())} cold, {int((new_rates['verdict'] == 'undecided').sum()):,} undecided",
            )
        )
    text = random_routing(5, 30, 24, 32, 4, seed)
    old_dynamics = m.as_published_dynamics(text, primary="arbitrary", seed=seed)
    phases = dynamics.generation_phases(text, n_permutations=n_permutations, seed=seed)
    changes = dynamics.handoffs(counted(text)).iloc[-1]
    n_found = int((phases.common["p_value"] <= ALPHA).sum())
    rows.append(
        (
            "generation-dynamics",
            "5 × 30 tokens, 4 of 32 experts, 24 layers",
            f"a phase boundary at {old_dynamics.boundary_rate:.0%} of steps;"
            f" {old_dynamics.handoffs_per_token:.1f} handoffs per token;"
            f" consistency {old_dynamics.consistency:.3f}",
            f"{n_found} phases (p = {phases.common['p_value'].iloc[0]:.2f});"
            f" {changes['fewer']:+.2f} handoffs fewer than in random order"
            f" ({changes['low']:+.2f} to {changes['high']:+.2f})",
        )
    )
    return pd.DataFrame(rows, columns=["question", "random routing of", "as published", "sound"])


def markdown(table: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(table.columns) + " |", "| " + " | ".join("---" for _ in table.columns) + " |"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)


def calibration_page(runs: int, table: pd.DataFrame) -> str:
    lines = [
        f"{runs} runs of each null world, 99 rearrangements:",
        "",
        "| test | what it is | p-values | p ≤ 0.05 | 95 % interval |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, n, rejected, low, high in table.itertuples(index=False, name=None):
        lines.append(
            f"| {name} | {TESTS[name]} | {n} | **{100 * rejected:.1f} %** | {100 * low:.1f} to {100 * high:.1f} |"
        )
    return "\n".join(lines)


def put(page: str, mark: str, text: str) -> str:
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, rest = page.split(start)
    return f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for p-values of worlds that are done")
    args = parser.parse_args()
    parts = {
        "side-by-side": markdown(side_by_side()),
        "calibration-dynamics": calibration_page(args.runs, calibrate(args.runs, keep=args.keep)),
    }
    print("\n\n".join(parts.values()))
    if args.write:
        page = args.write.read_text()
        for mark, text in parts.items():
            page = put(page, mark, text)
        args.write.write_text(page)


if __name__ == "__main__":
    main()
