"""How the report's numbers are made: an appendix, and links to it from wherever one of its words stands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Method:
    """An entry of the appendix: its anchor, its title, the words that lead to it, and its text."""

    anchor: str
    title: str
    words: str
    text: str

    every: ClassVar[tuple[Method, ...]]


Method.every = (
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
        "specialist", "Specialist, generalist, undecided", r"specialists?|generalists?|undecided",
        "A specialist's lift is larger than chance allows (p ≤ 0.05 over all experts and domains of its layer). A"
        " generalist's intervals all lie within 1/1.5 and 1.5. About the others the data cannot say; a quartile cut"
        " would have named a quarter of them either way.",
    ),
    Method(
        "entropy", "Entropy", r"entrop(?:y|ies)|Miller-Madow|perplexity",
        "How many experts the picks spread over, in bits: log₂ of the number of experts if all are used alike. The"
        " plain estimate is too low for few tokens; Miller-Madow and the jackknife correct that. 2 to the entropy is"
        " the effective number of experts.",
    ),
    Method(
        "jain", "Load", r"Jain\S*|fairness|coefficient of variation",
        "Jain's index is (Σ load)² / (E · Σ load²): 1 if all E experts carry the same, 1/E if one carries all. For an"
        " expert that was never chosen among n tokens the rule of three bounds its rate: up to 3/n is still"
        " compatible with that.",
    ),
    Method(
        "time", "Persistence and its two baselines", r"persistence|marginal|shuffled?|random order|lags?",
        "Tokens d apart in an unbroken run of one request are compared: the share of experts in common, or whether"
        " the first is the same. Two baselines: any two tokens of the layer (beating it only means that prompts"
        " differ), and the same prompt's tokens in random order (beating it means that order matters). The excess"
        " over the second has the interval.",
    ),
    Method(
        "matched", "Words or domains?", r"matched|token ids?|vocabular\w+",
        "Domains use different words, and routing follows words. Separation at matched token ids compares only how"
        " the same token is routed in different domains; its coverage says how much of the text that is.",
    ),
    Method(
        "heldout", "Held-out prompts, recall", r"held[ -]out|recall\S*|prompts held",
        "What is learned (a popular set, a table, a regression) is learned from some of the prompts and judged on the"
        " others. Recall@m is the share of a token's k experts among m that were predicted; with m = k it is precision"
        " too. Baselines that cost nothing, such as the most popular experts, stand beside it.",
    ),
    Method(
        "information", "Mutual information", r"mutual information|out of step",
        "How many bits the expert of one layer tells about that of another. Few tokens make it larger than it is, so it"
        " stands beside the same with one of the two series turned round within its prompt.",
    ),
    Method(
        "mantel", "Mantel test", r"Mantel\S*",
        "Whether two tables of pairwise likeness go together: the correlation over pairs, against that with the items"
        " of one table exchanged.",
    ),
    Method(
        "published", "As published", r"as published|published formulas?|notebook",
        "Tables so named follow the formulas of earlier analyses to the digit, faults included, so that numbers can"
        " be compared. Their chi-square takes every pick for an independent observation and finds domains where there"
        " are none: in simulations without any domain effect it rejects in every run.",
    ),
)  # fmt: skip

_WORDS = [(method, re.compile(rf"\b(?:{method.words})", re.IGNORECASE)) for method in Method.every]


def linked(text: str) -> Markup:
    """Escape ``text`` and make the first word of each method a link to its entry in the appendix."""
    found: list[tuple[int, int, str]] = []
    for method, words in _WORDS:
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
