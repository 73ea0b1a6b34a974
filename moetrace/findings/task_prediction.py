"""Whether an early layer tells the experts of later ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from moetrace.analysis.prediction.by_layer import task_by_layer
from moetrace.analysis.published import prediction as published
from moetrace.errors import MoetraceError
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best, of_layers, p_value, span
from moetrace.model.file import ModelFile, Router


@dataclass(frozen=True)
class TaskPrediction(Question):
    """Does an early layer tell which experts the same token needs in later ones, early enough to fetch them?

    Token by token, on prompts that nothing was fitted on: recall@m, the share of a token's k experts among m fetched
    ahead, and precision, the share of those m that are used. From the early layer's experts and, where captured,
    its router's input (ridge regression); against what costs less: the most popular experts, the previous token's,
    a table by token id, transitions from the early layer's experts, and (with the model) the later layer's own
    router applied to the early layer's input. Intervals redraw prompts; the p-value exchanges whole prompts.
    As published: per prompt, "accuracy" is any hit in the union of all its tokens' experts, as random picks have.
    What fetching ahead is worth depends on what is in memory already: see expert-cache.
    """

    name: ClassVar[str] = "task-prediction"
    title: ClassVar[str] = "Later experts from an early layer"
    place: ClassVar[int] = 190
    slow: ClassVar[int] = 4
    channels: ClassVar[tuple[str, ...]] = ("gate_input",)

    early_layer: int = parameter(
        4, "layer that predicts, by llama.cpp's number; if it has no experts, the one before"
    )
    permutations: int = parameter(199, "exchanges of prompts for the p-value; 0: none")
    max_tokens: int = parameter(20_000, "tokens to look at: whole prompts drawn at random")

    def answer(self, subject: Subject) -> Finding:
        """Predict every later layer."""
        columns = subject.routing.columns
        have = columns.text.layers.tolist()[:-1]
        early = max((layer for layer in have if layer <= self.early_layer), default=have[0] if have else 0)
        recall, gains = task_by_layer(
            columns,
            early,
            routers=_routers(subject, columns.text.layers.tolist()),
            max_tokens=self.max_tokens,
            n_permutations=self.permutations,
            seed=subject.seed,
        )
        tables = {"recall": recall, "gains": gains, "prefetch": _prefetch(recall)}
        probe = "hidden" if "hidden" in set(recall["predictor"]) else "experts"
        read = "What the router read" if probe == "hidden" else "The choice of experts"
        wide = recall[recall["m"] == recall.groupby("layer")["m"].transform("min")]
        wide = wide.pivot(index="layer", columns="predictor", values="recall")
        others = wide.drop(columns=[c for c in ("hidden", "experts") if c in wide])
        sentences = []
        row = best(wide.reset_index(), probe)
        if row is not None:
            cheap = others.loc[row["layer"]]
            sentences.append(
                f"{read} in layer {early} tells layer {row['layer']:.0f} best: {row[probe]:.1%} of a"
                f" token's experts are among as many predicted; {cheap.idxmax()}, the best baseline, tells"
                f" {cheap.max():.1%}, popularity {cheap['popularity']:.1%}."
            )
        last = wide.index.max()
        sentences.append(
            f"In the last layer ({last:.0f}) it is {wide.loc[last, probe]:.1%}, and"
            f" {others.loc[last].max():.1%} for the best baseline ({others.loc[last].idxmax()})."
        )
        against = gains[(gains["better"] == probe) & gains["than"].isin(others.columns)]
        more = against.loc[against.groupby("layer")["gain"].idxmin()]
        row = best(more, "gain")
        if row is not None:
            sure = more[more["low"] > 0]
            gained = span(row["gain"], row["low"], row["high"], ".1%")
            sentences.append(
                f"It beats every baseline {of_layers(sure['layer'], len(more))} (95 % intervals)"
                + (
                    f", at most by {gained} over {row['than']} in layer {row['layer']:.0f}."
                    if len(sure)
                    else "."
                )
            )
        tested = gains[gains["p_value"].notna()]
        if len(tested):
            found = tested[tested["q_value"] <= 0.05]
            sentences.append(
                f"The early layer's experts alone tell more than popularity {of_layers(found['layer'], len(tested))}"
                f" (q ≤ 0.05; smallest {p_value(tested['p_value'].min())})."
            )
        double = tables["prefetch"]
        mine = double[(double["predictor"] == probe) & (double["layer"] == last)]
        for entry in mine[mine["m"] > mine["m"].min()].head(1).to_dict("records"):
            sentences.append(
                f"Fetching {entry['m']:.0f} experts ahead per token for layer {last:.0f} has {entry['recall']:.1%}"
                f" of those needed in time, and fetches {entry['wasted']:.1f} in vain. What of them is in memory"
                " already: see expert-cache."
            )
        caveats = [
            "Recall depends on m, k and what is predicted from: figures of other work are comparable only at the same.",
        ]
        if early != self.early_layer:
            caveats.append(
                f"Layer {self.early_layer} is no MoE layer with others after it: layer {early} predicts."
            )
        if probe == "experts":
            caveats.append(
                "Only the early layer's choices are known: with --capture gate_input its router's input predicts too."
            )
        elif "gate" not in wide:
            caveats.append("The later router on the early input needs the model: -m model.gguf.")
        try:
            tables["as_published"] = published.task_by_layer(columns, early, seed=subject.seed)
        except MoetraceError as e:
            caveats.append(f"The published figures cannot be given: {e.what}. {e.fix}")
        return self.finding(subject, sentences, tables, [*caveats, *subject.read])

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Recall@k by layer; recall against how many are fetched, in the last layer."""
        from moetrace import plot

        recall = finding.tables["recall"]
        names = list(dict.fromkeys(recall["predictor"]))
        first = recall[recall["m"] == recall.groupby("layer")["m"].transform("min")]
        last = recall[recall["layer"] == recall["layer"].max()]
        return {
            "recall": Figure(
                lambda ax: plot.recall(first, names, ax=ax),
                "What tells a token's experts in later layers, on prompts held out.",
            ),
            "fetched": Figure(
                lambda ax: plot.recall(last, names, x="m", ax=ax),
                "Recall against the number of experts fetched ahead, in the last layer.",
            ),
        }


def _routers(subject: Subject, layers: list[int]) -> dict[int, Router] | None:
    if subject.model is None:
        return None
    with ModelFile(subject.model) as model:
        return {layer: model.router(layer) for layer in layers}


def _prefetch(recall: pd.DataFrame) -> pd.DataFrame:
    """Per token: experts fetched ahead that are used, fetched in vain, and still missing."""
    used = recall["precision"] * recall["m"]
    k = used / recall["recall"].where(recall["recall"] > 0)
    return recall[["layer", "predictor", "m", "recall", "precision"]].assign(
        useful=used, wasted=recall["m"] - used, missing=k - used
    )
