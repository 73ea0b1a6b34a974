"""What is known of a live recording, as lines for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moetrace.live.tail import Snapshot
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
    width: int = 100,
    height: int = 40,
    red: Callable[[str], str] = str,
) -> list[str]:
    """Give the lines, at most ``height`` of at most ``width`` columns; ``red`` marks what was lost."""
    counts = {"recent": now.recent, "hour": now.hour, "counts": now.counts}[window]
    rate = " ".join(f"{n:,.1f} {phase}" for phase, n in now.per_second.items()) or "no"
    total = sum(now.tokens.values())
    out = [_cut(f"{total:,} tokens recorded, {rate} tokens a second", width)]
    for context in now.contexts:
        ring = "" if np.isnan(context.ring_fill) else f", ring {context.ring_fill:.0%} full"
        force = f", intervention {context.intervention} is in force" if context.intervention else ""
        lost = context.lost + context.events_lost
        said = _cut(f"{printable(context.name)}: {context.state}{ring}{force}, {lost:,} lost", width)
        out.append(red(said) if lost else said)
    labels = sorted((item for item in now.by_domain.items() if item[0]), key=lambda item: -item[1])
    if labels:
        said = ", ".join(f"{printable(name)} {n:,}" for name, n in labels[:_LISTED])
        out.append(_cut(f"labels: {said}", width))
    multiples = np.full(counts.shape, np.nan)
    for i, n in enumerate(now.n_expert.tolist()):
        if counts[i].sum():
            multiples[i, :n] = counts[i, :n] * (n / counts[i].sum())
    out += [
        "",
        _cut(
            f"layers by experts, {WINDOWS[window]}: heights are multiples of an even share, █ 4 or more",
            width,
        ),
    ]
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


def _row(values: NDArray[np.float64], width: int) -> str:
    """A bar for each expert; where there are more than columns, neighbours share one, as high as the higher."""
    share = -(-len(values) // max(width, 1))
    padded = np.append(values, np.full(-len(values) % share, np.nan)).reshape(-1, share)
    with np.errstate(invalid="ignore"):
        best: NDArray[Any] = np.nanmax(np.where(np.isnan(padded), -1.0, padded), axis=1)
    return "".join("·" if v < 0 else _BARS[int(np.searchsorted(_STEPS, v, "right"))] for v in best.tolist())


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"
