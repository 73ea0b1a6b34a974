"""What was captured, and how completely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from moetrace.analysis.published import notebook as published
from moetrace.errors import MoetraceError, UsageError
from moetrace.findings.finding import Finding, Question
from moetrace.findings.subject import Subject
from moetrace.findings.wording import events_lost, listed, not_computed
from moetrace.numbers import number
from moetrace.trace import naming


@dataclass(frozen=True)
class Overview(Question):
    """What was captured, how completely, of which phases and domains?

    Everything that the model computed is accounted for: an entry (token, layer) is present, not computed by
    llama.cpp (the last layer of tokens that need no output), lost, or not sealed yet. Positions that the prompt
    cache served were not computed and stand beside this sum. ``independent`` counts a domain's prompts of the phase
    looked at, copies of a text and turns of a conversation once. As published: the notebook's part 2, which counts
    each router decision once per expert matrix.
    """

    name: ClassVar[str] = "overview"
    title: ClassVar[str] = "What was captured"
    place: ClassVar[int] = 10

    def answer(self, subject: Subject) -> Finding:
        """Count rows, entries, requests, prompts."""
        if subject.table is not None:
            return self._of_table(subject)
        if not subject.traces:
            raise UsageError("there is no trace to look at", fix="give at least one")
        routing = subject.routing
        loss, phases, domains, layers = subject.loss, subject.phases, subject.domains, subject.entries
        completeness = pd.DataFrame(
            [
                ("produced", loss.rows_produced, loss.produced),
                ("present", loss.rows, loss.present),
                ("not computed", None, loss.not_computed),
                ("lost", loss.rows_lost, loss.lost),
                ("not sealed yet", loss.rows_waiting, loss.waiting),
                ("served from the prompt cache", loss.cached, None),
                ("events lost", loss.events_lost, None),
            ],
            columns=["what", "rows", "entries"],
        ).astype({"rows": "Int64", "entries": "Int64"})
        n_prompts = int(domains["prompts"].sum())
        labelled = domains[domains["domain"] != ""]
        known = phases.set_index("phase")["tokens"]
        by_phase = ", ".join(f"{n:,} {name}" for name, n in known.items() if n)
        experts = "/".join(map(str, sorted(set(layers["n_expert"]))))
        used = "/".join(map(str, sorted(set(layers["n_expert_used"]))))
        whole = f"{loss.told.capitalize()}{' of what is shown' if subject.left_out else ''}"
        sentences = [
            f"{number(loss.rows, 'token')} of {number(n_prompts, 'prompt')} in {number(len(layers), 'layer')}"
            f"{f' with top-{used} routing among {experts} experts' if used != '0' else ', without experts'}. {whole};"
            f" {loss.not_computed:,} entries were not"
            f" computed by llama.cpp, {loss.cached:,} positions came from the prompt cache.",
            f"Tokens by phase: {by_phase or 'none'}.",
        ]
        if len(labelled):
            per = labelled["prompts"]
            each = f"{per.min()}" if per.min() == per.max() else f"{per.min()} to {per.max()}"
            plural = "" if each == "1" else "s"
            sentences.append(
                f"{number(len(labelled), 'domain')} ({listed(labelled['domain'])}), {each} prompt{plural} each."
            )
        caveats = [*subject.left_out]
        if loss.events_lost:
            caveats.append(events_lost(subject.traces))
        for trace in subject.traces:
            if len(trace.shown) > 1:
                sentences.append(
                    f"{len(trace.shown)} contexts of {trace.path.name} are taken together: {listed(trace.shown)}."
                )
        kinds = {text for t in subject.traces if (text := str(naming.said(t.facts).get("description") or ""))}
        files = {text for t in subject.traces if (text := naming.fingerprint(t.facts, "weights"))}
        if len(kinds) > 1:
            caveats.append(f"The traces are of different files of the model: {listed(sorted(kinds))}.")
        elif len(files) > 1:
            caveats.append(
                f"The traces are of {len(files)} different files of the model, with the same routers."
            )
        if text := not_computed(layers):
            caveats.append(text)
        missing = [name for t in subject.traces for name in t.meta.get("import", {}).get("missing", [])]
        if missing:
            caveats.append(
                f"Imported: the source does not say {', '.join(dict.fromkeys(missing))}"
                + (
                    ", so an expert that was never chosen may not be counted."
                    if "n_expert" in missing
                    else "."
                )
            )
        independent = pd.Series(list(routing.domains), dtype=object).value_counts()
        domains = domains.assign(independent=domains["domain"].map(independent).fillna(0).astype("int64"))
        tables = {"completeness": completeness, "phases": phases, "domains": domains, "layers": layers}
        try:
            tables |= published_overview(subject.activations)
        except MoetraceError as e:
            caveats.append(f"The published overview cannot be given: {e.what}.")
        return self.finding(subject, sentences, tables, caveats)

    def _of_table(self, subject: Subject) -> Finding:
        counts = subject.counts
        picks = counts.included.sum(axis=2)
        domains = pd.DataFrame({"domain": counts.prompts, "picks": picks.sum(axis=1)})
        layers = pd.DataFrame(
            {"layer": counts.layers, "n_expert": counts.n_expert, "picks": picks.sum(axis=0)}
        )
        sentence = (
            f"A table of {picks.sum():,} picks: {number(len(domains), 'domain')}"
            f" ({listed(domains['domain'])}), {number(len(layers), 'layer')}, {counts.n_expert} experts."
        )
        caveats = [
            "Without prompts there are values, but neither intervals nor tests; without tokens nothing about"
            " time, words or gate inputs.",
            "The number of experts is the highest id in the table + 1.",
        ]
        tables = {"domains": domains, "layers": layers}
        return self.finding(subject, [sentence], tables | published_overview(subject.activations), caveats)


def published_overview(a: published.Activations) -> dict[str, pd.DataFrame]:
    """Part 2 of the notebook as tables."""
    seen = published.overview(a)
    facts = pd.DataFrame(
        [
            ("activations", seen.activations),
            ("domains", seen.n_domains),
            ("layers", len(seen.layers)),
            ("components", len(seen.components)),
            ("experts", seen.n_experts),
            ("lowest expert", seen.expert_range[0]),
            ("highest expert", seen.expert_range[1]),
            ("tokens per domain", seen.tokens_per_domain),
            ("fewest activations of a layer", seen.least[0]),
            ("in layer", seen.least[1]),
            ("most activations of a layer", seen.most[0]),
            ("in layer", seen.most[1]),
            ("mean activations of a layer", seen.mean_per_layer),
        ],
        columns=["what", "value"],
    )
    per_domain = seen.per_domain.rename("activations").rename_axis("domain").reset_index()
    per_layer = seen.per_layer.rename("activations").rename_axis("layer_id").reset_index()
    return {
        "as_published_overview": facts,
        "as_published_per_domain": per_domain,
        "as_published_per_layer": per_layer,
    }
