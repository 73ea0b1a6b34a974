"""Statistics of routing.

Pure functions of arrays, in rooms: :mod:`counts` (what everything follows from), :mod:`domain`,
:mod:`matched`, :mod:`layers`, :mod:`temporal`, :mod:`gate`, :mod:`compare`, :mod:`chance`, and
:mod:`published` (published formulas, faults included). :func:`from_trace` offers the same for a trace.
"""

from __future__ import annotations

from moetrace.analysis.chance import Chance, chance
from moetrace.analysis.compare import (
    agreement,
    agreement_by_depth,
    agreement_summary,
    align,
    usage_difference,
)
from moetrace.analysis.counts import (
    RoutingCounts,
    TokenCounts,
    count_routing,
    count_tokens,
    frequent_tokens,
    reading_order,
)
from moetrace.analysis.domain import (
    DomainSeparation,
    DomainTest,
    domain_lift,
    domain_separation,
    domain_test,
    expert_frequency,
    expert_usage,
    specialists,
)
from moetrace.analysis.from_counts import TableAnalysis
from moetrace.analysis.from_trace import Agreement, Analysis, RoutedRows, from_trace
from moetrace.analysis.gate import gate_distances, gate_summary, gate_sums
from moetrace.analysis.layers import (
    DeepDive,
    DepthContrast,
    deep_dive,
    depth_contrast,
    domain_entropy,
    load_balance,
)
from moetrace.analysis.matched import MatchedSeparation, matched_separation
from moetrace.analysis.sums import MetricSums
from moetrace.analysis.temporal import Transitions, persistence, shuffle_test, transitions

__all__ = [
    "Agreement",
    "Analysis",
    "Chance",
    "DeepDive",
    "DepthContrast",
    "DomainSeparation",
    "DomainTest",
    "MatchedSeparation",
    "MetricSums",
    "RoutedRows",
    "RoutingCounts",
    "TableAnalysis",
    "TokenCounts",
    "Transitions",
    "agreement",
    "agreement_by_depth",
    "agreement_summary",
    "align",
    "chance",
    "count_routing",
    "count_tokens",
    "deep_dive",
    "depth_contrast",
    "domain_entropy",
    "domain_lift",
    "domain_separation",
    "domain_test",
    "expert_frequency",
    "expert_usage",
    "frequent_tokens",
    "from_trace",
    "gate_distances",
    "gate_summary",
    "gate_sums",
    "load_balance",
    "matched_separation",
    "persistence",
    "reading_order",
    "shuffle_test",
    "specialists",
    "transitions",
    "usage_difference",
]
