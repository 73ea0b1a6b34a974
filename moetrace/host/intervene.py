"""Putting interventions in force: in a live recording, and in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from moetrace.errors import InputError, MoetraceError, TraceError, UsageError
from moetrace.host import llama
from moetrace.model.file import ModelFile
from moetrace.trace import naming
from moetrace.trace.control import remember, remember_for_all
from moetrace.trace.intervention import (
    NO_EXPERT,
    Intervention,
    Kind,
    Router,
    Rule,
    check,
    encode,
    parse_interventions,
    routers_of,
    store,
)
from moetrace.trace.record import State
from moetrace.trace.ring import Ring, live_rings, ring_is_ready, ring_paths
from moetrace.trace.storage import is_locked
from moetrace.trace.trace import Trace, open_trace

Given = str | Intervention | Iterable[str | Intervention] | None


def rules_of(intervention: Intervention) -> list[Rule]:
    """Give the rules that an intervention amounts to; of a replay, what its trace recorded.

    Raises
    ------
    UsageError
        If it is about a request that was not tied to a slot, or its trace has several requests.
    TraceError
        If its trace cannot be read.
    """
    if intervention.request is not None:
        raise UsageError(
            f"{str(intervention)!r} is about a request",
            why="a server knows slots, and not the ids of requests",
            fix="use @slot=N, or capture, where prompts have ids",
        )
    sequence = -1 if intervention.slot is None else intervention.slot
    if intervention.kind is Kind.REPLAY:
        return [replace(rule, sequence=sequence) for rule in _recorded(intervention)]
    ids = np.array([intervention.experts], np.uint16)
    return [
        Rule(intervention.kind, ids, sequence, first, last, intervention.value)
        for first, last in intervention.layers or ((-1, -1),)
    ]


def _recorded(intervention: Intervention) -> list[Rule]:
    """Give a rule per layer with the ids that were recorded at each position of a request."""
    with open_trace(intervention.source) as trace:
        rows = trace.sel(request=_source_request(trace, intervention))
        position = np.asarray(rows.positions).astype(np.int64)
        if len(position) == 0 or position.min() < 0:
            raise TraceError(
                f"{intervention.source} cannot be replayed",
                why="the request has no rows, or their positions were not recorded",
                fix="replay a request that moetrace recorded",
            )
        experts, state = np.asarray(rows.experts), np.asarray(rows.state)
        first = int(position.min())
        rules = []
        for i, layer in enumerate(trace.layers.tolist()):
            if intervention.layers and not any(a <= layer <= b for a, b in intervention.layers):
                continue
            k = trace.n_expert_used[i]
            ids = np.full((int(position.max()) - first + 1, k), NO_EXPERT, np.uint16)
            present = state[:, i] == State.PRESENT
            # of a position that was computed twice the last holds
            ids[position[present] - first] = experts[present, i, :k]
            rules.append(Rule(Kind.REPLAY, ids, -1, layer, layer, 0.0, first))
    return rules


def _source_request(trace: Trace, intervention: Intervention) -> int:
    requests = trace.requests
    wanted = intervention.source_request
    found = requests.index[(requests["id"].astype(str) == wanted) | (wanted is None)]
    if len(found) != 1:
        raise UsageError(
            f"{intervention.source} cannot be replayed",
            why=f"it has {len(found) or 'no'} requests" + ("" if wanted is None else f" {wanted!r}"),
            fix=f"name one of its requests by its id: replay:{intervention.source}#ID",
        )
    return int(found[0])


def is_by_request(intervention: Intervention) -> bool:
    """Whether it must be tied to slots as requests come and go.

    So is what names a request, and a replay of a trace with several requests that names none of them: it stands
    for each request with the recorded request of the same id.
    """
    if intervention.kind is not Kind.REPLAY or intervention.source_request is not None:
        return intervention.request is not None
    with open_trace(intervention.source) as trace:
        return intervention.request is not None or len(trace.requests) != 1


def tie(interventions: Iterable[Intervention], running: Mapping[int, str]) -> tuple[Intervention, ...]:
    """Tie interventions (:func:`is_by_request`) to the slots in which the requests run.

    Parameters
    ----------
    running
        Slot -> id of the request that runs in it. What is about a request that does not run is left out.
    """
    return tuple(
        replace(
            i,
            request=None,
            slot=slot,
            source_request=name if i.kind is Kind.REPLAY and i.source_request is None else i.source_request,
        )
        for i in interventions
        for slot, name in running.items()
        if i.request in (None, name) and i.slot in (None, slot)
    )


def model_routers(model: str | None, n_expert_used: int | None = None) -> list[Router] | None:
    """Give what a GGUF file says of its routers; None if that cannot be told from it.

    Which layers choose by scores only llama.cpp's graph tells: all are taken to.
    """
    if model is None or not Path(model).is_file():
        return None
    try:
        with ModelFile(model) as file:
            groups = int(file.field("{arch}.expert_group_count", 0))
            used = int(file.field("{arch}.expert_group_used_count", 0))
            k = n_expert_used or file.n_expert_used
            return [
                (layer, file.n_expert, k, groups if groups > 1 else 0, used, True)
                for layer in file.moe_layers
            ]
    except (InputError, TypeError):  # llama.cpp reads files that we cannot, and will say what it has
        return None


def check_model(interventions: Sequence[Intervention], model: str | None) -> None:
    """Refuse what the model cannot do, as far as its file tells.

    Raises
    ------
    UsageError
        If it cannot, or an intervention is about a request.
    """
    if not interventions:
        return
    data, routers = _encoded(interventions), model_routers(model)
    if routers is not None:
        check(data, routers)


def begin(trace: Path, interventions: Sequence[Intervention]) -> int:
    """Write what shall be in force from a server's first graph on; gives its number."""
    return store(trace, interventions, _encoded(interventions))


def switch(trace: Path, given: Given, *, model: str | None = None, context: str | None = None) -> int:
    """Put interventions in force in a live recording, from the next graph on; none: switch them off.

    They hold for all contexts of one model: layers and experts are that model's.

    Parameters
    ----------
    model
        Which model, where the recording has several: its name, its server's alias for it, or its file.
    context
        Only this context.

    Returns
    -------
    int
        The number under which the trace keeps them; 0 for none.

    Raises
    ------
    TraceError
        If nothing is being recorded there.
    UsageError
        If the model cannot do it, or the recording has several and none is named. Then nothing has changed.
    """
    interventions = parse_interventions(given)
    data = _encoded(interventions)
    if not interventions and model is None and context is None and may_begin(trace):
        remember_for_all(trace, intervention=0)
        if not has_live(trace):
            return 0
    # to switch off there is nothing to choose
    paths = _chosen(trace, model, context, several=not interventions)
    for path in paths:
        with Ring(path) as ring:
            check(data, routers_of(ring.meta))
    number = store(trace, interventions, data) if interventions else 0
    restore(dict.fromkeys(paths, number))
    return number


def restore(numbers: Mapping[Path, int]) -> None:
    """Put interventions that were stored before in force again: ring -> number. Rings that are gone are left out."""
    for path, number in numbers.items():
        if ring_is_ready(path):
            with Ring(path) as ring:
                remember(ring, intervention=number)
                ring.intervention = number


def in_force(trace: Path) -> dict[Path, int]:
    """Give the number of what each of a live recording's rings was told to keep to; 0: nothing.

    Raises
    ------
    TraceError
        If nothing is being recorded there.
    """
    return {ring.path: ring.intervention for ring in _main_rings(trace)}


def _main_rings(trace: Path) -> Iterable[Ring]:
    # a draft model's own routing is left alone: the main model decides what is said
    return (ring for ring in live_rings(trace) if ring.meta.get("role") == "main")


def _chosen(trace: Path, model: str | None, context: str | None, *, several: bool) -> list[Path]:
    """Give the main rings that are meant: of one model, or (``several``) of all."""
    rings = [ring for ring in live_among(trace, model, context) if ring[1].get("role") == "main"]
    if not rings:
        raise UsageError(
            f"{trace} records no main model under that name",
            fix="leave --context or --model out, or name another",
        )
    if not several and any(not naming.same_model(rings[0][1], facts) for _, facts in rings):
        raise UsageError(
            f"{trace} records several models, and none was named",
            why=described_rings(rings),
            fix="name one with --model NAME or --context NAME: layers and experts are a model's own",
        )
    return [path for path, _ in rings]


def has_live(trace: Path) -> bool:
    """Whether a context is there whose host goes on."""
    for path in ring_paths(trace):
        with contextlib.suppress(TraceError):  # its reader has just removed it
            if ring_is_ready(path):
                with Ring(path) as ring:
                    if not ring.closed:
                        return True
    return False


def may_begin(trace: Path) -> bool:
    """Whether contexts may be recorded later: somebody records, or a host goes on without."""
    return is_locked(trace) or has_live(trace)


def live_among(trace: Path, model: str | None, context: str | None) -> list[tuple[Path, dict[str, object]]]:
    """Give the live rings, and their texts, of all contexts or of those that are named.

    Raises
    ------
    TraceError
        If nothing is being recorded there.
    UsageError
        If none is called so; names those there are.
    """
    rings = [(ring.path, dict(ring.meta)) for ring in live_rings(trace) if not ring.closed]
    if not rings:
        raise TraceError(
            f"{trace} is not being recorded",
            why="the program has ended",
            fix="start another with `moetrace run`",
        )
    found = [
        (path, facts)
        for path, facts in rings
        if context in (None, path.parent.name) and (model is None or naming.is_called(facts, model))
    ]
    if not found:
        asked = " and ".join(
            f"{what} {name!r}" for what, name in (("context", context), ("model", model)) if name is not None
        )
        raise UsageError(
            f"{trace} records no {asked}", why=f"it records {described_rings(rings)}", fix="name one of these"
        )
    return found


def described_rings(rings: Iterable[tuple[Path, Mapping[str, object]]]) -> str:
    """Name the contexts of a live recording and their models."""
    return "; ".join(
        f"{path.parent.name}: {', '.join(naming.names(facts)) or 'a model without a name'}"
        f" ({naming.role(facts)})"
        for path, facts in rings
    )


def refuse_if_refused(trace: Path, numbers: Container[int]) -> None:
    """Raise what a host has refused of these; nothing if it refused none of them.

    Raises
    ------
    MoetraceError
        With the host's reason.
    """
    for path in ring_paths(trace):
        if ring_is_ready(path):
            with Ring(path) as ring:
                refused, why = ring.intervention_refused
            if refused and refused in numbers:
                raise refusal(refused, why)


def refusal(number: int, why: str) -> MoetraceError:
    """Say that a host has refused an intervention."""
    return MoetraceError(f"llama.cpp did not take intervention {number}: the routing was left alone", why=why)


def _encoded(interventions: Iterable[Intervention]) -> bytes:
    return encode([rule for intervention in interventions for rule in rules_of(intervention)])


class Interventions:
    """The interventions of a run in this process, tied to slots as requests come and go.

    Parameters
    ----------
    trace
        The folder that the process records into.
    given
        What shall be in force.
    model, n_expert_used
        The GGUF file, and how many experts it is to use, if not its own number.

    Raises
    ------
    UsageError
        If it is no intervention, or the model cannot do it. Then nothing has changed.
    """

    def __init__(self, trace: Path, given: Given, model: str, n_expert_used: int | None = None) -> None:
        interventions = parse_interventions(given)
        self._by_request = [i for i in interventions if is_by_request(i)]
        self._always = tuple(i for i in interventions if i not in self._by_request)
        self._trace = trace
        self._routers = model_routers(model, n_expert_used) if interventions else None
        self._rules = cache(rules_of)
        self._now: tuple[Intervention, ...] = ()
        self._numbers: set[int] = set()
        self._encode(self._always)
        for intervention in self._by_request:
            if intervention.request is not None:  # whether it can be done does not hang on the slot
                slot = intervention.slot or 0
                self._encode([*self._always, *tie([intervention], {slot: intervention.request})])

    def assign(self, running: Mapping[int, str]) -> None:
        """Requests have begun or ended: slot -> the id of what runs in it. Call it between batches.

        Raises
        ------
        UsageError
            If the model cannot do what then would be in force.
        """
        wanted = self._always + tie(self._by_request, running)
        if wanted != self._now:
            data = self._encode(wanted)
            number = store(self._trace, wanted, data) if wanted else 0
            llama.intervene(number)
            self._now = wanted
            self._numbers.add(number)

    def end(self) -> None:
        """Switch off what is in force; call it while the context still is there.

        Raises
        ------
        MoetraceError
            If llama.cpp's graph did not allow it: it was not in force then.
        """
        llama.intervene(0)
        self._now = ()
        refuse_if_refused(self._trace, self._numbers)

    def _encode(self, interventions: Iterable[Intervention]) -> bytes:
        data = encode([rule for intervention in interventions for rule in self._rules(intervention)])
        if self._routers is not None:
            check(data, self._routers)
        return data
