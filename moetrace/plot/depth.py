"""Domain separation in early against late layers."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from moetrace.analysis.domains.layers import DepthContrast
from moetrace.plot.style import OKABE_ITO, axes, faint, ink


def depth_contrast(found: DepthContrast, *, ax: Axes | None = None) -> Axes:
    """Draw early, late, and their difference with its 95 % interval over prompts."""
    ax = axes(ax, (6.0, 2.4))
    names = [f"early: layers {_span(found.early_layers)}", f"late: layers {_span(found.late_layers)}"]
    ax.barh([0, 1], [found.early, found.late], height=0.5, color=[OKABE_ITO[5], OKABE_ITO[0]])
    ax.axvline(0.0, color=faint(), linewidth=0.9)
    if not np.isnan(found.low):
        ax.hlines(2, found.low, found.high, color=ink(), linewidth=2.2, alpha=0.6)
    ax.scatter([found.difference], [2], color=ink(), s=24, zorder=3)
    ax.set_yticks([0, 1, 2], [*names, "late − early, 95 % interval"])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(2.6, -0.6)
    ax.set_xlabel("mean divergence of domains (bits)")
    ax.grid(axis="x", linewidth=0.6)
    return ax


def _span(layers: tuple[int, ...]) -> str:
    together = layers == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}–{layers[-1]}" if together and len(layers) > 1 else ", ".join(map(str, layers))
