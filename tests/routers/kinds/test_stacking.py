"""Stack weights, the shrinkage to the experts' means, and calibration, on predictions of known quality."""

from __future__ import annotations

import numpy as np
import pytest

from routers.evaluation.metrics import expected_calibration_error
from routers.kinds.quality.stacking import Stack, fit_stack, stack_weights

RNG = np.random.default_rng(0)
CHANCE = RNG.uniform(0.1, 0.9, size=(4000, 3))
SCORES = (RNG.random(CHANCE.shape) < CHANCE).astype(float)
NOISE = RNG.uniform(0.1, 0.9, size=CHANCE.shape)


@pytest.mark.parametrize("seed", range(5))
def test_weights_are_shares(seed):
    rng = np.random.default_rng(seed)
    weights = stack_weights(rng.normal(size=(5, 200, 3)), rng.normal(size=(200, 3)))
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1.0)


def test_weights_of_a_known_mixture_are_found():
    members = RNG.normal(size=(3, 500, 2))
    target = 0.7 * members[0] + 0.3 * members[2]
    np.testing.assert_allclose(stack_weights(members, target), [0.7, 0.0, 0.3], atol=1e-4)


def test_the_one_that_knows_has_all_the_weight():
    stack = fit_stack(np.stack([NOISE, CHANCE]), SCORES)
    assert stack.ranking[1] > 0.9
    assert stack.level[1] > 0.9


def test_where_nothing_can_be_learned_every_query_goes_to_the_best_single_expert():
    scores = (RNG.random((4000, 3)) < [0.5, 0.6, 0.4]).astype(float)
    stack = fit_stack(NOISE[None], scores)
    assert stack.ranking[-1] > 0.9
    assert (stack.combine(NOISE[None]).argmax(axis=1) == 1).mean() > 0.99


def test_overconfident_predictions_are_calibrated():
    odds = np.log(CHANCE / (1 - CHANCE))
    boasting = 1 / (1 + np.exp(-3 * odds))
    stack = fit_stack(boasting[None], SCORES)
    before = expected_calibration_error(boasting.ravel(), SCORES.ravel())
    after = expected_calibration_error(stack.combine(boasting[None]).ravel(), SCORES.ravel())
    assert before > 0.1
    assert after < 0.05


def test_calibration_keeps_the_order_of_the_experts():
    stack = fit_stack(np.stack([NOISE, CHANCE]), SCORES)
    members = np.stack([NOISE, CHANCE])
    assert stack.slope > 0
    np.testing.assert_array_equal(stack.joined(members).argmax(axis=1), stack.combine(members).argmax(axis=1))


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_scores_of_one_expert_make_a_stack(value):
    scores = np.full((50, 1), value)
    stack = fit_stack(np.full((2, 50, 1), value), scores)
    assert stack.combine(np.full((2, 3, 1), value)) == pytest.approx(value, abs=0.02)


def test_a_stack_comes_back_from_its_arrays():
    stack = fit_stack(np.stack([NOISE, CHANCE]), SCORES)
    members = np.stack([NOISE, CHANCE])
    np.testing.assert_array_equal(Stack.restored(stack.arrays()).combine(members), stack.combine(members))


def test_means_do_not_gain_weight_from_the_rows_that_they_include():
    weights = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        signal = 0.1 * rng.choice([-1.0, 1.0], size=(30, 1)) * np.array([1.0, -1.0])
        y = (rng.random((30, 2)) < 0.5 + signal).astype(float)
        others = (y.sum(axis=0) - y) / (len(y) - 1)
        weights.append(fit_stack((others + signal)[None], y).ranking[0])
    assert np.mean(weights) > 0.6
