"""What a cache of experts would hit: is there a hot set, and how much memory buys how much?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from moetrace.analysis.counts.chosen import Chosen
from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.placement.cache import POLICIES, expert_cache
from moetrace.analysis.placement.run_cache import RUN_POLICIES, hot_experts, run_cache
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import span
from moetrace.host.options import human_size, parse_size
from moetrace.model.file import ModelFile
from moetrace.numbers import number, numbers


@dataclass(frozen=True)
class ExpertCache(Question):
    """Is there a hot set of experts, and how much memory for experts buys how much?

    Simulates keeping some experts in fast memory while tokens are computed one at a time: least recently used goes
    (lru), least often used goes (lfu), the hottest experts of other prompts stay (pinned), and the best that anyone
    could do who knew the future (oracle; Belady). For slots of each layer and for slots that all layers share. Half of
    the prompts, drawn at random, warm the caches up and choose what is pinned; hits count on the other half, with
    jackknife intervals over prompts. With -m model.gguf also in bytes. The table run is the recorded run as it was: one
    budget for all layers, prompts included if they are asked for (--phase all), what was computed together at once.
    """

    name: ClassVar[str] = "expert-cache"
    title: ClassVar[str] = "A cache of experts"
    place: ClassVar[int] = 200
    actions: ClassVar[tuple[tuple[str, str], ...]] = (
        ("place the hot experts' layers", "moetrace place {trace} -m MODEL.gguf --vram 12GiB"),
    )
    slow: ClassVar[int] = 2

    slots: str = parameter("", "slots per layer to try, as 4,8,16; default: from k to all experts")
    policies: str = parameter(",".join(POLICIES), "policies to simulate")
    gb_per_s: float = parameter(
        25.0,
        "what the link from slow to fast memory carries, 10⁹ bytes a second: latency is bytes fetched over that",
    )
    budgets: str = parameter(
        "", "sizes of the run's cache, as 2GiB,4GiB (of experts, where bytes are not known)"
    )
    run_tokens: int = parameter(20_000, "tokens of the run as it was: the first so many; 0: all")
    max_tokens: int = parameter(
        5_000, "tokens to simulate: prompts, or stretches of long ones, drawn at random; 0: all"
    )

    def answer(self, subject: Subject) -> Finding:
        """Simulate."""
        text = subject.routing.text
        sizes = expert_sizes(subject, text.layers.tolist())
        run, told = self._run(subject, text, sizes)
        if text.n_requests < 2:
            tables = {"run": run, "hot_set": hot_experts(text)}
            caveats = [
                "There is one prompt, so that what was hot in others cannot be tried on it: nothing is pinned, and"
                " there is no interval.",
                *_SINGLE,
            ]
            return self.finding(subject, told, tables, caveats)
        slots = numbers(self.slots, "--slots") if self.slots else []
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
            words = ", ".join(f"{_WORDS[p]} {_hits(rate.loc[(p, slot)])}" for p in names)
            memory = float(layer.loc[layer["slots"] == slot, "memory"].iloc[0])
            size = float(layer.loc[layer["slots"] == slot, "memory_bytes"].iloc[0]) if sizes else float("nan")
            sentences.append(
                f"With {slot} slots per layer ({memory:.0%} of all experts"
                + (f", {human_size(size)}" if sizes else "")
                + f") this share of the experts that tokens need is there already: {words}."
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
        if not len(run):
            caveats.append(
                "There is no table run: several recordings, or contexts, are several runs, and of a very long one only"
                " some texts are looked at."
            )
        tables = {
            "cache": found.curve,
            "by_layer": found.layers,
            "hot_set": found.hot.merge(hot_experts(text)[["layer", "hottest"]], on="layer"),
            **({"run": run} if len(run) else {}),
        }
        return self.finding(subject, [*sentences, *told], tables, caveats)

    def _run(
        self, subject: Subject, text: RoutedText, sizes: list[int] | None
    ) -> tuple[pd.DataFrame, list[str]]:
        """The beginning of the run as it was, if one context's rows are all here; and what is to be said of it."""
        chosen = subject.routing.chosen
        if len(chosen) > 1 or len(text) < len(subject.routing.texts):
            return pd.DataFrame(), []
        n_tokens = len(text)
        step = np.asarray(chosen[0].trace.step[text.rows], dtype=np.int64)
        if self.run_tokens and len(text) > self.run_tokens:
            last = np.sort(step)[self.run_tokens]
            early = np.flatnonzero(step < last)
            text, step = text.take(early), step[early]
        budgets = [parse_size(part) for part in self.budgets.split(",") if part.strip()]
        table = run_cache(text, step, budgets, expert_bytes=sizes)
        wide = table[table["policy"] == "lru"]
        row = wide.iloc[int((wide["memory"] - 0.25).abs().to_numpy().argmin())]
        best = table[(table["policy"] == "oracle") & (table["budget"] == row["budget"])].iloc[0]
        room = human_size(row["budget"]) if sizes else f"{row['budget']:,.0f} experts"
        said = (
            f"As it ran, {number(len(text), 'token')} from an empty cache on, one budget for all layers of {room}"
            f" ({row['memory']:.0%} of all experts) would have hit {row['hit_rate']:.1%} of what was needed if the last"
            f" used are kept, {best['hit_rate']:.1%} at most"
        )
        if sizes:
            said += f"; {human_size(row['fetched_bytes'])} fetched per token"
        return table, [said + ".", *left_out(chosen[0], n_tokens)]

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Hit rate against memory, for both kinds of cache."""
        from moetrace import plot

        if "cache" not in finding.tables:
            run = finding.tables["run"].assign(low=np.nan, high=np.nan)
            return {
                "run": Figure(
                    lambda ax: plot.hit_rates(run, RUN_POLICIES, ax=ax),
                    "Hit rate of one cache for all layers against its size, in the run as it was.",
                )
            }
        curve = finding.tables["cache"]
        where = {"layer": "with slots of its own for each layer", "shared": "shared by all layers"}
        return {
            f"{cache}_slots": Figure(
                lambda ax, cache=cache: plot.hit_rates(curve[curve["cache"] == cache], POLICIES, ax=ax),  # type: ignore[misc]
                f"Hit rate of a cache of experts {where[cache]} against its size, on prompts held out.",
            )
            for cache in dict.fromkeys(curve["cache"])
        }


_SINGLE = (
    "What is computed together in a layer is looked for together: a hit is not lost to what is fetched beside it.",
    "A run is one observation: another run may need other experts.",
)

_WORDS = {
    "lru": "keeping what was used last",
    "lfu": "keeping what is used often",
    "pinned": "pinning the hottest of other prompts",
    "oracle": "knowing the future",
}


def left_out(chosen: Chosen, n_tokens: int) -> list[str]:
    """What of a run is not looked at, a sentence: copies of texts, and rejected drafts."""
    n = int(np.count_nonzero(chosen.keep)) - n_tokens
    if n <= 0:
        return []
    return [
        f"{number(n, 'token')} more were computed, and are left out: copies of these texts, or rejected drafts."
    ]


def expert_sizes(subject: Subject, layers: list[int]) -> list[int] | None:
    """Bytes of an expert of each layer: of the model's file, or as the recording says; None if neither tells."""
    if subject.model is not None:
        with ModelFile(subject.model) as model:
            return [model.expert_bytes(layer) for layer in layers]
    for trace in subject.traces[:1]:
        told = trace.facts.get("expert_bytes")
        if isinstance(told, list) and len(told) == len(layers):
            return [int(size) for size in told]
    return None


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
