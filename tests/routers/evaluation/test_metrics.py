import numpy as np
import pytest

from routers.evaluation import metrics

SCORES = np.array([[1, 0], [1, 0], [0, 1], [0, 0.5]])
COSTS = np.array([[1, 2], [1, 2], [3, 4], [3, 4]])


def test_scores_and_costs_follow_the_picks():
    assert metrics.picked(SCORES, [0, 0, 1, 1]).tolist() == [1, 1, 1, 0.5]
    assert metrics.picked(COSTS, [0, 1, 0, 1]).tolist() == [1, 2, 3, 4]


def test_the_best_single_expert_is_the_first_of_equals():
    assert metrics.best_single([0.2, 0.7, 0.7]) == 1


def test_the_dataset_oracle_knows_the_label_and_nothing_else():
    means = {"a": np.array([0.9, 0.1]), "b": np.array([0.2, 0.3])}
    assert metrics.dataset_oracle(["b", "a", "new"], means, fallback=0).tolist() == [1, 0, 0]


def test_the_oracle_takes_the_cheapest_of_the_best():
    scores = [[1, 1, 0], [0, 0, 0]]
    assert metrics.oracle(scores).tolist() == [0, 0]
    assert metrics.oracle(scores, [[5, 2, 1], [5, 2, 1]]).tolist() == [1, 2]


def test_gap_recovered():
    assert metrics.gap_recovered(0.6, 0.5, 0.9) == pytest.approx(0.25)
    assert metrics.gap_recovered(0.4, 0.5, 0.9) == pytest.approx(-0.25)
    assert metrics.gap_recovered(0.5, 0.5, 0.5) is None


def test_gain_and_saving_relative_to_the_best_single_expert():
    assert metrics.perf_gain(0.66, 0.6) == pytest.approx(0.1)
    assert metrics.cost_save(3.0, 4.0) == 0.25
    assert metrics.perf_gain(0.5, 0.0) is None
    assert metrics.cost_save(1.0, 0.0) is None


def test_the_interval_of_a_saving_is_that_of_a_ratio():
    rng = np.random.default_rng(0)
    theirs = rng.uniform(1, 3, 4000)
    ours = theirs * 0.6
    assert metrics.bootstrap_saving(ours, theirs) == pytest.approx((0.4, 0.4))
    low, high = metrics.bootstrap_saving(rng.permutation(ours), theirs, seed=1)
    # delta method: the saving's variance is that of (ours - .6 theirs) / 2 over n
    width = 1.96 * np.sqrt(2 * 0.36 / 3) / 2 / np.sqrt(4000)
    assert (low, high) == pytest.approx((0.4 - width, 0.4 + width), abs=0.003)
    assert metrics.bootstrap_saving([1.0, 1.0], [0.0, 1.0]) is None
    assert metrics.bootstrap_saving([1.0, 1.0], [0.0, 0.0]) is None
    assert metrics.bootstrap_saving([1.0], [2.0]) == (0.5, 0.5)


def test_the_bootstrap_interval_is_that_of_the_normal_law_on_many_queries():
    rng = np.random.default_rng(0)
    difference = rng.normal(0.1, 1.0, size=4000)
    low, high = metrics.paired_bootstrap(difference, np.zeros(4000), seed=1)
    centre, width = difference.mean(), 1.96 * difference.std() / np.sqrt(4000)
    assert low == pytest.approx(centre - width, abs=0.003)
    assert high == pytest.approx(centre + width, abs=0.003)


def test_the_bootstrap_is_paired_and_seeded():
    ours = np.random.default_rng(0).random(50)
    assert metrics.paired_bootstrap(ours + 0.25, ours) == pytest.approx((0.25, 0.25))
    assert metrics.paired_bootstrap(ours, ours[::-1], seed=3) == metrics.paired_bootstrap(ours, ours[::-1], seed=3)
    assert metrics.paired_bootstrap(ours, ours[::-1], seed=3) != metrics.paired_bootstrap(ours, ours[::-1], seed=4)


def test_a_narrow_level_lies_inside_a_wide_one(monkeypatch):
    monkeypatch.setattr(metrics, "_CELLS_PER_BATCH", 100)  # many batches
    ours, theirs = np.random.default_rng(0).random((2, 30))
    wide, narrow = (metrics.paired_bootstrap(ours, theirs, level=level) for level in (0.95, 0.5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_calibration_error_by_hand():
    # two bins of two: |0.15 - 0.5| and |0.85 - 1|
    assert metrics.expected_calibration_error([0.1, 0.2, 0.8, 0.9], [0, 1, 1, 1], bins=2) == pytest.approx(0.25)


def test_equal_confidences_share_a_bin():
    confidence, correct = np.full(100, 0.7), np.array([0] * 30 + [1] * 70)
    assert metrics.expected_calibration_error(confidence, correct) == pytest.approx(0)


def test_bins_of_equal_mass_keep_equal_values_together():
    assert metrics.mass_bins([4, 1, 3, 2], 2).tolist() == [1, 0, 1, 0]
    assert len(set(metrics.mass_bins([0.7, 0.7, 0.7, 0.7], 4).tolist())) == 1


def test_expert_use_is_sorted_and_leaves_out_the_unused():
    assert list(metrics.expert_use([2, 0, 2, 2], ["a", "b", "c"]).items()) == [("c", 0.75), ("a", 0.25)]
