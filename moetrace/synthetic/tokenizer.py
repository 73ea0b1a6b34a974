"""A small byte-level BPE vocabulary that can write down any UTF-8 text.

The 256 byte tokens come first, then the control tokens, then merges learnt from the text below by plain
byte-pair encoding (Sennrich et al. 2016), so that ordinary prose and code take about two bytes a token.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from gguf import TokenType

# llama.cpp knows <|endoftext|> and <|im_end|> by these spellings as ends of generation
BOS, EOS, TURN_START, TURN_END, PAD = "<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CONTROL_TOKENS = (BOS, EOS, TURN_START, TURN_END, PAD)
N_VOCAB_MIN = 256 + len(CONTROL_TOKENS)
N_VOCAB_DEFAULT = 768

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_TEXT = """\
The library opens early in the morning, and the reading room is already warm when the first visitors come
in. Most of them want the newspapers; some have questions about the history of the town, and a few are only
looking for a quiet place to think. There is a large table near the window where children draw ships and
houses while their parents are choosing books. In the afternoon the light changes, and everything in the
room seems to move a little slower than before. What would you do with another hour of the day?

It is not known who built the bridge over the river. The stones were brought from the other side of the
valley, one after another, and put together without any mortar. People say that the work took more than
thirty years, that it was stopped twice because of the weather, and that nobody who began it saw it finished.
Water, wind and time have made the surface smooth. When we were there, an old man with a small dog told us
that he had never walked across it alone at night, although he could not explain why.

def count_words(lines, minimum=1):
    counts = {}
    for line in lines:
        for word in line.lower().split():
            counts[word] = counts.get(word, 0) + 1
    return {word: n for word, n in counts.items() if n >= minimum}

class Stack:
    def __init__(self, values=None):
        self.values = list(values or [])

    def push(self, value):
        self.values.append(value)
        return self

    def pop(self):
        if not self.values:
            raise IndexError("pop from an empty stack")
        return self.values.pop()

int main(void) {
    for (int i = 0; i < 10; i++) {
        if (i % 2 == 0) {
            printf("%d\\n", i);
        }
    }
    return 0;
}

To solve the equation 3x + 5 = 20, first take 5 from both sides, which gives 3x = 15, and then divide both
sides by 3 to find that x = 5. The sum of the first n numbers is n(n + 1) / 2; for n = 100 the answer is 5050.
A function is continuous at a point if its limit there equals its value. The probability that two dice show
the same number is 6/36 = 1/6, and the expected value of one throw is 3.5.

Light travels about 300,000 kilometres in a second. A year on the planet Mercury lasts 88 days, and one on
Neptune almost 165 years. Salt dissolves in water, oil does not. The heart of a healthy adult beats between
60 and 100 times every minute. Please write a short answer to the following question, explain your reasoning
step by step, and give an example: how does the temperature of the sea change the weather on land?
"""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in GPT-2's printable spelling, one GGUF token type each, and the merges in order of rank."""

    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    plain: tuple[bool, ...]
    """Whether the token stands for printable ASCII text or white space: what a model may well generate."""

    def id(self, token: str) -> int:
        """Return the id of a token given in its stored spelling (a control token as it is)."""
        return self.tokens.index(token)


@cache
def _byte_spelling() -> tuple[str, ...]:
    """GPT-2's map from each byte to a printable character (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return tuple(spelling[byte] for byte in range(256))


@cache
def _merges(count: int) -> tuple[tuple[bytes, bytes], ...]:
    words = Counter(re.findall(r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", _TEXT))
    pieces = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < count:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in pieces.values():
            i = 0
            while i + 1 < len(parts):
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [best[0] + best[1]]
                i += 1
    return tuple(merges)


@cache
def vocabulary(n_vocab: int = N_VOCAB_DEFAULT) -> Vocabulary:
    """Return the vocabulary of exactly ``n_vocab`` tokens: as many merges as fit, then unused tokens.

    Raises ``ValueError`` if ``n_vocab`` has no room for the bytes and the control tokens.
    """
    if n_vocab < N_VOCAB_MIN:
        raise ValueError(f"n_vocab is {n_vocab}, the bytes and control tokens alone need {N_VOCAB_MIN}")
    spelling = _byte_spelling()
    merges = _merges(min(n_vocab, N_VOCAB_DEFAULT) - N_VOCAB_MIN)
    plain_bytes = {*range(0x20, 0x7F), 0x0A}

    def spell(text: bytes) -> str:
        return "".join(spelling[byte] for byte in text)

    def normal(text: bytes) -> tuple[str, TokenType, bool]:
        return spell(text), TokenType.NORMAL, plain_bytes.issuperset(text)

    rows = [normal(bytes([byte])) for byte in range(256)]
    rows += [(text, TokenType.CONTROL, False) for text in CONTROL_TOKENS]
    rows += [normal(left + right) for left, right in merges]
    rows += [(f"<|unused_{i}|>", TokenType.UNUSED, False) for i in range(n_vocab - len(rows))]
    tokens, types, plain = zip(*rows, strict=True)
    return Vocabulary(tokens, types, tuple(f"{spell(left)} {spell(right)}" for left, right in merges), plain)
