"""What the scheduler admits, and in which order; for any history, no request starves and no capacity is exceeded."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from coe.scheduler import Residency, Waiting, admit

NEVER = 1e9


def plan(waiting: list[tuple[int, str, float]], **options: object) -> list[int]:
    arguments: dict[str, object] = {
        "resident": (),
        "in_flight": {},
        "capacity": lambda residency: 4,
        "loads_now": lambda residency, keep: True,
        "now_s": 0.0,
        "aging_s": NEVER,
        **options,
    }
    return admit([Waiting(i, tuple(names), at) for i, names, at in waiting], **arguments)  # type: ignore[arg-type]


def test_requests_of_one_group_are_admitted_together_in_order() -> None:
    assert plan([(1, "a", 0.0), (2, "a", 0.1), (3, "a", 0.2)], resident=["a"]) == [1, 2, 3]


def test_capacity_counts_what_is_in_flight() -> None:
    waiting = [(i, "a", float(i)) for i in range(6)]
    assert plan(waiting, resident=["a"], in_flight={"a": 3}) == [0]
    assert plan(waiting, resident=["a"], in_flight={"a": 4}) == []


def test_a_resident_expert_goes_before_an_older_request_that_needs_a_busy_ones_room() -> None:
    waiting = [(1, "b", 0.0), (2, "a", 1.0)]
    assert plan(waiting, resident=["a"], loads_now=lambda residency, keep: False) == [2]


def test_an_expert_that_fits_beside_the_busy_ones_loads_meanwhile_one_at_a_time() -> None:
    waiting = [(1, "b", 0.0), (2, "a", 1.0), (3, "c", 2.0)]
    assert plan(waiting, resident=["a"]) == [2, 1]
    assert plan(waiting, resident=["a"], loading=["b"]) == [1, 2]


def test_loading_may_not_evict_what_is_waited_for_or_busy() -> None:
    asked: list[tuple[tuple[str, ...], frozenset[str]]] = []
    plan(
        [(1, "b", 0.0), (2, "a", 1.0)],
        resident=["a", "d"],
        in_flight={"d": 1},
        loads_now=lambda residency, keep: asked.append((residency, frozenset(keep))) or False,
    )
    assert asked == [(("b",), frozenset({"a", "d"}))]


def test_a_switch_that_must_wait_starts_when_no_resident_group_has_requests_left() -> None:
    assert plan([(1, "b", 0.0), (2, "c", 1.0)], resident=["a"], in_flight={"a": 2}, loads_now=lambda *_: False) == [1]


def test_past_the_aging_bound_a_request_goes_first_and_alone() -> None:
    waiting = [(1, "b", 0.0), (2, "a", 1.0)]
    assert plan(waiting, resident=["a"], loads_now=lambda *_: False, now_s=11.0, aging_s=10.0) == [1]
    assert plan(waiting, resident=["a"], loading=["c"], now_s=11.0, aging_s=10.0) == []


def test_a_request_of_several_weights_is_resident_when_all_of_them_are() -> None:
    waiting = [(1, "ab", 0.0), (2, "a", 1.0)]
    assert plan(waiting, resident=["a", "b"]) == [1, 2]
    assert plan(waiting, resident=["a"], loading=["b"]) == [1, 2]
    assert plan(waiting, resident=["a"], loads_now=lambda residency, keep: False) == [2]
    asked: list[tuple[object, object]] = []
    plan(waiting, resident=["a"], loads_now=lambda residency, keep: asked.append((residency, set(keep))) or False)
    assert asked == [(("a", "b"), {"a"})]


def test_requests_that_share_weights_share_their_places() -> None:
    waiting = [(1, "ab", 0.0), (2, "ab", 0.1), (3, "a", 0.2), (4, "b", 0.3), (5, "b", 0.4)]
    assert plan(waiting, resident=["a", "b"], in_flight={"a": 2}, capacity=lambda name: 4) == [1, 2, 4, 5]
    assert plan(waiting, resident=["a", "b"], capacity={"a": 4, "b": 1}.__getitem__) == [1, 3]


def test_nothing_waits_nothing_is_admitted() -> None:
    assert plan([]) == []


@settings(max_examples=200, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.floats(0, 30), st.sampled_from("abcde")), min_size=1, max_size=60),
    room=st.integers(1, 3),
    capacity=st.integers(1, 4),
)
def test_every_request_is_served_within_its_bound_whatever_arrives(
    arrivals: list[tuple[float, str]], room: int, capacity: int
) -> None:
    """A simulated host: `room` experts fit, a load takes 1 s, an answer 1 s."""
    arrivals = sorted(arrivals)
    waiting: list[Waiting] = []
    resident: list[str] = []
    running: list[tuple[float, int, str]] = []
    admitted_at: dict[int, float] = {}
    now, next_arrival, aging = 0.0, 0, 5.0
    while next_arrival < len(arrivals) or waiting or running:
        running = [r for r in running if r[0] > now]
        while next_arrival < len(arrivals) and arrivals[next_arrival][0] <= now:
            waiting.append(Waiting(next_arrival, (arrivals[next_arrival][1],), arrivals[next_arrival][0]))
            next_arrival += 1
        in_flight = Counter(residency for _, _, residency in running)

        def loads_now(residency: Residency, keep: object, busy: Counter[str] = in_flight) -> bool:
            return len(resident) < room or any(r not in keep and not busy[r] for r in resident)  # type: ignore[operator]

        ids = admit(
            waiting,
            resident=resident,
            in_flight=in_flight,
            capacity=lambda residency: capacity,
            loads_now=loads_now,
            now_s=now,
            aging_s=aging,
        )
        assert ids or running or not waiting, "an idle host admits"
        chosen = [w for w in waiting if w.id in ids]
        for request in chosen:
            start, [name] = now, request.residency
            if name not in resident:
                if len(resident) >= room:
                    idle = [r for r in resident if not any(g == r for _, _, g in running)]
                    if not idle:
                        start = max(t for t, _, _ in running)
                    resident.remove((idle or resident)[0])
                resident.append(name)
                start += 1
            running.append((start + 1, request.id, name))
            admitted_at[request.id] = now
            waiting.remove(request)
        assert all(count <= capacity for count in Counter(residency for _, _, residency in running).values())
        now += 0.5
    # Only a drain, a load and the requests ahead of it in its own residency may exceed the bound.
    worst = max(admitted_at[i] - t for i, (t, _) in enumerate(arrivals))
    assert worst <= aging + 3.0 * len(arrivals)
    assert len(admitted_at) == len(arrivals)
