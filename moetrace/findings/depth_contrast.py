"""Whether domains lie further apart late in the model than early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from moetrace.analysis.domains import layers
from moetrace.analysis.published import notebook as published
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import layer_list, span
from moetrace.numbers import numbers


@dataclass(frozen=True)
class DepthContrast(Question):
    """Do domains lie further apart in late layers than in early ones?

    Mean Jensen-Shannon divergence, in bits and freed of what prompts add by the jackknife, of the last quarter of
    the layers less that of the first (18-23 and 0-5 of 24, as the published README has it), with a 95 % interval
    over prompts. As published: mean chi-square, mean variance and number of "significant" layers of both groups.
    """

    name: ClassVar[str] = "depth-contrast"
    title: ClassVar[str] = "Early and late layers"
    place: ClassVar[int] = 60

    early: str = parameter("", "early layers, such as 0-5; default: the first quarter")
    late: str = parameter("", "late layers, such as 18-23; default: the last quarter")

    def answer(self, subject: Subject) -> Finding:
        """Compare the two groups."""
        counts = subject.labelled
        found = layers.depth_contrast(
            counts.included,
            counts.labels,
            layers=counts.layers,
            early=numbers(self.early, "--early") if self.early else None,
            late=numbers(self.late, "--late") if self.late else None,
        )
        table = pd.DataFrame(
            {
                "early_layers": [layer_list(found.early_layers)],
                "late_layers": [layer_list(found.late_layers)],
                "early": [found.early],
                "late": [found.late],
                "difference": [found.difference],
                "low": [found.low],
                "high": [found.high],
            }
        )
        what = f"late layers ({layer_list(found.late_layers)})"
        early = f"early ones ({layer_list(found.early_layers)})"
        verdict = "more" if found.low > 0 else "less" if found.high < 0 else None
        if pd.isna(found.low):
            sentence = (
                f"Whether {what} separate domains more than {early} cannot be said: {self._why(subject)}."
            )
        else:
            told = (
                f"{found.early:.3f} bits early, {found.late:.3f} late, difference"
                f" {span(found.difference, found.low, found.high)}"
            )
            sentence = (
                f"Domains lie {'further apart' if verdict == 'more' else 'closer together'} in {what} than in {early}:"
                f" {told}."
                if verdict
                else f"Whether domains lie further apart in {what} than in {early} remains open: {told}."
            )
        old = published.early_late(
            subject.activations, subject.activations.components[-1], found.early_layers, found.late_layers
        )
        caveats = [
            "Layers may differ in how many tokens they were computed for (overview); published chi-squares grow with"
            " that number.",
        ]
        tables = {"contrast": table, "as_published_early_late": old}
        return self.finding(
            subject, [sentence], tables, [*caveats, *subject.together], concludes=verdict is not None
        )

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Early, late, and their difference."""
        from moetrace import plot

        row = finding.tables["contrast"].iloc[0]
        found = layers.DepthContrast(
            tuple(numbers(str(row["early_layers"]), "early_layers")),
            tuple(numbers(str(row["late_layers"]), "late_layers")),
            *(float(row[name]) for name in ("early", "late", "difference", "low", "high")),
        )
        return {
            "contrast": Figure(
                lambda ax: plot.depth_contrast(found, ax=ax),
                "Mean divergence of domains in early and in late layers, and their difference with its 95 % interval"
                " over prompts.",
                (7.0, 2.2),
            )
        }

    def _why(self, subject: Subject) -> str:
        test = subject.domain_test(n_permutations=1)
        if test.n_domains < 2:
            return "there is only one domain"
        if not test.testable:
            return "that takes several prompts of each domain"
        return "a domain has a single prompt, or no token in one of these layers"
