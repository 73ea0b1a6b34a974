"""Whether domains differ at the same words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetrace.analysis import matched_separation
from moetrace.findings.finding import Figure, Finding, Method, Question, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best, of_layers, span


@dataclass(frozen=True)
class MatchedSeparation(Question):
    """Do domains differ beyond their words: at the same token ids?

    The share of an expert at an occurrence of a token id in a prompt is modelled as an effect of the id plus one of
    the prompt; the prompts' effects, words taken out, are compared between domains. Null: their independent
    coordinates in any order. q_value is Benjamini-Hochberg over layers, p_family max-T. Token ids that one prompt
    alone uses tell nothing: coverage says how much of the text is left. OpenMoE (arXiv 2402.01739) found a "code
    expert" that = and \\n explained; this is the question that asks.
    """

    name: ClassVar[str] = "matched-separation"
    title: ClassVar[str] = "Separation at the same words"
    place: ClassVar[int] = 30
    methods: ClassVar[tuple[Method, ...]] = (
        Method(
            "matched",
            "Words or domains?",
            r"matched|token ids?|vocabular\w+",
            "Domains use different words, and routing follows words. Separation at matched token ids compares only how"
            " the same token is routed in different domains; its coverage says how much of the text that is.",
        ),
    )

    permutations: int = parameter(999, "arrangements to draw")
    alpha: float = parameter(0.05, "false discoveries to allow")

    def answer(self, subject: Subject) -> Finding:
        """Test every layer."""
        counts = subject.routing.token_counts
        found = matched_separation(counts, n_permutations=self.permutations, seed=subject.seed)
        table = found.table
        tested = table[table["p_value"].notna()]
        sentences = []
        is_open = bool(found.verdict) and not len(tested)
        if is_open:
            sentences.append(f"Whether domains differ beyond their words {found.verdict}.")
        else:
            differ = tested[tested["q_value"] <= self.alpha]
            if len(differ):
                sentences.append(
                    f"At the same token ids, domains differ {of_layers(differ['layer'], len(tested))}, at a false"
                    f" discovery rate of {self.alpha:.0%}: not only their words route differently."
                )
            else:
                sentences.append(
                    "At the same token ids no layer shows that domains differ (smallest q ="
                    f" {tested['q_value'].min():.2f}): their words may be all the difference."
                )
            strongest = best(tested, "jsd_matched_jackknife") or best(tested, "jsd_matched_bits")
            if strongest is not None:
                effect = span(*(strongest[f"jsd_matched_{name}"] for name in ("jackknife", "low", "high")))
                sentences.append(
                    f"It is largest in layer {strongest['layer']:.0f}: {effect} bits with the words taken out;"
                    f" uncorrected {strongest['jsd_matched_bits']:.3f}, where prompts alone give"
                    f" {strongest['jsd_matched_null_mean']:.3f}."
                )
        if found.coverage == found.coverage:
            sentences.append(
                f"{found.coverage:.0%} of the tokens stand at ids that more than one prompt uses;"
                f" {found.n_prompts} prompts are connected by such ids."
            )
        caveats = [
            "A token id is taken to route alike wherever it stands, but for its prompt: context that goes with a domain"
            " counts as domain. Published analyses have nothing of the kind.",
        ]
        n_labelled = len(subject.routing.labelled_prompts)
        if counts.prompts.size < n_labelled:
            caveats.append(
                f"Words were compared in {counts.prompts.size:,} of {n_labelled:,} prompts, drawn at random, as many of"
                " each domain as there are."
            )
        if found.verdict and len(tested):
            caveats.append(f"Some layers {found.verdict}.")
        return self.finding(subject, sentences, {"matched_separation": table}, caveats, concludes=not is_open)

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Separation with and without the words' part."""
        from moetrace import plot

        table = finding.tables["matched_separation"]
        return {
            "by_layer": Figure(
                lambda ax: plot.matched_separation(table, ax=ax, alpha=self.alpha),
                "Divergence of the domains by layer, as they are and with the words taken out, beside what prompts"
                " alone produce at the same words.",
            )
        }
