"""Weights by host: all load placed, balanced, hot ones twice, members together, within the bytes of each host."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coe.errors import ConfigError
from coe.scheduler import Residency
from coe.simulation import host_plan
from coe.simulation.host_plan import HostPlan, aligned, balanced, in_place, plan_hosts


def check(plan: HostPlan, load: dict[Residency, float], bytes_of: dict[str, int], budget: int) -> None:
    """What holds for every plan."""
    total = sum(load.values())
    for host in plan.hosts:
        assert sum(bytes_of[name] for name in host) <= budget
    placed = [r for r in load if any(set(r) <= set(host) for host in plan.hosts)]
    assert sum(load[r] for r in placed) / total >= 1 - plan.missing - 1e-6
    assert sum(plan.loads) + plan.missing == pytest.approx(1.0, abs=1e-6)


def test_load_is_balanced() -> None:
    load: dict[Residency, float] = {("a",): 4, ("b",): 3, ("c",): 3, ("d",): 2}
    plan = plan_hosts(load, dict.fromkeys("abcd", 1), n_hosts=2, budget_bytes=2)
    assert plan.optimal and plan.missing == pytest.approx(0)
    assert sorted(plan.hosts) == [("a", "d"), ("b", "c")]
    assert plan.loads == pytest.approx((0.5, 0.5))


def test_a_hot_expert_has_a_copy_on_each_host_that_has_room() -> None:
    load: dict[Residency, float] = {("hot",): 8, ("a",): 1, ("b",): 1}
    plan = plan_hosts(load, {"hot": 2, "a": 1, "b": 1}, n_hosts=2, budget_bytes=3)
    assert plan.copies == {"a": 1, "b": 1, "hot": 2}
    assert plan.loads == pytest.approx((0.5, 0.5))
    cool = plan_hosts({("hot",): 1, ("a",): 1}, {"hot": 2, "a": 2}, n_hosts=2, budget_bytes=4)
    assert cool.copies == {"a": 1, "hot": 1}  # no bytes are spent on copies that balance nothing


def test_members_of_a_composed_expert_are_on_one_host() -> None:
    load: dict[Residency, float] = {("a", "b"): 5, ("a",): 1, ("c",): 5}
    plan = plan_hosts(load, {"a": 1, "b": 1, "c": 2}, n_hosts=2, budget_bytes=2)
    assert sorted(plan.hosts) == [("a", "b"), ("c",)]
    assert plan.missing == pytest.approx(0)


def test_the_least_load_is_left_out_where_not_all_fits() -> None:
    load: dict[Residency, float] = {("a",): 6, ("b",): 3, ("c",): 1, ("large",): 90}
    plan = plan_hosts(load, {"a": 2, "b": 2, "c": 2, "large": 9}, n_hosts=1, budget_bytes=4)
    assert plan.hosts == (("a", "b"),)
    assert plan.missing == pytest.approx(0.91)
    nothing = plan_hosts({("large",): 1}, {"large": 9}, n_hosts=2, budget_bytes=4)
    assert (nothing.hosts, nothing.missing) == (((), ()), 1.0)


def test_many_pairs_are_placed_greedily(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_plan, "MOST_CELLS", 3)
    load: dict[Residency, float] = {("a",): 4, ("b",): 3, ("c",): 3, ("d",): 2, ("e",): 1}
    plan = plan_hosts(load, dict.fromkeys("abcde", 1), n_hosts=2, budget_bytes=2)
    assert not plan.optimal
    assert plan.hosts == (("a", "d"), ("b", "c"))
    assert plan.missing == pytest.approx(1 / 13)


@pytest.mark.parametrize("n_hosts", [0, -1, 1_001])
def test_a_wrong_number_of_hosts_is_refused(n_hosts: int) -> None:
    with pytest.raises(ConfigError, match="is not between 1 and 1,000"):
        plan_hosts({("a",): 1}, {"a": 1}, n_hosts, 1)


def test_no_load_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no load to place"):
        plan_hosts({("a",): 0}, {"a": 1}, 1, 1)


@settings(max_examples=30, deadline=None)
@given(
    weights=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=6),
    n_hosts=st.integers(1, 3),
    budget=st.integers(4, 20),
)
def test_no_plan_exceeds_a_host_or_loses_load(weights: list[tuple[int, int]], n_hosts: int, budget: int) -> None:
    names = [f"e{i}" for i in range(len(weights))]
    bytes_of = {name: size for name, (size, _) in zip(names, weights, strict=True)}
    load: dict[Residency, float] = {(name,): load for name, (_, load) in zip(names, weights, strict=True)}
    load[tuple(dict.fromkeys((names[0], names[-1])))] = 3.0
    exact = plan_hosts(load, bytes_of, n_hosts, budget)
    check(exact, load, bytes_of, budget)
    total = sum(load.values())
    shares = {r: share / total for r, share in load.items() if sum(bytes_of[name] for name in r) <= budget}
    if shares:
        greedy = host_plan._greedy(shares, bytes_of, n_hosts, budget)
        check(greedy, load, bytes_of, budget)
        assert exact.missing <= greedy.missing + 1e-6


def test_load_is_spread_over_weights_that_stay_where_they_are() -> None:
    load: dict[Residency, float] = {("hot",): 6, ("a",): 1, ("b", "c"): 2, ("nowhere",): 1}
    plan = balanced(load, [{"hot", "a"}, {"hot", "b", "c"}, {"b"}])
    assert plan.loads == pytest.approx((0.45, 0.45, 0.0)) and plan.missing == pytest.approx(0.1)
    assert plan.hosts == (("a", "hot"), ("b", "c", "hot"), ("b",))
    assert balanced({("a",): 1}, [{"b"}, set()]).missing == 1.0
    with pytest.raises(ConfigError, match="no load"):
        balanced({("a",): 0}, [{"a"}])


@pytest.mark.parametrize("most_cells", [host_plan.MOST_CELLS, 0])
def test_what_exceeds_the_budget_of_its_host_is_not_in_memory_there(
    monkeypatch: pytest.MonkeyPatch, most_cells: int
) -> None:
    monkeypatch.setattr(host_plan, "MOST_CELLS", most_cells)
    load: dict[Residency, float] = {("a",): 4, ("b",): 3, ("c",): 2, ("d",): 1}
    plan = in_place(load, [{"a", "b", "c"}, {"d"}], dict.fromkeys("abcd", 1), budget_bytes=2)
    assert plan.hosts == (("a", "b"), ("d",)) and plan.loads == pytest.approx((0.7, 0.1))
    assert plan.missing == pytest.approx(0.2)


def test_a_plan_is_numbered_so_that_the_fewest_bytes_move() -> None:
    plan = HostPlan((("a", "b"), ("c",), ("d",)), (0.5, 0.3, 0.2), 0.0, optimal=True)
    bytes_of = {"a": 5, "b": 1, "c": 2, "d": 1}
    moved = aligned(plan, [{"c", "b"}, {"gone"}, {"a"}], bytes_of)
    assert moved.hosts == (("c",), ("d",), ("a", "b")) and moved.loads == (0.3, 0.2, 0.5)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(2, 9),
)
def test_a_plan_that_stays_in_place_is_spread_as_it_was(
    weights: list[tuple[int, int]], n_hosts: int, budget: int
) -> None:
    load: dict[Residency, float] = {(str(i),): float(share) for i, (share, _) in enumerate(weights)}
    plan = plan_hosts(load, {str(i): size for i, (_, size) in enumerate(weights)}, n_hosts, budget)
    again = balanced(load, plan.hosts)
    assert again.missing == pytest.approx(plan.missing, abs=0.01)
    assert max(again.loads) <= max(plan.loads) + 0.01
