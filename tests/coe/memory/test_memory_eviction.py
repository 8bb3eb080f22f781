"""Which experts each policy evicts, from values alone; Belady's policy is `look_ahead` with full knowledge."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coe.memory import POLICIES, Demand, EvictionPolicy, RecentMix, Resident, gdsf, look_ahead, lru
from coe.memory.eviction import victims
from coe.simulation.bound import fewest_loads


def names(residents: object) -> str:
    return "".join(each.name for each in residents)  # type: ignore[attr-defined]


def test_lru_orders_by_last_use_and_then_by_name() -> None:
    assert names(lru([Resident("a", 1, 2.0, 0), Resident("c", 1, 1.0, 0), Resident("b", 1, 1.0, 0)])) == "bca"


def test_gdsf_weighs_requests_and_load_seconds_by_bytes() -> None:
    def of(name: str, size: int, load_s: float, per_s: float) -> Resident:
        return Resident(name, size, 0.0, 1, load_s, Demand(per_s=per_s))

    # Requests per second * load seconds / bytes: rare 0.01, large 0.02, quick 0.05, common 0.1.
    each = [of("common", 10, 1.0, 1.0), of("quick", 10, 0.5, 1.0), of("large", 50, 1.0, 1.0), of("rare", 10, 1.0, 0.1)]
    assert [resident.name for resident in gdsf(each)] == ["rare", "large", "quick", "common"]


def test_look_ahead_evicts_what_is_needed_last_and_first_what_is_not_needed() -> None:
    def of(name: str, next_use_s: float) -> Resident:
        return Resident(name, 1, 0.0, 1, 0.0, Demand(next_use_s))

    assert names(look_ahead([of("a", 3.0), of("b", 9.0), Resident("c", 1, 0.0, 1), of("d", 1.0)])) == "cbad"


@pytest.mark.parametrize("policy", POLICIES.values())
@given(
    residents=st.lists(
        st.builds(
            Resident,
            st.text("abc", min_size=1, max_size=3),
            st.integers(0, 100),
            st.floats(0, 100),
            st.integers(0, 9),
            st.floats(0, 10),
            st.builds(Demand, st.floats(0, 100), st.floats(0, 10)),
        ),
        unique_by=lambda resident: resident.name,
        max_size=6,
    ),
    need=st.integers(0, 300),
)
def test_every_policy_frees_enough_and_nothing_in_vain_whatever_the_order(
    policy: EvictionPolicy, residents: list[Resident], need: int
) -> None:
    assert sorted(names([each]) for each in policy(residents)) == sorted(each.name for each in residents)
    assert policy(residents) == policy(residents[::-1])  # deterministic
    chosen = victims(residents, need, policy)
    if chosen is None:
        assert sum(each.size_bytes for each in residents) < need
    else:
        freed = sum(each.size_bytes for each in chosen)
        assert freed >= need or not need
        assert all(freed - each.size_bytes < need for each in chosen)


def test_recent_requests_count_half_after_each_half_life() -> None:
    mix = RecentMix(half_life_s=10.0)
    mix.note(["a", "b"], 0.0)
    mix.note(["a"], 10.0)
    assert mix.per_s("a", 10.0) == pytest.approx(3 * mix.per_s("b", 10.0))
    assert mix.per_s("a", 20.0) == pytest.approx(mix.per_s("a", 10.0) / 2)
    assert mix.per_s("c", 20.0) == 0.0


def fewest_by_trying(order: str, room: int) -> int:
    """The fewest loads of any evictions."""
    states = {frozenset[str](): 0}
    for name in order:
        after: dict[frozenset[str], int] = {}
        for held, loads in states.items():
            if name in held:
                options = [(held, loads)]
            elif len(held) < room:
                options = [(held | {name}, loads + 1)]
            else:
                options = [(held - {victim} | {name}, loads + 1) for victim in held]
            for state, cost in options:
                after[state] = min(cost, after.get(state, cost))
        states = after
    return min(states.values())


def by_look_ahead(order: str, room: int) -> int:
    """Loads of the policy of the Host when it knows the order."""
    held: set[str] = set()
    loads = 0
    for position, name in enumerate(order):
        if name in held:
            continue
        loads += 1
        if len(held) == room:
            nexts = {each: order.find(each, position) for each in held}
            demand = {each: Demand() if at < 0 else Demand(float(at)) for each, at in nexts.items()}
            residents = [Resident(each, 1, 0.0, 0, 0.0, demand[each]) for each in sorted(held)]
            held.remove(look_ahead(residents)[0].name)
        held.add(name)
    return loads


@settings(max_examples=100, deadline=None)
@given(order=st.text("abcdef", max_size=14), room=st.integers(1, 4))
def test_with_full_knowledge_look_ahead_has_the_fewest_loads_of_all_evictions(order: str, room: int) -> None:
    least = fewest_by_trying(order, room)
    assert fewest_loads([(name,) for name in order], dict.fromkeys("abcdef", 1), room) == least
    assert by_look_ahead(order, room) == least


def test_the_fewest_loads_of_unequal_sizes_and_of_several_weights_keep_to_the_budget() -> None:
    sizes = {"a": 2, "b": 1, "c": 1}
    assert fewest_loads([("a",), ("b",), ("c",), ("a",)], sizes, 2) == 4
    assert fewest_loads([("a",), ("b",), ("c",), ("a",)], sizes, 4) == 3
    assert fewest_loads([("b", "c"), ("a",), ("b", "c")], sizes, 2) == 5
    assert [fewest_loads([tuple(pair) for pair in itertools.permutations("abc", 2)], sizes, 4)] == [3]
