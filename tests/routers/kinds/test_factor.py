"""FactorRouter: planted topics, calibration, and the pair of a strong and a weak expert."""

from __future__ import annotations

import json

import numpy as np
import pytest
from planted_outcomes import planted_table, prompt

from routers.base import Query, RouterState
from routers.decision import Utility, decide
from routers.encoders.build import HashingEncoder
from routers.errors import InvalidArtifact, InvalidOutcomes, InvalidSettings, RouterError
from routers.kinds.factor import FactorRouter, _pair_quality, _pair_targets
from routers.outcomes.table import OutcomeTable

ENCODER = HashingEncoder(256)
TRAIN, TEST = planted_table(400), planted_table(200, seed=1)
QUERIES = TEST.queries()
SETTINGS = {"rank": 8, "learning_rate": 0.01, "weight_decay": 0.1, "epochs": 40, "batch": 64}


def trained(table=TRAIN, **settings):
    return FactorRouter(ENCODER, **(SETTINGS | settings)).fit(table)


@pytest.fixture(scope="module")
def router():
    return trained()


def pair_table(n, seed, costs=True):
    """The strong expert is right in 9 of 10; the weak one as often in law, and in 2 of 10 elsewhere."""
    rng = np.random.default_rng(seed)
    topics = [("law", "music")[i % 2] for i in range(n)]
    p = np.array([[0.9 if topic == "law" else 0.2, 0.9] for topic in topics])
    return OutcomeTable(
        query_ids=[f"{seed}-{i}" for i in range(n)],
        prompts=[f"{prompt(topic, rng)} {i}" for i, topic in enumerate(topics)],
        experts=["weak", "strong"],
        scores=(rng.random(p.shape) < p).astype(float),
        costs_usd=np.tile([0.1, 1.0], (n, 1)) if costs else None,
        domains=topics,
    )


def test_queries_go_to_the_expert_of_their_topic_with_the_right_confidence(router):
    decisions = decide(router.estimate(QUERIES))
    right = [d.experts[0] == f"{topic}-expert" for d, topic in zip(decisions, TEST.domains, strict=True)]
    assert np.mean(right) >= 0.95
    assert np.mean([d.confidence for d in decisions]) == pytest.approx(0.9, abs=0.1)
    quality = router.estimate(QUERIES).quality
    assert quality.mean() == pytest.approx(TEST.scores.mean(), abs=0.06)
    assert quality[:, -1].mean() == pytest.approx(0.6, abs=0.1)
    assert len(decide(router.estimate(QUERIES[:1]), k=3)[0].experts) == 3


def test_costs_are_the_means_of_training(router):
    assert router.estimate(QUERIES[:2]).cost_usd == pytest.approx(np.tile(TRAIN.costs_usd.mean(axis=0), (2, 1)))
    assert trained(planted_table(40, costs=False), epochs=2).estimate(QUERIES[:2]).cost_usd is None


def test_queries_alone_and_together_and_after_saving_are_estimated_alike(router):
    state = router.state()
    state = RouterState(dict(state.arrays), json.loads(json.dumps(state.settings, allow_nan=False)))
    before, after = router.estimate(QUERIES), FactorRouter.from_state(state, ENCODER).estimate(QUERIES)
    assert np.array_equal(before.quality, after.quality)
    assert np.array_equal(before.cost_usd, after.cost_usd)
    single = np.vstack([router.estimate([query]).quality for query in QUERIES[:20]])
    assert single == pytest.approx(before.quality[:20], abs=1e-6)
    assert len(router.estimate([])) == 0


def test_training_twice_gives_the_same_router():
    first, second = (trained(epochs=3).state() for _ in range(2))
    assert all(np.array_equal(first.arrays[name], second.arrays[name]) for name in first.arrays)
    assert not np.array_equal(first.arrays["vectors"], trained(epochs=3, seed=1).state().arrays["vectors"])


def test_the_pair_by_hand():
    scores = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.8, 0.5]])
    assert _pair_targets(scores) == pytest.approx(np.array([[1, 0.5], [0.5, 1], [0, 0.5], [0.5, 0], [0.65, 0.65]]))
    # If wins and means are known exactly, the scores are recovered.
    assert _pair_quality(_pair_targets(scores)) == pytest.approx(scores)
    # A mean that puts one of them outside [0, 1] is adjusted; the difference 2 P - 1 stays.
    assert _pair_quality(np.array([[0.9, 0.9], [0.25, 0.1]])) == pytest.approx(np.array([[1.0, 0.2], [0.0, 0.5]]))


def test_two_experts_are_a_pair_only_when_they_are_named_so():
    estimate = trained(pair_table(600, 0)).estimate(pair_table(200, 1).queries())
    assert estimate.experts == ("weak", "strong") and estimate.reasons is None


def test_a_cost_weight_sweeps_the_calls_of_the_strong_expert():
    router, test = trained(pair_table(600, 0), strong="strong", weak="weak"), pair_table(200, 1)
    assert router.experts == ("strong", "weak")
    estimate = router.estimate(test.queries())
    music = np.array([topic == "music" for topic in test.domains])
    gain = estimate.quality[:, 0] - estimate.quality[:, 1]
    assert gain[music].mean() == pytest.approx(0.7, abs=0.12)
    assert gain[~music].mean() == pytest.approx(0.0, abs=0.12)
    assert estimate.quality[:, 0].mean() == pytest.approx(0.9, abs=0.06)
    share = [
        np.mean([d.experts[0] == "strong" for d in decide(estimate, utility=Utility(cost_weight))])
        for cost_weight in (0, 0.4, 2)
    ]
    assert share[0] > 0.5 > share[2] == 0.0
    assert share[1] == pytest.approx(0.5, abs=0.05)  # music is worth 0.36, law is not
    assert "strong beats weak with probability 0." in decide(estimate)[0].reason


def test_a_pair_of_a_larger_table_is_chosen_by_name():
    router = trained(strong="law-expert", weak="generalist", epochs=5)
    assert router.experts == ("law-expert", "generalist")
    restored = FactorRouter.from_state(router.state(), ENCODER)
    assert restored.experts == router.experts
    assert np.array_equal(restored.estimate(QUERIES).quality, router.estimate(QUERIES).quality)
    with pytest.raises(InvalidOutcomes, match="no expert 'poet' in the table"):
        trained(strong="poet", weak="generalist")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"strong": "a"}, "a pair has two experts: got strong='a' and weak=None"),
        ({"strong": "a", "weak": "a"}, "a pair has two experts"),
        ({"epochs": 0}, "epochs must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings, problem):
    with pytest.raises(InvalidSettings, match=problem):
        FactorRouter(ENCODER, **settings)


def test_what_cannot_be_done_is_said(router):
    with pytest.raises(RouterError, match="not trained"):
        FactorRouter(ENCODER).estimate(QUERIES)
    state = router.state()
    with pytest.raises(InvalidArtifact, match="embeddings of 256 dimensions, but encoder hashing:64 gives 64"):
        FactorRouter.from_state(state, HashingEncoder(64))
    with pytest.raises(InvalidArtifact, match="lacks 'bias'"):
        FactorRouter.from_state(
            RouterState({n: a for n, a in state.arrays.items() if n != "bias"}, state.settings), ENCODER
        )


def test_a_query_is_a_text_and_nothing_else(router):
    text = TEST.prompts[0]
    plain, dressed = Query.of(text), Query.of(text, id="x", cost_weight=3.0, seed=4)
    assert np.array_equal(router.estimate([plain]).quality, router.estimate([dressed]).quality)
