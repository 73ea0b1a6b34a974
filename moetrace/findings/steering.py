"""Which experts tell two sets of prompts apart, and what favouring them does to the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from moetrace.analysis.domains.difference import usage_difference
from moetrace.analysis.statistics.likelihood import likelihood_change
from moetrace.errors import UsageError
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.held_out import TEXT_HELP, compared_with, held_out
from moetrace.findings.subject import Subject
from moetrace.findings.wording import span
from moetrace.findings.written import write_text
from moetrace.host.prompts import read_prompts
from moetrace.numbers import number
from moetrace.trace.intervention import Intervention, Kind


@dataclass(frozen=True)
class Steering(Question):
    """Which experts tell prompts of one label from the others, and does favouring them steer the model there?

    For every expert of every layer: the share of tokens that use it in prompts of the label, less that in the others,
    with an interval over prompts; p-values come from permuting whole prompts between the two sets, max-T over all
    experts of all layers. What favours the label's experts (a bias on the score that they are chosen by, the others'
    the opposite) is an intervention, written as a file for --intervene @FILE. For each strength, held-out text is
    evaluated under it: change of the negative log-likelihood of the label's texts, of the others, and the difference
    of both, with intervals over texts; beside it as many experts of the same layers drawn at random.
    """

    name: ClassVar[str] = "steering"
    title: ClassVar[str] = "Steering"
    place: ClassVar[int] = 228
    needs_model: ClassVar[bool] = True

    toward: str = parameter("", "the label to steer to; default: the first")
    strengths: str = parameter(
        "0.01,0.03,0.1,0.3",
        "biases, in the unit of the router's scores (probabilities, sigmoids or logits, as the model has it)",
    )
    experts: int = parameter(
        4, "experts per layer at most, half of them favoured, those of the largest difference"
    )
    alpha: float = parameter(0.05, "chance of any false expert")
    permutations: int = parameter(999, "arrangements of prompts to draw")
    text: str | None = parameter(None, TEXT_HELP)
    write: str | None = parameter(
        None,
        "write the strength that tells most as an intervention here, for --intervene @FILE",
        metavar="FILE",
    )

    def answer(self, subject: Subject) -> Finding:
        """Answer it."""
        strengths = self._strengths()
        counts = subject.labelled
        labels = np.asarray(counts.labels).astype(str)
        names = sorted(set(labels.tolist()))
        toward = self.toward or names[0]
        if toward not in names:
            raise UsageError(f"no prompt is labelled {toward!r}", fix=f"choose among: {', '.join(names)}")
        if len(names) < 2:
            raise UsageError(f"all prompts are labelled {toward!r}", fix="record others, too")
        table = usage_difference(
            counts.included,
            counts.tokens,
            labels == toward,
            layers=counts.layers,
            n_expert=subject.n_expert,
            n_permutations=self.permutations,
            strata=subject.strata,
            seed=subject.seed,
        )
        table["kind"] = _kinds(table, self.alpha, max(1, self.experts // 2))
        chosen = table[table["kind"] != ""]
        n_sure = int((table["p_family"] <= self.alpha).sum())
        if table["p_family"].isna().all():
            said = [
                f"Whether {toward} uses other experts than the others cannot be tested with these prompts."
            ]
        else:
            said = [
                f"{number(n_sure, 'expert')} of {len(table)} tell {toward} from the other prompts (at a chance of"
                f" {self.alpha:g} of any false one)."
            ]
        if not len(chosen):
            return self.finding(subject, said, {"experts": table}, subject.read)
        best = chosen.iloc[int(chosen["difference"].abs().argmax())]
        said.append(
            f"Most does expert {best['expert']} of layer {best['layer']}: {best['rate']:.1%} of the tokens of {toward}"
            f" use it and {best['rate_other']:.1%} of the others', a difference of"
            f" {span(100 * best['difference'], 100 * best['low'], 100 * best['high'], '+.1f')} points."
        )
        sweep = self._sweep(subject, chosen, table, toward, strengths)
        steered = sweep[sweep["experts"] == "chosen"]
        first = steered.iloc[int(steered["gain"].argmin())]
        said.append(
            f"Of the strengths tried, {first['strength']:g} tells most: texts of {toward} change by"
            f" {span(first['toward'], first['toward_low'], first['toward_high'], '+.3f')} nats per token, the others by"
            f" {span(first['other'], first['other_low'], first['other_high'], '+.3f')} (positive: less likely)."
        )
        chance = sweep[(sweep["experts"] == "random") & (sweep["strength"] == first["strength"])].iloc[0]
        at_random = f"experts drawn at random: {span(chance['gain'], chance['gain_low'], chance['gain_high'], '+.3f')}"
        gain = span(first["gain"], first["gain_low"], first["gain_high"], "+.3f")
        if first["gain_high"] < min(0.0, chance["gain_low"]):
            said.append(f"That favours {toward}: {gain} nats per token beside the others ({at_random}).")
        else:
            said.append(
                f"That it favours {toward} beyond chance is not shown: {gain} nats per token beside the others"
                f" ({at_random})."
            )
        if self.write:
            write_text(self.write, "\n".join([*interventions(chosen, float(first["strength"])), ""]))
            said.append(f"Wrote {self.write}: moetrace run --intervene @{self.write} … llama-server …")
        return self.finding(
            subject,
            said,
            {"sweep": sweep, "experts": table},
            [
                "The strength that tells most was chosen for that; its interval does not allow for it.",
                "A lower likelihood of all texts is what forcing experts costs; the difference is what steers.",
                *subject.read,
            ],
        )

    def _strengths(self) -> list[float]:
        try:
            found = [float(part) for part in self.strengths.split(",")]
        except ValueError:
            found = []
        if not found or not all(0 < value < float("inf") for value in found):
            raise UsageError(
                f"--strengths {self.strengths} are no strengths", fix="give numbers above 0: 0.03,0.1"
            )
        return found

    def _sweep(
        self,
        subject: Subject,
        chosen: pd.DataFrame,
        table: pd.DataFrame,
        toward: str,
        strengths: Sequence[float],
    ) -> pd.DataFrame:
        labels = [prompt.label for prompt in read_prompts(held_out(self.text))]
        mine = np.array([label == toward for label in labels])
        if not mine.any() or mine.all():
            raise UsageError(
                f"the held-out text has {'only' if mine.any() else 'no'} texts labelled {toward!r}",
                fix='give text with both, each line with its "label" (--text)',
            )
        rows = []
        with compared_with(subject, self.text, kl=False) as comparison:
            base = comparison.base
            for strength in strengths:
                for name, experts in (("chosen", chosen), ("random", _random(chosen, table, subject.seed))):
                    changed = comparison.again(
                        f"{name} experts, {strength:g}", intervene=interventions(experts, strength)
                    )
                    is_mine = mine[base.text]
                    parts = {
                        part: likelihood_change(base.nll[at], changed.nll[at], base.text[at]).change
                        for part, at in (("toward", is_mine), ("other", ~is_mine))
                    }
                    a, b = parts["toward"], parts["other"]
                    reach = np.hypot(a.estimate - a.low, b.estimate - b.low)
                    gain = float(a.estimate - b.estimate)
                    row: dict[str, Any] = {"experts": name, "strength": strength}
                    for part, found in parts.items():
                        row |= {
                            part: float(found.estimate),
                            f"{part}_low": float(found.low),
                            f"{part}_high": float(found.high),
                        }
                    row |= {"gain": gain, "gain_low": gain - reach, "gain_high": gain + reach}
                    row["same_top"] = float(np.mean(changed.top == base.top))
                    rows.append(row)
        return pd.DataFrame(rows)

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """What each strength does."""
        from moetrace import plot

        if "sweep" not in finding.tables:
            return {}
        sweep = finding.tables["sweep"]
        return {
            "sweep": Figure(
                lambda ax: plot.sweep(sweep, ax=ax),
                "How much more likely texts of the label become beside the others, by strength of the bias, with 95 %"
                " intervals over texts; and the same with experts drawn at random. Below 0: steered.",
            )
        }


def interventions(experts: pd.DataFrame, strength: float) -> list[str]:
    """Biases as ``--intervene`` takes them: favoured experts up, others down, one for each layer and direction."""
    out = []
    for (layer, kind), part in experts.groupby(["layer", "kind"], sort=True):
        value, at = strength if kind == "favoured" else -strength, int(str(layer))
        out.append(str(Intervention(Kind.BIAS, ((at, at),), tuple(part["expert"].tolist()), value)))
    return out


def _kinds(table: pd.DataFrame, alpha: float, most: int) -> list[str]:
    """``favoured``, ``against`` or "" for each row: the surest of each layer, by size of the difference."""
    sure = table["p_family"] <= alpha
    kind = np.full(len(table), "", dtype=object)
    for _, part in table[sure].groupby("layer"):
        ordered = part.sort_values("difference")
        up, down = ordered[ordered["difference"] > 0], ordered[ordered["difference"] < 0]
        kind[up.index[::-1][:most]] = "favoured"
        kind[down.index[:most]] = "against"
    return kind.tolist()


def _random(chosen: pd.DataFrame, table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """As many experts of the same layers and directions, at random among the layer's others."""
    rng = np.random.default_rng(seed)
    parts = []
    for layer, part in chosen.groupby("layer", sort=True):
        others = table[(table["layer"] == layer) & (table["kind"] == "")]["expert"].to_numpy()
        drawn = rng.permutation(others)[: len(part)]
        parts.append(part[: len(drawn)].assign(expert=drawn))
    return pd.concat(parts)
