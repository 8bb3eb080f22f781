"""The category map against brute force, and the properties of a budget."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routers.errors import RouterError
from routers.kinds.category import mapping
from routers.kinds.category.mapping import Budget, map_categories

KINDS = ("cumulative", "average-active")


def random_instance(rng: np.random.Generator):
    m, k = int(rng.integers(1, 7)), int(rng.integers(1, 6))
    shares = rng.dirichlet(np.ones(m)) + 1e-3
    scores = rng.random((m, k)).round(int(rng.integers(1, 4)))  # coarse rounding makes ties
    footprints = rng.integers(0, 20, k) * 1e9
    return shares / shares.sum(), scores, footprints


def brute_force(shares, scores, footprints, budget):
    """The best value within the budget, over all K^M maps."""
    rows = np.arange(len(shares))
    values = [
        shares @ scores[rows, choice]
        for choice in map(np.array, product(range(len(footprints)), repeat=len(shares)))
        if budget.used(choice, shares, footprints) <= budget.limit * (1 + 1e-9)
    ]
    return max(values, default=None)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), fraction=st.floats(0, 1.2))
def test_the_map_is_as_good_as_the_best_of_all_maps(seed, kind, fraction):
    shares, scores, footprints = random_instance(np.random.default_rng(seed))
    total = footprints.sum() if kind == "cumulative" else footprints.max()
    budget = Budget(fraction * total, kind)
    best = brute_force(shares, scores, footprints, budget)
    if best is None:
        with pytest.raises(RouterError, match=re.escape(f"smallest that can be met is {footprints.min():g}")):
            map_categories(shares, scores, footprints, budget)
        return
    choice = map_categories(shares, scores, footprints, budget)
    assert budget.used(choice, shares, footprints) <= budget.limit * (1 + 1e-9)
    assert shares @ scores[np.arange(len(shares)), choice] == pytest.approx(best, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_quality_grows_with_the_budget_up_to_the_argmax(kind):
    for seed in range(8):
        shares, scores, footprints = random_instance(np.random.default_rng(seed))
        low, high = footprints.min(), footprints.sum()
        rows = np.arange(len(shares))
        values = [
            shares @ scores[rows, map_categories(shares, scores, footprints, Budget(b, kind))]
            for b in np.linspace(low, high, 7)
        ]
        assert (np.diff(values) >= -1e-9).all()
        assert values[-1] == pytest.approx(shares @ scores.max(axis=1))


@pytest.mark.parametrize("budget", [None, Budget(np.inf), Budget(np.inf, "cumulative")])
def test_without_a_limit_each_category_takes_its_best_expert(budget):
    scores = np.array([[0.2, 0.9, 0.5], [0.8, 0.1, 0.3]])
    assert map_categories([0.5, 0.5], scores, [1, 2, 3], budget).tolist() == [1, 0]


def test_ties_go_to_the_cheaper_expert_then_to_the_first():
    scores = np.array([[0.5, 0.5, 0.5]])
    assert map_categories([1.0], scores, [3, 1, 1]).tolist() == [1]
    assert map_categories([1.0], scores).tolist() == [0]
    # Within a budget that binds: expert 0 is out of reach, 1 and 2 score alike.
    scores = np.array([[0.9, 0.5, 0.5], [0.1, 0.6, 0.6]])
    for kind in KINDS:
        assert map_categories([0.5, 0.5], scores, [10, 3, 2], Budget(4, kind)).tolist() == [2, 2]


def test_a_cumulative_budget_pays_for_an_expert_once_and_an_average_one_for_each_use():
    scores = np.array([[0.9, 0.5], [0.9, 0.5]])
    assert map_categories([0.5, 0.5], scores, [10, 1], Budget(10, "cumulative")).tolist() == [0, 0]
    shares = [0.25, 0.75]
    assert map_categories(shares, scores, [10, 1], Budget(4, "average-active")).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [[0.5]], None, Budget(3)), "a budget needs the footprint"),
        (([1.0], [[0.5, 0.4]], [4, 5], Budget(3)), "smallest that can be met is 4"),
        (([1.0], [[0.5]], [1, 2], None), "2 footprints for 1 experts"),
        (([1.0], [[0.5]], [-1], None), "finite and >= 0"),
        (([1.0, 0.0], [[0.5], [0.5]], None, None), "positive share"),
        (([1.0], [[np.nan]], None, None), "finite scores"),
        (([1.0, 1.0], [[0.5]], None, None), "expected"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(RouterError, match=message):
        map_categories(*arguments)


def test_a_budget_must_make_sense():
    with pytest.raises(RouterError, match="average-active"):
        Budget(1.0, "weekly")  # type: ignore[arg-type]
    for limit in (np.nan, -1.0):
        with pytest.raises(RouterError, match="a number >= 0"):
            Budget(limit)


def test_a_failing_solver_is_reported(monkeypatch):
    def no_answer(*args, **kwargs):
        class Result:
            x, message = None, "time limit"

        return Result()

    monkeypatch.setattr("scipy.optimize.milp", no_answer)
    with pytest.raises(RouterError, match="time limit"):
        map_categories([1.0], [[0.5, 0.9]], [1, 2], Budget(1))


def test_a_map_that_overspends_is_never_returned(monkeypatch):
    monkeypatch.setattr(mapping, "_milp", lambda objective, shape, rows: np.array([0.0, 1.0, 0.0, 1.0]))
    with pytest.raises(RouterError, match="found no map within"):
        map_categories([1.0], [[0.5, 0.9]], [1, 2], Budget(1))
