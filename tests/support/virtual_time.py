"""Time of an event loop that passes only while every task waits: a test with delays that no machine can change."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec

P = ParamSpec("P")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer once nothing else can run.

    While a thread of `asyncio.to_thread` works, the clock stands still and the loop waits for the thread.
    """

    def __init__(self) -> None:
        self._now_s, self._in_threads = 0.0, 0
        super().__init__(_Selector(self))

    def time(self) -> float:
        """Seconds of virtual time since the loop was made."""
        return self._now_s

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """As in asyncio; counts the calls that have not returned."""
        future = super().run_in_executor(executor, func, *args)
        self._in_threads += 1
        future.add_done_callback(lambda _: self._leave_thread())
        return future

    def _leave_thread(self) -> None:
        self._in_threads -= 1


class _Selector(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        if self._loop._in_threads:
            return super().select()
        if not (events := super().select(0)):
            self._loop._now_s += timeout
        return events


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A test that runs to its end on a `VirtualTimeLoop`."""

    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run
