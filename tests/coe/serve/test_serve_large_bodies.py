"""Large bodies: one at a time, with pauses; small ones at once."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from coe.errors import InvalidRequest, Overloaded
from coe.serve.http.json_body import STEP_BYTES
from coe.serve.http.large_bodies import PAUSE, REFUSED_S, SMALL_BYTES, LargeBodies

SMALL = b'"' + b"x" * (SMALL_BYTES - 2) + b'"'
LARGE = b'"' + b"x" * (SMALL_BYTES - 1) + b'"'


def busy(value: object) -> object:
    """A parser that takes 20 ms."""
    ends = time.perf_counter() + 0.02
    while time.perf_counter() < ends:
        pass
    return value


async def test_large_bodies_leave_most_of_the_time_to_others() -> None:
    bodies = LargeBodies(2**20)
    started = time.perf_counter()
    await asyncio.gather(*(bodies.parse(LARGE, busy) for _ in range(3)))
    assert time.perf_counter() - started >= (3 + 2 * PAUSE) * 0.02, "two pauses between three of them"


async def test_a_small_body_waits_for_no_turn() -> None:
    bodies = LargeBodies(2**20)
    first = await bodies.parse(LARGE, busy)
    waiting = asyncio.create_task(bodies.parse(LARGE, busy))
    await asyncio.sleep(0)
    assert await bodies.parse(SMALL, len) == SMALL_BYTES - 2  # type: ignore[arg-type]
    assert not waiting.done() and len(str(first)) == SMALL_BYTES - 1
    assert await waiting == first


async def test_a_refused_large_body_is_answered_late_and_gives_up_its_turn() -> None:
    def refuse(value: object) -> Any:
        raise InvalidRequest("no")

    bodies = LargeBodies(2**20)
    for body, least_s in ((SMALL, 0.0), (LARGE, REFUSED_S), (b"{" * 20_000, REFUSED_S)):
        started = time.perf_counter()
        with pytest.raises(InvalidRequest):
            await bodies.parse(body, refuse)
        assert time.perf_counter() - started >= least_s
    assert await asyncio.wait_for(bodies.parse(LARGE, bool), 5) is True


async def test_a_plugins_bug_gives_up_the_turn_too() -> None:
    def broken(value: object) -> Any:
        raise ZeroDivisionError

    bodies = LargeBodies(2**20)
    with pytest.raises(ZeroDivisionError):
        await bodies.parse(LARGE, broken)
    assert await asyncio.wait_for(bodies.parse(LARGE, bool), 5) is True


async def test_bodies_that_wait_are_bounded_in_bytes() -> None:
    bodies = LargeBodies(2 * len(LARGE))
    running = [asyncio.create_task(bodies.parse(LARGE, busy)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="too many large bodies"):
        await bodies.parse(LARGE, busy)
    running[1].cancel()
    await asyncio.sleep(0)
    last = asyncio.create_task(bodies.parse(LARGE, busy))
    await asyncio.gather(running[0], running[2], last)
    with pytest.raises(asyncio.CancelledError):
        await running[1]


async def test_the_event_loop_runs_between_the_steps_of_a_body() -> None:
    bodies, ran = LargeBodies(2**24), 0
    task = asyncio.create_task(bodies.parse(b'"' + b"x" * 40 * STEP_BYTES + b'"', len))  # type: ignore[arg-type]
    while not task.done():
        await asyncio.sleep(0)
        ran += 1
    assert ran >= 40 and await task == 40 * STEP_BYTES


async def test_a_body_given_up_between_two_steps_gives_up_the_turn() -> None:
    bodies = LargeBodies(2**24)
    task = asyncio.create_task(bodies.parse(b'"' + b"x" * 40 * STEP_BYTES + b'"', bool))
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.wait_for(bodies.parse(LARGE, bool), 5) is True
