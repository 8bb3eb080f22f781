"""Classifiers, neighbours, cross-fitting and the choice of thresholds, on data small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest

from routers.numeric.abstention import Doubt, Thresholds, normalised_entropy, tune_thresholds
from routers.numeric.classifiers import ClassifierSettings, fit_classifier, fit_temperature, probabilities, restore
from routers.numeric.cross_fit import category_folds, cross_fit, left_out_categories
from routers.numeric.neighbours import nearest_distance, quantiles, self_distances, share_nearer, top_k


def blobs(n=90, n_classes=3, noise=0.4, seed=0):
    """n unit vectors around n_classes axes."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    x = np.eye(8)[y] + noise * rng.normal(size=(n, 8))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), y


@pytest.mark.parametrize("n_classes", [1, 2, 3])
@pytest.mark.parametrize("name", ["logistic", "linear-svm", "knn"])
def test_each_classifier_learns_and_is_restored_to_the_bit(name, n_classes):
    x, y = blobs(n_classes=n_classes)
    model = fit_classifier(ClassifierSettings(name), x, y)
    logits = model.logits(x)
    assert logits.shape == (90, n_classes)
    assert (logits.argmax(axis=1) == y).mean() > 0.85
    assert np.array_equal(restore(model.arrays(), x).logits(x), logits)


def test_two_classes_are_those_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    x, y = blobs(n_classes=2)
    ours = probabilities(fit_classifier(ClassifierSettings(c=2.0), x, y).logits(x), 1.0)
    assert ours == pytest.approx(LogisticRegression(C=2.0).fit(x, y).predict_proba(x), abs=1e-3)


def test_neighbour_votes_are_smoothed_by_the_frequencies():
    x, y = blobs(noise=0.01)
    logits = fit_classifier(ClassifierSettings("knn", k=4), x, y).logits(x[:1])
    assert np.exp(logits[0]) == pytest.approx([(4 + 1 / 3) / 5, (1 / 3) / 5, (1 / 3) / 5])


def test_the_temperature_undoes_overconfidence():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3))
    y = np.array([rng.choice(3, p=p) for p in probabilities(logits, 1.0)])
    assert fit_temperature(logits, y) == pytest.approx(1.0, abs=0.1)
    assert fit_temperature(5 * logits, y) == pytest.approx(5.0, abs=0.5)
    assert fit_temperature(logits[:, :1], y * 0) == 1.0
    assert fit_temperature(logits[:0], y[:0]) == 1.0


def test_top_k_is_exact_and_ties_go_to_the_earlier_row():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(700, 8)).astype(np.float32)
    vectors = x[:400]
    similarities, rows = top_k(x, vectors, 5)  # more queries than one block
    expected = np.argsort(-(x @ vectors.T), axis=1, kind="stable")[:, :5]
    assert np.array_equal(rows, expected)
    assert np.allclose(similarities, np.take_along_axis(x @ vectors.T, expected, axis=1), atol=1e-5)
    same = np.ones((6, 2), dtype=np.float32) / np.float32(np.sqrt(2))
    assert sorted(top_k(same[:1], same, 6)[1][0].tolist()) == [0, 1, 2, 3, 4, 5]
    assert top_k(same[:1], same, 6)[1][0].tolist() == [0, 1, 2, 3, 4, 5]


def test_distances_and_their_distribution():
    x = np.eye(3, dtype=np.float32)
    assert nearest_distance(x, x).tolist() == [0, 0, 0]
    assert nearest_distance(-x[:1], x[:1]).tolist() == [2.0]
    assert self_distances(x).tolist() == [1, 1, 1]
    assert self_distances(x[:1]).tolist() == [2.0]
    known = quantiles(np.linspace(0, 1, 1001))
    assert share_nearer(np.array([-0.1, 0.5, 1.1]), known) == pytest.approx([0, 0.5, 1], abs=0.01)


def test_entropy_is_normalised():
    p = np.array([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])
    assert normalised_entropy(p) == pytest.approx([0, 1, 0.5])
    assert normalised_entropy(np.ones((2, 1))).tolist() == [0, 0]


def test_folds_are_even_within_each_category_and_lone_rows_are_never_held_out():
    y = np.array([0] * 11 + [1] * 5 + [2])
    folds = category_folds(y, np.random.default_rng(0))
    assert sorted(np.bincount(folds[:11])) == [2, 2, 2, 2, 3]
    assert sorted(folds[11:16]) == [0, 1, 2, 3, 4]
    assert folds[16] == -1
    rare = category_folds(np.array([0, 0, 1, 1, 2, 2, 2]), np.random.default_rng(0))
    assert all(len(set(rare[rows])) == len(rare[rows]) for rows in (slice(0, 2), slice(2, 4), slice(4, 7)))


def test_cross_fitting_predicts_each_row_without_training_on_it():
    x, y = blobs(noise=0.01)
    x[0], y[0] = x[1], 0  # a mislabelled row: a classifier that had seen it would not be so sure
    found = cross_fit(ClassifierSettings("knn", k=1), x, y, np.random.default_rng(0))
    assert found.rows.tolist() == list(range(90))
    assert found.logits[0].argmax() == 1
    members = found.memberships(y)
    assert members.shape == (90, 3)
    assert members[0].argmax() == 1
    assert (members.sum(axis=0) > 0).all()


def test_left_out_categories_look_out_of_distribution():
    x, y = blobs(noise=0.05)
    settings, rng = ClassifierSettings(), np.random.default_rng(0)
    familiar = cross_fit(settings, x, y, rng)
    outside = left_out_categories(settings, x, y, familiar.temperature, rng)
    assert len(outside) == 90
    assert outside.distance.min() > familiar.distance.max()
    assert outside.entropy.mean() > familiar.doubt().entropy.mean()
    assert len(left_out_categories(settings, x, np.zeros(90, dtype=int), 1.0, rng)) == 0


INSIDE = Doubt(np.linspace(0, 0.5, 100), np.linspace(0, 0.2, 100))
OUTSIDE = Doubt(np.full(10, 0.9), np.full(10, 0.1))


def test_thresholds_catch_ood_prompts_and_spare_the_familiar():
    found = tune_thresholds(INSIDE, OUTSIDE, np.zeros(100), max_abstain=0.05)
    assert found.exceeded(OUTSIDE).all()
    assert not found.exceeded(INSIDE).any()  # of pairs that catch equally many, the one that rejects fewest
    assert found.explain(0.9, 0.1) == f"entropy of the categories 0.900 > {found.entropy:.3f}"


def test_thresholds_never_cost_score():
    inside = Doubt(np.linspace(0, 0.5, 100), np.zeros(100))
    outside = Doubt(np.full(10, 0.49), np.zeros(10))
    free = tune_thresholds(inside, outside, np.zeros(100), max_abstain=0.05)
    assert free.exceeded(outside).all()
    assert 0 < free.exceeded(inside).mean() <= 0.05
    dear = tune_thresholds(inside, outside, np.full(100, -0.1), max_abstain=0.05)
    assert not dear.exceeded(inside).any()
    assert not dear.exceeded(outside).any()


def test_without_ood_prompts_the_distance_alone_decides():
    nothing = Doubt(np.zeros(0), np.zeros(0))
    found = tune_thresholds(INSIDE, nothing, np.zeros(100), max_abstain=0.05)
    assert found.entropy == np.inf
    assert found.exceeded(INSIDE).mean() == pytest.approx(0.05, abs=0.011)
    assert Thresholds().exceeded(INSIDE).sum() == 0
