"""ClusterRouter: the numbers of a small example by hand, planted topics, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from planted_outcomes import OOD, planted_table

from routers.base import Query, RouterState
from routers.decision import Utility, decide
from routers.encoders.build import HashingEncoder
from routers.errors import InvalidArtifact, InvalidSettings, RouterError
from routers.kinds.cluster import ClusterRouter, quality_cost_mix, rank_scores
from routers.outcomes.table import OutcomeTable

ENCODER = HashingEncoder(256)
TRAIN, TEST = planted_table(240), planted_table(120, seed=1)
QUERIES = TEST.queries()


class Compass(HashingEncoder):
    """Two dimensions: a text is an angle in degrees."""

    def __init__(self):
        super().__init__(2)

    def encode(self, texts):
        angles = np.radians([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


SMALL = OutcomeTable(
    query_ids=list("abcde"),
    prompts=["-1", "0", "1", "89", "91"],
    experts=["north", "east", "both"],
    scores=[[0, 1, 0.9], [0, 1, 0.9], [0.3, 1, 0.9], [1, 0, 0.9], [1, 0.5, 0.8]],
    costs_usd=[[1, 2, 4]] * 5,
)
"""Two clusters: at 0 degrees accuracies (0.1, 1, 0.9), at 90 degrees (1, 0.25, 0.85)."""


def small(**settings):
    return ClusterRouter(Compass(), **({"n_clusters": 2, "shrinkage": 0, "nearest": 2} | settings)).fit(SMALL)


def shares(degrees, beta=6.0):
    """Shares of the clusters at 0 and at 90 degrees."""
    weights = np.exp(-beta * (1 - np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])))
    return weights / weights.sum()


def test_quality_and_cost_are_expectations_over_the_nearest_clusters():
    estimate = small().estimate([Query.of("30"), Query.of("80")])
    accuracy = np.array([[0.1, 1, 0.9], [1, 0.25, 0.85]])
    for row, degrees in enumerate((30, 80)):
        assert estimate.quality[row] == pytest.approx(shares(degrees) @ accuracy, abs=1e-6)
    assert estimate.cost_usd == pytest.approx(np.array([[1, 2, 4]] * 2))
    assert estimate.eligible is None
    assert len(set(estimate.labels)) == 2
    alone = small(nearest=1).estimate([Query.of("30"), Query.of("80")])
    assert alone.quality == pytest.approx(accuracy)


def test_shrinkage_leans_small_clusters_towards_the_whole():
    quality = small(nearest=1, shrinkage=5).estimate([Query.of("0")]).quality[0]
    overall = SMALL.scores.mean(axis=0)
    assert quality == pytest.approx((3 * np.array([0.1, 1, 0.9]) + 5 * overall) / 8)


def test_the_rank_score_is_that_of_avengers():
    assert rank_scores(np.array([[0.1, 1, 0.9], [0.5, 0.5, 0.2]])) == pytest.approx(
        np.array([[1 / 2.1, 1 / 0.1, 1 / 1.1], [1 / 0.1, 1 / 0.1, 1 / 2.1]])
    )
    by_rank = shares(50) @ rank_scores(np.array([[0.1, 1, 0.9], [1, 0.25, 0.85]]))
    estimate = small(score="rank").estimate([Query.of("50")])
    assert estimate.eligible.tolist() == [(by_rank == by_rank.max()).tolist()]
    # By rank one of the specialists wins, by quality the expert that is good at both.
    assert decide(estimate)[0].experts == ("north",)
    assert decide(small().estimate([Query.of("50")]))[0].experts == ("both",)
    assert estimate.quality == pytest.approx(small().estimate([Query.of("50")]).quality)


def test_top_n_is_how_many_the_rank_score_lets_answer():
    estimate = small(score="rank", top_n=2).estimate([Query.of("50")])
    assert set(decide(estimate, k=3)[0].experts) == {"north", "east"}
    assert len(decide(small(score="rank", top_n=9).estimate([Query.of("50")]), k=3)[0].experts) == 3
    assert decide(small().estimate([Query.of("1")]), k=3)[0].experts == ("east", "both", "north")


def test_the_mix_weighs_quality_against_cost_in_each_cluster():
    accuracy, costs = np.array([[0.1, 1.0, 0.9], [0.5, 0.5, 0.5]]), np.array([[1.0, 2, 4], [0, 0, 0]])
    expected = [0.6 * 0 + 0.4 * 0.75, 0.6 * 1 + 0.4 * 0.5, 0.6 * (0.8 / 0.9) + 0.4 * 0]
    assert quality_cost_mix(accuracy, costs, 0.4)[0] == pytest.approx(expected)
    assert quality_cost_mix(accuracy, costs, 0.4)[1] == pytest.approx([1, 1, 1])  # all alike, all free
    dear, cheap = small(score="mix", cost_weight=0.0), small(score="mix", cost_weight=1.0)
    assert decide(dear.estimate([Query.of("1")]))[0].experts == ("east",)
    assert decide(cheap.estimate([Query.of("1")]))[0].experts == ("north",)


def test_a_cost_weight_trades_the_quality_for_cost():
    estimate = small(nearest=1).estimate([Query.of("0")])  # qualities 0.1, 1, 0.9 at 1, 2, 4 USD
    assert decide(estimate)[0].experts == ("east",)
    assert decide(estimate, utility=Utility(cost_weight=2.0))[0].experts == ("north",)


@pytest.mark.parametrize("score", ["mean", "rank"])
def test_queries_go_to_the_expert_of_their_topic(score):
    router = ClusterRouter(ENCODER, n_clusters=12, score=score).fit(TRAIN)
    decisions = decide(router.estimate(QUERIES))
    right = [d.experts[0] == f"{topic}-expert" for d, topic in zip(decisions, TEST.domains, strict=True)]
    assert np.mean(right) >= 0.9
    assert router.estimate([Query.of(text) for text in OOD]).ood.min() >= 0.9
    believed = np.mean([decision.confidence for decision in decisions])
    plain = ClusterRouter(ENCODER, n_clusters=12, nearest=1, shrinkage=0, score=score).fit(TRAIN)
    sure = np.mean([decision.confidence for decision in decide(plain.estimate(QUERIES))])
    assert believed < sure == pytest.approx(0.9, abs=0.1)


def test_queries_alone_and_together_and_after_saving_are_estimated_alike():
    router = ClusterRouter(ENCODER, n_clusters=12, score="mix").fit(TRAIN)
    state = router.state()
    state = RouterState(dict(state.arrays), json.loads(json.dumps(state.settings, allow_nan=False)))
    before, after = router.estimate(QUERIES), ClusterRouter.from_state(state, ENCODER).estimate(QUERIES)
    for name in ("quality", "cost_usd", "ood", "eligible"):
        assert np.array_equal(getattr(before, name), getattr(after, name))
    single = np.vstack([router.estimate([query]).quality for query in QUERIES])
    assert single == pytest.approx(before.quality, abs=1e-6)
    assert len(router.estimate([])) == 0


def test_training_twice_gives_the_same_router():
    first, second = (ClusterRouter(ENCODER, n_clusters=8, seed=2).fit(TRAIN).state() for _ in range(2))
    assert all(np.array_equal(first.arrays[name], second.arrays[name]) for name in first.arrays)


def test_prompts_that_are_all_alike_are_one_cluster():
    table = replace(TRAIN, prompts=("the same",) * len(TRAIN))
    router = ClusterRouter(ENCODER).fit(table)
    assert router.state().arrays["centres"].shape == (1, 256)
    assert router.estimate(QUERIES[:2]).quality == pytest.approx(np.tile(table.scores.mean(axis=0), (2, 1)))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"n_clusters": 0}, "n_clusters must be at least 1"),
        ({"nearest": 0}, "nearest must be at least 1"),
        ({"top_n": 0}, "top_n must be at least 1"),
        ({"beta": -1.0}, "beta must be at least 0"),
        ({"shrinkage": np.inf}, "shrinkage must be finite"),
        ({"score": "best"}, "score must be one of mean, rank, mix"),
        ({"cost_weight": 1.5}, r"cost_weight must lie in \[0, 1\]"),
    ],
)
def test_settings_that_make_no_sense(settings, problem):
    with pytest.raises(InvalidSettings, match=problem):
        ClusterRouter(ENCODER, **settings)


def test_what_cannot_be_done_is_said():
    with pytest.raises(RouterError, match="64 clusters asked of 8 training queries: lower n_clusters"):
        ClusterRouter(ENCODER, n_clusters=64).fit(planted_table(8))
    with pytest.raises(RouterError, match="score 'mix' weighs quality against cost, but the table knows no costs"):
        ClusterRouter(ENCODER, score="mix").fit(planted_table(240, costs=False))
    with pytest.raises(RouterError, match="not trained"):
        ClusterRouter(ENCODER).estimate(QUERIES)
    state = ClusterRouter(ENCODER, n_clusters=3).fit(TRAIN).state()
    with pytest.raises(InvalidArtifact, match="embeddings of 256 dimensions, but encoder hashing:64 gives 64"):
        ClusterRouter.from_state(state, HashingEncoder(64))
    with pytest.raises(InvalidArtifact, match="lacks 'centres'"):
        fewer = {name: array for name, array in state.arrays.items() if name != "centres"}
        ClusterRouter.from_state(RouterState(fewer, state.settings), ENCODER)
