"""Whether an engine process is alive and responds.

vLLM fails the requests of a process that dies, but not other calls to it: without `unless_dead`, their callers would
wait without end.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable
from typing import Any, Final, TypeVar

T = TypeVar("T")
_CHECK_S: Final = 0.2
_SETTLE_S: Final = 5.0


async def unless_dead(llm: Any, call: Awaitable[T], *, within_s: float = math.inf) -> T:
    """The result of a call to the engine process.

    Args:
        llm: vLLM's AsyncLLM.
        within_s: seconds that the process has to answer.

    Raises:
        EngineDeadError: of vLLM; the process died before it answered. The call is cancelled.
        TimeoutError: it has not answered in time. The call is cancelled.
    """
    waiting, ends = asyncio.ensure_future(call), time.monotonic() + within_s
    try:
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=min(_CHECK_S, within_s))
            if not waiting.done() and llm.errored:
                raise llm.dead_error
            if not waiting.done() and time.monotonic() >= ends:
                raise TimeoutError(f"the engine process has not responded for {within_s:g} s")
        return waiting.result()
    finally:
        waiting.cancel()


async def probe(llm: Any) -> None:
    """Return when the engine process has answered, which it does between two steps of its model.

    Raises:
        EngineDeadError: of vLLM; the process died.
    """
    await llm.check_health()
    await unless_dead(llm, llm.is_paused())


async def failed_requests(llm: Any) -> None:
    """Wait until vLLM has failed the requests of a process that died, at most 5 s.

    To be awaited before the engine is stopped: that ends the task which fails them.
    """
    if llm.errored and llm.output_handler is not None:
        await asyncio.wait({llm.output_handler}, timeout=_SETTLE_S)


def kill(llm: Any) -> None:
    """Kill the engine process, also one that is stopped. vLLM notices its death and fails its requests."""
    for process in llm.engine_core.resources.engine_manager.processes:
        process.kill()
