"""Routing made up so that the truth is known: prompts that differ, tokens that follow each other, words that
route.

The logit of expert e in layer l at a token is: the layer's base + its domain's effect + its prompt's effect +
its token id's effect + noise that remembers (an AR(1) process within the prompt). The k largest are used,
largest first. Every effect is independent and normal, with the standard deviation given; 0 switches it off.

Prompts may be unlike those that tests wish for: copies of each other, turns of a conversation, of unequal length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter


@dataclass(frozen=True)
class World:
    """What stays the same from trace to trace: sizes, strengths, and the domains' and token ids' true
    effects.
    """

    n_domains: int = 5
    n_prompts: int = 12  # of each domain
    n_layers: int = 4
    n_expert: int = 32
    n_expert_used: int = 4
    length: tuple[int, int] = (40, 120)
    base_sd: float = 0.5
    domain_sd: float = 0.0
    prompt_sd: float = 0.5
    token_sd: float = 0.0
    memory: float = 0.5
    vocabulary: int = 200
    own_words: float = 0.0  # share of a domain's tokens that come from its favourite part of the vocabulary
    sizes: tuple[int, ...] = ()  # prompts of each domain, instead of n_prompts
    stretch: tuple[float, ...] = ()  # of each domain's prompts: how many times as long
    tail: float = 0.0  # sd of the logarithm of the length, beside `length`
    scatter: tuple[float, ...] = ()  # of each domain, instead of prompt_sd
    copies: int = 1  # so many prompts one after the other are the same
    turns: int = (
        1  # so many are turns of a conversation: of one effect, each text beginning with the one before
    )
    seed: int = 0
    base: npt.NDArray[np.float64] = field(init=False, repr=False)
    domain: npt.NDArray[np.float64] = field(init=False, repr=False)
    words: npt.NDArray[np.float64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng((self.seed, 1))
        shape = (self.n_layers, self.n_expert)
        object.__setattr__(self, "base", rng.normal(0, self.base_sd, shape))
        object.__setattr__(self, "domain", rng.normal(0, self.domain_sd, (self.n_domains, *shape)))
        object.__setattr__(self, "words", rng.normal(0, self.token_sd, (self.vocabulary, *shape)))

    def trace(self, seed: int, n_prompts: int | None = None) -> Routing:
        """Draw prompts and route them."""
        rng = np.random.default_rng((self.seed, 2, seed))
        shape = (self.n_layers, self.n_expert)
        zipf = 1.0 / np.arange(1, self.vocabulary + 1)
        parts, tokens, lengths, labels = [], [], [], []
        texts: list[npt.NDArray[np.int32]] = []
        for domain in range(self.n_domains):
            favourite = zipf * (np.arange(self.vocabulary) % self.n_domains == domain)
            word_p = (1 - self.own_words) * zipf / zipf.sum() + self.own_words * favourite / favourite.sum()
            sd = self.scatter[domain] if self.scatter else self.prompt_sd
            for i in range(n_prompts or (self.sizes[domain] if self.sizes else self.n_prompts)):
                if i % self.copies:
                    for column in (parts, tokens, lengths, labels, texts):
                        column.append(column[-1])
                    continue
                if i // self.copies % self.turns == 0:
                    effect = rng.normal(0, sd, shape)
                    said = np.empty(0, dtype=np.int32)
                n = float(rng.integers(*self.length, endpoint=True))
                n *= self.stretch[domain] if self.stretch else 1
                n = max(3, round(n * np.exp(rng.normal(0, self.tail)) if self.tail else n))
                words = rng.choice(self.vocabulary, n, p=word_p)
                noise = rng.standard_normal((n, *shape), dtype=np.float32)
                if self.memory:
                    noise[1:] *= np.float32(np.sqrt(1 - self.memory**2))
                    noise = lfilter([1.0], [1.0, -self.memory], noise, axis=0)
                logits = self.base + self.domain[domain] + effect + noise
                if self.token_sd:
                    logits = logits + self.words[words]
                top = np.argpartition(-logits, self.n_expert_used, axis=2)[:, :, : self.n_expert_used]
                rank = np.argsort(-np.take_along_axis(logits, top, axis=2), axis=2)
                parts.append(np.take_along_axis(top, rank, axis=2).astype(np.uint8))
                tokens.append(words)
                lengths.append(n)
                labels.append(f"domain-{domain + 1}")
                said = np.concatenate((said, words.astype(np.int32)))
                texts.append(said)
        sizes = np.array(lengths)
        return Routing(
            experts=np.concatenate(parts),
            token=np.concatenate(tokens).astype(np.int32),
            request=np.repeat(np.arange(sizes.size), sizes),
            position=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
            labels=labels,
            prompts=[f"prompt-{i:04d}" for i in range(sizes.size)],
            n_expert=self.n_expert,
            texts=texts,
        )


@dataclass(frozen=True)
class Routing:
    """Columns as a trace has them: experts (N, L, k) u1, token, request and position (N,); and each prompt's text,
    with what was said before it.
    """

    experts: npt.NDArray[np.uint8]
    token: npt.NDArray[np.int32]
    request: npt.NDArray[np.int64]
    position: npt.NDArray[np.int32]
    labels: list[str]
    prompts: list[str]
    n_expert: int
    texts: list[npt.NDArray[np.int32]]
