"""What the scheduler admits, in which order, and which weights give up their room."""

from collections.abc import Collection, Mapping
from typing import Any

from coe.scheduler import Residency, Scheduler

NEVER = 1e9


class Shelf:
    """Memory for `size` weights of one size; those in use (`scheduler.in_flight`) leave only in a drain."""

    def __init__(self, resident: Collection[str], size: int, load_s: float) -> None:
        self.resident, self.size, self.load_seconds = list(resident), size, load_s
        self.pins: set[str] = set()
        self.asked: list[tuple[Residency, frozenset[str], bool]] = []
        self.scheduler: Scheduler | None = None

    def room(self, names: Residency, keep: Collection[str], *, drain: bool) -> frozenset[str] | None:
        assert self.scheduler is not None
        self.asked.append((names, frozenset(keep), drain))
        flying = self.scheduler.in_flight
        missing = [name for name in names if name not in self.resident]
        over = len(self.resident) + len(missing) - self.size
        free = [
            each for each in self.resident if each not in {*names, *keep, *self.pins} and (drain or each not in flying)
        ]
        free.sort(key=lambda name: -self.scheduler.demand(name, 1e6).next_use_s)  # type: ignore[union-attr]
        return None if over > len(free) else frozenset(free[: max(0, over)])

    def load_s(self, name: str) -> float:
        return self.load_seconds


def scheduler(
    *waiting: tuple[str, float],
    resident: Collection[str] = (),
    size: int = 1,
    in_flight: Mapping[str, int] = {},
    capacity: Any = lambda name: 4,
    aging_s: float = NEVER,
    load_s: float = 1.0,
    **options: Any,
) -> tuple[Scheduler, Shelf]:
    """A scheduler with requests that wait: ids from 0, each with its weights (one letter each) and its time."""
    shelf = Shelf(resident, size, load_s)
    made = shelf.scheduler = Scheduler(shelf, capacity=capacity, aging_s=aging_s, **options)
    made.in_flight.update(in_flight)
    for names, at_s in waiting:
        made.submit(tuple(names), at_s)
    return made, shelf


def admitted(*waiting: tuple[str, float], now_s: float = 0.0, **options: Any) -> list[int]:
    return scheduler(*waiting, **options)[0].admit(now_s)


def test_requests_of_one_residency_are_admitted_together_in_order() -> None:
    assert admitted(("a", 0.0), ("a", 0.1), ("a", 0.2), resident=["a"]) == [0, 1, 2]


def test_capacity_counts_what_is_in_flight() -> None:
    waiting = [("a", float(i)) for i in range(6)]
    assert admitted(*waiting, resident=["a"], in_flight={"a": 3}) == [0]
    assert admitted(*waiting, resident=["a"], in_flight={"a": 4}) == []


def test_an_expert_that_fits_beside_the_busy_ones_loads_meanwhile_one_at_a_time() -> None:
    asked, shelf = scheduler(("b", 0.0), ("a", 1.0), ("c", 2.0), resident=["a"], size=3)
    assert asked.admit(2.0) == [1, 0]
    assert asked.admit(2.0) == []  # `b` is on its way
    shelf.resident.append("b")
    asked.loaded()
    assert asked.admit(3.0) == [2]


def test_different_copy_engines_load_at_the_same_time() -> None:
    assert admitted(("b", 0.0), ("c", 1.0), size=2) == [0]
    assert admitted(("b", 0.0), ("c", 1.0), size=2, copy_engine=lambda name: name) == [0, 1]


def test_a_request_joins_weights_that_are_on_their_way() -> None:
    asked, _ = scheduler(("b", 0.0))
    assert asked.admit(0.0) == [0]
    asked.submit(("b",), 0.5)
    assert asked.admit(0.5) == [1]


def test_loading_may_not_evict_what_is_waited_for_or_busy() -> None:
    asked, shelf = scheduler(
        ("b", 0.0), *[("a", 1.0)] * 5, resident=["a", "d", "e"], size=3, in_flight={"d": 1}, capacity=lambda name: 4
    )
    assert asked.admit(1.0) == [1, 2, 3, 4, 0]  # in the room of `e`
    assert shelf.asked == [(("b",), frozenset("ad"), False)]


def test_a_request_counts_as_many_seconds_as_a_load_takes() -> None:
    """The oldest first where loads take no time, the most wanted first where they take long."""
    waiting = [("b", 0.0), ("c", 1.0), ("c", 2.0)]
    assert admitted(*waiting, load_s=0.0) == admitted(*waiting, load_s=0.9) == [0]
    assert admitted(*waiting, load_s=1.1) == [1, 2]
    assert admitted(("b", 0.0), ("c", 1.0), load_s=100.0) == [0]


def test_only_the_loads_of_what_is_absent_count() -> None:
    """With a load of 3 s: -3 for `b` beside 2 - 3 for `ac`, whose `a` is in memory, and 2 - 6 if it were not."""
    waiting = [("b", 0.0), ("ac", 2.0)]
    assert admitted(*waiting, resident=["a"], size=2, load_s=3.0)[0] == 0
    assert admitted(*waiting, size=2, load_s=3.0)[0] == 1


def test_what_was_given_a_request_longest_ago_drains() -> None:
    """Its answers are expected to end first, however often it is wanted; requests in use count as needed now."""
    asked, _ = scheduler(*[("a", 0.0)] * 3, ("b", 1.0), resident=["a", "b"], size=2)
    assert asked.admit(1.0) == [0, 1, 2, 3]
    assert asked.demand("a", 5.0).next_use_s == asked.demand("b", 5.0).next_use_s == 5.0
    asked.leave(("b",))
    assert asked.demand("b", 5.0).next_use_s > 5.0


def test_without_loads_to_save_the_older_requests_keep_or_take_the_room() -> None:
    full = {"resident": ["a"], "in_flight": {"a": 4}, "load_s": 0.0}
    older, _ = scheduler(("a", 0.0), *[("b", 1.0)] * 4, **full)
    younger, _ = scheduler(*[("a", 1.0)] * 4, ("b", 0.0), **full)
    for asked in (older, younger):
        assert asked.admit(1.0) == []
        asked.leave(("a",))
    assert older.admit(1.0) == [0]
    assert younger.admit(1.0) == []  # `a` drains


def test_a_switch_pays_as_soon_as_fewer_requests_wait_for_the_busy_weights() -> None:
    """Each of them counts both loads: -2 * 3 beside 0.5 - 3, then -2 * 2, then -2."""
    asked, _ = scheduler(*[("a", 0.0)] * 3, *[("b", 0.5)] * 3, resident=["a"], in_flight={"a": 4})
    assert asked.admit(0.5) == []
    for number in (0, 1):
        asked.leave(("a",))
        assert asked.admit(0.5) == [number]
    asked.leave(("a",))
    assert asked.admit(0.5) == []
    assert asked.waiting == {("a",): 1, ("b",): 3}


def test_a_switch_must_pay_for_itself() -> None:
    """It waits while the requests that wait for the busy weights, whose places are taken, would lose more."""
    full = {"resident": ["a"], "in_flight": {"a": 4}}
    asked, _ = scheduler(("a", 0.0), ("b", 0.0), **full)
    assert asked.admit(0.0) == []
    asked.leave(("a",))
    assert asked.admit(0.0) == [0]  # `a` still takes requests
    for _ in range(4):
        asked.leave(("a",))
    assert asked.admit(0.0) == [1]
    asked, _ = scheduler(("a", 0.0), *[("b", 0.1)] * 3, **full)
    assert asked.admit(0.0) == []
    asked.leave(("a",))
    assert asked.admit(0.0) == []  # `a` drains: its free place stays free


def test_a_drain_stops_only_the_weights_that_give_up_their_room() -> None:
    asked, shelf = scheduler(("c", 0.0), resident=["a", "b"], size=2, in_flight={"a": 1, "b": 1})
    assert asked.admit(0.0) == []  # `a` or `b` drains: the one that is needed last
    leaving = next(iter(shelf.room(("c",), (), drain=True) or ()))
    stays = "b" if leaving == "a" else "a"
    asked.submit((leaving,), 1.0)
    asked.submit((stays,), 1.0)
    assert asked.admit(1.0) == [2]
    asked.leave((leaving,))
    assert asked.admit(2.0) == [0]  # `c` loads now, and `leaving` still takes no requests
    assert asked.admit(2.0) == []
    shelf.resident = [stays, "c"]
    asked.leave(("c",))
    asked.loaded()
    assert asked.admit(3.0) == [1]


def test_past_the_aging_bound_a_request_takes_the_room_of_weights_with_younger_requests() -> None:
    aging = {"resident": ["a"], "in_flight": {"a": 3}, "now_s": 11.0, "aging_s": 10.0}
    assert admitted(("b", 0.0), ("a", 1.0), **aging) == []
    assert admitted(("b", 2.0), ("a", 2.0), **aging) == [1]
    assert admitted(("a", 0.0), ("b", 0.5), **aging) == [0]  # the older one first


def test_past_the_aging_bound_other_weights_go_on() -> None:
    asked, _ = scheduler(
        ("c", 0.0), ("a", 1.0), ("b", 2.0), resident=["a", "b"], size=2, in_flight={"a": 3, "b": 3}, aging_s=10.0
    )
    assert asked.admit(11.0) == [1]  # `b`, whose request is the youngest, drains for `c`


def test_an_overdue_request_ends_the_drain_for_a_younger_one() -> None:
    """The weights that drain for it are those of the overdue request, which is older."""
    asked, _ = scheduler(("a", 0.0), *[("b", 5.0)] * 8, resident=["a"], in_flight={"a": 4}, aging_s=10.0)
    assert asked.admit(5.0) == []
    asked.leave(("a",))
    assert asked.admit(9.0) == []  # draining
    assert asked.admit(10.5) == [0]


def test_a_load_that_is_under_way_ends_before_that_of_an_overdue_request() -> None:
    asked, shelf = scheduler(("b", 0.0), ("c", 0.5), size=2, aging_s=10.0)
    assert asked.admit(0.5) == [0]
    assert asked.admit(11.0) == []
    shelf.resident.append("b")
    asked.loaded()
    assert asked.admit(11.0) == [1]


def test_a_failed_load_frees_the_room_that_was_promised() -> None:
    asked, _ = scheduler(("b", 0.0), resident=["a"])
    assert asked.admit(0.0) == [0]
    asked.submit(("a",), 1.0)
    assert asked.admit(1.0) == []  # `a` gives up its room
    asked.leave(("b",))
    assert asked.admit(2.0) == [1]


def test_a_cancelled_request_ends_its_drain() -> None:
    asked, _ = scheduler(("b", 0.0), resident=["a"], in_flight={"a": 1})
    assert asked.admit(0.0) == []
    asked.submit(("a",), 1.0)
    assert asked.admit(1.0) == []
    asked.cancel(0)
    assert asked.admit(1.0) == [1]
    asked.cancel(0)  # again: nothing
    assert len(asked) == 0 and asked.waiting == {} and asked.wanted == {"a"}


def test_a_request_of_several_weights_is_resident_when_all_of_them_are() -> None:
    waiting = [("ab", 0.0), ("a", 1.0)]
    assert admitted(*waiting, resident=["a", "b"], size=2) == [0, 1]
    assert admitted(*waiting, resident=["a"], in_flight={"b": 1}, size=2) == [0, 1]
    asked, shelf = scheduler(*waiting, resident=["a"], in_flight={"a": 1})
    assert asked.admit(1.0) == [1]
    assert shelf.asked[0] == (("a", "b"), frozenset("a"), False)


def test_requests_that_share_weights_share_their_places() -> None:
    waiting = [("ab", 0.0), ("ab", 0.1), ("a", 0.2), ("b", 0.3), ("b", 0.4)]
    both = {"resident": ["a", "b"], "size": 2}
    assert admitted(*waiting, in_flight={"a": 2}, **both) == [0, 1, 3, 4]
    assert admitted(*waiting, capacity={"a": 4, "b": 1}.__getitem__, **both) == [0, 2]


def test_past_the_aging_bound_a_request_of_several_busy_weights_keeps_younger_ones_from_them() -> None:
    asked, _ = scheduler(
        *[("ab", 0.0), ("a", 1.0), ("b", 1.0)],
        resident=["a", "b"],
        size=2,
        in_flight={"a": 1, "b": 1},
        capacity=lambda name: 1,
        aging_s=5.0,
    )
    asked.leave(("a",))
    assert asked.admit(4.0) == [1]  # it is not overdue
    asked.leave(("b",))
    assert asked.admit(6.0) == []
    asked.leave(("a",))
    assert asked.admit(7.0) == [0]


def test_an_overdue_request_keeps_the_room_that_drained_for_it_until_the_weights_it_shares_have_a_place() -> None:
    asked, _ = scheduler(
        *[("ab", 0.0), ("r", 1.0), ("a", 1.0)],
        resident=["a", "r"],
        size=2,
        in_flight={"a": 2, "r": 1},
        capacity=lambda name: 2,
        aging_s=5.0,
    )
    assert asked.admit(6.0) == []
    asked.leave(("r",))
    assert asked.admit(6.1) == []
    assert asked.admit(6.2) == []  # as for any later request: it gives the room to nobody else
    asked.leave(("a",))
    assert asked.admit(6.3) == [0]


def test_what_can_never_load_is_admitted_once_nothing_is_in_flight() -> None:
    """Its lease raises the error; it does not wait for ever."""
    asked, shelf = scheduler(("b", 0.0), resident=["a"])
    shelf.pins = {"a"}
    assert asked.admit(0.0) == [0]


def test_nothing_waits_nothing_is_admitted() -> None:
    assert admitted() == []


def test_the_next_use_is_known_from_the_queue_and_expected_beyond_it() -> None:
    asked, _ = scheduler(*[("a", 100.0)] * 3, ("b", 100.0), resident=["a", "b"], size=2)
    asked.admit(100.0)
    for _ in range(3):
        asked.leave(("a",))
    asked.leave(("b",))
    asked.submit(("c",), 99.0)
    at = {name: asked.demand(name, 100.0) for name in "abcd"}
    assert at["c"].next_use_s == 99.0  # it waits
    assert 100.0 < at["a"].next_use_s < at["b"].next_use_s < at["d"].next_use_s
    assert at["a"].per_s == 3 * at["b"].per_s
    assert asked.demand("a", 700.0).per_s == at["a"].per_s / 2  # the half-life
