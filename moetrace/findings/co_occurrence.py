"""Which experts are chosen together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetrace.analysis.experts.pairs import CoOccurrence, co_occurrence
from moetrace.analysis.published.patterns import as_published_coactivation
from moetrace.findings.finding import Figure, Finding, Method, Question, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import span
from moetrace.numbers import number


@dataclass(frozen=True)
class CoOccurrenceOfExperts(Question):
    """Which experts of a layer are chosen for the same token?

    Tokens that choose both experts of a pair, over what the two experts' rates alone give (sets of k of largest
    entropy with these rates, so that excluding each other is no finding), and over what their rates in the same text
    give: pairs that exceed the first only share texts. Intervals and false discovery rates over prompts. OLMoE's
    co-activation counts neighbours in the router's order only; the as_published table is that.
    """

    name: ClassVar[str] = "co-occurrence"
    title: ClassVar[str] = "Experts chosen together"
    place: ClassVar[int] = 115
    methods: ClassVar[tuple[Method, ...]] = (
        Method(
            "pairs",
            "Pairs of experts",
            r"chosen together|rates alone|same texts?",
            "Rates alone: how often a pair would be chosen if each token drew k experts with nothing but the experts'"
            " rates (conditional Bernoulli sampling; Chen, Dempster & Liu 1994). The same texts: how often one token of"
            " a text uses the one expert and another token of it the other, less what choosing without repetition"
            " takes away.",
        ),
    )

    min_expected: float = parameter(5.0, "pairs that rates let expect fewer tokens are left out")
    alpha: float = parameter(0.05, "false discovery rate, over all pairs of all layers")
    listed: int = parameter(500, "pairs to list, the most surprising first")
    max_tokens: int = parameter(30_000, "whole prompts are drawn until they hold so many tokens")

    def answer(self, subject: Subject) -> Finding:
        """Answer it, for each layer."""
        whole = subject.routing.text
        text = whole.some(self.max_tokens, subject.seed)
        found = co_occurrence(text, min_expected=self.min_expected, alpha=self.alpha, max_listed=self.listed)
        tables = {
            "layers": found.layers,
            "pairs": found.pairs,
            "lifts": found.lifts,
            "as_published_coactivation": as_published_coactivation(text),
        }
        caveats = [
            "Chosen together is not working together: whether two experts' outputs need each other is what"
            " expert-interference asks.",
        ]
        said = self._said(found)
        if len(text) < len(subject.routing.texts):
            said.append(
                f"All of this is about {number(len(text), 'token')} of {found.prompts:,} of"
                f" {number(len(subject.routing.prompts), 'prompt')}."
            )
        return self.finding(subject, said, tables, [*caveats, *subject.together])

    def _said(self, found: CoOccurrence) -> list[str]:
        layers, pairs = found.layers, found.pairs
        tested = int(layers["tested"].sum())
        if found.prompts < 2:
            return ["With a single prompt nothing can be said about pairs of experts in others."]
        if not tested:
            return [
                "No pair of experts would be chosen together often enough by its rates alone to be looked at."
            ]
        said = [
            f"Of {number(tested, 'pair')} of experts {int(layers['more'].sum()):,} are chosen together more often than"
            f" their rates alone give, {int(layers['fewer'].sum()):,} less often; against the same texts"
            f" {int(layers['text_more'].sum()):,} and {int(layers['text_fewer'].sum()):,} (false discovery rate"
            f" {self.alpha:g})."
        ]
        for name, times, what in (
            ("", "rates alone give", pairs[(pairs["q"] <= self.alpha) & (pairs["lift"] > 1)]),
            (
                "text_",
                "the same texts give",
                pairs[(pairs["text_q"] <= self.alpha) & (pairs["text_lift"] > 1)],
            ),
        ):
            if len(what):
                row = what.iloc[0].to_dict()
                said.append(
                    f"The surest: experts {row['expert']:.0f} and {row['other']:.0f} of layer {row['layer']:.0f},"
                    f" {span(row[f'{name}lift'], row[f'{name}low'], row[f'{name}high'], '.2f')} times as often as"
                    f" {times} ({row['tokens']:,.0f} tokens, {row['share']:.0%} of the one's and"
                    f" {row['share_other']:.0%} of the other's)."
                )
                break
        return said

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Lift of every pair of the layer with most pairs beyond their rates."""
        from moetrace import plot

        table = finding.tables["lifts"]
        if not len(table) or table["lift"].isna().all():
            return {}
        layer = int(table["layer"].iloc[0])
        return {
            "lifts": Figure(
                lambda ax: plot.pairs(table, ax=ax),
                f"How much more often than by their rates alone two experts of layer {layer} are chosen for one token;"
                " experts that go together stand together. Hatched: expected too rarely to say.",
            )
        }
