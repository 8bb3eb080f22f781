"""Plans for absent experts: within budget and slots, without needless evictions, and found if there is one."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from coe.memory.eviction import Resident, lru
from coe.memory.room import Need, OpenSlot, Room, make_room

SLOT_BYTES = {"x": 0, "y": 3, "z": 1}
MOST = {"x": 1, "y": 2, "z": 3}


def need(shape: str, weights: int) -> Need:
    return Need(shape, weights, SLOT_BYTES[shape], MOST[shape])


def serving(key: int, shape: str, weights: int = 4, used_s: float | None = None) -> OpenSlot:
    each = need(shape, weights)
    return OpenSlot(key, each, Resident(f"r{key}", each.size_bytes, key if used_s is None else used_s, 1))


def empty(key: int, shape: str, weights: int = 4) -> OpenSlot:
    return OpenSlot(key, need(shape, weights))


def plan(missing: dict[str, Need], *free: OpenSlot, free_bytes: int, busy: tuple[str, ...] = ()) -> Room | None:
    opened = Counter([slot.need.shape for slot in free]) + Counter(busy)
    return make_room(missing, free, opened=opened, free_bytes=free_bytes, policy=lru)


def test_with_room_an_expert_gets_a_new_slot_and_nothing_is_evicted() -> None:
    assert plan({"a": need("y", 4)}, serving(1, "y"), free_bytes=7) == Room({"a": None})


def test_an_empty_slot_is_taken_before_a_new_one() -> None:
    slot = empty(1, "y")
    assert plan({"a": need("y", 4)}, slot, free_bytes=100) == Room({"a": slot})
    assert plan({"a": need("y", 4)}, slot, free_bytes=0) == Room({"a": slot}), "its bytes count already"
    assert plan({"a": need("x", 4)}, slot, free_bytes=0) == Room({"a": None}, (slot,)), "another shape: it is closed"


def test_the_experts_of_a_shape_take_turns_in_its_slots_though_there_is_room() -> None:
    old, new = serving(1, "y"), serving(2, "y")
    assert plan({"a": need("y", 4)}, new, old, free_bytes=100) == Room({"a": old})
    assert plan({"a": need("y", 4), "b": need("y", 4)}, new, old, free_bytes=100) == Room({"a": old, "b": new})
    assert plan({"a": need("x", 4)}, free_bytes=100, busy=("x",)) is None, "its only slot is in use"


def test_an_eviction_takes_the_slot_of_the_same_shape_in_preference() -> None:
    oldest, same = serving(1, "z"), serving(2, "y")
    assert plan({"a": need("y", 4)}, oldest, same, free_bytes=0) == Room({"a": same})
    assert plan({"a": need("y", 6)}, oldest, same, free_bytes=0) == Room({"a": same}, (oldest,)), "it is larger"
    assert plan({"a": need("y", 4)}, serving(1, "z", 6), free_bytes=0) == Room({"a": None}, (serving(1, "z", 6),))


def test_empty_slots_of_other_shapes_are_closed_before_an_expert_is_evicted() -> None:
    rest = empty(1, "z")
    assert plan({"a": need("y", 2)}, rest, serving(2, "y"), free_bytes=0) == Room({"a": None}, (rest,))


def test_smaller_weights_free_memory_only_once_they_are_there() -> None:
    large, small = serving(1, "y", 9), serving(2, "y", 1)
    both = {"a": need("y", 1), "b": need("y", 9)}
    assert plan(both, small, large, free_bytes=0) == Room({"a": None, "b": None}, (large, small))
    assert plan(both, small, large, free_bytes=8) == Room({"a": large, "b": small})


shapes = st.sampled_from("xyz")
Situation = tuple[dict[str, Need], list[OpenSlot], list[str], int]


@st.composite
def situations(draw: st.DrawFn, weights: st.SearchStrategy[int]) -> Situation:
    """Missing experts, free slots, shapes of busy ones, free bytes; never more slots of a shape than there may be."""
    free = [
        draw(st.sampled_from((serving, empty)))(key, draw(shapes), draw(weights))
        for key in range(draw(st.integers(0, 5)))
    ]
    count = Counter[str]()
    kept = []
    for slot in free:
        count[str(slot.need.shape)] += 1
        if count[str(slot.need.shape)] <= MOST[str(slot.need.shape)]:
            kept.append(slot)
    busy = [shape for shape in "xyz" if count[shape] < MOST[shape] and draw(st.booleans())]
    missing = {name: need(draw(shapes), draw(weights)) for name in draw(st.sets(st.sampled_from("abc")))}
    return missing, kept, busy, draw(st.integers(-5, 30))


@settings(max_examples=500)
@given(situations(st.integers(0, 9)))
def test_a_plan_keeps_the_budget_and_the_slots_of_each_shape(situation: Situation) -> None:
    missing, free, busy, free_bytes = situation
    room = plan(missing, *free, free_bytes=free_bytes, busy=tuple(busy))
    possible = is_possible(missing, free, busy, free_bytes)
    assert (room is not None) == possible
    if room is None:
        return
    assert room.taken.keys() == missing.keys()
    taken = [slot for slot in room.taken.values() if slot is not None]
    keys = [slot.key for slot in (*taken, *room.closed)]
    assert len(set(keys)) == len(keys) and set(keys) <= {slot.key for slot in free}
    used = Counter([slot.need.shape for slot in free if slot not in room.closed] + busy)
    used.update(missing[name].shape for name, slot in room.taken.items() if slot is None)
    assert all(count <= MOST[str(shape)] for shape, count in used.items())
    assert all(slot.need.shape == missing[name].shape for name, slot in room.taken.items() if slot is not None)
    freed = sum(slot.need.size_bytes for slot in room.closed)
    grown = sum(
        missing[name].size_bytes - (0 if slot is None else min(slot.need.size_bytes, missing[name].size_bytes))
        for name, slot in room.taken.items()
    )
    assert grown <= free_bytes + freed


@settings(max_examples=300)
@given(situations(st.just(4)))
def test_no_slot_is_closed_for_a_new_one_of_its_shape(situation: Situation) -> None:
    missing, free, busy, free_bytes = situation
    room = plan(missing, *free, free_bytes=free_bytes, busy=tuple(busy))
    if room is not None:
        new = {missing[name].shape for name, slot in room.taken.items() if slot is None}
        assert not new & {slot.need.shape for slot in room.closed}


def is_possible(missing: dict[str, Need], free: list[OpenSlot], busy: list[str], free_bytes: int) -> bool:
    """Whether all fit if every free slot is given up; the largest weights are replaced by the largest."""
    need_bytes = sum(each.size_bytes for each in missing.values()) if missing else 0
    for shape in "xyz":
        same = sum(each.shape == shape for each in missing.values())
        if same + busy.count(shape) > MOST[shape]:
            return False
    return need_bytes <= free_bytes + sum(slot.need.size_bytes for slot in free)
