"""A thread that compiles grammars one after the other, each once however many requests wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from coe.engines.constrained.grammar import Grammar
from coe.errors import Overloaded

_T = TypeVar("_T")


class Lane(Generic[_T]):
    """Calls for grammars, in order of arrival.

    Args:
        name: of the thread.
        most: different grammars that may wait or run.
    """

    def __init__(self, name: str, most: int) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._most = most
        self._futures: dict[Grammar, Future[_T]] = {}

    async def run(self, grammar: Grammar, call: Callable[[], _T]) -> _T:
        """The result of `call`, or of the call that already waits for this grammar.

        Raises:
            Overloaded: too many grammars wait.
        """
        future = self._futures.get(grammar)
        if future is None:
            if len(self._futures) >= self._most:
                raise Overloaded(f"{len(self._futures)} JSON schemas are waiting to be compiled; try again later")
            future = self._futures[grammar] = self._thread.submit(call)
            future.add_done_callback(lambda _: self._futures.pop(grammar, None))
        # A request that is cancelled leaves the call to the others.
        return await asyncio.shield(asyncio.wrap_future(future))

    def close(self) -> None:
        """Make no more calls."""
        self._thread.shutdown(wait=False, cancel_futures=True)
