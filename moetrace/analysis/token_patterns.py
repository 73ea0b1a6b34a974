"""Which experts take which kinds of token: types, patterns of three, relations, places in the text.

Types are the published ones (:data:`TYPES`), of words rather than of pieces of words: a token that is a part of
"specialisation" is a content word like the whole. A trigram is the type of the word before, of the word, and of
the word after, with ^ and $ at the ends of a text.

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

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from moetrace.analysis import nulls
from moetrace.analysis.domain import domain_lift, domain_test
from moetrace.analysis.nulls import Floats, Ints
from moetrace.analysis.routed import RoutedText, exchange, rotation, standardised
from moetrace.errors import UsageError

#: WS white space, NUM number, KW keyword, BR bracket, OP operator, PN punctuation, FW function word, CAP capitalised,
#: VAR a single letter, CW content word; CTL a control token such as <|im_start|>, which was not published
TYPES = ("WS", "NUM", "KW", "BR", "OP", "PN", "FW", "CAP", "VAR", "CW", "CTL")


def _set_of(words: str) -> frozenset[str]:
    return frozenset(words.split())


# The published lists.
_KEYWORDS = _set_of(
    "def class import return if else for while function const let var async await SELECT FROM WHERE INSERT CREATE"
    " fn mut impl struct enum"
)
_FUNCTION_WORDS = _set_of(
    "the a an in on at to for with by of and or but is are was were be been i you he she it we they this that"
)
_OPERATORS = _set_of("== != <= >= += -= -> =>")

#: semantic types, by word, as published (adjectives and nouns of its prompts), and of our prompts' relation words
SEMANTIC_WORDS = {
    "SYN": "same similar like equals means",
    "ANT": "opposite contrary versus against opposed",
    "AS": "as",
    "TO": "to",
    "FUNC": "the a an of is are was were",
    "ADJ": "happy sad hot cold big small fast slow good bad old new light dark high low",
    "NOUN": "dog cat car tree book house person animal king queen man woman doctor teacher student",
}
SEMANTIC_TYPES = ("WS", "NUM", "OP", *SEMANTIC_WORDS, "OTHER")
_SEMANTIC_OF = {word: name for name, words in reversed(SEMANTIC_WORDS.items()) for word in words.split()}
_SEMANTIC_OPERATORS = _set_of("+ - * / = < > == != += -=")

#: patterns that the published analysis looked for, and the name it gave each
PATTERNS_OF_INTEREST = {
    "synonym": "ADJ→SYN",
    "antonym": "ADJ→ANT",
    "arithmetic": "NUM→OP",
    "analogy_as": "→AS→",
    "analogy_to": "→TO→",
    "hypernym": "NOUN→FUNC",
}

_CONTROL = r"<\|[^|<>\s]*\|>|</?s>|<(?:bos|eos|pad|unk)>"
_WORD = re.compile(
    _CONTROL + r"|\d+(?:\.\d+)?"  # numbers
    r"|[^\W\d]\w*(?:['’][^\W\d_]+)?"  # words, identifiers, don't
    r"|[=!<>+\-]=|->|=>"  # operators of two characters
    r"|([^\w\s])\1*"  # runs of one sign: ..., ((
)


def token_type(word: str) -> str:
    """The published type of a word, or of a token's text: one of :data:`TYPES`, by the published rules in their
    order.
    """
    clean = word.strip()
    lower = clean.lower()
    if not clean:
        return "WS"
    if re.fullmatch(_CONTROL, clean):
        return "CTL"
    if re.fullmatch(r"-?\d+\.?\d*", clean):
        return "NUM"
    if clean in _KEYWORDS or lower in _KEYWORDS:
        return "KW"
    if set(clean) <= set("()[]{}"):
        return "BR"
    if (
        clean in _OPERATORS
        or clean in "+-*/=<>!&|^~"
        or (len(set(clean)) == 1 and clean[0] in "+-*/=<>!&|^~")
    ):
        return "OP"
    if re.fullmatch(r"[^\w\s]+", clean):
        return "PN"
    if lower in _FUNCTION_WORDS:
        return "FW"
    if clean[0].isupper():
        return "CAP"
    return "VAR" if len(clean) == 1 and clean.isalpha() else "CW"


def semantic_type(word: str) -> str:
    """The published semantic type of a word: one of :data:`SEMANTIC_TYPES`."""
    clean = word.strip().lower()
    if not clean:
        return "WS"
    if re.fullmatch(r"-?\d+\.?\d*", clean):
        return "NUM"
    return "OP" if clean in _SEMANTIC_OPERATORS else _SEMANTIC_OF.get(clean, "OTHER")


@dataclass(frozen=True)
class Words:
    """The words of texts, and which token belongs to which.

    Attributes
    ----------
    words
        (U,) words and stretches of white space that are tokens, text after text.
    starts
        (R + 1,) where each text's words begin.
    first, last
        (M,) the word in which each token begins and ends.
    """

    words: tuple[str, ...]
    starts: Ints
    first: Ints
    last: Ints


def join_words(pieces: Sequence[bytes], starts: npt.ArrayLike) -> Words:
    """Join sub-word tokens to words.

    Parameters
    ----------
    pieces
        (M,) the text of each token, as bytes: spaces as such, however the tokenizer spells them.
    starts
        (R + 1,) where each text begins.

    A word is a number, a run of letters, digits and underscores, an operator, a run of one sign, or a control
    token. A token of white space alone is a word of its own. A token that holds several words counts for the one it
    begins with.
    """
    begin = np.asarray(starts, dtype=np.int64)
    words: list[str] = []
    word_starts, first, last = [0], np.zeros(len(pieces), np.int64), np.zeros(len(pieces), np.int64)
    for r in range(begin.size - 1):
        mine = pieces[begin[r] : begin[r + 1]]
        # Bytes that are not UTF-8 become one surrogate each, so that lengths can be told back.
        text = b"".join(mine).decode("utf-8", "surrogateescape")
        width = np.fromiter((len(c.encode("utf-8", "surrogateescape")) for c in text), np.int64, len(text))
        char_at = np.cumsum(width) - width
        ends = np.cumsum([len(piece) for piece in mine], dtype=np.int64)
        found = [(match.start(), match.end(), match.group()) for match in _WORD.finditer(text)]
        solid = np.zeros(len(text), dtype=bool)
        for a, b, _ in found:
            solid[a:b] = True
        # Characters of each token; one that is cut in two belongs to the token that begins it.
        low = np.searchsorted(char_at, np.concatenate(([0], ends[:-1])))
        high = np.searchsorted(char_at, ends)
        blank = [i for i in range(len(mine)) if not solid[low[i] : high[i]].any() and high[i] > low[i]]
        units = sorted([*found, *((int(low[i]), int(high[i]), " ") for i in blank)])
        at = np.array([a for a, _, _ in units] or [0])
        base = len(words)
        for i in range(len(mine)):
            inside = np.flatnonzero(solid[low[i] : high[i]])
            if inside.size:
                a, b = int(low[i] + inside[0]), int(low[i] + inside[-1])
            else:  # white space, or the rest of a character that another token began
                a = b = min(int(low[i]), max(len(text) - 1, 0)) - (high[i] == low[i])
            first[begin[r] + i], last[begin[r] + i] = base + np.maximum(
                np.searchsorted(at, [a, b], "right") - 1, 0
            )
        words += [
            unit[2].encode("utf-8", "surrogateescape").decode("utf-8", "replace") for unit in units
        ] or [" "]
        word_starts.append(len(words))
    return Words(tuple(words), np.array(word_starts, dtype=np.int64), first, last)


@dataclass(frozen=True)
class TypedText:
    """Types of tokens: ``kind`` (M,) of its word, ``before`` and ``after`` (M,) of its neighbours, as codes into
    ``names``, whose last two are ^ and $; ``word`` (M,) codes into ``words``, the different words.
    """

    names: tuple[str, ...]
    kind: Ints
    before: Ints
    after: Ints
    word: Ints
    words: tuple[str, ...]

    @property
    def trigram(self) -> Ints:
        """(M,) code of the trigram; :meth:`trigram_name` names it."""
        n = len(self.names)
        return np.asarray((self.before * n + self.kind) * n + self.after)

    def trigram_name(self, code: int) -> str:
        """For example ``NUM→OP→NUM``."""
        n = len(self.names)
        return "→".join(self.names[i] for i in (code // n // n, code // n % n, code % n))


def type_words(
    joined: Words, classify: Callable[[str], str] = token_type, types: Sequence[str] = TYPES
) -> TypedText:
    """Give tokens the types of their words, and of the words before and after."""
    names = (*types, "^", "$")
    code = {name: i for i, name in enumerate(names)}
    kind = np.array([code[classify(word)] for word in joined.words], dtype=np.int64)
    previous = np.concatenate(([code["^"]], kind[:-1]))
    following = np.concatenate((kind[1:], [code["$"]]))
    previous[joined.starts[:-1]] = code["^"]
    following[joined.starts[1:] - 1] = code["$"]
    words, word = np.unique(np.array([w.strip().lower() for w in joined.words]), return_inverse=True)
    return TypedText(
        names,
        kind[joined.first],
        previous[joined.first],
        following[joined.last],
        word[joined.first].astype(np.int64),
        tuple(str(w) for w in words),
    )


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
        types: ``kind`` is "type" if it also holds beyond words, "words" if few words may explain it.
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
        holds = good["words"] > 1
        if size == "type":
            holds &= good["p_words"] <= alpha
        good["kind"] = np.where(holds, size, "words")
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


def indicator(code: Ints, n: int) -> sparse.csr_array:
    """(n, M) 1 where a row has the code."""
    m = code.size
    return sparse.csr_array((np.ones(m, np.float32), (code, np.arange(m))), shape=(n, m))


Rearrange = Callable[[Ints, np.random.Generator], Ints]


@dataclass
class Associations:
    """Tests of experts against kinds of token: arrays (L, C, E), NaN where not tested."""

    text: RoutedText
    member: sparse.csr_array
    joint: Floats
    of_kind: Floats
    of_expert: Floats
    z: Floats
    p_value: Floats
    p_family: Floats

    @property
    def n_tested(self) -> int:
        return int((~np.isnan(self.p_value)).sum())

    def table(self, alpha: float, max_listed: int, names: Sequence[str], column: str) -> pd.DataFrame:
        """The strongest, with shares, lift and intervals."""
        score = np.where(np.isnan(self.p_value), -np.inf, self.z)
        order = np.argsort(-score, axis=None, kind="stable")
        with np.errstate(invalid="ignore"):
            sure = int((self.p_family <= alpha).sum())
        n = min(max(max_listed, sure), self.n_tested)
        rows = []
        for layer, kind, expert in np.stack(np.unravel_index(order[:n], score.shape), axis=1).tolist():
            rows.append(self._row(layer, kind, expert, names[kind]))
        columns = [
            "layer",
            "expert",
            column,
            "tokens",
            "of_expert",
            "of_pattern",
            "concentration",
            "corpus_share",
        ]
        columns += ["lift", "low", "high", "prompts", "z", "p_value", "p_family"]
        return pd.DataFrame(rows, columns=columns)

    def _row(self, layer: int, kind: int, expert: int, name: str) -> tuple[object, ...]:
        text = self.text
        rows = np.flatnonzero(text.known(layer))
        owner, n_prompts = text.owner[rows], text.n_requests
        is_kind = np.zeros(len(text))
        is_kind[self.member.indices[self.member.indptr[kind] : self.member.indptr[kind + 1]]] = 1.0
        use, here = (text.experts[rows, layer] == expert).any(axis=1).astype(np.float64), is_kind[rows]
        sums = [
            np.bincount(owner, weights=w, minlength=n_prompts)
            for w in (use * here, use, here, np.ones(rows.size))
        ]
        both, of_expert, of_kind, total = (s.sum() for s in sums)
        rest = [s.sum() - s for s in sums]
        with np.errstate(invalid="ignore", divide="ignore"):
            lift = both * total / (of_expert * of_kind)
            without = np.nan_to_num(rest[0] * rest[3] / (rest[1] * rest[2]), nan=0.0, posinf=0.0)
        interval = nulls.jackknife(lift, without[sums[3] > 0])
        return (
            int(text.layers[layer]),
            expert,
            name,
            int(both),
            int(of_expert),
            int(of_kind),
            both / of_expert,
            of_kind / total,
            lift,
            float(np.maximum(interval.low, 0.0)),
            float(interval.high),
            int((sums[0] > 0).sum()),
            self.z[layer, kind, expert],
            self.p_value[layer, kind, expert],
            self.p_family[layer, kind, expert],
        )


def associate(
    text: RoutedText,
    member: sparse.csr_array,
    rearrange: Rearrange,
    *,
    min_activity: int,
    min_support: int,
    min_prompts: int,
    n_permutations: int,
    seed: int,
    within: bool = False,
) -> Associations:
    """Test every expert against every kind of token, ``member`` (C, M), the routing being rearranged.

    ``within``: against the prompt's other tokens, for what is rearranged within prompts; by default against all tokens.
    """
    n_layers, n_kinds, n_expert = text.experts.shape[1], member.shape[0], text.n_expert
    shape = (n_layers, n_kinds, n_expert)
    joint, of_kind, of_expert, z, p_value, p_family = (np.full(shape, np.nan) for _ in range(6))
    largest = np.full(n_permutations, -np.inf)
    # With a single prompt, or prompts of one token each, there may be nothing to rearrange.
    for layer in range(n_layers):
        rows = np.flatnonzero(text.known(layer))
        if not rows.size:
            continue
        sizes = np.bincount(text.owner[rows], minlength=text.n_requests)
        starts = np.concatenate(([0], np.cumsum(sizes[sizes > 0]))).astype(np.int64)
        uses = text.member(layer, rows)
        kinds = sparse.csr_array(member[:, rows])
        n_kind = np.asarray(kinds.sum(axis=1)).ravel().astype(np.float64)
        owners = sparse.csr_array(
            (np.ones(rows.size, np.float32), (np.arange(rows.size), text.owner[rows])),
            shape=(rows.size, text.n_requests),
        )
        in_prompts = np.asarray(((kinds @ owners) > 0).sum(axis=1)).ravel()
        eligible = ((n_kind >= min_support) & (in_prompts >= min_prompts))[:, None] & (
            uses.sum(axis=0) >= min_activity
        )[None, :]
        score = _WithinPrompts(kinds, starts) if within else _Overall(kinds)
        joint[layer] = kinds @ uses
        of_kind[layer], of_expert[layer] = n_kind[:, None], uses.sum(axis=0, dtype=np.float64)[None, :]
        null = np.empty((n_permutations + 1, int(eligible.sum())))
        null[0] = score(uses)[eligible]
        for draw in range(n_permutations):
            # The same numbers in every layer: what layers share, the largest statistic must share too.
            moved = uses[rearrange(starts, np.random.default_rng((seed, draw)))]
            null[draw + 1] = score(moved)[eligible]
        # What stays whatever is rearranged (the first token of every text, say) is no finding.
        null -= null.mean(axis=0)
        null /= np.maximum(null.std(axis=0), 1.0)
        z[layer][eligible] = null[0]
        p_value[layer][eligible] = nulls.permutation_p(null)
        largest = np.maximum(largest, null[1:].max(axis=1, initial=-np.inf))
    ordered = np.sort(largest)
    above = n_permutations - np.searchsorted(ordered, np.nan_to_num(z, nan=np.inf) - 1e-9)
    p_family = np.where(np.isnan(p_value), np.nan, (1 + above) / (n_permutations + 1))
    return Associations(text, member, joint, of_kind, of_expert, z, p_value, p_family)


class _Overall:
    """How much more often than by their totals experts (m, E) meet kinds (C, m): (C, E)."""

    def __init__(self, kinds: sparse.csr_array) -> None:
        self._kinds = kinds
        self._size = np.asarray(kinds.sum(axis=1), dtype=np.float64).reshape(-1, 1)

    def __call__(self, uses: npt.NDArray[np.float32]) -> Floats:
        m, a, b = uses.shape[0], self._size, uses.sum(axis=0, dtype=np.float64)[None, :]
        variance = a * b * (m - a) * (m - b) / (m * m * max(m - 1, 1))
        return standardised(np.asarray(self._kinds @ uses, dtype=np.float64), a * b / m, variance)


class _WithinPrompts:
    """The same against each prompt's own totals, studentised over prompts.

    The first and last tokens of a text that remembers lie further from its mean than those inside, so a text that is
    turned round varies too little; how prompts differ from each other shows how much it should.
    """

    def __init__(self, kinds: sparse.csr_array, starts: Ints) -> None:
        self._starts, self._shape = starts, (kinds.shape[0], starts.size - 1)
        cells = sparse.coo_array(kinds)
        kind, row = cells.coords
        prompt = np.searchsorted(starts, row, side="right") - 1
        self._parts = sparse.csr_array(
            (cells.data, (kind * self._shape[1] + prompt, row)), shape=(np.prod(self._shape), kinds.shape[1])
        )
        self._size = np.asarray(self._parts.sum(axis=1), dtype=np.float64).reshape(*self._shape, 1)

    def __call__(self, uses: npt.NDArray[np.float32]) -> Floats:
        share = np.add.reduceat(uses, self._starts[:-1], axis=0, dtype=np.float64)
        share /= np.diff(self._starts)[:, None]
        excess = (
            np.asarray(self._parts @ uses, dtype=np.float64).reshape(*self._shape, -1) - self._size * share
        )
        return standardised(excess.sum(axis=1), np.zeros(()), (excess**2).sum(axis=1))


def _with_words(
    table: pd.DataFrame, text: RoutedText, typed: TypedText, code: Ints, names: Sequence[str]
) -> pd.DataFrame:
    """Add which words stand behind a row."""
    layer_of = {int(n): i for i, n in enumerate(text.layers)}
    different, top, share = [], [], []
    for number, expert, name in table[["layer", "expert", "pattern"]].itertuples(index=False, name=None):
        mine = (code == names.index(name)) & (text.experts[:, layer_of[number]] == expert).any(axis=1)
        words, counts = np.unique(typed.word[mine], return_counts=True)
        different.append(words.size)
        top.append(typed.words[int(words[counts.argmax()])] if words.size else "")
        share.append(counts.max() / counts.sum() if words.size else float("nan"))
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
    codes = np.empty((n_permutations + 1, n_words), dtype=np.int64)
    codes[0] = type_of
    codes[1:, home] = type_of[np.argsort(strata + rng.random((n_permutations, n_words)), axis=1)]
    n_layers = text.experts.shape[1]
    z = np.full((n_layers, n_types, text.n_expert), -np.inf)
    largest = np.full(n_permutations + 1, -np.inf)
    for layer in range(n_layers):
        known = text.known(layer)
        per_word = indicator(word[known], n_words)
        used = np.asarray(per_word @ text.member(layer, np.flatnonzero(known)), dtype=np.float64)
        n = np.bincount(word[known], minlength=n_words).astype(np.float64)
        # Every word counts once, so that a single frequent one cannot carry its type.
        rate = np.divide(used, n[:, None], out=np.zeros_like(used), where=n[:, None] > 0)
        null = np.empty((n_permutations + 1, n_types, text.n_expert))
        for draw, mine in enumerate(codes):
            groups = indicator(mine, n_types)
            total = (groups @ (n > 0))[:, None]
            null[draw] = np.divide(
                groups @ rate, total, out=np.zeros((n_types, text.n_expert)), where=total > 0
            )
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

        def largest(of: Ints, rows: Ints = rows, seen: Ints = seen) -> Floats:
            table = np.bincount(code[rows] * text.n_expert + of, minlength=ids.size * text.n_expert)
            return np.asarray(table.reshape(ids.size, -1).max(axis=1) / np.maximum(seen, 1))

        share = largest(first)
        published[layer] = share[seen > 0].mean()
        if often.any():
            null[0, layer] = share[often].mean()
            for draw in range(n_permutations):
                moved = first[exchange(starts, np.random.default_rng((seed, draw)))]
                null[draw + 1, layer] = largest(moved)[often].mean()
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


def coactivation(text: RoutedText, *, min_activity: int = 5, max_listed: int = 200) -> pd.DataFrame:
    """Which experts of a layer are chosen together, over all pairs.

    Returns one row per pair (``expert`` < ``other``), the strongest lift first: ``tokens`` with both; ``share`` =
    N_ij/N_i and ``share_other`` = N_ij/N_j (OLMoE's co-activation); ``chance`` = (k − 1)/(E − 1); ``lift`` over what
    the two rates give, N_i·N_j scaled so that all pairs add up to k(k − 1)/2 per token; ``low``, ``high``
    (jackknife over prompts). No test: picks of one token exclude each other, so there is no simple null.
    """
    rows: list[tuple[object, ...]] = []
    columns = ["layer", "expert", "other", "tokens", "share", "share_other", "chance", "lift", "low", "high"]
    for layer in range(text.experts.shape[1]):
        known = np.flatnonzero(text.known(layer))
        if not known.size:
            continue
        uses = text.member(layer, known)
        pairs = (uses.T @ uses).astype(np.float64)
        n = np.diag(pairs).copy()
        product = np.outer(n, n)
        np.fill_diagonal(pairs, 0.0)
        np.fill_diagonal(product, 0.0)
        product[n < min_activity] = product[:, n < min_activity] = 0.0
        kept = np.where(product > 0, pairs, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = product * kept.sum() / product.sum()
            lift = np.where(product > 0, kept / expected, -np.inf)
        upper = np.triu(np.ones_like(lift, dtype=bool), 1)
        order = np.argsort(np.where(upper & (kept >= min_activity), -lift, np.inf), axis=None, kind="stable")
        per_layer = max(1, max_listed // text.experts.shape[1])
        k = float(uses.sum() / known.size)
        owner = text.owner[known]
        for i, j in np.stack(np.unravel_index(order[:per_layer], lift.shape), axis=1).tolist():
            if not (upper[i, j] and kept[i, j] >= min_activity):
                continue
            sums = [
                np.bincount(owner, weights=w, minlength=text.n_requests)
                for w in (uses[:, i] * uses[:, j], uses[:, i], uses[:, j], np.ones(known.size))
            ]
            rest = [s.sum() - s for s in sums]
            with np.errstate(invalid="ignore", divide="ignore"):
                scale = expected[i, j] / product[i, j] * known.size
                without = np.nan_to_num(rest[0] * rest[3] / (rest[1] * rest[2]) / scale, posinf=0.0)
            interval = nulls.jackknife(lift[i, j], without[sums[3] > 0])
            rows.append(
                (
                    int(text.layers[layer]), i, j, int(pairs[i, j]), pairs[i, j] / n[i], pairs[i, j] / n[j],
                    (k - 1) / (text.n_expert - 1), lift[i, j], float(np.maximum(interval.low, 0.0)),
                    float(interval.high),
                )
            )  # fmt: skip
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values("lift", ascending=False, kind="stable").reset_index(drop=True)


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
    owners = indicator(text.owner, text.n_requests)
    for layer in range(n_layers):
        included[:, layer] = np.rint(owners @ text.member(layer)).astype(np.int64)
        tokens[:, layer] = np.rint(owners @ text.known(layer).astype(np.float64)).astype(np.int64)
    return included, tokens


@dataclass(frozen=True)
class SemanticPatterns:
    """What :func:`semantic_patterns` gives: ``relations``, the test of each layer (columns of
    ``DomainTest.table``); ``experts``, their lift by relation (:func:`moetrace.analysis.domain.domain_lift`);
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


# -- as published --------------------------------------------------------------------------------------


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
            uses = np.flatnonzero((text.experts[:, layer] == expert).any(axis=1))[:5]
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
        pairs = np.zeros((text.n_expert, text.n_expert))
        for rank in range(ids.shape[1] - 1):
            both = (ids[:, rank] < text.n_expert) & (ids[:, rank + 1] < text.n_expert)
            np.add.at(pairs, (ids[both, rank], ids[both, rank + 1]), 1.0)
        pairs = pairs + pairs.T
        n = text.member(layer).sum(axis=0)
        share = np.divide(pairs, n[:, None], out=np.zeros_like(pairs), where=n[:, None] > 0)
        for i, j in np.stack(
            np.unravel_index(np.argsort(-share, axis=None)[:top], share.shape), axis=1
        ).tolist():
            rows.append((int(text.layers[layer]), i, j, share[i, j]))
    table = pd.DataFrame(rows, columns=["layer", "expert", "other", "share"])
    return table.sort_values("share", ascending=False, kind="stable").head(top).reset_index(drop=True)
