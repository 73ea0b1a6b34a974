"""What can be asked about a model's routing, question by question.

The step between the analyses, which are functions of arrays, and whatever shows their results: the command line,
the report, a notebook. ``QUESTIONS`` lists them by name::

    subject = Subject([moetrace.open("t.moet")])
    finding = question("load-balance")().answer(subject)
    finding.sentences, finding.tables
"""

from __future__ import annotations

import importlib

from moetrace.errors import UsageError
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.subject import Subject

__all__ = ["QUESTIONS", "Figure", "Finding", "Question", "Subject", "parameter", "question"]

#: name -> the class in moetrace/findings/NAME.py (- as _), in the order of the report
QUESTIONS = {
    "overview": "Overview",
    "domain-separation": "DomainSeparation",
    "matched-separation": "MatchedSeparation",
    "specialists": "Specialists",
    "deep-dive": "DeepDive",
    "depth-contrast": "DepthContrast",
    "expert-frequency": "ExpertFrequency",
    "domain-entropy": "DomainEntropy",
    "load-balance": "LoadBalance",
    "persistence": "Persistence",
    "transitions": "Transitions",
    "gate-distances": "GateDistances",
    "token-patterns": "TokenPatterns",
    "cold-experts": "ColdExperts",
    "expert-circuits": "ExpertCircuits",
    "generation-dynamics": "GenerationDynamics",
    "attention-prediction": "AttentionPrediction",
    "context-attention-routing": "ContextAttentionRouting",
    "task-prediction": "TaskPrediction",
    "expert-cache": "ExpertCache",
    "compare": "Compare",
    "expert-interference": "ExpertInterference",
    "expert-merging": "ExpertMerging",
    "routing-manipulation": "RoutingManipulation",
}


def question(name: str) -> type[Question]:
    """Give the question of a name. Raises UsageError if there is none."""
    if name not in QUESTIONS:
        raise UsageError(f"there is no analysis {name!r}", fix=f"choose among: {', '.join(QUESTIONS)}")
    module = importlib.import_module(f"moetrace.findings.{name.replace('-', '_')}")
    found: type[Question] = getattr(module, QUESTIONS[name])
    return found
