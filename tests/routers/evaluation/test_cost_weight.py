from functools import partial

import numpy as np
import pytest
from planted_outcomes import planted_table

from routers.base import Estimate, RouterState
from routers.encoders.build import HashingEncoder
from routers.errors import InvalidOutcomes, InvalidSettings, RouterError
from routers.evaluation.cost_weight import MeetBudget, SaveCost, inner_routings, out_of_fold, solve, solve_on
from routers.evaluation.cross_validation import cross_validate, stratified_folds
from routers.evaluation.curves import Sweep
from routers.factory import build

ENCODER = HashingEncoder(128)
CURVE = Sweep(
    cost_weights=np.array([0.0, 1.0, 2.0]),
    scores=np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=float),
    costs=np.array([[4, 4, 4, 4], [2, 2, 2, 2], [1, 1, 1, 1]], dtype=float),
)
BEST = np.array([1, 1, 0, 0], dtype=float), np.full(4, 5.0)


def test_a_budget_takes_the_most_accurate_cost_weight_within_it():
    found = solve(CURVE, MeetBudget(2.5), *BEST)
    assert (found.cost_weight, found.accuracy, found.mean_cost, found.met) == (1.0, 0.5, 2.0, True)
    assert solve(CURVE, MeetBudget(9), *BEST).cost_weight == 0.0
    short = solve(CURVE, MeetBudget(0.5), *BEST)
    assert (short.cost_weight, short.met) == (2.0, False)


def test_a_saving_takes_the_cheapest_cost_weight_that_is_no_worse():
    found = solve(CURVE, SaveCost(margin=0), *BEST)
    assert (found.cost_weight, found.accuracy, found.mean_cost, found.met) == (1.0, 0.5, 2.0, True)
    assert (found.best_single, found.best_single_cost) == (0.5, 5.0)


def test_the_margin_counts_standard_errors():
    single = np.array([1, 0, 0, 0], dtype=float), np.full(4, 5.0)
    # gains (0, 1, 1, 0) at weight 0: mean .5, standard error .25; (0, 1, 0, 0) at weight 1: .25, .2165; none at 2
    assert solve(CURVE, SaveCost(margin=1.0), *single).cost_weight == 2.0  # no gain, with certainty
    dear = Sweep(CURVE.cost_weights[:2], CURVE.scores[:2], CURVE.costs[:2])
    assert solve(dear, SaveCost(margin=1.15), *single).cost_weight == 1.0
    assert solve(dear, SaveCost(margin=1.16), *single).cost_weight == 0.0
    beyond = solve(dear, SaveCost(margin=2.01), *single)
    assert (beyond.cost_weight, beyond.met) == (0.0, False)


def test_where_nothing_reaches_the_best_single_expert_accuracy_comes_first():
    found = solve(CURVE, SaveCost(0), np.ones(4), np.full(4, 5.0))
    assert (found.cost_weight, found.met) == (0.0, False)


@pytest.mark.parametrize("make", [lambda: MeetBudget(0), lambda: MeetBudget(float("nan")), lambda: SaveCost(np.inf)])
def test_targets_that_make_no_sense(make):
    with pytest.raises(InvalidSettings):
        make()


class Remembers:
    """Remembers its training rows and refuses to route one of them."""

    kind = "remembers"
    requires = frozenset()
    fits = 0

    def fit(self, table):
        Remembers.fits += 1
        self.experts, self.seen = table.experts, frozenset(table.prompts)
        return self

    def state(self):
        return RouterState({}, {})

    def estimate(self, queries):
        assert not {query.text for query in queries} & self.seen
        number = np.array([[float(query.text.split()[-1])] for query in queries])
        return Estimate(self.experts, np.tile(number, (1, len(self.experts))) / 1e3)


def test_rows_are_routed_by_routers_that_have_not_seen_them_and_stay_in_order():
    table = planted_table(30)
    folds = np.random.default_rng(0).integers(3, size=30)
    routing = out_of_fold(Remembers, table, folds)
    np.testing.assert_allclose(routing.quality[:, 0], np.arange(30) / 1e3)


def test_inner_folds_leave_the_outer_one_out():
    table = planted_table(40)
    folds = np.random.default_rng(0).integers(4, size=40)
    Remembers.fits = 0
    seen = []
    for fold, train, routing in inner_routings(Remembers, table, folds):
        seen.append(fold)
        assert train.query_ids == table.select(folds != fold).query_ids
        np.testing.assert_allclose(routing.quality[:, 0], np.flatnonzero(folds != fold) / 1e3)
    assert seen == [0, 1, 2, 3]
    assert Remembers.fits == 6  # one per pair of folds


def test_solving_needs_costs():
    table = planted_table(40, costs=False)
    routing = out_of_fold(Remembers, table, np.arange(40) % 2)
    with pytest.raises(RouterError, match="the table has none: add"):
        solve_on(routing, table, SaveCost())
    with pytest.raises(RouterError, match="this kind of router predicts none"):
        solve_on(routing, planted_table(40), SaveCost())


def test_cross_validation_solves_a_cost_weight_for_each_fold_on_the_others():
    table = planted_table(400, good=0.95)
    folds = stratified_folds(table.domains, 4)
    make = partial(build, "knn", ENCODER, {"k": 15})
    free = cross_validate(make, table, folds)
    report = cross_validate(make, table, folds, target=MeetBudget(2e-3))
    assert len(report.cost_weights) == len(report.target["folds"]) == 4
    assert report.target["name"] == "budget"
    assert all(fold["mean_cost"] <= 2e-3 for fold in report.target["folds"])
    assert report.mean_cost == pytest.approx(2e-3, rel=0.1) and report.mean_cost < free.mean_cost
    saved = cross_validate(make, table, folds, target=SaveCost(1))
    assert saved.accuracy >= saved.best_single
    assert saved.cost_saved > 0.2
    assert saved.cost_saved_ci95_low < saved.cost_saved < saved.cost_saved_ci95_high


def test_the_solved_cost_weight_of_a_fold_does_not_depend_on_its_own_rows():
    table = planted_table(200)
    folds = stratified_folds(table.domains, 4)
    make = partial(build, "knn", ENCODER, {"k": 15})
    scores = table.scores.copy()
    scores[folds == 0] = 1 - scores[folds == 0]
    changed = type(table)(table.query_ids, table.prompts, table.experts, scores, table.costs_usd)
    one, other = (cross_validate(make, t, folds, target=SaveCost(0)).cost_weights for t in (table, changed))
    assert one[0] == other[0]
    assert one[1:] != other[1:]


def test_two_folds_leave_nothing_to_solve_on():
    table = planted_table(40)
    with pytest.raises(InvalidOutcomes, match="at least three folds to solve a cost weight"):
        cross_validate(partial(build, "best-single"), table, np.arange(40) % 2, target=SaveCost())
