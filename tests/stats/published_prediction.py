"""Predictions as published beside the sound ones, on routing in which there is nothing to find.

    python tests/stats/published_prediction.py [--runs 200] [--write docs/published.md]

Prints Markdown; with --write puts each section between its marks of that page.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from attending import Attending, Drawn  # noqa: E402

from moetrace.analysis.counts.routed import membership  # noqa: E402
from moetrace.analysis.prediction.context_attention_routing import context_attention_routing  # noqa: E402
from moetrace.analysis.prediction.predict import (  # noqa: E402
    Problem,
    gain,
    gain_test,
    popularity,
    position_basis,
    ridge,
    score_table,
)
from moetrace.analysis.published import prediction as published  # noqa: E402

E, K = 32, 4


def task_runs(runs: int, lengths: tuple[int, ...] = (2, 3, 5, 20, 60), n_prompts: int = 40) -> pd.DataFrame:
    """Uniform random routing, hidden states that have nothing to do with it; prompts of one length each.

    One row per length: means over runs of ``accuracy``, ``accuracy_random``, ``precision``, ``union`` as published, and
    of the sound ``recall`` (``low``, ``high``: the last run's interval); ``found``: share of runs with p ≤ 0.05.
    """
    out = []
    for length in lengths:
        rows = []
        for seed in range(runs):
            rng = np.random.default_rng((length, seed))
            early, late = (np.argsort(rng.random((n_prompts * length, E)), axis=1)[:, :K] for _ in range(2))
            hidden = rng.normal(size=(n_prompts, length, 64))
            features = np.stack([published.probe_features(h) for h in hidden])
            old = published.as_published_task_prediction(
                features, {1: np.split(late, n_prompts)}, E, seed=seed
            )
            p = Problem.of(late, E, prompt=np.repeat(np.arange(n_prompts), length), seed=seed)
            x = membership(early, E)
            new = score_table(p, {"experts": ridge(p, x)}, [K], n_boot=199, seed=seed).iloc[0]
            test = gain_test(p, x, n_permutations=39, seed=seed)
            rows.append({**old.iloc[0].drop("probe"), **new.drop("predictor"), "found": test.p_value <= 0.05})
        table = pd.DataFrame(rows)
        columns = ["accuracy", "accuracy_random", "precision_random", "union", "recall", "chance", "found"]
        means = {"length": length, **table[columns].astype(float).mean()}
        means["precision"] = float(np.mean([r["prefetch_efficiency"] for r in rows]))
        out.append({**means, "low": table["low"].iloc[-1], "high": table["high"].iloc[-1]})
    return pd.DataFrame(out)


def world(seed: int, n_prompts: int, length: tuple[int, int]) -> Drawn:
    """Attention and routing that have nothing to do with each other; some experts are more popular than others."""
    return Attending("nothing", n_prompts=n_prompts, length=length, n_expert=E, k=K, prompt_sd=0.6).draw(seed)


def attention_runs(runs: int) -> pd.DataFrame:
    """One row per run: published ``top1``, ``jaccard`` and the largest ``self_attention_r``; sound ``gain``, ``p``."""
    out = []
    for seed in range(runs):
        d = world(seed, 20, (8, 24))
        # popularity that all prompts share, as trained models have it
        popular = np.argsort(
            -(np.linspace(0, 2.5, E) + np.random.default_rng(seed).gumbel(size=(len(d.prompt), E))), axis=1
        )[:, :K]
        weights = np.random.default_rng((seed, 1)).dirichlet(np.ones(K), len(d.prompt))
        features = np.stack([published.head_mean_features(d.attention.row(i)) for i in range(len(d.prompt))])
        routing = [published.LayerRouting(0, popular, np.sort(weights, axis=1)[:, ::-1])]
        old, correlations = published.as_published_attention_prediction(features, routing, d.prompt, E)
        p = Problem.of(popular, E, prompt=d.prompt, position=d.position, seed=seed)
        z, x = position_basis(p.position), d.features.reshape(len(d.prompt), -1)
        place = ridge(p, np.empty((len(x), 0)), nuisance=z)
        out.append(
            {
                "top1": old["top1_accuracy"].iloc[0],
                "jaccard": old["topk_overlap"].iloc[0],
                "self_attention_r": correlations["self_attention_r"].abs().max(),
                "popularity": score_table(p, {"x": popularity(p)}, [K], n_boot=2)["recall"].iloc[0],
                "gain": gain(p, ridge(p, x, nuisance=z), place, n_boot=2).estimate,
                "p": gain_test(p, x, z, n_permutations=39, seed=seed).p_value,
            }
        )
    return pd.DataFrame(out)


def context_runs(runs: int, n_contexts: int = 16) -> pd.DataFrame:
    """One row per run: published ``correlation`` of 16 short contexts, sound ``p`` of 16 of one length."""
    out = []
    for seed in range(runs):
        d = world(seed, n_contexts, (2, 5))  # as short as the published contexts
        ends = np.flatnonzero(np.diff(d.prompt, append=-1))
        contexts = [
            published.Context(d.attention.row(int(i)).mean(axis=0), tuple(d.experts[i, 1].tolist()))
            for i in ends
        ]
        old = published.as_published_context_attention_routing(contexts)
        attention, routing, position = world(seed, n_contexts, (16, 30)).contexts(np.random.default_rng(seed))
        test = context_attention_routing(attention, routing[1], position, n_permutations=99, seed=seed)
        out.append(
            {
                "correlation": old["correlation"],
                "zeroed": old["zeroed"] / old["pairs"],
                "partial": test.partial,
                "p": test.p_value,
            }
        )
    return pd.DataFrame(out)


def task_section(runs: int) -> str:
    """Its tables in Markdown."""
    task = task_runs(runs)
    return "\n".join(
        [
            f"Routing drawn at random, {K} of {E} experts, every token and layer by itself; hidden states that have"
            f" nothing to do with it; 40 prompts, half of them to fit on. Means of {runs} runs.",
            "",
            "| tokens per prompt | as published: accuracy | as published: prefetch efficiency |"
            f" accuracy of random picks | sound: recall@{K} (chance {K / E:.1%}) |",
            "| ---: | ---: | ---: | ---: | ---: |",
            *(
                f"| {r.length:.0f} | **{r.accuracy:.1%}** | {r.precision:.1%} | {r.accuracy_random:.1%} |"
                f" {r.recall:.1%} |"
                for r in task.itertuples()
            ),
        ]
    )


def attention_section(runs: int) -> str:
    """Its table in Markdown."""
    found = attention_runs(runs)
    return "\n".join(
        [
            "Attention and routing drawn apart from each other; some experts are more popular than others, as in every"
            f" trained model; {E} experts, top-{K}, 20 prompts of 8 to 24 tokens. {runs} runs.",
            "",
            "| what | published for gpt-oss-20b | here, where there is nothing |",
            "| --- | ---: | ---: |",
            f"| as published: top-1 accuracy (1/{E} = {1 / E:.1%}) | 4.3 % | **{found['top1'].mean():.1%}** |",
            f"| as published: overlap (uniform chance 7.5 %) | 15.9 % | **{found['jaccard'].mean():.1%}** |",
            "| as published: largest correlation of self-attention with an expert, mean of runs | .906 |"
            f" **{found['self_attention_r'].mean():.2f}** |",
            f"| sound: recall@{K} of the most popular experts | | {found['popularity'].mean():.1%} |",
            f"| sound: recall gained by attention over position | | {found['gain'].mean():+.1%} |",
            f"| sound: runs with p ≤ 0.05 | | {(found['p'] <= 0.05).mean():.1%} |",
        ]
    )


def context_section(runs: int) -> str:
    """Its table in Markdown."""
    found = context_runs(runs)
    return "\n".join(
        [
            f"16 contexts, attention and routing drawn apart from each other; {runs} runs.",
            "",
            "| what | here, where there is nothing |",
            "| --- | ---: |",
            "| as published, contexts of 2 to 5 tokens: pairs whose attention counts as 0 because their"
            f" lengths differ | {found['zeroed'].mean():.1%} |",
            *(
                f"| as published: runs with a correlation of {r:.3f} or more |"
                f" **{(found['correlation'] >= r).mean():.1%}** |"
                for r in (0.141, 0.157, 0.320)
            ),
            f"| sound, contexts of one length: mean correlation | {found['partial'].mean():+.3f} |",
        ]
    )


SECTIONS = {
    "attention-prediction": attention_section,
    "context-attention-routing": context_section,
    "task-prediction": task_section,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--only", choices=SECTIONS, nargs="*", default=list(SECTIONS))
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    for name in args.only:
        text = SECTIONS[name](args.runs)
        print(f"{name}\n\n{text}\n", flush=True)
        if args.write:
            start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            before, rest = args.write.read_text().split(start)
            args.write.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    main()
