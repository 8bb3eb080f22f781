"""What `auto` chooses on tables whose winner is known, and an estimate of its gain that is not too high."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from planted_outcomes import planted_table

from routers import artifacts
from routers.base import Estimate
from routers.encoders.build import HashingEncoder
from routers.errors import InvalidArtifact, InvalidSettings, RouterError
from routers.evaluation.cross_validation import cross_validate
from routers.kinds.auto.blend import blend
from routers.kinds.auto.candidates import Candidate
from routers.kinds.auto.router import AutoRouter
from routers.kinds.auto.selection import Trial, choose, expect

ENCODER = HashingEncoder(64)
TRAIN, TEST = planted_table(240), planted_table(200, seed=1)
CHEAP = (Candidate("category"), Candidate("knn", {"k": 20}), Candidate("cluster", {"n_clusters": 8}))


@pytest.fixture(scope="module")
def router():
    return AutoRouter(ENCODER, candidates=CHEAP).fit(TRAIN)


def test_the_planted_winner_is_chosen():
    router = AutoRouter(ENCODER, candidates=[Candidate("random"), Candidate("category")]).fit(TRAIN)
    assert router.model.members[0].router.kind == "category"
    assert router.model.members[0].weight > 0.8
    picks = router.estimate(TEST.queries()).quality.argmax(axis=1)
    names = [TRAIN.experts[pick] for pick in picks]
    assert np.mean([n == f"{topic}-expert" for n, topic in zip(names, TEST.domains, strict=True)]) > 0.95


def test_the_scoreboard_names_every_candidate_with_its_gain(router):
    assert [row.candidate.kind for row in router.model.scoreboard] == ["best-single", "category", "knn", "cluster"]
    base, category = router.model.scoreboard[:2]
    assert base.gain == 0.0
    assert category.gain == pytest.approx(category.score - base.score)
    assert 0 < category.gain_ci95_low < category.gain < category.gain_ci95_high
    assert all(row.skipped is None and row.seconds > 0 for row in router.model.scoreboard)


def test_one_expert_that_always_wins_stays_the_only_one_and_is_named():
    scores = TRAIN.scores * 0.5
    scores[:, 3] = 1.0
    router = AutoRouter(ENCODER, candidates=CHEAP).fit(replace(TRAIN, scores=scores))
    assert [chosen.router.kind for chosen in router.model.members] == ["best-single"]
    assert "no candidate surely beats the best single expert" in router.model.selection.reason
    assert set(router.estimate(TEST.queries()).quality.argmax(axis=1)) == {3}
    assert router.model.expected.gain == 0.0


def noise_trials(seed: int, n: int = 600, m: int = 4, candidates: int = 12):
    """Candidates that guess, on scores that nothing predicts."""
    rng = np.random.default_rng(seed)
    y, folds = (rng.random((n, m)) < 0.5).astype(float), np.arange(n) % 3
    trials = [Trial(np.tile(np.linspace(0.6, 0.4, m), (n, 1)), y[:, 0])]
    for _ in range(candidates):
        quality = rng.random((n, m))
        trials.append(Trial(quality, y[np.arange(n), quality.argmax(axis=1)]))
    return trials, y, folds


def test_on_pure_noise_the_winner_flatters_itself_and_the_estimate_does_not():
    flattering, honest, covered = [], [], []
    for seed in range(30):
        trials, y, folds = noise_trials(seed)
        flattering.append(max(trial.won.mean() for trial in trials) - trials[0].won.mean())
        expected = expect(trials, y, folds, seed=seed)
        honest.append(expected.gain)
        covered.append(expected.gain_ci95_low <= 0.0 <= expected.gain_ci95_high)
    assert np.mean(flattering) > 0.02
    assert abs(np.mean(honest)) < 0.005
    assert np.mean(covered) >= 0.9


def test_noise_is_mostly_refused():
    kept = [choose(*noise_trials(seed, candidates=3), seed=seed).members == (0,) for seed in range(20)]
    assert np.mean(kept) >= 0.8


def test_two_halves_of_the_truth_are_stacked():
    rng = np.random.default_rng(0)
    n = 3000
    halves = 0.15 * rng.normal(size=(2, n))  # how much better the first expert is: the sum of both
    chance = np.stack([0.5 + halves.sum(axis=0), 0.5 - halves.sum(axis=0)], axis=1)
    y, folds = (rng.random((n, 2)) < chance).astype(float), np.arange(n) % 3
    flat = Trial(np.tile([0.5, 0.49], (n, 1)), y[:, 0])
    qualities = [np.stack([0.5 + half, 0.5 - half], axis=1) for half in halves]
    parts = [Trial(quality, y[np.arange(n), quality.argmax(axis=1)]) for quality in qualities]
    choice = choose([flat, *parts], y, folds)
    assert set(choice.members) == {1, 2}
    assert choice.weights == pytest.approx((0.5, 0.5), abs=0.1)
    assert choice.weights[0] >= choice.weights[1]


def test_cross_validation_of_the_whole_is_nested():
    table = planted_table(150)
    report = cross_validate(lambda: AutoRouter(ENCODER, candidates=CHEAP[:1]), table, np.arange(150) % 3)
    assert report.kind == "auto"
    assert report.gain_over_best_single > 0.1


class Ticking:
    """A clock that advances by so many seconds at every reading."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_a_spent_budget_starts_no_further_candidate():
    router = AutoRouter(ENCODER, candidates=CHEAP, budget_minutes=1)
    router.clock, seen = Ticking(5.0), []
    router.on_progress = seen.append
    router.fit(TRAIN)
    assert seen[1].score is not None
    assert [row.candidate.kind for row in seen] == ["best-single", "category", "knn", "cluster"]
    assert seen[0].skipped is None
    assert "budget" in seen[-1].skipped
    assert seen[-1].score is None
    assert tuple(seen) == router.model.scoreboard


def test_a_candidate_that_would_take_too_long_is_given_up_after_its_first_fold():
    router = AutoRouter(ENCODER, candidates=CHEAP[:2], budget_minutes=15)
    router.clock = Ticking(60.0)
    router.fit(TRAIN)
    assert router.model.scoreboard[1].score is not None
    assert "would take" in router.model.scoreboard[2].skipped or "spent" in router.model.scoreboard[2].skipped


@pytest.mark.parametrize("candidates", [CHEAP, (Candidate("knn", {"k": 5000}), *CHEAP)])
def test_a_budget_that_is_spent_at_once_still_finishes_one_candidate(candidates):
    router = AutoRouter(ENCODER, candidates=candidates, budget_minutes=1e-9).fit(TRAIN)
    tried = [row.candidate.kind for row in router.model.scoreboard if row.score is not None]
    assert tried == ["best-single", "category"]
    assert {chosen.router.kind for chosen in router.model.members} <= set(tried)
    reasons = [
        row.skipped for row in router.model.scoreboard if row.skipped is not None and "k=5000" not in row.skipped
    ]
    assert reasons == ["the budget of 1e-09 minutes is spent"] * 2


def test_where_no_candidate_can_be_fitted_nothing_is_selected():
    router = AutoRouter(ENCODER, candidates=[Candidate("knn", {"k": 500}), Candidate("cluster", {"n_clusters": 900})])
    with pytest.raises(RouterError, match="no candidate could be tried") as caught:
        router.fit(TRAIN)
    assert "k=500 neighbours asked of 160 training queries" in str(caught.value)
    assert "900 clusters asked of 160 training queries" in str(caught.value)


def test_a_candidate_that_cannot_be_fitted_says_why():
    router = AutoRouter(ENCODER, candidates=[Candidate("knn", {"k": 10_000}), Candidate("category")]).fit(TRAIN)
    assert "k=10000 neighbours asked of 160 training queries" in router.model.scoreboard[1].skipped
    assert router.model.members[0].router.kind == "category"


def test_further_encoders_are_tried_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setenv("COE_HOME", str(tmp_path))
    router = AutoRouter(HashingEncoder(2), encoders=["hashing:128"], candidates=[Candidate("category")]).fit(TRAIN)
    assert [row.candidate.encoder for row in router.model.scoreboard] == [None, "hashing:2", "hashing:128"]
    assert router.model.members[0].encoder == "hashing:128"
    back = AutoRouter.from_state(router.state(), HashingEncoder(2))
    assert (back.estimate(TEST.queries()).quality == router.estimate(TEST.queries()).quality).all()


def test_signals_are_tried_beside_the_same_candidate_without():
    hint = np.array([sorted(set(TRAIN.domains)).index(topic) for topic in TRAIN.domains], dtype=float)[:, None]
    dull = replace(TRAIN, prompts=tuple(f"question {i}" for i in range(len(TRAIN))), domains=None)
    candidates = [Candidate("quality", {"learners": ["knn", "ridge"]})]
    router = AutoRouter(ENCODER, candidates=candidates, signals=["hint"])
    assert router.requires == {"hint"}
    with pytest.raises(RouterError, match="does not have: hint"):
        router.fit(dull)
    router.fit(replace(dull, features={"hint": hint}))
    assert [row.candidate.settings.get("signals") for row in router.model.scoreboard] == [None, None, ["hint"]]
    assert router.requires == {"hint"}


def test_a_saved_router_is_the_same_to_the_bit(router, tmp_path):
    artifacts.save(router, tmp_path / "router", table=TRAIN, encoder=ENCODER)
    loaded = artifacts.load(tmp_path / "router", make_encoder=lambda name: ENCODER).router
    np.testing.assert_array_equal(loaded.estimate(TEST.queries()).quality, router.estimate(TEST.queries()).quality)
    assert loaded.model.scoreboard == router.model.scoreboard
    assert (loaded.model.selection, loaded.model.expected) == (router.model.selection, router.model.expected)
    assert json.dumps(loaded.state().settings) == json.dumps(router.state().settings)


def test_a_state_that_lacks_something_or_names_another_encoder_is_refused(router):
    state = router.state()
    broken = dict(state.settings)
    broken.pop("chosen")
    with pytest.raises(InvalidArtifact, match="'chosen'"):
        AutoRouter.from_state(replace(state, settings=broken), ENCODER)
    other = json.loads(json.dumps(state.settings))
    other["chosen"][0]["encoder_digest"] = "sha256:0"
    with pytest.raises(InvalidArtifact, match="another encoder"):
        AutoRouter.from_state(replace(state, settings=other), ENCODER)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_folds": 2}, "n_folds must be at least 3"),
        ({"budget_minutes": 0.0}, "budget_minutes must be positive"),
        ({"candidates": [Candidate("auto")]}, "auto cannot be a candidate"),
        ({"candidates": [Candidate("oracle")]}, "oracle cannot be a candidate"),
    ],
)
def test_wrong_settings_are_refused(settings, said):
    with pytest.raises(InvalidSettings, match=said):
        AutoRouter(ENCODER, **settings)


def test_an_untrained_router_says_so():
    for ask in (lambda r: r.estimate([]), lambda r: r.model, lambda r: r.state()):
        with pytest.raises(RouterError, match="not trained"):
            ask(AutoRouter(ENCODER))


def test_a_blend_is_the_weighted_mean():
    parts = [
        Estimate(("a", "b"), np.array([[0.8, 0.2]]), np.array([[1.0, 2.0]]), truncated=np.array([False])),
        Estimate(("a", "b"), np.array([[0.4, 0.6]]), ood=np.array([0.3]), truncated=np.array([True])),
    ]
    found = blend(parts, [0.75, 0.25])
    np.testing.assert_allclose(found.quality, [[0.7, 0.3]])
    np.testing.assert_allclose(found.cost_usd, [[1.0, 2.0]])
    assert found.ood[0] == 0.3
    assert found.truncated[0]
    assert blend(parts[:1], [1.0]) is parts[0]


def close_trials(gain: float, n: int = 150):
    """The best single expert, a candidate of the same mean, and one that shrinks and gains so much on half the rows."""
    rng = np.random.default_rng(0)
    y, folds = (rng.random((n, 2)) < 0.5).astype(float), np.arange(n) % 3
    base = Trial(np.tile([0.51, 0.5], (n, 1)), y[:, 0])
    shrunk = Trial(base.quality, y[:, 0] + np.where(np.arange(n) % 2, gain, 0.0) + 0.1 * rng.normal(size=n))
    return [base, Trial(base.quality, y[:, 1]), shrunk], y, folds


@pytest.mark.parametrize(("gain", "taken"), [(0.005, 2), (-0.2, 0)])
def test_where_nothing_is_sure_a_candidate_that_shrinks_is_taken_unless_it_loses(gain, taken):
    trials, y, folds = close_trials(gain)
    trials[1] = trials[0]
    found = choose(trials, y, folds, shrinking=[2])
    assert found.members == (taken,)
    assert ("taken is one that shrinks to it" in found.reason) == (taken == 2)
    assert choose(trials, y, folds).members == (0,)


def test_with_many_rows_an_expert_the_test_decides_alone():
    trials, y, folds = close_trials(0.005, n=300)
    assert choose([trials[0], trials[0], trials[2]], y, folds, shrinking=[2]).members == (0,)


def test_a_candidate_that_shrinks_to_the_best_single_expert_entirely_is_that_expert():
    trials, y, folds = close_trials(0.0)
    assert choose([trials[0], trials[0]], y, folds, shrinking=[1]).members == (0,)


def test_on_noise_auto_stays_near_the_best_single_expert():
    coins = (np.random.default_rng(3).random((150, 4)) < [0.5, 0.6, 0.5, 0.4]).astype(float)
    table = planted_table(150, topics=("cooking", "law", "music"))
    table = replace(table, scores=coins, experts=("a", "b", "c", "d"), costs_usd=None)
    router = AutoRouter(ENCODER, candidates=[Candidate("quality", {"learners": ["category", "ridge"]})]).fit(table)
    picks = router.estimate(TEST.queries()).quality.argmax(axis=1)
    assert np.mean(picks == coins.mean(axis=0).argmax()) > 0.9
