"""What real routing shows: writes docs/findings.md and its pictures from recordings that others published.

    python docs/findings.py FOLDER

FOLDER holds ``gpt-oss-20b-mmlu`` (DOMAIN.npz, see benchmarks/traces.py), ``bigmoeonedge`` (NAME.route.csv of
"route_trace v1") and ``olmoe`` (domain, layer_id, expert_id, count). Every number on the page is computed here.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import traces

import moetrace
import moetrace.analysis as m
from moetrace.findings import Finding, Subject, question
from moetrace.findings.wording import of_layers
from moetrace.trace.trace import open_trace

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"


def ask(name: str, subject: Subject, **given: object) -> Finding:
    """The answer, with the picture of that name if there is one."""
    return question(name)(**given).answer(subject)


def picture(finding: Finding, figure: str, file: str) -> str:
    """Save a figure of a finding; gives the line that shows it."""
    drawn = question(finding.question if hasattr(finding, "question") else finding.name)().figures(finding)[
        figure
    ]
    drawn.save(IMAGES / file)
    return f"![{drawn.caption}](images/{file})\n\n*{drawn.caption}*"


def quoted(finding: Finding, n: int) -> str:
    """The first sentences as a quotation."""
    return "\n".join(f"> {sentence}" for sentence in finding.sentences[:n])


# -- gpt-oss-20b on MMLU ---------------------------------------------------------------------------------


def mmlu(source: Path) -> str:
    """The part on gpt-oss-20b."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mmlu.moet"
        traces.mmlu(source, path)
        with open_trace(path) as trace:
            return of_mmlu(Subject(trace))


def of_mmlu(subject: Subject) -> str:
    """The same, of its trace."""
    separation, matched = ask("domain-separation", subject), ask("matched-separation", subject)
    special, cold = ask("specialists", subject), ask("cold-experts", subject)
    dynamics, stays = ask("generation-dynamics", subject), ask("persistence", subject)
    cache = ask("expert-cache", subject)
    by_layer = separation.tables["domain_test"].set_index("layer")
    middle = by_layer.index.isin(range(8, 18))
    inside, outside = (by_layer.loc[mask, "jsd_jackknife"].mean() for mask in (middle, ~middle))
    top = by_layer["jsd_jackknife"].nlargest(10).index.tolist()
    counts = subject.routing.counts
    rates = cold.tables["experts"]
    old_cold = cold.tables["as_published_rates"]["cold"].mean()
    summary = dynamics.tables["as_published_summary"].set_index("primary")
    published_same = summary["consistency"]
    lag1 = stays.tables["persistence"].query("lag == 1").set_index("layer")
    words = matched.tables["matched_separation"].set_index("layer")
    both = pd.DataFrame(
        {"as they are": by_layer["jsd_jackknife"], "same words": words["jsd_matched_jackknife"]}
    )
    steadiest = lag1["overlap_excess"].nlargest(10).index.tolist()
    in_middle = sum(8 <= layer <= 17 for layer in top), sum(8 <= layer <= 17 for layer in steadiest)
    claims = [
        (
            "Layers 8-17 differ most between domains",
            "divergence of the domains, freed of what prompts add",
            f"{in_middle[0]} of the 10 most domain-specific layers lie there; their mean divergence is"
            f" {inside:.3f} bits, of the others {outside:.3f}",
            "holds here" if in_middle[0] >= 8 else "in part",
        ),
        (
            "Layers 8-17 are the most stable",
            "how much more neighbours share than in random order",
            f"{in_middle[1]} of the 10 layers in which neighbours share most beyond random order lie there",
            "holds here" if in_middle[1] >= 8 else "in part",
        ),
        (
            "12.9 % of experts are cold",
            "used less than a tenth of an even share",
            f"{(rates['verdict'] == 'cold').sum()} of {len(rates)} ({(rates['verdict'] == 'cold').mean():.1%}) beyond"
            f" doubt, {(rates['verdict'] == 'undecided').sum()} undecided; the published rule alone would say"
            f" {old_cold:.1%}",
            "these prompts do not say" if (rates["verdict"] == "undecided").mean() > 0.1 else "compare",
        ),
        (
            "45.9 % consistency of the first expert",
            "same first expert as the token before",
            f"{published_same['router']:.1%} by the router's first expert, {published_same['arbitrary']:.1%} by an"
            f" arbitrary one of the four, as the published code takes it",
            "not met",
        ),
    ]
    lines = [
        "## gpt-oss-20b on 80 questions of MMLU",
        "",
        f"{counts.tokens.max(axis=1).sum():,} generated tokens of {len(subject.routing.prompts)} independent prompts,"
        " 16 in each of five domains; 24 layers, top-4 of 32 experts. What `moetrace stats` says:",
        "",
        quoted(separation, 3),
        "",
        picture(separation, "by_layer", "findings-mmlu-separation.png"),
        "",
        "**Words or domains?** Different words alone separate domains. At the same words:",
        "",
        quoted(matched, 2),
        "",
        "The three most separate layers, corrected for bias (bits): "
        + ", ".join(
            f"{layer}: {row['as they are']:.3f}, at the same words {row['same words']:.3f}"
            for layer, row in both.nlargest(3, "as they are").iterrows()
        )
        + ".",
        "",
        quoted(special, 2),
        "",
        picture(special, "forest", "findings-mmlu-specialists.png"),
        "",
        "### Claims about this model",
        "",
        "A study of expert dynamics published these of gpt-oss-20b, on prompts of its own that are not at hand. What"
        " these 80 say:",
        "",
        "| claim | what it counts | here | |",
        "| --- | --- | --- | --- |",
        *(f"| {a} | {b} | {c} | {d} |" for a, b, c, d in claims),
        "",
        "**Early and late.** " + next(s for s in dynamics.sentences if "arly and late" in s),
        "",
        "**Caches.** " + cache.sentences[0],
        "",
    ]
    return "\n".join(lines)


# -- three models on a phone -----------------------------------------------------------------------------


def phones(source: Path, published: dict[str, float]) -> str:
    """The part on three models, one prompt each."""
    rows = []
    for name, said in published.items():
        with moetrace.open(source / f"{name}.route.csv") as trace:
            decoded = trace.sel(phase="decode")
            experts, layers, n_expert = np.array(decoded.experts), trace.layers, int(max(trace.n_expert))
            model = str(trace.facts["model"]["name"])
        n, _, k = experts.shape
        request, position = np.zeros(n, dtype=np.int64), np.arange(n, dtype=np.int32)
        counts = m.count_routing(experts, request, position, n_expert=n_expert, layers=layers, max_lag=1)
        table = m.persistence(counts)
        test = m.shuffle_test(
            experts,
            request,
            position,
            n_expert=n_expert,
            layers=layers,
            max_lag=1,
            n_permutations=999,
        )
        above = test[test["overlap_p_family"] <= 0.05]["layer"]
        rows.append(
            f"| {model} | {n:,} | {k} of {n_expert} | {said:.1f} % | {table['overlap'].mean():.1%} |"
            f" {table['overlap_shuffle'].mean():.1%} | {k / n_expert:.1%} | {of_layers(above, len(test))} |"
        )
    return "\n".join(
        [
            "## Three models, one prompt each",
            "",
            "How much of a token's experts the next token uses too, mean over layers, as published and computed here;"
            " beside it the same tokens in random order (exact), what even use would give, and in which layers order"
            " matters (999 shuffles, family-wise over layers).",
            "",
            "| model | tokens | top-k | published | here | random order | even use | more than in random order |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
            *rows,
            "",
            "Most of the overlap is there in any order: experts are in favour throughout a text. What order adds is the"
            " difference of the fifth and the sixth column; a cache that keeps what was used last lives on both. One"
            " prompt each: nothing can be said about other prompts.",
            "",
        ]
    )


# -- OLMoE's counts --------------------------------------------------------------------------------------


def olmoe(source: Path) -> str:
    """The part on OLMoE's published counts."""
    table = pd.read_csv(source / "olmoe_expert_counts.csv")
    rows = []
    for layer, part in table.groupby("layer_id"):
        counts = part.pivot_table(index="domain", columns="expert_id", values="count", fill_value=0)
        found = m.domain_separation(counts.to_numpy())
        rows.append(
            f"| {layer} | {len(counts)} | {found.n_picks:,} | {found.jsd_bits:.4f} | {found.cramers_v:.3f} |"
        )
    return "\n".join(
        [
            "## OLMoE-1B-7B: counts by domain",
            "",
            "Published are sums only, so there are values, but neither intervals nor tests: counts do not tell the"
            " prompts of a domain apart.",
            "",
            "| layer | domains | picks | divergence, bits | Cramér's V |",
            "| ---: | ---: | ---: | ---: | ---: |",
            *rows,
            "",
        ]
    )


def page(source: Path) -> str:
    """The page; pictures are written."""
    return "\n".join(
        [
            "# What real routing shows",
            "",
            "Written by `python docs/findings.py FOLDER` from recordings that others published (Apache-2.0; not part of"
            " moetrace): what the statistics of this project say about real models, which published claims hold on"
            " them, and what cannot be said.",
            "",
            mmlu(source / "gpt-oss-20b-mmlu"),
            phones(source / "bigmoeonedge", {"gptoss": 17.9, "qwen": 38.0, "gemma": 35.7}),
            olmoe(source / "olmoe"),
            "## What cannot be said",
            "",
            "- Routing says which experts are used, not what they contribute.",
            "- 80 questions of five subjects are one kind of text: multiple choice, answered with reasoning. Experts"
            " that are cold here may be used elsewhere.",
            "- Prompts were not recorded in the first set, only what was generated; weights were not recorded, so the"
            " first expert is the router's.",
            "- The study whose claims are held against these data used other prompts: that a claim does not hold here"
            " is no proof that it did not hold there.",
            "",
        ]
    )


if __name__ == "__main__":
    (DOCS / "findings.md").write_text(page(Path(sys.argv[1])), encoding="utf-8")
