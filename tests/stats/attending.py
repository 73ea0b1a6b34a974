"""Attention and routing made up so that the truth is known.

Every head's attention is the soft-max of: sharpness × (a weight drawn for each key) − recency × log(1 + distance).
Sharpness and recency of a token have a prompt's part, a part that remembers (AR(1)), and, if planted, a part that is a
function of the position. The router's logits have the same parts of their own, and, if planted, a function of the
token's sharpness, of its position, or of its experts in the layer before. Nothing else connects the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter

from moetrace.analysis.counts.attention import AttentionRows, attention_features, attention_windows
from moetrace.analysis.prediction.context_attention_routing import attention_similarity, routing_similarity
from moetrace.analysis.prediction.predict import Problem

Plant = Literal["nothing", "attention", "position", "early"]


@dataclass(frozen=True)
class Attending:
    """A world of ``n_prompts`` texts, two layers of ``n_expert`` experts, top-``k``, ``n_heads`` heads."""

    plant: Plant = "nothing"
    n_prompts: int = 18
    length: tuple[int, int] = (20, 40)
    n_expert: int = 16
    k: int = 2
    n_heads: int = 2
    prompt_sd: float = 0.5
    memory: float = 0.5
    strength: float = 1.5
    seed: int = 0

    def draw(self, seed: int) -> Drawn:
        """Draw texts."""
        rng = np.random.default_rng((self.seed, seed))
        lengths = rng.integers(*self.length, self.n_prompts, endpoint=True)
        most = int(lengths.max())
        fixed = np.random.default_rng((self.seed, 10**9))  # what belongs to the world, not to the draw
        e, h = self.n_expert, self.n_heads
        by_position = fixed.normal(size=(most, h + e))
        # half of it rough, half a drift
        by_position += np.linspace(-1.5, 1.5, most)[:, None] * fixed.normal(size=h + e)
        heard = fixed.normal(size=(h, e))
        follows = fixed.permutation(e)
        experts, traits, position = [], [], []
        for n in lengths:
            trait = self._noise(rng, int(n), h)
            logits = np.stack([self._noise(rng, int(n), e) for _ in range(2)], axis=1)
            if self.plant == "position":
                trait = trait + self.strength * by_position[:n, :h]
                logits = logits + self.strength * by_position[:n, None, h:]
            if self.plant == "attention":
                logits = logits + self.strength * (trait @ heard)[:, None]
            early = np.argsort(-logits[:, 0], axis=1)[:, : self.k]
            if self.plant == "early":
                np.put_along_axis(
                    logits[:, 1],
                    follows[early],
                    self.strength + np.take_along_axis(logits[:, 1], follows[early], 1),
                    1,
                )
            late = np.argsort(-logits[:, 1], axis=1)[:, : self.k]
            experts.append(np.stack((early, late), axis=1))
            traits.append(trait)
            position.append(np.arange(n))
        return Drawn(
            experts=np.concatenate(experts),
            attention=self._attend(rng, np.concatenate(traits), np.concatenate(position)),
            prompt=np.repeat(np.arange(self.n_prompts), lengths),
            position=np.concatenate(position),
            n_expert=e,
        )

    def _noise(self, rng: np.random.Generator, n: int, width: int) -> npt.NDArray[np.float64]:
        noise = rng.normal(size=(n, width))
        noise[1:] *= np.sqrt(1 - self.memory**2)
        return lfilter([1.0], [1.0, -self.memory], noise, axis=0) + rng.normal(0, self.prompt_sd, width)

    def _attend(
        self, rng: np.random.Generator, trait: npt.NDArray[np.float64], position: npt.NDArray[np.int64]
    ) -> AttentionRows:
        keys = position + 1
        rows = [
            _softmax(
                np.exp(0.3 * t)[:, None] * rng.normal(size=(self.n_heads, n))
                - (1 + 0.6 * t)[:, None] * _ages(n)
            )
            for t, n in zip(trait, keys, strict=True)
        ]
        values = np.concatenate([row.reshape(-1) for row in rows]).astype(np.float32)
        offset = np.cumsum(keys * self.n_heads) - keys * self.n_heads
        return AttentionRows(
            values, offset, keys, np.zeros(keys.size, dtype=np.int64), self.n_heads, position
        )


@dataclass(frozen=True)
class Drawn:
    """``experts`` (n, 2, k) of the early and the late layer; attention of the late one; prompt and position (n,)."""

    experts: npt.NDArray[np.int64]
    attention: AttentionRows
    prompt: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    n_expert: int

    def problem(self, seed: int = 0, layer: int = 1) -> Problem:
        """One layer's experts. Each position its own token id: the words are the same in all texts."""
        return Problem.of(
            self.experts[:, layer],
            self.n_expert,
            prompt=self.prompt,
            position=self.position,
            token=self.position,
            seed=seed,
        )

    @property
    def features(self) -> npt.NDArray[np.float32]:
        """(n, heads, 7)."""
        return attention_features(self.attention)

    def contexts(
        self, rng: np.random.Generator, length: int = 8
    ) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.float64]], npt.NDArray[np.int64]]:
        """One token of each prompt, anywhere: similarity of attention, of each layer's routing, and positions."""
        far = np.flatnonzero(self.position >= length)
        chosen = np.array([rng.choice(far[self.prompt[far] == i]) for i in np.unique(self.prompt)])
        windows = attention_windows(self.attention, length)[chosen]
        alike = [routing_similarity(self.experts[chosen, layer], self.n_expert) for layer in range(2)]
        return attention_similarity(windows), alike, self.position[chosen]


def _ages(n: int) -> npt.NDArray[np.float64]:
    return np.log1p(np.arange(n)[::-1])[None]


def _softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
