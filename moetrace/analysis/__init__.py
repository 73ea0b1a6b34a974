"""Statistics of routing.

Pure functions of arrays, in rooms: :mod:`counts` (what everything follows from), :mod:`domain`,
:mod:`matched`, :mod:`layers`, :mod:`temporal`, :mod:`attention_prediction`,
:mod:`context_attention_routing`, :mod:`task_prediction`, :mod:`cache`, :mod:`gate`, :mod:`compare`, :mod:`chance`, and
:mod:`published` (published formulas, faults included). :func:`from_trace` offers the same for a trace.
"""

from __future__ import annotations

from moetrace.analysis.attention import AttentionRows, attention_features, attention_windows
from moetrace.analysis.attention_prediction import attention_prediction
from moetrace.analysis.cache import CacheSimulation, expert_cache, lru_distances, stack_distances
from moetrace.analysis.chance import Chance, chance
from moetrace.analysis.compare import (
    agreement,
    agreement_by_depth,
    agreement_summary,
    align,
    usage_difference,
)
from moetrace.analysis.context_attention_routing import ContextTest, context_attention_routing
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
from moetrace.analysis.predict import GainTest, Prediction, Problem, gain_test
from moetrace.analysis.published_prediction import (
    as_published_attention_prediction,
    as_published_context_attention_routing,
    as_published_task_prediction,
)
from moetrace.analysis.rows import TokenRows
from moetrace.analysis.sums import MetricSums
from moetrace.analysis.task_prediction import task_prediction
from moetrace.analysis.temporal import Transitions, persistence, shuffle_test, transitions

__all__ = [
    "Agreement",
    "Analysis",
    "AttentionRows",
    "CacheSimulation",
    "Chance",
    "ContextTest",
    "DeepDive",
    "DepthContrast",
    "DomainSeparation",
    "DomainTest",
    "GainTest",
    "MatchedSeparation",
    "MetricSums",
    "Prediction",
    "Problem",
    "RoutedRows",
    "RoutingCounts",
    "TableAnalysis",
    "TokenCounts",
    "TokenRows",
    "Transitions",
    "agreement",
    "agreement_by_depth",
    "agreement_summary",
    "align",
    "as_published_attention_prediction",
    "as_published_context_attention_routing",
    "as_published_task_prediction",
    "attention_features",
    "attention_prediction",
    "attention_windows",
    "chance",
    "context_attention_routing",
    "count_routing",
    "count_tokens",
    "deep_dive",
    "depth_contrast",
    "domain_entropy",
    "domain_lift",
    "domain_separation",
    "domain_test",
    "expert_cache",
    "expert_frequency",
    "expert_usage",
    "frequent_tokens",
    "from_trace",
    "gain_test",
    "gate_distances",
    "gate_summary",
    "gate_sums",
    "load_balance",
    "lru_distances",
    "matched_separation",
    "persistence",
    "reading_order",
    "shuffle_test",
    "specialists",
    "stack_distances",
    "task_prediction",
    "transitions",
    "usage_difference",
]
