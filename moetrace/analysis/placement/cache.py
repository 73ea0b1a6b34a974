"""What a cache of experts would hit: slots against hit rate, for a stream of routed tokens.

An expert that is used must be in a slot; if it is not, it is fetched (a miss) and takes the slot of another. The
policies differ in which one goes:

- ``lru``: the one not used for longest.
- ``lfu``: the one used least often since the stream began (of equals the one not used for longest).
- ``oracle``: the one needed again last, which nobody can know (Belady 1966); no policy misses less.
- ``pinned``: nothing ever goes: the most used experts of *other* prompts stay in their slots.

Shapes: T accesses of a stream, M items (experts of a layer, or of all layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace import _native
from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.shapes import Ints
from moetrace.errors import UsageError

Policy = Literal["lru", "lfu", "oracle"]


def cache_hits(
    streams: npt.ArrayLike, n_items: int, policy: Policy, slots: Sequence[int]
) -> npt.NDArray[np.bool_]:
    """Which accesses hit in caches of several sizes: streams (S, T) of items → (sizes, S, T), a new array.

    Entries below 0 are no access, and hit nothing. Raises UsageError for items beyond ``n_items``.
    """
    x = np.asarray(streams).astype(np.int32)
    if x.ndim != 2 or (x.size and x.max() >= n_items):
        raise UsageError(f"streams are rows of items from 0 to {n_items - 1}")
    worth = np.zeros(x.shape, dtype=np.int32)
    for mine, row in zip(worth, x, strict=True):
        there = row >= 0
        mine[there] = worth_of(row[there], policy, n_items)
    return _native.cache_hits(x, worth, np.asarray(slots, dtype=np.int64), n_items)


def worth_of(stream: npt.NDArray[np.signedinteger], policy: Policy, n_items: int) -> npt.NDArray[np.int32]:
    """(T,) how much it is worth to keep an item after each use: from 0 to T + M, different for different items."""
    n = stream.size
    now = np.arange(n, dtype=np.int32)
    if policy == "lru":
        return now
    order = np.argsort(short(stream, n_items), kind="stable").astype(np.int32)
    first = np.append(True, np.diff(stream[order]) != 0)[:n]
    if policy == "oracle":
        following = np.full(n, n, dtype=np.int32)
        following[order[:-1][~first[1:]]] = order[1:][~first[1:]]
        return np.where(following < n, np.int32(n_items + n - 1) - following, stream.astype(np.int32))
    begin = np.flatnonzero(first)
    held = np.diff(np.append(begin, n))
    uses, worth = np.empty((2, n), dtype=np.int32)
    uses[order] = now - np.repeat(begin, held)
    worth[np.argsort(short(uses, int(held.max(initial=0))), kind="stable")] = now
    return worth


def short(x: npt.NDArray[np.signedinteger], limit: int) -> npt.NDArray[np.integer]:
    """Whole numbers from 0 to below a limit as the shortest that hold them: numpy sorts 16 bits by their digits."""
    return x.astype(np.uint16) if limit <= 1 << 16 else x


@dataclass(frozen=True)
class CacheSimulation:
    """What :func:`expert_cache` gives.

    Attributes
    ----------
    curve
        One row per (cache, policy, slots). ``cache`` is "layer" (each layer has ``slots`` of its own) or "shared"
        (all layers share them). ``experts`` is the number of slots in all, ``memory`` their share of all experts;
        ``hit_rate`` with ``low`` and ``high`` (jackknife over held-out prompts), ``fetched`` the experts fetched
        per token, ``tokens`` held-out tokens measured; with expert sizes ``memory_bytes`` and ``fetched_bytes`` (per
        token).
    layers
        One row per (policy, slots, layer) of caches with slots per layer: ``hit_rate``.
    hot
        One row per layer: how many of its experts, the hottest of the warm-up prompts first, serve 50, 80 and 90 % of
        the held-out activations (``for_50``, …; of even usage: that share of E, ``even_50``, …).
    """

    curve: pd.DataFrame
    layers: pd.DataFrame
    hot: pd.DataFrame


#: what is simulated: name -> what it is
POLICIES = {
    "lru": "least recently used goes",
    "lfu": "least often used goes",
    "pinned": "hottest of other prompts stay",
    "pinned (same prompts)": "hottest of the measured prompts themselves stay: too good to be true",
    "oracle": "the one needed last goes",
}


def expert_cache(
    text: RoutedText,
    slots: Sequence[int] = (),
    *,
    policies: Sequence[str] = tuple(POLICIES),
    shared: bool = True,
    expert_bytes: npt.ArrayLike | None = None,
    seed: int = 0,
) -> CacheSimulation:
    """Simulate caches of experts on tokens computed one at a time, prompt after prompt.

    Parameters
    ----------
    text
        The tokens: which experts they use, and which prompt each is of.
    slots
        Slots per layer (shared caches get that times the layers); default from k to E.
    expert_bytes
        (L,) bytes of one expert of each layer.
    seed
        Of the order of prompts, and of which half of them only warms the caches up: hits count on the other half,
        and what is pinned is chosen on the first.

    Raises UsageError if there are fewer than two prompts or no routing.
    """
    present = np.unique(text.owner)
    if present.size < 2:
        raise UsageError(
            f"a cache is tried on prompts that it was not set up on, and there are {present.size}",
            fix="capture more prompts (moetrace capture -f prompts.jsonl)",
        )
    unknown = sorted(set(policies) - set(POLICIES))
    if unknown:
        raise UsageError(
            f"there is no cache policy {unknown[0]!r}", fix=f"choose among: {', '.join(POLICIES)}"
        )
    order = np.random.default_rng((seed, 4)).permutation(present)
    rank = np.zeros(text.n_requests, dtype=np.int64)
    rank[order] = np.arange(order.size)
    turn = rank[text.owner]
    tokens = np.argsort(turn, kind="stable")
    ids = text.experts[tokens].astype(np.int64)
    n, n_layers, k = ids.shape
    ids = np.where(ids < text.n_expert, ids, -1)
    turn = turn[tokens] - order.size // 2
    sizes = _slots(slots, k, text.n_expert)
    weights = None if expert_bytes is None else np.asarray(expert_bytes, dtype=np.float64)
    by_layer = ids.transpose(1, 0, 2).reshape(n_layers, n * k)
    curves, layers = [], []
    for cache in ("layer", "shared") if shared and n_layers > 1 else ("layer",):
        if cache == "layer":
            streams, n_items, scale = by_layer, text.n_expert, n_layers
            layer_of = np.broadcast_to(np.arange(n_layers)[:, None], streams.shape)
            turns = np.broadcast_to(np.repeat(turn, k), streams.shape)
            wanted = sizes
        else:
            number = np.arange(n_layers)[:, None]
            streams = np.where(ids >= 0, ids + number * text.n_expert, -1).reshape(1, -1)
            n_items, scale = n_layers * text.n_expert, 1
            layer_of = np.broadcast_to(np.repeat(np.arange(n_layers), k), (n, n_layers * k)).reshape(1, -1)
            turns = np.repeat(turn, n_layers * k).reshape(1, -1)
            wanted = [s * n_layers for s in sizes]
        measured = (turns >= 0) & (streams >= 0)
        who, where = turns[measured], layer_of[measured]
        need = _count(who, where, n_layers, order.size - order.size // 2)
        if not need.sum():
            raise UsageError("there is no routing to simulate", fix="choose a phase that has rows")
        for policy in policies:
            if policy.startswith("pinned"):
                chosen_on = measured if "same" in policy else (turns < 0) & (streams >= 0)
                place = _pinned(streams, chosen_on, n_items)[measured]
                hits = [place <= s for s in wanted]
            else:
                of_size = cache_hits(streams, n_items, policy, wanted)  # type: ignore[arg-type]
                hits = [mine[measured] for mine in of_size]
            hit = np.stack([_count(who, where, n_layers, need.shape[0], mine) for mine in hits], axis=2)
            curves.append(
                _curve(cache, policy, wanted, scale, hit, need, text, weights, int((turn >= 0).sum()))
            )
            if cache == "layer":
                layers.append(_by_layer(policy, wanted, hit, need, text))
    hot = _hot_sets(by_layer, np.repeat(turn, k), text)
    return CacheSimulation(pd.concat(curves, ignore_index=True), pd.concat(layers, ignore_index=True), hot)


def _slots(slots: Sequence[int], k: int, n_expert: int) -> list[int]:
    if any(not 1 <= s <= n_expert for s in slots):
        raise UsageError(f"a layer has {n_expert} experts: no cache of {max(slots)} of them",
                         fix=f"give 1 to {n_expert} slots per layer")  # fmt: skip
    default = {k, 2 * k, 3 * k, n_expert // 4, n_expert // 2, 3 * n_expert // 4, n_expert}
    return sorted(set(slots) or {s for s in default if k <= s <= n_expert})


def _count(
    who: Ints, where: Ints, n_layers: int, n_prompts: int, weights: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.float64]:
    """Accesses (or hits) by prompt and layer: (P, L)."""
    key = who * n_layers + where
    flat = np.bincount(key if weights is None else key[weights], minlength=n_prompts * n_layers)
    return flat.reshape(n_prompts, n_layers).astype(np.float64)


def _pinned(streams: Ints, chosen_on: npt.NDArray[np.bool_], n_items: int) -> Ints:
    """Place of each access's item among the most used ones of some accesses, from 1."""
    out = np.empty(streams.shape, dtype=np.int64)
    for mine, stream, known in zip(out, streams, chosen_on, strict=True):
        uses = np.bincount(stream[known], minlength=n_items)
        place = np.empty(n_items, dtype=np.int64)
        place[np.argsort(-uses, kind="stable")] = np.arange(1, n_items + 1)
        mine[:] = place[stream]
    return out


def _curve(
    cache: str,
    policy: str,
    slots: Sequence[int],
    scale: int,
    hit: npt.NDArray[np.float64],
    need: npt.NDArray[np.float64],
    text: RoutedText,
    weights: npt.NDArray[np.float64] | None,
    tokens: int,
) -> pd.DataFrame:
    each = np.broadcast_to(need.sum(axis=1)[:, None], (need.shape[0], len(slots)))
    rate = nulls.ratio_interval(hit.sum(axis=1), each)
    misses = need.sum(axis=0)[:, None] - hit.sum(axis=0)
    out = pd.DataFrame(
        {
            "cache": cache,
            "policy": policy,
            "slots": slots,
            "experts": np.asarray(slots) * scale,
            "memory": np.asarray(slots) * scale / (text.layers.size * text.n_expert),
            "hit_rate": hit.sum(axis=(0, 1)) / need.sum(),
            "low": np.clip(rate.low, 0, 1),
            "high": np.clip(rate.high, 0, 1),
            "fetched": misses.sum(axis=0) / tokens,
            "tokens": tokens,
        }
    )
    if weights is not None:
        mean = float(weights.mean())
        out["memory_bytes"] = out["slots"] * (float(weights.sum()) if scale > 1 else mean)
        out["fetched_bytes"] = (misses * weights[:, None]).sum(axis=0) / tokens
    return out


def _by_layer(
    policy: str,
    slots: Sequence[int],
    hit: npt.NDArray[np.float64],
    need: npt.NDArray[np.float64],
    text: RoutedText,
) -> pd.DataFrame:
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = hit.sum(axis=0) / need.sum(axis=0)[:, None]
    return pd.DataFrame(
        {
            "policy": policy,
            "slots": np.repeat(slots, text.layers.size),
            "layer": np.tile(text.layers, len(slots)),
            "hit_rate": rate.T.reshape(-1),
        }
    )


def _hot_sets(streams: Ints, turn: Ints, text: RoutedText) -> pd.DataFrame:
    out = []
    for layer, stream in zip(text.layers.tolist(), streams, strict=True):
        warm, held = stream[(turn < 0) & (stream >= 0)], stream[(turn >= 0) & (stream >= 0)]
        order = np.argsort(-np.bincount(warm, minlength=text.n_expert), kind="stable")
        served = np.cumsum(np.bincount(held, minlength=text.n_expert)[order])
        row: dict[str, Any] = {"layer": layer, "activations": int(held.size)}
        for share in (50, 80, 90):
            reach = np.flatnonzero(served >= share / 100 * held.size)
            row[f"for_{share}"] = int(reach[0]) + 1 if held.size else float("nan")
            row[f"even_{share}"] = int(np.ceil(share / 100 * text.n_expert))
        out.append(row)
    return pd.DataFrame(out)
