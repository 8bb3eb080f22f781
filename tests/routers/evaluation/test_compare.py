import numpy as np
import pytest

from routers.errors import InvalidOutcomes
from routers.evaluation.compare import compare, row_of_picks
from routers.evaluation.summary import ReportRow
from routers.outcomes.table import OutcomeTable

TABLE = OutcomeTable(
    query_ids=("1", "2", "3", "4"),
    prompts=("p", "q", "r", "s"),
    experts=("a", "b"),
    scores=np.array([[1, 0], [0, 1], [0, 1], [1, 0.5]]),
    costs_usd=np.array([[1, 10], [1, 10], [2, 20], [2, 20]]),
)


def test_a_comparison_by_hand():
    ours = row_of_picks(TABLE, {"1": "a", "2": "b", "3": "a", "4": "b"}, source="mine")
    theirs = row_of_picks(TABLE, dict.fromkeys("1234", "a"), source="theirs")
    found = compare("mine", ours, "theirs", theirs)
    assert (found.router, found.reference, found.n_queries) == ("mine", "theirs", 4)
    assert found.accuracy == 0.625
    assert found.gain == 0.125  # 0, +1, 0, -.5
    assert (found.wins, found.losses, found.ties) == (1, 1, 2)
    assert found.gain_ci95_low < found.gain < found.gain_ci95_high
    assert (found.mean_cost, found.cost_gain) == (8.25, 6.75)
    assert found.cost_gain_ci95_low >= 0


def test_the_interval_is_that_of_the_paired_difference():
    rng = np.random.default_rng(0)
    theirs = rng.random(2000)
    found = compare("x", ReportRow(theirs + 0.1, None), "y", ReportRow(theirs, None))
    assert (found.gain_ci95_low, found.gain_ci95_high) == pytest.approx((0.1, 0.1))
    assert (found.mean_cost, found.cost_gain, found.cost_gain_ci95_low) == (None, None, None)


def test_a_refused_query_scores_and_costs_nothing():
    row = row_of_picks(TABLE, {"1": None, "2": "b", "3": "b", "4": "b", "other": "a"}, source="x")
    assert row.scores.tolist() == [0, 1, 1, 0.5]
    assert row.costs.tolist() == [0, 10, 20, 20]


def test_picks_that_do_not_fit_the_table():
    with pytest.raises(InvalidOutcomes, match="x has no pick for 2 of 4 queries, for example '3'"):
        row_of_picks(TABLE, {"1": "a", "2": "a"}, source="x")
    with pytest.raises(InvalidOutcomes, match="x picks experts that are not in the table: z"):
        row_of_picks(TABLE, dict.fromkeys("1234", "z"), source="x")
