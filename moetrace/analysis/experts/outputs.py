"""What experts compute, in numpy: an independent computation of llama.cpp's expert matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moetrace.analysis.counts.from_trace import Routing
from moetrace.errors import UsageError
from moetrace.model.experts import Activation, Expert

Matrix = npt.NDArray[np.float32]


def expert_output(expert: Expert, x: Matrix, activation: Activation = "silu") -> Matrix:
    """What one expert makes of inputs (n, D): (n, D), float32, without the mixing weight.

    down(act(gate x) ∘ up x), with biases where the expert has them; down(act(up x)) where it has no gate.
    "swiglu_oai" is gpt-oss's: g·σ(1.702 g)·(u + 1) with g ≤ 7 and |u| ≤ 7. GELU is the tanh approximation, as
    in ggml.
    """
    up = x @ expert.up.T
    if expert.up_bias is not None:
        up += expert.up_bias
    if expert.gate is None:
        hidden = _ACTIVATIONS[activation](up)
    else:
        gate = x @ expert.gate.T
        if expert.gate_bias is not None:
            gate += expert.gate_bias
        if activation == "swiglu_oai":
            gate = np.minimum(gate, 7.0)
            hidden = gate * _sigmoid(1.702 * gate) * (np.clip(up, -7.0, 7.0) + 1)
        else:
            hidden = _ACTIVATIONS[activation](gate) * up
    out = hidden @ expert.down.T
    if expert.down_bias is not None:
        out += expert.down_bias
    return np.asarray(out, np.float32)


def expert_outputs(experts: Sequence[Expert], x: Matrix, activation: Activation = "silu") -> Matrix:
    """What every expert makes of every input: (E, n, D), float32. Takes E·n·D·4 bytes."""
    out = np.empty((len(experts), *x.shape), np.float32)
    for i in range(len(experts)):
        out[i] = expert_output(experts[i], x, activation)
    return out


def chosen_outputs(
    experts: Sequence[Expert],
    x: Matrix,
    ids: npt.NDArray[np.integer],
    weights: Matrix,
    activation: Activation = "silu",
    *,
    weights_before: bool = False,
) -> Matrix:
    """What the chosen experts contribute, mixing weights included: (n, k, D), float32.

    Parameters
    ----------
    x, ids, weights
        (n, D) gate inputs, (n, k) expert ids, (n, k) mixing weights: one layer's rows of a trace.
    weights_before
        The weight multiplies the input (Llama 4).

    Their sum over k is what llama.cpp calls ``ffn_moe_out``. Only one expert is in memory at a time.
    """
    if ids.shape != weights.shape or ids.shape[0] != x.shape[0]:
        raise UsageError(
            f"{x.shape[0]} inputs, expert ids {ids.shape} and weights {weights.shape} do not fit together",
            fix="give rows of the same tokens",
        )
    out = np.zeros((*ids.shape, x.shape[1]), np.float32)
    for e in np.unique(ids):
        token, rank = np.nonzero(ids == e)
        w = weights[token, rank][:, None]
        if weights_before:
            out[token, rank] = expert_output(experts[int(e)], x[token] * w, activation)
        else:
            out[token, rank] = expert_output(experts[int(e)], x[token], activation) * w
    return out


def blocks_of_pairs(
    experts: Sequence[Expert], pairs: npt.NDArray[np.integer], max_bytes: int, factor: float
) -> Iterator[tuple[dict[int, Expert], npt.NDArray[np.intp]]]:
    """Go through pairs (n, 2) with few experts in memory at a time.

    Yields the experts that a set of pairs needs, and the indices of those pairs. ``factor``: how many times an
    expert's own size it takes to work on one.
    """
    each = experts[0].n_bytes * factor
    step = max(1, int(max_bytes / max(each, 1) / 2))
    block = pairs // step
    keys, group = np.unique(block, axis=0, return_inverse=True)
    held: dict[int, Expert] = {}
    for number in range(len(keys)):
        mine = np.flatnonzero(group.reshape(-1) == number)
        needed = {int(e) for e in pairs[mine].ravel()}
        held = {e: held[e] if e in held else experts[e] for e in sorted(needed)}
        yield held, mine


def _sigmoid(x: Matrix) -> Matrix:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)), np.float32)  # does not overflow


def _gelu(x: Matrix) -> Matrix:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), np.float32)


_ACTIVATIONS: dict[str, Callable[[Matrix], Matrix]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": _gelu,
    "relu": lambda x: np.maximum(x, 0),
    "relu_sqr": lambda x: np.maximum(x, 0) ** 2,
}


@dataclass(frozen=True)
class LayerRows:
    """Tokens of one layer, for analyses of what experts compute.

    Attributes
    ----------
    rows
        (n,) row numbers in the trace.
    gate_input, experts, weights
        (n, D), (n, k), (n, k).
    prompts
        (n,) the prompt of each.
    """

    rows: npt.NDArray[np.int64]
    gate_input: npt.NDArray[np.float32]
    experts: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    prompts: npt.NDArray[np.str_]


def layer_rows(routing: Routing, index: int, at_most: int | None = None) -> LayerRows:
    """Tokens of the layer at ``index`` of the layer axis, evenly spread over the chosen rows; one trace only.

    Rows in which the layer was not computed are left out. Raises ChannelMissingError if the trace has no gate
    inputs or weights.
    """
    routing.whole("what experts compute")
    parts = [(each, each.need("gate_input"), each.need("weights")) for each in routing.chosen]
    starts = np.concatenate(([0], np.cumsum([each.keep.size for each in routing.chosen])))
    rows = np.concatenate(
        [
            start + np.flatnonzero(each.keep & (np.asarray(each.trace.state[:, index]) == 1))
            for start, each in zip(starts.tolist(), routing.chosen, strict=False)
        ]
    )
    if at_most is not None and rows.size > at_most:
        rows = rows[np.linspace(0, rows.size - 1, at_most).astype(np.int64)]
    found = []
    for i, (each, gate_input, weights) in enumerate(parts):
        trace = each.trace
        k = int(trace.n_expert_used[index])
        mine = rows[(rows >= starts[i]) & (rows < starts[i + 1])] - starts[i]
        names = np.array([*each.clusters, ""], dtype=np.str_)
        found.append(
            (
                np.asarray(gate_input[mine, index], np.float32),
                np.asarray(trace.experts[mine, index, :k], np.int64),
                np.asarray(weights[mine, index, :k], np.float32),
                names[np.asarray(trace.request)[mine]],
            )
        )
    return LayerRows(rows, *(np.concatenate(columns) for columns in zip(*found, strict=True)))
