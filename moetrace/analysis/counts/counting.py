"""Sufficient statistics of routing, gathered in one pass over the (memory-mapped) columns.

Everything that :mod:`moetrace.analysis` says about domains, layers and time follows from the arrays held
here, and they add: ``count_routing`` of two traces, summed, equals ``count_routing`` of the two traces
together, exactly, as long as no request is cut in two between them.

Shapes: N rows (tokens) of a trace, R requests, P prompts, L layers, E experts of a layer, k experts per
token, D lags, X token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from moetrace.analysis.statistics.shapes import Ints, layer_numbers, per_layer
from moetrace.errors import UsageError

Progress = Callable[[int, int], None]

PRESENT = 1
MAX_LAG = 32
_PER_THREAD = 1 << 14  # of fewer rows a thread costs more than it counts


@dataclass(frozen=True)
class ReadingOrder:
    """Rows of a trace in the order in which each request's text reads.

    Attributes
    ----------
    rows
        (M,) row numbers, request by request, within a request in the order computed.
    requests, request_starts
        (R,) request numbers and (R + 1,) where each one's rows begin in ``rows``.
    run_starts
        (Q + 1,) where each unbroken run begins in ``rows``: positions rise by one, in one request. A gap (a
        lost row) or a context shift begins a new run; nothing is said about neighbours across it.
    """

    rows: Ints
    requests: Ints
    request_starts: Ints
    run_starts: Ints


def reading_order(
    request: npt.ArrayLike,
    position: npt.ArrayLike,
    keep: npt.ArrayLike | None = None,
    shifted: npt.ArrayLike = (),
) -> ReadingOrder:
    """Put rows into reading order; a pure function of three columns.

    Parameters
    ----------
    request
        (N,) int: request number of each row; rows with a negative one are left out.
    position
        (N,) int: position in the sequence when computed; negative where it was not recorded: such rows follow
        each other as stored, and none counts as rejected.
    keep
        (N,) bool: rows to look at (one phase, say); all if not given.
    shifted
        Request numbers whose positions were shifted on purpose (context shift). In every other request a row
        whose position is taken again by a later row was a draft that the sampler rejected: it is not part of
        the text and is left out.
    """
    req, pos = np.asarray(request), np.asarray(position)
    if req.shape != pos.shape or req.ndim != 1:
        raise UsageError(f"request {req.shape} and position {pos.shape} differ in shape")
    # Columns are long: what need not be copied is not.
    rows = np.flatnonzero(req >= 0)
    if rows.size and (np.diff(req[rows]) < 0).any():
        rows = rows[np.argsort(req[rows], kind="stable")]
    if rows.size < req.size or (rows[1:] < rows[:-1]).any():
        req, pos = req[rows], pos[rows]
    chosen = ~_rejected(req, pos, np.asarray(shifted))
    if keep is not None:
        chosen &= np.asarray(keep, dtype=bool)[rows]
    if not chosen.all():
        rows, req, pos = rows[chosen], req[chosen], pos[chosen]
    first = [0] if rows.size else []
    starts, runs = (
        np.concatenate((first, np.flatnonzero(new) + 1, [rows.size])).astype(np.int64)
        for new in (req[1:] != req[:-1], breaks(req, pos))
    )
    return ReadingOrder(rows, req[starts[:-1]].astype(np.int64), starts, runs)


def breaks(request: npt.NDArray[Any], position: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Of rows (n,) in reading order: (n − 1,) whether a run ends between two neighbours.

    It goes on within a request where positions rise by one, or where neither position was recorded (negative).
    """
    unrecorded = (position[:-1] < 0) & (position[1:] < 0)
    return np.asarray((request[1:] != request[:-1]) | ~((position[1:] - position[:-1] == 1) | unrecorded))


def _rejected(
    req: npt.NDArray[Any], pos: npt.NDArray[Any], shifted: npt.NDArray[Any]
) -> npt.NDArray[np.bool_]:
    """Rows, sorted by request, whose position a later row of the same request takes again."""
    out = np.zeros(req.shape, dtype=bool)
    falls = np.flatnonzero((pos[1:] <= pos[:-1]) & (pos[1:] >= 0) & (req[1:] == req[:-1]))
    back = np.setdiff1d(req[falls], shifted)
    if back.size:
        mine = np.flatnonzero(np.isin(req, back))
        r, p = req[mine].astype(np.int64), pos[mine].astype(np.int64)
        # Requests ascend, so with this offset a later request's rows never undercut an earlier one's.
        span = int(p.max()) - int(p.min()) + 3
        height = np.cumsum(np.diff(r, prepend=r[0]) != 0) * span + np.where(p < 0, p.max() + 1, p)
        lowest_after = np.append(np.minimum.accumulate(height[::-1])[::-1][1:], height.max() + 1)
        out[mine] = (lowest_after <= height) & (p >= 0)
    return out


def last_rows(
    request: npt.ArrayLike, numbers: npt.ArrayLike, sizes: npt.ArrayLike, n_last: npt.ArrayLike
) -> npt.NDArray[np.bool_]:
    """Find the last rows of some requests; a pure function of columns.

    Parameters
    ----------
    request
        (N,) int: request number of each row, in the order computed.
    numbers
        (R,) int: the requests.
    sizes
        (R,) int: how many rows each has. Of one that has another number of rows here, none is found: these are a
        part of it, and need not hold its end.
    n_last
        (R,) int: how many of its last rows to find.

    Returns
    -------
    bool (N,)
    """
    req = np.asarray(request)
    found = np.zeros(req.shape, dtype=bool)
    asked, sizes, n_last = (np.asarray(a, dtype=np.int64) for a in (numbers, sizes, n_last))
    rows = np.flatnonzero(np.isin(req, asked[n_last > 0]))
    rows = rows[np.argsort(req[rows], kind="stable")]
    there, starts, n_rows = np.unique(req[rows], return_index=True, return_counts=True)
    which = {int(number): i for i, number in enumerate(asked)}
    for number, start, n in zip(there.tolist(), starts.tolist(), n_rows.tolist(), strict=True):
        i = which[number]
        if n == sizes[i]:
            found[rows[start + max(n - int(n_last[i]), 0) : start + n]] = True
    return found


@dataclass(frozen=True)
class RoutingCounts:
    """Counts per prompt; all of them int64, all of them sums over tokens, so that two objects add.

    Attributes
    ----------
    prompts, labels
        (P,) names of the prompts (sorted, unique) and their domains ("" where unlabelled).
    n_prompts
        (P,) how many prompts each stands for: 1, unless they were taken together
        (:func:`~moetrace.analysis.counts.units.taken_together`).
    layers
        (L,) llama.cpp's layer numbers.
    n_expert_used
        (L,) experts per token in each layer.
    tokens
        (P, L) tokens whose routing in this layer is known.
    included
        (P, L, E) tokens that used the expert.
    top1
        (P, L, E) tokens whose first expert it was.
    transitions
        (L, E, E) neighbours t, t+1 by first expert of t and of t+1; (L, 0, 0) after :meth:`of`.
    lag_pairs
        (P, L, D) pairs of tokens t, t+d for d = 1..D within unbroken runs of a request.
    lag_shared
        (P, L, D) experts shared by such pairs, |A_t ∩ A_{t+d}|, summed.
    lag_top1
        (P, L, D) such pairs with the same first expert.
    """

    prompts: npt.NDArray[np.str_]
    labels: npt.NDArray[np.str_]
    n_prompts: Ints
    layers: Ints
    n_expert_used: Ints
    tokens: Ints
    included: Ints
    top1: Ints
    transitions: Ints
    lag_pairs: Ints
    lag_shared: Ints
    lag_top1: Ints

    @classmethod
    def of_table(
        cls, counts: npt.ArrayLike, domains: Sequence[str], layers: npt.ArrayLike | None = None
    ) -> RoutingCounts:
        """A table of counts (D, L, E): each domain as one prompt, no tokens (0), no neighbours."""
        table, names = np.asarray(counts, dtype=np.int64), np.array([str(name) for name in domains])
        order = np.argsort(names)
        empty = np.zeros((*table.shape[:2], 0), dtype=np.int64)
        return cls(
            prompts=names[order],
            labels=names[order],
            n_prompts=np.ones(names.size, dtype=np.int64),
            layers=layer_numbers(layers, table.shape[1]),
            n_expert_used=np.zeros(table.shape[1], dtype=np.int64),
            tokens=np.zeros(table.shape[:2], dtype=np.int64),
            included=table[order],
            top1=np.zeros_like(table),
            transitions=np.zeros((table.shape[1], 0, 0), dtype=np.int64),
            lag_pairs=empty,
            lag_shared=empty,
            lag_top1=empty,
        )

    @property
    def n_expert(self) -> int:
        """E, the number of experts of a layer."""
        return int(self.included.shape[2])

    @property
    def max_lag(self) -> int:
        """D, the longest lag counted."""
        return int(self.lag_pairs.shape[2])

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        """Counts of both. Prompts of the same name add up; new ones are appended and sorted.

        Raises UsageError if layers, experts or lags differ, or one prompt has two labels.
        """
        for name in ("layers", "n_expert_used"):
            if not np.array_equal(getattr(self, name), getattr(other, name)):
                raise UsageError(f"counts of different models do not add: {name} differ")
        if (self.n_expert, self.max_lag) != (other.n_expert, other.max_lag):
            raise UsageError("counts with different numbers of experts or lags do not add")
        if self.transitions.shape != other.transitions.shape:
            raise UsageError(
                "counts of chosen prompts have no transitions", fix="add first, choose prompts after"
            )
        prompts, labels, (mine, theirs) = _union((self.prompts, self.labels), (other.prompts, other.labels))

        def both(name: str) -> Ints:
            a, b = getattr(self, name), getattr(other, name)
            out = np.zeros((prompts.size, *a.shape[1:]), dtype=np.int64)
            out[mine] += a
            out[theirs] += b
            return out

        n_prompts = np.zeros(prompts.size, dtype=np.int64)
        n_prompts[mine] = self.n_prompts
        n_prompts[theirs] = np.maximum(n_prompts[theirs], other.n_prompts)
        return RoutingCounts(
            prompts=prompts,
            labels=labels,
            n_prompts=n_prompts,
            layers=self.layers,
            n_expert_used=self.n_expert_used,
            transitions=self.transitions + other.transitions,
            **{name: both(name) for name in _PER_PROMPT},
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with numbers no wider than they need to be."""
        return _unpacked, (RoutingCounts, [_packed(getattr(self, f.name)) for f in fields(self)])

    def labelled(self) -> RoutingCounts:
        """Only the prompts that have a domain; itself if all have one."""
        return self if (self.labels != "").all() else self.of(self.labels != "")

    def of(self, prompts: npt.ArrayLike) -> RoutingCounts:
        """Only some prompts (a mask or indices over P), without ``transitions``: those are not kept per
        prompt.
        """
        index = np.asarray(prompts)
        chosen = {
            name: getattr(self, name)[index] for name in (*_PER_PROMPT, "prompts", "labels", "n_prompts")
        }
        return RoutingCounts(
            layers=self.layers,
            n_expert_used=self.n_expert_used,
            transitions=np.zeros((self.layers.size, 0, 0), dtype=np.int64),
            **chosen,
        )

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The fields as plain arrays, fit for ``np.savez``; views."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> RoutingCounts:
        """The inverse of :meth:`to_arrays`. Raises UsageError naming a missing field."""
        missing = [f.name for f in fields(cls) if f.name not in arrays]
        if missing:
            raise UsageError(f"not routing counts: {', '.join(missing)} missing")
        return cls(**{f.name: arrays[f.name] for f in fields(cls)})


def _packed(values: Any) -> Any:
    """Whole numbers of 8 bytes, of which none is negative, in as few as the largest takes; else as they are."""
    if not isinstance(values, np.ndarray) or values.dtype != np.int64 or not values.size or values.min() < 0:
        return values
    return values.astype(np.min_scalar_type(int(values.max())))


def _unpacked(kind: Callable[..., Any], values: list[Any]) -> Any:
    unsigned = (isinstance(value, np.ndarray) and value.dtype.kind == "u" for value in values)
    return kind(
        *(value.astype(np.int64) if small else value for value, small in zip(values, unsigned, strict=True))
    )


_PER_PROMPT = ("tokens", "included", "top1", "lag_pairs", "lag_shared", "lag_top1")


def count_routing(
    experts: npt.NDArray[np.unsignedinteger],
    request: npt.ArrayLike,
    position: npt.ArrayLike,
    *,
    n_expert: int,
    state: npt.NDArray[np.uint8] | None = None,
    keep: npt.ArrayLike | None = None,
    weights: npt.NDArray[np.float32] | None = None,
    prompts: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    layers: npt.ArrayLike | None = None,
    n_expert_used: npt.ArrayLike | None = None,
    shifted: npt.ArrayLike = (),
    max_lag: int = MAX_LAG,
    threads: int = 1,
    progress: Progress | None = None,
) -> RoutingCounts:
    """Count everything in one streaming pass.

    Parameters
    ----------
    experts
        (N, L, k) u1 or u2, may be memory-mapped: expert ids in the router's order. Ids of ``n_expert`` or
        more (255, 65535) mean "none". Never copied as a whole.
    request, position, keep, shifted
        As for :func:`reading_order`.
    state
        (N, L) u1: cells other than 1 (present) are not counted.
    weights
        (N, L, k) f4: if given, the first expert is the one of largest weight; else the router's first. They
        differ where selection is biased or grouped (DeepSeek-V3, GLM-4.5).
    prompts, labels
        Name and domain of each request, indexed by request number. Requests of one name are one prompt (the
        same text asked twice is not two observations). By default each request is its own prompt, unlabelled.
    layers, n_expert_used
        (L,) layer numbers (default 0..L−1) and experts per token (default k).
    max_lag
        D; 0 skips neighbours altogether (no lags, no transitions).
    threads
        Requests are divided among so many threads. Each has tables of its own, so memory for counts grows
        likewise.
    progress
        Called with (rows done, rows to do) after each chunk, by whichever thread did it.

    Returns counts in memory of about P·L·(16E + 24D) + 8·L·E² bytes.
    """
    _, n_layers, k = experts.shape
    order = reading_order(request, position, keep, shifted)
    names, domains = _names(order.requests, prompts, labels)
    who, index, prompt_of = np.unique(names, return_index=True, return_inverse=True)
    _one_label_each(names, domains, who, index, prompt_of)
    tables = _Tables(who.size, n_layers, n_expert, k, max_lag)
    lock, done = Lock(), 0

    def count(part: ReadingOrder, prompt: Ints) -> None:
        nonlocal done
        for chunk in _chunks(experts, part.rows, state, weights, n_expert, max_lag):
            tables.add(chunk, part, prompt)
            with lock:
                done += chunk.stop - chunk.start
                if progress:
                    progress(done, order.rows.size)

    parts = list(_shares(order, prompt_of, min(threads, max(1, order.rows.size // _PER_THREAD))))
    if len(parts) == 1:
        count(*parts[0])
    else:
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(count, *zip(*parts, strict=True)))
    return RoutingCounts(
        prompts=who.astype(np.str_),
        labels=domains[index].astype(np.str_),
        n_prompts=np.ones(who.size, dtype=np.int64),
        layers=layer_numbers(layers, n_layers),
        n_expert_used=per_layer(n_expert_used, n_layers, k),
        **tables.finish(),
    )


@dataclass(frozen=True)
class TokenCounts:
    """Counts per token id, for comparing domains at the same words.

    Attributes
    ----------
    prompts, labels
        (P,) as in :class:`RoutingCounts`.
    tokens
        (X,) token ids, ascending.
    layer_class, occurrences
        (L,) class of each layer, and per class a sparse matrix (P, X): how often the prompt has the token
        with known routing. One class is the rule; llama.cpp's last layer is computed for output rows only and
        then is a class of its own.
    token_included
        (X, L, E) i8: occurrences of the token that used the expert.
    prompt_included
        (P, L, E) i8: tokens of the prompt that used the expert, among ``tokens``.
    """

    prompts: npt.NDArray[np.str_]
    labels: npt.NDArray[np.str_]
    layers: Ints
    n_expert_used: Ints
    tokens: Ints
    layer_class: Ints
    occurrences: tuple[sparse.csr_array, ...]
    token_included: Ints
    prompt_included: Ints

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with numbers no wider than they need to be."""
        return _unpacked, (TokenCounts, [_packed(getattr(self, f.name)) for f in fields(self)])

    def __add__(self, other: TokenCounts) -> TokenCounts:
        """Counts of both, over the union of prompts and of token ids.

        Exact if both were made with ``tokens=None``, or with the same ``tokens``.
        """
        if (
            not np.array_equal(self.layers, other.layers)
            or self.token_included.shape[2] != (other.token_included.shape[2])
        ):
            raise UsageError("counts of different models do not add: layers or experts differ")
        prompts, labels, rows = _union((self.prompts, self.labels), (other.prompts, other.labels))
        tokens = np.union1d(self.tokens, other.tokens)
        columns = [np.searchsorted(tokens, part.tokens) for part in (self, other)]
        pairs = np.stack((self.layer_class, other.layer_class), axis=1)
        classes, layer_class = np.unique(pairs, axis=0, return_inverse=True)
        occurrences = []
        for pair in classes:
            total = sparse.csr_array((prompts.size, tokens.size), dtype=np.int64)
            for part, which, row, column in zip((self, other), pair, rows, columns, strict=True):
                entries = part.occurrences[which].tocoo()
                total = total + sparse.csr_array(
                    (entries.data, (row[entries.row], column[entries.col])), shape=total.shape
                )
            occurrences.append(sparse.csr_array(total))
        token_included = np.zeros((tokens.size, *self.token_included.shape[1:]), dtype=np.int64)
        prompt_included = np.zeros((prompts.size, *self.prompt_included.shape[1:]), dtype=np.int64)
        for part, row, column in zip((self, other), rows, columns, strict=True):
            token_included[column] += part.token_included
            prompt_included[row] += part.prompt_included
        return TokenCounts(
            prompts,
            labels,
            self.layers,
            self.n_expert_used,
            tokens,
            layer_class.reshape(-1).astype(np.int64),
            tuple(occurrences),
            token_included,
            prompt_included,
        )


def count_tokens(
    experts: npt.NDArray[np.unsignedinteger],
    token: npt.ArrayLike,
    request: npt.ArrayLike,
    position: npt.ArrayLike,
    *,
    n_expert: int,
    state: npt.NDArray[np.uint8] | None = None,
    keep: npt.ArrayLike | None = None,
    prompts: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    layers: npt.ArrayLike | None = None,
    n_expert_used: npt.ArrayLike | None = None,
    shifted: npt.ArrayLike = (),
    tokens: npt.ArrayLike | None = None,
) -> TokenCounts:
    """Count per token id; parameters as in :func:`count_routing`, with ``token`` (N,) the token ids.

    ``tokens`` limits the count to these ids (:func:`frequent_tokens`); by default all that occur, which takes
    8·X·L·E bytes. Rows with a negative token id (vector inputs) are left out.
    """
    _, n_layers, k = experts.shape
    token_ = np.asarray(token)
    wanted = token_ >= 0 if tokens is None else np.isin(token_, np.asarray(tokens))
    if keep is not None:
        wanted = wanted & np.asarray(keep, dtype=bool)
    # Rejected drafts must be found among all rows, so they are sorted out before rows are chosen.
    order = reading_order(request, position, wanted, shifted)
    names, domains = _names(order.requests, prompts, labels)
    who, index, prompt_of = np.unique(names, return_index=True, return_inverse=True)
    _one_label_each(names, domains, who, index, prompt_of)
    ids, code = np.unique(token_[order.rows], return_inverse=True)
    row_prompt = np.repeat(prompt_of, np.diff(order.request_starts))

    layer_class = _layer_classes(state, order.rows, n_layers)
    occurrences = []
    for c in range(int(layer_class.max()) + 1):
        layer = int(np.argmax(layer_class == c))
        ones = np.ones(order.rows.size, dtype=np.int64)
        if state is not None:
            ones = (np.asarray(state[order.rows, layer]) == PRESENT).astype(np.int64)
        cells = sparse.coo_array((ones, (row_prompt, code)), shape=(who.size, ids.size))
        occurrences.append(sparse.csr_array(cells.tocsr()))

    def histogram(group: Ints, n_groups: int) -> Ints:
        out = np.zeros((n_groups, n_layers, n_expert), dtype=np.int64)
        by_group = np.argsort(group, kind="stable")
        edges = np.searchsorted(group[by_group], np.arange(n_groups + 1))
        for chunk in _chunks(experts, order.rows[by_group], state, None, n_expert, 0):
            segments = _Segments.within(edges, chunk.start, chunk.stop)
            _add_at(out, segments.index, _histogram(chunk.experts, segments, n_expert, chunk.whole))
        return out

    return TokenCounts(
        prompts=who.astype(np.str_),
        labels=domains[index].astype(np.str_),
        layers=layer_numbers(layers, n_layers),
        n_expert_used=per_layer(n_expert_used, n_layers, k),
        tokens=ids.astype(np.int64),
        layer_class=layer_class,
        occurrences=tuple(occurrences),
        token_included=histogram(code.astype(np.int64), ids.size),
        prompt_included=histogram(row_prompt.astype(np.int64), who.size),
    )


def frequent_tokens(token: npt.ArrayLike, request: npt.ArrayLike, at_most: int) -> Ints:
    """The ``at_most`` most frequent token ids that occur in at least two requests, ascending."""
    token_, request_ = np.asarray(token), np.asarray(request)
    used = (token_ >= 0) & (request_ >= 0)
    pairs = np.unique(np.stack((token_[used], request_[used]), axis=1).astype(np.int64), axis=0)
    ids, n_requests = np.unique(pairs[:, 0], return_counts=True)
    ids = ids[n_requests > 1]
    every, count = np.unique(token_[used], return_counts=True)
    count = count[np.searchsorted(every, ids)]
    return np.sort(ids[np.argsort(-count, kind="stable")[:at_most]]).astype(np.int64)


# --- kernels


def _layer_classes(
    state: npt.NDArray[np.uint8] | None, rows: Ints, n_layers: int, chunk: int = 1 << 16
) -> Ints:
    """Layers (L,) that are known at the same rows share a number, from 0 in order of first appearance."""
    label = np.zeros(n_layers, dtype=np.int64)
    if state is None:
        return label
    for start in range(0, rows.size, chunk):
        known = np.asarray(state[rows[start : start + chunk]]) == PRESENT
        column = np.ascontiguousarray(np.packbits(known, axis=0).T)
        number: dict[tuple[int, bytes], int] = {}
        for layer in range(n_layers):
            key = (int(label[layer]), column[layer].tobytes())
            label[layer] = number.setdefault(key, len(number))
    return label


def _shares(order: ReadingOrder, prompt_of: Ints, n: int) -> Iterator[tuple[ReadingOrder, Ints]]:
    """Cut an order at requests into at most ``n`` parts of about equal rows, with their requests' prompts."""
    total = order.rows.size
    wanted = np.arange(1, max(n, 1)) * total // max(n, 1)
    cuts = np.unique(
        np.concatenate(([0], np.searchsorted(order.request_starts, wanted), [order.requests.size]))
    )
    for a, b in pairwise(cuts) if cuts.size > 1 else [(0, 0)]:
        start, stop = order.request_starts[a], order.request_starts[b]
        low, high = np.searchsorted(order.run_starts, (start, stop))
        yield (
            ReadingOrder(
                order.rows[start:stop],
                order.requests[a:b],
                order.request_starts[a : b + 1] - start,
                order.run_starts[low : high + 1] - start,
            ),
            prompt_of[a:b],
        )


@dataclass(frozen=True)
class _Chunk:
    """Rows [start, stop) of an order, read with a tail of up to D more rows that only serve as partners."""

    start: int
    stop: int
    experts: npt.NDArray[np.unsignedinteger]  # (C + tail, L, k); ids >= E where there is none
    first: npt.NDArray[np.unsignedinteger]  # (L, C + tail)
    whole: bool  # no id is missing


def _chunks(
    experts: npt.NDArray[np.unsignedinteger],
    rows: Ints,
    state: npt.NDArray[np.uint8] | None,
    weights: npt.NDArray[np.float32] | None,
    n_expert: int,
    tail: int,
    cells: int = 1 << 17,
) -> Iterator[_Chunk]:
    """Walk over ``rows`` in pieces of about ``cells`` (row, layer) cells: small enough for the cache."""
    _, n_layers, k = experts.shape
    none = np.iinfo(experts.dtype).max
    size = int(np.clip(cells // n_layers, 64, 8192))
    for start in range(0, rows.size, size):
        stop = min(start + size, rows.size)
        part = rows[start : min(stop + tail, rows.size)]
        # A stretch of neighbouring rows is read as a slice, without gathering.
        straight = part[-1] - part[0] == part.size - 1 and bool((np.diff(part) == 1).all())
        where: Any = slice(int(part[0]), int(part[-1]) + 1) if straight else part
        ids = np.asarray(experts[where])
        if state is not None:
            absent = np.asarray(state[where]) != PRESENT
            if absent.any():
                ids = np.where(absent[:, :, None], none, ids)
        first = ids[:, :, 0]
        if weights is not None and k > 1:
            heaviest = np.nan_to_num(np.asarray(weights[where]), nan=-np.inf).argmax(axis=2)
            first = np.take_along_axis(ids, heaviest[:, :, None], axis=2)[:, :, 0]
        yield _Chunk(start, stop, ids, np.ascontiguousarray(first.T), bool(ids.max() < n_expert))


@dataclass(frozen=True)
class _Segments:
    """Pieces of numbered stretches within a chunk: stretch (S,), start and stop (S,) in rows of the chunk."""

    index: Ints
    start: Ints
    stop: Ints

    @classmethod
    def within(cls, edges: Ints, start: int, stop: int) -> _Segments:
        """Stretch i covers [edges[i], edges[i+1]); empty ones are left out."""
        low = int(np.searchsorted(edges, start, side="right")) - 1
        high = int(np.searchsorted(edges, stop, side="left"))
        index = np.arange(low, high)
        a = np.maximum(edges[index], start) - start
        b = np.minimum(edges[index + 1], stop) - start
        some = b > a
        return cls(index[some], a[some], b[some])


def _histogram(ids: npt.NDArray[np.unsignedinteger], segments: _Segments, n_expert: int, whole: bool) -> Ints:
    """Ids (C, L, ...) counted by segment of rows and layer: (S, L, E). Segments adjoin and begin at row 0."""
    n, n_layers = int(segments.stop[-1]), ids.shape[1]
    x = ids[:n]
    width = n_expert if whole else n_expert + 1
    if not whole:
        x = np.minimum(x, n_expert)
    inner = np.arange(n_layers, dtype=np.int64) * width
    outer = np.repeat(np.arange(segments.index.size) * (n_layers * width), segments.stop - segments.start)
    offset = outer[:, None] + inner[None, :]
    if x.ndim == 3:
        offset = offset[:, :, None]
    counts = np.bincount((x + offset).reshape(-1), minlength=segments.index.size * n_layers * width)
    return counts.reshape(-1, n_layers, width)[:, :, :n_expert].astype(np.int64)


def member_words(
    ids: npt.NDArray[np.unsignedinteger], n_expert: int
) -> list[npt.NDArray[np.unsignedinteger]]:
    """Which experts each cell uses, as bits: ids (C, L, k) → words of (L, C), 32 bits if they are enough."""
    x = np.ascontiguousarray(ids.transpose(2, 1, 0))
    bits, kind = (32, np.uint32) if n_expert <= 32 else (64, np.uint64)
    words = []
    for word in range(-(-n_expert // bits)):
        # Ids outside this word wrap to large shifts, and numpy shifts those to 0.
        shift = x - x.dtype.type(word * bits) if word else x
        if word:
            shift = np.where(x < word * bits, x.dtype.type(255), shift)
        member = np.left_shift(kind(1), shift[0].astype(kind))
        for rank in range(1, x.shape[0]):
            member |= np.left_shift(kind(1), shift[rank].astype(kind))
        if n_expert < (word + 1) * bits:
            member &= kind((1 << (n_expert - word * bits)) - 1)
        words.append(member)
    return words


def _add_at(table: Ints, where: Ints, values: Ints) -> None:
    """``table[where] += values``, with repeated indices adding up."""
    if np.unique(where).size == where.size:
        table[where] += values
    else:
        np.add.at(table, where, values)


class _Tables:
    """The sums of :func:`count_routing` while they grow. Threads compute apart and add in turn."""

    def __init__(self, n_prompts: int, n_layers: int, n_expert: int, k: int, max_lag: int) -> None:
        self.n_layers, self.n_expert, self.k, self.max_lag = n_layers, n_expert, k, max_lag
        self.tokens = np.zeros((n_prompts, n_layers), dtype=np.int64)
        self.included = np.zeros((n_prompts, n_layers, n_expert), dtype=np.int64)
        self.top1 = np.zeros((n_prompts, n_layers, n_expert), dtype=np.int64)
        lags = (n_prompts, n_layers, max_lag)
        self.lag_pairs, self.lag_shared, self.lag_top1 = (np.zeros(lags, dtype=np.int64) for _ in range(3))
        self.transitions = np.zeros(n_layers * (n_expert + 1) ** 2, dtype=np.int64)
        self._lock = Lock()
        self._steps: list[npt.NDArray[np.int32]] = []
        self._n_steps = 0

    def add(self, chunk: _Chunk, order: ReadingOrder, prompt_of: Ints) -> None:
        segments = _Segments.within(order.request_starts, chunk.start, chunk.stop)
        where = prompt_of[segments.index]
        n = chunk.stop - chunk.start
        first = np.ascontiguousarray(chunk.first[:, :n].T)
        included = _histogram(chunk.experts, segments, self.n_expert, chunk.whole)
        top1 = _histogram(first, segments, self.n_expert, chunk.whole)
        with self._lock:
            _add_at(self.included, where, included)
            _add_at(self.top1, where, top1)
            _add_at(self.tokens, where, top1.sum(axis=2))
        if self.max_lag:
            self._add_lags(chunk, order, prompt_of)

    def _add_lags(self, chunk: _Chunk, order: ReadingOrder, prompt_of: Ints) -> None:
        words = member_words(chunk.experts, self.n_expert)
        first = chunk.first
        known = None if chunk.whole else first < self.n_expert
        low = int(np.searchsorted(order.run_starts, chunk.start, side="right")) - 1
        high = int(np.searchsorted(order.run_starts, chunk.stop, side="left"))
        run_start, run_stop = order.run_starts[low:high], order.run_starts[low + 1 : high + 1]
        owner = prompt_of[np.searchsorted(order.request_starts, run_start, side="right") - 1]
        sums = np.uint16 if self.k * (chunk.stop - chunk.start) < 1 << 16 else np.uint32
        # Fresh arrays of this size cost more in page faults than the arithmetic on them.
        common, ones = np.empty_like(words[0]), np.empty(first.shape, dtype=np.uint8)
        more, same = np.empty_like(ones), np.empty(first.shape, dtype=bool)
        pairs, shared, alike = (
            np.zeros((self.max_lag, run_start.size, self.n_layers), dtype=np.int64) for _ in range(3)
        )
        for lag in range(1, self.max_lag + 1):
            a = np.maximum(run_start, chunk.start) - chunk.start
            b = np.minimum(run_stop - lag, chunk.stop) - chunk.start
            some = b > a
            if not some.any():
                break
            a, b = a[some], b[some]
            n = int(b[-1])
            # Starts and ends in turn; the last stretch ends where the arrays below end.
            edges = np.stack((a, b), axis=1).reshape(-1)[:-1]

            def total(values: npt.NDArray[Any], edges: Ints = edges) -> npt.NDArray[Any]:
                """Values (L, n) summed over each stretch: (stretches, L)."""
                return np.add.reduceat(values, edges, axis=1, dtype=sums)[:, ::2].T

            for i, word in enumerate(words):
                np.bitwise_and(word[:, :n], word[:, lag : lag + n], out=common[:, :n])
                np.bitwise_count(common[:, :n], out=more[:, :n] if i else ones[:, :n])
                if i:
                    ones[:, :n] += more[:, :n]
            np.equal(first[:, :n], first[:, lag : lag + n], out=same[:, :n])
            if known is None:
                pairs[lag - 1, some] = (b - a)[:, None]
            else:
                both = known[:, :n] & known[:, lag : lag + n]
                same[:, :n] &= both
                pairs[lag - 1, some] = total(both)
            shared[lag - 1, some] = total(ones[:, :n])
            alike[lag - 1, some] = total(same[:, :n])
            if lag == 1:
                self._add_steps(first, a, b)
        with self._lock:
            for table, values in ((self.lag_pairs, pairs), (self.lag_shared, shared), (self.lag_top1, alike)):
                _add_at(table, owner, values.transpose(1, 2, 0))

    def _add_steps(self, first: npt.NDArray[np.unsignedinteger], a: Ints, b: Ints) -> None:
        n, width = int(b[-1]), self.n_expert + 1
        inside = np.zeros(n + 1, dtype=np.int8)
        inside[a] += 1
        inside[b] -= 1
        mask = np.cumsum(inside[:n]) > 0
        x = np.minimum(first[:, : n + 1], self.n_expert).astype(np.int32)
        layer = np.arange(self.n_layers, dtype=np.int32)[:, None] * np.int32(width * width)
        keys = x[:, :n] * np.int32(width) + x[:, 1 : n + 1] + layer
        steps = keys[:, mask].reshape(-1) if not mask.all() else keys.reshape(-1)
        with self._lock:
            self._steps.append(steps)
            self._n_steps += steps.size
            # One bincount touches the whole table: gather as many steps as it has cells first.
            if self._n_steps > max(self.transitions.size, 1 << 20):
                self._flush()

    def _flush(self) -> None:
        if self._steps:
            self.transitions += np.bincount(np.concatenate(self._steps), minlength=self.transitions.size)
            self._steps, self._n_steps = [], 0

    def finish(self) -> dict[str, Ints]:
        self._flush()
        square = self.transitions.reshape(self.n_layers, self.n_expert + 1, self.n_expert + 1)
        return {
            "transitions": np.ascontiguousarray(square[:, :-1, :-1]),
            **{name: getattr(self, name) for name in _PER_PROMPT},
        }


def _names(
    requests: Ints, prompts: Sequence[str] | None, labels: Sequence[str] | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Name and domain of each request; objects, so that empty lists work."""
    for given in (prompts, labels):
        if given is not None and requests.size and int(requests.max()) >= len(given):
            raise UsageError(
                f"request {int(requests.max())} has no entry among {len(given)} names or labels",
                fix="give one name and one label per request number",
            )
    names = [str(r) if prompts is None else str(prompts[r]) for r in requests.tolist()]
    domains = ["" if labels is None else str(labels[r] or "") for r in requests.tolist()]
    return np.array(names, dtype=np.str_), np.array(domains, dtype=np.str_)


def _one_label_each(
    names: npt.NDArray[Any], domains: npt.NDArray[Any], who: npt.NDArray[Any], index: Ints, prompt_of: Ints
) -> None:
    wrong = np.flatnonzero(domains != domains[index][prompt_of])
    if wrong.size:
        raise two_domains(names[wrong[0]], domains[index[prompt_of[wrong[0]]]], domains[wrong[0]])


def two_domains(prompt: str, one: str, other: str) -> UsageError:
    """What is raised of a prompt that would count for two domains."""
    return UsageError(
        f"prompt {str(prompt)!r} has two domains: {one}, {other}",
        fix="name prompts apart, or label them alike",
    )


def _union(
    one: tuple[npt.NDArray[np.str_], npt.NDArray[np.str_]],
    two: tuple[npt.NDArray[np.str_], npt.NDArray[np.str_]],
) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.str_], tuple[Ints, Ints]]:
    """Sorted union of two lists of prompts with their labels, and where each one's prompts went."""
    names, domains = np.concatenate((one[0], two[0])), np.concatenate((one[1], two[1]))
    who, index, where = np.unique(names, return_index=True, return_inverse=True)
    _one_label_each(names, domains, who, index, where)
    return who.astype(np.str_), domains[index], (where[: one[0].size], where[one[0].size :])
