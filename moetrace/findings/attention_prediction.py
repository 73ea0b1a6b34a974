"""Whether attention tells which experts a token gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moetrace.analysis.prediction.by_layer import attended_by_layer, attention_by_layer
from moetrace.analysis.published import prediction as published
from moetrace.errors import MoetraceError
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best, of_layers, p_value, span

_SHOWN = ("popularity", "position", "attention", "token", "token and attention", "hidden")


@dataclass(frozen=True)
class AttentionPrediction(Question):
    """Do a token's attention patterns tell which experts it gets in the same layer?

    Ridge regression from attention features of every head (entropy, weight on the token itself, on the first and on the
    8 recent keys, distance, largest weight, sink) to the experts, scored on prompts that it was not fitted on:
    recall of the k experts used among the k predicted. Attention depends on the position and on the token, so its
    gain over both is what counts; the p-value exchanges whole prompts' attention, position taken out. Beside it:
    popularity, the previous token's experts, tables by token and position, and the router's own input. Intervals redraw
    prompts. Every head's features are held against every expert, too. As published: five head-mean features of the last
    layer's attention, whichever layer is predicted.
    """

    name: ClassVar[str] = "attention-prediction"
    title: ClassVar[str] = "Experts from attention"
    place: ClassVar[int] = 170
    channels: ClassVar[tuple[str, ...]] = ("attention", "gate_input")

    permutations: int = parameter(199, "exchanges of prompts for the p-value; 0: none")
    max_tokens: int = parameter(20_000, "tokens to look at: whole prompts drawn at random")
    feature_tokens: int = parameter(4000, "the same, for features one by one")

    def answer(self, subject: Subject) -> Finding:
        """Predict every layer."""
        columns = subject.routing.columns
        recall, gains = attention_by_layer(
            columns, max_tokens=self.max_tokens, n_permutations=self.permutations, seed=subject.seed
        )
        tables = {"recall": recall, "gains": gains}
        k = recall.groupby("layer")["m"].transform("min")
        wide = recall[recall["m"] == k].pivot(index="layer", columns="predictor", values="recall")
        over_position = gains[gains["better"] == "attention"]
        over_token = gains[gains["better"] == "token and attention"]
        n = len(wide)
        sentences = []
        row = best(over_position, "gain")
        if row is not None:
            layer = wide.loc[row["layer"]]
            gained = span(row["gain"], row["low"], row["high"], ".1%")
            sentences.append(
                f"Attention tells most in layer {row['layer']:.0f}: {layer['attention']:.1%} of a token's experts are"
                f" among as many predicted from attention and position, {gained}"
                f" more than from position alone"
                + (
                    "."
                    if np.isnan(row["p_value"])
                    else f" ({p_value(row['p_value'])}; another prompt's attention gains {row['null_gain']:.1%})."
                )
                + f" The token's id by itself tells {layer['token']:.1%}, popularity {layer['popularity']:.1%}."
            )
        if over_position["q_value"].notna().any():
            found = over_position[over_position["q_value"] <= 0.05]
            sentences.append(
                f"Attention tells more than position {of_layers(found['layer'], n)} (q ≤ 0.05, Benjamini-Hochberg)."
            )
        row = best(over_token, "gain")
        if row is not None:
            more = over_token[over_token["low"] > 0]
            sentences.append(
                f"Where the token's id is known as well, attention adds {of_layers(more['layer'], n)} (95 % intervals),"
                f" at most {span(row['gain'], row['low'], row['high'], '.1%')} in layer {row['layer']:.0f}."
            )
        if "hidden" in wide:
            sentences.append(
                f"From the router's input the same regression reaches {wide['hidden'].min():.1%} to"
                f" {wide['hidden'].max():.1%}: the router is linear in it, so the rest is the limit of the regression."
            )
        features, tested = attended_by_layer(
            columns, max_tokens=self.feature_tokens, n_permutations=self.permutations, seed=subject.seed
        )
        tables["features"] = features
        if tested:
            sure = features[features["p_family"] <= 0.05].assign(z=lambda t: t["z"].abs())
            said = (
                f"{len(sure):,} of {tested:,} combinations of a head's features and an expert go together beyond what"
                " the place in the text explains (family-wise at 0.05)"
            )
            if len(sure):
                row = best(sure, "z") or {}
                said += (
                    f"; most surely “{row['feature']}” of head {row['head']} with expert {row['expert']} of layer"
                    f" {row['layer']}: correlation {span(row['correlation'], row['low'], row['high'], '.2f')}"
                )
            sentences.append(said + ".")
        caveats = [
            "Telling is not causing: attention, routing and the token's id all follow from the same hidden state.",
            "gain is measured on all tokens; p_value and null_gain on prompts cut to the length of similar ones.",
        ]
        if "hidden" not in wide:
            caveats.append(
                "What the router's input tells is not known: capture with --capture attention,gate_input."
            )
        if len(wide) < len(columns.text.layers):
            caveats.append("Layers without routing or attention of these tokens are left out.")
        try:
            evaluation, correlations = published.attention_by_layer(columns)
            tables |= {"as_published_evaluation": evaluation, "as_published_correlations": correlations}
        except MoetraceError as e:
            caveats.append(f"The published figures cannot be given: {e.what}.")
        return self.finding(subject, sentences, tables, [*caveats, *subject.read])

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Recall by layer and predictor; the gains."""
        from moetrace import plot

        recall, gains = finding.tables["recall"], finding.tables["gains"]
        recall = recall[recall["m"] == recall.groupby("layer")["m"].transform("min")]
        return {
            "recall": Figure(
                lambda ax: plot.recall(recall, _SHOWN, ax=ax),
                "What tells a token's experts, by layer, on prompts held out.",
            ),
            "gain": Figure(
                lambda ax: plot.gains(gains, _GAINS, ax=ax),
                "What attention adds to position, and to token and position, by layer.",
            ),
        }


_GAINS = {"attention": "position", "token and attention": "token and position"}
