"""The "expert patterns" experiment of chuk-mlx, and OLMoE's co-activation, formula for formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.counts.routed import RoutedText, uses_expert
from moetrace.analysis.text.association import indicator
from moetrace.analysis.text.lexicon import semantic_type, token_type

#: patterns that the published analysis looked for, and the name it gave each
PATTERNS_OF_INTEREST = {
    "synonym": "ADJ→SYN",
    "antonym": "ADJ→ANT",
    "arithmetic": "NUM→OP",
    "analogy_as": "→AS→",
    "analogy_to": "→TO→",
    "hypernym": "NOUN→FUNC",
}


def _piece_trigrams(
    pieces: Sequence[str], starts: npt.ArrayLike, classify: Callable[[str], str]
) -> Iterator[str]:
    begin = np.asarray(starts).tolist()
    for a, b in pairwise(begin):
        types = [classify(piece) for piece in pieces[a:b]]
        for i, kind in enumerate(types):
            yield "→".join((types[i - 1] if i else "^", kind, types[i + 1] if i + 1 < len(types) else "$"))


def as_published_pattern_summary(
    text: RoutedText, pieces: Sequence[str], *, min_activity: int = 5, top: int = 50
) -> pd.DataFrame:
    """Trigram specialists as published: the ``top`` experts by concentration, their top trigram's share of their
    tokens.

    ``pieces`` (M,) is the text of each token: types are those of pieces, not of words. Returns ``layer``, ``expert``,
    ``top_pattern``, ``concentration``, ``total``, ``top_3``, ``examples``.

    What is wrong: the baseline is the trigram's share of the corpus, not "3 %" (1 of 33 trigrams); the most
    concentrated of many experts is highly concentrated by chance where totals are small; and
    ``specialist_threshold`` was read and never used.
    """
    names, code = np.unique(list(_piece_trigrams(pieces, text.starts, token_type)), return_inverse=True)
    rows = []
    for layer in range(text.experts.shape[1]):
        table = indicator(code, names.size) @ text.member(layer)
        for expert in np.flatnonzero(table.sum(axis=0) >= min_activity).tolist():
            counts = np.rint(table[:, expert]).astype(int)
            total = int(counts.sum())
            best = np.argsort(-counts, kind="stable")[:3]
            uses = np.flatnonzero(uses_expert(text.experts[:, layer], expert))[:5]
            rows.append(
                {
                    "layer": int(text.layers[layer]),
                    "expert": expert,
                    "top_pattern": str(names[best[0]]),
                    "concentration": counts[best[0]] / total,
                    "total": total,
                    "top_3": ", ".join(f"{names[i]} {counts[i]}" for i in best if counts[i]),
                    "examples": " ".join(repr(pieces[i]) for i in uses),
                }
            )
    columns = ["layer", "expert", "top_pattern", "concentration", "total", "top_3", "examples"]
    table_ = pd.DataFrame(rows, columns=columns)
    return (
        table_.sort_values(["concentration", "layer"], ascending=[False, True], kind="stable")
        .head(top)
        .reset_index(drop=True)
    )


def as_published_semantic_patterns(text: RoutedText, pieces: Sequence[str], *, top: int = 10) -> pd.DataFrame:
    """For each pattern of :data:`PATTERNS_OF_INTEREST` the ``top`` (layer, expert, trigram) by count, as published.

    What is wrong: counts have no baseline; the experts listed are those that are used most.
    """
    names, code = np.unique(list(_piece_trigrams(pieces, text.starts, semantic_type)), return_inverse=True)
    tables = np.stack(
        [indicator(code, names.size) @ text.member(layer) for layer in range(text.experts.shape[1])]
    )
    rows = []
    for name, pattern in PATTERNS_OF_INTEREST.items():
        mine = [i for i, trigram in enumerate(names) if pattern in str(trigram)]
        if not mine:
            continue
        part = tables[:, mine]
        order = np.argsort(-part, axis=None, kind="stable")[:top]
        for layer, which, expert in np.stack(np.unravel_index(order, part.shape), axis=1).tolist():
            if part[layer, which, expert] > 0:
                count = int(part[layer, which, expert])
                rows.append((name, int(text.layers[layer]), expert, str(names[mine[which]]), count))
    return pd.DataFrame(rows, columns=["name", "layer", "expert", "trigram", "count"])


def as_published_coactivation(text: RoutedText, *, top: int = 50) -> pd.DataFrame:
    """Co-activation as OLMoE's code counts it: only experts next to each other in the router's order.

    Returns ``layer``, ``expert``, ``other``, ``share`` = N_ij/N_i, largest first. What is wrong: with k experts,
    k − 1 of k(k − 1)/2 pairs count, so that chance is 2/k of (k − 1)/(E − 1).
    """
    rows = []
    for layer in range(text.experts.shape[1]):
        ids = text.experts[:, layer].astype(np.int64)
        e = text.n_expert
        both = (ids[:, :-1] < e) & (ids[:, 1:] < e)
        cells = (ids[:, :-1] * e + ids[:, 1:])[both]
        pairs = np.bincount(cells, minlength=e * e).reshape(e, e).astype(np.float64)
        pairs = pairs + pairs.T
        n = np.bincount(ids[ids < e], minlength=e)
        share = np.divide(pairs, n[:, None], out=np.zeros_like(pairs), where=n[:, None] > 0)
        for i, j in np.stack(
            np.unravel_index(np.argsort(-share, axis=None)[:top], share.shape), axis=1
        ).tolist():
            rows.append((int(text.layers[layer]), i, j, share[i, j]))
    table = pd.DataFrame(rows, columns=["layer", "expert", "other", "share"])
    return table.sort_values("share", ascending=False, kind="stable").head(top).reset_index(drop=True)
