"""The circuit breaker of an endpoint, under a clock of the test; and which endpoint of several a request gets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coe.engines.remote.breaker import Breaker, BreakerSettings, State
from coe.engines.remote.endpoints import AllOpen, Endpoint, EndpointPool, Pass
from coe.errors import RemoteError
from registry.spec import ExpertSpec, Kind

SETTINGS = BreakerSettings(failures=2, open_s=5.0, most_open_s=12.0, cooldown_s=1.0)
BROKEN = RemoteError("broken", retryable=True)


def test_it_opens_after_failures_in_a_row_and_a_probe_closes_it() -> None:
    breaker = Breaker(SETTINGS)
    breaker.failed(0.0, probe=False)
    assert breaker.state(0.0) is State.CLOSED and breaker.is_cooling(0.9) and not breaker.is_cooling(1.0)
    breaker.succeeded(probe=False)
    assert not breaker.is_cooling(0.5)
    for _ in range(2):
        assert breaker.admits(2.0)
        breaker.failed(2.0, probe=False)
    assert breaker.state(6.9) is State.OPEN and not breaker.admits(6.9) and breaker.opens_in_s(6.0) == 1.0
    assert breaker.state(7.0) is State.HALF_OPEN and breaker.begin(7.0)
    assert not breaker.admits(7.0), "one probe at a time"
    breaker.succeeded(probe=True)
    assert breaker.state(7.0) is State.CLOSED and breaker.n_failures == 0 and breaker.n_opened == 1


def test_each_probe_that_fails_doubles_the_time_up_to_the_most() -> None:
    breaker, now = Breaker(SETTINGS), 0.0
    breaker.failed(now, probe=False)
    breaker.failed(now, probe=False)
    for expected in (5.0, 10.0, 12.0, 12.0):
        assert breaker.opens_in_s(now) == expected
        now += expected
        breaker.failed(now, probe=breaker.begin(now))


def test_a_stated_time_opens_it_at_once_and_an_older_success_does_not_close_it() -> None:
    breaker = Breaker(SETTINGS)
    breaker.failed(0.0, probe=False, stated_s=30.0)
    assert breaker.state(29.9) is State.OPEN
    breaker.succeeded(probe=False)
    assert breaker.state(29.9) is State.OPEN
    breaker.failed(1.0, probe=False, stated_s=3.0)
    assert breaker.state(29.9) is State.OPEN, "a shorter time changes nothing"


def test_a_probe_whose_client_leaves_makes_way_for_the_next() -> None:
    breaker = Breaker(SETTINGS)
    breaker.failed(0.0, probe=False, stated_s=1.0)
    assert breaker.begin(1.0) and not breaker.admits(1.0)
    breaker.abandoned(probe=True)
    assert breaker.admits(1.0)


def test_without_a_count_it_never_opens() -> None:
    breaker = Breaker(BreakerSettings(failures=0))
    for _ in range(100):
        breaker.failed(0.0, probe=False, stated_s=60.0)
    assert breaker.state(0.0) is State.CLOSED and not breaker.is_cooling(0.0)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Client:
    async def close(self) -> None: ...


def pool(*weights: float, limit: int = 64, clock: Clock | None = None) -> EndpointPool:
    client: Any = Client()
    endpoints = [
        Endpoint(
            ExpertSpec(name="far", kind=Kind.REMOTE, source=f"http://{name}/v1"), client, Breaker(SETTINGS), w, limit
        )
        for name, w in zip("abcdef", weights, strict=False)
    ]
    return EndpointPool(endpoints, clock or Clock())


async def taken(places: EndpointPool, n: int, *, hold: bool = False) -> str:
    """The endpoints of n requests, each after the end of the one before unless `hold`."""
    found = ""
    for _ in range(n):
        place = await places.acquire((), 0.0)
        found += place.endpoint.spec.source[7]
        if not hold:
            place.succeeded()
            place.release()
    return found


async def test_one_request_after_the_other_is_spread_by_weight_and_smoothly() -> None:
    assert await taken(pool(3, 1), 8) == "aabaaaba"
    assert await taken(pool(1, 1, 1), 6) == "abcabc"
    assert await taken(pool(5, 1, 1), 7) == "aabacaa"


async def test_requests_at_once_go_where_the_fewest_are_for_the_weight() -> None:
    places = pool(3, 1)
    held = await taken(places, 8, hold=True)
    assert sorted(held) == [*"aaaaaabb"]
    slow, fast = pool(1, 1).endpoints, pool(1, 1)
    fast.endpoints[0].in_flight = 4
    assert await taken(fast, 4) == "bbbb" and slow


async def test_an_endpoint_that_failed_is_avoided_while_it_cools_down() -> None:
    clock = Clock()
    places = pool(1, 1, clock=clock)
    place = await places.acquire((), 0.0)
    place.failed(BROKEN)
    place.release()
    assert await taken(places, 4) == "bbbb"
    clock.now_s = 1.0
    assert "a" in await taken(places, 3)


async def test_a_full_endpoint_is_waited_for_and_an_open_one_only_so_long() -> None:
    places = pool(1, limit=1)
    first = await places.acquire((), 0.0)
    waiting = asyncio.ensure_future(places.acquire((), 0.0))
    await asyncio.sleep(0.01)
    assert not waiting.done() and places.capacity == 1
    first.release()
    second: Pass = await asyncio.wait_for(waiting, 5)
    second.failed(BROKEN, 30.0)
    second.release()
    with pytest.raises(AllOpen) as caught:
        await places.acquire((), 2.0)
    assert caught.value.wait_s == 30.0 and caught.value.last is BROKEN
    assert "is tried again in 30 s" in (places.problem() or "")
    assert places.endpoints[0].in_flight == 0


async def test_what_is_open_counts_for_no_capacity() -> None:
    clock = Clock()
    places = pool(1, 1, limit=8, clock=clock)
    assert places.capacity == 16
    (await places.acquire((), 0.0)).failed(BROKEN, 10.0)
    assert places.capacity == 8 and places.problem() is None
    [state, _] = places.states()
    assert (state["state"], state["opens_in_s"], state["opened"], state["failed"]) == ("open", 10.0, 1, 1)
    clock.now_s = 10.0
    assert places.capacity == 16
