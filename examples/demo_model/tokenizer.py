"""A byte-level BPE tokenizer in the manner of GPT-2, trained on the demo corpus; no dependency.

It splits text as llama.cpp's ``tokenizer.ggml.pre = "gpt-2"`` does (for ASCII text) and merges pairs in rank
order, so that llama.cpp gives the same ids from the same table.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable

SPECIALS = ("<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
BOS, END = 0, 1
SPLIT = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


def byte_alphabet() -> dict[int, str]:
    """The printable stand-in of each byte value that GPT-2's vocabulary uses."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


ALPHABET = byte_alphabet()


class Tokenizer:
    """Ids: the special tokens, then the 256 bytes, then one token per merge.

    Parameters
    ----------
    merges
        Pairs in rank order, spelled in GPT-2's byte alphabet.
    """

    def __init__(self, merges: list[tuple[str, str]]) -> None:
        self.merges = merges
        self.tokens = [*SPECIALS, *(ALPHABET[b] for b in range(256)), *(a + b for a, b in merges)]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        self.cache: dict[str, list[int]] = {}

    @classmethod
    def train(cls, texts: Iterable[str], n_vocab: int) -> Tokenizer:
        """Learn merges from ``texts`` until there are ``n_vocab`` tokens. Digits are never merged."""
        counts = Counter(piece for text in texts for piece in SPLIT.findall(text))
        words = [
            ([ALPHABET[b] for b in piece.encode()], n)
            for piece, n in sorted(counts.items())
            if not any(c.isdigit() for c in piece)
        ]
        merges: list[tuple[str, str]] = []
        known = {*SPECIALS, *ALPHABET.values()}
        pairs: Counter[tuple[str, str]] = Counter()
        for parts, n in words:
            for pair in itertools.pairwise(parts):
                pairs[pair] += n
        while len(known) < n_vocab:
            best = max(pairs, key=lambda p: (pairs[p], p))
            merged = best[0] + best[1]
            merges.append(best)
            known.add(merged)
            for parts, n in words:
                if merged not in "".join(parts):
                    continue
                for pair in itertools.pairwise(parts):
                    pairs[pair] -= n
                i = 0
                while i < len(parts) - 1:
                    if (parts[i], parts[i + 1]) == best:
                        parts[i : i + 2] = [merged]
                    i += 1
                for pair in itertools.pairwise(parts):
                    pairs[pair] += n
        return cls(merges)

    def piece(self, text: str) -> list[int]:
        """Ids of one piece of the split: always merge the pair of the lowest rank, leftmost first."""
        if text not in self.cache:
            parts = [ALPHABET[b] for b in text.encode()]
            while len(parts) > 1:
                rank, i = min(
                    (self.ranks.get(p, len(self.ranks)), i) for i, p in enumerate(itertools.pairwise(parts))
                )
                if rank == len(self.ranks):
                    break
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            self.cache[text] = [self.ids[p] for p in parts]
        return self.cache[text]

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without BOS; special tokens are not recognised in it."""
        return [i for piece in SPLIT.findall(text) for i in self.piece(piece)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special tokens are left out."""
        back = {c: b for b, c in ALPHABET.items()}
        return bytes(back[c] for i in ids if i >= len(SPECIALS) for c in self.tokens[i]).decode(
            errors="replace"
        )
