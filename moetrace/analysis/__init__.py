"""Statistics of routing.

Pure functions of arrays, a room for each matter; :mod:`counts` is what most follow from, :mod:`published` has
published formulas, faults included, and :func:`from_trace` offers the analyses for a trace.
"""

from __future__ import annotations

from moetrace.analysis.attention import AttentionRows, attention_features, attention_windows
from moetrace.analysis.attention_prediction import attention_prediction
from moetrace.analysis.cache import CacheSimulation, expert_cache, lru_distances, stack_distances
from moetrace.analysis.chance import Chance, chance
from moetrace.analysis.cold_experts import (
    as_published_cold_experts,
    clopper_pearson,
    cold_experts,
    trigger_tokens,
    wake_rates,
)
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
from moetrace.analysis.expert_circuits import Circuits, as_published_circuits, expert_circuits, path_test
from moetrace.analysis.experts import chosen_outputs, expert_outputs
from moetrace.analysis.from_counts import TableAnalysis
from moetrace.analysis.from_trace import Agreement, Analysis, RoutedRows, from_trace
from moetrace.analysis.gate import gate_distances, gate_summary, gate_sums
from moetrace.analysis.generation_dynamics import (
    Phases,
    as_published_dynamics,
    correctness_features,
    generation_phases,
    handoffs,
    phase_comparison,
)
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
from moetrace.analysis.predict import GainTest, Prediction, Problem, gain_test
from moetrace.analysis.published_prediction import (
    as_published_attention_prediction,
    as_published_context_attention_routing,
    as_published_task_prediction,
)
from moetrace.analysis.routed import RoutedText
from moetrace.analysis.sums import MetricSums
from moetrace.analysis.task_prediction import task_prediction
from moetrace.analysis.temporal import Transitions, persistence, shuffle_test, transitions
from moetrace.analysis.token_patterns import (
    TokenPatterns,
    as_published_coactivation,
    as_published_pattern_summary,
    as_published_semantic_patterns,
    coactivation,
    combined_analysis,
    join_words,
    pattern_summary,
    semantic_patterns,
    sequence_patterns,
    token_type,
    type_words,
    vocabulary_specialisation,
)

__all__ = [
    "Agreement",
    "Analysis",
    "AttentionRows",
    "CacheSimulation",
    "Chance",
    "Circuits",
    "ContextTest",
    "DeepDive",
    "DepthContrast",
    "DomainSeparation",
    "DomainTest",
    "GainTest",
    "MatchedSeparation",
    "MetricSums",
    "Phases",
    "Prediction",
    "Problem",
    "RoutedRows",
    "RoutedText",
    "RoutingCounts",
    "TableAnalysis",
    "TokenCounts",
    "TokenPatterns",
    "Transitions",
    "agreement",
    "agreement_by_depth",
    "agreement_summary",
    "align",
    "as_published_attention_prediction",
    "as_published_circuits",
    "as_published_coactivation",
    "as_published_cold_experts",
    "as_published_context_attention_routing",
    "as_published_control",
    "as_published_dynamics",
    "as_published_interference",
    "as_published_pattern_summary",
    "as_published_robustness",
    "as_published_semantic_patterns",
    "as_published_similarity",
    "as_published_task_prediction",
    "as_published_triggers",
    "attention_features",
    "attention_prediction",
    "attention_windows",
    "chance",
    "chosen_outputs",
    "clopper_pearson",
    "coactivation",
    "cold_experts",
    "combination",
    "combined_analysis",
    "context_attention_routing",
    "correctness_features",
    "count_routing",
    "count_tokens",
    "deep_dive",
    "depth_contrast",
    "domain_entropy",
    "domain_lift",
    "domain_separation",
    "domain_test",
    "edit_effect",
    "expert_cache",
    "expert_circuits",
    "expert_frequency",
    "expert_interference",
    "expert_merging",
    "expert_outputs",
    "expert_robustness",
    "expert_usage",
    "frequent_tokens",
    "from_trace",
    "gain_test",
    "gate_distances",
    "gate_summary",
    "gate_sums",
    "generation_phases",
    "group_layers",
    "handoffs",
    "join_words",
    "linearity",
    "load_balance",
    "lru_distances",
    "matched_separation",
    "merge",
    "merge_candidates",
    "output_similarity",
    "pair_compatibility",
    "path_test",
    "pattern_summary",
    "persistence",
    "phase_comparison",
    "reading_order",
    "routing_manipulation",
    "routing_similarity",
    "search_input",
    "semantic_patterns",
    "sequence_patterns",
    "shuffle_test",
    "specialists",
    "stack_distances",
    "task_prediction",
    "token_type",
    "transitions",
    "trigger_tokens",
    "type_words",
    "usage_difference",
    "vocabulary_specialisation",
    "wake_rates",
    "weight_similarity",
]
