"""The order of waiting requests: by priority, and past the bound by age; in queues, in the scheduler, on a host."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_coe_host import make, model, request
from test_coe_scheduler import admitted, scheduler

from coe.engines.fake import FakeEngine
from coe.host import Host
from coe.request_queue import RequestQueue
from registry.priorities import RequestPriority

LOW, NORMAL, HIGH = 0, 1, 2


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=12),
    st.sets(st.integers(0, 11)),
    st.integers(0, 13),
    st.floats(0, 13),
)
def test_the_first_are_the_aged_by_age_and_then_the_others_by_priority(
    levels: list[int], removed: set[int], n: int, before_s: float
) -> None:
    queue = RequestQueue()
    for number, level in enumerate(levels):
        queue.add(number, float(number), level)
    left = [number for number in range(len(levels)) if number not in removed] or [0]
    for number in range(len(levels)):
        if number not in left:
            queue.remove(number)
    aged = [number for number in left if number < before_s]
    others = sorted((number for number in left if number >= before_s), key=lambda number: (-levels[number], number))
    expected = [*aged, *others] if len({levels[number] for number in left}) > 1 else left
    assert queue.first(n, before_s) == expected[:n]
    assert (queue.oldest, queue.oldest_s, len(queue)) == (left[0], float(left[0]), len(left))
    assert queue.level == max(levels[number] for number in left) and queue[left[-1]] == float(left[-1])


def test_requests_of_higher_priority_take_free_places_first() -> None:
    asked, _ = scheduler(("a", 0.0), resident=["a"], capacity=lambda name: 2)
    for level in (LOW, HIGH, NORMAL):
        asked.submit(("a",), 1.0, level)
    assert asked.admit(1.0) == [2, 0]
    asked.leave(("a",))
    asked.leave(("a",))
    assert asked.admit(1.0) == [3, 1]


def test_past_the_bound_a_request_waits_for_none_that_was_submitted_later() -> None:
    asked, _ = scheduler(resident=["a"], capacity=lambda name: 1, aging_s=10.0)
    low = asked.submit(("a",), 0.0, LOW)
    served = []
    for second in range(12):
        asked.submit(("a",), float(second), HIGH)
        served += asked.admit(float(second))
        asked.leave(("a",))
    assert served.index(low) == 11, "at the first decision after ten seconds"


def test_of_two_absent_residencies_that_of_higher_priority_loads_first() -> None:
    assert admitted(("b", 0.0), ("c", 1.0)) == [0]
    asked, _ = scheduler(("b", 0.0), ("b", 0.1))
    asked.submit(("c",), 1.0, HIGH)
    assert asked.admit(1.0) == [2]


def test_busy_weights_give_up_their_room_to_a_higher_priority_and_keep_it_from_a_lower_one() -> None:
    waiting = [("a", 0.0)] * 3
    busy = {"resident": ["a"], "in_flight": {"a": 4}, "load_s": 100.0}
    asked, shelf = scheduler(*waiting, **busy)  # type: ignore[arg-type]
    asked.submit(("b",), 1.0, NORMAL)
    assert asked.admit(1.0) == []
    asked.leave(("a",))
    assert asked.admit(1.0) == [0], "the load costs more than it gains"

    asked, shelf = scheduler(*waiting, **busy)  # type: ignore[arg-type]
    urgent = asked.submit(("b",), 1.0, HIGH)
    assert asked.admit(1.0) == []
    for _ in range(3):
        asked.leave(("a",))
        assert asked.admit(1.0) == [], "`a` drains"
    asked.leave(("a",))
    assert asked.admit(1.0) == [urgent]

    asked, shelf = scheduler(*waiting, **busy | {"load_s": 0.0})  # type: ignore[arg-type]
    asked.submit(("b",), -100.0, LOW)
    asked.admit(1.0)
    asked.leave(("a",))
    assert asked.admit(1.0) == [0], "an older request of lower priority waits"
    assert shelf.resident == ["a"]


def test_a_low_request_for_absent_weights_is_served_after_the_bound() -> None:
    asked, _ = scheduler(resident=["a"], capacity=lambda name: 1, aging_s=10.0)
    asked.submit(("a",), 0.0, HIGH)
    low = asked.submit(("b",), 0.0, LOW)
    for second in range(11):
        asked.submit(("a",), float(second), HIGH)  # one more than is answered
        [number] = asked.admit(float(second))
        assert number != low
        asked.leave(("a",))
    asked.submit(("a",), 11.0, HIGH)
    assert asked.admit(11.0) == [low]


async def order_of_answers(host: Host, *priorities: RequestPriority | None) -> list[int]:
    """The order in which requests end that are sent one after the other while another one is answered."""
    ended: list[int] = []

    async def ask(number: int, priority: RequestPriority | None) -> None:
        async for _ in host.ask("a", request(priority=priority)):
            pass
        ended.append(number)

    tasks = [asyncio.ensure_future(ask(-1, None))]
    while not host.answering:  # noqa: ASYNC110
        await asyncio.sleep(0)
    for number, priority in enumerate(priorities):
        task = asyncio.ensure_future(ask(number, priority))
        await asyncio.sleep(0)  # it is in the queue
        tasks += [task]
    await asyncio.gather(*tasks)
    return ended[1:]


@pytest.mark.parametrize(("aging_s", "expected"), [(60.0, [3, 1, 2, 0]), (0.0, [0, 1, 2, 3])])
async def test_a_host_answers_by_priority_until_requests_are_past_the_bound(
    aging_s: float, expected: list[int]
) -> None:
    host = make(model("a"), engine=FakeEngine(token_delay_s=0.005, capacity=1), aging_s=aging_s)
    async for _ in host.ask("a", request()):
        pass
    assert await order_of_answers(host, "low", None, "normal", "high") == expected
