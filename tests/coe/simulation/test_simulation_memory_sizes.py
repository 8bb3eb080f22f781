"""Sizes of memory for a workload: which are tried, and what they gain."""

import pytest

from coe.simulation.compare import Comparison
from coe.simulation.memory_sizes import memory_sizes, sizes_to_try
from coe.simulation.workload import Machine, Workload


def workload(names: str, bytes_of: dict[str, int], gap_s: float = 100.0) -> Workload:
    experts = sorted(bytes_of)
    n = len(names)
    return Workload(
        [(name,) for name in experts],
        bytes_of,
        [gap_s * i for i in range(n)],
        [experts.index(name) for name in names],
        [1] * n,
        [1] * n,
    )


COMPARISON = Comparison(Machine(1, bytes_per_s=1.0))


def test_sizes_go_from_the_largest_expert_to_all_that_are_used() -> None:
    assert sizes_to_try(workload("aaabbc", {"a": 3, "b": 4, "c": 5, "unused": 100})) == [5, 7, 12]
    many = {f"{i:02}": 1 for i in range(40)}
    index = Workload(
        [(name,) for name in many], many, [float(i) for i in range(40)], list(range(40)), [1] * 40, [1] * 40
    )
    found = sizes_to_try(index, most=5)
    assert found[0] == 1 and found[-1] == 40 and len(found) == 5


def test_a_composed_expert_needs_the_room_of_all_its_members() -> None:
    both = Workload([("a", "b"), ("a",)], {"a": 3, "b": 4}, [0.0, 1.0], [0, 1], [1, 1], [1, 1])
    assert sizes_to_try(both) == [7]


def test_hits_and_waits_by_size() -> None:
    load = workload("ababab", {"a": 10, "b": 10})
    one, two = memory_sizes(COMPARISON, load, [10, 20])
    assert (one.loads, one.hit_rate, one.best_hit_rate) == (6, 0.0, 0.0)
    assert (two.loads, two.hit_rate, two.best_hit_rate) == (2, pytest.approx(4 / 6), pytest.approx(4 / 6))
    assert one.ttft_p95_s == pytest.approx(10, abs=0.1) and two.ttft_p95_s < one.ttft_p95_s + 1e-9


def test_the_best_hits_are_those_of_belady() -> None:
    load = workload("abcabcabc", {"a": 1, "b": 1, "c": 1})
    [found] = memory_sizes(COMPARISON, load, [2])
    assert found.best_hit_rate == pytest.approx(3 / 9)  # a and b stay while c replaces the one needed last
    assert found.hit_rate <= found.best_hit_rate
