"""The quality router on planted topics: its choices, its calibration, and its artifact."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from planted_outcomes import OOD, planted_table

from routers import artifacts
from routers.base import Query, RouterState
from routers.decision import Utility, decide
from routers.encoders.build import HashingEncoder
from routers.errors import InvalidArtifact, InvalidOutcomes, InvalidSettings, RouterError
from routers.evaluation.metrics import expected_calibration_error, picked
from routers.kinds.quality.router import QualityRouter

ENCODER = HashingEncoder(64)
TRAIN, TEST = planted_table(400), planted_table(600, seed=1)
QUERIES = TEST.queries()


@pytest.fixture(scope="module")
def router():
    return QualityRouter(ENCODER).fit(TRAIN)


@pytest.fixture(scope="module")
def estimate(router):
    return router.estimate(QUERIES)


def share_right(estimate, table=TEST):
    chosen = [decision.experts[0] for decision in decide(estimate)]
    return np.mean([name == f"{topic}-expert" for name, topic in zip(chosen, table.domains, strict=True)])


def test_queries_go_to_the_expert_of_their_topic(estimate):
    assert share_right(estimate) > 0.97
    assert np.mean([label == topic for label, topic in zip(estimate.labels, TEST.domains, strict=True)]) > 0.97


def test_topics_are_found_without_labels():
    bare = replace(TRAIN, domains=None)
    found = QualityRouter(ENCODER).fit(bare).estimate(QUERIES)
    assert share_right(found) > 0.9
    assert found.labels is None


def test_quality_is_the_chance_of_a_right_answer(estimate):
    chosen = estimate.quality.argmax(axis=1)
    of_chosen = expected_calibration_error(picked(estimate.quality, chosen), picked(TEST.scores, chosen))
    assert of_chosen < 0.07  # 0.059 to 0.062, by processor
    assert expected_calibration_error(estimate.quality.ravel(), TEST.scores.ravel()) < 0.05
    assert ((estimate.quality > 0) & (estimate.quality < 1)).all()


def test_costs_are_those_of_the_table(estimate):
    np.testing.assert_allclose(estimate.cost_usd, np.tile(TRAIN.costs_usd[0], (len(TEST), 1)), rtol=1e-6)
    dear = decide(estimate, utility=Utility(cost_weight=1e4))
    assert {decision.experts[0] for decision in dear} == {TRAIN.experts[0]}


def test_costs_that_grow_with_the_prompt_are_predicted():
    prompts = [f"{prompt} {'again ' * (i % 40)}" for i, prompt in enumerate(TRAIN.prompts)]
    lengths = np.array([len(prompt) for prompt in prompts], dtype=float)
    costs = lengths[:, None] * np.array([1e-6, 5e-6, 1e-6, 1e-6, 2e-6])
    table = replace(TRAIN, prompts=tuple(prompts), costs_usd=costs)
    found = QualityRouter(ENCODER, learners=["ridge"]).fit(table).estimate(table.queries())
    # Not to the bit: training rows have the category probabilities of classifiers that were not trained on them.
    np.testing.assert_allclose(found.cost_usd.mean(axis=0), costs.mean(axis=0), rtol=1e-5)
    assert np.corrcoef(found.cost_usd[:, 1], costs[:, 1])[0, 1] > 0.95


def test_one_expert_that_always_wins_is_always_asked():
    scores = np.random.default_rng(0).integers(2, size=TRAIN.scores.shape) * 0.5
    scores[:, 2] = 1.0
    found = QualityRouter(ENCODER).fit(replace(TRAIN, scores=scores)).estimate(QUERIES)
    assert (found.quality.argmax(axis=1) == 2).all()
    assert found.quality[:, 2].min() > 0.9


def test_constant_scores_and_missing_costs_are_no_trouble():
    table = replace(TRAIN, scores=np.zeros_like(TRAIN.scores), costs_usd=None)
    found = QualityRouter(ENCODER).fit(table).estimate(QUERIES[:3])
    assert found.quality.max() < 0.05
    assert found.cost_usd is None


def test_out_of_distribution_prompts_score_high(router, estimate):
    assert router.estimate([Query.of(text) for text in OOD]).ood.min() > 0.95
    assert estimate.ood.mean() < 0.8


def test_a_batch_is_estimated_as_its_queries_are(router, estimate):
    for i in range(10):
        one = router.estimate([QUERIES[i]])
        np.testing.assert_allclose(one.quality[0], estimate.quality[i], rtol=0, atol=1e-6)
        assert one.ood[0] == estimate.ood[i]
    assert router.estimate([]).quality.shape == (0, 5)


def test_a_saved_router_estimates_the_same_to_the_bit(router, estimate, tmp_path):
    artifacts.save(router, tmp_path / "router", table=TRAIN, encoder=ENCODER)
    loaded = artifacts.load(tmp_path / "router", make_encoder=lambda name: ENCODER).router
    found = loaded.estimate(QUERIES)
    np.testing.assert_array_equal(found.quality, estimate.quality)
    np.testing.assert_array_equal(found.cost_usd, estimate.cost_usd)
    assert found.labels == estimate.labels
    assert json.dumps(loaded.state().settings) == json.dumps(router.state().settings)


def test_the_same_seed_gives_the_same_router(estimate):
    np.testing.assert_array_equal(QualityRouter(ENCODER).fit(TRAIN).estimate(QUERIES).quality, estimate.quality)


def test_signals_are_required_and_used():
    topics = np.array([name.removesuffix("-expert") for name in TRAIN.experts[:4]])
    hint = (np.array(TRAIN.domains)[:, None] == topics).astype(float)
    noise = replace(TRAIN, prompts=tuple(f"question {i}" for i in range(len(TRAIN))), domains=None)
    router = QualityRouter(ENCODER, signals=["hint"])
    assert router.requires == {"hint"}
    with pytest.raises(RouterError, match="does not have: hint"):
        router.fit(noise)
    router.fit(replace(noise, features={"hint": hint}))
    told = [Query.of("question", features={"hint": row}) for row in np.eye(4)]
    assert [decision.experts[0] for decision in decide(router.estimate(told))] == list(TRAIN.experts[:4])
    with pytest.raises(RouterError, match="query 2 of 2 lacks the feature 'hint'"):
        router.estimate([told[0], Query.of("question")])


def test_weights_of_the_stack_can_be_read(router):
    weights = router.state().settings["stack_weights"]["ranking"]
    assert list(weights) == ["category", "ridge", "trees", "guided-trees", "residual-trees", "expert means"]
    assert sum(weights.values()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("learners", [[], ["ridge", "ridge"], ["boosting"]])
def test_wrong_learners_are_refused(learners):
    with pytest.raises(InvalidSettings, match=r"learner"):
        QualityRouter(ENCODER, learners=learners)


def test_too_few_rows_and_wrong_columns_are_refused():
    with pytest.raises(RouterError, match="needs 8 training queries or more, got 5"):
        QualityRouter(ENCODER).fit(TRAIN.select(range(5)))
    with pytest.raises(InvalidOutcomes, match="no column 'topic'"):
        QualityRouter(ENCODER, label_column="topic").fit(TRAIN)
    with pytest.raises(RouterError, match="not trained"):
        QualityRouter(ENCODER).estimate(QUERIES)


def test_a_state_that_lacks_something_is_refused(router):
    state = router.state()
    arrays = {name: array for name, array in state.arrays.items() if not name.startswith("stack.")}
    with pytest.raises(InvalidArtifact, match="lacks 'curve'"):
        QualityRouter.from_state(RouterState(arrays, state.settings), ENCODER)
    with pytest.raises(InvalidArtifact, match="dimensions"):
        QualityRouter.from_state(state, HashingEncoder(32))
