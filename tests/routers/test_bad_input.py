"""Malformed tables and prompts, for every kind that learns from text."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
from planted_outcomes import planted_table

from routers.artifacts import load, save
from routers.base import Query
from routers.decision import Utility, decide
from routers.encoders.build import HashingEncoder
from routers.errors import InvalidArtifact, InvalidOutcomes, RouterError
from routers.factory import build

ENCODER = HashingEncoder(64)
TABLE = planted_table(80)
SETTINGS = {
    "knn": {"k": 10},
    "cluster": {"n_clusters": 6},
    "category": {"choice": "soft"},
    "factor": {"rank": 4, "epochs": 3},
    "pilot": {"similarity": "max"},
    "contrastive": {"width": 8, "epochs": 3},
}
ODD_PROMPTS = ("", " \n\t", "猫は屋根の上で寝ています 🐈", "\ud800 a lone surrogate", "oven flour butter " * 6_000)
pytestmark = pytest.mark.parametrize("kind", SETTINGS)


def trained(kind, table=TABLE, **settings):
    return build(kind, ENCODER, SETTINGS[kind] | settings).fit(table)


def sane(estimate):
    assert np.isfinite(estimate.quality).all()
    assert ((estimate.quality >= 0) & (estimate.quality <= 1)).all()
    return decide(estimate)


def test_prompts_that_are_empty_ood_or_very_long(kind):
    assert len(ODD_PROMPTS[-1]) > 100_000
    queries = [Query.of(text) for text in ODD_PROMPTS]
    assert len(sane(trained(kind).estimate(queries))) == len(ODD_PROMPTS)
    assert len(sane(trained(kind).estimate([Query(messages=())]))) == 1  # no user message at all
    odd = replace(TABLE, prompts=(*ODD_PROMPTS, *TABLE.prompts[len(ODD_PROMPTS) :]))
    sane(trained(kind, odd).estimate(queries))


def test_one_category(kind):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="every training query is of category")
        router = trained(kind, planted_table(80, topics=("law",)))
    decisions = sane(router.estimate(TABLE.queries()))
    least = 0.6 if kind == "pilot" else 0.9  # its centroids of one dataset do not say how often an expert is best
    assert np.mean([decision.experts == ("law-expert",) for decision in decisions]) > least


def test_experts_that_never_score_are_never_asked(kind):
    scores = TABLE.scores.copy()
    scores[:, [0, 2]] = 0.0
    router = trained(kind, replace(TABLE, scores=scores))
    estimate = router.estimate(TABLE.queries())
    assert estimate.quality[:, [0, 2]].max() < 0.15
    assert not {d.experts[0] for d in sane(estimate)} & {TABLE.experts[0], TABLE.experts[2]}


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_scores_that_are_all_alike_leave_the_cheapest_or_any(kind, level):
    router = trained(kind, replace(TABLE, scores=np.full(TABLE.scores.shape, level)))
    estimate = router.estimate(TABLE.queries()[:20])
    sane(estimate)
    assert estimate.quality == pytest.approx(level, abs=0.1)
    thrifty = decide(estimate, utility=Utility(cost_weight=1e3))
    assert {d.experts[0] for d in thrifty} == {"cooking-expert"}


def test_a_cost_weight_without_costs_is_refused_with_the_remedy(kind):
    router = trained(kind, planted_table(80, costs=False))
    estimate = router.estimate(TABLE.queries()[:3])
    assert estimate.cost_usd is None
    with pytest.raises(RouterError, match="this router knows no costs: train it on a table with cost columns"):
        decide(estimate, utility=Utility(cost_weight=1.0))


def test_prompts_that_are_all_the_same(kind):
    router = trained(kind, replace(TABLE, prompts=("what is this?",) * len(TABLE)))
    sane(router.estimate(TABLE.queries()[:3]))


def test_duplicate_ids_are_refused_before_any_training(kind):
    with pytest.raises(InvalidOutcomes, match="duplicate query id: 'q0-0'"):
        trained(kind, replace(TABLE, query_ids=(TABLE.query_ids[0],) * 2 + TABLE.query_ids[2:]))


def test_an_encoder_of_other_dimensions_is_refused(kind, tmp_path):
    save(trained(kind), tmp_path / "r", table=TABLE, encoder=ENCODER)
    with pytest.raises(InvalidArtifact, match=r"was trained with encoder 'hashing:64' \(.*, 64 dimensions\)"):
        load(tmp_path / "r", make_encoder=lambda name: HashingEncoder(32))
    with pytest.raises(InvalidArtifact, match="embeddings of 64 dimensions, but encoder hashing:32 gives 32"):
        router = trained(kind)
        type(router).from_state(router.state(), HashingEncoder(32))
