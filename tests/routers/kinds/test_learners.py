"""Learners against scikit-learn, against sums done by hand, and after a round trip through arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.linear_model import LogisticRegression, RidgeCV

from routers.errors import InvalidSettings
from routers.kinds.quality.features import Seen
from routers.kinds.quality.learner_mlp import SHARPNESS, regret_loss
from routers.kinds.quality.learner_trees import _without_copies, forest_of
from routers.kinds.quality.learners import LEARNERS, Category, Logistic, Neighbours, centred, learner_class
from routers.numeric.ridge import ALPHAS, fit_ridge


def planted(n: int = 400, seed: int = 0) -> tuple[Seen, np.ndarray]:
    """Two categories and a hidden z; expert 0 is good in the first, expert 1 in the second, expert 2 where z > 0."""
    rng = np.random.default_rng(seed)
    z, label = rng.normal(size=n), rng.integers(2, size=n)
    x = (z[:, None] + 0.2 * rng.normal(size=(n, 6))).astype(np.float32)
    p = np.where(label[:, None] == np.arange(2), 0.9, 0.1)
    chance = np.stack([np.where(label == 0, 0.8, 0.3), np.where(label == 1, 0.8, 0.3), np.where(z > 0, 0.98, 0.1)])
    return Seen(np.hstack([x, p.astype(np.float32)]), p), (rng.random((n, 3)) < chance.T).astype(float)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_comes_back_from_its_arrays_to_the_bit(name):
    (seen, y), (new, _) = planted(), planted(50, seed=1)
    learner = learner_class(name).fit(seen, y, np.random.default_rng(0))
    back = learner_class(name).restored(learner.arrays())
    assert learner.predict(new).shape == (50, 3)
    np.testing.assert_array_equal(back.predict(new), learner.predict(new))


@pytest.mark.parametrize("name", LEARNERS)
def test_a_batch_is_predicted_as_its_rows_are(name):
    (seen, y), (new, _) = planted(), planted(7, seed=1)
    learner = learner_class(name).fit(seen, y, np.random.default_rng(0))
    one_by_one = np.vstack([learner.predict(new[np.array([row])]) for row in range(7)])
    np.testing.assert_allclose(learner.predict(new), one_by_one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LEARNERS)
def test_the_same_seed_gives_the_same_learner(name):
    (seen, y), (new, _) = planted(), planted(50, seed=1)
    twice = [learner_class(name).fit(seen, y, np.random.default_rng(3)).predict(new) for _ in range(2)]
    np.testing.assert_array_equal(*twice)


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "category"])
def test_what_is_in_the_features_is_found(name):
    (seen, y), (new, truth) = planted(2000), planted(1000, seed=1)
    learner = learner_class(name).fit(seen, y, np.random.default_rng(0))
    picks = learner.predict(new).argmax(axis=1)
    won = truth[np.arange(1000), picks].mean()
    assert won > 0.81  # one expert always: 0.55; the best of each category: 0.8; the optimum: 0.89


def test_walking_the_trees_gives_what_scikit_learn_predicts():
    (seen, y), (new, _) = planted(), planted(3000, seed=1)
    grown = ExtraTreesRegressor(20, min_samples_leaf=3, random_state=0).fit(seen.x, y)
    forest = forest_of([tree.tree_ for tree in grown.estimators_], 3)
    np.testing.assert_allclose(forest.predict(new.x), grown.predict(new.x), rtol=0, atol=1e-6)


def test_columns_that_were_copied_for_training_are_read_once():
    rng = np.random.default_rng(0)
    x, estimates, y = rng.normal(size=(300, 2)), rng.normal(size=(300, 3)), rng.normal(size=(300, 3))
    copied = np.hstack([x, *[estimates] * 4]).astype(np.float32)
    grown = ExtraTreesRegressor(10, min_samples_leaf=3, random_state=0).fit(copied, y + estimates)
    forest = _without_copies(forest_of([tree.tree_ for tree in grown.estimators_], 3), 2, 3)
    assert forest.feature.max() == 4
    found = forest.predict(np.hstack([x, estimates]).astype(np.float32))
    np.testing.assert_allclose(found, grown.predict(copied), rtol=0, atol=1e-6)


def test_a_tree_that_cannot_split_is_a_leaf():
    grown = ExtraTreesRegressor(2, random_state=0).fit(np.zeros((5, 1)), np.full((5, 2), 0.25))
    forest = forest_of([tree.tree_ for tree in grown.estimators_], 2)
    np.testing.assert_array_equal(forest.predict(np.ones((3, 1), dtype=np.float32)), np.full((3, 2), 0.25))


def test_the_ridge_fit_is_that_of_scikit_learn_at_its_penalty():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)) + 3.0
    y = x @ rng.normal(size=(4, 2)) + rng.normal(size=(60, 2))
    reference = RidgeCV(ALPHAS).fit(x, y)  # leave-one-out, which generalised cross-validation approximates
    np.testing.assert_allclose(fit_ridge(x, y).predict(x), reference.predict(x), atol=0.02)


def test_logistic_agrees_with_scikit_learn_where_scores_are_right_or_wrong():
    seen, y = planted()
    penalty = 1 / (2 * 1e-3 * len(y))  # theirs is a sum over rows and halves the square
    reference = LogisticRegression(C=penalty, tol=1e-8, max_iter=1000).fit(seen.x, y[:, 2])
    ours = Logistic.fit(seen, y, np.random.default_rng(0)).predict(seen)[:, 2]
    np.testing.assert_allclose(ours, reference.predict_proba(seen.x)[:, 1], atol=1e-3)


def test_category_scores_are_shrunk_means():
    p = np.array([[1.0, 0.0]] * 10 + [[0.0, 1.0]] * 30)
    y = np.array([[1.0, 0.0]] * 10 + [[0.0, 1.0]] * 30)
    found = Category.fit(Seen(p.astype(np.float32), p), y, np.random.default_rng(0))
    mean = [0.25, 0.75]
    np.testing.assert_allclose(found.scores[0], [(10 + 10 * mean[0]) / 20, 10 * mean[1] / 20])
    np.testing.assert_allclose(found.scores[1], [10 * mean[0] / 40, (30 + 10 * mean[1]) / 40])


def test_neighbours_of_a_small_table_are_all_of_it():
    seen, y = planted(30)
    found = Neighbours.fit(seen, y, np.random.default_rng(0)).predict(seen)
    np.testing.assert_allclose(found, np.repeat(y.mean(axis=0)[None], 30, axis=0))


def test_the_regret_of_a_choice_by_hand():
    y = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    even = torch.zeros(2, 2)
    assert regret_loss(even, y).item() == pytest.approx((0.5 + 0.0) / 2)
    odds = np.exp(SHARPNESS * 1.0)  # logits 1 apart, the right expert ahead
    assert regret_loss(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), y).item() == pytest.approx(1 / (1 + odds) / 2)
    sure = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    assert regret_loss(sure, y).item() == pytest.approx(0.0)


def test_centred_rows_have_no_mean():
    np.testing.assert_allclose(centred(np.array([[1.0, 0.0], [0.5, 0.5]])), [[0.5, -0.5], [0.0, 0.0]])


def test_training_leaves_the_generator_of_torch_alone():
    seen, y = planted(60)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    learner_class("mlp").fit(seen, y, np.random.default_rng(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_unknown_learner_is_refused_with_the_list():
    with pytest.raises(InvalidSettings, match="no learner 'boosting'; there are: category, ridge"):
        learner_class("boosting")
