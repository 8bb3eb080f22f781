import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from planted_outcomes import planted_table

from routers.base import Estimate, RouterState
from routers.decision import Utility
from routers.encoders.build import CachedEncoder, HashingEncoder
from routers.errors import BaselineLeftOut, EvaluatingOnTrainingData, InvalidOutcomes, RouterError
from routers.evaluation import metrics
from routers.evaluation.cost_weight import MeetBudget
from routers.evaluation.cross_validation import (
    cross_validate,
    cross_validate_all,
    evaluate,
    standard_baselines,
    stratified_folds,
)
from routers.evaluation.recorded_routing import Choosing, Composed
from routers.factory import build
from routers.outcomes.reference import Reference
from routers.outcomes.table import OutcomeTable
from routers.selectors import TopK

ENCODER = HashingEncoder(128)
KEYS = (
    "router kind n_queries n_experts accuracy best_single dataset_oracle oracle gain_over_best_single gain_ci95_low "
    "gain_ci95_high gap_recovered mean_cost best_single_cost route_ms_p50 baselines"
).split()
MORE_KEYS = (
    "baseline_costs cost_saved cost_saved_ci95_low cost_saved_ci95_high perf_gain aiq aiq_experts c_min c_max ece apgr "
    "cpt50 cpt80 cost_weights target top_k composition calls abstained truncated refused expert_use by_domain "
    "consistency consistency_whole consistency_by_variant"
).split()


class Scripted:
    """Routes each prompt to the expert that it names; unsure if the prompt asks for that. Records its training rows."""

    kind = "scripted"
    requires = frozenset()

    def __init__(self, experts=("a", "b")):
        self.experts = experts
        self.shown = []

    def fit(self, table):
        return self

    def state(self):
        return RouterState({}, {})

    def estimate(self, queries):
        self.shown += queries
        quality = np.array([[0.5 + 0.25 * (name in query.text.split()) for name in self.experts] for query in queries])
        return Estimate(self.experts, quality, abstained=np.array(["unsure" in query.text for query in queries]))


def hand_table(**changes):
    arguments = {
        "query_ids": ("1", "2", "3", "4"),
        "prompts": ("to a", "to b", "to a", "to b unsure"),
        "experts": ("a", "b"),
        "scores": np.array([[1, 0], [0, 1], [0, 1], [1, 0.5]]),
        "costs_usd": np.array([[1, 10], [1, 10], [2, 20], [2, 20]]),
        "domains": ("x", "x", "y", "y"),
    }
    return OutcomeTable(**{**arguments, **changes})


def hand_reference():
    return Reference.of(hand_table(query_ids=("7", "8", "9", "10"), scores=[[0, 1], [0, 1], [1, 0], [0.5, 0]]))


def test_every_figure_by_hand():
    ticks = itertools.count()  # a second passes between readings
    report = evaluate(
        Scripted(), hand_table(), name="mine", reference=hand_reference(), clock=lambda: float(next(ticks))
    )
    assert (report.router, report.kind, report.n_queries, report.n_experts) == ("mine", "scripted", 4, 2)
    assert report.accuracy == (1 + 1 + 0 + 0.5) / 4
    assert report.best_single == (0 + 1 + 1 + 0.5) / 4  # b had 0.5 in training, a 0.375
    assert report.dataset_oracle == (0 + 1 + 0 + 1) / 4  # b in x, a in y
    assert report.oracle == 1
    assert report.gain_over_best_single == 0
    assert report.gain_ci95_low < 0 < report.gain_ci95_high
    assert report.gap_recovered == 0
    assert report.mean_cost == (1 + 10 + 2 + 20) / 4
    assert report.best_single_cost == 15
    assert report.route_ms_p50 == 1000
    assert report.baselines == {"random": 0.5625, "best_single": 0.625, "dataset_oracle": 0.5, "oracle": 1.0}
    assert report.baseline_costs == {"random": 8.25, "best_single": 15, "dataset_oracle": 6, "oracle": 8.25}
    assert report.expert_use == {"a": 0.5, "b": 0.5}
    assert report.abstained == 0.25
    assert report.ece == pytest.approx(0.125)  # expects 0.75, scores 0.625
    assert report.cost_saved == pytest.approx(1 - 8.25 / 15)
    assert report.cost_saved_ci95_low < report.cost_saved < report.cost_saved_ci95_high
    assert report.perf_gain == 0
    assert (report.c_min, report.c_max) == (1.5, 15)
    assert report.aiq is None  # the router predicts no costs
    assert report.aiq_experts == pytest.approx((0.5 + 0.625) / 2)  # from a (1.5, .5) to b (15, .625)
    assert report.apgr == pytest.approx(0.75)  # gains 1 - .5 where b is called, then 0: PGR 0, .5, 1, 1, 1
    assert (report.cost_weights, report.target, report.top_k, report.composition, report.calls) == (
        (0,),
        None,
        1,
        "single",
        1,
    )
    assert report.by_domain["y"] == {
        "n_queries": 2, "accuracy": 0.25, "best_single": 0.75, "mean_cost": 11, "expert_use": {"a": 0.5, "b": 0.5},
    }  # fmt: skip
    assert list(report.to_json()) == KEYS + MORE_KEYS


def test_the_router_is_shown_prompts_only():
    router = Scripted()
    evaluate(router, hand_table())
    assert {query.text for query in router.shown} == set(hand_table().prompts)
    assert all(query.id is None and not query.features and query.allowed is None for query in router.shown)


def test_what_is_not_known_is_none():
    report = evaluate(Scripted(), hand_table(costs_usd=None, domains=None))
    document = report.to_json()
    unknown = {name for name, value in document.items() if value is None}
    assert unknown == {
        "best_single", "dataset_oracle", "gain_over_best_single", "gain_ci95_low", "gain_ci95_high", "gap_recovered",
        "mean_cost", "best_single_cost", "cost_saved", "cost_saved_ci95_low", "cost_saved_ci95_high", "perf_gain",
        "aiq", "aiq_experts", "c_min", "c_max", "target", "by_domain", "consistency", "consistency_whole",
        "consistency_by_variant",
    }  # fmt: skip
    assert set(report.baselines) == {"random", "oracle"}
    assert report.baseline_costs == {"random": None, "oracle": None}


def test_without_domains_there_is_a_best_single_expert_but_no_dataset_oracle():
    report = evaluate(Scripted(), hand_table(domains=None), reference=hand_reference())
    assert (report.best_single, report.dataset_oracle) == (0.625, None)


def test_costs_decide_with_a_cost_weight():
    table = planted_table(80)
    router = build("knn", ENCODER, {"k": 10}).fit(table)
    other = planted_table(80, seed=1)
    plain, thrifty = (evaluate(router, other, choosing=Choosing(Utility(cost_weight))) for cost_weight in (0, 1e6))
    assert thrifty.mean_cost == pytest.approx(1e-3)
    assert plain.mean_cost > 2e-3
    assert thrifty.expert_use == {"cooking-expert": 1.0}


class Refusing(Scripted):
    """Refuses queries that it is unsure of."""

    def estimate(self, queries):
        found = super().estimate(queries)
        return replace(found, eligible=np.repeat(~found.abstained[:, None], 2, axis=1), cost_usd=found.quality * 10)


def test_a_refused_query_scores_and_costs_nothing():
    report = evaluate(Refusing(), hand_table(), reference=hand_reference())
    assert report.accuracy == (1 + 1 + 0 + 0) / 4
    assert report.mean_cost == (1 + 10 + 2 + 0) / 4
    assert (report.refused, report.abstained, report.calls) == (0.25, 0.25, 0.75)
    assert report.expert_use == {"a": pytest.approx(2 / 3), "b": pytest.approx(1 / 3)}
    assert report.detail.curve.accuracy[0] == report.accuracy
    assert report.detail.curve.mean_cost[0] == report.mean_cost


def test_what_a_composition_comes_to():
    def cheapest_of_two(table, decisions):
        assert all(len(decision.experts) == 2 for decision in decisions)
        return Composed(table.scores[:, 0], table.costs_usd.sum(axis=1), np.full(len(table), 2.0))

    report = evaluate(
        Scripted(),
        hand_table(),
        reference=hand_reference(),
        choosing=Choosing(select=TopK(2), compose=cheapest_of_two, composition="x"),
    )
    assert report.accuracy == 0.5
    assert report.mean_cost == 16.5
    assert (report.top_k, report.composition, report.calls) == (2, "x", 2)
    assert report.by_domain["x"]["accuracy"] == 0.5
    assert report.aiq is None


def test_evaluating_on_training_rows_warns():
    table = planted_table(60)
    router = build("knn", ENCODER, {"k": 5}).fit(table)
    with pytest.warns(EvaluatingOnTrainingData, match="30 of 30 queries were trained on"):
        evaluate(router, table.select(np.arange(30)), reference=Reference.of(table))
    with pytest.warns(EvaluatingOnTrainingData, match="60 of 60"):
        evaluate(router, table, train_table=table)


def test_a_part_of_the_experts():
    train, test = planted_table(120), planted_table(80, seed=1)
    router = build("knn", ENCODER, {"k": 10}).fit(train)
    pool = ("generalist", "law-expert")
    report = evaluate(router, test, train_table=train, experts=pool)
    assert report.n_experts == 2
    assert set(report.expert_use) <= set(pool)
    assert report.oracle == test.with_experts(pool).scores.max(axis=1).mean()
    with pytest.raises(RouterError, match="was not trained on chess-expert; its experts are: cooking-expert"):
        evaluate(router, test, experts=["chess-expert"])
    with pytest.raises(InvalidOutcomes, match="no expert 'cooking-expert' in the table"):
        evaluate(router, test.with_experts(pool))


def test_baselines_are_trained_on_the_training_table():
    train, test = planted_table(200), planted_table(100, seed=1)
    router = build("best-single").fit(train)
    baselines = {"knn": partial(build, "knn", ENCODER, {"k": 15})}
    report = evaluate(router, test, train_table=train, baselines=baselines)
    knn = evaluate(baselines["knn"]().fit(train), test)
    assert report.baselines["knn"] == knn.accuracy > report.accuracy == report.best_single
    with pytest.raises(RouterError, match="give train_table"):
        evaluate(router, test, baselines=baselines)


def test_routers_that_need_features_are_refused():
    router = Scripted()
    router.requires = frozenset({"entropy"})
    with pytest.raises(RouterError, match="the table has no features entropy, which this router requires"):
        evaluate(router, hand_table())


def test_time_is_measured_without_the_cache(tmp_path):
    class Counting(HashingEncoder):
        calls = 0

        def encode(self, texts):
            self.calls += 1
            return super().encode(texts)

    inner, table = Counting(32), planted_table(60)
    cached = CachedEncoder(inner, tmp_path)
    cached.encode(table.prompts)
    router = build("knn", cached, {"k": 5}).fit(table)
    inner.calls = 0
    assert evaluate(router, table).route_ms_p50 > 0
    assert inner.calls == 22


def test_cross_validation_pools_what_each_fold_scores():
    table = planted_table(150)
    folds = stratified_folds(table.domains, 3)
    report = cross_validate(partial(build, "best-single"), table, folds)
    expected = []
    for fold in range(3):
        train, test = table.select(folds != fold), table.select(folds == fold)
        expected += list(test.scores[:, metrics.best_single(train.scores.mean(axis=0))])
    assert report.accuracy == pytest.approx(np.mean(expected))
    assert report.best_single == report.accuracy
    assert report.gain_over_best_single == 0
    assert (report.n_queries, report.n_experts) == (150, 5)
    assert report.baselines["random"] == pytest.approx(table.scores.mean())


def test_baselines_that_cannot_be_trained_are_left_out_with_a_warning():
    table = planted_table(90)
    make, folds = partial(build, "knn", ENCODER, {"k": 10}), stratified_folds(table.domains, 3)
    baselines = standard_baselines(ENCODER) | {"knn": partial(build, "knn", ENCODER, {"k": 100}), "mine": make}
    with pytest.warns(BaselineLeftOut, match="the baseline knn is left out: k=100 neighbours asked of 60"):
        report = cross_validate(make, table, folds, baselines=baselines)
    assert "knn" not in report.baselines
    assert report.baselines["mine"] == report.accuracy
    assert report.baselines["category"] > report.best_single
    assert standard_baselines(None) == {}


def test_several_routers_share_their_baselines():
    fits = []

    class Counting(Scripted):
        def fit(self, table):
            fits.append(len(table))
            return self

    reports = cross_validate_all({"one": Counting, "two": Scripted}, hand_table(), np.array([0, 0, 1, 1]),
                                 baselines={"one": Counting, "other": Scripted})  # fmt: skip
    assert [report.router for report in reports] == ["one", "two"]
    assert fits == [2, 2]
    assert reports[0].baselines == reports[1].baselines
    assert {"one", "other"} < set(reports[0].baselines)


@pytest.mark.parametrize(("target", "trainings"), [(None, 3 + 3), (MeetBudget(1e-3), 3 + 3 + 3 + 3)])
def test_progress_counts_every_training(target, trainings):
    table, told = planted_table(90), []
    make = partial(build, "best-single")
    cross_validate_all({"one": make}, table, stratified_folds(table.domains, 3), target=target,
                       baselines={"one": make, "other": partial(build, "random")},
                       on_progress=lambda *counts: told.append(counts))  # fmt: skip
    assert told == [(done, trainings) for done in range(trainings + 1)]


def test_cross_validation_finds_the_planted_topics():
    table = planted_table(240)
    report = cross_validate(
        partial(build, "category", ENCODER), table, stratified_folds(table.domains), name="mine",
        baselines={"knn": partial(build, "knn", ENCODER, {"k": 15})},
    )  # fmt: skip
    assert report.router == "mine"
    assert report.gain_ci95_low > 0
    assert report.best_single < report.accuracy <= report.oracle
    assert report.accuracy == pytest.approx(report.dataset_oracle, abs=0.03)
    assert report.best_single < report.baselines["knn"] < report.oracle


def test_a_router_never_sees_a_row_of_the_fold_it_is_scored_on():
    class Spy(Scripted):
        def fit(self, table):
            self.fitted = set(table.prompts)
            return self

        def estimate(self, queries):
            assert not self.fitted & {query.text for query in queries}
            return super().estimate(queries)

    table = hand_table(prompts=("a 1", "b 2", "a 3", "b 4"))
    assert cross_validate(Spy, table, np.array([0, 1, 0, 1])).n_queries == 4


@pytest.mark.parametrize("folds", [np.zeros(4, dtype=np.int64), np.arange(3)])
def test_folds_must_divide_the_rows(folds):
    with pytest.raises(InvalidOutcomes, match="at least two folds, and one fold number for each of the 4 rows"):
        cross_validate(Scripted, hand_table(), folds)


def test_drawn_folds_are_even_stratified_and_seeded():
    labels = ["a"] * 50 + ["b"] * 23 + ["c"] * 4
    folds = stratified_folds(labels, 5, seed=1)
    counts = np.array([[np.sum((folds == f) & (np.array(labels) == label)) for f in range(5)] for label in "abc"])
    assert np.ptp(counts, axis=1).max() <= 1
    assert np.ptp(counts.sum(axis=0)) <= 1
    np.testing.assert_array_equal(folds, stratified_folds(labels, 5, seed=1))
    assert (folds != stratified_folds(labels, 5, seed=2)).any()


@pytest.mark.parametrize("n_folds", [1, 5])
def test_folds_that_cannot_be(n_folds):
    with pytest.raises(InvalidOutcomes, match=f"4 rows cannot be split into {n_folds} folds"):
        stratified_folds("abcd", n_folds)


def test_references_survive_json_and_restriction():
    reference = hand_reference()
    again = Reference.from_json(reference.to_json(), reference.ids).with_experts(["b"])
    assert again.experts == ("b",)
    np.testing.assert_array_equal(again.mean_scores, [0.5])
    np.testing.assert_array_equal(again.by_domain["x"], [1.0])
    assert again.seen(["7", "1"]).tolist() == [True, False]
    assert Reference.of(hand_table(domains=None)).by_domain == {}
