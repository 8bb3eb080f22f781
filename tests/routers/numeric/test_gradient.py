"""Gradient descent: deterministic, stops at the best epoch, and leaves torch's state unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from routers.errors import InvalidSettings
from routers.numeric.gradient import PATIENCE, Schedule, as_arrays, descend, one_thread, random_tensor, split_rows

SCHEDULE = Schedule(learning_rate=0.1, weight_decay=0.0, epochs=60, batch=8)
TARGETS = torch.arange(32, dtype=torch.float32) / 32


def middle(seed=0, **kwargs):
    """Fit one number to the targets: its best value is their mean."""
    parameters = {"a": random_tensor((1,), 1.0, np.random.default_rng(seed))}
    done = descend(parameters, lambda rows: ((parameters["a"] - TARGETS[rows]) ** 2).mean(), np.arange(32), SCHEDULE,
                   seed, **kwargs)  # fmt: skip
    return float(as_arrays(parameters)["a"][0]), done


def test_it_descends_and_repeats_itself():
    value, done = middle()
    assert value == pytest.approx(TARGETS.mean().item(), abs=0.05)
    assert done == SCHEDULE.epochs
    assert middle() == (value, done)
    assert middle(seed=1)[0] != value


def test_it_keeps_the_parameters_of_the_best_check_and_stops_after_it():
    seen, values = [], iter([3.0, 1.0, *range(2, 90)])
    parameters = {"a": random_tensor((1,), 1.0, np.random.default_rng(0))}

    def check():
        seen.append(parameters["a"].item())
        return next(values)

    done = descend(parameters, lambda rows: (parameters["a"] ** 2).mean(), np.arange(32), SCHEDULE, 0, check=check)
    assert done == 2
    assert len(seen) == 2 + PATIENCE
    assert parameters["a"].item() == seen[1]


def test_rows_are_split_without_loss():
    rows, held = split_rows(50, 3)
    assert sorted([*rows, *held]) == list(range(50))
    assert len(held) == 10
    assert [part.tolist() for part in split_rows(1, 0)] == [[0], [0]]


def test_one_thread_is_given_back():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ((0.0, 0.0, 5), "learning_rate must be positive"),
        ((0.1, -1.0, 5), "weight_decay must be at least 0"),
        ((0.1, 0.0, 0), "epochs must be at least 1"),
        ((0.1, 0.0, 5, 0), "batch must be at least 1"),
    ],
)
def test_a_schedule_that_makes_no_sense(values, problem):
    with pytest.raises(InvalidSettings, match=problem):
        Schedule(*values)
