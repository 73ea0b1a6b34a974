"""What is asked about: recordings of a model, the phase to look at, and the model where there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis import DomainTest, Routing, RoutingCounts, domain_test, from_trace
from moetrace.analysis.counts import overview, parts
from moetrace.analysis.counts.chosen import PHASES, Phase
from moetrace.analysis.counts.from_trace import LABEL_THEM, NO_DOMAIN
from moetrace.analysis.domains.lengths import WIDTH, LengthClasses, length_classes
from moetrace.analysis.published.notebook import (
    Activations,
    ExpertFrequency,
    activations,
    frequency_of_rows,
    frequency_of_table,
)
from moetrace.analysis.statistics.nulls import ONE_ARRANGEMENT
from moetrace.errors import MoetraceError, UsageError
from moetrace.findings.wording import listed
from moetrace.model.file import ModelFile
from moetrace.model.identity import refuse_other_model
from moetrace.numbers import number
from moetrace.trace import naming
from moetrace.trace.fleet import Traces
from moetrace.trace.importers.counts import CountTable
from moetrace.trace.loss import Loss
from moetrace.trace.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Mapping

NO_PROMPTS = "cannot be tested: counts do not tell the prompts of a domain apart"
OF_LENGTH = (
    "cannot be told from the length of their prompts: no two of different domains are as long as each other"
)

#: which rows are looked at, as a sentence
PHASE_NOTES: dict[Phase, str] = {
    "decode": "These are generated tokens (decode).",
    "prefill": "These are prompt tokens (prefill).",
    "unknown": "The recording does not say which tokens are of the prompt: all are looked at together.",
    "all": "Prompt and generated tokens are pooled, although they route differently.",
}
# Decode rows first: what was generated. A recording by others may not know its phases.
_PHASES: tuple[Phase, ...] = ("decode", "prefill", "unknown")


class Subject:
    """Traces, taken together, and what else a question may need.

    Parameters
    ----------
    traces
        One, or several of one model, which are put in the order of their recording; or a single count table, of
        which :attr:`table` then tells and :attr:`traces` is empty.
    names
        One per trace, for its requests without an id; by default those of :class:`~moetrace.trace.fleet.Traces`.
    phase
        Which rows to look at; None: decode where there are such rows, else prefill, else those of unknown
        phase. :attr:`phase` says which it is, :attr:`phase_note` why.
    model
        GGUF file (any part of a model in parts), for questions that need it.
    model_options
        Keyword arguments of :class:`moetrace.host.llama.Llama`, for questions that run the model.
    seed
        Of permutations and bootstraps: the same seed gives the same numbers.
    layers
        Numbers of the layers to look at; all if not given.
    strata
        Among which prompts tests exchange domains: "auto", those as long as each other if domains differ in length;
        "length", those in any case; "none", all; else those of which clients said the same under this key.
    group_key
        What tells which prompts are one observation, as :func:`~moetrace.analysis.from_trace` takes it.
    executor
        Where traces are read and counted, as :func:`~moetrace.analysis.from_trace` takes it. :meth:`prepare` and
        :meth:`settle` do all of it that questions need.
    progress
        Told what is being done, while traces are counted, or the model is run many times.

    Raises UsageError for a count table that is not alone, and InputError for a file that is not the traces' model.
    """

    def __init__(
        self,
        traces: Trace | CountTable | Sequence[Trace | CountTable],
        *,
        names: Sequence[str] | None = None,
        phase: Phase | None = None,
        model: Path | None = None,
        model_options: Mapping[str, Any] | None = None,
        seed: int = 0,
        layers: Sequence[int] | None = None,
        group_key: str | None = None,
        strata: str = "auto",
        executor: Executor | None = None,
        progress: Callable[[str], None] = lambda what: None,
    ) -> None:
        if names is None and isinstance(traces, Traces):
            names = traces.names
        traces = [traces] if isinstance(traces, Trace | CountTable) else traces
        tables = [given for given in traces if isinstance(given, CountTable)]
        if tables and len(traces) > 1:
            raise UsageError("a count table stands alone", fix="ask about it by itself")
        self.table = tables[0] if tables else None
        self._given = tuple(given for given in traces if not isinstance(given, CountTable))
        # answers do not depend on the order in which traces are named
        order = sorted(range(len(self._given)), key=lambda i: _identity(self._given[i]))
        self.traces = tuple(self._given[i] for i in order)
        self.layers = None if layers is None else list(layers)
        self.model = model
        if model is not None:
            with ModelFile(model) as file:
                for trace in self.traces:
                    refuse_other_model(file, trace.facts, trace.path)
                self.model = file.parts[0]  # the part that llama.cpp loads a model by
        self.model_options = dict(model_options or {})
        self.seed = seed
        self.group_key = group_key
        self.executor = executor
        self._strata = strata
        self._routings: dict[Phase, Routing] = {}
        self.progress = progress
        self._names = None if names is None else [names[i] for i in order]
        self._phase = phase

    @property
    def trace(self) -> Trace:
        """The trace. Raises UsageError if there is not exactly one."""
        if len(self.traces) != 1:
            if self.table is not None:
                raise UsageError("a count table has no tokens", fix="give a recording of tokens")
            raise UsageError(
                f"this question takes one trace, not {len(self.traces)}",
                fix="ask about them one by one" if self.traces else "give a trace",
            )
        return self.traces[0]

    @property
    def parts(self) -> tuple[Trace, ...]:
        """The contexts of all traces, one by one: their columns are views (:attr:`Trace.parts`)."""
        return tuple(part for trace in self.traces for part in trace.parts)

    @cached_property
    def loss(self) -> Loss:
        """What became of everything that the model computed, in all traces."""
        return parts.total(_loss, self.traces, self.executor)

    @cached_property
    def phases(self) -> pd.DataFrame:
        """Tokens and entries by phase: :func:`moetrace.analysis.counts.overview.phases` of all traces."""
        each = parts.each(_phases, self.parts, self.executor)
        return pd.concat(list(each)).groupby("phase", sort=False).sum().reset_index()

    @cached_property
    def domains(self) -> pd.DataFrame:
        """Prompts by domain: :func:`moetrace.analysis.counts.overview.domains` of all traces."""
        return overview.domains(list(parts.each(_requests, self.traces, self.executor)))

    @cached_property
    def entries(self) -> pd.DataFrame:
        """Entries by layer: :func:`moetrace.analysis.counts.overview.layers` of all traces."""
        each = parts.each(_entries, self.parts, self.executor)
        keys = ["layer", "n_expert", "n_expert_used"]
        return pd.concat(list(each)).groupby(keys, sort=False).sum().reset_index()

    @property
    def left_out(self) -> list[str]:
        """A sentence for each context of a trace that is not looked at."""
        return [f"{trace.path.name}: {said}." for trace in self.traces for said in trace.left_out]

    @cached_property
    def phase(self) -> Phase:
        """Which rows are looked at."""
        if self._phase is not None:
            return self._phase
        if self.table is not None:
            return "unknown"
        for name in _PHASES:
            if any(name in there for there in self._phases_there):
                return name
        return "decode"

    @cached_property
    def _phases_there(self) -> list[list[str]]:
        return list(parts.each(_phases_of, self.parts, self.executor))

    @property
    def phase_note(self) -> str:
        """Which rows are looked at, and why, as a sentence."""
        if self.table is not None:
            return "A table of counts: it does not tell prompt from generated tokens, nor one prompt from another."
        chosen = PHASE_NOTES[self.phase]
        if self._phase is None and self.phase == "prefill":
            chosen += " The trace has no generated ones."
        return chosen

    @property
    def looked_at(self) -> list[Any]:
        """What decides answers beside traces and questions, as JSON values."""
        return [
            self._phase,
            None if self.layers is None else list(self.layers),
            self.seed,
            list(self._names or ()),
            self.group_key,
            self._strata,
        ]

    def prepare(self) -> None:
        """Make what many questions need, as far as it can be made; a question that lacks it says so."""
        with suppress(MoetraceError, MemoryError):
            _ = self.phase
            if self.traces:
                _ = self.loss, self.phases, self.domains, self.entries
            _ = self.counts
            if self.table is None:
                _ = self.routing.prompt_counts, self.routing.text
            _ = self.activations

    def settle(self) -> None:
        """:meth:`prepare`, and whatever else questions read rows for; then do without the executor.

        Whatever the executor raises because its processes died is raised.
        """
        if self.executor is None:
            return
        self.prepare()
        if self.table is None:
            makers: list[Callable[[], object]] = [
                lambda: self.routing.order_counts,
                lambda: self.routing.token_counts,
                lambda: self.routing.request_column("answer"),
                lambda: self.frequency,
                lambda: self.in_phase("prefill").text,
                lambda: self.in_phase("decode").text,
            ]
            for make in makers:
                with suppress(MoetraceError, MemoryError):
                    make()
        for routing in self._routings.values():
            routing.executor = None
        self.executor = None

    @cached_property
    def routing(self) -> Routing:
        """The chosen rows, their counts and texts, made once for all questions. Raises UsageError for a count table."""
        if self.table is not None:
            raise UsageError(
                "a count table does not say which token chose what", fix="give a recording of tokens"
            )
        return self.in_phase(self.phase)

    @cached_property
    def counts(self) -> RoutingCounts:
        """Counts of the chosen rows, or those of the table, each domain as one prompt."""
        if self.table is None:
            return self.routing.counts
        counts, numbers = self.table.counts, self.table.layers
        if self.layers is not None:
            chosen = np.flatnonzero(np.isin(numbers, self.layers))
            if chosen.size < len(set(self.layers)):
                raise UsageError(
                    "the table lacks a layer that was asked for",
                    fix=f"choose among: {', '.join(map(str, numbers.tolist()))}",
                )
            counts, numbers = counts[:, chosen], numbers[chosen]
        return RoutingCounts.of_table(counts, self.table.domains, numbers)

    @property
    def prompt_counts(self) -> RoutingCounts:
        """The same prompt by prompt, with neighbours: of all, or of some (:attr:`drawn`); of a table without."""
        return self.counts if self.table is not None else self.routing.prompt_counts

    @property
    def copies(self) -> list[str]:
        """If some prompts are no independent observations: a sentence that says so."""
        if self.table is not None or "routing" not in self.__dict__:
            return []
        n, independent = self.routing.n_prompts, len(self.routing.prompts)
        n_continued = self.routing.clusters.n_continued
        unsure = (
            f"{number(n_continued, 'request')} went on from a text of the server's prompt cache of which the recording"
            " does not say whose it was: they may be of one conversation with others (--group-key tells;"
            " llama-server's --cache-ram 0 keeps texts in their slots)."
        )
        told = [unsure] if n_continued else []
        if self.group_key is None and not self.routing.clusters.compared:
            told.append(
                "So many texts were not compared: copies and turns of a conversation count as prompts of their own,"
                " unless clients said their `group` (--group-key)."
            )
        if n == independent:
            return told
        why = "the others repeat one of their domain, begin with it, share half of it or more, or are of its `group`"
        if self.group_key is not None:
            why = f"those with the same `{self.group_key}` are one"
        return [
            f"{n:,} prompts are {number(independent, 'independent text')}: {why}. Tests exchange, and intervals leave"
            " out, independent texts.",
            *told,
        ]

    @property
    def together(self) -> list[str]:
        """If groups stand for prompts in :attr:`counts`: a sentence that says so."""
        if self.table is not None or self.routing.each_apart:
            return []
        n = self.counts.n_prompts
        if n.max() == 1:
            return []
        return [
            f"Groups stand for prompts: {n.sum():,} prompts in {n.size:,} groups of about {np.median(n):.0f} of one"
            " domain, drawn at random. Tests exchange groups, and intervals leave out one at a time."
        ]

    @property
    def drawn(self) -> list[str]:
        """If some prompts stand for all where each is counted by itself: a sentence that says so."""
        if self.routing.each_apart:
            return []
        of = f"{self.routing.prompt_counts.prompts.size:,} of {len(self.routing.prompts):,} prompts"
        return [f"Neighbours were counted in {of}, drawn at random."]

    @property
    def first(self) -> list[str]:
        """If questions of order leave position 0 out: a sentence that says so."""
        if not self.routing.has_first:
            return []
        return ["Position 0 is left out of neighbours: models often route it apart from all other tokens."]

    @property
    def read(self) -> list[str]:
        """If some texts stand for all (:attr:`Routing.text`): a sentence that says so."""
        text, texts = self.routing.text, self.routing.texts
        if text.n_requests == len(texts.prompts):
            return []
        return [
            f"Texts of {text.n_requests:,} of {len(texts.prompts):,} prompts, drawn at random, were read:"
            f" {len(text):,} of {len(texts):,} tokens."
        ]

    @cached_property
    def labelled(self) -> RoutingCounts:
        """:attr:`counts` of the prompts that have a domain. Raises UsageError if none has."""
        counts = self.counts.labelled()
        if not counts.prompts.size:
            raise UsageError(NO_DOMAIN, fix=LABEL_THEM)
        return counts

    @cached_property
    def activations(self) -> Activations:
        """:attr:`labelled` as the published notebook's table."""
        if self.table is None:
            return activations(self.routing)
        counts = self.counts
        return Activations.from_counts(counts.included, counts.prompts.tolist(), layers=counts.layers)

    @cached_property
    def frequency(self) -> ExpertFrequency:
        """How often experts are chosen, as a published script says it."""
        return frequency_of_rows(self.routing) if self.table is None else frequency_of_table(self.counts)

    @property
    def n_expert(self) -> npt.NDArray[np.int64]:
        """(L,) experts that each layer has."""
        counts = self.counts
        return self.routing.n_expert if self.table is None else np.full(counts.layers.size, counts.n_expert)

    @cached_property
    def lengths(self) -> LengthClasses | None:
        """Classes of length of the labelled prompts, if it is among those that tests exchange them."""
        if self.table is not None or self._strata not in ("auto", "length"):
            return None
        counts = self.labelled
        tokens = counts.tokens.max(axis=1) / counts.n_prompts
        return length_classes(tokens, counts.labels, always=self._strata == "length")

    @cached_property
    def strata(self) -> npt.NDArray[Any] | None:
        """(P,) of the labelled prompts, among which of them tests exchange domains; None: among all."""
        if self.lengths is not None:
            return self.lengths.codes
        if self.table is not None or self._strata in ("auto", "length", "none"):
            return None
        said = self.routing.request_column(self._strata)
        if not said:
            raise UsageError(
                f"no request has {self._strata!r}",
                fix="give auto, length, none, or a key of the prompts file's lines",
            )
        if self.together:
            raise UsageError(
                "groups stand for prompts, which have no key of their own",
                fix="leave out --strata, or take fewer traces",
            )
        return np.array([str(said.get(prompt, "")) for prompt in self.labelled.prompts.tolist()])

    @property
    def exchanged(self) -> list[str]:
        """If tests exchange prompts only among some: sentences that say so."""
        if self.strata is None:
            return []
        if self.lengths is None:
            return [f"Prompts are exchanged among those with the same `{self._strata}`."]
        medians = self.lengths.medians
        short, long = min(medians, key=lambda d: medians[d]), max(medians, key=lambda d: medians[d])
        out = [
            f"Domains' prompts are not alike in length (half of {short}'s have at most {medians[short]:,.0f} tokens, of"
            f" {long}'s {medians[long]:,.0f}): they are exchanged among those that are as long, within a factor of"
            f" {WIDTH:g} (--strata none: among all)."
        ]
        if alone := self.lengths.alone:
            out.append(
                f"No prompt of {listed(alone)} is as long as one of another domain: what is tested is said of the"
                " others only."
            )
        return out

    def domain_test(self, **options: Any) -> DomainTest:
        """:func:`moetrace.analysis.domain_test` of the labelled prompts, with its options, this seed and these strata.

        Of a table there is none: its domains stand where single prompts would.
        """
        counts = self.labelled
        test = domain_test(
            counts.included,
            counts.labels,
            layers=counts.layers,
            strata=self.strata,
            seed=self.seed,
            **options,
        )
        if self.lengths is not None and test.verdict == ONE_ARRANGEMENT:
            return replace(test, verdict=OF_LENGTH)
        return test if self.table is None else replace(test, verdict=NO_PROMPTS)

    def in_phase(self, phase: Phase) -> Routing:
        """The rows of a phase, chosen once."""
        if phase not in self._routings:
            self._routings[phase] = self._choose(self.traces, phase)
        return self._routings[phase]

    @cached_property
    def pair(self) -> tuple[Routing, Routing]:
        """Two captures, each by itself, of all phases unless one was chosen.

        Raises UsageError if there are not two traces.
        """
        if len(self.traces) != 2:
            raise UsageError(
                f"a comparison takes two traces, not {len(self.traces)}",
                fix="give two: moetrace compare A.moet B.moet",
            )
        one, two = self._given
        phase = self._phase or "all"
        return self._choose([one], phase), self._choose([two], phase)

    def _choose(self, traces: Sequence[Trace], phase: Phase) -> Routing:
        for trace in traces[1:]:
            self._refuse_another_model(traces[0], trace)
        rows = traces if self.layers is None else [trace.sel(layer=self.layers) for trace in traces]
        return from_trace(
            *rows,
            phase=phase,
            names=self._names if len(traces) == len(self.traces) else None,
            group_key=self.group_key,
            executor=self.executor,
            progress=lambda done, total: self.progress(f"counting: {done:,} of {total:,} tokens"),
        )

    def _refuse_another_model(self, one: Trace, other: Trace) -> None:
        # of one model quantised otherwise the description differs: overview says so
        different = [d for d in naming.differences(one.facts, other.facts) if not d.startswith("description")]
        if different:
            raise UsageError(
                f"{one.path.name} and {other.path.name} are of different models",
                why=f"they differ in {', '.join(different)}",
                fix="ask about them one by one",
            )

    def need_model(self, what: str) -> Path:
        """The model's file. Raises UsageError, saying what needs it, if none was given."""
        if self.model is None:
            raise UsageError(
                f"{what} needs the model", fix="give it to moetrace analyze or report: -m model.gguf"
            )
        return self.model


def _phases_of(part: Trace) -> list[str]:
    """The phases that a part has rows of."""
    phase = np.asarray(part.phase)
    return [name for name, code in PHASES.items() if (phase == code).any()]


def _phases(part: Trace) -> pd.DataFrame:
    return overview.phases(part.phase, part.state, part.request)


def _entries(part: Trace) -> pd.DataFrame:
    return overview.layers(
        part.state, layers=part.layers, n_expert=part.n_expert, n_expert_used=part.n_expert_used
    )


def _requests(trace: Trace) -> pd.DataFrame:
    """What :func:`overview.domains` takes of a trace."""
    return trace.requests[["id", "label", "n_prefill", "n_decode", "n_lost"]]


def _loss(trace: Trace) -> Loss:
    return trace.loss


def _identity(trace: Trace) -> tuple[int, str]:
    """What orders traces, however they were named: when they were recorded, and where they lie."""
    created = trace.meta.get("created_ns")
    return created if isinstance(created, int) else 0, str(trace.path.absolute())
