"""From which expert to which, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from moetrace.analysis import transitions
from moetrace.analysis.published import notebook as published
from moetrace.errors import UsageError
from moetrace.findings.finding import Figure, Finding, Question, Widget, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best
from moetrace.numbers import number


@dataclass(frozen=True)
class Transitions(Question):
    """Which first expert follows which, from token to token?

    Counts of (first expert of a token, first expert of the next) in every layer, their share per row, and their lift
    over the exact mean count over all orders of each prompt's tokens. stay is the share of repeats. Persistence has
    the intervals. As published: the notebook's part 10 asks for transition matrices; they are made of the sequence
    of its part 9, by domain, in the layer given.
    """

    name: ClassVar[str] = "transitions"
    title: ClassVar[str] = "Transitions between experts"
    place: ClassVar[int] = 110
    widgets: ClassVar[tuple[Widget, ...]] = (Widget("transitions", replaces=("probability", "lift")),)

    layer: int = parameter(-1, "layer of the published matrices; -1: the first")
    support: int = parameter(20, "expected transitions that a pair must have to be named in a sentence")

    def answer(self, subject: Subject) -> Finding:
        """Count transitions in every layer."""
        counts = subject.routing.order_counts
        parts, stay = [], []
        for layer in counts.layers.tolist():
            found = transitions(counts, layer)
            matrix = found.counts.to_numpy()
            a, b = np.nonzero((matrix > 0) | (found.expected.to_numpy() >= 1))
            parts.append(
                pd.DataFrame(
                    {
                        "layer": layer,
                        "from": a,
                        "to": b,
                        "count": matrix[a, b],
                        "probability": found.probability.to_numpy()[a, b],
                        "expected": found.expected.to_numpy()[a, b],
                        "lift": found.lift.to_numpy()[a, b],
                    }
                )
            )
            stay.append((layer, int(matrix.sum()), found.stay, found.stay_expected))
        table = pd.concat(parts, ignore_index=True)
        stays = pd.DataFrame(stay, columns=["layer", "transitions", "stay", "stay_expected"])
        tables = {"transitions": table, "stay": stays}
        sentences = []
        most = best(stays.assign(excess=stays["stay"] - stays["stay_expected"]), "excess")
        if most is None:
            sentences.append("There are no neighbouring tokens, so there are no transitions.")
        else:
            sentences.append(
                f"The first expert stays most in layer {most['layer']:.0f}: in {most['stay']:.1%} of"
                f" {number(int(most['transitions']), 'transition')}, where the same tokens in random order give"
                f" {most['stay_expected']:.1%}."
            )
        moves = table[(table["from"] != table["to"]) & (table["expected"] >= self.support)]
        row = best(moves, "lift")
        if row is not None:
            sentences.append(
                f"The most preferred move (among pairs expected {self.support} times or more): expert"
                f" {row['from']:.0f} to {row['to']:.0f} in layer {row['layer']:.0f}, {row['count']:.0f} times,"
                f" {row['lift']:.1f} times as often as in random order."
            )
        caveats = [
            "Pairs that are not listed never occurred and were expected less than once. The largest of many lifts is"
            " large by chance too; no test is made of single pairs.",
        ]
        try:
            tables["as_published_transitions"] = _published(
                subject.activations, self.layer, int(max(subject.n_expert))
            )
        except UsageError as e:
            caveats.append(f"The published matrices need domains: {e.what}.")
        return self.finding(subject, sentences, tables, [*caveats, *subject.first, *subject.drawn])

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Probability and lift in the layer where the first expert stays most above random order."""
        from moetrace import plot

        table, stay = finding.tables["transitions"], finding.tables["stay"]
        most = best(stay.assign(excess=stay["stay"] - stay["stay_expected"]), "excess")
        if most is None:
            return {}
        mine = table[table["layer"] == most["layer"]]
        ids = range(int(table[["from", "to"]].max().max()) + 1)

        def matrix(values: pd.Series) -> pd.DataFrame:
            wide: pd.DataFrame = mine.assign(value=values).pivot(index="from", columns="to", values="value")
            return wide.reindex(index=list(ids), columns=list(ids))

        came = mine.groupby("from")["count"].sum().reindex(ids, fill_value=0) > 0
        probability = matrix(mine["probability"]).fillna(0.0).where(came, axis=0)
        lift = matrix(mine["lift"].where(mine["expected"] >= 1))
        note = f"Layer {most['layer']:.0f}, in which the first expert stays most above random order"
        figures = {
            "probability": Figure(
                lambda ax: plot.transitions(probability, ax=ax),
                f"{note}: probability of the next token's first expert; hatched: never first.",
                (7.0, 5.6),
            ),
        }
        if lift.notna().to_numpy().any():
            figures["lift"] = Figure(
                lambda ax: plot.transitions(lift, measure="lift", ax=ax),
                f"{note}: counts over those expected in random order; hatched: less than one is expected.",
                (7.0, 5.6),
            )
        return figures


def _published(a: published.Activations, layer: int, n_expert: int) -> pd.DataFrame:
    chosen = a.layers[0] if layer < 0 else layer
    parts = []
    for name in a.domains:
        try:
            matrix = published.transition_matrix(a, name, chosen, a.components[-1], n_expert)
        except UsageError:  # fewer than two tokens
            continue
        share = matrix.to_numpy()
        x, y = np.nonzero(share)
        parts.append(
            pd.DataFrame({"layer_id": chosen, "domain": name, "from": x, "to": y, "probability": share[x, y]})
        )
    if not parts:
        raise UsageError(f"no domain has two tokens in layer {chosen}", fix="capture longer texts")
    return pd.concat(parts, ignore_index=True)
