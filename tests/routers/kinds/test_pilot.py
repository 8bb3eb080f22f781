"""Pilot embeddings against brute force, experts without one, added experts, and the calibration."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from planted_outcomes import OOD, planted_table

from routers.base import Query, RouterState
from routers.decision import decide
from routers.encoders.build import HashingEncoder
from routers.errors import InvalidArtifact, InvalidOutcomes, InvalidSettings, RouterError
from routers.kinds.pilot import NO_PILOT, PilotRouter, best_shares
from routers.outcomes.table import OutcomeTable
from routers.update import add_expert

ENCODER = HashingEncoder(256)
TOPICS = ("cooking", "geometry", "law", "music")


def graded(n: int = 200, *, seed: int = 0, noise: float = 0.05) -> OutcomeTable:
    """Scores like nDCG: expert i is best in topic i, apart from noise."""
    table = planted_table(n, seed=seed)
    own = np.array([[name.startswith(domain) for name in table.experts] for domain in table.domains or ()])
    scores = 0.4 + 0.3 * own + noise * np.random.default_rng(seed).standard_normal(own.shape)
    return replace(table, scores=scores.clip(0, 1))


TRAIN, TEST = graded(), graded(120, seed=1)
QUERIES = TEST.queries()


def picks(router: PilotRouter) -> list[str]:
    return [decision.experts[0] for decision in decide(router.estimate(QUERIES))]


@pytest.mark.parametrize("similarity", ["mean", "max"])
def test_the_expert_of_highest_similarity_to_its_centroids_answers(similarity):
    router = PilotRouter(ENCODER, similarity=similarity).fit(TRAIN)
    train, test = ENCODER.encode(TRAIN.prompts), ENCODER.encode(TEST.prompts)
    best = TRAIN.scores.argmax(axis=1)
    expected = []
    for vector in test:
        of_expert = []
        for expert in range(len(TRAIN.experts)):
            centroids = [
                train[(best == expert) & (np.array(TRAIN.domains) == topic)].mean(axis=0)
                for topic in TOPICS
                if ((best == expert) & (np.array(TRAIN.domains) == topic)).any()
            ]
            cosines = [vector @ centroid / np.linalg.norm(centroid) for centroid in centroids]
            of_expert.append((max if similarity == "max" else np.mean)(cosines) if cosines else -1.0)
        expected.append(TRAIN.experts[int(np.argmax(of_expert))])
    assert picks(router) == expected
    right = [name == f"{topic}-expert" for name, topic in zip(expected, TEST.domains, strict=True)]
    assert np.mean(right) > 0.9


def test_quality_is_on_the_scale_of_scores_and_costs_are_means():
    estimate = PilotRouter(ENCODER).fit(TRAIN).estimate(QUERIES)
    assert estimate.quality.mean() == pytest.approx(TEST.scores.mean(), abs=0.05)
    assert estimate.cost_usd[0] == pytest.approx(TRAIN.costs_usd.mean(axis=0))
    assert [label == topic for label, topic in zip(estimate.labels, TEST.domains, strict=True)].count(True) >= 115
    strange = PilotRouter(ENCODER).fit(TRAIN).estimate([Query.of(text) for text in OOD])
    assert strange.ood.min() > 0.95 > estimate.ood.mean()


def test_equal_scores_are_shared_and_say_nothing_where_all_are_equal():
    scores = np.array([[0.5, 0.5, 0.1], [0.2, 0.2, 0.2], [0.0, 0.1, 0.9]])
    assert best_shares(scores).tolist() == [[0.5, 0.5, 0], [0, 0, 0], [0, 0, 1]]
    assert best_shares(np.ones((2, 2))).tolist() == [[0.5, 0.5]] * 2  # nothing tells them apart: any may answer
    even = PilotRouter(ENCODER).fit(replace(TRAIN, scores=np.ones_like(TRAIN.scores)))
    quality = even.estimate(QUERIES).quality
    assert (quality == quality[:, :1]).all()


def test_an_expert_that_is_best_nowhere_answers_only_where_all_others_may_not():
    scores = TRAIN.scores.copy()
    scores[:, 4] = 0.0
    router = PilotRouter(ENCODER).fit(replace(TRAIN, scores=scores))
    assert 4 not in router.model.expert_of
    assert "generalist" not in picks(router)
    estimate = router.estimate(QUERIES[:1])
    assert estimate.quality[0].argmin() == 4
    assert estimate.quality[0, 4] == router.model.qualities(np.array([NO_PILOT]))[0]
    [alone] = decide(estimate, allowed=[frozenset({"generalist"})])
    assert alone.experts == ("generalist",)


def test_few_queries_make_no_pilot():
    noisy = graded(noise=0.12)
    assert len(PilotRouter(ENCODER).fit(noisy).model.pilots) > len(TOPICS)
    model = PilotRouter(ENCODER, least_queries=10).fit(noisy).model
    pairs = {(TRAIN.experts[e], model.names[d]) for e, d in zip(model.expert_of, model.label_of, strict=True)}
    assert pairs == {(f"{topic}-expert", topic) for topic in TOPICS}
    with pytest.raises(RouterError, match="no expert is best on 500 training queries of a dataset, of 200 queries"):
        PilotRouter(ENCODER, least_queries=500).fit(TRAIN)


def test_an_added_expert_gets_pilots_and_its_queries_without_encoding():
    class Counting(HashingEncoder):
        calls = 0

        def encode(self, texts):
            self.calls += 1
            return super().encode(texts)

    encoder = Counting(256)
    old = PilotRouter(encoder).fit(TRAIN.with_experts([name for name in TRAIN.experts if name != "law-expert"]))
    new = add_expert(old, TRAIN.with_experts(["law-expert"]))
    assert encoder.calls == 1
    law = [i for i, topic in enumerate(TEST.domains) if topic == "law"]
    assert np.mean([picks(new)[i] == "law-expert" for i in law]) > 0.9
    order = [new.experts.index(name) for name in TRAIN.experts]
    whole = PilotRouter(ENCODER).fit(TRAIN).estimate(QUERIES)
    assert new.estimate(QUERIES).quality[:, order] == pytest.approx(whole.quality, abs=1e-6)


def test_a_query_does_not_calibrate_on_its_own_pilot():
    """Each dataset has one query of each expert, so that a pilot is the query itself: left out, nothing is known."""
    table = graded(40)
    alone = replace(table, domains=tuple(str(i) for i in range(40)))
    router = PilotRouter(ENCODER, similarity="max").fit(alone)
    assert router.model.distance_quantiles.min() > 0.1  # not 0, the distance to itself
    assert router.estimate([Query.of(alone.prompts[0])]).ood[0] == 0.0


def test_datasets_come_from_a_column_the_domains_or_nowhere():
    frame = TRAIN.to_frame().rename(columns={"domain": "corpus"})
    named = OutcomeTable.from_frame(frame)
    assert PilotRouter(ENCODER, label_column="corpus").fit(named).model.names == TOPICS
    assert PilotRouter(ENCODER).fit(named).model.names == ("all",)
    with pytest.raises(InvalidOutcomes, match="no column 'dataset' in the table"):
        PilotRouter(ENCODER, label_column="dataset").fit(named)


@pytest.mark.parametrize("costs", [True, False])
def test_a_saved_router_answers_identically_to_the_bit(costs):
    table = TRAIN if costs else replace(TRAIN, costs_usd=None)
    router = PilotRouter(ENCODER, similarity="max", least_queries=2).fit(table)
    state = router.state()
    state = RouterState(dict(state.arrays), json.loads(json.dumps(state.settings, allow_nan=False)))
    before, after = router.estimate(QUERIES), PilotRouter.from_state(state, ENCODER).estimate(QUERIES)
    assert np.array_equal(before.quality, after.quality) and np.array_equal(before.ood, after.ood)
    assert before.labels == after.labels and (before.cost_usd is None) is (not costs)
    with pytest.raises(InvalidArtifact, match="lacks 'pilots'"):
        PilotRouter.from_state(
            RouterState({name: a for name, a in state.arrays.items() if name != "pilots"}, state.settings), ENCODER
        )
    with pytest.raises(InvalidArtifact, match="embeddings of 256 dimensions"):
        PilotRouter.from_state(state, HashingEncoder(64))


def test_what_makes_no_sense_is_an_error():
    with pytest.raises(InvalidSettings, match="similarity must be one of mean, max, got 'sum'"):
        PilotRouter(ENCODER, similarity="sum")
    with pytest.raises(InvalidSettings, match="least_queries must be at least 1"):
        PilotRouter(ENCODER, least_queries=0)
    with pytest.raises(RouterError, match="not trained"):
        PilotRouter(ENCODER).estimate(QUERIES)
    assert len(PilotRouter(ENCODER).fit(TRAIN).estimate([])) == 0
