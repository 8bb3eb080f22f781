"""Platt scaling: it recovers the parameters of the data, bounds confidence, keeps the order."""

from __future__ import annotations

import numpy as np
import pytest

from routers.numeric.calibration import fit_platt, sigmoid


def test_it_finds_the_slope_and_offset_that_made_the_scores():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 2))
    truth = sigmoid(logits * [0.5, 2.0] + [-1.0, 0.3])
    platt = fit_platt(logits, (rng.random(truth.shape) < truth).astype(float))
    assert platt.slope == pytest.approx([0.5, 2.0], abs=0.1)
    assert platt.offset == pytest.approx([-1.0, 0.3], abs=0.1)
    assert platt.probabilities(logits) == pytest.approx(truth, abs=0.05)


def test_a_shared_pair_keeps_the_order_between_columns():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (300, 3))
    platt = fit_platt(logits, (rng.random((300, 3)) < [0.1, 0.5, 0.9]).astype(float), shared=True)
    assert len(set(platt.slope.tolist())) == len(set(platt.offset.tolist())) == 1


def test_always_right_or_wrong_is_likely_and_not_certain():
    logits = np.zeros((98, 2))
    p = fit_platt(logits, np.tile([0.0, 1.0], (98, 1))).probabilities(logits)
    assert p[0] == pytest.approx([0.01, 0.99], abs=1e-3)  # 1 / (98 + 2)


def test_logits_that_mislead_are_ignored_rather_than_turned_round():
    z = np.linspace(-3, 3, 400)[:, None]
    platt = fit_platt(z, (z < 0).astype(float))
    assert platt.slope[0] == 0.0
    assert platt.probabilities(z)[0, 0] == pytest.approx(0.5, abs=0.01)


def test_sigmoid_takes_any_number():
    assert sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]
