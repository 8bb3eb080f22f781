"""ContrastiveRouter: both losses by hand, planted topics, calibration, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from planted_outcomes import planted_table

from routers.base import RouterState
from routers.decision import decide
from routers.encoders.build import HashingEncoder
from routers.errors import InvalidArtifact, InvalidSettings, RouterError
from routers.kinds.contrastive.losses import sample_llm_loss, sample_sample_loss
from routers.kinds.contrastive.router import ContrastiveRouter

ENCODER = HashingEncoder(256)
TRAIN, TEST = planted_table(400), planted_table(200, seed=1)
QUERIES = TEST.queries()
SETTINGS = {"width": 16, "learning_rate": 0.01, "epochs": 30, "batch": 64, "n_clusters": 4}


def trained(table=TRAIN, **settings):
    return ContrastiveRouter(ENCODER, **(SETTINGS | settings)).fit(table)


def chance():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module", params=[0, 32], ids=["linear", "hidden"])
def router(request):
    return trained(hidden=request.param)


def test_the_sample_llm_loss_by_hand():
    logits = torch.tensor([[0.9, 0.1, -0.3, 0.4, 0.2, -0.5]])
    scores = torch.tensor([[1.0, 0.9, 0.0, 0.7, 0.2, 0.1]])
    # Top: columns 0, 1, 3. Lowest: 4, 5, 2, none of which scores more than 0.5.
    low = np.exp([0.2, -0.5, -0.3]).sum()
    expected = -sum(np.log(np.exp(z) / (np.exp(z) + low)) for z in (0.9, 0.1, 0.4))
    assert sample_llm_loss(logits, scores, chance()).item() == pytest.approx(expected, rel=1e-5)


def test_experts_that_score_nothing_are_not_drawn_and_good_ones_not_pushed_away():
    logits = torch.tensor([[0.9, 0.1, -0.3, 0.4, 0.2, -0.5]])
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    low = logits[0, 1:].exp()
    losses = {
        -np.log(np.exp(0.9) / (np.exp(0.9) + (low.sum() - low[i] - low[j]).item())) for i in range(5) for j in range(i)
    }
    found = sample_llm_loss(logits, scores, chance()).item()  # three of the five zeros, by chance
    assert min(abs(found - loss) for loss in losses) < 1e-5
    assert sample_llm_loss(logits, torch.ones(1, 6), chance()).item() == 0.0
    assert sample_llm_loss(logits, torch.zeros(1, 6), chance()).item() == 0.0


def test_no_expert_is_its_own_negative():
    logits, scores = torch.tensor([[0.5, -0.5]]), torch.tensor([[0.4, 0.2]])
    first = -np.log(np.exp(0.5) / (np.exp(0.5) + np.exp(-0.5)))
    second = -np.log(np.exp(-0.5) / (np.exp(0.5) + np.exp(-0.5)))
    assert sample_llm_loss(logits, scores, chance()).item() == pytest.approx(first + second, rel=1e-5)


def test_the_sample_sample_loss_by_hand():
    vectors = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    clusters = torch.tensor([0, 0, 1, 1])
    # Each has one partner (cosine 1) and two negatives (cosine 0).
    expected = -np.log(np.exp(2) / (np.exp(2) + 2))
    assert sample_sample_loss(vectors, clusters, 0.5, chance()).item() == pytest.approx(expected, rel=1e-5)
    alone = sample_sample_loss(vectors[:3], clusters[:3], 0.5, chance()).item()  # the third has no partner
    assert alone == pytest.approx(-np.log(np.exp(2) / (np.exp(2) + 1)), rel=1e-5)
    assert sample_sample_loss(vectors, torch.zeros(4), 0.5, chance()).item() == 0.0


def test_queries_go_to_the_expert_of_their_topic_with_the_right_confidence(router):
    decisions = decide(router.estimate(QUERIES))
    right = [d.experts[0] == f"{topic}-expert" for d, topic in zip(decisions, TEST.domains, strict=True)]
    assert np.mean(right) >= 0.9
    assert np.mean([d.confidence for d in decisions]) == pytest.approx(0.88, abs=0.1)
    estimate = router.estimate(QUERIES)
    assert estimate.quality.mean(axis=0) == pytest.approx(TEST.scores.mean(axis=0), abs=0.12)
    assert estimate.cost_usd == pytest.approx(TEST.costs_usd)
    assert len(decide(estimate, k=3)[0].experts) == 3


def test_the_numpy_head_is_the_one_that_was_trained(router):
    from routers.kinds.contrastive.router import _head

    x = ENCODER.encode(TEST.prompts[:7])
    layers = {name: torch.from_numpy(array) for name, array in router.model.layers.items()}
    expected = torch.nn.functional.cosine_similarity(
        _head(layers, torch.from_numpy(x))[:, :, None], layers["experts"][None], dim=1
    )
    assert router.model.cosines(x) == pytest.approx(expected.numpy(), abs=1e-6)


def test_queries_alone_and_together_and_after_saving_are_estimated_alike(router):
    state = router.state()
    state = RouterState(dict(state.arrays), json.loads(json.dumps(state.settings, allow_nan=False)))
    before, after = router.estimate(QUERIES), ContrastiveRouter.from_state(state, ENCODER).estimate(QUERIES)
    assert np.array_equal(before.quality, after.quality)
    single = np.vstack([router.estimate([query]).quality for query in QUERIES[:20]])
    assert single == pytest.approx(before.quality[:20], abs=1e-5)
    assert len(router.estimate([])) == 0


def test_training_twice_gives_the_same_router():
    first, second = (trained(epochs=2).state() for _ in range(2))
    assert all(np.array_equal(first.arrays[name], second.arrays[name]) for name in first.arrays)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"width": 0}, "width must be at least 1"),
        ({"hidden": -1}, "hidden must be at least 0"),
        ({"n_clusters": 0}, "n_clusters must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"sample_weight": -1.0}, "sample_weight must be at least 0"),
    ],
)
def test_settings_that_make_no_sense(settings, problem):
    with pytest.raises(InvalidSettings, match=problem):
        ContrastiveRouter(ENCODER, **settings)


def test_what_cannot_be_done_is_said(router):
    with pytest.raises(RouterError, match="not trained"):
        ContrastiveRouter(ENCODER).estimate(QUERIES)
    state = router.state()
    with pytest.raises(InvalidArtifact, match="embeddings of 256 dimensions, but encoder hashing:64 gives 64"):
        ContrastiveRouter.from_state(state, HashingEncoder(64))
    with pytest.raises(InvalidArtifact, match="lacks 'experts'"):
        fewer = {name: array for name, array in state.arrays.items() if name != "experts"}
        ContrastiveRouter.from_state(RouterState(fewer, state.settings), ENCODER)
