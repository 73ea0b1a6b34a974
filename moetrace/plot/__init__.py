"""Drawings of what the analyses give: data and Axes in, Axes out.

Every function takes a table as :mod:`moetrace.analysis` gives it and ``ax`` (None: a new figure), draws with
the rc parameters in force (:func:`style` sets ours) and returns the Axes. Cells and points without data are
drawn as missing (hatched, or left out), never as zero. Importing this package imports matplotlib.
"""

from __future__ import annotations

from moetrace.plot.agreement import agreement
from moetrace.plot.depth import depth_contrast
from moetrace.plot.dynamics import handoffs, information, phases
from moetrace.plot.entropy import entropy
from moetrace.plot.experts import alike, change_by_k, file_curve, gain, kept, patterns, rates, success, sweep
from moetrace.plot.gate import gate_distances
from moetrace.plot.heatmap import Measure, heatmap, size_of, usage
from moetrace.plot.load import carried, load_balance, tokens_of_experts
from moetrace.plot.pairs import pairs, similarity
from moetrace.plot.persistence import persistence, persistence_by_layer, strongest_layer
from moetrace.plot.prediction import correlation, distinct, gains, hit_rates, recall, traffic
from moetrace.plot.separation import matched_separation, separation
from moetrace.plot.specialists import kinds, specialists
from moetrace.plot.style import DARK, LIGHT, OKABE_ITO, Theme, style
from moetrace.plot.transitions import transitions

__all__ = [
    "DARK",
    "LIGHT",
    "OKABE_ITO",
    "Measure",
    "Theme",
    "agreement",
    "alike",
    "carried",
    "change_by_k",
    "correlation",
    "depth_contrast",
    "distinct",
    "entropy",
    "file_curve",
    "gain",
    "gains",
    "gate_distances",
    "handoffs",
    "heatmap",
    "hit_rates",
    "information",
    "kept",
    "kinds",
    "load_balance",
    "matched_separation",
    "pairs",
    "patterns",
    "persistence",
    "persistence_by_layer",
    "phases",
    "rates",
    "recall",
    "separation",
    "similarity",
    "size_of",
    "specialists",
    "strongest_layer",
    "style",
    "success",
    "sweep",
    "tokens_of_experts",
    "traffic",
    "transitions",
    "usage",
]
