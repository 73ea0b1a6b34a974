"""A request's text, token by token, with the experts of each: what ``show``, the report and the live page draw."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import UsageError
from moetrace.trace.record import RowFlag
from moetrace.trace.requests import Phase
from moetrace.trace.trace import Trace


@dataclass(frozen=True)
class RequestText:
    """The n computed tokens of one request by position; arrays are copies.

    Attributes
    ----------
    number, id, label
        The request's, as in :attr:`~moetrace.trace.trace.Trace.requests`; None where the client said none.
    layers
        (L,) int64.
    pieces
        n texts; a character whose bytes are of several tokens stands at the last of them. ``<7>`` where the token
        has no text.
    positions
        (n,) int32. Where they jump, tokens were not computed (a prompt cache) or are lost.
    phase
        (n,) uint8, :class:`~moetrace.trace.requests.Phase`.
    experts
        (n, L, k) integers; what they say counts only where ``present``, and where a weight, if known, is a number.
    weights
        (n, L, k) float32, NaN where there is none; None if they were not captured.
    present
        (n, L) whether the layer was computed for the token, and recorded.
    readable
        Whether the words of tokens are known.
    """

    number: int
    id: str | None
    label: str | None
    layers: NDArray[np.int64]
    pieces: tuple[str, ...]
    positions: NDArray[np.int32]
    phase: NDArray[np.uint8]
    experts: NDArray[np.integer]
    weights: NDArray[np.float32] | None
    present: NDArray[np.bool_]
    readable: bool

    def first(self) -> NDArray[np.int64]:
        """(n, L) the expert of the largest weight, else the router's first; -1 where there is none."""
        if self.weights is None:
            best = np.zeros(self.present.shape, np.int64)
        else:
            best = np.nan_to_num(self.weights, nan=-1.0).argmax(axis=2)
        chosen = np.take_along_axis(self.experts.astype(np.int64), best[..., None], axis=2)[..., 0]
        return np.where(self.present, chosen, -1)

    def chosen(self) -> NDArray[np.int64]:
        """(n, L, k) experts, -1 where there is none."""
        there = np.broadcast_to(self.present[..., None], self.experts.shape)
        if self.weights is not None:
            there = there & ~np.isnan(self.weights)
        return np.where(there, self.experts.astype(np.int64), -1)

    def to_json(self) -> dict[str, Any]:
        """One layer of it, the first, as JSON values; what the pages' text view takes."""
        weights = None
        if self.weights is not None:
            weights = [[None if w != w else round(w, 4) for w in row] for row in self.weights[:, 0].tolist()]
        return {
            "number": self.number,
            "id": self.id,
            "label": self.label,
            "layer": int(self.layers[0]),
            "readable": self.readable,
            "pieces": list(self.pieces),
            "positions": self.positions.tolist(),
            "generated": decoding(self.phase).tolist(),
            "experts": self.chosen()[:, 0].tolist(),
            "weights": weights,
        }


def called(trace: Trace, asked: str) -> list[int]:
    """Give the numbers of the requests that a client called so; else the one whose number it is; else none."""
    requests = trace.requests
    found = [int(n) for n in requests.index[requests["id"] == asked]]
    return found or ([int(asked)] if asked.isdecimal() and int(asked) in requests.index else [])


def request_number(trace: Trace, asked: str | None) -> int:
    """Give a request's number: of a client's id, else the number itself; None: the first.

    Raises UsageError if there is no request, or no such one, or several are called so.
    """
    if not len(trace.requests):
        raise UsageError(f"{trace.path} has no request", fix="capture something first")
    if asked is None:
        return int(trace.requests.index[0])
    found = called(trace, asked)
    if len(found) > 1:
        listed = ", ".join(map(str, found[:9]))
        raise UsageError(f"{len(found)} requests are called {asked!r}", fix=f"ask by number: {listed}")
    if not found:
        trace.sel(request=asked)  # says which there are
        raise UsageError(f"there is no request {asked!r}")
    return found[0]


def request_text(
    trace: Trace, number: int, layer: int | None = None, max_tokens: int | None = None
) -> RequestText:
    """Read the text of one request, in all layers or one; at most its first ``max_tokens`` computed tokens.

    Raises UsageError if there is no such request or layer.
    """
    layers = trace.layers.tolist()
    if layer is not None and layer not in layers:
        raise UsageError(f"there is no layer {layer}", fix=f"choose among: {', '.join(map(str, layers))}")
    rows = trace.sel(request=number) if layer is None else trace.sel(request=number, layer=layer)
    keep = np.flatnonzero((np.asarray(rows.flags) & RowFlag.TRIAL) == 0)
    keep = keep[np.argsort(np.asarray(rows.positions)[keep], kind="stable")][:max_tokens]
    said: Any = trace.requests.loc[number]
    return RequestText(
        number=number,
        id=said["id"],
        label=said["label"],
        layers=np.asarray(rows.layers),
        pieces=tuple(_pieces(trace.vocabulary, np.asarray(rows.token_ids)[keep])),
        positions=np.asarray(rows.positions)[keep],
        phase=np.asarray(rows.phase)[keep],
        experts=np.asarray(rows.experts)[keep],
        weights=np.asarray(rows.weights)[keep] if "weights" in trace.channels else None,
        present=np.asarray(rows.present)[keep],
        readable=trace.vocabulary is not None,
    )


def decoding(phase: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(n,) which tokens were generated."""
    return np.asarray(phase == Phase.DECODE)


def _pieces(words: list[bytes] | None, tokens: NDArray[np.int32]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens.tolist():
        if words is None or not 0 <= token < len(words):
            yield f"<{token}>"
        else:
            yield decoder.decode(words[token])
