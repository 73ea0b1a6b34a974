"""How evenly load falls on the experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetrace.analysis import load_balance
from moetrace.errors import UsageError
from moetrace.findings.finding import Figure, Finding, Method, Question
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best, span
from moetrace.numbers import number

#: prompts, and experts of a layer, from which on the jackknife's interval of Jain's index is as good as it says
_FEW, _MANY = 10, 256


@dataclass(frozen=True)
class LoadBalance(Question):
    """How evenly does load fall on the experts of a layer?

    Jain's fairness index (1: even; 1/E: one expert does all) with a jackknife interval over prompts, the hottest
    expert, and experts that were never chosen, with the rate that they may still have.
    """

    name: ClassVar[str] = "load-balance"
    title: ClassVar[str] = "Load balance"
    place: ClassVar[int] = 90
    methods: ClassVar[tuple[Method, ...]] = (
        Method(
            "jain",
            "Load",
            r"Jain\S*|fairness|coefficient of variation",
            "Jain's index is (Σ load)² / (E · Σ load²): 1 if all E experts carry the same, 1/E if one carries all. For"
            " an expert that was never chosen among n tokens the rule of three bounds its rate: up to 3/n is still"
            " compatible with that.",
        ),
    )

    def answer(self, subject: Subject) -> Finding:
        """Answer it, for each layer."""
        counts = subject.counts
        tokens = counts.tokens if subject.table is None else None
        table = load_balance(counts.included, tokens, layers=counts.layers, n_expert=subject.n_expert)
        column = "jain_jackknife" if table["jain_jackknife"].notna().any() else "jain"
        peak, uneven = best(table, "peak"), best(table, column, least=True)
        if peak is None or uneven is None:
            raise UsageError("no layer has any routing", fix="choose rows that have some: --phase, --layers")
        unused = table[table["unused"] > 0]
        sentences = [
            f"Layer {uneven['layer']:.0f} is the least even: Jain index"
            f" {span(uneven[column], uneven['jain_low'], uneven['jain_high'], '.2f')}; 1 would be even.",
            f"The hottest expert is {peak['hottest']:.0f} of layer {peak['layer']:.0f}: "
            f"{peak['peak']:.1f} times the load of an even split"
            + (f", {peak['hottest_rate']:.1%} of the tokens." if peak["hottest_rate"] > 0 else "."),
        ]
        if len(unused):
            bound = unused["unused_rate_bound"].max()
            sentences.append(
                f"{number(int(unused['unused'].sum()), 'expert')} in {number(len(unused), 'layer')} never came up"
                + (f"; one may still be chosen by up to {bound:.2%} of tokens." if bound > 0 else ".")
            )
        caveats = subject.together
        if tokens is not None and (len(tokens) < _FEW or counts.n_expert >= _MANY):
            caveats.append(
                "Intervals of Jain's index cover the truth in about 90 of 100 cases, not 95, where prompts are few or"
                " experts many (docs/statistics.md)."
            )
        return self.finding(subject, sentences, {"load_balance": table}, caveats)

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
