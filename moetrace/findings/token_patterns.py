"""Which experts take which kinds of token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from moetrace import data
from moetrace.analysis.counts.from_trace import Routing
from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.published import patterns as published
from moetrace.analysis.text import lexicon
from moetrace.analysis.text import token_patterns as patterns
from moetrace.errors import MoetraceError, UsageError
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.recorded import recorded
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best, listed, of_layers
from moetrace.numbers import number

ANALYSES = ("pattern_summary", "semantic_patterns", "sequence_patterns", "combined_analysis")
RELATIONS = ("synonyms", "antonyms", "analogies", "arithmetic")

_Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class TokenPatterns(Question):
    """Which experts take numbers, keywords, brackets, function words, or certain sequences of these?

    Sub-word tokens are joined to words, words typed (NUM, KW, OP, BR, PN, FW, CAP, CW, VAR, WS), and trigrams of types
    counted per layer and expert. Lift: the share of an expert's tokens that has the pattern, over its share of the
    text. Null: prompts exchanged, place by place, the largest statistic of all experts, patterns and layers (max-T);
    a type must also hold beyond single words (types handed out anew among words). First asked by the chuk-mlx
    experiment on expert patterns, whose "random: 3 %" takes 33 trigrams for equally frequent; as_published tables
    give its numbers. pattern_summary: types and trigrams; semantic_patterns: synonyms, antonyms, analogies,
    arithmetic (needs these prompts in the trace, or the model); sequence_patterns: places in the text, repetition;
    combined_analysis: all of it, per expert.
    """

    name: ClassVar[str] = "token-patterns"
    title: ClassVar[str] = "Token patterns"
    place: ClassVar[int] = 130
    slow: ClassVar[int] = 4

    analyses: str = parameter(",".join(ANALYSES), "which of these, separated by commas", metavar="LIST")
    num_prompts: int = parameter(100, "prompts to look at: the first so many")
    min_activity: int = parameter(5, "experts used by fewer tokens are left out")
    specialist_threshold: float = parameter(0.15, "least share of an expert's tokens that its pattern has")
    min_support: int = parameter(10, "patterns with fewer tokens are left out")
    alpha: float = parameter(0.05, "chance of any false specialist in a table")
    permutations: int = parameter(199, "rearrangements to draw")
    max_tokens: int = parameter(12000, "whole prompts are drawn until they hold so many tokens")

    def answer(self, subject: Subject) -> Finding:
        """Answer it with the analyses that were asked for."""
        wanted = [name.strip() for name in self.analyses.split(",") if name.strip()]
        for name in wanted:
            if name not in ANALYSES:
                raise UsageError(f"there is no analysis {name!r}", fix=f"choose among: {', '.join(ANALYSES)}")
        routing = subject.routing
        whole = routing.text
        text = whole if whole.n_requests <= self.num_prompts else whole.of(np.arange(self.num_prompts))
        text = text.some(self.max_tokens, subject.seed, None)  # whole: beginnings and ends are looked at
        sentences: list[str] = []
        caveats = [
            "A type is found by spelling alone. That an expert takes a kind of token does not say what it computes.",
        ]
        if text.n_requests < 6:
            caveats.append(
                f"With {number(text.n_requests, 'prompt')} there are too few exchanges for p-values below"
                f" {self.alpha:g}: specialists cannot be told."
            )
        tables: _Tables = {}
        every = "combined_analysis" in wanted
        if "pattern_summary" in wanted or every:
            tables |= self._summary(routing, text, subject.seed, sentences)
        if "sequence_patterns" in wanted or every:
            tables |= self._sequence(text, subject.seed, sentences)
        if "semantic_patterns" in wanted or every:
            tables |= self._semantic(subject, text, sentences, caveats)
        if every:
            tables["combined_analysis"] = self._combined(tables)
        n_prompts = len(routing.prompts)
        if text.n_requests < n_prompts:
            looked_at = (
                f"{number(len(text), 'token')} of {text.n_requests:,} of {number(n_prompts, 'prompt')}"
            )
            sentences.append(f"All of this is about {looked_at}.")
        # relations come last: where nothing else was asked for they may be all there is, and not testable
        alone = next(iter(tables), "") == "semantic_relations"
        concludes = not alone or bool(tables["semantic_relations"]["p_value"].notna().any())
        return self.finding(subject, sentences, tables, caveats, concludes=concludes)

    def _summary(self, routing: Routing, text: RoutedText, seed: int, say: list[str]) -> _Tables:
        pieces = routing.pieces(text)
        typed = lexicon.type_words(lexicon.join_words(pieces, text.starts))
        found = patterns.pattern_summary(
            text,
            typed,
            min_activity=self.min_activity,
            specialist_threshold=self.specialist_threshold,
            min_support=self.min_support,
            alpha=self.alpha,
            n_permutations=self.permutations,
            seed=seed,
        )
        special = found.specialists
        n_experts = text.n_expert * text.experts.shape[1]
        of_type = special[special["kind"] == "type"]
        one_word = special[(special["kind"] == "word") & (special["of"] == "type")]
        undecided = special[special["kind"] == "undecided"]
        trigrams = special[(special["of"] == "trigram") & (special["kind"] == "trigram")]
        kinds = (of_type, undecided, one_word, trigrams)
        n = [len(rows[["layer", "expert"]].drop_duplicates()) for rows in kinds]
        say.append(
            f"{n[0]} of {n_experts:,} experts are specialists of a type of token beyond single words; {n[1]} prefer a"
            f" type, and whether for more than a few words of it these texts do not say; {n[2]} prefer one word of a"
            f" type; {n[3]} prefer a trigram of types"
            f" ({sum(found.tested):,} combinations tested, family-wise at {self.alpha:g})."
        )
        for kind, rows in (("type", of_type), ("trigram", trigrams)):
            if len(rows):
                row = rows.iloc[0].to_dict()
                say.append(
                    f"The clearest specialist of a {kind}: expert {row['expert']:.0f} of layer {row['layer']:.0f} for"
                    f" {row['pattern']}, {row['concentration']:.0%} of its tokens where the text has"
                    f" {row['corpus_share']:.1%} (lift {row['lift']:.1f}, {row['low']:.1f} to {row['high']:.1f};"
                    f" {row['words']} different words, most often {row['top_word']!r})."
                )
        depth = patterns.types_by_depth(found.types, special, text.layers)
        say.append(
            "Specialists of types by depth: "
            + ", ".join(
                f"{int(part['specialists'].sum())} in layers {part['layers'].iloc[0]}"
                for _, part in depth.groupby("third", sort=False)
            )
            + "."
        )
        vocabulary = found.vocabulary
        above = vocabulary[vocabulary["p_family"] <= self.alpha]
        if vocabulary["tokens"].any():
            top = best(vocabulary, "specialisation") or {}
            say.append(
                f"A token id goes to one expert more often than with prompts exchanged"
                f" {of_layers(above['layer'], len(vocabulary))}; most in layer {top['layer']:.0f}:"
                f" {top['specialisation']:.0%} of its occurrences, {top['null']:.0%} with prompts exchanged."
            )
        texts = [piece.decode("utf-8", "replace") for piece in pieces]
        return {
            "specialists": special,
            "types": found.types,
            "types_by_depth": depth,
            "trigrams": found.trigrams,
            "vocabulary_specialisation": vocabulary,
            "as_published_specialists": published.as_published_pattern_summary(
                text, texts, min_activity=self.min_activity
            ),
        }

    def _sequence(self, text: RoutedText, seed: int, say: list[str]) -> _Tables:
        table, tested = patterns.sequence_patterns(
            text,
            min_activity=self.min_activity,
            alpha=self.alpha,
            n_permutations=self.permutations,
            seed=seed,
        )
        good = table[(table["p_family"] <= self.alpha) & (table["low"] > 1)]
        places = good[~good["pattern"].str.startswith("repeat")]
        repeats = good[good["pattern"].str.startswith("repeat")]
        say.append(
            f"{len(places[['layer', 'expert']].drop_duplicates())} experts prefer the beginning or the end of a text,"
            f" {len(repeats[['layer', 'expert']].drop_duplicates())} what is repeated in it"
            f" ({tested:,} combinations tested)."
        )
        return {"sequence_patterns": table}

    def _semantic(self, subject: Subject, text: RoutedText, say: list[str], caveats: list[str]) -> _Tables:
        labels = np.array(list(text.labels or ()), dtype=object)
        mine = np.flatnonzero(np.isin(labels, RELATIONS))
        if len(set(labels[mine])) >= 2:
            return self._relations(text.of(mine), subject.routing.pieces, subject.seed, say)
        if subject.model is None:
            caveats.append(
                "Synonyms, antonyms, analogies and arithmetic were not looked at: the trace has no such prompts. Give"
                f" the model (-m), or record them: -f {data.prompts('semantic').name} of moetrace's data."
            )
            return {}
        try:
            with recorded(subject, data.prompts("semantic")) as theirs:
                return self._relations(theirs.text, theirs.pieces, subject.seed, say)
        except MoetraceError as e:
            caveats.append(f"Synonyms, antonyms, analogies and arithmetic could not be recorded: {e.what}.")
            return {}

    def _relations(
        self, text: RoutedText, pieces_of: Callable[[RoutedText], list[bytes]], seed: int, say: list[str]
    ) -> _Tables:
        pieces = pieces_of(text)
        joined = lexicon.join_words(pieces, text.starts)
        typed = lexicon.type_words(joined, lexicon.semantic_type, lexicon.SEMANTIC_TYPES)
        found = patterns.semantic_patterns(
            text,
            typed,
            min_activity=self.min_activity,
            alpha=self.alpha,
            n_permutations=self.permutations,
            seed=seed,
        )
        if found.testable:
            apart = found.relations[found.relations["p_family"] <= self.alpha]
            good = found.experts[(found.experts["p_family"] <= self.alpha) & (found.experts["low"] > 1)]
            say.append(
                f"Prompts of different relations ({listed(sorted(set(text.labels or ())))}) route differently"
                f" {of_layers(apart['layer'], len(found.relations))}; {len(good)} experts prefer one of them."
            )
        else:
            say.append(f"Whether relations route differently {found.reason}.")
        texts = [piece.decode("utf-8", "replace") for piece in pieces]
        return {
            "semantic_relations": found.relations,
            "semantic_experts": found.experts,
            "semantic_words": found.words,
            "as_published_semantic": published.as_published_semantic_patterns(text, texts),
        }

    def _combined(self, tables: _Tables) -> pd.DataFrame:
        special = tables["specialists"]
        aspects = {
            "type": special[special["of"] == "type"],
            "trigram": special[special["of"] == "trigram"],
        }
        sequence = tables["sequence_patterns"]
        aspects["place"] = sequence[(sequence["p_family"] <= self.alpha) & (sequence["low"] > 1)]
        if "semantic_experts" in tables:
            related = tables["semantic_experts"].rename(columns={"domain": "pattern"})
            aspects["relation"] = related[(related["p_family"] <= self.alpha) & (related["low"] > 1)]
        return patterns.combined_analysis(**aspects)

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Specialists by layer and type."""
        from moetrace import plot

        if "specialists" not in finding.tables:
            return {}
        special = finding.tables["specialists"]
        rows, layers = special[special["of"] == "type"], finding.tables["vocabulary_specialisation"]["layer"]
        return {
            "specialists": Figure(
                lambda ax: plot.patterns(rows, lexicon.TYPES, layers.to_numpy(), ax=ax),
                "Experts that prefer a type of token more than exchanged prompts allow, by layer.",
            )
        }
