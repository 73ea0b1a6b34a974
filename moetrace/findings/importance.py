"""What each expert does for the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.experts.importance import CRITERIA, ExpertImportance, expert_importance
from moetrace.findings.finding import Figure, Finding, Question
from moetrace.findings.subject import Subject
from moetrace.findings.wording import layer_list
from moetrace.model.experts import weights_before

#: what criteria are called
SAID = {
    "count": "uses",
    "weight": "mixing weight",
    "saliency": "mean saliency",
    "contribution": "summed saliency",
}


@dataclass(frozen=True)
class Importance(Question):
    """What does each expert do for these texts, and would other texts of their kind say the same?

    Uses, mixing weight (share of the layer's, mean, rank), and, where the channel outputs was captured, saliency: the
    mean of mixing weight times the norm of what the expert made, over the tokens that use it (REAP, arXiv 2510.13999).
    Intervals over prompts; and how alike two halves of the prompts rank the experts, which is what anybody who leaves
    some out relies on. What leaving them out costs is measured by pruning (moetrace prune).
    """

    name: ClassVar[str] = "importance"
    title: ClassVar[str] = "Importance of experts"
    place: ClassVar[int] = 145
    actions: ClassVar[tuple[tuple[str, str], ...]] = (
        ("prune the least important", "moetrace prune {trace} -m MODEL.gguf --keep N --write pruned.gguf"),
        ("give bits by layer", "moetrace bits {trace} -m MODEL.gguf --like q4_k --write plan.txt"),
    )

    def answer(self, subject: Subject) -> Finding:
        """Answer it."""
        found, caveats = importance_of(subject)
        experts = found.experts
        seen = experts[experts["share"].notna()]
        unused = int((seen["uses"] == 0).sum())
        said = [
            f"{unused:,} of {len(seen):,} experts are not used at all."
            if unused
            else f"All {len(seen):,} experts are used.",
        ]
        unseen = sorted(set(experts["layer"]) - set(seen["layer"]))
        if unseen:
            caveats.append(f"Nothing is known of the experts of layers {layer_list(unseen)}.")
        for criterion, column in CRITERIA.items():
            if column not in experts:
                continue
            part = found.stability[found.stability["criterion"] == criterion]
            least = _least_quarter(seen[column].to_numpy(np.float64), seen["layer"].to_numpy())
            share = {"count": "share", "weight": "weight_share"}.get(criterion, "saliency_share")
            carried = seen[share].to_numpy(np.float64)[least].sum() / seen[share].sum()
            line = (
                f"By {SAID[criterion]}, the least quarter of each layer's experts carries {carried:.1%} of"
                f" all {SAID[criterion].split()[-1] if share == 'saliency_share' else SAID[criterion]}"
            )
            if part["overlap"].notna().any():
                line += (
                    f"; {part['overlap'].mean():.0%} of it is the same in two halves of the prompts (by chance"
                    f" {part['overlap_chance'].mean():.0%}; rank correlation {part['spearman'].mean():.2f})"
                )
            said.append(line + ".")
        if "saliency" not in experts:
            caveats.append(
                "How much experts add (saliency) is not known: capture experts,weights,outputs"
                " (--capture) for it."
            )
        caveats.append(
            "Low importance is no proof that an expert can go: moetrace prune evaluates the model without."
        )
        return self.finding(
            subject, said, {"experts": experts, "stability": found.stability}, [*caveats, *subject.read]
        )

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """How much of each layer is carried by how many of its experts."""
        from moetrace import plot

        experts = finding.tables["experts"]
        column = next(name for name in ("saliency_share", "weight_share", "share") if name in experts.columns)
        return {
            "carried": Figure(
                lambda ax: plot.carried(experts, column, ax=ax),
                "Share of each layer's importance that its most important experts carry together, by how many they"
                " are; dashed: experts that are all alike.",
            )
        }


def outputs_of(
    subject: Subject,
) -> tuple[RoutedText, list[npt.NDArray[np.float32]] | None, bool]:
    """The subject's rows by name; norms of what experts made, by layer, if captured; whether they are weighed."""
    routing = subject.routing
    text = routing.text.by_name()
    outputs = None
    facts = subject.traces[0].facts.get("model")
    weighed = isinstance(facts, dict) and weights_before(str(facts.get("architecture")))
    if text.weights is not None:
        columns = routing.columns
        found = [columns.column("outputs", text, i) for i in range(text.layers.size)]
        if all(one is not None for one in found):
            outputs = [one for one in found if one is not None]
    return text, outputs, weighed


def importance_of(subject: Subject) -> tuple[ExpertImportance, list[str]]:
    """The importance of the experts in the subject's texts, and what to say of it."""
    text, outputs, weighed = outputs_of(subject)
    return (
        expert_importance(text, outputs, weighed=weighed, n_expert=subject.n_expert, seed=subject.seed),
        ["Intervals and halves are over prompts: they hold for prompts like these."],
    )


def _least_quarter(values: npt.NDArray[np.float64], layers: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which experts are of the least quarter of their layer."""
    out = np.zeros(values.size, dtype=bool)
    for layer in np.unique(layers):
        mine = np.flatnonzero(layers == layer)
        order = np.argsort(np.nan_to_num(values[mine]), kind="stable")
        out[mine[order[: max(1, mine.size // 4)]]] = True
    return out
