"""What a cache of experts would hit: is there a hot set, and how much memory buys how much?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from moetrace.analysis.placement.cache import POLICIES, expert_cache
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import span
from moetrace.host.options import human_size
from moetrace.model.file import ModelFile
from moetrace.numbers import numbers


@dataclass(frozen=True)
class ExpertCache(Question):
    """Is there a hot set of experts, and how much memory for experts buys how much?

    Simulates keeping some experts in fast memory while tokens are computed one at a time: least recently used goes
    (lru), least often used goes (lfu), the hottest experts of other prompts stay (pinned), and the best that anyone
    could do who knew the future (oracle; Belady). For slots of each layer and for slots that all layers share. Half of
    the prompts, drawn at random, warm the caches up and choose what is pinned; hits count on the other half, with
    jackknife intervals over prompts. With -m model.gguf also in bytes.
    """

    name: ClassVar[str] = "expert-cache"
    title: ClassVar[str] = "A cache of experts"
    place: ClassVar[int] = 200

    slots: str = parameter("", "slots per layer to try, as 4,8,16; default: from k to all experts")
    policies: str = parameter(",".join(POLICIES), "policies to simulate")
    gb_per_s: float = parameter(
        25.0,
        "what the link from slow to fast memory carries, 10⁹ bytes a second: latency is bytes fetched over that",
    )
    max_tokens: int = parameter(
        5_000, "tokens to simulate: prompts, or stretches of long ones, drawn at random; 0: all"
    )

    def answer(self, subject: Subject) -> Finding:
        """Simulate."""
        slots = numbers(self.slots, "--slots") if self.slots else []
        text = subject.routing.text
        sizes = None
        if subject.model is not None:
            with ModelFile(subject.model) as model:
                sizes = [model.expert_bytes(layer) for layer in text.layers.tolist()]
        found = expert_cache(
            text if self.max_tokens == 0 else text.some(self.max_tokens, (subject.seed, 7)),
            slots,
            policies=[name.strip() for name in self.policies.split(",")],
            expert_bytes=sizes,
            seed=subject.seed,
        )
        layer = found.curve[found.curve["cache"] == "layer"]
        rate = layer.set_index(["policy", "slots"])
        sentences = _advice(layer, _middle(layer)[0])
        for slot in _middle(layer):
            names = [p for p in ("pinned", "lru", "lfu", "oracle") if (p, slot) in rate.index]
            told = ", ".join(f"{_WORDS[p]} {_hits(rate.loc[(p, slot)])}" for p in names)
            memory = float(layer.loc[layer["slots"] == slot, "memory"].iloc[0])
            size = float(layer.loc[layer["slots"] == slot, "memory_bytes"].iloc[0]) if sizes else float("nan")
            sentences.append(
                f"With {slot} slots per layer ({memory:.0%} of all experts"
                + (f", {human_size(size)}" if sizes else "")
                + f") this share of the experts that tokens need is there already: {told}."
            )
        sentences.append(_hot_set(layer, found.hot))
        if "shared" in set(found.curve["cache"]):
            sentences += _shared(found.curve)
        if sizes is not None and "lru" in set(layer["policy"]):
            mine = layer[layer["policy"] == "lru"]
            sentences.append(
                "Bytes fetched per token (lru): "
                + ", ".join(
                    f"{human_size(row['fetched_bytes'])} with {human_size(row['memory_bytes'])} of slots"
                    for row in mine.to_dict("records")
                )
                + "."
            )
            found.curve["fetched_ms"] = found.curve["fetched_bytes"] / (self.gb_per_s * 1e6)
            sentences.append(
                f"At {self.gb_per_s:g} GB/s, and if nothing is fetched ahead, that takes "
                + ", ".join(f"{ms:.3g}" for ms in found.curve.loc[mine.index, "fetched_ms"])
                + " ms a token."
            )
        used = int(layer["tokens"].iloc[0])
        caveats = [
            f"Hits are counted on {used:,} tokens of held-out prompts, after the others warmed the caches up"
            + (
                f"; of {len(subject.routing.texts):,} tokens"
                if len(subject.routing.texts) > 2 * used + self.max_tokens
                else ""
            )
            + ".",
            "Tokens are computed one at a time, prompt after prompt; those computed together share what is fetched.",
            "A miss is counted, not timed: milliseconds are bytes over --gb-per-s, and fetching ahead can hide them"
            " (task-prediction).",
        ]
        if sizes is None:
            caveats.append("In experts; give the model for bytes: -m model.gguf.")
        tables = {"cache": found.curve, "by_layer": found.layers, "hot_set": found.hot}
        return self.finding(subject, sentences, tables, caveats)

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Hit rate against memory, for both kinds of cache."""
        from moetrace import plot

        curve = finding.tables["cache"]
        where = {"layer": "with slots of its own for each layer", "shared": "shared by all layers"}
        return {
            f"{cache}_slots": Figure(
                lambda ax, cache=cache: plot.hit_rates(curve[curve["cache"] == cache], POLICIES, ax=ax),  # type: ignore[misc]
                f"Hit rate of a cache of experts {where[cache]} against its size, on prompts held out.",
            )
            for cache in dict.fromkeys(curve["cache"])
        }


_WORDS = {
    "lru": "keeping what was used last",
    "lfu": "keeping what is used often",
    "pinned": "pinning the hottest of other prompts",
    "oracle": "knowing the future",
}


def _middle(layer: pd.DataFrame) -> list[int]:
    """Slots nearest to a quarter and to a half of the experts."""
    slots, memory = layer["slots"].to_numpy(), layer["memory"].to_numpy()
    return sorted({int(slots[np.abs(memory - share).argmin()]) for share in (0.25, 0.5)})


def _hits(row: Any) -> str:
    return span(float(row["hit_rate"]), float(row["low"]), float(row["high"]), ".1%")


def _advice(layer: pd.DataFrame, slots: int) -> list[str]:
    """What to do with so many slots per layer, if both ways were simulated: the first thing that one wants to know."""
    rows = {row["policy"]: row for row in layer[layer["slots"] == slots].to_dict("records")}
    if not {"pinned", "lru"} <= set(rows):
        return []
    pinned, lru = rows["pinned"], rows["lru"]
    if lru["low"] > pinned["high"]:
        advice = "Keep what was used last, rather than pin a hot set"
    elif pinned["low"] > lru["high"]:
        advice = "Pin a hot set, rather than keep what was used last"
    else:
        advice = "Pinning a hot set and keeping what was used last do alike"
    return [
        f"{advice}: with {slots} slots per layer {_hits(lru)} of the experts that tokens need are there if the last"
        f" ones are kept, {_hits(pinned)} if the hottest of other prompts are pinned."
    ]


def _hot_set(layer: pd.DataFrame, hot: pd.DataFrame) -> str:
    known = hot[hot["activations"] > 0]
    pinned = layer[layer["policy"] == "pinned"]
    text = ""
    for row in pinned[pinned["slots"] == _middle(layer)[0]].to_dict("records"):
        text = (
            "What is hot in some prompts is hot in others, more than if use were even. "
            if row["low"] > row["memory"]
            else "No hot set was found that holds for other prompts. "
        )
    few, many = known["for_80"].min(), known["for_80"].max()
    return (
        f"{text}To serve 80 % of activations the hottest {few:.0f} to {many:.0f} experts of a layer are needed"
        f" (even usage: {known['even_80'].iloc[0]:.0f})."
    )


def _shared(curve: pd.DataFrame) -> list[str]:
    wide = (
        curve.pivot_table(index=["policy", "experts"], columns="cache", values="hit_rate")
        .dropna()
        .reset_index()
    )
    if wide.empty:
        return []
    gap = wide["shared"] - wide["layer"]
    policy, experts = wide.loc[gap.abs().argmax(), ["policy", "experts"]]
    return [
        f"Sharing the slots between layers changes hit rates by {gap.min():+.1%} to {gap.max():+.1%}"
        f" (most: {policy}, {experts} slots in all)."
    ]
