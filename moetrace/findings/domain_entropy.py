"""How evenly each domain uses the experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from moetrace.analysis import domain_entropy
from moetrace.analysis.published import notebook as published
from moetrace.errors import UsageError
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best, of_layers, span


@dataclass(frozen=True)
class DomainEntropy(Question):
    """Do some domains spread over more experts than others?

    Shannon entropy of a domain's picks in bits: plug-in, with Miller and Madow's correction for few picks, and by
    the jackknife over prompts with a 95 % interval. Whether domains differ is tested by exchanging whole prompts
    (spread of the domains' entropies; Benjamini-Hochberg over layers). As published: the notebook's part 8, the
    plug-in value, which is too low by about (experts − 1)/(2 picks ln 2).
    """

    name: ClassVar[str] = "domain-entropy"
    title: ClassVar[str] = "Entropy by domain"
    place: ClassVar[int] = 80

    permutations: int = parameter(999, "arrangements of prompts to draw")
    alpha: float = parameter(0.05, "false discoveries to allow")

    def answer(self, subject: Subject) -> Finding:
        """Measure every domain in every layer."""
        counts = subject.labelled
        table = domain_entropy(
            counts.included, counts.labels, layers=counts.layers, n_expert=subject.n_expert
        )
        test = subject.domain_test(statistic="entropy", n_permutations=self.permutations)
        tested = test.table[["layer", "p_value", "q_value", "p_family"]]
        sentences = []
        if not test.testable:
            sentences.append(f"Whether domains differ in entropy {test.verdict}.")
        else:
            differ = tested[tested["q_value"] <= self.alpha]
            known = tested[tested["q_value"].notna()]
            sentences.append(
                f"Domains differ in how many experts they spread over {of_layers(differ['layer'], len(known))}, at a"
                f" false discovery rate of {self.alpha:.0%}."
                if len(differ)
                else "No layer shows that domains differ in how many experts they spread over (smallest q ="
                f" {known['q_value'].min():.2f})."
            )
        for row, word in (
            (best(table, "perplexity", least=True), "Least"),
            (best(table, "perplexity"), "Most"),
        ):
            if row is not None:
                bits = span(row["entropy_miller_madow_bits"], row["low"], row["high"], ".2f")
                sentences.append(
                    f"{word} spread: {row['domain']} in layer {row['layer']:.0f}, {bits} of"
                    f" {row['max_bits']:.2f} bits, as {row['perplexity']:.1f} experts used alike."
                )
        caveats = [
            "Picks of one prompt follow each other, so Miller-Madow corrects too little; the interval is the"
            " jackknife's, which also removes what prompts add.",
        ]
        tables = {
            "domain_entropy": table,
            "test": tested,
            "as_published_entropy": _published(subject.activations),
        }
        if test.testable:
            caveats += subject.exchanged
        return self.finding(
            subject, sentences, tables, [*caveats, *subject.together], concludes=test.testable
        )

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Entropy by layer, a line per domain."""
        from moetrace import plot

        table = finding.tables["domain_entropy"]
        return {
            "by_layer": Figure(
                lambda ax: plot.entropy(table, ax=ax),
                "Entropy of each domain's picks by layer, with 95 % intervals over prompts; dashed: all experts used"
                " alike. Of many domains those of highest and lowest mean are named.",
            )
        }


def _published(a: published.Activations) -> pd.DataFrame:
    """Part 8 of every layer."""
    parts = []
    for layer in a.layers:
        try:
            bits = published.entropy(a, layer, a.components[-1])
        except UsageError:  # no activation in this layer
            continue
        parts.append(bits.rename("entropy_bits").rename_axis("domain").reset_index().assign(layer_id=layer))
    return pd.concat(parts, ignore_index=True)[["layer_id", "domain", "entropy_bits"]]
