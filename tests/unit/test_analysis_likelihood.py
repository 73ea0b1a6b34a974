"""Changes of likelihood: the pooled mean is numpy's, the interval rests on texts."""

from __future__ import annotations

import numpy as np
import pytest

from moetrace.analysis.statistics.likelihood import likelihood_change
from moetrace.errors import InputError


def test_means_are_per_token_and_pairing_cancels_what_makes_a_text_hard():
    rng = np.random.default_rng(1)
    text = np.repeat(np.arange(30), rng.integers(5, 40, 30))
    hard = rng.normal(4, 2, 30)[text]
    base = hard + rng.normal(0, 0.1, len(text))
    other = base + 0.05 + rng.normal(0, 0.01, len(text))
    found = likelihood_change(base, other, text + 7, kl=np.abs(other - base), same_top=other < 4)
    assert (found.n_tokens, found.n_texts) == (len(text), 30)
    # the jackknife's correction of a ratio is of order 1/30 of its error
    assert found.base.estimate == pytest.approx(base.mean(), abs=found.base.error / 10)
    assert found.change.estimate == pytest.approx((other - base).mean(), abs=1e-4)
    assert found.change.low < 0.05 < found.change.high
    assert found.change.error < found.base.error / 50
    assert found.kl is not None
    assert found.same_top is not None
    assert found.same_top.estimate == pytest.approx(np.mean(other < 4), abs=0.02)


def test_tokens_of_one_text_are_not_independent():
    """Copies of every token change no interval: it rests on the number of texts."""
    rng = np.random.default_rng(2)
    text = np.repeat(np.arange(12), 9)
    base, other = rng.normal(3, 1, (2, len(text)))
    once = likelihood_change(base, other, text)
    often = likelihood_change(np.repeat(base, 20), np.repeat(other, 20), np.repeat(text, 20))
    assert often.change.error == pytest.approx(float(once.change.error))
    assert often.change.estimate == pytest.approx(float(once.change.estimate))


def test_one_text_has_an_estimate_and_no_interval():
    found = likelihood_change([1.0, 2.0], [1.5, 3.5], [4, 4])
    assert found.change.estimate == 1.0
    assert np.isnan([found.change.error, found.change.low, found.change.high]).all()


@pytest.mark.parametrize("tokens", [([], [], []), ([1.0], [1.0, 2.0], [0, 0]), ([1.0], [2.0], [0, 1])])
def test_what_is_not_the_same_tokens_is_refused(tokens):
    with pytest.raises(InputError, match="not the same tokens"):
        likelihood_change(*tokens)
