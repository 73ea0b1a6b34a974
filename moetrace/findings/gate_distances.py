"""How the router's input changes from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetrace.analysis.experts import gate
from moetrace.analysis.published.notebook import gate_steps
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best, span


@dataclass(frozen=True)
class GateDistances(Question):
    """How does what the router reads change from one MoE layer to the next?

    Cosine, Euclidean, L1, Euclidean over the root of the width, Pearson, mean and largest absolute difference between
    consecutive layers' gate inputs, token by token; means with jackknife intervals over prompts. cosine_unpaired is
    the cosine between a token's layer and the next layer of the token after it: what is no higher says nothing
    about the token. As published: gate_input_analysis.py, which takes row 0 of every ubatch, prompts' included.
    """

    name: ClassVar[str] = "gate-distances"
    title: ClassVar[str] = "Gate inputs from layer to layer"
    place: ClassVar[int] = 120
    channels: ClassVar[tuple[str, ...]] = ("gate_input",)

    tokens: int = parameter(200, "tokens to list one by one")

    def answer(self, subject: Subject) -> Finding:
        """Measure every pair of consecutive layers."""
        chosen = subject.routing.chosen
        summary = gate.summary_by_prompt(chosen)
        wide = summary.pivot(index=["layer", "next_layer"], columns="metric", values="mean").reset_index()
        cosine = summary[summary["metric"] == "cosine_similarity"]
        sentences = []
        for row, word in ((best(cosine, "mean", least=True), "least"), (best(cosine, "mean"), "most")):
            if row is None or (word == "most" and len(cosine) == 1):
                continue
            other = wide[wide["layer"] == row["layer"]]["cosine_unpaired"].iloc[0]
            sentences.append(
                f"Gate inputs are {word} alike between layers {row['layer']:.0f} and {row['next_layer']:.0f}: cosine"
                f" {span(row['mean'], row['low'], row['high'])}"
                + (f"; between different tokens {other:.3f}." if other == other else ".")
            )
        ends = summary.pivot(index="layer", columns="metric", values=["low", "high"])
        above = ends["low"]["cosine_similarity"] > ends["high"]["cosine_unpaired"]
        sentences.append(
            f"In {int(above.sum())} of {len(wide)} pairs of layers a token's cosine is above that between different"
            " tokens, their 95 % intervals apart."
            if ends["low"]["cosine_similarity"].notna().any()
            else "With a single prompt there are no intervals."
        )
        each = gate.distances_by_prompt(chosen, self.tokens).drop(columns="row")
        token = each.groupby(["prompt", "layer"], sort=False).cumcount()
        each.insert(0, "token", token)
        each.insert(0, "prompt", each.pop("prompt"))
        steps, aggregate = gate_steps(subject.routing, self.tokens)
        tables = {
            "summary": summary,
            "per_token": each,
            "as_published_steps": steps,
            "as_published_aggregate": aggregate,
        }
        caveats = [
            "A cosine says something about the token as far as it is above that between different tokens (here: the"
            " next one of the same text).",
            f"per_token and as_published_steps list the first {self.tokens} tokens.",
        ]
        return self.finding(subject, sentences, tables, caveats)

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Cosine and Euclidean distance between consecutive layers."""
        from moetrace import plot

        table = finding.tables["summary"]
        return {
            metric: Figure(
                lambda ax, metric=metric: plot.gate_distances(table, metric, ax=ax),  # type: ignore[misc]
                f"{what} between a layer's gate input and the next one's, with 95 % intervals over prompts.",
                (7.0, 3.0),
            )
            for metric, what in (("cosine_similarity", "Cosine"), ("l2_normalized", "Euclidean distance"))
        }
