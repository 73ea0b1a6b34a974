"""What was captured, and what of it is missing: what every report opens with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from moetrace.analysis.statistics import nulls
from moetrace.findings import Subject
from moetrace.findings.wording import events_lost, listed
from moetrace.trace.remarks import remarks
from moetrace.trace.trace import Trace

Weight = Literal["bad", "warn", "good", "note"]


@dataclass(frozen=True)
class Remark:
    """One sentence, and how loudly it is said: "bad" and "warn" before everything else."""

    weight: Weight
    text: str


@dataclass(frozen=True)
class Captured:
    """What was captured, for people.

    Attributes
    ----------
    names
        Of the recordings.
    facts
        (name, sentence) pairs: model, tokens, layers, experts, channels, ….
    tiles
        (number, unit) pairs: the same in a few words.
    completeness
        What became of everything that the model computed; the first remark says whether all of it is here.
    domains
        One row per domain, as :func:`moetrace.analysis.counts.overview.domains`; no rows for a count table.
    gaps
        One row per layer of which an entry is missing: ``layer``, ``present``, ``not_computed``, ``lost``.
    limits
        What these data cannot tell, whatever is asked: sentences.
    """

    names: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    tiles: tuple[tuple[str, str], ...]
    completeness: tuple[Remark, ...]
    domains: pd.DataFrame
    gaps: pd.DataFrame
    limits: tuple[str, ...]


def captured(subject: Subject, names: Sequence[str] = ()) -> Captured:
    """Gather it from the subject's traces or count table; ``names`` of these, if not their folders'."""
    if subject.table is not None:
        return _of_table(subject, tuple(names) or ("count table",))
    traces = subject.traces
    loss, domains = subject.loss, subject.domains
    facts = _facts(subject, traces)
    named = int((domains["domain"] != "").sum())
    return Captured(
        names=tuple(names) or tuple(trace.path.name for trace in traces),
        facts=facts,
        tiles=(
            (f"{sum(len(t) for t in traces):,}", "tokens"),
            (f"{domains['prompts'].sum():,}", "prompt" if domains["prompts"].sum() == 1 else "prompts"),
            (f"{named}", "domain" if named == 1 else "domains"),
            (f"{subject.counts.layers.size}", "MoE layers"),
            (dict(facts)["experts"].removeprefix("top-"), "experts per token"),
            (f"{loss.lost:,}", "entries lost"),
        ),
        completeness=_completeness(subject),
        domains=domains.assign(domain=domains["domain"].replace("", "(no label)")),
        gaps=_gaps(subject),
        limits=_limits(subject),
    )


def _of_table(subject: Subject, names: tuple[str, ...]) -> Captured:
    counts = subject.counts
    picks = int(counts.included.sum())
    layers, n_expert = counts.layers.size, counts.n_expert
    return Captured(
        names=names,
        facts=(
            ("model", "not known: a table of counts"),
            ("picks", f"{picks:,}"),
            ("layers", f"{layers}"),
            ("experts", f"{n_expert} (highest id + 1)"),
        ),
        tiles=(
            (f"{picks:,}", "picks"),
            (f"{counts.prompts.size}", "domains"),
            (f"{layers}", "MoE layers"),
            (f"{n_expert}", "experts"),
        ),
        completeness=(Remark("note", "A table of counts does not say what is missing of it."),),
        domains=pd.DataFrame(columns=["domain"]),
        gaps=pd.DataFrame(columns=["layer"]),
        limits=(
            "Whether domains differ cannot be tested: counts do not tell the prompts of a domain apart.",
            "Nothing about time, words or gate inputs: for that the tokens must be known.",
        ),
    )


def _facts(subject: Subject, traces: Sequence[Trace]) -> tuple[tuple[str, str], ...]:
    told = dict(traces[0].summary())
    channels = [c for c in traces[0].channels if all(c in trace.channels for trace in traces)]
    versions = sorted({str(t.facts.get("ggml") or "") for t in traces} - {""})
    by_phase = subject.phases.set_index("phase")["tokens"]
    names = {
        "prefill": "of prompts (prefill)",
        "decode": "generated (decode)",
        "unknown": "of unknown phase",
        "no request": "of no request (warm-up)",
    }
    seen = ", ".join(f"{n:,} {names[str(phase)]}" for phase, n in by_phase.items() if n)
    return (
        ("model", told["model"]),
        *((("contexts", contexts),) if (contexts := _contexts(traces)) else ()),
        ("tokens", seen or "none"),
        ("requests", f"{sum(len(t.requests) for t in traces):,}"),
        ("layers", told["layers"]),
        ("experts", told["experts"]),
        ("channels", ", ".join(channels)),
        *((("recorded from", f"ggml {', '.join(versions)}"),) if versions else ()),
        ("looked at here", subject.phase_note),
    )


def _contexts(traces: Sequence[Trace]) -> str:
    """Which llama contexts are shown, where a trace has several."""
    several = [trace for trace in traces if len(trace.contexts) > 1]
    return listed((f"{trace.path.name}: {trace.shown_as}" for trace in several), sep="; ")


def _completeness(subject: Subject) -> tuple[Remark, ...]:
    traces, loss, left_out = subject.traces, subject.loss, subject.left_out
    said: list[Remark] = []
    if loss.lost:
        said.append(
            Remark(
                "bad",
                f"Incomplete: {loss.told}. What is lost is missing below, not zero; if loss went with load, what is"
                " left is not a fair sample.",
            )
        )
    elif loss.complete:
        said.append(
            Remark(
                "good",
                f"Complete: all {loss.produced:,} (token, layer) entries"
                f"{' of what is shown' if left_out else ''} are accounted for, none lost.",
            )
        )
    said += [Remark("note", sentence) for sentence in left_out]
    if loss.waiting:
        said.append(
            Remark(
                "warn",
                f"{loss.rows_waiting:,} tokens are not sealed yet and not in this report:"
                " the trace is still being recorded, or its recorder died (then: moetrace recover).",
            )
        )
    if loss.events_lost:
        said.append(Remark("warn", events_lost(traces)))
    live = [trace.path.name for trace in traces if trace.live]
    if live and not loss.waiting:
        said.append(Remark("warn", f"Not closed: {listed(live)}. This is what it held when it was read."))
    told: dict[str, list[str]] = {}
    for trace in traces:
        for text in remarks(trace.store):
            told.setdefault(text, []).append(trace.path.name)
    said += [Remark("warn", f"{listed(names)}: {text}.") for text, names in told.items()]
    for trace in traces:
        for part in trace.parts:
            if status := part.facts.get("status"):
                said.append(Remark("bad", f"The tracer stopped early: {status}"))
        losses = {name: trace.in_context(name).loss for name in trace.contexts if name not in trace.shown}
        others = [name for name, loss_there in losses.items() if loss_there.lost or loss_there.events_lost]
        if others:
            said.append(
                Remark(
                    "warn",
                    f"Other contexts of {trace.path.name} lost entries or events: {listed(others)}.",
                )
            )
    if loss.not_computed:
        said.append(
            Remark(
                "note",
                f"{loss.not_computed:,} entries ({loss.not_computed / loss.produced:.1%}) do not exist:"
                " llama.cpp computes the last layer only for tokens whose output is asked for.",
            )
        )
    if loss.cached:
        said.append(
            Remark(
                "note",
                f"{loss.cached:,} prompt positions came from the prompt cache: the model did not compute them, so"
                " there is nothing to record.",
            )
        )
    return tuple(said)


def _gaps(subject: Subject) -> pd.DataFrame:
    table = subject.entries.groupby("layer")[["present", "not_computed", "lost"]].sum().reset_index()
    table["lost"] += subject.loss.rows_lost
    missing = (table["not_computed"] > 0) | (table["lost"] > 0)
    return table[missing].reset_index(drop=True)


def _limits(subject: Subject) -> tuple[str, ...]:
    said = []
    counts = subject.counts
    labelled = counts.labelled()
    if not labelled.prompts.size:
        said.append(
            "Nothing can be said about domains: no request has a label (a `label` in each line of the prompts"
            " file: moetrace drive -f)."
        )
    else:
        chance_of = nulls.feasibility(nulls.Domains.of(labelled.labels))
        if not chance_of.testable:
            said.append(
                f"Whether domains differ {chance_of.reason}."
                " Record several prompts per domain, at least 3 and better 8."
            )
    if counts.prompts.size == 1:
        said.append(
            "Everything below is about one prompt: no interval over prompts can be given, and nothing carries"
            " over to other texts."
        )
    if lost := subject.loss.lost:
        said.append(f"Nothing is known of the {lost:,} entries that were lost.")
    return tuple(said)
