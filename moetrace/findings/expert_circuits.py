"""Whether experts of different layers work together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from moetrace.analysis.circuits import Circuits, expert_circuits
from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.published.dynamics import PublishedCircuits, as_published_circuits
from moetrace.analysis.text import lexicon
from moetrace.analysis.text.path_purposes import path_domains, path_types
from moetrace.errors import MoetraceError
from moetrace.findings.finding import Figure, Finding, Method, Question, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best
from moetrace.numbers import number


@dataclass(frozen=True)
class ExpertCircuits(Question):
    """Do experts of different layers form circuits?

    Mutual information of the first experts of two layers; which pairs of experts follow each other more often than
    with the later layer's routing turned round within each prompt (max-T over all pairs); and paths of such pairs,
    found in half of the prompts and tested in the other half. First asked by the chuk-mlx experiment on expert
    dynamics, which found 15 pipelines of consistency 0.875 in the five tokens of its last prompt; random routing
    gives as many (docs/published.md). Which domains and types of token take the paths that hold is tested too. Its
    formulas are in the as_published tables.
    """

    name: ClassVar[str] = "expert-circuits"
    title: ClassVar[str] = "Circuits of experts"
    place: ClassVar[int] = 150
    slow: ClassVar[int] = 2
    methods: ClassVar[tuple[Method, ...]] = (
        Method(
            "information",
            "Mutual information",
            r"mutual information|out of step",
            "How many bits the expert of one layer tells about that of another. Few tokens make it larger than it is,"
            " so it stands beside the same with one of the two series turned round within its prompt.",
        ),
    )

    max_gap: int = parameter(1, "compare each layer with so many of the following")
    min_support: int = parameter(5, "experts used by fewer tokens are left out")
    alpha: float = parameter(0.05, "chance of any false edge, and of any false path")
    permutations: int = parameter(199, "rotations to draw")
    max_tokens: int = parameter(
        8000, "prompts, or stretches of long ones, are drawn until they hold so many tokens"
    )

    def answer(self, subject: Subject) -> Finding:
        """Answer it."""
        text = subject.routing.text
        found = expert_circuits(
            text,
            max_gap=self.max_gap,
            min_support=self.min_support,
            alpha=self.alpha,
            n_permutations=self.permutations,
            max_rows=self.max_tokens,
            seed=subject.seed,
        )
        sure = found.edges[found.edges["p_family"] <= self.alpha]
        depend = found.layers[found.layers["p_family"] <= self.alpha]
        n_pairs, n_prompts = len(found.layers), len(subject.routing.prompts)
        said = [
            f"The first experts of two layers depend on each other for {len(depend)} of {number(n_pairs, 'pair')} of"
            f" layers, in {number(found.tokens, 'token')} of {found.prompts:,} of {number(n_prompts, 'prompt')}"
            f" (family-wise at {self.alpha:g}).",
        ]
        row = best(found.layers, "excess_bits")
        if row is not None:
            # one expert does all in one of the layers: then there is nothing to be known
            share = "" if np.isnan(row["share"]) else f"{row['share']:.0%} of what could be known; "
            said.append(
                f"Most between layers {row['layer']:.0f} and {row['to_layer']:.0f}: {row['excess_bits']:.2f} bits more"
                f" than with the tokens out of step ({share}p = {row['p_family']:.2g})."
            )
        said.append(
            f"{len(sure):,} of {found.edges_tested:,} pairs of experts follow each other more often than that."
        )
        if len(sure):
            top = {name: float(value) for name, value in sure.iloc[0].items()}
            said.append(
                f"The strongest: expert {top['to_expert']:.0f} of layer {top['to_layer']:.0f} is"
                f" {top['lift']:.1f} times as frequent after expert {top['expert']:.0f} of layer"
                f" {top['layer']:.0f} ({top['tokens']:.0f} tokens, {top['expected']:.1f} expected)."
            )
        held = found.paths[found.paths["replicated"]] if len(found.paths) else found.paths
        if found.prompts < 2:
            said.append("With a single prompt no path can be tested on others.")
        else:
            said.append(
                f"{number(found.paths_found, 'path')} found in one half of the prompts,"
                f" {len(held)} of {len(found.paths)} tested ones hold in the other half."
            )
        tables = {"layers": found.layers, "edges": found.edges, "paths": found.paths}
        tables |= self._purposes(subject, found, said)
        caveats = [
            "Experts that follow each other need not pass anything on: both may answer to the same word. given_token"
            " is 1 where the word explains it; whether one causes the other shows when it is ablated.",
        ]
        published, note = _published(text)
        if published is None:
            caveats.append(note)
        else:
            tables |= {
                "as_published_alignment": published.alignment,
                "as_published_pipelines": published.pipelines,
                "as_published_summary": pd.DataFrame(
                    {
                        "tokens": [int(np.diff(text.starts)[-1])],
                        "pipelines": [len(published.pipelines)],
                        "global_consistency": [published.global_consistency],
                    }
                ),
            }
            caveats.append(note)
        return self.finding(subject, said, tables, caveats)

    def _purposes(self, subject: Subject, found: Circuits, said: list[str]) -> dict[str, pd.DataFrame]:
        """Which domains and types of token take the paths that hold."""
        held = np.flatnonzero(found.paths["replicated"].to_numpy(dtype=bool)).tolist()
        if not held:
            return {}
        text = subject.routing.text.some(self.max_tokens, subject.seed)
        chains = [found.chains[i] for i in held]
        names = [str(found.paths["path"].iloc[i]) for i in held]
        domains = path_domains(text, chains, names, seed=subject.seed)
        tables = {"path_domains": domains} if len(domains) else {}
        kinds = [("domain", domains)]
        try:
            pieces = subject.routing.pieces(text)
        except MoetraceError:  # then types of token cannot be told
            pieces = []
        if pieces:
            typed = lexicon.type_words(lexicon.join_words(pieces, text.starts))
            types = path_types(
                text, chains, names, typed, n_permutations=self.permutations, seed=subject.seed
            )
            tables["path_types"] = types
            kinds.append(("pattern", types))
        for column, table in kinds:
            sure = table[(table["p_family"] <= self.alpha) & (table["low"] > 1)]
            what = "domain" if column == "domain" else "type of token"
            if not len(table):
                continue
            n = sure["path"].nunique()
            line = f"Of {number(len(held), 'path')} that hold{'s' * (len(held) == 1)}, {n}"
            line += f" {'is' if n == 1 else 'are'} taken more for one {what}"
            if len(sure):
                row = sure.iloc[0].to_dict()
                line += (
                    f", most surely {row['path']} for {row[column]}: {row['lift']:.1f} times as often as for"
                    f" {'domains' if column == 'domain' else 'tokens'} on average"
                    f" ({row['low']:.1f} to {row['high']:.1f})"
                )
            said.append(line + ".")
        return tables

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Mutual information by layer, and its null."""
        from moetrace import plot

        table = finding.tables["layers"]
        caption = "Mutual information between the first experts of neighbouring layers, and with tokens out of step."
        return {"information": Figure(lambda ax: plot.information(table, ax=ax), caption)}


def _published(text: RoutedText) -> tuple[PublishedCircuits | None, str]:
    if text.weights is None:
        return None, "The published pipelines need weights: record with --capture experts,weights."
    last = text.of([text.n_requests - 1])
    if last.weights is None or not last.known(0).any():
        return None, "The published pipelines need the routing of the last prompt."
    n = len(last)
    return (
        as_published_circuits(last.experts, last.weights, text.n_expert, layers=text.layers),
        f"As published, pipelines rest on the {number(n, 'token')} of the last prompt alone.",
    )
