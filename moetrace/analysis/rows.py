"""Tokens in reading order with what is needed to predict one from another.

:class:`~moetrace.analysis.routed.RoutedText` holds whole texts; these are single tokens, some of which may be missing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenRows:
    """n tokens of some prompts, each prompt's together and in reading order.

    Attributes
    ----------
    experts
        (n, L, k) expert ids; an id of E or more is none: the cell is absent, or the layer uses fewer experts.
    n_expert
        E, of the layer with most.
    layers
        (L,) llama.cpp's numbers.
    prompts, labels
        (P,) names and domains ("" where unlabelled).
    prompt
        (n,) code of each token's prompt.
    run
        (n,) number of the unbroken run of positions that the token is in.
    token, position
        (n,) token id and position.
    source, row
        (n,) which trace it is from, and its row there.
    """

    experts: npt.NDArray[Any]
    n_expert: int
    layers: Ints
    prompts: npt.NDArray[np.str_]
    labels: npt.NDArray[np.str_]
    prompt: Ints
    run: Ints
    token: Ints
    position: Ints
    source: Ints
    row: Ints

    def __len__(self) -> int:
        return self.prompt.size

    def take(self, index: npt.NDArray[Any]) -> TokenRows:
        """Some of the tokens, by a mask or ascending numbers; a copy. Prompts stay numbered as they are."""
        names = ("experts", "prompt", "run", "token", "position", "source", "row")
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    def known(self, layer: int) -> npt.NDArray[np.bool_]:
        """(n,) where the routing of a layer (its index) is there."""
        return np.asarray((self.experts[:, layer] < self.n_expert).any(axis=1))

    def limited(self, max_tokens: int, rng: np.random.Generator) -> TokenRows:
        """At most so many tokens: whole prompts drawn at random, at least one."""
        if len(self) <= max_tokens:
            return self
        sizes = np.bincount(self.prompt, minlength=self.prompts.size)
        order = rng.permutation(np.flatnonzero(sizes))
        fits = np.cumsum(sizes[order]) <= max_tokens
        fits[0] = True
        return self.take(np.isin(self.prompt, order[fits]))


def membership(ids: npt.NDArray[Any], n_expert: int) -> npt.NDArray[np.float32]:
    """Which experts each token uses: ids (n, k) → (n, E) f4 of 0 and 1; ids of E or more are none."""
    out = np.zeros((ids.shape[0], n_expert + 1), dtype=np.float32)
    out[np.arange(ids.shape[0])[:, None], np.minimum(ids, n_expert)] = 1
    return out[:, :n_expert]
