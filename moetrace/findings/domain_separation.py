"""Whether domains use different experts, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from moetrace.analysis.domains.domain import DomainTest
from moetrace.analysis.published import notebook as published
from moetrace.findings.finding import Figure, Finding, Question, Widget, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best, of_layers, span


@dataclass(frozen=True)
class DomainSeparation(Question):
    """Do domains use different experts, how strongly, and in which layers?

    Effect: Jensen-Shannon divergence of the domains' distributions in bits, and Cramér's V, both freed of what
    prompts add by the jackknife over prompts, with 95 % intervals. Null: whole prompts are exchanged between
    domains (jsd_null_mean and jsd_null_q95 are what prompts alone produce); tested is Welch's distance of means, which
    neither long prompts nor unequal scatter mislead. q_value is Benjamini-Hochberg over
    layers, p_family max-T over layers. With one prompt per domain there is no such test: domain and prompt are
    the same thing then. As published: the notebook's parts 4 and 6, chi-square over single picks, per layer and
    component, which rejects almost always, domains or not (docs/statistics.md).
    """

    name: ClassVar[str] = "domain-separation"
    title: ClassVar[str] = "Separation of domains"
    place: ClassVar[int] = 20
    widgets: ClassVar[tuple[Widget, ...]] = (Widget("separation", "domain_test", replaces=("by_layer",)),)

    statistic: str = parameter("welch", "what is tested", choices=["welch", "jsd", "pseudo_f", "entropy"])
    permutations: int = parameter(999, "arrangements of prompts to draw")
    alpha: float = parameter(0.05, "false discoveries to allow")

    def answer(self, subject: Subject) -> Finding:
        """Test every layer."""
        found = subject.domain_test(statistic=self.statistic, n_permutations=self.permutations)
        layers, chi, top = published_separation(subject.activations)
        caveats = subject.together
        units = "groups of prompts" if caveats else "prompts"
        if found.testable:
            caveats.append(
                f"Tested with {found.n_prompts:,} {units} of {found.n_domains} domains; {units} are taken to be"
                " exchangeable if domain does not matter, so they should be alike in kind."
            )
            caveats += [*subject.exchanged, *scattered(found, self.alpha)]
            caveats.append(
                "The test asks whether labels matter at all, the interval how far apart domains of such prompts are:"
                " a few unusual prompts widen the interval, so it may reach 0 where the test rejects."
            )
        caveats += [
            "Different words alone separate domains: matched-separation compares at the same token ids.",
            "The published chi-square takes every pick for an independent observation and each of three matrices"
            " for a decision of its own; its p-values say nothing about domains.",
        ]
        tables = {
            "domain_test": found.table,
            "as_published_layers": layers,
            "as_published_chi_square": chi,
            "as_published_most_specific": top,
        }
        return self.finding(
            subject,
            sentences(found, self.alpha) + old_sentence(layers),
            tables,
            caveats,
            concludes=found.testable,
        )

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Separation by depth."""
        from moetrace import plot

        table = finding.tables["domain_test"]
        return {
            "by_layer": Figure(
                lambda ax: plot.separation(table, ax=ax, alpha=self.alpha),
                "Divergence of the domains by layer: as measured (points), corrected for bias with its 95 % interval"
                " (line and band), and what prompts alone produce (grey).",
            )
        }


def sentences(found: DomainTest, alpha: float) -> list[str]:
    """What the test says."""
    table, n = found.table, len(found.table)
    strongest = best(table, "jsd_jackknife") or best(table, "jsd_bits")
    if not found.testable:
        out = [f"Whether domains differ {found.verdict}."]
        if strongest is not None and found.n_domains > 1:
            out.append(
                f"What was seen is largest in layer {strongest['layer']:.0f}: {strongest['jsd_bits']:.3f} bits"
                f" (Cramér's V {strongest['cramers_v_corrected']:.2f}). How much of it prompts alone would give is"
                " not known."
            )
        return out
    tested = table[table["q_value"].notna()]
    differ = tested[tested["q_value"] <= alpha]
    first = (
        f"Domains differ in which experts they use {of_layers(differ['layer'], len(tested))}, at a false discovery"
        f" rate of {alpha:.0%}."
    )
    if not len(differ):
        first = (
            f"No layer shows that domains differ (smallest q = {tested['q_value'].min():.2f}"
            f" of {len(tested)} layers): that is no proof that they do not."
        )
    if found.min_p > alpha:
        first += f" So few prompts cannot give a p-value below {found.min_p:.2g}."
    out = [first]
    if strongest is not None:
        out.append(
            f"They lie furthest apart in layer {strongest['layer']:.0f}:"
            f" {span(strongest['jsd_jackknife'], strongest['jsd_low'], strongest['jsd_high'])} bits of"
            f" Jensen-Shannon divergence, Cramér's V"
            f" {span(strongest['cramers_v_jackknife'], strongest['v_low'], strongest['v_high'], '.2f')};"
            f" uncorrected {strongest['jsd_bits']:.3f} bits, where prompts alone give"
            f" {strongest['jsd_null_mean']:.3f} (95 % of arrangements below {strongest['jsd_null_q95']:.3f})."
        )
        order = table.sort_values("jsd_jackknife", ascending=False, kind="stable")["layer"].head(5)
        if n > 1:
            out.append(f"Most domain-specific layers, in order: {', '.join(f'{x:.0f}' for x in order)}.")
    return out


def scattered(found: DomainTest, alpha: float) -> list[str]:
    """Whether prompts of some domains scatter more than others'."""
    table = found.table
    wider = table[table["dispersion_q"] <= alpha]
    if not len(wider):
        return []
    return [
        f"Prompts of some domains scatter more than those of others {of_layers(wider['layer'], len(table))} (PERMDISP):"
        " Welch's statistic allows for that, the others, and tests of single experts, do not."
    ]


def old_sentence(layers: pd.DataFrame) -> list[str]:
    """What the published test would have said."""
    once = layers.drop_duplicates("layer_id")
    n = int(once["significant"].sum())
    return [f"The published chi-square calls {n} of {len(once)} layers significant (p < 0.001)."]


def published_separation(a: published.Activations) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Part 6 per component, part 4 per layer and component, and the five most domain-specific layers."""
    layers, chi, top = [], [], []
    for component in a.components:
        separation = published.layer_separation(a, component)
        separation.insert(0, "component", component)
        layers.append(separation)
        best_five = published.most_specific(separation)
        top.append(
            pd.DataFrame(
                {"component": component, "rank": range(1, len(best_five) + 1), "layer_id": best_five}
            )
        )
        for layer in separation["layer_id"].tolist():
            one = published.chi_square(a, layer, component)
            chi.append((component, layer, one.chi2, one.p_value, one.dof, one.verdict))
    return (
        pd.concat(layers, ignore_index=True),
        pd.DataFrame(chi, columns=["component", "layer_id", "chi2", "p_value", "dof", "verdict"]),
        pd.concat(top, ignore_index=True),
    )
