"""Thresholds by hand, and their guarantees over many exchangeable splits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from routers.errors import RouterError
from routers.numeric.conformal import conformal_p, conformal_threshold, risk_threshold


def test_the_conformal_threshold_is_the_ceil_1_minus_alpha_n_plus_1_th_smallest():
    scores = np.arange(1.0, 20.0)[::-1]  # 19 of them
    assert conformal_threshold(scores, 0.05) == 19.0  # ceil(0.95 * 20) = 19
    assert conformal_threshold(scores, 0.10) == 18.0
    assert conformal_threshold(scores, 0.5) == 10.0
    assert conformal_threshold(scores, 0.04) == math.inf  # the 20th of 19
    assert conformal_threshold(scores, 0.999) == 1.0


def test_p_values_agree_with_the_threshold():
    rng = np.random.default_rng(0)
    scores, new = rng.normal(size=199), rng.normal(size=500)
    for alpha in (0.005, 0.05, 0.2):
        assert np.array_equal(conformal_p(scores, new) <= alpha, new > conformal_threshold(scores, alpha))
    assert conformal_p(np.array([1.0, 2.0, 3.0]), np.array([2.0, 9.0])).tolist() == [0.75, 0.25]


def test_the_risk_threshold_by_hand():
    confidence = np.array([0.9, 0.8, 0.7, 0.6])
    losses = np.array([0.0, 1.0, 0.0, 1.0])
    # (n R + 1) / (n + 1): nothing answered 1/5; one 1/5; two and three 2/5; all 3/5.
    assert risk_threshold(confidence, losses, 0.2) == 0.8  # only what is above 0.8
    assert risk_threshold(confidence, losses, 0.39) == 0.8
    assert risk_threshold(confidence, losses, 0.4) == 0.6
    assert risk_threshold(confidence, losses, 0.6) == -math.inf
    with pytest.raises(RouterError, match="cannot be guaranteed by 4 calibration queries: at least 9"):
        risk_threshold(confidence, losses, 0.1)


def test_equal_confidences_are_answered_together_or_not_at_all():
    confidence, losses = np.full(9, 0.5), np.append(np.zeros(8), 1.0)
    assert risk_threshold(confidence, losses, 0.1) == 0.5  # one too many, and it is unknown which
    assert risk_threshold(confidence, losses, 0.2) == -math.inf


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_guarantees_hold_over_exchangeable_splits_and_are_nearly_met(alpha):
    rng = np.random.default_rng(7)
    n, splits = 99, 2000
    abstained, risks, answered = [], [], []
    for _ in range(splits):
        confidence = rng.beta(3, 1, size=n + 1)
        losses = (rng.random(n + 1) > confidence**2).astype(float)  # overconfident
        abstained.append(-confidence[-1] > conformal_threshold(-confidence[:-1], alpha))
        t = risk_threshold(confidence[:-1], losses[:-1], alpha)
        answered.append(confidence[-1] > t)
        risks.append(answered[-1] * losses[-1])
    noise = 3 * math.sqrt(alpha * (1 - alpha) / splits)
    assert alpha - 1 / (n + 1) - noise <= np.mean(abstained) <= alpha + noise
    assert alpha - 2 / (n + 1) - noise <= np.mean(risks) <= alpha + noise
    assert np.mean(answered) > 0.3  # and not by refusing everything


def test_what_makes_no_sense_is_refused():
    with pytest.raises(RouterError, match="alpha must lie between 0 and 1, got 1"):
        conformal_threshold(np.ones(3), 1)
    with pytest.raises(RouterError, match="no calibration queries"):
        risk_threshold(np.zeros(0), np.zeros(0), 0.1)
