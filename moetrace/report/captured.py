"""What was captured, and what of it is missing: what every report opens with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from moetrace.analysis import nulls
from moetrace.findings import Subject
from moetrace.trace.loss import Loss
from moetrace.trace.record import State
from moetrace.trace.requests import Phase
from moetrace.trace.trace import Trace

_CHUNK = 1 << 18

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
        Of the traces.
    facts
        (name, sentence) pairs: model, tokens, layers, experts, channels, requests.
    completeness
        What became of everything that the model computed; the first remark says whether all of it is here.
    loss
        The same as numbers, over all traces.
    domains
        One row per label, then one for requests without: ``domain``, ``prompts``, ``prompt_tokens``,
        ``generated_tokens``, ``tokens_of_unknown_phase``.
    gaps
        One row per layer of which an entry is missing: ``layer``, ``present``, ``not_computed``, ``lost``.
    limits
        What these data cannot tell, whatever is asked: sentences.
    """

    names: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    completeness: tuple[Remark, ...]
    loss: Loss
    domains: pd.DataFrame
    gaps: pd.DataFrame
    limits: tuple[str, ...]


def captured(subject: Subject) -> Captured:
    """Gather it from the subject's traces; every state and phase is counted, chunk by chunk."""
    traces = subject.traces
    loss = sum((trace.loss for trace in traces[1:]), traces[0].loss)
    return Captured(
        names=tuple(trace.path.name for trace in traces),
        facts=_facts(traces),
        completeness=_completeness(traces, loss),
        loss=loss,
        domains=_domains(traces),
        gaps=_gaps(traces),
        limits=_limits(subject, loss),
    )


def _facts(traces: Sequence[Trace]) -> tuple[tuple[str, str], ...]:
    first = traces[0]
    told = dict(first.summary())
    model = told["model"]
    tokens = sum(len(trace) for trace in traces)
    decoded = sum(int(np.count_nonzero(np.asarray(t.phase) == Phase.DECODE)) for t in traces)
    channels = [c for c in first.channels if all(c in trace.channels for trace in traces)]
    versions = sorted({str(t.facts.get("runtime") or "") for t in traces} - {""})
    return (
        ("model", model),
        ("tokens", f"{tokens:,}, {decoded:,} of them generated (decode)"),
        ("requests", f"{sum(len(t.requests) for t in traces):,}"),
        ("layers", told["layers"]),
        ("experts", told["experts"]),
        ("channels", ", ".join(channels)),
        *((("recorded from", ", ".join(versions)),) if versions else ()),
    )


def _completeness(traces: Sequence[Trace], loss: Loss) -> tuple[Remark, ...]:
    said: list[Remark] = []
    if loss.lost:
        rows = f"{loss.rows_lost:,} of {loss.rows_produced:,} tokens" if loss.rows_lost else ""
        entries = f"{loss.lost:,} of {loss.produced:,} (token, layer) entries"
        said.append(
            Remark(
                "bad",
                f"Incomplete: {' and with them '.join(filter(None, (rows, entries)))}"
                f" ({loss.lost / loss.produced:.2%}) were lost. They are missing below, not zero; if loss went"
                " with load, what is left is not a fair sample.",
            )
        )
    elif not loss.waiting:
        said.append(
            Remark("good", f"Complete: all {loss.produced:,} (token, layer) entries are accounted for, none lost.")
        )
    if loss.waiting:
        said.append(
            Remark(
                "warn",
                f"{loss.rows_waiting:,} tokens are not sealed yet and not in this report:"
                " the trace is still being recorded, or its recorder died (then: moetrace recover).",
            )
        )
    live = [trace.path.name for trace in traces if trace.live]
    if live and not loss.waiting:
        said.append(Remark("warn", f"Not closed: {', '.join(live)}. This is what it held when it was read."))
    for trace in traces:
        if status := trace.facts.get("status"):
            said.append(Remark("bad", f"The tracer stopped early: {status}"))
        others = [name for name in trace.contexts if name != trace.name and trace.in_context(name).loss.lost]
        if others:
            said.append(Remark("warn", f"Other contexts of {trace.path.name} lost entries: {', '.join(others)}."))
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


def _domains(traces: Sequence[Trace]) -> pd.DataFrame:
    names = ["prompt_tokens", "generated_tokens", "tokens_of_unknown_phase"]
    tokens: dict[str | None, np.ndarray] = {}
    prompts: dict[str | None, set[object]] = {}
    for t, trace in enumerate(traces):
        requests = trace.requests
        for number, label, given in zip(requests.index, requests["label"], requests["id"], strict=True):
            key = None if label is None or pd.isna(label) else str(label)
            prompts.setdefault(key, set()).add((t, number) if given is None or pd.isna(given) else str(given))
        for start in range(0, len(trace), _CHUNK):
            piece = slice(start, start + _CHUNK)
            request = np.asarray(trace.request[piece])
            codes, labels = trace.label_codes(request)
            mine = request >= 0
            table = np.zeros((len(labels) + 1, 3), np.int64)
            np.add.at(table, (codes[mine], np.minimum(np.asarray(trace.phase[piece])[mine], 2)), 1)
            for key, row in zip([*labels, None], table, strict=True):
                tokens[key] = tokens.get(key, np.zeros(3, np.int64)) + row
    keys = [*sorted(key for key in prompts if key is not None), *([None] if None in prompts else [])]
    rows = [
        {"domain": "(no label)" if key is None else key, "prompts": len(prompts[key])}
        | dict(zip(names, tokens.get(key, np.zeros(3, np.int64)).tolist(), strict=True))
        for key in keys
    ]
    table = pd.DataFrame(rows, columns=["domain", "prompts", *names])
    return table if table[names[2]].any() else table.drop(columns=names[2])


def _gaps(traces: Sequence[Trace]) -> pd.DataFrame:
    layers = traces[0].layers
    states = np.zeros((len(layers), 256), np.int64)
    for trace in traces:
        if list(trace.layers) != list(layers):
            continue
        for start in range(0, len(trace), _CHUNK):
            piece = np.asarray(trace.state[start : start + _CHUNK])
            for i in range(len(layers)):
                states[i] += np.bincount(piece[:, i], minlength=256)
    lost_rows = sum(trace.loss.rows_lost for trace in traces)
    table = pd.DataFrame(
        {
            "layer": np.asarray(layers),
            "present": states[:, State.PRESENT],
            "not_computed": states[:, State.NOT_COMPUTED],
            "lost": states[:, State.LOST] + lost_rows,
        }
    )
    missing = (table["not_computed"] > 0) | (table["lost"] > 0)
    return table[missing].reset_index(drop=True)


def _limits(subject: Subject, loss: Loss) -> tuple[str, ...]:
    said = []
    counts = subject.analysis.counts
    labelled = counts.labelled()
    if not labelled.prompts.size:
        said.append("Nothing can be said about domains: no request has a label (moetrace drive --label-key).")
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
    if loss.lost:
        said.append(f"What the {loss.lost:,} lost entries would have shown.")
    return tuple(said)
