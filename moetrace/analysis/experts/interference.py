"""Whether the experts that a token uses help or hinder each other, and what fewer or more of them cost.

A layer's output is, by construction, the weighted sum of what its chosen experts compute; so the question whether
experts "combine linearly" has one answer within a layer, and is open only for what later layers make of it.
Three things can be measured: that the sum really is one (:func:`linearity`), whether its terms point the same way
(:func:`combination`, :func:`pair_compatibility`), and what the model loses or gains with other k
(:func:`expert_interference`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.likelihood import likelihood_change
from moetrace.analysis.statistics.shapes import Floats, Ints
from moetrace.errors import UsageError

# -- k -----------------------------------------------------------------------------------------------------


def expert_interference(
    nll: Mapping[int, npt.ArrayLike],
    text: npt.ArrayLike,
    default: int,
    *,
    kl: Mapping[int, npt.ArrayLike] | None = None,
    same_top: Mapping[int, npt.ArrayLike] | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """What k experts per token do to a model's predictions, on the same text.

    Parameters
    ----------
    nll
        k -> (n,) negative log-likelihood of each token, nats.
    text
        (n,) which text each token is from; intervals rest on texts.
    default
        The model's own k, the base of all comparisons.
    kl, same_top
        k -> (n,) KL(default ‖ k), and whether both hold the same token most likely.

    Returns
    -------
    pandas.DataFrame
        One row per k: ``k``, ``tokens``, ``texts``, ``nll``; ``change`` in NLL, ``kl`` and ``same_top`` against the
        default, each with ``…_low`` and ``…_high``; ``better_tokens`` and ``better_texts``, shares where the NLL is
        below the default's. Some tokens are always better by chance: half of them if k made no difference but noise.
    """
    if default not in nll:
        raise UsageError(
            f"the model's own k, {default}, was not evaluated", fix=f"evaluate k = {default} too"
        )
    unit = np.unique(np.asarray(text), return_inverse=True)[1]
    base = np.asarray(nll[default], np.float64)
    rows = []
    for k in sorted(nll):
        own = np.asarray(nll[k], np.float64)
        found = likelihood_change(
            base,
            own,
            text,
            kl=None if kl is None else kl[k],
            same_top=None if same_top is None else same_top[k],
            level=level,
        )
        row: dict[str, float] = {"k": k, "tokens": found.n_tokens, "texts": found.n_texts, "nll": own.mean()}
        row |= found.columns
        per_text = np.bincount(unit, own - base)
        other = k != default
        row["better_tokens"] = float((own < base).mean()) if other else np.nan
        row["better_texts"] = float((per_text < 0).mean()) if other else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def better_with(nll: Mapping[int, npt.ArrayLike], text: npt.ArrayLike, default: int) -> pd.DataFrame:
    """Change of each text's mean NLL with each k: ``text``, ``k``, ``tokens``, ``change``, nats per token.

    With ``low`` and ``high``, the 95 % interval over the text's tokens taken as independent: too narrow, and one in
    forty texts is "better" by it where nothing is.
    """
    unit, at = np.unique(np.asarray(text), return_inverse=True)
    n = np.bincount(at)
    base = np.asarray(nll[default], np.float64)
    parts = []
    for k in sorted(set(nll) - {default}):
        change = np.asarray(nll[k], np.float64) - base
        mean = np.bincount(at, change) / n
        error = np.sqrt(np.bincount(at, (change - mean[at]) ** 2) / np.maximum(n - 1, 1) / n)
        error[n < 2] = np.nan
        low, high = mean - 1.96 * error, mean + 1.96 * error
        parts.append(
            pd.DataFrame({"text": unit, "k": k, "tokens": n, "change": mean, "low": low, "high": high})
        )
    columns = ["text", "k", "tokens", "change", "low", "high"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


# -- outputs -----------------------------------------------------------------------------------------------


def linearity(contributions: npt.NDArray[np.floating], captured: npt.NDArray[np.floating]) -> Floats:
    """How far the captured layer output is from the sum of its experts' contributions, relative to its length.

    Parameters
    ----------
    contributions
        (n, k, D) weighted outputs of the chosen experts, computed outside of llama.cpp
        (:func:`moetrace.analysis.experts.outputs.chosen_outputs`).
    captured
        (n, D) the layer's output (``--capture "tensor:ffn_moe_out-*"``).

    Returns float64 (n,): 0 up to rounding if the output is that sum. It measures rounding and quantised activations.
    """
    total = np.asarray(contributions, np.float64).sum(axis=1)
    gap = np.linalg.norm(np.asarray(captured, np.float64) - total, axis=1)
    size = np.linalg.norm(np.asarray(captured, np.float64), axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(gap / size)


def combination(
    contributions: npt.NDArray[np.floating],
    ids: npt.NDArray[np.integer],
    prompts: npt.ArrayLike,
    *,
    n_null: int = 199,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, float]:
    """Whether the experts that a token uses add up or cancel, in one layer.

    Parameters
    ----------
    contributions, ids
        (n, k, D) weighted outputs and (n, k) ids of the chosen experts.
    prompts
        (n,) which prompt each token is from.
    n_null
        Null arrangements: the signs of each expert's output dimensions are flipped at random, which leaves every
        expert as it is by itself and unrelates it from the others.

    Returns
    -------
    dict
        ``tokens``; ``gain``: Σ‖sum of a token's contributions‖² / Σ(sum of their ‖·‖²): 1 at right angles, above
        where they point the same way (k if they are equal), below where they cancel; ``low``, ``high`` (jackknife
        over prompts, NaN for fewer than two); ``p_value``, two-sided: do experts have anything to do with each
        other? NaN for k = 1 and without null arrangements.
    """
    c = np.asarray(contributions, np.float64)
    unit = np.unique(np.asarray(prompts), return_inverse=True)[1]
    top = np.bincount(unit, (c.sum(axis=1) ** 2).sum(axis=1))
    bottom = np.bincount(unit, (c**2).sum(axis=(1, 2)))
    interval = nulls.ratio_interval(top, bottom, level)
    p = np.nan
    if n_null and c.shape[1] > 1:
        pairs, products = _pair_products(c, ids)
        null = _unrelated(pairs, products, n_null, seed).sum(axis=1)
        p = float(nulls.permutation_p(np.abs(null)))
    return {
        "tokens": len(c),
        "gain": float(top.sum() / bottom.sum()),
        "low": float(interval.low),
        "high": float(interval.high),
        "p_value": p,
    }


def pair_compatibility(
    contributions: npt.NDArray[np.floating],
    ids: npt.NDArray[np.integer],
    prompts: npt.ArrayLike,
    *,
    min_tokens: int = 20,
    n_null: int = 199,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Which pairs of experts of a layer pull the same way where a token uses both, and which against each other.

    Parameters
    ----------
    contributions, ids, prompts, n_null
        As for :func:`combination`.
    min_tokens
        Pairs that fewer tokens use are left out.

    Returns
    -------
    pandas.DataFrame
        One row per pair: ``expert_a``, ``expert_b``, ``tokens``, ``prompts``; ``lift``, tokens that use both over
        what independent choices of the same rates give; ``cosine`` of their outputs at those tokens, mean, with
        ``low`` and ``high`` (jackknife over prompts; NaN for fewer than two); ``p_family``, two-sided, max-T over
        the pairs, against experts that have nothing to do with each other.
    """
    c = np.asarray(contributions, np.float64)
    length = np.linalg.norm(c, axis=2, keepdims=True)
    unit_c = np.divide(c, length, out=np.zeros_like(c), where=length > 0)
    unit = np.unique(np.asarray(prompts), return_inverse=True)[1]
    n_prompts = int(unit.max()) + 1
    token, first, second, pair_of, pairs = _pairs(ids)
    cosine = (unit_c[token, first] * unit_c[token, second]).sum(axis=1)
    sums, sizes = np.zeros((2, len(pairs), n_prompts))
    np.add.at(sums, (pair_of, unit[token]), cosine)
    np.add.at(sizes, (pair_of, unit[token]), 1)
    chosen = np.flatnonzero(sizes.sum(axis=1) >= min_tokens)
    rate = np.bincount(ids.ravel().astype(np.int64)) / len(ids)
    p = np.full(len(chosen), np.nan)
    if n_null and len(chosen):
        kept = np.isin(pair_of, chosen)
        products = _sum_products(
            unit_c,
            token[kept],
            first[kept],
            second[kept],
            np.searchsorted(chosen, pair_of[kept]),
            len(chosen),
        )
        null = _unrelated(pairs[chosen], products, n_null, seed)
        p = nulls.max_t(np.abs(null))
    rows = []
    for i, index in enumerate(chosen):
        mine = sizes[index] > 0
        a, b = pairs[index]
        n = sizes[index].sum()
        interval = nulls.ratio_interval(sums[index, mine], sizes[index, mine], level)
        rows.append(
            {
                "expert_a": int(a),
                "expert_b": int(b),
                "tokens": int(n),
                "prompts": int(mine.sum()),
                "lift": n / (len(ids) * rate[a] * rate[b]),
                "cosine": sums[index].sum() / n,
                "low": float(interval.low),
                "high": float(interval.high),
                "p_family": p[i],
            }
        )
    columns = ["expert_a", "expert_b", "tokens", "prompts", "lift", "cosine", "low", "high", "p_family"]
    return pd.DataFrame(rows, columns=columns)


def _pairs(
    ids: npt.NDArray[np.integer],
) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Every pair of experts that a token uses: token, the two ranks, number of the pair; and the pairs (P, 2)."""
    i, j = np.triu_indices(ids.shape[1], 1)
    token = np.repeat(np.arange(len(ids)), len(i))
    first, second = np.tile(i, len(ids)), np.tile(j, len(ids))
    both = np.sort(np.stack([ids[token, first], ids[token, second]], axis=1).astype(np.int64), axis=1)
    pairs, number = np.unique(both, axis=0, return_inverse=True)
    return token, first, second, number.reshape(-1), pairs


def _pair_products(c: Floats, ids: npt.NDArray[np.integer]) -> tuple[Ints, Floats]:
    token, first, second, pair_of, pairs = _pairs(ids)
    return pairs, _sum_products(c, token, first, second, pair_of, len(pairs))


def _sum_products(c: Floats, token: Ints, first: Ints, second: Ints, pair_of: Ints, n: int) -> Floats:
    """Σ over tokens of the product of both contributions, dimension by dimension: (n pairs, D)."""
    out = np.zeros((n, c.shape[2]))
    for start in range(0, len(token), 4096):
        part = slice(start, start + 4096)
        np.add.at(out, pair_of[part], c[token[part], first[part]] * c[token[part], second[part]])
    return out


def _unrelated(pairs: Ints, products: Floats, n_null: int, seed: int) -> Floats:
    """Each pair's inner product (1 + n_null, pairs): as it is, then with output dimensions' signs flipped."""
    rng = np.random.default_rng(seed)
    out = np.empty((1 + n_null, len(pairs)))
    out[0] = products.sum(axis=1)
    shape = (int(pairs.max()) + 1, products.shape[1])
    for row in range(1, 1 + n_null):
        sign = rng.choice(np.array([-1.0, 1.0]), shape)
        out[row] = np.einsum("pd,pd,pd->p", sign[pairs[:, 0]], sign[pairs[:, 1]], products)
    return out
