"""Which experts prefer a domain, and which serve all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from moetrace.analysis.domains import domain
from moetrace.analysis.published import notebook as published
from moetrace.errors import UsageError
from moetrace.findings.domain_separation import scattered
from moetrace.findings.finding import Figure, Finding, Method, Question, Widget, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best, listed, span

#: of fewer prompts, bootstraps do not show how far apart prompts may lie
_FEW = 5


@dataclass(frozen=True)
class Specialists(Question):
    """Which experts prefer a domain, by how much, and which serve all domains alike?

    Lift: a domain's share of picks for the expert over the mean of that share over domains. Interval: each
    domain's prompts redrawn (cluster bootstrap). A specialist's share, the mean of its prompts', lies further from
    other domains', in standard errors, than any expert's of any layer does when prompts are exchanged between domains
    (max-T over layers, experts and domains); a generalist's intervals lie within 1/margin to margin in every domain;
    about the others the data do not say. As published: the notebook's part 5, quartiles of the coefficient of
    variation, which names about a quarter of the experts either way.
    """

    name: ClassVar[str] = "specialists"
    title: ClassVar[str] = "Specialists and generalists"
    place: ClassVar[int] = 40
    actions: ClassVar[tuple[tuple[str, str], ...]] = (
        ("steer by them", "moetrace analyze steering {trace} -m MODEL.gguf --toward LABEL --write steer.txt"),
        ("read their tokens", "moetrace show {trace} --layer N --expert N"),
    )
    methods: ClassVar[tuple[Method, ...]] = (
        Method(
            "specialist",
            "Specialist, generalist, undecided",
            r"specialists?|generalists?|undecided",
            "A specialist's lift is larger than chance allows (p ≤ 0.05 over all experts and domains of all layers). A"
            " generalist's intervals all lie within 1/1.5 and 1.5. About the others the data cannot say; a quartile cut"
            " would have named a quarter of them either way.",
        ),
    )
    widgets: ClassVar[tuple[Widget, ...]] = (Widget("forest", "domain_lift"),)

    alpha: float = parameter(0.05, "chance of any false specialist")
    margin: float = parameter(1.5, "lift that still counts as alike")
    permutations: int = parameter(999, "arrangements of prompts to draw")
    resamples: int = parameter(2000, "bootstrap samples")

    def answer(self, subject: Subject) -> Finding:
        """Sort the experts of every layer."""
        if self.margin <= 1:
            raise UsageError(
                f"a margin of {self.margin:g} leaves no room", fix="give more than 1, such as 1.5"
            )
        counts = subject.labelled
        lift = domain.domain_lift(
            counts.included,
            counts.labels,
            layers=counts.layers,
            n_expert=subject.n_expert,
            n_boot=self.resamples,
            n_permutations=self.permutations,
            strata=subject.strata,
            seed=subject.seed,
        )
        kinds = domain.specialists(lift, alpha=self.alpha, margin=self.margin)
        classes, preferred = _published(subject.activations)
        tables = {
            "specialists": kinds,
            "domain_lift": lift,
            "as_published_classes": classes,
            "as_published_preferred": preferred,
        }
        n = (
            kinds["kind"]
            .value_counts()
            .reindex(["specialist", "generalist", "undecided", "unused"], fill_value=0)
        )
        test = subject.domain_test(statistic="entropy", n_permutations=min(self.permutations, 199))
        if not test.testable:
            out = [
                f"Which experts are specialists {test.verdict}.",
                *(_largest(kinds, "The largest lift seen") if test.n_domains > 1 else []),
            ]
        else:
            out = [
                f"{n['specialist']} of {len(kinds)} experts are specialists, {n['generalist']} generalists,"
                f" {n['unused']} were never used; about {n['undecided']} these prompts do not say."
            ]
            special = kinds[kinds["kind"] == "specialist"]
            out += _largest(special, "The strongest specialist")
            if len(special):
                per = special["domain"].value_counts()
                told = listed(f"{name} ({count})" for name, count in per.items())
                out.append(f"Specialists by preferred domain: {told}.")
        named = classes["class"].value_counts()
        out.append(
            f"The published quartile cut names {named.get('specialist', 0)} specialists and"
            f" {named.get('generalist', 0)} generalists, as it would of any data."
        )
        caveats = [
            "The strongest is the one whose interval begins highest. Words can be the reason why a domain prefers an"
            " expert (matched-separation). Intervals cover slightly less than 95 % (docs/statistics.md).",
        ]
        few = pd.Series(counts.labels).value_counts()
        if few.min() < _FEW and test.testable:
            caveats.append(
                f"{listed(few.index[few < _FEW])} have fewer than {_FEW} independent prompts: intervals of so few cover"
                " the truth in 87 of 100 cases, not 95."
            )
        if test.testable:
            caveats += [*subject.exchanged, *scattered(test, self.alpha)]
        return self.finding(subject, out, tables, [*caveats, *subject.together], concludes=test.testable)

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """The surest specialists, and how many there are by layer."""
        from moetrace import plot

        table = finding.tables["specialists"]
        shown = min(24, int((table["kind"] == "specialist").sum()))
        return {
            "forest": Figure(
                lambda ax: plot.specialists(table, ax=ax),
                "The experts that most surely prefer a domain: lift over the mean of domains, with 95 % intervals.",
                (7.0, 1.6 + 0.2 * max(3, shown)),
            ),
            "kinds": Figure(
                lambda ax: plot.kinds(table, ax=ax),
                "Specialists, generalists, and experts about which the prompts do not say, by layer.",
                (7.0, 3.0),
            ),
        }


def _largest(table: pd.DataFrame, what: str) -> list[str]:
    """By the lower end of the interval, where there is one: rare experts have large lifts by chance."""
    by = "low" if table["low"].notna().any() else "lift"
    row = best(table, by)
    if row is None:
        return []
    return [
        f"{what}: expert {row['expert']} of layer {row['layer']} for {row['domain']}, lift"
        f" {span(row['lift'], row['low'], row['high'], '.1f')}."
    ]


def _published(a: published.Activations) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Part 5 of every layer."""
    classes, preferred = [], []
    component = a.components[-1]
    for layer in a.layers:
        try:
            found = published.classification(a, layer, component)
        except UsageError:  # no activation in this layer
            continue
        variation = found.variation.rename("variation").rename_axis("expert_id").reset_index()
        special, general = set(found.specialists), set(found.generalists)
        variation["class"] = [
            "specialist" if e in special else "generalist" if e in general else "neither"
            for e in variation["expert_id"]
        ]
        classes.append(variation.assign(layer_id=layer))
        preferred.append(found.preferred.assign(layer_id=layer))
    return (
        pd.concat(classes, ignore_index=True)[["layer_id", "expert_id", "variation", "class"]],
        pd.concat(preferred, ignore_index=True)[["layer_id", "expert_id", "domain", "percent"]],
    )
