"""Dead and hung engine processes: calls to them end, and the watch starts them again; no process is needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from coe.engines.supervision.core import Core
from coe.engines.supervision.watch import MOST_DEATHS, Watch
from coe.engines.vllm.alive import failed_requests, probe, unless_dead
from coe.errors import EngineError


class Dead(Exception):
    """As vLLM's EngineDeadError."""


class LLM:
    """vLLM's engine: a call to a process that died, or is stopped, never returns."""

    def __init__(self) -> None:
        self.errored = self.stopped = False
        self.output_handler: asyncio.Task[None] | None = None
        self.dead_error = Dead()
        self.cancelled = 0

    async def check_health(self) -> None:
        if self.errored:
            raise self.dead_error

    async def is_paused(self) -> bool:
        try:
            while self.errored or self.stopped:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return False

    def kill(self) -> None:
        self.errored = True


async def test_a_call_to_a_process_that_dies_ends() -> None:
    llm = LLM()
    assert await unless_dead(llm, llm.is_paused()) is False
    llm.stopped = True
    call = asyncio.ensure_future(unless_dead(llm, llm.is_paused()))
    await asyncio.sleep(0.05)
    assert not call.done()
    llm.kill()
    async with asyncio.timeout(5):
        with pytest.raises(Dead):
            await call
    assert llm.cancelled == 1
    with pytest.raises(Dead):
        await probe(llm)


async def test_a_call_to_a_process_that_does_not_respond_in_time_ends() -> None:
    llm = LLM()
    assert await unless_dead(llm, llm.is_paused(), within_s=10) is False
    llm.stopped = True
    async with asyncio.timeout(5):
        with pytest.raises(TimeoutError, match="has not responded for 0.3 s"):
            await unless_dead(llm, llm.is_paused(), within_s=0.3)
    await asyncio.sleep(0.05)
    assert llm.cancelled == 1


async def test_a_failed_call_raises_its_own_error_and_a_cancelled_one_is_cancelled() -> None:
    llm = LLM()

    async def fails() -> None:
        raise ValueError("no such path")

    with pytest.raises(ValueError, match="no such path"):
        await unless_dead(llm, fails())
    llm.stopped = True
    call = asyncio.ensure_future(unless_dead(llm, llm.is_paused()))
    await asyncio.sleep(0.05)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await asyncio.sleep(0)
    assert call.cancelled() and llm.cancelled == 1


async def test_a_dead_engine_is_stopped_only_after_its_requests_have_failed() -> None:
    llm, failed = LLM(), asyncio.Event()

    async def fail_requests() -> None:
        await asyncio.sleep(0.05)
        failed.set()

    llm.output_handler = asyncio.ensure_future(fail_requests())
    await failed_requests(llm)
    assert not failed.is_set()  # an engine that lives has nothing to wait for
    llm.kill()
    await failed_requests(llm)
    assert failed.is_set()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Engines:
    """Starts engines, or fails to."""

    def __init__(self) -> None:
        self.made: list[LLM] = []
        self.stopped: list[LLM] = []
        self.killed: list[LLM] = []
        self.failing = False

    async def start(self) -> LLM:
        if self.failing:
            raise EngineError("no memory")
        self.made.append(LLM())
        return self.made[-1]

    async def stop(self, engine: LLM) -> None:
        self.stopped.append(engine)

    def kill(self, engine: LLM) -> None:
        self.killed.append(engine)
        engine.kill()

    async def watched(self, **seconds: float) -> tuple[Core[LLM], Watch[LLM]]:
        async def at_once(_: float) -> None: ...

        core = Core("m", self.start, self.stop, sleep=at_once)
        await core.open()
        return core, Watch("m", core, probe, self.kill, **{"hung_s": 5.0, **seconds})


async def test_a_healthy_engine_is_left_alone() -> None:
    engines = Engines()
    core, watch = await engines.watched()
    await watch.step()
    assert watch.problem is None and core.engine is engines.made[0] and len(engines.made) == 1


async def test_a_dead_engine_starts_again_before_a_request_needs_it() -> None:
    engines = Engines()
    core, watch = await engines.watched(period_s=0.01)
    watch.start()
    engines.made[0].kill()
    await until(lambda: core.engine not in (None, engines.made[0]))
    watch.stop()
    assert core.engine is engines.made[1] and engines.stopped == engines.made[:1]
    assert not engines.killed and watch.problem is None


async def test_an_engine_that_does_not_respond_is_reported_then_killed_and_replaced() -> None:
    engines = Engines()
    core, watch = await engines.watched(slow_s=0.05, hung_s=0.5)
    engines.made[0].stopped = True
    step = asyncio.ensure_future(watch.step())
    await until(lambda: watch.problem is not None)
    assert "has not responded for" in str(watch.problem) and not engines.killed
    async with asyncio.timeout(5):
        await step
    assert engines.killed == engines.made[:1] and core.engine is engines.made[1]
    assert watch.problem is None


async def test_a_slow_engine_that_responds_in_time_is_kept() -> None:
    engines = Engines()
    core, watch = await engines.watched(slow_s=0.02, hung_s=30.0)
    engines.made[0].stopped = True
    step = asyncio.ensure_future(watch.step())
    await asyncio.sleep(0.1)
    assert watch.problem is not None
    engines.made[0].stopped = False
    async with asyncio.timeout(5):
        await step
    assert watch.problem is None and not engines.killed and core.engine is engines.made[0]


async def test_an_engine_that_never_starts_again_is_not_tried_without_end() -> None:
    engines = Engines()
    core, watch = await engines.watched()
    engines.made[0].kill()
    engines.failing = True
    for _ in range(3 * MOST_DEATHS):
        await watch.step()
    assert core.deaths == MOST_DEATHS + 1
    assert watch.problem is not None and "the next request starts it again" in watch.problem
    engines.failing = False
    assert await core.live() is engines.made[1]  # a request
    assert watch.problem is None


async def test_while_an_engine_starts_again_the_expert_is_unhealthy() -> None:
    engines = Engines()
    core, watch = await engines.watched()
    begun = asyncio.Event()
    start = engines.start

    async def slow_start() -> LLM:
        begun.set()
        await asyncio.sleep(0.05)
        return await start()

    core._start = slow_start
    engines.made[0].kill()
    step = asyncio.ensure_future(watch.step())
    await begun.wait()
    assert watch.problem is not None and "starts again" in watch.problem
    await step
    assert watch.problem is None


async def test_errors_of_the_watch_itself_do_not_end_it(caplog: Any) -> None:
    engines = Engines()
    core, watch = await engines.watched(period_s=0.01)

    def broken(_: LLM) -> Any:
        raise RuntimeError("broken")

    watch._probe = broken
    watch.start()
    await until(lambda: caplog.text.count("cannot be watched") >= 2)
    watch.stop()
    assert core.engine is engines.made[0]
