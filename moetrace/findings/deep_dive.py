"""One layer in detail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from moetrace.analysis import deep_dive
from moetrace.analysis.published import notebook as published
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best, listed


@dataclass(frozen=True)
class DeepDive(Question):
    """What does the most domain-specific layer look like, expert by expert?

    Each domain's share of picks for every expert, and its lift over the mean of domains. The layer is the one of
    largest bias-corrected Cramér's V, unless one is given. As published: the notebook's part 7, the same table three
    times, once for each of the matrices gate, up and down, of the layer of largest chi-square; one router decision
    serves all three.
    """

    name: ClassVar[str] = "deep-dive"
    title: ClassVar[str] = "One layer in detail"
    place: ClassVar[int] = 50

    layer: int = parameter(-1, "layer to look at; -1: the most domain-specific")

    def answer(self, subject: Subject) -> Finding:
        """Lay out one layer."""
        counts = subject.labelled
        found = deep_dive(
            counts.included,
            counts.labels,
            layers=counts.layers,
            layer=None if self.layer < 0 else self.layer,
            n_expert=subject.n_expert,
            consumers=() if subject.table is not None else subject.routing.consumers,
        )
        domains, experts = found.percent.shape
        table = pd.DataFrame(
            {
                "domain": np.repeat(found.percent.index.to_numpy(), experts),
                "expert": np.tile(found.percent.columns.to_numpy(), domains),
                "percent": found.percent.to_numpy().reshape(-1),
                "lift": found.lift.to_numpy().reshape(-1),
            }
        )
        table.insert(0, "layer", found.layer)
        table["components"] = ", ".join(found.consumers)
        old = published.deep_dive(subject.activations, None if self.layer < 0 else self.layer)
        parts = []
        for component, frame in old.items():
            long = frame.reset_index().melt("domain", var_name="expert_id", value_name="percent")
            long["expert_id"] = long["expert_id"].astype(int)
            long.insert(0, "component", component)
            parts.append(long)
        sentences = [f"Layer {found.layer}. There is one domain, so there is nothing to compare it with."]
        row = best(table.assign(beyond=table["percent"] * (1 - 1 / table["lift"])), "beyond")
        if row is not None and table["domain"].nunique() > 1:
            sentences[0] = (
                f"In layer {found.layer}, {'as asked for' if self.layer >= 0 else 'the most domain-specific'},"
                f" {row['domain']} stands out most with expert {row['expert']:.0f}: {row['percent']:.1f} % of its"
                f" picks, {row['lift']:.1f} times the mean of domains."
            )
        caveats = [
            "Picked because it is the largest, it looks larger than it is: specialists has intervals and tests.",
        ]
        if len(found.consumers) > 1:
            caveats.append(
                f"{listed(found.consumers)} share one decision: the published heatmaps of them are one and the same."
            )
        tables = {"deep_dive": table, "as_published_components": pd.concat(parts, ignore_index=True)}
        return self.finding(
            subject,
            sentences,
            tables,
            [*caveats, *subject.together],
            concludes=row is not None and table["domain"].nunique() > 1,
        )

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Domain by expert: shares of picks, and lift."""
        from moetrace import plot

        table = finding.tables["deep_dive"]
        layer = table["layer"].iloc[0]
        percent, lift = (
            table.pivot(index="domain", columns="expert", values=name) for name in ("percent", "lift")
        )
        consumers = [
            name.removeprefix("ffn_") for name in str(table["components"].iloc[0]).split(", ") if name
        ]
        one = f" One decision serves {listed(consumers)}: it is theirs alike." if len(consumers) > 1 else ""
        return {
            "percent": Figure(
                lambda ax: plot.heatmap(percent, label="% of the domain's picks", ax=ax),
                f"Layer {layer}: share of each domain's picks by expert.{one}",
                plot.size_of(len(percent)),
            ),
            "lift": Figure(
                lambda ax: plot.heatmap(lift, label="lift", scale="lift", ax=ax),
                f"Layer {layer}: lift of each domain over the mean of domains, by expert.",
                plot.size_of(len(percent)),
            ),
        }
