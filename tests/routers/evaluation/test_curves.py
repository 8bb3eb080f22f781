import numpy as np
import pytest

from routers.base import Estimate
from routers.decision import Utility, decide
from routers.evaluation import curves

QUALITY = np.array([[0.5, 0.9], [0.5, 0.7], [0.6, 0.6]])
COSTS = np.array([[1.0, 3.0], [1.0, 3.0], [1.0, 3.0]])
SCORES = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])


def test_choices_are_those_of_decide():
    rng = np.random.default_rng(0)
    quality = rng.random((200, 5)).round(1)  # many ties
    costs = rng.random((200, 5)).round(1)
    eligible = rng.random((200, 5)) < 0.5
    eligible[0] = False
    names = tuple("abcde")
    for cost_weight in (0.0, 0.3, 1.0, 50.0):
        estimate = Estimate(names, quality, costs, eligible=eligible)
        decisions = decide(estimate, utility=Utility(cost_weight))
        expected = [names.index(decision.experts[0]) for decision in decisions]
        assert curves.choose(quality, costs, eligible, cost_weight).tolist() == expected


def test_choices_without_costs_and_with_what_is_not_known():
    assert curves.choose(QUALITY, None).tolist() == [1, 1, 0]
    unknown = np.array([[0.9, np.nan], [np.nan, 0.1], [0.5, 0.5]])
    assert curves.choose(unknown, np.array([[1, 1], [1, 1], [np.nan, 1]])).tolist() == [0, 1, 1]


def test_a_sweep_goes_from_the_best_to_the_cheapest():
    curve = curves.sweep(QUALITY, COSTS, None, SCORES, COSTS)
    # query 1 switches at (0.9 - 0.5) / 2 = 0.2, query 2 at 0.1, query 3 always takes the cheaper of equals
    assert curve.cost_weights[0] == 0
    assert curve.cost_weights[-1] == pytest.approx(0.4)
    at = {
        round(float(d), 3): (a, c) for d, a, c in zip(curve.cost_weights, curve.accuracy, curve.mean_cost, strict=True)
    }
    assert at[0.0] == pytest.approx((2 / 3, 7 / 3))
    assert at[0.4] == pytest.approx((2 / 3, 1))
    np.testing.assert_allclose(curves.sweep(QUALITY, COSTS, None, SCORES, COSTS, np.array([0.15])).accuracy, [1.0])
    assert (np.diff(curve.mean_cost) <= 1e-12).all()


def test_cost_weights_fall_where_choices_change_at_even_steps_of_cost():
    rng = np.random.default_rng(0)
    quality, costs = rng.random((300, 6)), rng.random((300, 6))
    curve = curves.sweep(quality, costs, None, quality, costs)
    steps = -np.diff(curve.mean_cost)
    assert len(curve.cost_weights) > 150
    assert steps[1:-1].max() < 4 * np.median(steps)
    np.testing.assert_allclose(curve.mean_cost[-1], costs.min(axis=1).mean())
    utility = (curve.scores - curve.cost_weights[:, None] * curve.costs).sum(axis=1)
    everyone = (quality[None] - curve.cost_weights[:, None, None] * costs[None]).max(axis=2).sum(axis=1)
    np.testing.assert_allclose(utility, everyone)


def test_where_no_cost_weight_changes_a_choice_there_is_one_point():
    same = np.ones((3, 2))
    assert curves.cost_weight_grid(QUALITY, same).tolist() == [0]


def test_only_eligible_experts_are_swept():
    eligible = np.array([[False, True]] * 3)
    curve = curves.sweep(QUALITY, COSTS, eligible, SCORES, COSTS)
    assert set(curve.mean_cost.tolist()) == {3.0}


def test_the_hull_by_hand():
    costs, accuracy = curves.hull([1, 2, 3, 4, 5, 2], [0.2, 0.6, 0.7, 0.9, 0.8, 0.1])
    # (3, .7) lies under the line from (2, .6) to (4, .9); (5, .8) is dearer and worse
    assert costs.tolist() == [1, 2, 4]
    assert accuracy.tolist() == [0.2, 0.6, 0.9]


def test_aiq_by_hand():
    # from 1 to 3: the line .2 -> .6 (mean .4), then .6 -> .75 (mean .675)
    assert curves.aiq([1, 2, 4], [0.2, 0.6, 0.9], 1, 3) == pytest.approx((0.4 + 0.675) / 2)
    # right of the hull accuracy stays: .9 over 4 .. 6
    assert curves.aiq([1, 2, 4], [0.2, 0.6, 0.9], 4, 6) == pytest.approx(0.9)
    # left of it, the line to (0, 0): from 0.5 to 1 it runs .1 -> .2
    assert curves.aiq([1, 2, 4], [0.2, 0.6, 0.9], 0.5, 1) == pytest.approx(0.15)
    assert curves.aiq([0, 2], [0.2, 0.6], 0, 2) == pytest.approx(0.4)
    assert curves.aiq([1], [0.5], 1, 1) is None


def test_the_band_is_that_of_the_normal_law():
    scores = (np.random.default_rng(0).random((2, 2000)) < [[0.8], [0.5]]).astype(float)
    low, high = curves.band(curves.Sweep(np.array([0.0, 1.0]), scores, scores), seed=3)
    width = 1.96 * scores.std(axis=1) / np.sqrt(2000)
    np.testing.assert_allclose(high - scores.mean(axis=1), width, rtol=0.1)
    np.testing.assert_allclose(scores.mean(axis=1) - low, width, rtol=0.1)
