"""Statistics of routing.

Pure functions of arrays, a room for each matter: ``counts`` is what most follow from, ``published`` has published
formulas, faults included, and :func:`from_trace` chooses a trace's rows for them. All can be imported from here.
"""

from __future__ import annotations

from moetrace.analysis.circuits import Circuits, expert_circuits, path_test
from moetrace.analysis.counts.attention import AttentionRows, attention_features, attention_windows
from moetrace.analysis.counts.chosen import Chosen, RoutedRows
from moetrace.analysis.counts.compare import (
    Agreement,
    agreement,
    agreement_by_depth,
    agreement_summary,
    align,
    compare_captures,
    usage_difference,
)
from moetrace.analysis.counts.counting import (
    RoutingCounts,
    TokenCounts,
    count_routing,
    count_tokens,
    frequent_tokens,
    reading_order,
)
from moetrace.analysis.counts.from_trace import Routing, from_trace
from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.domains.domain import (
    DomainSeparation,
    DomainTest,
    domain_lift,
    domain_separation,
    domain_test,
    expert_frequency,
    expert_usage,
    specialists,
)
from moetrace.analysis.domains.layers import (
    DeepDive,
    DepthContrast,
    deep_dive,
    depth_contrast,
    domain_entropy,
    load_balance,
)
from moetrace.analysis.domains.matched import MatchedSeparation, matched_separation
from moetrace.analysis.dynamics.generation import (
    Phases,
    correctness_features,
    generation_phases,
    handoffs,
    phase_comparison,
)
from moetrace.analysis.dynamics.temporal import Transitions, persistence, shuffle_test, transitions
from moetrace.analysis.experts.gate import gate_distances, gate_summary, gate_sums
from moetrace.analysis.experts.importance import ExpertImportance, expert_importance
from moetrace.analysis.experts.interference import (
    combination,
    expert_interference,
    linearity,
    pair_compatibility,
)
from moetrace.analysis.experts.manipulation import (
    edit_effect,
    expert_robustness,
    routing_manipulation,
    search_input,
)
from moetrace.analysis.experts.merging import (
    expert_merging,
    group_layers,
    merge,
    merge_candidates,
    output_similarity,
    routing_similarity,
    weight_similarity,
)
from moetrace.analysis.experts.outputs import chosen_outputs, expert_outputs
from moetrace.analysis.experts.pairs import CoOccurrence, co_occurrence, pair_rates
from moetrace.analysis.placement.cache import CacheSimulation, cache_hits, expert_cache
from moetrace.analysis.placement.cold_experts import cold_experts, trigger_tokens, wake_rates
from moetrace.analysis.prediction.attention_prediction import attention_prediction
from moetrace.analysis.prediction.context_attention_routing import ContextTest, context_attention_routing
from moetrace.analysis.prediction.predict import GainTest, Prediction, Problem, gain_test
from moetrace.analysis.prediction.task_prediction import task_prediction
from moetrace.analysis.published.dynamics import (
    as_published_circuits,
    as_published_cold_experts,
    as_published_dynamics,
)
from moetrace.analysis.published.experts import (
    as_published_control,
    as_published_interference,
    as_published_robustness,
    as_published_similarity,
    as_published_triggers,
)
from moetrace.analysis.published.patterns import (
    as_published_coactivation,
    as_published_pattern_summary,
    as_published_semantic_patterns,
)
from moetrace.analysis.published.prediction import (
    as_published_attention_prediction,
    as_published_context_attention_routing,
    as_published_task_prediction,
)
from moetrace.analysis.statistics.chance import Chance, chance
from moetrace.analysis.statistics.nulls import clopper_pearson
from moetrace.analysis.statistics.sums import MetricSums
from moetrace.analysis.text.lexicon import join_words, token_type, type_words
from moetrace.analysis.text.token_patterns import (
    TokenPatterns,
    combined_analysis,
    pattern_summary,
    semantic_patterns,
    sequence_patterns,
    vocabulary_specialisation,
)

__all__ = [
    "Agreement",
    "AttentionRows",
    "CacheSimulation",
    "Chance",
    "Chosen",
    "Circuits",
    "CoOccurrence",
    "ContextTest",
    "DeepDive",
    "DepthContrast",
    "DomainSeparation",
    "DomainTest",
    "ExpertImportance",
    "GainTest",
    "MatchedSeparation",
    "MetricSums",
    "Phases",
    "Prediction",
    "Problem",
    "RoutedRows",
    "RoutedText",
    "Routing",
    "RoutingCounts",
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
    "cache_hits",
    "chance",
    "chosen_outputs",
    "clopper_pearson",
    "co_occurrence",
    "cold_experts",
    "combination",
    "combined_analysis",
    "compare_captures",
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
    "expert_importance",
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
    "matched_separation",
    "merge",
    "merge_candidates",
    "output_similarity",
    "pair_compatibility",
    "pair_rates",
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
