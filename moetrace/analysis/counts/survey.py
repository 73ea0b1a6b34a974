"""What is known of recordings before anything is counted: whose rows there are, and which are one observation."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from moetrace.analysis.counts.chosen import PHASES, Chosen, RoutedRows
from moetrace.analysis.counts.clusters import text_clusters
from moetrace.analysis.counts.counting import two_domains
from moetrace.analysis.statistics.shapes import Ints
from moetrace.errors import UsageError

#: what clients call requests that are no independent observations
GROUP = "group"
#: of more tokens than so many texts are not compared: they would have to come to one place
MOST_TOKENS = 1 << 26


@dataclass(frozen=True)
class Survey:
    """What is known of the chosen rows of one part.

    Attributes
    ----------
    prompts, labels
        Of each request, by its number; "" where it has no domain.
    numbers
        The requests that have rows, (n,).
    phases
        Of which phases the part has rows at all.
    has_first, has_later
        Whether a row is at position 0, and whether one is not.
    said
        What clients said under the key that tells observations, by request.
    beginnings
        Texts of its requests; empty where they do not matter.
    n_continued
        Requests of which it is not known how their text begins: the server had it in its cache.
    """

    prompts: tuple[str, ...]
    labels: tuple[str, ...]
    numbers: Ints
    phases: frozenset[str]
    has_first: bool
    has_later: bool
    said: dict[int, str]
    beginnings: tuple[Beginning, ...]
    n_continued: int

    @property
    def asked(self) -> Iterator[tuple[str, str]]:
        """The prompts that have rows, and their domains."""
        return ((self.prompts[i], self.labels[i]) for i in self.numbers.tolist())


@dataclass(frozen=True)
class Beginning:
    """A request's text from the first token on, as far as it is known, and the size of its prompt."""

    request: int
    text: npt.NDArray[np.int32]
    n_prompt: int
    known: bool


def survey(chosen: Chosen, key: str | None, compare: bool) -> Survey:
    """Survey the chosen rows of a part, of which ``key`` tells the observations (:func:`clusters`).

    Without ``compare`` there are no texts, but what is not known of them is counted.
    """
    requests = chosen.trace.requests
    given = GROUP if key is None else key
    said = requests[given].dropna().items() if given in requests and key != "id" else ()
    phase = np.asarray(chosen.trace.phase)
    kept = np.asarray(chosen.trace.positions)[chosen.keep]
    begun = tuple(_beginnings(chosen)) if key is None else ()
    return Survey(
        prompts=tuple(chosen.prompts),
        labels=tuple(map(sys.intern, chosen.labels)),  # a few names, which very many requests have
        numbers=np.array(chosen.numbers, dtype=np.int64),
        phases=frozenset(name for name, code in PHASES.items() if (phase == code).any()),
        has_first=bool((kept == 0).any()),
        has_later=bool((kept != 0).any()),
        said={int(str(request)): str(value) for request, value in said},
        beginnings=begun if compare else (),
        n_continued=sum(not each.known for each in begun),
    )


def domain_of(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Prompt -> domain. Raises UsageError if a prompt has two."""
    out: dict[str, str] = {}
    for prompt, domain in pairs:
        known = out.setdefault(prompt, domain)
        if known != domain:
            raise two_domains(prompt, known, domain)
    return out


@dataclass(frozen=True)
class Clusters:
    """Which prompts are one observation.

    Attributes
    ----------
    stands
        Of each prompt that is one observation with others: the first of them, in order of names.
    n_continued
        Requests that go on from a text of which it is not known whose it was.
    compared
        Whether texts were compared: not if another key tells, or if there are more than :data:`MOST_TOKENS` tokens.
    """

    stands: Mapping[str, str]
    n_continued: int
    compared: bool

    def of(self, prompts: Sequence[str]) -> Sequence[str]:
        """What each prompt is an observation of: itself, unless another one stands for it."""
        return [self.stands.get(prompt, prompt) for prompt in prompts] if self.stands else prompts


def clusters(surveys: Sequence[Survey], key: str | None) -> Clusters:
    """Find which prompts are one observation.

    ``key`` is what clients said that tells: those with the same are one. None: those of one ``group`` and domain, and
    those whose texts begin alike (:func:`~moetrace.analysis.counts.clusters.text_clusters`). "id": every prompt
    stands for itself. Raises UsageError if no request has the key.
    """
    if key == "id":
        return Clusters({}, 0, False)
    number: dict[str, int] = {}  # of each prompt that is looked at
    same: list[tuple[int, int]] = []
    first: dict[tuple[object, ...], int] = {}  # who had this first

    def join(what: tuple[object, ...], prompt: str) -> None:
        mine = number.setdefault(prompt, len(number))
        same.append((first.setdefault(what, mine), mine))

    if key is not None and not any(one.said for one in surveys):
        raise UsageError(
            f"no request has {key!r}",
            fix="give a key that the lines of the prompts file have, or that requests show",
        )
    for one in surveys:
        for i, value in one.said.items():
            join((one.labels[i], value), one.prompts[i])
    begun = [(one, text) for one in surveys for text in one.beginnings]
    if begun:
        owners = [(one.prompts[text.request], one.labels[text.request]) for one, text in begun]
        found = text_clusters(
            [text.text for _, text in begun],
            [text.n_prompt for _, text in begun],
            [label for _, label in owners],
        )
        for code, (prompt, label) in zip(found.tolist(), owners, strict=True):
            join((label, code), prompt)
    pairs = np.array(same, dtype=np.int64).reshape(-1, 2).T
    graph = sparse.coo_array(
        (np.ones(pairs.shape[1]), (pairs[0], pairs[1])), shape=(len(number), len(number))
    )
    code_of = connected_components(graph, directed=False)[1]
    first_of: dict[int, str] = {}
    for prompt in sorted(number):
        first_of.setdefault(int(code_of[number[prompt]]), prompt)
    stands = ((prompt, first_of[int(code_of[i])]) for prompt, i in number.items())
    return Clusters(
        {prompt: other for prompt, other in stands if other != prompt},
        sum(one.n_continued for one in surveys),
        bool(begun),
    )


def _beginnings(chosen: Chosen) -> Iterator[Beginning]:
    """Those of all requests. What the prompt cache served is the text that was in the slot before.

    Unless the slot's memory was loaded, copied or moved in between: then it is not known. Of what is not known no two
    tokens are alike.
    """
    trace, order = chosen.trace, Chosen(chosen.trace, chosen.name, "all").order
    ids = np.array(trace.token_ids, dtype=np.int32)[order.rows]
    unknown = np.flatnonzero(ids < 0)
    ids[unknown] = -1 - np.arange(unknown.size)
    n_unknown = unknown.size
    position, phase = np.asarray(trace.positions)[order.rows], np.asarray(trace.phase)[order.rows]
    edges = order.request_starts.tolist()
    requests = trace.requests.reindex(order.requests)
    told = {"n_cached", "slot", "first_serial"} <= set(requests)
    first = requests["first_serial"].tolist() if told else list(range(len(order.requests)))
    slots = requests["slot"].tolist() if told else [-1] * len(first)
    cached = requests["n_cached"].fillna(-1).tolist() if told else [-1] * len(first)
    moved = _moved(trace)
    held: dict[int, tuple[int, npt.NDArray[np.int32]]] = {}  # by each slot: from which serial on, and what
    for i in sorted(range(len(first)), key=first.__getitem__):
        a, b, slot = edges[i], edges[i + 1], slots[i]
        text, n_prompt = ids[a:b], int((phase[a:b] == PHASES["prefill"]).sum())
        start, known = int(position[a]), True
        if start > 0:
            since, before = held.get(slot, (0, text[:0]))
            known = cached[i] == start <= len(before) and not any(
                np.searchsorted(moved[of], since, "right") < np.searchsorted(moved[of], first[i], "right")
                for of in (slot, -1)
                if of in moved
            )
            if not known:
                before = -1 - n_unknown - np.arange(start, dtype=np.int32)
                n_unknown += start
            text, n_prompt = np.concatenate((before[:start], text)), n_prompt + start
        held[slot] = first[i], text
        yield Beginning(int(order.requests[i]), text, n_prompt or len(text), known)


def _moved(trace: RoutedRows) -> dict[int, Ints]:
    """When a slot's memory came from elsewhere: the serials, ascending, by slot; -1: of all."""
    events = getattr(getattr(trace, "trace", trace), "events", None)
    if events is None:
        return {}
    events = events[events["event"].isin(["restore", "seq_cp", "seq_add", "seq_div", "context", "resume"])]
    slots = np.where(events["event"] == "seq_cp", events["arg"], events["sequence"])
    slots[events["event"].isin(["context", "resume"])] = -1
    serials = events["serial"].to_numpy(dtype=np.int64)
    return {int(slot): np.sort(serials[slots == slot]) for slot in np.unique(slots)}
