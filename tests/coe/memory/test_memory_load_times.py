"""Predicted seconds of a load: by what was measured, the most specific first."""

import pytest

from coe.memory.load_times import LoadTimes


def test_before_any_load_a_gigabyte_takes_a_second() -> None:
    assert LoadTimes().expected_s("a", "shape", "open", 2 * 10**9) == pytest.approx(2.0)


def test_own_loads_come_before_those_of_the_shape_and_of_all() -> None:
    times = LoadTimes()
    times.note("a", "small", "open", 100, 1.0)
    times.note("b", "large", "open", 1000, 40.0)
    assert times.expected_s("a", "small", "open", 100) == pytest.approx(1.0)
    assert times.expected_s("new", "small", "open", 300) == pytest.approx(3.0)  # 0.01 s a byte
    assert times.expected_s("new", "large", "open", 1000) == pytest.approx(40.0)
    way = 0.01 + 0.3 * (0.04 - 0.01)  # the moving average over both shapes
    assert times.expected_s("new", "other", "open", 100) == pytest.approx(100 * way)


def test_a_switch_is_predicted_from_switches() -> None:
    times = LoadTimes()
    times.note("a", "small", "open", 100, 30.0)
    times.note("a", "small", "switch", 100, 0.1)
    assert times.expected_s("a", "small", "switch", 100) == pytest.approx(0.1)
    assert times.expected_s("b", "small", "switch", 200) == pytest.approx(0.2)
    assert times.expected_s("a", "small", "open", 100) == pytest.approx(30.0)


def test_recent_loads_count_more() -> None:
    times = LoadTimes()
    for seconds in (10.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        times.note("a", "small", "switch", 100, seconds)
    assert 1.0 < times.expected_s("a", "small", "switch", 100) < 2.0
