"""``route_trace v1``, as engines write it that keep experts on flash (BigMoeOnEdge): a line for each expert of a token.

Comment lines say the model's shape and the bytes of an expert of each layer; then
``turn,phase,step,layer,slot,expert,weight,residency,expert_bytes``, phase 0 the prompt, 1 what was generated. A turn's
prompt is computed together, layer by layer, and of the last layer for the last token only: the other tokens' entries
there are not computed. Anywhere else a (token, layer) without lines is lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import InputError
from moetrace.trace.importers.source import (
    DECODE,
    LOST,
    MAX_EXPERTS,
    MAX_LAYERS,
    NOT_COMPUTED,
    PREFILL,
    PRESENT,
    Piece,
    Shape,
    Tally,
    int_array,
    integer,
    lines,
    malformed,
)

HEADER = "# route_trace v1"
NAMES = "turn,phase,step,layer,slot,expert,weight"
_FACT = re.compile(r"(\w+)=(\S+)")
_MAX_STEP = 1 << 31


def shape(path: Path) -> Shape:
    """First reading: the comment lines, and which layers there are."""
    facts: dict[str, str] = {}
    size: dict[int, int] = {}
    layers: set[int] = set()
    highest = widest = -1
    for line, text in lines(path):
        if text.startswith("#"):
            said = dict(_FACT.findall(text))
            if "layer" in said:
                size[integer(path, line, "layer", said["layer"], MAX_LAYERS)] = integer(
                    path, line, "expert_bytes", said.get("expert_bytes", ""), 1 << 62
                )
            else:
                facts |= said
            continue
        if text.startswith("turn,"):
            if not text.startswith(NAMES):
                raise malformed(path, line, "header", f"does not begin with {NAMES}")
            continue
        *_, layer, slot, expert = _numbers(path, line, text)
        layers.add(layer)
        highest, widest = max(highest, expert), max(widest, slot)
    if not layers:
        raise InputError(f"{path} holds no routing", fix="give a route_trace with lines after its comments")
    k = widest + 1
    told = facts.get("n_expert_used")
    if told is not None and integer(path, None, "n_expert_used", told, MAX_EXPERTS) != k:
        raise malformed(path, None, "n_expert_used", f"is {told}, and tokens have {k} slots")
    ordered = tuple(sorted(layers))
    return Shape(
        ordered,
        k,
        highest + 1,
        0,
        weights=True,
        knows=frozenset({"position", "phase"}),
        n_expert=integer(path, None, "n_expert", facts.get("n_expert", "0"), MAX_EXPERTS),
        model={"name": Path(facts.get("model", "")).stem, "architecture": facts.get("arch", "")},
        expert_bytes=tuple(size[layer] for layer in ordered) if set(ordered) <= set(size) else (),
    )


def pieces(path: Path, shape: Shape, tally: Tally, *, label: str = "") -> Iterator[Piece]:
    """One request per turn, in one piece for its prompt and one for what was generated."""
    index = {layer: i for i, layer in enumerate(shape.layers)}
    found: list[tuple[int, ...]] = []
    weights: list[float] = []
    current: tuple[int, int] | None = None
    for line, text in lines(path):
        if text.startswith(("#", "turn,")):
            continue
        turn, phase, step, layer, slot, expert = _numbers(path, line, text)
        if current is not None and (turn, phase) != current:
            yield _piece(path, shape, current, found, weights, label)
            found, weights = [], []
        if current is not None and (turn, phase) < current:
            raise malformed(path, line, "turn", "comes again: lines are in the order of turns and phases")
        current = turn, phase
        found.append((step, index[layer], slot, expert, line))
        try:
            weights.append(float(text.split(",")[6]))
        except ValueError:
            raise malformed(path, line, "weight", f"{text.split(',')[6][:40]!r} is no number") from None
    if current is not None:
        yield _piece(path, shape, current, found, weights, label)


def _numbers(path: Path, line: int, text: str) -> tuple[int, int, int, int, int, int]:
    """turn, phase, step, layer, slot, expert."""
    words = text.split(",")
    if len(words) < 7:
        raise malformed(path, line, "line", f"has {len(words)} values: a line is {NAMES},…")
    below = {
        "turn": _MAX_STEP,
        "phase": 2,
        "step": _MAX_STEP,
        "layer": MAX_LAYERS,
        "slot": 4096,
        "expert": MAX_EXPERTS,
    }
    turn, phase, step, layer, slot, expert = (
        integer(path, line, name, word, most)
        for (name, most), word in zip(below.items(), words, strict=False)
    )
    return turn, phase, step, layer, slot, expert


def _piece(
    path: Path,
    shape: Shape,
    turn_phase: tuple[int, int],
    found: list[tuple[int, ...]],
    weight: list[float],
    label: str,
) -> Piece:
    table = np.array(found, np.int64)
    steps, row = np.unique(table[:, 0], return_inverse=True)
    n, n_layers, k = steps.size, len(shape.layers), shape.n_expert_used
    experts = np.full((n, n_layers, k), -1, np.int64)
    weights = np.full((n, n_layers, k), np.nan, np.float32)
    at = row, table[:, 1], table[:, 2]
    experts[at], weights[at] = table[:, 3], weight
    whole: NDArray[np.bool_] = np.all(experts >= 0, axis=2)
    partial = (experts >= 0).any(axis=2) & ~whole
    twice = np.sort(experts, axis=2)
    if (
        table.shape[0] != int((experts >= 0).sum())
        or ((twice[:, :, 1:] == twice[:, :, :-1]) & whole[:, :, None]).any()
    ):
        raise malformed(
            path, int(table[0, 4]), "slot", "from here on a token has a slot, or an expert, twice"
        )
    if partial.any():
        t, layer = (int(i[0]) for i in np.nonzero(partial))
        raise malformed(
            path, int(table[0, 4]), "slot",
            f"of the lines from here on step {steps[t]} has fewer than {k} experts in layer {shape.layers[layer]}",
        )  # fmt: skip
    turn, phase = turn_phase
    state = np.where(whole, PRESENT, LOST).astype(np.uint8)
    if phase == 0:
        state[:-1, -1] = np.where(whole[:-1, -1], PRESENT, NOT_COMPUTED)
    return Piece(
        f"{path.stem.removesuffix('.route')}-{turn}",
        label or path.stem.removesuffix(".route"),
        np.array(shape.layers, np.int64),
        state,
        experts,
        None,
        token=int_array(n, -1),
        position=steps if turn == 0 else int_array(n, -1),
        predicted=None,
        time_ns=int_array(n, -1),
        phase=np.full(n, PREFILL if phase == 0 else DECODE, np.uint8),
        row=np.arange(n, dtype=np.int64) if phase == 0 else int_array(n, 0),
        weights=weights,
    )
