"""What paths through experts are taken for: domains of prompts, and types of token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from moetrace.analysis.counts.routed import RoutedText, exchange, uses_expert
from moetrace.analysis.domains.domain import domain_lift
from moetrace.analysis.statistics.nulls import Domains, feasibility
from moetrace.analysis.text.association import associate, indicator
from moetrace.analysis.text.lexicon import TypedText
from moetrace.analysis.text.token_patterns import counts_of

#: experts of a path: (layer index, expert) each
Path = tuple[tuple[int, int], ...]


def paths_as_experts(text: RoutedText, paths: Sequence[Path]) -> RoutedText:
    """Give the same tokens with one layer, whose expert i is the i-th path: used by tokens that use all of it.

    A token without any path uses expert ``len(paths)``; one at which some path's layer is not known, none.
    """
    uses = np.zeros((len(text), len(paths) + 1), dtype=bool)
    known = np.ones(len(text), dtype=bool)
    for layer in sorted({layer for path in paths for layer, _ in path}):
        known &= text.known(layer)
    for i, path in enumerate(paths):
        uses[:, i] = np.logical_and.reduce([uses_expert(text.experts[:, a], e) for a, e in path])
    uses[:, -1] = ~uses.any(axis=1)
    uses &= known[:, None]
    n, most = len(paths) + 1, max(1, int(uses.sum(axis=1).max(initial=0)))
    first = np.argsort(~uses, axis=1, kind="stable")[:, :most]
    ids = np.where(np.take_along_axis(uses, first, axis=1), first, n)
    return RoutedText(
        ids[:, None].astype(np.uint16), text.starts, n, tokens=text.tokens, positions=text.positions,
        runs=text.runs, prompts=text.prompts, labels=text.labels,
    )  # fmt: skip


def path_domains(
    text: RoutedText, paths: Sequence[Path], names: Sequence[str], *, n_permutations: int = 999, seed: int = 0
) -> pd.DataFrame:
    """Which domains' prompts take a path: :func:`~moetrace.analysis.domains.domain.domain_lift` of paths.

    Returns one row per path and domain, the strongest first: ``path``, ``domain``, ``tokens``, ``share`` of the
    domain's tokens (those on several of the paths count once for each), ``lift`` over the mean of domains, ``low``,
    ``high``, ``p_family`` over all paths and domains. Empty where prompts have no domains that can be tested.
    """
    columns = ["path", "domain", "tokens", "share", "lift", "low", "high", "p_family"]
    labels = np.array(text.labels, dtype=object)
    mine = np.flatnonzero(labels != "")
    if not len(paths) or len(set(labels[mine])) < 2 or not feasibility(Domains.of(labels[mine])).testable:
        return pd.DataFrame(columns=columns)
    some = paths_as_experts(text.of(mine), paths)
    table = domain_lift(counts_of(some)[0], list(some.labels), n_permutations=n_permutations, seed=seed)
    table = table[table["expert"] < len(paths)].rename(columns={"count": "tokens"})
    table = table.assign(path=[names[i] for i in table["expert"]])
    return table.sort_values(["p_family", "lift"], ascending=[True, False], kind="stable")[
        columns
    ].reset_index(drop=True)


def path_types(
    text: RoutedText,
    paths: Sequence[Path],
    names: Sequence[str],
    typed: TypedText,
    *,
    n_permutations: int = 199,
    seed: int = 0,
) -> pd.DataFrame:
    """Which types of token take a path, against prompts exchanged place by place (max-T over all paths and types).

    Returns one row per path and type, the strongest first: ``path``, ``pattern``, ``tokens`` of the type on it,
    ``concentration``, their share of the path's tokens, ``corpus_share`` of all, ``lift``, ``low``, ``high``,
    ``prompts``, ``p_family``.
    """
    columns = ["path", "pattern", "tokens", "concentration", "corpus_share", "lift", "low", "high", "prompts"]
    columns += ["p_family"]
    if not len(paths):
        return pd.DataFrame(columns=columns)
    some = paths_as_experts(text, paths)
    kinds, code = np.unique(typed.kind, return_inverse=True)
    found = associate(
        some,
        indicator(code, len(kinds)),
        exchange,
        min_activity=5,
        min_support=5,
        min_prompts=min(3, some.n_requests),
        n_permutations=n_permutations,
        seed=seed,
    )
    table = found.table(0.05, 10**6, [typed.names[k] for k in kinds.tolist()], "pattern")
    table = table[table["expert"] < len(paths)]
    table = table.assign(path=[names[i] for i in table["expert"]])
    return table.sort_values(["p_family", "lift"], ascending=[True, False], kind="stable")[
        columns
    ].reset_index(drop=True)
