"""The life of an engine process: it is started again after its death, with growing delays; no process needed."""

from __future__ import annotations

import asyncio

import pytest

from coe.engines.supervision.core import Core, EngineLost
from coe.errors import EngineError, Scope


class Machine:
    """Starts numbered engines, or fails to; keeps which were stopped and how long was waited."""

    def __init__(self) -> None:
        self.started, self.stopped, self.waited = 0, [], []  # type: ignore[var-annotated]
        self.failing = 0
        self.now = 0.0

    async def start(self) -> int:
        await asyncio.sleep(0)
        if self.failing:
            self.failing -= 1
            raise EngineError("no memory")
        self.started += 1
        return self.started

    async def stop(self, engine: int) -> None:
        await asyncio.sleep(0)
        self.stopped.append(engine)

    async def sleep(self, seconds: float) -> None:
        self.waited.append(seconds)

    def core(self) -> Core[int]:
        return Core("m", self.start, self.stop, clock=lambda: self.now, sleep=self.sleep)


async def test_requests_after_a_death_share_one_new_engine() -> None:
    machine = Machine()
    core = machine.core()
    first = await core.open()
    core.lost(first)
    core.lost(first)  # of another request
    assert await asyncio.gather(*(core.live() for _ in range(5))) == [2] * 5
    assert (machine.started, machine.stopped, core.deaths) == (2, [1], 1)
    core.lost(first)  # late: the engine of today goes on
    assert await core.live() == 2


async def test_deaths_in_a_row_delay_the_start_and_a_long_life_ends_the_row() -> None:
    machine = Machine()
    core = machine.core()
    engine = await core.open()
    for _ in range(9):
        core.lost(engine)
        engine = await core.live()
    assert machine.waited == [1, 2, 4, 8, 16, 32, 60, 60]
    machine.now += 61
    core.lost(engine)
    await core.live()
    assert len(machine.waited) == 8


async def test_a_failed_start_fails_those_who_wait_and_the_next_request_tries_again() -> None:
    machine = Machine()
    core = machine.core()
    core.lost(await core.open())
    machine.failing = 1
    failed = await asyncio.gather(core.live(), core.live(), return_exceptions=True)
    assert [type(each) for each in failed] == [EngineLost] * 2
    assert isinstance(failed[0], EngineLost) and failed[0].scope is Scope.PROCESS and "no memory" in str(failed[0])
    assert await core.live() == 2


async def test_a_cancelled_request_does_not_cancel_the_start_for_others() -> None:
    machine = Machine()
    core = machine.core()
    core.lost(await core.open())
    impatient, patient = asyncio.ensure_future(core.live()), asyncio.ensure_future(core.live())
    await asyncio.sleep(0)
    impatient.cancel()
    assert await patient == 2


async def test_after_close_no_engine_runs_and_none_starts() -> None:
    machine = Machine()
    core = machine.core()
    core.lost(await core.open())
    waiting = asyncio.ensure_future(core.live())
    await asyncio.sleep(0)
    await core.close()
    await asyncio.gather(waiting, return_exceptions=True)
    assert machine.stopped == list(range(1, machine.started + 1))
    with pytest.raises(EngineError, match="was unloaded"):
        await core.live()


async def test_close_does_not_wait_for_a_delayed_start() -> None:
    machine, begun = Machine(), asyncio.Event()

    async def long(seconds: float) -> None:
        begun.set()
        await asyncio.sleep(3600)

    core = Core("m", machine.start, machine.stop, clock=lambda: 0.0, sleep=long)
    for engine in (await core.open(), 2):
        core.lost(engine)
        waiting = asyncio.ensure_future(core.live())
        await asyncio.wait({waiting, asyncio.ensure_future(begun.wait())}, return_when=asyncio.FIRST_COMPLETED)
    assert begun.is_set() and not waiting.done()
    async with asyncio.timeout(10):
        await core.close()
        with pytest.raises(EngineError, match="was unloaded"):
            await waiting
    assert (machine.started, machine.stopped, core.deaths) == (2, [1, 2], 2)
