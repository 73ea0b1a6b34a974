"""What a cache of experts would have hit in a run as it was: one budget, and what is computed together at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace import _native
from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.placement.cache import Policy, short, worth_of
from moetrace.errors import UsageError

_Whole = npt.NDArray[np.signedinteger]

#: policies that need no other prompts
RUN_POLICIES: tuple[Policy, ...] = ("lru", "lfu", "oracle")


def run_accesses(text: RoutedText, step: npt.ArrayLike) -> tuple[_Whole, _Whole, _Whole]:
    """Which experts a run needed, in order: of each ubatch layer by layer, an expert once for all of its tokens.

    Parameters
    ----------
    step
        (M,) number of each row's ubatch: rows of one were computed together; ascending in the order of the run.

    Returns
    -------
    (A,) items (layer index · E + expert), groups (what is needed at one time: a ubatch's layer), and the ubatch's index
    from 0: int32, or int64 where that is too short.
    """
    number = np.asarray(step, dtype=np.int64)
    order = np.argsort(number, kind="stable")
    ubatch = np.cumsum(np.diff(number[order], prepend=number[order[:1]]) != 0)
    n_layers, e = text.experts.shape[1], text.n_expert
    fits = (len(text) + 1) * n_layers < 1 << 31 and n_layers * e < 1 << 31
    ids: _Whole = text.experts[order].astype(np.int32 if fits else np.int64)
    layer = np.arange(n_layers, dtype=ids.dtype)[:, None]
    there = ids < e
    group = np.broadcast_to((ubatch[:, None, None] * n_layers + layer).astype(ids.dtype), ids.shape)[there]
    item = (layer * e + ids)[there]
    # in the order of groups, and of first need within one
    by_group = np.argsort(group, kind="stable")
    group, item = group[by_group], item[by_group]
    by_item = np.argsort(short(item, n_layers * e), kind="stable")
    again = np.zeros(item.size, dtype=bool)
    again[by_item[1:]] = (np.diff(item[by_item]) == 0) & (np.diff(group[by_item]) == 0)
    item, group = item[~again], group[~again]
    return item, group, group // n_layers


def run_cache(
    text: RoutedText,
    step: npt.ArrayLike,
    budgets: Sequence[int] = (),
    *,
    policies: Sequence[Policy] = RUN_POLICIES,
    expert_bytes: npt.ArrayLike | None = None,
) -> pd.DataFrame:
    """Simulate one cache for all layers on a run as it was, from an empty cache on.

    What a ubatch needs in a layer is looked for first, and what is missing is fetched then, in place of what is worth
    least (:mod:`moetrace.analysis.placement.cache`): a budget in bytes holds as many experts as fit. Under ``oracle``
    the one that is needed again last goes, which with experts of different sizes is not quite the best. No other
    prompts are needed, and no interval can be given: a run is one observation.

    Parameters
    ----------
    step
        (M,) number of each row's ubatch.
    budgets
        Bytes, or experts where sizes are not known; default: 2, 5, 10, 25, 50 and 75 % of all experts.
    expert_bytes
        (L,) bytes of one expert of each layer.

    Returns
    -------
    pandas.DataFrame
        One row per (policy, budget): ``budget``, ``memory`` its share of all experts' bytes; ``hit_rate`` over all
        accesses, ``needed`` how many; ``hit_rate_single``, over ubatches of one token, as generation is with one client
        (NaN if there is none); ``fetched``, experts fetched per token; with sizes ``fetched_bytes``, per token.

    Raises UsageError if there is no routing.
    """
    item, group, ubatch = run_accesses(text, step)
    if not item.size:
        raise UsageError("there is no routing to simulate", fix="choose a phase that has rows")
    n_layers, e, tokens = text.layers.size, text.n_expert, len(text)
    each = np.ones(n_layers) if expert_bytes is None else np.asarray(expert_bytes, dtype=np.float64)
    sizes = np.repeat(each, e).astype(np.int64)
    total = int(sizes.sum())
    wanted = np.asarray(
        sorted(set(budgets) or {max(1, int(total * share)) for share in (0.02, 0.05, 0.1, 0.25, 0.5, 0.75)}),
        dtype=np.int64,
    )
    single = np.unique(np.asarray(step), return_counts=True)[1][ubatch] == 1
    n_single = np.count_nonzero(single)
    rows = []
    for policy in policies:
        hits = _native.budget_hits(
            item.astype(np.int32),
            _worths(item, group, policy, sizes.size),
            group.astype(np.int32),
            sizes,
            wanted,
        )
        for budget, hit in zip(wanted.tolist(), hits, strict=True):
            rows.append(
                {
                    "policy": policy,
                    "budget": budget,
                    "memory": budget / total,
                    "hit_rate": np.count_nonzero(hit) / hit.size,
                    "needed": hit.size,
                    "hit_rate_single": np.count_nonzero(hit & single) / n_single if n_single else np.nan,
                    "fetched": np.count_nonzero(~hit) / tokens,
                    "fetched_bytes": sizes[item][~hit].sum() / tokens if expert_bytes is not None else np.nan,
                }
            )
    return pd.DataFrame(rows)


def _worths(item: _Whole, group: _Whole, policy: Policy, n_items: int) -> npt.NDArray[np.int32]:
    """(2, A) how much it is worth to keep what was there, and what was fetched; of a group that is used later."""
    if policy != "lru":
        return np.stack([worth_of(item, policy, n_items)] * 2)
    first = np.flatnonzero(np.diff(group, prepend=-1))
    size = np.diff(np.append(first, group.size))
    place = np.arange(item.size) + np.repeat(first, size)  # twice the group's beginning, and the place in it
    return np.stack([place, place + np.repeat(size, size)]).astype(np.int32)


def hot_experts(text: RoutedText, share: float = 0.8, n: int | None = None) -> pd.DataFrame:
    """The hottest experts of each layer: as many as serve this share of its activations, or ``n`` of them.

    Returns one row per layer: ``layer``, ``activations``, ``experts`` (how many), ``even`` (of even use), ``hottest``
    (their numbers, the hottest first, as text), ``served`` (the share that they serve).
    """
    rows = []
    for layer in range(text.experts.shape[1]):
        ids = text.experts[:, layer].astype(np.int64)
        uses = np.bincount(ids[ids < text.n_expert], minlength=text.n_expert)
        order = np.argsort(-uses, kind="stable")
        served = np.cumsum(uses[order]) / max(int(uses.sum()), 1)
        reach = int(np.searchsorted(served, share)) + 1 if uses.sum() else 0
        taken = reach if n is None else n
        part = float("nan") if not uses.sum() else float(served[taken - 1]) if taken else 0.0
        rows.append(
            (
                int(text.layers[layer]), int(uses.sum()), taken, int(np.ceil(share * text.n_expert)),
                " ".join(map(str, order[:taken].tolist())), part,
            )
        )  # fmt: skip
    return pd.DataFrame(rows, columns=["layer", "activations", "experts", "even", "hottest", "served"])
