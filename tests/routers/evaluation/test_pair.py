import numpy as np
import pytest

from routers.evaluation.pair import pair_curve

STRONG, WEAK = np.array([1.0, 1, 1, 0]), np.array([0.0, 1, 1, 0])


def test_the_curve_by_hand():
    # the one query that gains is called first: PGR is 1 from r = 1/4 on
    curve = pair_curve([0.9, 0.2, 0.1, 0.0], STRONG, WEAK)
    assert curve.pgr.tolist() == [0, 1, 1, 1, 1]
    assert curve.apgr == pytest.approx(1 - 0.5 * 0.25)
    assert curve.cpt(0.5) == pytest.approx(0.125)
    assert curve.cpt(0.8) == pytest.approx(0.2)
    assert curve.cpt(0.0) == 0


def test_the_worst_order_gains_last():
    curve = pair_curve([0.0, 0.2, 0.1, 0.9], STRONG, WEAK)
    assert curve.apgr == pytest.approx(0.125)
    assert curve.cpt(0.5) == pytest.approx(0.875)


def test_a_router_that_knows_nothing_is_random():
    curve = pair_curve(np.zeros(4), STRONG, WEAK)
    np.testing.assert_allclose(curve.pgr, [0, 0.25, 0.5, 0.75, 1])
    assert (curve.apgr, curve.cpt(0.5), curve.cpt(0.8)) == pytest.approx((0.5, 0.5, 0.8))


def test_strong_calls_may_lose_on_the_way():
    curve = pair_curve([3, 2, 1], [0.0, 1, 1], [1.0, 0, 0])
    np.testing.assert_allclose(curve.pgr, [0, -1, 0, 1])
    assert curve.cpt(0.5) == pytest.approx(5 / 6)


def test_without_a_gap_there_is_no_curve():
    assert pair_curve([1, 2], [0.0, 1], [1.0, 0]) is None
