"""Baselines: what they choose, and that they survive saving."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from planted_outcomes import planted_table

from routers.base import Query, RouterState
from routers.decision import Utility, decide
from routers.errors import InvalidArtifact, InvalidSettings, RouterError
from routers.kinds.baselines import BestSingleRouter, FixedRouter, RandomRouter

TRAIN = planted_table(200)
QUERIES = [Query.of(prompt) for prompt in planted_table(400, seed=1).prompts]


def saved_and_loaded(router):
    state = router.state()
    settings = json.loads(json.dumps(state.settings, allow_nan=False))
    return type(router).from_state(RouterState(dict(state.arrays), settings), None)


@pytest.mark.parametrize("router", [BestSingleRouter(), FixedRouter(expert="law-expert"), RandomRouter(seed=5)])
def test_a_saved_baseline_decides_identically(router):
    router.fit(TRAIN)
    assert decide(saved_and_loaded(router).estimate(QUERIES[:20])) == decide(router.estimate(QUERIES[:20]))
    no_costs = type(router)(**asdict(router.settings)).fit(planted_table(20, costs=False))
    assert saved_and_loaded(no_costs).estimate(QUERIES[:1]).cost_usd is None


def test_best_single_is_the_best_of_the_training_table_and_obeys_the_cost_weight():
    router = BestSingleRouter().fit(TRAIN)
    best = TRAIN.experts[TRAIN.scores.mean(axis=0).argmax()]
    assert best == "generalist"
    decisions = decide(router.estimate(QUERIES))
    assert {d.experts for d in decisions} == {(best,)}
    assert decisions[0].confidence == pytest.approx(TRAIN.scores[:, -1].mean())
    assert decide(router.estimate(QUERIES[:1]), utility=Utility(cost_weight=1000.0))[0].experts == ("cooking-expert",)


def test_fixed_asks_one_expert_whatever_the_cost_weight():
    router = FixedRouter(expert="music-expert").fit(TRAIN)
    assert {d.experts for d in decide(router.estimate(QUERIES), utility=Utility(cost_weight=9.0), k=3)} == {
        ("music-expert",)
    }
    with pytest.raises(InvalidSettings, match="'nobody' is not in the table"):
        FixedRouter(expert="nobody").fit(TRAIN)


def test_random_spreads_evenly_and_repeats_itself():
    router = RandomRouter(seed=1).fit(TRAIN)
    first = [d.experts[0] for d in decide(router.estimate(QUERIES))]
    assert first == [d.experts[0] for d in decide(router.estimate(QUERIES[::-1]))][::-1]
    assert min(Counter(first).values()) > 0.12 * len(QUERIES)
    assert first != [d.experts[0] for d in decide(RandomRouter(seed=2).fit(TRAIN).estimate(QUERIES))]
    few = Counter(d.experts[0] for d in decide(router.estimate(QUERIES), allowed=["law-expert", "generalist"]))
    assert min(few.values()) > 0.35 * len(QUERIES)
    assert decide(router.estimate(QUERIES[:1]))[0].confidence == pytest.approx(TRAIN.scores.mean())


@pytest.mark.parametrize("router", [BestSingleRouter(), FixedRouter(expert="a"), RandomRouter()])
def test_no_queries_and_no_training(router):
    with pytest.raises(RouterError, match=f"this {router.kind} router is not trained"):
        router.estimate(QUERIES[:1])
    with pytest.raises(RouterError, match="not trained"):
        router.state()
    trained = RandomRouter().fit(TRAIN)
    assert len(trained.estimate([])) == 0
    with pytest.raises(InvalidArtifact, match="lacks 'scores'"):
        RandomRouter.from_state(RouterState({}, trained.state().settings))
    assert np.isfinite(trained.estimate([Query.of("\ud800")]).quality).all()  # a lone surrogate is valid input
