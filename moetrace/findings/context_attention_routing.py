"""Whether a token that attends alike in two contexts is routed alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from moetrace.analysis.prediction.by_layer import contexts_by_layer
from moetrace.analysis.published import prediction as published
from moetrace.errors import MoetraceError, UsageError
from moetrace.findings.finding import Figure, Finding, Method, Question, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best, of_layers, p_value, span
from moetrace.numbers import number


@dataclass(frozen=True)
class ContextAttentionRouting(Question):
    """Does one token in many contexts use similar experts where its attention is similar?

    One place per prompt where the token sees enough keys. Attention: Bhattacharyya coefficient of every head's
    weights on the latest keys, so that contexts have one length; routing: share of experts in common. Correlation over
    pairs of contexts, with what position explains taken out of both; the p-value is Mantel's, contexts of similar
    positions being exchanged; jackknife intervals over contexts. As published: cosine of the last layer's
    attention, 0 wherever two prompts differ in length, against a Jaccard index with a bonus, without a test.
    """

    name: ClassVar[str] = "context-attention-routing"
    title: ClassVar[str] = "One token, many contexts"
    place: ClassVar[int] = 180
    methods: ClassVar[tuple[Method, ...]] = (
        Method(
            "mantel",
            "Mantel test",
            r"Mantel\S*",
            "Whether two tables of pairwise likeness go together: the correlation over pairs, against that with the"
            " items of one table exchanged.",
        ),
    )
    channels: ClassVar[tuple[str, ...]] = ("attention",)

    token: str = parameter("", "text of the token; default: those that stand in most prompts")
    tokens: int = parameter(5, "how many tokens, if none is given")
    length: int = parameter(16, "keys that are compared: the token and those before it")
    permutations: int = parameter(999, "exchanges of contexts for the p-value")

    def answer(self, subject: Subject) -> Finding:
        """Compare contexts in every layer."""
        columns = subject.routing.columns
        table, pairs = contexts_by_layer(
            columns,
            self._ids(subject),
            n_tokens=self.tokens,
            length=self.length,
            n_permutations=self.permutations,
            seed=subject.seed,
        )
        ids = table["token"].drop_duplicates().tolist()
        texts = dict(zip(ids, subject.traces[0].text(np.asarray(ids)).tolist(), strict=True))
        table.insert(1, "text", table["token"].map(texts))
        found = table[table["q_value"] <= 0.05]
        sentences = [
            f"Of {len(table)} cases ({number(len(ids), 'token')}, {table['layer'].nunique()} layers)"
            f" {len(found)} have contexts that are alike in attention and in routing beyond what position explains"
            f" (q ≤ 0.05, Benjamini-Hochberg)."
        ]
        row = best(table, "partial")
        if row is not None:
            sentences.append(
                f"Position taken out, the correlation is largest for {_name(row)} in layer {row['layer']:.0f}:"
                f" {span(row['partial'], row['low'], row['high'], '.2f')} over pairs of {row['contexts']} contexts"
                f" ({p_value(row['p_value'])})."
            )
        mean = table.groupby("layer")["partial"].mean().dropna()
        sentences.append(
            f"Mean over tokens, by layer: {mean.min():.2f} (layer {mean.idxmin()}) to {mean.max():.2f}"
            f" (layer {mean.idxmax()})."
            if len(mean)
            else "No correlation can be given in any layer: the contexts do not differ."
        )
        for token in ids[:1]:
            mine = table[table["token"] == token]
            hits = mine[mine["q_value"] <= 0.05]
            sentences.append(
                f"For {_name(mine.iloc[0].to_dict())}, in most prompts: {of_layers(hits['layer'], len(mine))}."
            )
        caveats = [
            "Contexts that are alike in topic are alike in attention and in routing: a correlation does not say that"
            " attention decides. One token is looked at at a time, so that its identity explains nothing.",
        ]
        tables = {"contexts": table}
        if len(pairs):
            tables["similarity"] = pairs
        try:
            old = [published.contexts_by_layer(columns, token) for token in ids]
            tables["as_published"] = pd.concat(old, ignore_index=True)
        except (MoetraceError, ValueError) as e:
            caveats.append(f"The published figures cannot be given: {e}.")
        return self.finding(subject, sentences, tables, caveats)

    def _ids(self, subject: Subject) -> list[int]:
        if not self.token:
            return []
        words = subject.routing.vocabulary
        wanted = self.token.encode()
        ids = [i for i, word in enumerate(words) if word.strip() == wanted.strip()]
        if not ids:
            raise UsageError(
                f"no token of the vocabulary is {self.token!r}", fix="give the text of a single token"
            )
        return ids

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """The correlation by layer, token by token."""
        from moetrace import plot

        table = finding.tables["contexts"]
        title = "Correlation of attention and routing similarity over pairs of contexts, by layer and token."
        figures = {"correlation": Figure(lambda ax: plot.correlation(table, ax=ax), title)}
        if "similarity" in finding.tables:
            pairs = finding.tables["similarity"]
            caption = "How alike the contexts of the strongest case are in {}; those that are alike in attention stand"
            caption += " together, in both pictures in one order."
            figures["attention"] = Figure(
                lambda ax: plot.similarity(pairs, "attention", ax=ax), caption.format("attention")
            )
            figures["routing"] = Figure(
                lambda ax: plot.similarity(pairs, "routing", ax=ax), caption.format("routing")
            )
        return figures


def _name(row: dict[str, object]) -> str:
    return repr(row["text"]) if row["text"] is not None else f"token {row['token']}"
