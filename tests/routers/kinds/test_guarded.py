"""GuardedRouter: its guarantees over splits of planted data, the answering expert on abstention, and saving."""

from __future__ import annotations

import json

import numpy as np
import pytest
from planted_outcomes import OOD, planted_table

from routers.base import GENERAL, Query, RouterState
from routers.decision import decide
from routers.encoders.build import HashingEncoder
from routers.encoders.embed import LastBatch
from routers.errors import InvalidArtifact, InvalidSettings, RouterError
from routers.factory import build
from routers.kinds.guarded import GuardedRouter
from routers.numeric.mahalanobis import Mahalanobis


class Remembering(HashingEncoder):
    """Hashes every text once, since the splits below share their texts."""

    def encode(self, texts):
        seen = self.__dict__.setdefault("seen", {})
        fresh = list(dict.fromkeys(text for text in texts if text not in seen))
        seen |= dict(zip(fresh, super().encode(fresh), strict=True))
        self.__dict__["seen"] = seen
        return np.array([seen[text] for text in texts]).reshape(-1, self.dim)


ENCODER = Remembering(128)
TABLE = planted_table(400)
NEW = planted_table(300, seed=1)
QUERIES = [Query.of(prompt) for prompt in NEW.prompts]
OOD_QUERIES = [Query.of(text) for text in OOD]


def guarded(**settings):
    return GuardedRouter(ENCODER, **{"kind": "knn", "settings": {"k": 20}, **settings})


def answered_wrongly(router, table):
    """(n,) the loss of each query that the router's own choice answered, 0 for the others."""
    decisions = decide(router.estimate([Query.of(prompt) for prompt in table.prompts]))
    scores = np.array([table.scores[i, table.experts.index(d.experts[0])] for i, d in enumerate(decisions)])
    return (1 - scores) * np.array([not d.abstained for d in decisions])


def test_conformal_abstention_keeps_its_rate_over_splits_and_catches_out_of_distribution_prompts():
    pool = planted_table(600, seed=5)
    rates, caught = [], []
    for seed in range(8):
        order = np.random.default_rng(seed).permutation(len(pool))
        router = guarded(alpha=0.1, calibration_share=0.4, seed=seed).fit(pool.select(np.sort(order[:300])))
        rest = pool.select(np.sort(order[300:]))
        rates.append(router.estimate([Query.of(prompt) for prompt in rest.prompts]).abstained.mean())
        caught.append(router.estimate(OOD_QUERIES).abstained.mean())
    assert 0.03 < np.mean(rates) <= 0.1 + 0.03  # not vacuous, and within the bound plus the noise of 8 splits
    assert np.mean(caught) == 1.0


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_risk_control_bounds_what_is_answered_wrongly(alpha):
    pool = planted_table(600, seed=6)
    risks, answered = [], []
    for seed in range(8):
        order = np.random.default_rng(seed).permutation(len(pool))
        router = guarded(method="risk", alpha=alpha, calibration_share=0.4, seed=seed)
        router.fit(pool.select(np.sort(order[:300])))
        rest = pool.select(np.sort(order[300:]))
        risks.append(answered_wrongly(router, rest).mean())
        answered.append(1 - router.estimate([Query.of(prompt) for prompt in rest.prompts]).abstained.mean())
    assert np.mean(risks) <= alpha + 0.03
    assert np.mean(answered) > 0.1


def test_calibrated_abstains_below_the_expected_score_that_is_wanted():
    router = guarded(method="calibrated", least_quality=0.0).fit(TABLE)
    assert not router.estimate(QUERIES).abstained.any()
    wanted = guarded(method="calibrated", least_quality=1.0).fit(TABLE).estimate(QUERIES)
    assert wanted.abstained.any() and "expected score" in wanted.reasons[int(wanted.abstained.argmax())]


def test_the_generalist_answers_out_of_distribution_prompts():
    router = guarded(generalist="law-expert").fit(TABLE)
    for decision in decide(router.estimate(OOD_QUERIES)):
        assert decision.abstained and decision.experts == ("law-expert",)
        assert "unsure, so the generalist law-expert answers: distance to the training prompts" in decision.reason
    best = TABLE.experts[int(TABLE.scores.mean(axis=0).argmax())]
    assert {d.experts for d in decide(guarded().fit(TABLE).estimate(OOD_QUERIES))} == {(best,)}


def test_refusing_leaves_no_expert():
    estimate = guarded(on_abstain="refuse").fit(TABLE).estimate([*QUERIES[:3], *OOD_QUERIES])
    decisions = decide(estimate, allowed=TABLE.experts)
    assert all(d.experts == () and d.abstained and "no expert answers" in d.reason for d in decisions[3:])
    assert all(d.experts for d, a in zip(decisions, estimate.abstained, strict=True) if not a)


def test_where_it_does_not_abstain_the_inner_router_decides():
    router = guarded(kind="category", settings={}).fit(TABLE)
    own, inner = decide(router.estimate(QUERIES)), decide(router.inner.estimate(QUERIES))
    for guarded_, plain in zip(own, inner, strict=True):
        if not guarded_.abstained:
            assert (guarded_.experts, guarded_.confidence, guarded_.label) == (
                plain.experts,
                plain.confidence,
                plain.label,
            )
        assert guarded_.abstained or not plain.abstained
    assert GENERAL in router.estimate(OOD_QUERIES).labels


def test_the_mahalanobis_distance_is_that_of_its_formula():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(500, 3)) * [3.0, 1.0, 0.1]).astype(np.float32)
    covariance = np.cov(x, rowvar=False)
    covariance += 0.01 * np.trace(covariance) / 3 * np.eye(3)
    new = rng.normal(size=(5, 3)).astype(np.float32)
    apart = new - x.mean(axis=0)
    expected = np.sqrt(np.einsum("nd,de,ne->n", apart, np.linalg.inv(covariance), apart))
    assert Mahalanobis.of(x).distance(new) == pytest.approx(expected, rel=1e-4)
    constant = np.ones((4, 2), dtype=np.float32)
    assert np.isfinite(Mahalanobis.of(constant).distance(constant + 1)).all()


def test_single_queries_and_batches_agree_and_ood_is_one_minus_the_p_value():
    router = guarded(alpha=0.05).fit(TABLE)
    batch = router.estimate([*QUERIES[:5], *OOD_QUERIES])
    for i, query in enumerate([*QUERIES[:5], *OOD_QUERIES]):
        one = router.estimate([query])
        assert one.ood[0] == pytest.approx(batch.ood[i]) and one.abstained[0] == batch.abstained[i]
    assert np.array_equal(batch.abstained, batch.ood >= 0.95 - 1e-12)


@pytest.mark.parametrize("method", ["conformal", "risk", "calibrated"])
def test_a_saved_router_answers_identically_to_the_bit(method):
    router = guarded(method=method, alpha=0.3, kind="category", settings={"c": 2.0}).fit(TABLE)
    state = router.state()
    state = RouterState(dict(state.arrays), json.loads(json.dumps(state.settings, allow_nan=False)))
    back = GuardedRouter.from_state(state, ENCODER)
    before, after = router.estimate([*QUERIES, *OOD_QUERIES]), back.estimate([*QUERIES, *OOD_QUERIES])
    for name in ("quality", "eligible", "abstained", "confidence", "ood"):
        assert np.array_equal(getattr(before, name), getattr(after, name))
    assert (before.labels, before.reasons, before.experts) == (after.labels, after.reasons, after.experts)


def test_a_threshold_that_answers_everything_survives_saving():
    router = guarded(method="risk", alpha=0.99).fit(TABLE)
    assert router.state().settings["threshold"] == "-inf"
    assert not GuardedRouter.from_state(router.state(), ENCODER).estimate(OOD_QUERIES).abstained.any()


def test_a_query_is_encoded_once():
    class Counting(HashingEncoder):
        calls = 0

        def encode(self, texts):
            self.calls += 1
            return super().encode(texts)

    encoder = Counting(64)
    router = GuardedRouter(encoder, kind="knn", settings={"k": 5}).fit(TABLE)
    before = encoder.calls
    router.estimate(QUERIES[:4])
    assert encoder.calls == before + 1
    remembering = LastBatch(encoder)
    assert np.array_equal(remembering.encode(["a"]), remembering.encode(["a"]))
    assert not np.array_equal(remembering.encode(["a b"]), remembering.encode(["c d"]))


def test_what_makes_no_sense_is_said():
    with pytest.raises(InvalidSettings, match="alpha must lie between 0 and 1, got 0"):
        guarded(alpha=0)
    with pytest.raises(InvalidSettings, match="of another kind"):
        guarded(kind="guarded")
    with pytest.raises(InvalidSettings, match="a knn router has no setting 'neighbors'"):
        guarded(settings={"neighbors": 3})
    with pytest.raises(InvalidSettings, match="generalist 'nobody' is not in the table"):
        guarded(generalist="nobody").fit(TABLE)
    with pytest.raises(RouterError, match="leaves 4 to calibrate on: at least 10"):
        guarded(settings={"k": 1}, calibration_share=0.2).fit(planted_table(20))
    with pytest.raises(RouterError, match="cannot be guaranteed by 80 calibration queries: at least 99"):
        guarded(method="risk", alpha=0.01, calibration_share=0.2).fit(TABLE)
    with pytest.raises(RouterError, match="not trained"):
        guarded().estimate(QUERIES)
    state = guarded().fit(TABLE).state()
    for name in ("calibration", "mean"):
        arrays = {n: a for n, a in state.arrays.items() if n != name}
        with pytest.raises(InvalidArtifact, match=f"lacks '{name}'"):
            GuardedRouter.from_state(RouterState(arrays, state.settings), ENCODER)
    with pytest.raises(InvalidArtifact, match="128 dimensions, but encoder hashing:64 gives 64"):
        GuardedRouter.from_state(state, HashingEncoder(64))
    assert build("guarded", ENCODER).kind == "guarded"
