"""Does an early layer tell which experts the same token gets in later ones?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from moetrace.analysis.prediction.predict import (
    GainTest,
    Prediction,
    Problem,
    Scores,
    comparison,
    gain,
    gain_test,
    pick_ridge,
    popularity,
    previous,
    ridge,
    score_table,
    table,
    transition,
)


def task_prediction(
    p: Problem,
    early: npt.NDArray[np.float32] | sparse.csr_array[np.float32],
    hidden: npt.NDArray[np.float32] | None = None,
    gate: Scores | None = None,
    *,
    sizes: Sequence[int] = (),
    n_permutations: int = 199,
    n_boot: int = 999,
    seed: int = 0,
    test: GainTest | None = None,
) -> Prediction:
    """How well an early layer tells a later layer's experts of the same token.

    Parameters
    ----------
    early
        (n, E) f4, 1 for the experts that the token uses in the early layer
        (:func:`~moetrace.analysis.counts.routed.membership`); as they are, or sparse.
    hidden
        (n, D) f4: what the early layer's router read.
    gate
        (n, E): scores of the later layer's own router applied to that ("next gate on current hidden").
    test
        The test's result if it was made before (:func:`~moetrace.analysis.prediction.predict.gain_tests`).

    Predictors: ``popularity``, ``previous`` (token's experts in the later layer), ``token`` (table), ``transition``
    (:func:`transition`), ``gate``; then ``experts`` (:func:`ridge` on the early experts) and ``hidden``. Gains are
    those of the last predictor, ``hidden`` or else ``experts``, over the others; the test is whether the early
    experts tell more than popularity does.
    """
    chosen: sparse.csr_array[np.float32] = sparse.csr_array(early)
    scores = {
        "popularity": popularity(p),
        "previous": previous(p),
        "token": table(p, p.token),
        "transition": transition(p, chosen),
        **({} if gate is None else {"gate": gate}),
        "experts": pick_ridge(p, chosen),
        **({} if hidden is None else {"hidden": ridge(p, hidden)}),
    }
    if test is None:
        test = gain_test(p, chosen.toarray(), n_permutations=n_permutations, seed=seed)
    more: dict[str, Any] = {"n_boot": n_boot, "seed": seed}
    best = list(scores)[-1]
    gains = [
        comparison("experts", "popularity", gain(p, scores["experts"], scores["popularity"], **more), test),
        *(
            comparison(best, name, gain(p, scores[best], scores[name], **more))
            for name in scores
            if name != best and (best, name) != ("experts", "popularity")
        ),
    ]
    return Prediction(score_table(p, scores, sizes, **more), pd.DataFrame(gains))
