"""Which experts take which kinds of token: types, patterns of three, relations, places in the text.

Types are those of :mod:`~moetrace.analysis.text.lexicon`. A trigram is the type of the word before, of the word,
and of the word after, with ^ and $ at the ends of a text.

What is tested, and against what:

- *patterns* (types and trigrams) against an exchange of prompts: each prompt's types meet the routing of another
  prompt, place by place. What follows from the place in the text, or from some experts being in favour, stays; the
  largest of all statistics of all layers is compared (max-T).
- *types beyond words*: a type may owe its expert to a single frequent word. So types are also handed out anew
  among words that are about as frequent.
- *places* against the same prompts turned round, *repetition* against an exchange of prompts.
- *relations* (labels of prompts) by exchanging labels between prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from moetrace._native import group_sums, kind_counts
from moetrace.analysis.counts.routed import RoutedText, exchange, rotation, usage, uses_expert
from moetrace.analysis.domains.domain import domain_lift, domain_test
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.shapes import Floats, Ints
from moetrace.analysis.text.association import Rearrange, associate, indicator, orders, parts
from moetrace.analysis.text.lexicon import TypedText
from moetrace.errors import UsageError


@dataclass(frozen=True)
class TokenPatterns:
    """What :func:`pattern_summary` gives.

    Attributes
    ----------
    types, trigrams
        One row per layer, expert and type (or trigram), the strongest first: ``tokens`` of the pattern that use the
        expert, ``of_expert`` (all its tokens), ``of_pattern`` (all the pattern's tokens); ``concentration`` =
        tokens/of_expert; ``corpus_share`` of the pattern; ``lift`` = concentration/corpus_share, with ``low``,
        ``high`` (jackknife over prompts, 95 %); ``prompts`` and ``words`` (different ones) among these tokens;
        ``top_word`` and its share; ``p_value``; ``p_family`` over all of the table's tests (max-T). ``types`` also
        has ``p_words`` (family-wise, types handed out anew among words).
    specialists
        The rows that stand: lift above 1 (low > 1, p_family ≤ alpha), concentration of at least the threshold. For
        types: ``kind`` is "type" if it also holds beyond words, "word" if it is one word only, and "undecided" where
        few words may explain it: that a test does not reject does not show that they do.
    vocabulary
        One row per layer: ``tokens`` (ids seen often enough), ``specialisation`` (the share of an id's occurrences
        that go to its most frequent first expert, mean over ids), ``null`` (mean with prompts exchanged),
        ``p_value``, ``p_family``; ``as_published`` (all ids, once-seen ones included, which give 1).
    tested
        (types, trigrams) tests made.
    """

    types: pd.DataFrame
    trigrams: pd.DataFrame
    specialists: pd.DataFrame
    vocabulary: pd.DataFrame
    tested: tuple[int, int]


def pattern_summary(
    text: RoutedText,
    typed: TypedText,
    *,
    min_activity: int = 5,
    specialist_threshold: float = 0.15,
    min_support: int = 10,
    min_prompts: int = 3,
    alpha: float = 0.05,
    n_permutations: int = 199,
    max_listed: int = 300,
    seed: int = 0,
) -> TokenPatterns:
    """Which experts prefer which types and trigrams, layer by layer.

    Parameters
    ----------
    min_activity
        Experts used by fewer tokens are left out.
    specialist_threshold
        Least concentration of a specialist.
    min_support, min_prompts
        Patterns with fewer tokens, or in fewer prompts, are left out.
    max_listed
        So many rows are listed, the strongest first; those with ``p_family`` ≤ alpha always.
    """
    options: dict[str, Any] = {
        "min_activity": min_activity,
        "min_support": min_support,
        "min_prompts": min_prompts,
    }
    made = {}
    for name, codes in (("types", typed.kind), ("trigrams", typed.trigram)):
        kinds, code = np.unique(codes, return_inverse=True)
        names = [typed.names[k] if name == "types" else typed.trigram_name(k) for k in kinds.tolist()]
        member = indicator(code, len(kinds))
        found = associate(text, member, exchange, n_permutations=n_permutations, seed=seed, **options)
        table = found.table(alpha, max_listed, names, "pattern")
        made[name] = (_with_words(table, text, typed, code, names), found.n_tested)
    types, trigrams = made["types"][0], made["trigrams"][0]
    beyond = types_beyond_words(text, typed, n_permutations, seed)
    layer_of = {int(n): i for i, n in enumerate(text.layers)}
    types["p_words"] = [
        float(beyond[layer_of[layer], expert, typed.names.index(name)])
        for layer, expert, name in types[["layer", "expert", "pattern"]].itertuples(index=False, name=None)
    ]
    stands = []
    for size, table in (("type", types), ("trigram", trigrams)):
        good = table[
            (table["p_family"] <= alpha)
            & (table["low"] > 1)
            & (table["concentration"] >= specialist_threshold)
        ].copy()
        good.insert(2, "of", size)
        beyond_words = good["p_words"] <= alpha if size == "type" else True
        good["kind"] = np.select([good["words"] <= 1, beyond_words], ["word", size], "undecided")
        stands.append(good.drop(columns=["p_words"], errors="ignore"))
    specialists = pd.concat(stands, ignore_index=True)
    return TokenPatterns(
        types,
        trigrams,
        specialists.sort_values(["of", "lift"], ascending=[False, False], kind="stable").reset_index(
            drop=True
        ),
        vocabulary_specialisation(text, min_support=min_support, n_permutations=n_permutations, seed=seed),
        (made["types"][1], made["trigrams"][1]),
    )


def types_by_depth(types: pd.DataFrame, specialists: pd.DataFrame, layers: npt.ArrayLike) -> pd.DataFrame:
    """In which thirds of the layers experts specialise in which types of token.

    Parameters
    ----------
    types, specialists
        Of :class:`TokenPatterns`.
    layers
        (L,) all layers' numbers, in order.

    Returns one row per third of the layers and type: ``third`` ("early", "middle", "late"), ``layers`` (the numbers of
    its first and last), ``pattern``, ``specialists`` of the type beyond single words, and ``median_lift``, of the
    largest lift of each layer of the third (of what ``types`` lists; NaN if it lists none).
    """
    numbers = np.asarray(layers)
    names = sorted(set(types["pattern"]))
    mine = specialists[(specialists["of"] == "type") & (specialists["kind"] == "type")]
    rows = []
    for third, part in zip(("early", "middle", "late"), np.array_split(numbers, 3), strict=True):
        if not part.size:
            continue
        here, listed = mine[mine["layer"].isin(part)], types[types["layer"].isin(part)]
        for name in names:
            lift = listed[listed["pattern"] == name].groupby("layer")["lift"].max()
            rows.append(
                (third, f"{part[0]}-{part[-1]}", name, int((here["pattern"] == name).sum()), lift.median())
            )
    return pd.DataFrame(rows, columns=["third", "layers", "pattern", "specialists", "median_lift"])


def _with_words(
    table: pd.DataFrame, text: RoutedText, typed: TypedText, code: Ints, names: Sequence[str]
) -> pd.DataFrame:
    """Add which words stand behind a row."""
    layer_of = {int(n): i for i, n in enumerate(text.layers)}
    order = np.argsort(code, kind="stable")
    ends = np.searchsorted(code[order], np.arange(len(names) + 1))
    rows_of = {name: order[ends[i] : ends[i + 1]] for i, name in enumerate(names)}
    different, top, share = [], [], []
    for number, expert, name in table[["layer", "expert", "pattern"]].itertuples(index=False, name=None):
        rows = rows_of[name]
        mine = rows[uses_expert(text.experts[rows, layer_of[number]], expert)]
        counts = np.bincount(typed.word[mine], minlength=1)
        most = int(counts.argmax())
        different.append(np.count_nonzero(counts))
        top.append(typed.words[most] if mine.size else "")
        share.append(counts[most] / mine.size if mine.size else float("nan"))
    return table.assign(words=different, top_word=top, top_word_share=share)


def types_beyond_words(text: RoutedText, typed: TypedText, n_permutations: int, seed: int) -> Floats:
    """Family-wise p-values (L, E, types) of the mean rate of a type's words, types handed out anew among words that
    are about as frequent.
    """
    n_types = len(typed.names)
    words, word = np.unique(typed.word, return_inverse=True)
    n_words = words.size
    # A word's type: types follow from the word but for its capitals, so the most frequent one.
    by_type = np.zeros((n_words, n_types))
    np.add.at(by_type, (word, typed.kind), 1.0)
    type_of = by_type.argmax(axis=1)
    rng = np.random.default_rng(seed)
    strata = np.log2(np.bincount(word)).astype(np.int64)
    home = np.argsort(strata, kind="stable")
    codes = np.empty((n_permutations + 1, n_words), dtype=np.int32)
    codes[0] = type_of
    codes[1:, home] = type_of[np.argsort(strata + rng.random((n_permutations, n_words)), axis=1)]
    n_layers = text.experts.shape[1]
    z = np.full((n_layers, n_types, text.n_expert), -np.inf)
    largest = np.full(n_permutations + 1, -np.inf)
    for layer in range(n_layers):
        known = np.flatnonzero(text.known(layer))
        used = usage(text.experts[known, layer], word[known], n_words, text.n_expert).astype(np.float64)
        n = np.bincount(word[known], minlength=n_words).astype(np.float64)
        # Every word counts once, so that a single frequent one cannot carry its type.
        rate = np.divide(used, n[:, None], out=np.zeros_like(used), where=n[:, None] > 0)
        null = group_sums(codes, rate, n_types)
        total = group_sums(codes, (n > 0).astype(np.float64)[:, None], n_types)
        null = np.divide(null, total, out=np.zeros_like(null), where=total > 0)
        spread = null.std(axis=0)
        still = spread < 1e-12
        score = np.where(still, -np.inf, (null - null.mean(axis=0)) / np.where(still, 1.0, spread))
        z[layer] = score[0]
        largest = np.maximum(largest, score.max(axis=(1, 2)))
    ordered = np.sort(largest[1:])
    above = n_permutations - np.searchsorted(ordered, z - 1e-9)
    p = np.where(np.isfinite(z), (1 + above) / (n_permutations + 1), 1.0)
    return np.asarray(p.transpose(0, 2, 1))


def vocabulary_specialisation(
    text: RoutedText, *, min_support: int = 10, n_permutations: int = 199, seed: int = 0
) -> pd.DataFrame:
    """How far token ids go to one expert: OLMoE's vocabulary specialisation, N_xe/N_x with k = 1, largest over e.

    Columns as ``TokenPatterns.vocabulary``. Ids seen fewer than ``min_support`` times are left out of it: an id
    that was seen once has 1 whatever the router does (they are in ``as_published``).
    """
    tokens = np.asarray(text.tokens)
    ids, code = np.unique(tokens, return_inverse=True)
    n_layers = text.experts.shape[1]
    null = np.full((n_permutations + 1, n_layers), np.nan)
    counted, published = np.zeros(n_layers, dtype=np.int64), np.full(n_layers, np.nan)
    same: tuple[Ints, npt.NDArray[np.int32]] | None = None
    for layer in range(n_layers):
        rows = np.flatnonzero(text.known(layer) & (tokens >= 0))
        if not rows.size:
            continue
        sizes = np.bincount(text.owner[rows], minlength=text.n_requests)
        starts = np.concatenate(([0], np.cumsum(sizes[sizes > 0]))).astype(np.int64)
        seen = np.bincount(code[rows], minlength=ids.size)
        often = seen >= min_support
        counted[layer] = int(often.sum())
        first = text.first[rows, layer]
        pairs, n_pair = np.unique(code[rows] * text.n_expert + first, return_counts=True)
        most = np.zeros(ids.size)
        np.maximum.at(most, pairs // text.n_expert, n_pair)
        published[layer] = (most[seen > 0] / seen[seen > 0]).mean()
        if often.any():
            if same is None or not np.array_equal(rows, same[0]):
                same = rows, orders(exchange, starts, n_permutations, seed)
            null[:, layer] = _largest_share(
                code[rows], first, np.flatnonzero(often), seen, text.n_expert, same[1]
            )
    return pd.DataFrame(
        {
            "layer": text.layers,
            "tokens": counted,
            "specialisation": null[0],
            "null": null[1:].mean(axis=0),
            "p_value": nulls.permutation_p(null),
            "p_family": nulls.max_t(null) if not np.isnan(null).any() else np.full(n_layers, np.nan),
            "as_published": published,
        }
    )


def _largest_share(
    code: Ints, first: Ints, often: Ints, seen: Ints, n_expert: int, order: npt.NDArray[np.int32]
) -> Floats:
    """(1 + B,) share of an id's occurrences that go to its most frequent expert, mean over the ids ``often``."""
    total = np.zeros(len(order))
    ids = first.astype(np.uint16)[:, None]
    number = np.full(seen.size, -1)
    for some in parts(often, n_expert * len(order)):
        number[:] = -1
        number[some] = np.arange(some.size)
        rows = np.flatnonzero(number[code] >= 0)
        kind = number[code[rows]].astype(np.int32)
        met = kind_counts(kind, rows.astype(np.int32), ids, order, some.size, n_expert)
        total += (met.max(axis=2) / seen[some]).sum(axis=1)
    return total / often.size


def sequence_patterns(
    text: RoutedText,
    *,
    reach: int = 4,
    min_activity: int = 5,
    min_support: int = 5,
    alpha: float = 0.05,
    n_permutations: int = 199,
    max_listed: int = 200,
    seed: int = 0,
) -> tuple[pd.DataFrame, int]:
    """Which experts prefer a place in the text, or repetition, whatever the token.

    Kinds of token: ``first`` and ``last``; ``start`` and ``end`` (the ``reach`` first and last ones): each prompt's
    routing is turned round for the null. ``repeat 1``, ``repeat 2``, ``repeat 3``: its id, or the two or three ids up
    to it, stood earlier in the same text: prompts are exchanged for the null, place by place, since what is repeated
    stands late.

    Returns the table (columns as ``TokenPatterns.trigrams`` up to ``p_family``, ``pattern`` the kind; ``p_family`` over
    beginnings, over ends, or over repetition), and how many tests were made.
    """
    place = np.arange(len(text)) - np.repeat(text.starts[:-1], np.diff(text.starts))
    left = np.repeat(np.diff(text.starts), np.diff(text.starts)) - 1 - place
    families: tuple[tuple[dict[str, npt.NDArray[np.bool_]], Rearrange], ...] = (
        # Apart: where a text is turned round its end meets its beginning, so the two would go together.
        ({"first": place == 0, "start": place < reach}, rotation),
        ({"last": left == 0, "end": left < reach}, rotation),
        ({f"repeat {n}": repeated(text, n) for n in (1, 2, 3)}, exchange),
    )
    tables, tested = [], 0
    for kinds, rearrange in families:
        found = associate(
            text,
            sparse.csr_array(np.stack(list(kinds.values())).astype(np.float32)),
            rearrange,
            min_activity=min_activity,
            min_support=min_support,
            min_prompts=min(3, text.n_requests),
            n_permutations=n_permutations,
            seed=seed,
            within=rearrange is rotation,
        )
        tables.append(found.table(alpha, max_listed, list(kinds), "pattern"))
        tested += found.n_tested
    table = pd.concat([t for t in tables if len(t)] or tables[:1], ignore_index=True)
    return table.sort_values("z", ascending=False, kind="stable").reset_index(drop=True), tested


def repeated(text: RoutedText, n: int) -> npt.NDArray[np.bool_]:
    """(M,) whether the n token ids up to this one stood earlier in the same request."""
    out = np.zeros(len(text), dtype=bool)
    tokens = np.asarray(text.tokens).tolist()
    for a, b in pairwise(text.starts.tolist()):
        seen: set[tuple[int, ...]] = set()
        for i in range(a + n - 1, b):
            gram = tuple(tokens[i - n + 1 : i + 1])
            out[i] = gram in seen and min(gram) >= 0
            seen.add(gram)
    return out


def counts_of(text: RoutedText) -> tuple[Ints, Ints]:
    """(R, L, E) tokens of each request that used the expert, and (R, L) tokens."""
    n_layers = text.experts.shape[1]
    included = np.zeros((text.n_requests, n_layers, text.n_expert), dtype=np.int64)
    tokens = np.zeros((text.n_requests, n_layers), dtype=np.int64)
    for layer in range(n_layers):
        included[:, layer] = usage(text.experts[:, layer], text.owner, text.n_requests, text.n_expert)
        tokens[:, layer] = np.bincount(text.owner[text.known(layer)], minlength=text.n_requests)
    return included, tokens


@dataclass(frozen=True)
class SemanticPatterns:
    """What :func:`semantic_patterns` gives: ``relations``, the test of each layer (columns of
    ``DomainTest.table``); ``experts``, their lift by relation (:func:`moetrace.analysis.domains.domain.domain_lift`);
    ``words``, experts against semantic types of words (columns of ``TokenPatterns.types``); ``testable`` and, if
    not, the ``reason``.
    """

    relations: pd.DataFrame
    experts: pd.DataFrame
    words: pd.DataFrame
    testable: bool
    reason: str


def semantic_patterns(
    text: RoutedText,
    semantic: TypedText,
    *,
    min_activity: int = 5,
    min_support: int = 5,
    alpha: float = 0.05,
    n_permutations: int = 199,
    max_listed: int = 200,
    seed: int = 0,
) -> SemanticPatterns:
    """Do prompts of different relations (their labels) use different experts, and which words do?

    Parameters
    ----------
    semantic
        Semantic types of the words: ``type_words(words, semantic_type, SEMANTIC_TYPES)``.

    Raises UsageError if a prompt has no label.
    """
    included, _ = counts_of(text)
    labels = list(text.labels or ())
    tested = domain_test(included, labels, layers=text.layers, n_permutations=n_permutations, seed=seed)
    lift = domain_lift(included, labels, layers=text.layers, n_permutations=n_permutations, seed=seed)
    kinds, code = np.unique(semantic.kind, return_inverse=True)
    names = [semantic.names[k] for k in kinds.tolist()]
    found = associate(
        text,
        indicator(code, len(kinds)),
        exchange,
        min_activity=min_activity,
        min_support=min_support,
        min_prompts=min(3, text.n_requests),
        n_permutations=n_permutations,
        seed=seed,
    )
    words = _with_words(found.table(alpha, max_listed, names, "pattern"), text, semantic, code, names)
    return SemanticPatterns(tested.table, lift, words, tested.testable, tested.verdict)


def combined_analysis(**aspects: pd.DataFrame) -> pd.DataFrame:
    """What is known of each expert from several analyses, one row per (layer, expert) found in any of them.

    ``aspects`` are tables with ``layer``, ``expert``, ``pattern``, ``lift`` and ``p_family``, significant rows only.
    Returns ``layer``, ``expert``, for each aspect its strongest pattern, and ``aspects``, how many have one; experts
    known from most aspects first.
    """
    out: pd.DataFrame | None = None
    for name, table in aspects.items():
        best = table.sort_values("lift", ascending=False, kind="stable").drop_duplicates(["layer", "expert"])
        part = best[["layer", "expert", "pattern"]].rename(columns={"pattern": name})
        out = part if out is None else out.merge(part, on=["layer", "expert"], how="outer")
    if out is None:
        raise UsageError("there is nothing to combine", fix="give at least one table")
    out["aspects"] = out[list(aspects)].notna().sum(axis=1)
    return out.sort_values(
        ["aspects", "layer", "expert"], ascending=[False, True, True], kind="stable"
    ).reset_index(drop=True)
