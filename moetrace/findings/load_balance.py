"""How evenly load falls on the experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetrace.findings.finding import Figure, Finding, Question
from moetrace.findings.subject import Subject


@dataclass(frozen=True)
class LoadBalance(Question):
    """How evenly does load fall on the experts of a layer?

    Jain's fairness index (1: even; 1/E: one expert does all) with a jackknife interval over prompts, the hottest
    expert, and experts that were never chosen, with the rate that they may still have.
    """

    name: ClassVar[str] = "load-balance"
    title: ClassVar[str] = "Load balance"

    def answer(self, subject: Subject) -> Finding:
        """Answer it, for each layer."""
        table = subject.analysis.load_balance()
        rows = table.to_dict("records")
        peak = max(rows, key=lambda row: row["peak"])
        uneven = min(rows, key=lambda row: row["jain"])
        unused = table[table["unused"] > 0]
        sentences = [
            f"Layer {uneven['layer']:.0f} is the least even: Jain index {uneven['jain']:.2f}"
            f" ({uneven['jain_low']:.2f} to {uneven['jain_high']:.2f}; 1 would be even).",
            f"The hottest expert is {peak['hottest']:.0f} of layer {peak['layer']:.0f}: "
            f"{peak['peak']:.1f} times the load of an even split, {peak['hottest_rate']:.1%} of the tokens.",
        ]
        if len(unused):
            bound = table["unused_rate_bound"].max()
            sentences.append(
                f"{unused['unused'].sum():.0f} experts in {len(unused)} layers were never chosen; each may still"
                f" be chosen by up to {bound:.2%} of tokens."
            )
        return self.finding(sentences, {"load_balance": table}, [subject.phase_note])

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Jain's index by layer, with its interval."""
        from moetrace import plot

        table = finding.tables["load_balance"]
        return {
            "jain": Figure(
                lambda ax: plot.load_balance(table, ax=ax),
                "Evenness of load by layer, with its 95 % interval over prompts.",
            )
        }
