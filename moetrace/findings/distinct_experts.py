"""How many different experts several tokens need together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from moetrace.analysis.placement.unions import distinct_experts
from moetrace.errors import UsageError
from moetrace.findings.expert_cache import expert_sizes
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import span
from moetrace.host.options import human_size
from moetrace.numbers import number, numbers


@dataclass(frozen=True)
class DistinctExperts(Question):
    """How many different experts do several tokens need together: a draft, a batch?

    Tokens that are computed together share what they have in common: the weights of each expert are read once. Counted
    are the distinct experts of a layer that n consecutive tokens of a text need (a draft, verified at once), and that
    one token of each of n texts needs (n slots that decode together); beside them what even use would need, and the
    same text's tokens in any order. Intervals over prompts. With -m model.gguf also in bytes per token.
    """

    name: ClassVar[str] = "distinct-experts"
    title: ClassVar[str] = "Experts that tokens need together"
    place: ClassVar[int] = 205

    sizes: str = parameter("1,2,4,8,16,32", "how many tokens, as 1,2,4")
    max_tokens: int = parameter(30_000, "whole prompts are drawn until they hold so many tokens")

    def answer(self, subject: Subject) -> Finding:
        """Answer it, for each layer and all of them."""
        text = subject.routing.text.some(self.max_tokens, subject.seed)
        bytes_ = expert_sizes(subject, text.layers.tolist())
        table = distinct_experts(text, numbers(self.sizes, "--sizes"), expert_bytes=bytes_)
        whole = table[table["layer"] < 0]
        shown = whole[whole["consecutive"].notna()]
        if not len(shown):
            raise UsageError(
                "no text has so many tokens", fix="give smaller --sizes, or capture longer texts"
            )
        first, last = shown.iloc[0], shown.iloc[-1]
        layers = len(text.layers)
        value, low, high = (float(last[name]) / layers for name in ("consecutive", "low", "high"))
        said = [
            f"{last['n']:.0f} consecutive tokens need {span(value, low, high, '.1f')} different experts per layer, mean"
            f" over layers; {last['shuffled'] / layers:.1f} in any other order of the same text,"
            f" {last['even'] / layers:.1f} with even use, of {last['experts'] / layers:.0f}.",
            f"One token of each of {last['n']:.0f} texts needs {last['batch'] / layers:.1f}.",
        ]
        if first["n"] == 1 and last["n"] > 1:
            share = last["consecutive"] / (last["n"] * first["consecutive"])
            apart = last["batch"] / (last["n"] * first["batch"])
            said.append(
                f"Per token that is {share:.0%} of what a token by itself needs for a draft of {last['n']:.0f}, and"
                f" {apart:.0%} for a batch of {last['n']:.0f} texts."
            )
        if bytes_ is not None:
            said.append(
                "Bytes of experts read per token: "
                + ", ".join(
                    f"{human_size(row['bytes_consecutive'])} (draft) or {human_size(row['bytes_batch'])} (batch) with"
                    f" {row['n']}"
                    for row in shown.to_dict("records")
                )
                + "."
            )
        caveats = [
            "A draft's tokens are not known to be right: what is rejected was read for as well. What else is read per"
            " token (attention, shared experts) is not counted.",
        ]
        if bytes_ is None:
            caveats.append("In experts; give the model for bytes: -m model.gguf.")
        if len(text) < len(subject.routing.texts):
            caveats.append(f"These are {number(len(text), 'token')} of {len(subject.routing.texts):,}.")
        return self.finding(subject, said, {"distinct": table}, [*caveats, *subject.together])

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Distinct experts against tokens, mean over layers."""
        from moetrace import plot

        table: pd.DataFrame = finding.tables["distinct"]
        return {
            "distinct": Figure(
                lambda ax: plot.distinct(table, ax=ax),
                "Different experts per layer that n tokens need together, mean over layers: consecutive ones of a text"
                " with their 95 % interval over prompts, and one of each of n texts.",
            )
        }
