"""Do a token's attention patterns tell which experts it gets in the same layer?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.prediction.predict import (
    Prediction,
    Problem,
    comparison,
    gain,
    gain_test,
    popularity,
    position_basis,
    previous,
    ridge,
    score_table,
    table,
    token_ridge,
)


def attention_prediction(
    p: Problem,
    attention: npt.NDArray[np.float32],
    hidden: npt.NDArray[np.float32] | None = None,
    *,
    kinds: Sequence[str] = (),
    n_permutations: int = 199,
    n_boot: int = 999,
    seed: int = 0,
) -> Prediction:
    """How well attention in a layer tells the experts of the same layer.

    Parameters
    ----------
    attention
        (n, heads, features) f4, all finite: :func:`moetrace.analysis.attention_features`.
    hidden
        (n, D) f4: the router's input. The router is linear in it, so what a linear predictor does not reach from
        it is the predictor's limit, not the router's secret.
    kinds
        Names of the features: each kind's gain is then given by itself.

    Predictors: ``popularity``, ``previous`` (token's experts), ``position`` and ``token`` (tables), ``attention``
    (:func:`ridge` on position and all features of all heads), ``token and attention`` (:func:`token_ridge`),
    ``hidden`` (:func:`ridge`). Attention depends on the position and on the token, and so may routing: what counts
    is its gain over them. ``position (linear)``, which the gain over position is reckoned from, is the ridge
    regression on position alone.
    """
    z = position_basis(p.position)
    x = attention.reshape(len(attention), -1)
    nothing = np.empty((len(attention), 0))
    place = ridge(p, nothing, nuisance=z)
    scores = {
        "popularity": popularity(p),
        "previous": previous(p),
        "position": table(p, p.position),
        "token": table(p, p.token),
        "attention": ridge(p, x, nuisance=z),
        "token and attention": token_ridge(p, x, z),
    }
    if hidden is not None:
        scores["hidden"] = ridge(p, hidden)
    test = gain_test(p, x, z, n_permutations=n_permutations, seed=seed)
    more: dict[str, Any] = {"n_boot": n_boot, "seed": seed}
    gains = [
        comparison("attention", "position (linear)", gain(p, scores["attention"], place, **more), test),
        comparison(
            "token and attention",
            "token and position",
            gain(p, scores["token and attention"], token_ridge(p, nothing, z), **more),
        ),
    ]
    for i, kind in enumerate(kinds):
        alone = ridge(p, attention[:, :, i], nuisance=z)
        gains.append(comparison(f"attention: {kind}", "position (linear)", gain(p, alone, place, **more)))
    return Prediction(score_table(p, scores, **more), pd.DataFrame(gains))
