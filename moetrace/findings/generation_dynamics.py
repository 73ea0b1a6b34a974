"""How routing changes while a text is generated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from moetrace.analysis.domains.domain import domain_test
from moetrace.analysis.dynamics import generation as dynamics
from moetrace.analysis.dynamics import temporal
from moetrace.analysis.published import dynamics as published
from moetrace.errors import MoetraceError, UsageError
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import of_layers, p_value, span
from moetrace.numbers import number

_Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class GenerationDynamics(Question):
    """How does the choice of experts move on from token to token?

    Overlap of the sets and sameness of the first expert by lag and layer, handoffs per token, both against the same
    prompts' tokens in random order; early tokens against late ones (null: the same prompts read backwards), and whether
    that is a change or a drift; prompt tokens against generated ones; and, where prompts carry an answer (key
    ``answer`` of their line), right against wrong outputs. First asked by the chuk-mlx experiment on expert dynamics
    (consistency .459, 20.8 handoffs per token, phases everywhere); the as_published tables follow its formulas.
    """

    name: ClassVar[str] = "generation-dynamics"
    title: ClassVar[str] = "Dynamics of generation"
    place: ClassVar[int] = 160
    slow: ClassVar[int] = 2

    max_lag: int = parameter(8, "lags to list, up to 32")
    min_steps: int = parameter(8, "shortest phase")
    alpha: float = parameter(0.05, "level of the tests")
    permutations: int = parameter(199, "rearrangements to draw")
    max_tokens: int = parameter(8000, "whole prompts are drawn until they hold so many tokens, for the tests")

    def answer(self, subject: Subject) -> Finding:
        """Answer it."""
        routing = subject.routing
        text = routing.text
        persistence = temporal.persistence(routing.order_counts)
        persistence = persistence[persistence["lag"] <= self.max_lag].reset_index(drop=True)
        changes = dynamics.handoffs(routing.order_counts)
        phases = dynamics.generation_phases(
            text,
            min_steps=self.min_steps,
            alpha=self.alpha,
            n_permutations=self.permutations,
            max_rows=self.max_tokens,
            seed=subject.seed,
        )
        tables: _Tables = {
            "persistence": persistence,
            "handoffs": changes,
            "phases": phases.common,
            "phase_curve": phases.curve,
        }
        said = _of_handoffs(changes) + _of_phases(phases, self.min_steps)
        caveats: list[str] = []
        if len(subject.traces) == 1:
            tables["order_test"] = temporal.shuffle_chosen(
                replace(routing.whole("a shuffle test"), later=True),
                max_lag=min(self.max_lag, 8),
                n_permutations=self.permutations,
                max_rows=self.max_tokens,
                seed=subject.seed,
            )
        else:
            caveats.append(
                "Whether the order of tokens matters was not tested (order_test): that takes one trace; ask about them"
                " one by one."
            )
        tables |= self._phases_of_work(subject, said, caveats)
        tables |= self._answers(subject, said, caveats)
        for primary in ("router", "arbitrary"):
            old_one = published.as_published_dynamics(text, primary=primary, seed=subject.seed)
            row = pd.DataFrame(
                {
                    "primary": [primary],
                    "consistency": [old_one.consistency],
                    "handoffs_per_token": [old_one.handoffs_per_token],
                    "phase_boundaries_per_step": [old_one.boundary_rate],
                }
            )
            old = tables.get("as_published_summary")
            tables["as_published_summary"] = row if old is None else pd.concat([old, row], ignore_index=True)
            tables[f"as_published_stability_{primary}"] = old_one.layers
        caveats.append(
            "As published, a phase boundary compares k experts with up to 3k of the window before, so that it fires"
            " almost always; the published primary expert is an arbitrary one of the chosen (row `arbitrary`)."
        )
        return self.finding(
            subject,
            said,
            tables,
            [*caveats, *subject.first, *subject.drawn, *subject.read],
            concludes=bool(changes.iloc[-1]["pairs"]),
        )

    def _phases_of_work(self, subject: Subject, said: list[str], caveats: list[str]) -> _Tables:
        try:
            prefill, decode = subject.in_phase("prefill").text, subject.in_phase("decode").text
        except UsageError as e:
            caveats.append(f"Prompt and generated tokens cannot be compared: {e.what}.")
            return {}
        table = dynamics.phase_comparison(
            prefill, decode, n_permutations=max(self.permutations, 199), seed=subject.seed
        )
        known = table[table["p_family"].notna() | table["p_value"].notna()]
        apart = known[known["p_family"].fillna(known["p_value"]) <= self.alpha]
        if known.empty:
            said.append(
                "Fewer than two prompts have both prompt and generated tokens: the two cannot be compared."
            )
        else:
            said.append(
                f"Prompt tokens use other experts than generated ones {of_layers(apart['layer'], len(known))}"
                f" (prompt by prompt; the texts differ too)."
            )
        return {"prefill_decode": table}

    def _answers(self, subject: Subject, said: list[str], caveats: list[str]) -> _Tables:
        answers = subject.routing.request_column("answer")
        if not answers:
            caveats.append(
                "Right and wrong outputs were not compared: no prompt has an `answer` (a key of its line in the prompts"
                " file, as in questions.jsonl of moetrace's data)."
            )
            return {}
        try:
            decode = subject.in_phase("decode")
            text = decode.text
            pieces = decode.pieces(text)
        except MoetraceError as e:
            caveats.append(f"Right and wrong outputs were not compared: {e.what}.")
            return {}
        rows = []
        for i, name in enumerate(text.prompts):
            if name in answers:
                a, b = text.starts[i], text.starts[i + 1]
                output = b"".join(pieces[a:b]).decode("utf-8", "replace")
                rows.append((name, str(answers[name]), output, dynamics.answers_match(output, answers[name])))
        outputs = pd.DataFrame(rows, columns=["prompt", "answer", "output", "right"])
        n_right = int(outputs["right"].sum())
        said.append(f"{n_right} of {len(outputs)} outputs hold the expected answer.")
        tables: _Tables = {"answers": outputs}
        counts = decode.prompt_counts
        where = np.flatnonzero(np.isin(counts.prompts, outputs["prompt"].to_numpy(dtype=np.str_)))
        mine = counts.of(where)
        right = outputs.set_index("prompt")["right"].reindex(mine.prompts.tolist()).to_numpy(dtype=bool)
        strata = mine.labels if (mine.labels != "").all() else None
        options: dict[str, Any] = {"n_permutations": max(self.permutations, 199), "seed": subject.seed}
        try:
            features = dynamics.correctness_features(mine, right.tolist(), strata=strata, **options)
        except UsageError as e:
            caveats.append(f"Right and wrong outputs cannot be compared: {e.what}.")
            return tables
        test = domain_test(
            mine.included, np.where(right, "right", "wrong"), layers=mine.layers, strata=strata, **options
        )
        tables |= {"right_wrong": features, "right_wrong_layers": test.table}
        some = features[features["p_family"] <= self.alpha]
        apart = test.table[test.table["p_family"] <= self.alpha]
        said.append(
            "Right outputs differ from wrong ones in "
            + (", ".join(some["feature"]) if len(some) else "none of " + ", ".join(features["feature"]))
            + (
                f"; their experts differ {of_layers(apart['layer'], len(test.table))}"
                if test.testable
                else f"; whether their experts differ {test.verdict}"
            )
            + (" (right and wrong exchanged within labels)." if strata is not None else ".")
        )
        return tables

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """The divergence at each step, and persistence by layer."""
        from moetrace import plot

        curve, changes = finding.tables["phase_curve"], finding.tables["handoffs"]
        return {
            "phases": Figure(
                lambda ax: plot.phases(curve, ax=ax),
                "How far usage before a step differs from usage after it.",
            ),
            "handoffs": Figure(
                lambda ax: plot.handoffs(changes, ax=ax),
                "How often the first expert changes, and would in random order.",
            ),
        }


def _of_handoffs(table: pd.DataFrame) -> list[str]:
    row = table.iloc[-1].to_dict()
    if not row["pairs"]:
        return ["There are no neighbouring tokens, so nothing can be said about handoffs."]
    n_layers = len(table) - 1
    fewer = table.iloc[:-1]
    known = fewer[fewer["low"].notna()]
    stay = known[known["low"] > 0]
    longer = (
        f"Experts stay longer than in random order {of_layers(stay['layer'], len(known))} (95 % intervals of each"
        " layer, not corrected for many layers)."
        if len(known)
        else "With a single prompt there is no interval: whether experts stay longer than in random order is not known."
    )
    return [
        f"The first expert changes in {row['handoffs']:.2f} of {number(n_layers, 'layer')} from one token to the next;"
        f" in random order it would in {row['shuffle']:.2f}:"
        f" {span(row['fewer'], row['low'], row['high'], '.2f')} fewer.",
        longer,
    ]


def _of_phases(phases: dynamics.Phases, min_steps: int) -> list[str]:
    tested = phases.common[phases.common["p_value"].notna()]
    if tested.empty:
        return ["The texts are too short for phases."]
    found = tested[tested["p_value"] <= tested["level"]]
    first = tested.iloc[0].to_dict()
    if not len(found):
        return [
            "No difference between early and late tokens that prompts have in common was found: the largest, at step"
            f" {first['change']}, is {first['jsd_bits']:.3f} bits, where chance gives up to {first['null_bits']:.3f}"
            f" ({p_value(first['p_value'])})."
        ]
    rows = found.to_dict("records")
    return [_of_change({str(k): v for k, v in row.items()}, i, min_steps) for i, row in enumerate(rows)]


def _of_change(row: dict[str, Any], place: int, min_steps: int) -> str:
    where = f"step {row['change']} (95 %: {row['low']} to {row['high']})"
    if row["low"] <= row["start"] + min_steps:
        where += " or before"
    what = {
        "change": f"a change at {where} fits prompts that were held out better than a drift",
        "drift": "a steady drift fits prompts that were held out better than a change at any step",
        "either": f"whether at a step, {where}, or steadily these prompts do not say",
    }[row["fits"]]
    stretch = "" if place == 0 else f" of steps {row['start']} to {row['end'] - 1}"
    share = (
        ""
        if np.isnan(row["share"])
        else f", in about {row['share']:.0%} of the prompts ({row['share_low']:.0%} to {row['share_high']:.0%})"
    )
    return (
        f"Early and late tokens{stretch} are routed differently{share}: {what} ({row['jsd_bits']:.3f} bits,"
        f" {row['null_bits']:.3f} by chance; {p_value(row['p_value'])})."
    )
