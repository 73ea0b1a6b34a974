"""Whether a token's experts tell the experts of the tokens after it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pandas as pd

from moetrace.analysis.dynamics import temporal
from moetrace.analysis.published import notebook as published
from moetrace.errors import UsageError
from moetrace.findings.finding import Figure, Finding, Method, Question, Widget, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best, of_layers, span


@dataclass(frozen=True)
class Persistence(Question):
    """Do experts stay from token to token, and for how long?

    Share of experts that a token has in common with the one d tokens later (overlap), and how often both have the
    same first expert (top1), for lags of 1 to 32 within unbroken text. Marginal: what the layer's overall usage
    would give; more only means that prompts differ. Shuffle: the exact mean over all orders of each prompt's
    tokens; more means that order matters. The excess over the shuffle has a jackknife interval over prompts. As
    published: the notebook's part 9, lag 1 of the first expert against 1/E, with a 20 % rule.
    """

    name: ClassVar[str] = "persistence"
    title: ClassVar[str] = "Persistence over time"
    place: ClassVar[int] = 100
    methods: ClassVar[tuple[Method, ...]] = (
        Method(
            "time",
            "Persistence and its two baselines",
            r"persistence|marginal|shuffled?|random order|lags?",
            "Tokens d apart in an unbroken run of one request are compared: the share of experts in common, or whether"
            " the first is the same. Two baselines: any two tokens of the layer (beating it only means that prompts"
            " differ), and the same prompt's tokens in random order (beating it means that order matters). The excess"
            " over the second has the interval.",
        ),
    )
    widgets: ClassVar[tuple[Widget, ...]] = (Widget("persistence", "persistence", replaces=("by_lag",)),)

    permutations: int = parameter(0, "orders to draw for p-values (one trace); 0: intervals only")

    def answer(self, subject: Subject) -> Finding:
        """Measure every layer and lag."""
        table = temporal.persistence(subject.routing.order_counts)
        tables = {"persistence": table}
        sentences = []
        first = table[(table["lag"] == 1) & (table["pairs"] > 0)]
        if first.empty:
            sentences.append("There are no neighbouring tokens, so nothing can be said about time.")
        known = first[first["overlap_low"].notna()]
        if len(first) and known.empty:
            row = best(first, "overlap_excess")
            if row is not None:
                sentences.append(
                    f"Neighbours share most in layer {row['layer']:.0f}: {row['overlap']:.1%} of their experts"
                    f" ({row['overlap_shuffle']:.1%} in random order). With a single prompt there is no interval."
                )
        elif len(known):
            stay = known[known["overlap_low"] > 0]
            leave = known[known["overlap_high"] < 0]
            sentences.append(
                f"Neighbouring tokens share more experts than tokens of the same prompt in random order"
                f" {of_layers(stay['layer'], len(known))}"
                + (f", and fewer {of_layers(leave['layer'], len(known))}" if len(leave) else "")
                + "; that is by 95 % intervals of each layer, not corrected for many layers."
            )
            row = best(known, "overlap_excess")
            if row is not None:
                excess = span(row["overlap_excess"], row["overlap_low"], row["overlap_high"], ".1%")
                sentences.append(
                    f"Most in layer {row['layer']:.0f}: {row['overlap']:.1%} of the experts are the next token's too,"
                    f" {excess} more than in random order; overall usage alone would give"
                    f" {row['overlap_marginal']:.1%}."
                )
                sentences += _reach(table, row["layer"])
        caveats = [
            "Chat templates and loops repeat text; what repeats routes alike. Lags beyond a prompt's length have few"
            " pairs (column pairs, prompts).",
        ]
        if self.permutations:
            tables["shuffle_test"] = temporal.shuffle_chosen(
                replace(subject.routing.whole("a shuffle test"), later=True),
                n_permutations=self.permutations,
                seed=subject.seed,
            )
        try:
            tables["as_published_lag1"] = published_lag1(subject.activations, int(max(subject.n_expert)))
        except UsageError as e:
            caveats.append(f"The published lag 1 needs domains: {e.what}.")
        return self.finding(
            subject, sentences, tables, [*caveats, *subject.first, *subject.drawn], concludes=bool(len(known))
        )

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """The strongest layer by lag, and all layers at lag 1."""
        from moetrace import plot

        table = finding.tables["persistence"]
        if not table["pairs"].any():
            return {}
        layer = plot.strongest_layer(table)
        return {
            "by_lag": Figure(
                lambda ax: plot.persistence(table, layer, ax=ax),
                f"Layer {layer}: share of experts that tokens have in common, by their distance, with both baselines.",
            ),
            "by_layer": Figure(
                lambda ax: plot.persistence_by_layer(table, ax=ax),
                "How much more neighbouring tokens share than in random order, by layer, with 95 % intervals.",
                (7.0, 3.0),
            ),
        }


def _reach(table: pd.DataFrame, layer: float) -> list[str]:
    """How far the excess of one layer reaches."""
    mine = table[(table["layer"] == layer) & table["overlap_low"].notna()].sort_values("lag")
    above = (mine["overlap_low"] > 0).to_numpy()
    n = int(above.argmin()) if not above.all() else len(above)
    if not n:
        return []
    return [
        f"There the interval of the excess stays above 0 up to lag {mine['lag'].iloc[n - 1]:.0f}"
        f" ({mine['overlap_excess'].iloc[n - 1]:.1%})."
    ]


def published_lag1(a: published.Activations, n_expert: int) -> pd.DataFrame:
    """Part 9 of every layer and domain, and the first 20 tokens of the sequence."""
    rows = []
    for layer in a.layers:
        for name in a.domains:
            try:
                one = published.lag1(a, name, layer, a.components[-1], n_expert)
            except UsageError:  # fewer than two tokens
                continue
            first = " ".join(map(str, one.sequence[:20].tolist()))
            rows.append((layer, name, one.same, one.pairs, one.probability, one.baseline, one.sticky, first))
    columns = ["layer_id", "domain", "same", "pairs", "probability", "baseline", "sticky", "first_20"]
    return pd.DataFrame(rows, columns=columns)
