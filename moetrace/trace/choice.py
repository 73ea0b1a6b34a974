"""Whether recorded choices follow from what was recorded of them: ids from scores, and scores from logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.trace.intervention import Kind, Rule
from moetrace.trace.record import RowFlag, State
from moetrace.trace.rows import Layout

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

_FORCED = np.float32(2.0**100)  # forced experts' scores begin here (forced_score in csrc/intervene.cpp)
# how far scores may be off, of themselves (GPUs take exponentials to five digits), of the bias (what rounding the sum
# leaves), and at least; of a small softplus little is left of 1 + exp(x)
_OF_SCORE, _OF_BIAS, _LEAST = np.float32(1e-4), np.float32(2e-6), np.float32(1e-7)
_LEAST_OF = {"sqrt-softplus": np.float32(4e-4)}


def _softmax(logits: Floats) -> Floats:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def _sigmoid(logits: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-logits)))


def _sqrt_softplus(logits: Floats) -> Floats:
    return np.asarray(np.sqrt(np.logaddexp(np.float32(0), logits)))


#: llama.cpp's gating functions (llama_expert_gating_func_type)
GATING: Mapping[str, Callable[[Floats], Floats]] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "sqrt-softplus": _sqrt_softplus,
    "identity": lambda logits: logits,
}


def is_top_k(scores: Floats, ids: NDArray[np.integer[Any]]) -> Bools:
    """Say of each row whether its ids are the experts with the highest scores, the highest first.

    Parameters
    ----------
    scores
        (n, E) float32; masked experts are -inf. Experts of equal scores stand in any order, as in llama.cpp's sort.
    ids
        (n, k) numbers below E, distinct within a row.

    Returns
    -------
    numpy.ndarray
        (n,) bool.
    """
    chosen = np.take_along_axis(scores, ids.astype(np.intp), axis=1)
    last = chosen[:, -1:]
    complete = (scores > last).sum(axis=1) == (chosen > last).sum(axis=1)
    return np.asarray(complete & (chosen[:, 1:] <= chosen[:, :-1]).all(axis=1))


@dataclass
class _Gate:
    """A layer's gating function, not known yet: each that may be it, with its bias; of the others, where they failed.

    The bias of an expert (the selection bias of DeepSeek-V3) is what its scores have beyond the function in the
    median of the rows in which it was first seen.
    """

    bias: dict[str, Floats] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    def feed(self, logits: Floats, scores: Floats, telling: Bools, rows: NDArray[np.intp]) -> None:
        """Hold scores against logits, (n, E) both; ``telling`` are the cells to look at, ``rows`` the rows' numbers."""
        for name in GATING.keys() - self.failed.keys():
            with np.errstate(over="ignore", invalid="ignore"):
                made = GATING[name](logits)
                beyond = scores - made
                bias = self.bias.setdefault(
                    name, np.full(logits.shape[1], 0 if name == "identity" else np.nan, np.float32)
                )
                fresh = np.flatnonzero(np.isnan(bias) & telling.any(axis=0))
                if fresh.size:
                    seen = np.where(telling[:, fresh], beyond[:, fresh], np.nan)
                    bias[fresh] = np.nanmedian(seen, axis=0)
                allowed = _OF_SCORE * np.abs(made) + _OF_BIAS * np.abs(bias) + _LEAST_OF.get(name, _LEAST)
                wrong = telling & ~(np.abs(beyond - bias) <= allowed)
            off = np.flatnonzero(wrong.any(axis=1))
            if off.size:
                self.failed[name] = int(rows[off[0]])

    @property
    def failed_at(self) -> int | None:
        """The first row that no function explains, which is where the one that went furthest failed."""
        return max(self.failed.values()) if len(self.failed) == len(GATING) else None


class ChoiceCheck:
    """Goes through a context's rows, some at a time.

    Parameters
    ----------
    layout
        The context's columns; what it has no channels for is not checked.
    rules
        Of all interventions of the trace; None: not known. In rows that were intervened on the scores are what the
        choice was made on, so that ids follow from them; but scores that were forced, masked or biased follow from
        no logits.
    """

    def __init__(self, layout: Layout, rules: Sequence[Rule] | None) -> None:
        self._layout = layout
        self._rules = rules
        self._gates = [_Gate() for _ in layout.layers]

    def feed(self, start: int, piece: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, str, Bools]]:
        """Give (column, what would be wrong, where it is) for the rows from ``start`` on, which are ``piece``."""
        if "scores" not in piece:
            return
        for i, layer in enumerate(self._layout.layers):
            n, k = self._layout.n_expert[i], self._layout.n_expert_used[i]
            # all are NaN in a layer that does not choose by scores; one of them is where the model itself broke
            known = piece["state"][:, i] == State.PRESENT
            scores = np.asarray(piece["scores"][:, i, :n])
            known &= ~np.isnan(scores).any(axis=1)
            if not n or not k or not known.any():
                continue
            if "experts" in piece:
                ids = np.asarray(piece["experts"][:, i, :k])
                rows = np.flatnonzero(known & (ids < n).all(axis=1))
                wrong = np.zeros(len(known), bool)
                wrong[rows] = ~is_top_k(scores[rows], ids[rows])
                yield (
                    "experts",
                    f"layer {layer}: they are not those with the highest scores, best first",
                    wrong,
                )
            if "logits" in piece:
                logits = np.asarray(piece["logits"][:, i, :n])
                rows = np.flatnonzero(known & ~np.isnan(logits).any(axis=1))
                telling = np.isfinite(scores) & ~self._changed(layer, piece, scores)
                self._gates[i].feed(logits[rows], scores[rows], telling[rows], start + rows)

    def _changed(self, layer: int, piece: Mapping[str, NDArray[Any]], scores: Floats) -> Bools:
        """Scores (n, E) that an intervention may have replaced, by a finite one."""
        intervened = ((piece["flags"] & RowFlag.INTERVENED) != 0)[:, None]
        if self._rules is None:
            return np.broadcast_to(intervened, scores.shape)
        changed: Bools = intervened & (scores >= _FORCED)
        for rule in self._rules:
            if rule.kind is Kind.BIAS and rule.has_layer(layer):
                mine = intervened[:, 0] & ((rule.sequence < 0) | (piece["sequence"] == rule.sequence))
                experts = rule.ids[rule.ids < scores.shape[1]].ravel()
                changed[np.ix_(mine, experts)] = True
        return changed

    def finish(self) -> Iterator[tuple[str, str]]:
        """Give (column, what is wrong) when all rows have been seen."""
        for layer, gate in zip(self._layout.layers, self._gates, strict=True):
            row = gate.failed_at
            if row is not None:
                yield (
                    "scores",
                    f"layer {layer}: they do not follow from the logits by any of {', '.join(GATING)},"
                    f" with or without a bias of each expert (first in row {row})",
                )
