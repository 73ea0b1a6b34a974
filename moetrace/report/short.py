"""The answer in short: what a reader sees first, in plain words, from the tables of the findings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moetrace.findings import Finding
from moetrace.findings.wording import best
from moetrace.numbers import number

_MOST = 3  # sentences


@dataclass(frozen=True)
class Short:
    """One sentence, and the question that it is of."""

    text: str
    name: str


def in_short(findings: Sequence[Finding]) -> tuple[Short, ...]:
    """Give at most three sentences: whether kinds of text use experts of their own, which are used most, what that
    means for memory. What was not answered, or is not certain, is not said.
    """
    known = {finding.name: finding for finding in findings if finding.not_answered is None}
    out: list[Short] = []
    for name, say in _SAID:
        if name in known and len(out) < _MOST and (text := say(known[name])):
            out.append(Short(text, name))
    return tuple(out)


def _domains(finding: Finding) -> str:
    table = finding.tables.get("specialists")
    if table is None or not finding.concludes:
        return ""
    special = table[table["kind"] == "specialist"]
    if not len(special):
        return ""
    row = best(special, "low") or {}
    n = len(special) - 1
    others = f"; {number(n, 'other expert')} {'has' if n == 1 else 'have'} such a favourite" if n else ""
    return (
        f"{_capital(row['domain'])} uses expert {row['expert']:.0f} of layer {row['layer']:.0f} {row['lift']:.1f} times"
        f" as much as the domains do on average ({row['low']:.1f} to {row['high']:.1f}){others}."
    )


def _separation(finding: Finding) -> str:
    table = finding.tables.get("domain_test")
    if (
        table is None
        or "q_value" not in table
        or table["q_value"].isna().all()
        or (table["q_value"] <= 0.05).any()
    ):
        return ""
    return "No layer shows that kinds of text use different experts, as far as these prompts tell."


def _usage(finding: Finding) -> str:
    table = finding.tables.get("usage")
    if table is None or table["percent_of_tokens"].isna().all():
        return ""
    row = best(table, "percent_of_tokens") or {}
    layer = table[table["layer"] == row["layer"]]
    even = layer["percent_of_tokens"].mean()
    unused = int((table["count"] == 0).sum())
    never = f"; {number(unused, 'expert')} of {len(table):,} never came up" if unused else ""
    return (
        f"The busiest expert, {row['expert']:.0f} of layer {row['layer']:.0f}, takes part in"
        f" {row['percent_of_tokens']:.0f} % of tokens, where an even share would be {even:.0f} %{never}."
    )


def _cache(finding: Finding) -> str:
    table = finding.tables.get("cache")
    if table is None:
        return ""
    rows = table[(table["cache"] == "layer") & (table["policy"].isin(["lru", "pinned"]))]
    if not len(rows):
        return ""
    memory = rows["memory"].iloc[int((rows["memory"] - 0.25).abs().to_numpy().argmin())]
    row: dict[str, Any] = best(rows[rows["memory"] == memory], "hit_rate") or {}
    how = "those used last are kept" if row["policy"] == "lru" else "the hottest are kept"
    return (
        f"With {memory:.0%} of the experts in fast memory, {row['hit_rate']:.0%} of what tokens need is there already"
        f" if {how}."
    )


def _capital(text: Any) -> str:
    words = str(text)
    return words[:1].upper() + words[1:]


_SAID: tuple[tuple[str, Callable[[Finding], str]], ...] = (
    ("specialists", _domains),
    ("domain-separation", _separation),
    ("expert-frequency", _usage),
    ("expert-cache", _cache),
)
