"""How often each expert is used, by domain and overall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from moetrace.analysis import expert_frequency, expert_usage
from moetrace.analysis.published import notebook as published
from moetrace.errors import UsageError
from moetrace.findings.finding import Figure, Finding, Question, Widget, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import best, file_names, span

#: of more domains only these many are drawn, each by itself
_DRAWN = 10


@dataclass(frozen=True)
class ExpertFrequency(Question):
    """How often is each expert used, by each domain and overall?

    Every router decision counts once, and every expert is listed, also those that were never chosen. Shares of
    tokens have jackknife intervals over prompts; for an expert that was never chosen the upper end is the rule of
    three, 3/tokens. As published: the notebook's part 3 (percentages of the experts that occur, five most used by
    domain) and expert_frequency.py (ten most and five least used of each layer; "world" pools the experts of all
    layers that share a number).
    """

    name: ClassVar[str] = "expert-frequency"
    title: ClassVar[str] = "Expert frequency"
    place: ClassVar[int] = 70
    widgets: ClassVar[tuple[Widget, ...]] = (Widget("explore", replaces=("all", "domain")),)

    top: int = parameter(10, "most used experts to list per layer")
    bottom: int = parameter(5, "least used experts to list per layer")

    def answer(self, subject: Subject) -> Finding:
        """Count."""
        counts = subject.counts
        usage = expert_usage(counts.included, counts.tokens, layers=counts.layers, n_expert=subject.n_expert)
        size = usage.groupby("layer")["rank"].transform("max")
        tables: dict[str, pd.DataFrame] = {
            "usage": usage,
            "top": usage[usage["rank"] <= self.top].sort_values(["layer", "rank"], ignore_index=True),
            "bottom": usage[usage["rank"] > size - self.bottom].sort_values(
                ["layer", "rank"], ignore_index=True
            ),
            "global": _global(usage, self.top, self.bottom),
        }
        sentences = []
        share = "percent" if usage["percent_of_tokens"].isna().all() else "percent_of_tokens"
        hottest = best(usage, share)
        if hottest is not None:
            even = 100.0 / size.loc[usage["layer"] == hottest["layer"]].iloc[0]
            what = "picks" if share == "percent" else "tokens"
            told = (
                f"{hottest['percent']:.1f}"
                if share == "percent"
                else span(hottest[share], hottest["low"], hottest["high"], ".1f")
            )
            sentences.append(
                f"The most used expert of all is {hottest['expert']:.0f} of layer {hottest['layer']:.0f}: {told} % of"
                f" {what}, {hottest['percent'] / even:.1f} times an even share of the layer's picks."
            )
        unused = usage[usage["count"] == 0]
        sentences.append(
            f"{len(unused):,} of {len(usage):,} experts were never chosen"
            + (
                f"; each may still be chosen by up to {unused['high'].max():.3g} % of tokens."
                if len(unused) and unused["high"].notna().any()
                else "."
            )
        )
        caveats = ["Intervals are over prompts: they hold for prompts like these."]
        try:
            own = subject.labelled
        except UsageError as e:
            caveats.append(f"Not by domain: {e.what}.")
        else:
            frequency = expert_frequency(own.included, own.tokens, own.labels, own.layers, subject.n_expert)
            tables["expert_frequency"] = frequency
            sentences += _by_domain(frequency)
            tables |= _notebook(subject.activations)
        tables |= _script(subject.frequency)
        caveats.append(
            "As published: percentages leave unused experts out, and as_published_world adds up unrelated experts of"
            " different layers that share a number; 'global' ranks (layer, expert) instead."
        )
        return self.finding(subject, sentences, tables, [*caveats, *subject.together])

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Layer by expert, for all prompts and for each domain."""
        from moetrace import plot

        usage = finding.tables["usage"]
        counted = bool(usage["percent_of_tokens"].notna().any())
        share: plot.Measure = "percent_of_tokens" if counted else "percent"
        what = "tokens that use the expert" if counted else "picks"
        size = plot.size_of(usage["layer"].nunique())
        out = {
            "all": Figure(
                lambda ax: plot.usage(usage, measure=share, ax=ax),
                f"Share of {what}, by layer and expert, all prompts.",
                size,
            )
        }
        if "expert_frequency" in finding.tables:
            table = finding.tables["expert_frequency"]
            picks = table.groupby("domain", sort=True)["count"].sum()
            largest = picks.nlargest(_DRAWN, keep="first").index.sort_values()
            some = f", one of the {_DRAWN} of most picks among {len(picks)}" if len(picks) > _DRAWN else ""
            for name, file in zip(largest, file_names(largest), strict=True):
                out[file] = Figure(
                    lambda ax, name=name: plot.usage(table, name, measure=share, ax=ax),  # type: ignore[misc]
                    f"Share of {what}, by layer and expert, domain {name}{some}; same colours for all domains.",
                    size,
                )
        return out


def _global(usage: pd.DataFrame, top: int, bottom: int) -> pd.DataFrame:
    """The most and the least used experts of all layers, by share of their layer's picks."""
    order = usage.sort_values("percent", ascending=False, kind="stable", ignore_index=True).drop(
        columns="rank"
    )
    order = order[order["percent"].notna()]
    return pd.concat(
        [
            order.head(top).assign(place="top"),
            order.iloc[max(top, len(order) - bottom) :].assign(place="bottom"),
        ],
        ignore_index=True,
    )


def _by_domain(frequency: pd.DataFrame) -> list[str]:
    found = best(frequency, "percent")
    if found is None or frequency["domain"].nunique() < 2:
        return []
    same = frequency[(frequency["layer"] == found["layer"]) & (frequency["expert"] == found["expert"])]
    others = same[same["domain"] != found["domain"]]["percent"]
    return [
        f"The largest share within a domain: {found['domain']} gives {found['percent']:.1f} % of its picks in layer"
        f" {found['layer']:.0f} to expert {found['expert']:.0f}; other domains {others.min():.1f} to"
        f" {others.max():.1f} %. Whether that is more than prompts differ anyway is for domain-separation."
    ]


def _notebook(a: published.Activations) -> dict[str, pd.DataFrame]:
    percent, top = [], []
    component = a.components[-1]
    for layer in a.layers:
        try:
            found = published.frequency(a, layer, component)
        except UsageError:  # no activation in this layer
            continue
        counts = found.counts
        percent.append(
            pd.DataFrame(
                {
                    "layer_id": layer,
                    "domain": np.repeat(counts.index, counts.shape[1]),
                    "expert_id": np.tile(counts.columns, counts.shape[0]),
                    "count": counts.to_numpy().reshape(-1),
                    "percent": found.percent.to_numpy().reshape(-1),
                }
            )
        )
        best_five = found.top.rename_axis("domain").reset_index()
        top.append(best_five.assign(layer_id=layer))
    return {
        "as_published_percent": pd.concat(percent, ignore_index=True),
        "as_published_top5": pd.concat(top, ignore_index=True)[["layer_id", "domain", "experts", "percent"]],
    }


def _script(found: published.ExpertFrequency) -> dict[str, pd.DataFrame]:
    return {
        "as_published_totals": found.totals,
        "as_published_top": found.top,
        "as_published_bottom": found.bottom,
        "as_published_world": found.world.reset_index(drop=True),
    }
