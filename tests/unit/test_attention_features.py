"""Attention in numbers, held against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from moetrace.analysis.counts import attention as att
from moetrace.errors import UsageError


def ragged(seed: int = 0, heads: int = 3, sink: float = 0.0) -> att.AttentionRows:
    """Six tokens: a window that begins late, a single key, one without a row, one whose keys are not known."""
    rng = np.random.default_rng(seed)
    n_keys = np.array([1, 4, 20, 9, 5, 7])
    position = np.array([0, 3, 19, 30, 4, 6])
    first = np.array([0, 0, 0, 22, 0, -1])
    rows = [rng.dirichlet(np.ones(n), heads) * (1 - sink) for n in n_keys]
    values = np.concatenate([np.zeros(5), *[r.reshape(-1) for r in rows]]).astype(np.float32)
    offset = 5 + np.cumsum(n_keys * heads) - n_keys * heads
    offset[4] = -1
    return att.AttentionRows(values, offset, n_keys, first, heads, position)


@pytest.mark.parametrize("chunk", [1, 30, 1 << 20])
@pytest.mark.parametrize("sink", [0.0, 0.3])
def test_features_are_what_they_say(chunk: int, sink: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(att, "_CHUNK", chunk)
    rows = ragged(sink=sink)
    got = att.attention_features(rows)
    assert got.shape == (6, 3, len(att.FEATURES))
    assert np.isnan(got[4:]).all()
    for i in range(4):
        for head, w in enumerate(rows.row(i).astype(np.float64)):
            key = rows.first_position[i] + np.arange(w.size)
            far = rows.position[i] - key
            p = w / w.sum()
            expected = [
                -(p * np.log(p)).sum(),
                w[far == 0].sum(),
                w[key == 0].sum(),
                w[(far > 0) & (far <= att.RECENT)].sum(),
                (p * np.log1p(far)).sum(),
                w.max(),
                1 - w.sum(),
            ]
            np.testing.assert_allclose(got[i, head], expected, atol=1e-5)


def test_windows_have_one_length_and_sum_to_one() -> None:
    rows = ragged(sink=0.25)
    got = att.attention_windows(rows, 4)
    assert got.shape == (6, 3, 6)
    assert np.isnan(got[[0, 4, 5]]).all()  # too few keys; no row; positions not known
    for i in (1, 2, 3):
        np.testing.assert_allclose(got[i].sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(got[i, :, :4], rows.row(i)[:, ::-1][:, :4], atol=1e-6)
        np.testing.assert_allclose(got[i, :, 4], rows.row(i)[:, :-4].sum(axis=1), atol=1e-6)
        np.testing.assert_allclose(got[i, :, 5], 0.25, atol=1e-5)
    with pytest.raises(UsageError, match="no window"):
        att.attention_windows(rows, 0)


def test_a_token_without_a_row_has_none() -> None:
    with pytest.raises(UsageError, match="no attention row"):
        ragged().row(4)
