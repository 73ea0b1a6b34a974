"""Which experts are hardly ever used, and what that means."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from moetrace import data
from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.placement.cold_experts import (
    candidate_tokens,
    cold_experts,
    cold_types,
    trigger_tokens,
    wake_rates,
)
from moetrace.analysis.published.dynamics import as_published_cold_experts
from moetrace.analysis.statistics.likelihood import likelihood_change
from moetrace.analysis.text import lexicon
from moetrace.errors import MoetraceError
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.recorded import recorded
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best, listed, span
from moetrace.numbers import number


@dataclass(frozen=True)
class ColdExperts(Question):
    """Which experts are hardly ever used, for which tokens, and does the model miss them?

    Rates with exact intervals, for independent tokens and for tokens of one prompt being alike. Cold: the upper bound,
    at a level that holds for all experts together, lies below a share of the even rate k/E; an expert that was
    merely not seen is not called cold. With --wake (and the model) inputs are looked for that wake the coldest ones;
    with --ablate the model is evaluated on held-out text without each of them. First asked by the chuk-mlx
    experiment on expert dynamics, which called every expert unseen in some hundred tokens prunable, and measured
    the loss by the length of the text; as_published_rates follows it.
    """

    name: ClassVar[str] = "cold-experts"
    title: ClassVar[str] = "Cold experts"
    place: ClassVar[int] = 140
    actions: ClassVar[tuple[tuple[str, str], ...]] = (
        ("find prompts that reach them", "moetrace coverage IMATRIX.gguf --pool {trace} --write more.txt"),
    )

    cold_below: float = parameter(0.1, "cold is below this share of an even split, k/E")
    triggers: int = parameter(10, "tokens to list for each of the coldest experts")
    experts: int = parameter(10, "so many of the coldest experts are looked at closely")
    wake: int = parameter(0, "look for inputs that wake so many of the coldest experts (needs the model)")
    ablate: int = parameter(0, "evaluate the model without each of so many of the coldest (needs the model)")
    texts: str = parameter("", "texts to evaluate on, JSON lines; default: the shipped held-out ones")

    def answer(self, subject: Subject) -> Finding:
        """Answer it."""
        counts = subject.routing.counts
        table = cold_experts(
            counts.included,
            counts.tokens,
            n_expert_used=counts.n_expert_used,
            layers=counts.layers,
            cold_below=self.cold_below,
        )
        text = subject.routing.text
        chosen = table[table["verdict"] == "cold"]
        chosen = pd.concat([chosen, table[table["verdict"] != "cold"]]).head(
            max(self.experts, self.wake, self.ablate)
        )
        layer_of = {int(n): i for i, n in enumerate(text.layers)}
        coldest = [
            (layer_of[int(layer)], int(expert))
            for layer, expert in chosen[["layer", "expert"]].itertuples(index=False, name=None)
        ]
        try:
            vocabulary: list[bytes] | None = subject.routing.vocabulary
        except MoetraceError:
            vocabulary = None
        said = self._rates(table)
        caveats = [
            "Cold in these texts: other texts may need an expert that these do not.",
        ]
        tables = {
            "experts": table,
            "triggers": trigger_tokens(text, coldest[: self.experts], vocabulary, at_most=self.triggers),
            "as_published_rates": as_published_cold_experts(
                counts.included, counts.tokens, layers=counts.layers
            ),
        }
        if vocabulary is not None and coldest:
            tables["types"] = self._types(subject, text, coldest[: self.experts], said)
        published = tables["as_published_rates"]
        caveats.append(
            f"As published (no interval), {published['cold'].sum()} experts would be cold and"
            f" {published['prune'].sum()} safe to prune."
        )
        if vocabulary is None:
            caveats.append("The recording does not know the text of its tokens: triggers are ids.")
        if self.wake:
            tables["wake"] = self._wake(subject, text, coldest[: self.wake], vocabulary, table, said)
        if self.ablate:
            tables["ablation"] = self._ablate(subject, text, coldest[: self.ablate], said)
        return self.finding(subject, said, tables, [*caveats, *subject.together, *subject.read])

    def _rates(self, table: pd.DataFrame) -> list[str]:
        verdict = table["verdict"].value_counts()
        n_cold, open_ = int(verdict.get("cold", 0)), int(verdict.get("undecided", 0))
        unseen = table[table["used"] == 0]
        said = [
            f"{n_cold} of {number(len(table), 'expert')} {'is' if n_cold == 1 else 'are'} cold: used by fewer than"
            f" {table['threshold'].max():.2%} of tokens ({self.cold_below:g} of an even split), at a level that holds"
            f" for all experts together; about {open_} these texts do not say."
        ]
        if len(unseen):
            said.append(
                f"{len(unseen)} were never used; each of them may still be used by up to"
                f" {unseen['cluster_high'].max():.2%} of tokens."
            )
        seen = table[table["used"] > 0]
        if len(seen):
            row = seen.iloc[0].to_dict()
            said.append(
                f"The least used of the others is expert {row['expert']:.0f} of layer {row['layer']:.0f}:"
                f" {span(row['rate'], row['cluster_low'], row['cluster_high'], '.2%')} of tokens,"
                f" in {number(int(row['prompts']), 'prompt')}."
            )
        return said

    def _types(
        self, subject: Subject, text: RoutedText, experts: Sequence[tuple[int, int]], said: list[str]
    ) -> pd.DataFrame:
        typed = lexicon.type_words(lexicon.join_words(subject.routing.pieces(text), text.starts))
        table = cold_types(text, experts, typed.kind, typed.names)
        uses = int(table["uses"].sum())
        more, fewer = table[table["low"] > 1], table[table["high"] < 1]
        what = f"The {len(experts)} coldest that were looked at closely were used {uses:,} times"
        if len(more) or len(fewer):
            parts = [
                f"{word} often for {listed(part['type'])}"
                for word, part in (("more", more), ("less", fewer))
                if len(part)
            ]
            said.append(f"{what}, {' and '.join(parts)} than for other types of token.")
        else:
            said.append(f"{what}; that any type of token uses them more than others these texts do not say.")
        return table

    def _wake(
        self,
        subject: Subject,
        text: RoutedText,
        experts: Sequence[tuple[int, int]],
        vocabulary: list[bytes] | None,
        rates: pd.DataFrame,
        said: list[str],
    ) -> pd.DataFrame:
        rng = np.random.default_rng(subject.seed)
        tokens = text.tokens
        n_vocab = len(vocabulary) if vocabulary is not None else int(tokens.max()) + 1
        # First every token (or some) by itself, then the promising ones after beginnings of the recorded texts.
        tried = np.sort(rng.permutation(n_vocab)[:2000])
        with recorded(subject, [{"tokens": [t], "id": str(t)} for t in tried.tolist()]) as alone:
            scan = alone.text
        known = candidate_tokens(text, experts)
        for which, more in candidate_tokens(scan, experts).items():
            known[which] = np.unique(np.concatenate((known[which][:10], more[:10])))
        contexts = _contexts(text, 8, rng)
        ordinary = rng.choice(tokens[tokens >= 0], 20)
        wanted = sorted({int(t) for ids in known.values() for t in ids} | {int(t) for t in ordinary})
        prompts = [
            {"tokens": [*context, t], "id": f"{i}/{t}"} for i, context in enumerate(contexts) for t in wanted
        ]
        with recorded(subject, prompts) as after:
            ends = after.text
        last = ends.starts[1:] - 1
        token_of = np.asarray(ends.tokens)[last]
        rows = []
        for layer, expert in experts:
            woken = (ends.experts[last, layer] == expert).any(axis=1)
            base = float(woken[np.isin(token_of, ordinary)].mean())
            for t in known[layer, expert].tolist():
                mine = token_of == t
                rows.append((layer, expert, t, int(woken[mine].sum()), int(mine.sum()), base))
        found = pd.DataFrame(rows, columns=["layer", "expert", "token", "woken", "tried", "base"])
        table = wake_rates(found["woken"], found["tried"], found["base"])
        table.insert(0, "layer", text.layers[found["layer"].to_numpy(dtype=np.int64)])
        table.insert(1, "expert", found["expert"])
        table.insert(2, "token", found["token"])
        pieces = [vocabulary[t].decode("utf-8", "replace") if vocabulary else None for t in found["token"]]
        table.insert(3, "piece", pieces)
        table = table.sort_values(["layer", "expert", "rate"], ascending=[True, True, False], kind="stable")
        works = table[table["low"] > table["base_rate"]]
        n = len(works[["layer", "expert"]].drop_duplicates())
        said.append(
            f"Of {number(len(experts), 'expert')}, {n} can be woken by a token that was found for it, after"
            f" {len(contexts)} beginnings of text; ordinary tokens at the same places are the base."
        )
        woken_by: pd.DataFrame = table.reset_index(drop=True)
        return woken_by

    def _ablate(
        self, subject: Subject, text: RoutedText, experts: Sequence[tuple[int, int]], said: list[str]
    ) -> pd.DataFrame:
        from moetrace.host.evaluate import Evaluator

        texts: str | os.PathLike[str] = Path(self.texts) if self.texts else data.prompts("heldout-text")
        rows: list[dict[str, Any]] = []
        with Evaluator(subject.need_model("ablation"), **subject.model_options) as evaluator:
            subject.progress("evaluating the model as it is")
            base = evaluator.evaluate(texts)
            for layer, expert in experts:
                number_ = int(text.layers[layer])
                subject.progress(f"evaluating without expert {expert} of layer {number_}")
                other = evaluator.evaluate(texts, intervene=f"ablate:{number_}:{expert}")
                found = likelihood_change(base.nll, other.nll, base.text, same_top=base.top == other.top)
                rows.append(
                    {
                        "layer": number_,
                        "expert": expert,
                        "tokens": found.n_tokens,
                        "texts": found.n_texts,
                        "nll": float(found.base.estimate),
                        "nll_without": float(found.other.estimate),
                        "change": float(found.change.estimate),
                        "low": float(found.change.low),
                        "high": float(found.change.high),
                        "tokens_changed": int((other.nll != base.nll).sum()),
                        "same_top": float(np.mean(base.top == other.top)),
                    }
                )
        table = pd.DataFrame(rows)
        worse = table[table["low"] > 0]
        top = best(table, "change") or {}
        said.append(
            f"Without one of them, held-out text ({number(base.n_tokens, 'token')}) becomes less likely for"
            f" {len(worse)} of {len(table)}; most without expert {top['expert']:.0f} of layer {top['layer']:.0f}:"
            f" {span(top['change'], top['low'], top['high'], '+.4f')} nats per token."
        )
        return table

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """All experts' rates in order, with the bound."""
        from moetrace import plot

        table = finding.tables["experts"]
        caption = "How many tokens use each expert, and which are cold beyond doubt."
        return {"rates": Figure(lambda ax: plot.rates(table, ax=ax), caption)}


def _contexts(text: RoutedText, n: int, rng: np.random.Generator) -> list[list[int]]:
    """Beginnings of so many texts, at random."""
    out = []
    tokens = text.tokens
    for i in rng.permutation(text.n_requests)[:n].tolist():
        a, b = int(text.starts[i]), int(text.starts[i + 1])
        stop = a + int(rng.integers(1, min(b - a, 24) + 1))
        out.append([t for t in tokens[a:stop].tolist() if t >= 0])
    return [context for context in out if context]
