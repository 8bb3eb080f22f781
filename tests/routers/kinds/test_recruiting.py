"""The source's formulas, against numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from routers.kinds.skill.recruiting import (
    competency,
    kept_after_trimming,
    profiles,
    recruiting_weights,
    share_of,
    stated,
    suitability,
    without_skills,
)


def test_a_profile_adds_one_for_every_right_and_takes_one_for_every_wrong_answer():
    skills = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])  # algebra; algebra and optics; optics
    scores = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert profiles(scores, skills).tolist() == [[2.0, -2.0], [0.0, 0.0]]
    assert profiles(np.array([[0.75, 0.5]]), np.array([[1.0, 0.0]])).tolist() == [[0.5, 0.0], [0.0, 0.0]]


def test_suitability_is_the_sum_of_the_profile_over_the_skills():
    profile = np.array([[4.0, -2.0], [1.0, 3.0]])
    counts = np.array([[1.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    assert suitability(counts, profile).tolist() == [[5.0, 1.0], [2.0, 6.0], [0.0, 0.0]]
    assert suitability(share_of(counts), profile).tolist() == [[2.5, 0.5], [1.0, 3.0], [0.0, 0.0]]


def test_competency_goes_with_the_square_of_the_profile_summed_up():
    profile = np.array([[3.0, 1.0, 0.0], [1.0, 1.0, 0.0]])  # sums 4, 2, 0
    assert competency(profile, 0.5) == pytest.approx([16 / 20, 4 / 20, 0.0])
    assert competency(profile, 1.0) == pytest.approx([4 / 6, 2 / 6, 0.0])


def test_competencies_are_shifted_where_one_is_negative():
    assert competency(np.array([[2.0, -1.0]]), 0.5) == pytest.approx([16 / 17, 1 / 17])  # 2 + 1 + 1, -1 + 1 + 1
    assert competency(np.array([[-5.0, -7.0]]), 0.5) == pytest.approx([9 / 10, 1 / 10])  # all are


def test_competencies_without_any_difference_are_equal():
    assert competency(np.zeros((2, 4)), 0.5).tolist() == [0.25] * 4
    assert competency(np.array([[1e200, 1e200]]), 0.001) == pytest.approx([0.5, 0.5])


def test_weights_are_suitability_times_competency_of_those_who_are_suitable():
    weights = recruiting_weights(np.array([[4.0, 2.0, -3.0, 0.0]]), np.array([0.25, 0.5, 0.2, 0.05]))
    assert weights[0] == pytest.approx([0.5, 0.5, 0.0, 0.0])


def test_if_no_expert_is_suitable_all_are_shifted():
    weights = recruiting_weights(np.array([[-4.0, -2.0], [0.0, 0.0]]), np.array([0.5, 0.5]))
    assert weights == pytest.approx(np.array([[1 / 4, 3 / 4], [0.5, 0.5]]))


def test_who_is_not_kept_is_not_there():
    kept = np.array([False, True, True])
    local, gamma = np.array([[9.0, -1.0, -3.0], [-9.0, 1.0, 3.0]]), np.array([0.5, 0.25, 0.25])
    # without the first expert no other is suitable for the first query: shifted to 3 and 1
    assert recruiting_weights(local, gamma, kept) == pytest.approx(np.array([[0, 3 / 4, 1 / 4], [0, 1 / 4, 3 / 4]]))


def test_who_is_not_suitable_stands_in_reserve():
    local, gamma = np.array([[4.0, -1.0, 0.0], [-1.0, -2.0, -3.0]]), np.array([0.5, 0.25, 0.25])
    weights = recruiting_weights(local, gamma, reserve=True)
    # shifted by -min + 1 those in reserve of the first query are 1 and 2
    assert weights[0] == pytest.approx([1.0, 1e-6 / 3, 2e-6 / 3], rel=1e-5)
    assert weights.sum(axis=1) == pytest.approx([1.0, 1.0])
    assert weights[1] == pytest.approx(recruiting_weights(local, gamma)[1])
    assert recruiting_weights(local, gamma, np.array([True, False, True]), reserve=True)[0, 1] == 0.0


def test_a_reserve_never_outweighs_who_is_suitable():
    local, gamma = (
        np.array([[4.0, 1.0, -1.0]]),
        np.array([0.5, 1e-8, 0.5]),
    )  # the second is suitable, but weak elsewhere
    ours, weak, spare = recruiting_weights(local, gamma, reserve=True)[0]
    assert ours > weak > spare > 0


def test_suitable_experts_without_any_competency_are_weighed_by_suitability_alone():
    assert recruiting_weights(np.array([[3.0, 1.0, 0.0]]), np.array([0.0, 0.0, 1.0]))[0] == pytest.approx(
        [0.75, 0.25, 0]
    )


def test_without_skills_the_competencies_decide_or_nothing_does():
    gamma = np.array([0.6, 0.3, 0.1])
    assert without_skills(gamma, np.ones(3, dtype=bool), "competency") == pytest.approx(gamma)
    assert without_skills(gamma, np.array([True, False, True]), "uniform").tolist() == [0.5, 0.0, 0.5]
    assert without_skills(np.array([1.0, 0.0, 0.0]), np.array([False, True, True]), "competency").tolist() == [
        0,
        0.5,
        0.5,
    ]


def test_experts_who_are_seldom_recruited_are_trimmed():
    first = [0.7, 0.2, 0.1, 0.0]
    second = [0.7, 0.1, 0.0, 0.2]
    weights = np.array([first] * 9 + [second])  # two recruits each: the last expert for one query in ten
    assert kept_after_trimming(weights, 2, 0.05).tolist() == [True, True, False, True]
    assert kept_after_trimming(weights, 2, 0.11).tolist() == [True, True, False, False]
    assert kept_after_trimming(weights, 4, 1.0).all()


def test_trimming_leaves_as_many_as_are_recruited():
    assert kept_after_trimming(np.array([[0.6, 0.3, 0.1]]), 2, 1.0).tolist() == [True, True, False]
    assert kept_after_trimming(np.array([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]]), 1, 1.0).tolist() == [True, False, True]


def test_trimming_does_not_depend_on_the_order_of_the_experts():
    rng = np.random.default_rng(0)
    weights = np.round(rng.random((50, 6)), 1)
    order = rng.permutation(6)
    kept = kept_after_trimming(weights, 3, 0.4)
    assert kept_after_trimming(weights[:, order], 3, 0.4).tolist() == kept[order].tolist()


def test_a_reason_names_skills_and_shares():
    skills = [("optics", 0.5), ("algebra", 0.3), ("law", 0.1), ("music", 0.1)]
    assert stated(skills[:2], "m1", "is best") == "needs optics 50%, algebra 30%: m1 is best"
    assert stated(skills, "m1", "is best") == "needs optics 50%, algebra 30%, law 10% and 1 more: m1 is best"
    assert stated([], "m1", "is best", ["zorp"]) == "none of 'zorp' is a known skill: m1 is best"
    assert stated([], "m1", "is best") == "no skill is known: m1 is best"
