"""Which requests are one observation: copies of a text, turns of a conversation, texts that share most of their prompt.

Tests exchange prompts and intervals leave them out one by one, which is right where prompts are independent. The same
text asked three times is one observation, not three; so are the turns of one conversation, each of which begins with
all that was said before. Both are visible in token ids: such texts begin alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from moetrace.analysis.statistics.shapes import Ints

#: a text of so many tokens that another one begins with is no chance
WHOLE = 4
#: and so many tokens that two texts share beyond their template
SHARED = 16


def text_clusters(
    texts: Sequence[npt.NDArray[np.int32]], n_prompt: npt.ArrayLike, labels: Sequence[str]
) -> Ints:
    """Number the clusters of texts that begin alike, (R,) int64.

    Parameters
    ----------
    texts
        R arrays of token ids from the beginning of a sequence on. What is not known is negative, and no number
        stands for two unknown tokens.
    n_prompt
        (R,) how many of a text's tokens are its prompt.
    labels
        (R,) domains: texts of two domains are never in one cluster.

    Two texts of a domain are joined where they are the same; where one begins with the other's whole prompt, of
    :data:`WHOLE` tokens or more; and where they begin with the same :data:`SHARED` tokens, or more, that are half of
    one's prompt, or more. This does not count a template: what a text shares with one of another domain or, if
    there is one domain only, with more than half of all texts (a system prompt, the opening of a chat).
    """
    n = len(texts)
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    prompt = np.minimum(np.asarray(n_prompt, dtype=np.int64), sizes)
    label = np.unique(np.array(labels, np.str_), return_inverse=True)[1]
    keys = [text.tobytes() for text in texts]
    order = np.array(sorted(range(n), key=keys.__getitem__), dtype=np.int64)
    template = np.zeros(n, dtype=np.int64)
    template[order] = _template([texts[i] for i in order.tolist()], label[order])
    never = np.iinfo(np.int64).max
    own = prompt - template
    need = np.minimum(
        np.where(prompt >= WHOLE, prompt, never),
        np.where(own >= SHARED, template + np.maximum(SHARED, -(-own // 2)), never),
    )
    out = np.empty(n, dtype=np.int64)
    done = 0
    for which in range(int(label.max(initial=-1)) + 1):
        mine = order[label[order] == which]
        links = _shared([texts[i] for i in mine.tolist()])
        same = np.array([keys[i] == keys[j] for i, j in pairwise(mine.tolist())], dtype=bool)
        joined = same | _reached(links, need[mine]) | _reached(links[::-1], need[mine][::-1])[::-1]
        out[mine] = done + np.concatenate(([0], np.cumsum(~joined)))
        done = int(out[mine].max()) + 1
    return out


def _shared(texts: Sequence[npt.NDArray[np.int32]]) -> Ints:
    """How many tokens neighbours begin with alike: (n - 1,)."""
    return np.array([_alike(a, b) for a, b in pairwise(texts)], dtype=np.int64)


def _alike(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> int:
    n = min(len(a), len(b))
    if n == 0 or a[0] != b[0]:
        return 0
    different = a[:n] != b[:n]
    first = int(different.argmax())
    return first if different[first] else n


def _template(texts: Sequence[npt.NDArray[np.int32]], label: Ints) -> Ints:
    """Of sorted texts: how many tokens each shares with those of other domains, or with most."""
    if not len(texts):
        return np.empty(0, dtype=np.int64)
    if label.min() == label.max():
        middle = texts[
            len(texts) // 2
        ]  # more than half of sorted texts that begin alike hold the one in the middle
        alike = np.array([_alike(text, middle) for text in texts], dtype=np.int64)
        most = int(np.sort(alike)[::-1][len(texts) // 2])
        return np.asarray(np.minimum(alike, most))
    links = _shared(texts)
    return np.maximum(_other(links, label), _other(links[::-1], label[::-1])[::-1])


def _other(links: Ints, label: Ints) -> Ints:
    """What each text shares with the last one of another domain before it: the least link between them."""
    out = np.zeros(label.size, dtype=np.int64)
    for i, link in enumerate(links.tolist(), start=1):
        out[i] = link if label[i] != label[i - 1] else min(int(out[i - 1]), link)
    return out


def _reached(links: Ints, need: Ints) -> npt.NDArray[np.bool_]:
    """Which links of sorted texts lie between a text and a later one that shares what the first needs."""
    out = np.zeros(links.size, dtype=bool)
    least = np.iinfo(np.int64).max
    for i, (link, mine) in enumerate(zip(links.tolist(), need.tolist(), strict=False)):
        least = min(least, mine)
        out[i] = least <= link
        if not out[i]:
            least = np.iinfo(np.int64).max
    return out
