"""Words of texts, and their types.

Types are the published ones (:data:`TYPES`), of words rather than of pieces of words: a token that is a part of
"specialisation" is a content word like the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from moetrace.analysis.statistics.shapes import Ints

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


_CONTROL = r"<\|[^|<>\s]*\|>|</?s>|<(?:bos|eos|pad|unk)>"


_WORD = re.compile(
    _CONTROL + r"|\d+(?:\.\d+)?"  # numbers
    r"|[^\W\d]\w*(?:['’][^\W\d_]+)?"  # words, identifiers, don't
    r"|[=!<>+\-]=|->|=>"  # operators of two characters
    r"|([^\w\s])\1*"  # runs of one sign: ..., ((
)


@lru_cache(1 << 18)
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
        at_char = np.arange(len(text))
        after = np.append(np.where(solid, at_char, len(text)), len(text))
        after = np.minimum.accumulate(after[::-1])[::-1]  # the first solid character from here on
        before = np.maximum.accumulate(
            np.append(-1, np.where(solid, at_char, -1))
        )  # the last one before here
        holds = after[low] < high
        blank = np.flatnonzero(~holds & (high > low)).tolist()
        units = sorted([*found, *((int(low[i]), int(high[i]), " ") for i in blank)])
        at = np.array([a for a, _, _ in units] or [0])
        base = len(words)
        # of white space, or of the rest of a character that another token began: where it stands
        alone = np.minimum(low, max(len(text) - 1, 0)) - (high == low)
        for out, where in (first, after[low]), (last, before[high]):
            word = np.searchsorted(at, np.where(holds, where, alone), "right") - 1
            out[begin[r] : begin[r + 1]] = base + np.maximum(word, 0)
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
