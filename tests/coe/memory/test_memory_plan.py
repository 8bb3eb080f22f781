"""One plan over slots and copies: what is parked, closed, read ahead and forgotten; found if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from coe.memory.demand import Demand
from coe.memory.eviction import EvictionPolicy, Resident, gdsf, look_ahead, lru
from coe.memory.plan import Action, Copies, Device, Drop, Forget, Open, Park, Prefetch, State, Switch, plan
from coe.memory.room import Need, OpenSlot

SLOT, KEPT = 3, 2  # bytes of a slot, and of one that is parked


def need(shape: str, weights: int = 4, *, parks: bool = True, copy: int = 0) -> Need:
    return Need(shape, weights, SLOT, 2, parked_bytes=KEPT if parks else None, copy_bytes=copy)


def serving(key: int, shape: str, weights: int = 4, *, parks: bool = True, copy: int = 0) -> OpenSlot:
    each = need(shape, weights, parks=parks, copy=copy)
    return OpenSlot(key, each, Resident(f"r{key}", each.size_bytes, key, 1))


def parked(key: int, shape: str) -> OpenSlot:
    each = replace(need(shape), weight_bytes=0, slot_bytes=KEPT)
    return OpenSlot(key, each, Resident(f"p{key}", KEPT, key, 1), is_parked=True)


def planned(
    wanted: dict[str, Need],
    *free: OpenSlot,
    free_bytes: int = 0,
    most_parked: int = 2,
    copies: Copies = Copies(),  # noqa: B008 (frozen)
    policy: EvictionPolicy = lru,
) -> tuple[Action, ...] | None:
    opened: dict[object, int] = {}
    for slot in free:
        opened[slot.need.shape] = opened.get(slot.need.shape, 0) + 1
    return plan(State(Device(free, opened, free_bytes, most_parked), copies), wanted, policy=policy)


def test_a_victim_of_another_shape_is_parked_where_its_weights_suffice() -> None:
    victim = serving(1, "x", 9)
    assert planned({"a": need("y")}, victim) == (Park(victim), Open("a"))
    assert planned({"a": need("y", 8)}, victim) == (Drop(victim), Open("a")), "its process is in the way"
    assert planned({"a": need("y")}, victim, most_parked=0) == (Drop(victim), Open("a"))
    cannot = serving(1, "x", 9, parks=False)
    assert planned({"a": need("y")}, cannot) == (Drop(cannot), Open("a"))


def test_an_expert_of_its_shape_takes_a_parked_slot_and_counts_all_of_its_weights() -> None:
    asleep, victim = parked(1, "x"), serving(2, "y", 9)
    assert planned({"a": need("x")}, asleep, victim, free_bytes=5) == (Switch("a", asleep),)
    assert planned({"a": need("x")}, asleep, victim, free_bytes=4) == (Park(victim), Switch("a", asleep))


def test_the_policy_chooses_between_experts_and_parked_slots() -> None:
    old, young = parked(1, "x"), parked(9, "x")
    victim = serving(5, "y", 9)
    assert planned({"a": need("z")}, old, victim, free_bytes=5) == (Drop(old), Open("a"))
    assert planned({"a": need("z")}, young, victim, free_bytes=5) == (Park(victim), Open("a"))


def test_beyond_the_most_parked_slots_the_least_recently_used_is_closed() -> None:
    one, two, victim = parked(1, "x"), parked(2, "x"), serving(3, "y", 20)
    assert planned({"a": need("z", 10)}, victim, two, one) == (Drop(one), Park(victim), Open("a"))
    last = serving(0, "y", 20)
    assert planned({"a": need("z", 10)}, last, two, one) == (Drop(last), Open("a"))


def test_a_switch_reads_a_copy_first_in_the_room_of_the_policys_victim() -> None:
    slot = serving(1, "x")
    wanted = {"a": need("x", copy=4)}
    copies = [Resident("c", 4, 5.0, 1, demand=Demand(30.0)), Resident("d", 4, 6.0, 1, demand=Demand(90.0))]
    full = Copies({"c", "d"}, copies, 0, 8)
    assert planned(wanted, slot, copies=Copies(budget_bytes=8, free_bytes=8)) == (
        Prefetch("a", 4),
        Switch("a", slot),
    )
    assert planned(wanted, slot, copies=full) == (Forget("c"), Prefetch("a", 4), Switch("a", slot))
    assert planned(wanted, slot, copies=full, policy=look_ahead) == (Forget("d"), Prefetch("a", 4), Switch("a", slot))
    assert planned(wanted, slot, copies=replace(full, held={"a", "c"})) == (Switch("a", slot),)
    assert planned(wanted, slot, copies=Copies(budget_bytes=3, free_bytes=3)) == (Switch("a", slot),), "it never fits"
    assert planned(wanted, free_bytes=99, copies=full) == (Open("a"),), "what is built reads its files itself"


def test_what_must_wait_is_read_ahead_and_without_room_only_brought_closer() -> None:
    held = Copies({"c"}, [Resident("c", 4, 5.0, 1)], 0, 4)
    wanted = {"a": need("x", copy=4)}
    assert plan(State(copies=held), {}, ahead=wanted, policy=lru) == (Forget("c"), Prefetch("a", 4))
    assert plan(State(copies=replace(held, evictable=())), {}, ahead=wanted, policy=lru) == (Prefetch("a", 0),)
    assert plan(State(copies=held), {}, ahead={"c": need("x", copy=4)}, policy=lru) == ()


sizes = st.integers(0, 9)
shapes = st.sampled_from("xyz")


@st.composite
def states(draw: st.DrawFn) -> tuple[dict[str, Need], list[OpenSlot], int, Copies]:
    slots: list[OpenSlot] = []
    for key in range(draw(st.integers(0, 5))):
        shape = draw(shapes)
        if sum(slot.need.shape == shape for slot in slots) < 2:
            kind = draw(st.sampled_from(("serves", "parked", "empty")))
            one = (
                parked(key, shape) if kind == "parked" else serving(key, shape, draw(sizes), parks=draw(st.booleans()))
            )
            slots.append(one if kind != "empty" else replace(one, resident=None))
    wanted = {name: need(draw(shapes), draw(sizes), copy=draw(sizes)) for name in draw(st.sets(st.sampled_from("abc")))}
    used = {name: draw(st.integers(1, 9)) for name in draw(st.sets(st.sampled_from("abcdef")))}
    busy = draw(st.sets(st.sampled_from("abcdef")))
    evictable = [Resident(name, size, draw(sizes), 1) for name, size in used.items() if name not in busy]
    budget = sum(used.values()) + draw(sizes)
    return wanted, slots, draw(st.integers(-5, 30)), Copies(used.keys(), evictable, budget - sum(used.values()), budget)


@settings(max_examples=300, deadline=None)
@given(states(), st.integers(0, 2), st.sampled_from((lru, gdsf, look_ahead)), st.randoms(use_true_random=False))
def test_a_plan_keeps_both_budgets_parks_few_depends_on_nothing_else_and_is_found_if_one_is_without_parking(
    state: tuple[dict[str, Need], list[OpenSlot], int, Copies], most: int, policy: EvictionPolicy, rng: object
) -> None:
    wanted, slots, free_bytes, copies = state
    actions = planned(wanted, *slots, free_bytes=free_bytes, most_parked=most, copies=copies, policy=policy)
    plain = planned(wanted, *slots, free_bytes=free_bytes, most_parked=0, copies=copies, policy=policy)
    assert (actions is None) == (plain is None)
    if actions is None:
        return
    shuffled = dict(reversed(wanted.items()))
    again = planned(shuffled, *slots, free_bytes=free_bytes, most_parked=most, copies=copies, policy=policy)
    assert again == actions
    assert grown(actions, wanted) <= max(free_bytes, 0) if not wanted else grown(actions, wanted) <= free_bytes
    asleep = {slot.key for slot in slots if slot.is_parked}
    asleep -= {each.slot.key for each in actions if isinstance(each, Drop | Switch)}
    parking = {each.slot.key for each in actions if isinstance(each, Park)}
    assert not parking or len(asleep | parking) <= most
    touched = [each.slot.key for each in actions if isinstance(each, Drop | Park | Switch)]
    assert len(touched) == len(set(touched))
    copied(actions, copies)


def grown(actions: Sequence[Action], wanted: dict[str, Need]) -> int:
    """Bytes that the device holds more once all is done."""
    total = 0
    for action in actions:
        match action:
            case Open(name):
                total += wanted[name].size_bytes
            case Switch(name, slot):
                total += max(0, wanted[name].size_bytes - slot.need.size_bytes)
            case Drop(slot):
                total -= slot.need.size_bytes
            case Park(slot):
                total -= slot.need.size_bytes - KEPT
    return total


def copied(actions: Sequence[Action], copies: Copies) -> None:
    """The copies that leave may, and those that are read fit."""
    size = {each.name: each.size_bytes for each in copies.evictable}
    left = copies.free_bytes
    for action in actions:
        match action:
            case Forget(name):
                left += size.pop(name)
            case Prefetch(name, n_bytes):
                assert name not in copies.held and n_bytes > 0
                left -= n_bytes
                assert left >= 0
