"""The classifier of the probe: folds do not leak, and the narrowed regression is the whole one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from coe.errors import TaskError
from coe.latent.probe.held_out import (
    STRENGTH,
    Standardising,
    _narrowed,
    check_groups,
    from_states,
    from_texts,
    grouped_folds,
)


def test_a_group_is_in_one_fold_and_labels_are_spread() -> None:
    rng = np.random.default_rng(0)
    groups = [f"g{i // 3}" for i in range(180)]
    y = np.repeat(rng.permutation([0, 1] * 30), 3)
    folds = grouped_folds(y, groups, 5, seed=3)
    assert all(len({folds[i] for i in range(180) if groups[i] == group}) == 1 for group in set(groups))
    for fold in range(5):
        assert (folds == fold).sum() == 36 and abs(y[folds == fold].mean() - 0.5) < 0.1
    assert not np.array_equal(folds, grouped_folds(y, groups, 5, seed=4))
    np.testing.assert_array_equal(folds, grouped_folds(y, groups, 5, seed=3))


def test_copies_of_a_row_with_a_random_label_are_not_recognised() -> None:
    """Random labels of 40 words, three equal rows each: without groups all would be predicted right."""
    rng = np.random.default_rng(1)
    y, words = np.repeat(rng.permutation([0, 1] * 20), 3), np.repeat(rng.normal(size=(40, 64)), 3, axis=0)
    states, groups = words.astype(np.float32), [f"g{i // 3}" for i in range(120)]
    right = from_states(states, y, grouped_folds(y, groups, 5, seed=0)).mean()
    leaked = from_states(states, y, grouped_folds(y, [str(i) for i in range(120)], 5, seed=0)).mean()
    assert right < 0.7 and leaked > 0.95


def test_rows_of_a_fold_do_not_change_how_its_other_rows_are_predicted() -> None:
    rng = np.random.default_rng(2)
    y, states = rng.integers(0, 2, 60), rng.normal(size=(60, 8)).astype(np.float32)
    states[:, 0] += 0.7 * y
    folds = np.arange(60) % 4
    before = from_states(states, y, folds)
    assert 0 < before.mean() < 1
    changed = states.copy()
    changed[0] = 1e6  # would shift the mean and deviation of all rows, and the classifier
    after = from_states(changed, y, folds)
    same = (folds == folds[0]) & (np.arange(60) != 0)
    np.testing.assert_array_equal(before[same], after[same])


def test_planted_directions_are_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(3)
    y = rng.permutation([0, 1, 2] * 40)
    noise = rng.normal(size=(120, 300)).astype(np.float32)
    planted = noise.copy()
    planted += rng.normal(size=(3, 300)).astype(np.float32)[y]
    folds = grouped_folds(y, [str(i) for i in range(120)], 5, seed=0)
    assert from_states(planted, y, folds).mean() > 0.9
    assert from_states(noise, y, folds).mean() < 0.5
    assert from_states(planted * 1e-3 + 50, y, folds).mean() > 0.9  # whatever the scale


def test_the_narrowed_regression_is_that_of_all_dimensions() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(4)
    x, new, y = rng.normal(size=(30, 90)), rng.normal(size=(10, 90)), rng.permutation([0, 1, 2] * 10)
    narrow, narrow_new = _narrowed(x, new)
    assert narrow.shape == (30, 30)
    fits = [LogisticRegression(C=STRENGTH, tol=1e-8, max_iter=5000).fit(each, y) for each in (x, narrow)]
    whole, narrowed = (fit.predict_proba(each) for fit, each in zip(fits, (new, narrow_new), strict=True))
    np.testing.assert_allclose(whole, narrowed, atol=1e-3)


def test_a_text_that_states_its_label_is_read() -> None:
    y = np.array([0, 1] * 30)
    folds = np.arange(60) // 2 % 5
    assert from_texts([f"row {i} is {'good' if label else 'bad'}" for i, label in enumerate(y)], y, folds).mean() == 1
    assert from_texts(["the same text"] * 60, y, folds).mean() <= 0.5


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (["a"] * 10, "all rows have the label 'a'"),
        (["a"] * 10 + ["b"] * 2, "with 3 folds.*'b' has 2. Add rows, leave these labels out, or use --folds 2"),
        (["a"] * 10 + ["b"], "'b' has 1. Add rows, leave these labels out$"),
        ([f"l{i}" for i in range(9)] + ["a"] * 9, "and 4 more labels"),
        ([str(i) for i in range(201)], "201 labels, more than 200"),
    ],
)
def test_labels_that_cannot_be_probed(labels: list[str], text: str) -> None:
    with pytest.raises(TaskError, match=text):
        check_groups(labels, [str(i) for i in range(len(labels))], 3)


def test_rows_of_one_group_count_once() -> None:
    check_groups(["a", "b"] * 3, list("uvwxyz"), 3)
    with pytest.raises(TaskError, match="'b' has 2"):
        check_groups(["a", "b"] * 3, list("uvwxyv"), 3)


def test_standardising_keeps_constant_dimensions_finite() -> None:
    values = np.array([[1.0, 5.0], [3.0, 5.0]], np.float32)
    scaled = Standardising.of(values)(values)
    np.testing.assert_allclose(scaled, [[-1, 0], [1, 0]], atol=2e-4)
    assert math.isfinite(scaled.sum())
