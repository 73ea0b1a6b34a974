"""Whether two captures of the same text choose the same experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetrace.analysis import compare_captures
from moetrace.analysis.published.notebook import gate_experts_of_rows
from moetrace.findings.finding import Figure, Finding, Question
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best, span
from moetrace.numbers import number


@dataclass(frozen=True)
class Compare(Question):
    """Do two captures of the same text choose the same experts?

    For one model at two precisions, say, or two builds of llama.cpp. Prompts are matched by id, their tokens by
    position, up to the first token that differs: from there on the contexts are not the same. overlap is the share of
    experts in common, exact the same set, top1 the same first expert, kendall_tau the order of the experts in common,
    coverage_k how many of B's best hold all of A's. Means with jackknife intervals over prompts, beside the level of
    uniform and independent routings. usage compares how the experts are used in sum over these tokens.
    As published: compare_gate_experts.py, which calls τ 1 or 0 where there is no order to compare.
    """

    name: ClassVar[str] = "compare"
    title: ClassVar[str] = "Two captures of the same text"
    place: ClassVar[int] = 210
    compares: ClassVar[bool] = True

    def answer(self, subject: Subject) -> Finding:
        """Compare them token by token."""
        one, two = subject.pair
        sides = one.whole("a comparison"), two.whole("a comparison")
        found = compare_captures(*sides)
        summary, usage, depth = found.by_layer(), found.usage(), found.by_depth()
        texts = found.texts
        a, b = (trace.path.name for trace in subject.traces)
        stopped = texts[texts["stopped_at"] >= 0]
        matched = int(texts["matched"].sum())
        sentences = []
        told = {str(row["metric"]): row for row in depth[depth["depth"] == "all"].to_dict("records")}
        overall = {name: span(row["mean"], row["low"], row["high"], ".1%") for name, row in told.items()}
        sentences.append(
            f"{b} uses {overall['overlap']} of the experts that {a} uses for the same token and layer; chance would be"
            f" {told['overlap']['chance']:.1%}. The set is the same in {overall['exact']} of cases, the first expert in"
            f" {overall['top1']}."
        )
        overlap = summary[summary["metric"] == "overlap"]
        worst, top = best(overlap, "mean", least=True), best(overlap, "mean")
        if worst is not None and top is not None and len(overlap) > 1:
            sentences.append(
                f"They agree least in layer {worst['layer']:.0f}"
                f" ({span(worst['mean'], worst['low'], worst['high'], '.1%')}), most in layer {top['layer']:.0f}"
                f" ({span(top['mean'], top['low'], top['high'], '.1%')})."
            )
        cover = best(summary[summary["metric"] == "coverage_k"], "mean")
        if cover is not None:
            k = int(found.n_expert_used.max())
            sentences.append(
                f"To hold all of {a}'s {k} experts takes the {cover['mean']:.1f} best of {b} on average in layer"
                f" {cover['layer']:.0f}, the worst."
            )
        sentences.append(
            f"Compared: {number(matched, 'token')} of {number(len(texts), 'prompt')}."
            + (
                f" The texts part in {number(len(stopped), 'prompt')}; from there on nothing is compared."
                if len(stopped)
                else " The texts are the same throughout."
            )
        )
        gap = best(usage, "jsd_bits")
        if gap is not None:
            sentences.append(
                f"In sum over these tokens usage differs most in layer {gap['layer']:.0f}:"
                f" {span(gap['jsd_jackknife'], gap['jsd_low'], gap['jsd_high'], '.4f')} bits of Jensen-Shannon"
                " divergence."
            )
        caveats = [
            *self._notes(subject, found.only_in),
            "Tokens are matched up to the first difference of a text; prompt and generated ones together (by_phase has"
            " them apart), unless --phase chooses.",
            "Chance means uniform and independent routings; two tokens of one model already agree more than that.",
        ]
        tables = {
            "summary": summary,
            "by_depth": depth,
            "by_phase": found.by_phase(),
            "usage": usage,
            "texts": texts,
        }
        published = gate_experts_of_rows(*sides, *found.rows)
        if published is not None:
            tables["as_published_aggregate"] = published
        else:
            caveats.append(
                "coverage_k and the published comparison need router logits: capture with --capture"
                " experts,weights,logits."
            )
        return self.finding(subject, sentences, tables, caveats, of_phase=False)

    def _notes(self, subject: Subject, only_in: tuple[int, int]) -> list[str]:
        notes = []
        for trace, n in zip(subject.traces, only_in, strict=True):
            if n:
                notes.append(f"{number(n, 'prompt')} only in {trace.path.name}.")
        return notes

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Agreement by layer."""
        from moetrace import plot

        table = finding.tables["summary"]
        return {
            "by_layer": Figure(
                lambda ax: plot.agreement(table, ax=ax),
                "Agreement of the two captures by layer, with 95 % intervals over prompts; dotted: chance.",
            )
        }
