"""kNN against brute force, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from planted_outcomes import OOD, planted_table

from routers.base import Query, RouterState
from routers.decision import decide
from routers.encoders.build import HashingEncoder
from routers.errors import InvalidArtifact, InvalidSettings, RouterError
from routers.kinds.knn import KNNRouter

ENCODER = HashingEncoder(256)
TRAIN, TEST = planted_table(240), planted_table(300, seed=1)
QUERIES = [Query.of(prompt) for prompt in TEST.prompts]


@pytest.mark.parametrize("weights", ["uniform", "distance"])
def test_estimates_equal_brute_force(weights):
    estimate = KNNRouter(ENCODER, k=7, weights=weights).fit(TRAIN).estimate(QUERIES)
    train, test = ENCODER.encode(TRAIN.prompts), ENCODER.encode(TEST.prompts)
    for i in range(len(TEST)):
        similarity = train @ test[i]
        nearest = np.argsort(-similarity, kind="stable")[:7]
        w = np.ones(7) if weights == "uniform" else 1 / np.maximum(1 - similarity[nearest], 1e-6)
        assert estimate.quality[i] == pytest.approx(np.average(TRAIN.scores[nearest], axis=0, weights=w), abs=1e-4)
        assert estimate.cost_usd[i] == pytest.approx(np.average(TRAIN.costs_usd[nearest], axis=0, weights=w), abs=1e-4)


def test_queries_go_to_the_expert_of_their_topic():
    decisions = decide(KNNRouter(ENCODER, k=30).fit(TRAIN).estimate(QUERIES))
    right = [d.experts[0] == f"{topic}-expert" for d, topic in zip(decisions, TEST.domains, strict=True)]
    assert np.mean(right) >= 0.95
    assert decisions[0].confidence == decisions[0].scores[0]


def test_out_of_distribution_prompts_score_high():
    router = KNNRouter(ENCODER, k=5).fit(TRAIN)
    assert router.estimate([Query.of(text) for text in OOD]).ood.min() >= 0.99
    assert router.estimate(QUERIES).ood.mean() < 0.8
    assert router.estimate([Query.of(TRAIN.prompts[0])]).ood[0] == 0.0


@pytest.mark.parametrize("costs", [True, False])
def test_a_saved_router_answers_identically_to_the_bit(costs):
    router = KNNRouter(ENCODER, k=9, weights="distance").fit(planted_table(60, costs=costs))
    state = router.state()
    state = RouterState(dict(state.arrays), json.loads(json.dumps(state.settings, allow_nan=False)))
    before, after = router.estimate(QUERIES), KNNRouter.from_state(state, ENCODER).estimate(QUERIES)
    assert np.array_equal(before.quality, after.quality)
    assert np.array_equal(before.ood, after.ood)
    assert (before.cost_usd is None) is (not costs)
    assert after.experts == before.experts


def test_small_tables_and_no_queries():
    router = KNNRouter(ENCODER, k=1).fit(planted_table(1, topics=("law",)))
    assert len(router.estimate([])) == 0
    assert router.estimate(QUERIES[:1]).quality.shape == (1, 2)


def test_what_makes_no_sense_is_said():
    with pytest.raises(InvalidSettings, match="k must be at least 1"):
        KNNRouter(ENCODER, k=0)
    with pytest.raises(InvalidSettings, match="weights must be one of uniform, distance, got 'gaussian'"):
        KNNRouter(ENCODER, weights="gaussian")
    with pytest.raises(RouterError, match="k=100 neighbours asked of 8 training queries"):
        KNNRouter(ENCODER, k=100).fit(planted_table(8))
    with pytest.raises(RouterError, match="not trained"):
        KNNRouter(ENCODER).estimate(QUERIES)
    assert KNNRouter(ENCODER).experts == ()


def test_a_state_that_does_not_fit_is_refused():
    state = KNNRouter(ENCODER, k=3).fit(TRAIN).state()
    with pytest.raises(InvalidArtifact, match="embeddings of 256 dimensions, but encoder hashing:64 gives 64"):
        KNNRouter.from_state(state, HashingEncoder(64))
    with pytest.raises(InvalidArtifact, match="lacks 'vectors'"):
        KNNRouter.from_state(
            RouterState({n: a for n, a in state.arrays.items() if n != "vectors"}, state.settings), ENCODER
        )


class BrokenEncoder(HashingEncoder):
    def __init__(self, value=np.nan, rows=None):
        super().__init__(8)
        self.value, self.rows = value, rows

    def encode(self, texts):
        vectors = super().encode(texts)
        vectors[min(2, len(vectors) - 1)] = self.value
        return vectors[: self.rows]


def test_embeddings_that_are_not_finite_or_of_another_shape_are_refused():
    with pytest.raises(RouterError, match="NaN or infinite embeddings for 1 of 240 texts, the first of them text 3"):
        KNNRouter(BrokenEncoder(), k=3).fit(TRAIN)
    with pytest.raises(RouterError, match=r"an array of shape \(5, 8\), expected \(240, 8\)"):
        KNNRouter(BrokenEncoder(1.0, rows=5), k=3).fit(TRAIN)
