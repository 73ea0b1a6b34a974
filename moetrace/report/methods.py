"""How the report's numbers are made: an appendix, and links to it from wherever one of its words stands."""

from __future__ import annotations

import re
from functools import cache

from markupsafe import Markup, escape

from moetrace.findings import QUESTIONS, Method

#: entries that no single question brings
GENERAL = (
    Method(
        "unit", "Prompts are the unit", r"over prompts|whole prompts?|independent prompts",
        "Tokens of one prompt share its topic and follow each other, so ten thousand tokens of one prompt are one"
        " observation of its domain, not ten thousand. Every test here moves whole prompts, every interval"
        " resamples or leaves out whole prompts. Requests with the same id are one prompt.",
    ),
    Method(
        "picks", "Tokens and picks", r"picks?|tokens that use",
        "With top-k routing every token picks k experts of a layer. “% of tokens” is the share of tokens that used"
        " an expert (adds up to 100·k over the experts); “% of picks” adds up to 100. A router decision is counted"
        " once, although the gate, up and down matrices all use it.",
    ),
    Method(
        "missing", "Missing is not zero", r"missing|not computed",
        "What was lost, or was never computed, is hatched in figures and empty in tables. An expert that was"
        " looked at and never chosen is a zero. Warm-up rows belong to no request and are left out; prompt tokens"
        " (prefill) and generated ones (decode) are not pooled unless that was asked for.",
    ),
    Method(
        "jsd", "Jensen-Shannon divergence", r"Jensen-Shannon|divergence|JSD",
        "How far apart the domains' use of a layer's experts is: the entropy of their mean distribution less the"
        " mean of their entropies, in bits; 0 if all are alike, at most log₂ of the number of domains. Few tokens"
        " and differing prompts make it larger than it is, so it stands beside what prompts alone produce, and"
        " corrected for that bias.",
    ),
    Method(
        "v", "Cramér's V", r"Cramér's V",
        "Chi-square scaled to 0 to 1. The plain value grows with noise; the corrected one is Bergsma's (2013), the"
        " jackknife also takes out what prompts add.",
    ),
    Method(
        "permutation", "Permutation test", r"permut\w+|p-values?|PERMANOVA|exchanged?",
        "If domain does not matter, a prompt could as well have stood in another domain. The domains are handed out"
        " to the prompts anew, 999 times; p = (1 + arrangements at least as extreme) / (1 + arrangements). With one"
        " prompt per domain there is no other arrangement that differs: domain and prompt are the same thing, and"
        " nothing can be tested.",
    ),
    Method(
        "many", "Many layers, many experts", r"Benjamini-Hochberg|q-values?|max-T|q ≤|p_family",
        "Twenty layers tested at 5 % give one false find on average. Over layers, q-values (Benjamini-Hochberg) keep"
        " the share of false finds at 5 %; over the experts of a layer, max-T compares each with the largest"
        " value that any of them reaches by chance, so that even one false find among them has a chance of 5 %.",
    ),
    Method(
        "jackknife", "Jackknife intervals", r"jackknife",
        "The number is computed again with each prompt left out in turn. How much it moves gives the 95 % interval"
        " (t distribution, prompts less domains degrees of freedom), and which way it moves gives the bias, which is"
        " taken off.",
    ),
    Method(
        "bootstrap", "Bootstrap intervals", r"bootstrap",
        "The prompts of each domain are drawn anew, with replacement, 2,000 times; the interval lies between"
        " percentiles, widened for few prompts (Hesterberg 2015).",
    ),
    Method(
        "lift", "Lift", r"lifts?",
        "How much more often a domain uses an expert than domains do on average: 2 is twice as often, ½ half as"
        " often. Every domain weighs the same, however many tokens it has.",
    ),
    Method(
        "entropy", "Entropy", r"entrop(?:y|ies)|Miller-Madow|perplexity",
        "How many experts the picks spread over, in bits: log₂ of the number of experts if all are used alike. The"
        " plain estimate is too low for few tokens; Miller-Madow and the jackknife correct that. 2 to the entropy is"
        " the effective number of experts.",
    ),
    Method(
        "heldout", "Held-out prompts, recall", r"held[ -]out|recall\S*|prompts held",
        "What is learned (a popular set, a table, a regression) is learned from some of the prompts and judged on the"
        " others. Recall@m is the share of a token's k experts among m that were predicted; with m = k it is precision"
        " too. Baselines that cost nothing, such as the most popular experts, stand beside it.",
    ),
    Method(
        "published", "As published", r"as published|published formulas?|notebook",
        "Tables so named follow the formulas of earlier analyses to the digit, faults included, so that numbers can"
        " be compared. Their chi-square takes every pick for an independent observation and finds domains where there"
        " are none: in simulations without any domain effect it rejects in every run.",
    ),
)  # fmt: skip


@cache
def methods() -> tuple[Method, ...]:
    """The entries of the appendix: the general ones, and those that questions bring."""
    return (*GENERAL, *(method for asked in QUESTIONS.values() for method in asked.methods))


@cache
def _words() -> list[tuple[Method, re.Pattern[str]]]:
    return [(method, re.compile(rf"\b(?:{method.words})", re.IGNORECASE)) for method in methods()]


def linked(text: str) -> Markup:
    """Escape ``text`` and make the first word of each method a link to its entry in the appendix."""
    found: list[tuple[int, int, str]] = []
    for method, words in _words():
        for match in words.finditer(text):
            if not any(match.start() < b and a < match.end() for a, b, _ in found):
                found.append((match.start(), match.end(), method.anchor))
                break
    out, at = Markup(""), 0
    for start, end, anchor in sorted(found):
        out += escape(text[at:start])
        out += Markup('<a class="method" href="#m-{}">{}</a>').format(anchor, text[start:end])
        at = end
    return out + escape(text[at:])
