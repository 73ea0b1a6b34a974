"""Statistics of routing.

Pure functions of arrays, in rooms: :mod:`counts` (what everything follows from), :mod:`domain`,
:mod:`matched`, :mod:`layers`, :mod:`temporal`, :mod:`gate`, :mod:`compare`, :mod:`chance`, :mod:`experts` (what
they compute), :mod:`merging`, :mod:`interference`, :mod:`manipulation`, and
:mod:`published` (published formulas, faults included). :func:`from_trace` offers the same for a trace.
"""

from __future__ import annotations

from moetrace.analysis.chance import Chance, chance
from moetrace.analysis.compare import agreement, agreement_summary, align
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
    specialists,
)
from moetrace.analysis.experts import chosen_outputs, expert_outputs
from moetrace.analysis.from_trace import Analysis, RoutedRows, from_trace
from moetrace.analysis.gate import gate_distances, gate_summary
from moetrace.analysis.interference import (
    as_published_interference,
    combination,
    expert_interference,
    linearity,
    pair_compatibility,
)
from moetrace.analysis.layers import (
    DeepDive,
    DepthContrast,
    deep_dive,
    depth_contrast,
    domain_entropy,
    load_balance,
)
from moetrace.analysis.manipulation import (
    as_published_control,
    as_published_robustness,
    as_published_triggers,
    edit_effect,
    expert_robustness,
    routing_manipulation,
    search_input,
)
from moetrace.analysis.matched import MatchedSeparation, matched_separation
from moetrace.analysis.merging import (
    as_published_similarity,
    expert_merging,
    group_layers,
    merge,
    merge_candidates,
    output_similarity,
    routing_similarity,
    weight_similarity,
)
from moetrace.analysis.temporal import Transitions, persistence, shuffle_test, transitions

__all__ = [
    "Analysis",
    "Chance",
    "DeepDive",
    "DepthContrast",
    "DomainSeparation",
    "DomainTest",
    "MatchedSeparation",
    "RoutedRows",
    "RoutingCounts",
    "TokenCounts",
    "Transitions",
    "agreement",
    "agreement_summary",
    "align",
    "as_published_control",
    "as_published_interference",
    "as_published_robustness",
    "as_published_similarity",
    "as_published_triggers",
    "chance",
    "chosen_outputs",
    "combination",
    "count_routing",
    "count_tokens",
    "deep_dive",
    "depth_contrast",
    "domain_entropy",
    "domain_lift",
    "domain_separation",
    "domain_test",
    "edit_effect",
    "expert_frequency",
    "expert_interference",
    "expert_merging",
    "expert_outputs",
    "expert_robustness",
    "frequent_tokens",
    "from_trace",
    "gate_distances",
    "gate_summary",
    "group_layers",
    "linearity",
    "load_balance",
    "matched_separation",
    "merge",
    "merge_candidates",
    "output_similarity",
    "pair_compatibility",
    "persistence",
    "reading_order",
    "routing_manipulation",
    "routing_similarity",
    "search_input",
    "shuffle_test",
    "specialists",
    "transitions",
    "weight_similarity",
]
