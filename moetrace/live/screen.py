"""What is known of a live recording, as lines for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moetrace.live.tail import LABEL_ROWS, Snapshot
from moetrace.printable import printable

Window = Literal["recent", "hour", "counts"]
WINDOWS: dict[Window, str] = {"recent": "the last seconds", "hour": "the last hour", "counts": "all of it"}
#: in multiples of an even share; beyond the last the last
_STEPS = (0.125, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
_BARS = " ▁▂▃▄▅▆▇█"
_LISTED = 5


def lines(
    now: Snapshot,
    window: Window,
    *,
    layer: int | None = None,
    label: str | None = None,
    width: int = 100,
    height: int = 40,
    red: Callable[[str], str] = str,
) -> list[str]:
    """Give the lines, at most ``height`` of at most ``width`` columns.

    ``layer``, an index, shows its experts one by one instead of all layers; ``label`` says whose counts
    ``now.of_label`` are, if they are shown; ``red`` marks what was lost.
    """
    counts = {"recent": now.recent, "hour": now.hour, "counts": now.counts}[window]
    of = WINDOWS[window]
    if label is not None and now.of_label is not None:
        counts, of = now.of_label, f"{printable(label)}, the latest {LABEL_ROWS:,} rows"
    rate = " ".join(f"{n:,.1f} {phase}" for phase, n in now.per_second.items()) or "no"
    total = sum(now.tokens.values())
    out = [_cut(f"{total:,} tokens recorded, {rate} tokens a second", width)]
    for context in now.contexts:
        ring = "" if np.isnan(context.ring_fill) else f", ring {context.ring_fill:.0%} full"
        force = f", intervention {context.intervention} is in force" if context.intervention else ""
        lost = context.lost + context.events_lost
        said = _cut(f"{printable(context.name)}: {context.state}{ring}{force}, {lost:,} lost", width)
        out.append(red(said) if lost else said)
    for one in now.active[:_LISTED]:
        name = f" {printable(one.name)}" if one.name else ""
        out.append(
            _cut(f"slot {one.slot}: request {one.request}{name}, {one.phase}, {one.tokens:,} tokens", width)
        )
    if len(now.active) > _LISTED:
        out.append(_cut(f"… {len(now.active) - _LISTED} more requests", width))
    if np.isfinite(now.served):
        said = f"of the last seconds, the quarter of experts that was hottest before served {now.served:.0%}"
        out.append(_cut(said, width))
    labels = sorted((item for item in now.by_domain.items() if item[0]), key=lambda item: -item[1])
    if labels:
        said = ", ".join(f"{printable(name)} {n:,}" for name, n in labels[:_LISTED])
        out.append(_cut(f"labels: {said}", width))
    multiples = np.full(counts.shape, np.nan)
    for i, n in enumerate(now.n_expert.tolist()):
        if counts[i].sum():
            multiples[i, :n] = counts[i, :n] * (n / counts[i].sum())
    if layer is not None:
        return [*out, "", *_one_layer(now, counts, multiples, layer, of, width, height - len(out) - 1)][
            :height
        ]
    out += ["", _cut(f"layers by experts, {of}: heights are multiples of an even share, █ 4 or more", width)]
    room = height - len(out) - 2
    shown = range(len(now.layers)) if room >= len(now.layers) else range(max(room - 1, 1))
    digits = len(str(int(now.layers.max())))
    for i in shown:
        out.append(f"{now.layers[i]:>{digits}} {_row(multiples[i], width - digits - 1)}")
    if len(shown) < len(now.layers):
        out.append(_cut(f"… {len(now.layers) - len(shown)} more layers: a higher terminal shows them", width))
    if np.isfinite(multiples).any():
        best = np.argsort(-np.nan_to_num(multiples, nan=-1.0), axis=None)[:_LISTED]
        hottest = [
            f"L{now.layers[at // counts.shape[1]]} E{at % counts.shape[1]} {multiples.ravel()[at]:.1f} ×"
            for at in best
        ]
        out += [_cut("hottest: " + ", ".join(hottest), width)]
    return out[:height]


def _one_layer(
    now: Snapshot,
    counts: NDArray[np.uint64],
    multiples: NDArray[np.float64],
    layer: int,
    of: str,
    width: int,
    height: int,
) -> list[str]:
    """A layer's experts, the hottest first, in as many columns as fit."""
    n = int(now.n_expert[layer])
    total = int(counts[layer, :n].sum())
    out = [_cut(f"layer {now.layers[layer]}, {of}: {total:,} activations of {n} experts", width)]
    if not total:
        return out
    order = np.argsort(-counts[layer, :n].astype(np.int64), kind="stable")
    cells = [
        f"E{e:<4}{counts[layer, e] / total:>6.1%} {multiples[layer, e]:>5.1f} × "
        + _BARS[int(np.searchsorted(_STEPS, multiples[layer, e], "right"))]
        for e in order.tolist()
    ]
    room = max(height - 2, 1)
    columns = max(1, min(-(-len(cells) // room), (width + 3) // 24))
    shown = cells[: room * columns]
    rows = -(-len(shown) // columns)
    out += [_cut("   ".join(shown[i::rows]), width) for i in range(rows)]
    if len(shown) < n:
        out.append(_cut(f"… {n - len(shown)} more", width))
    return out


def _row(values: NDArray[np.float64], width: int) -> str:
    """A bar for each expert; where there are more than columns, neighbours share one, as high as the higher."""
    share = -(-len(values) // max(width, 1))
    padded = np.append(values, np.full(-len(values) % share, np.nan)).reshape(-1, share)
    with np.errstate(invalid="ignore"):
        best: NDArray[Any] = np.nanmax(np.where(np.isnan(padded), -1.0, padded), axis=1)
    return "".join("·" if v < 0 else _BARS[int(np.searchsorted(_STEPS, v, "right"))] for v in best.tolist())


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"
