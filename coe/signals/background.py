"""One expert on a host of its own, for callers that are not coroutines: a router's features, a script.

A router that reads signals runs on the routing thread, so the expert gets its own host: read from the serving engine,
a signal would make routing wait for generation. The host lives on an event loop in a background thread (anyio's
blocking portal): many requests are in flight at once and its engine batches them, while the caller waits for all of
them, in any thread, inside or outside an event loop.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, aclosing, suppress
from typing import Any, TypeVar

from anyio.from_thread import start_blocking_portal

from coe.config import Config
from coe.engine_config import EnginesConfig
from coe.errors import EngineError
from coe.hosting import open_host
from coe.types import GenerateRequest
from registry.store import Snapshot

_T = TypeVar("_T")
AskText = Callable[[GenerateRequest], Awaitable[str]]
"""The complete text of one answer. Raises as `Host.ask` does."""


class BackgroundExpert:
    """One expert, loaded on its first call; safe to share between threads.

    Its host holds only that expert and what it needs, in the memory that is free then. `close` unloads it and ends the
    thread; dropping the last reference does so without waiting, and so does the exit of the interpreter.

    Args:
        name: the expert.
        engines: settings of the engines.
    """

    def __init__(self, name: str, snapshot: Snapshot, engines: EnginesConfig | None = None) -> None:
        spec = snapshot.get(name)
        needed = {spec.name, *spec.references, *spec.residency_keys(snapshot.experts)}
        self.name = spec.name
        self._alone = Snapshot(snapshot.version, {one: snapshot.experts[one] for one in sorted(needed)})
        self._config = Config(engines=engines or EnginesConfig())
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._finalizer: weakref.finalize[..., BackgroundExpert] | None = None

    def run(self, work: Callable[[AskText], Coroutine[Any, Any, _T]]) -> _T:
        """The result of `work(ask)`, which is cancelled if the caller is interrupted.

        Raises:
            ConfigError: the engine cannot be made. EngineError: closed in the meantime. Whatever `work` raises.
        """
        running = self._started().submit(work)
        try:
            return running.result()
        except CancelledError:
            raise EngineError(f"{self.name!r} was closed while a call was running") from None
        finally:
            running.cancel()

    def close(self) -> None:
        """Unload the expert and end the thread; running calls fail. A later `run` opens a new host."""
        with self._lock:
            worker, self._worker = self._worker, None
            if self._finalizer is not None:
                self._finalizer.detach()
        if worker is not None:
            worker.close()

    def _started(self) -> _Worker:
        with self._lock:
            if self._worker is None:
                self._worker = _Worker(self.name, self._alone, self._config)
                self._finalizer = weakref.finalize(self, _end, self._worker)
            return self._worker


class _Worker:
    """The host and its thread. Holds no reference to the BackgroundExpert, so that one can be dropped."""

    def __init__(self, name: str, snapshot: Snapshot, config: Config) -> None:
        self._name = name
        self._working: set[asyncio.Task[Any]] = set()
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal(name=f"expert:{name}"))
            host = self._portal.wrap_async_context_manager(open_host(config, snapshot))
            self._host = stack.enter_context(host)
            stack.callback(self._portal.call, self._cancel_work)  # before the host is closed
            self._open = stack.pop_all()

    def submit(self, work: Callable[[AskText], Coroutine[Any, Any, _T]]) -> Future[_T]:
        """Start `work(ask)` on the loop."""
        try:
            return self._portal.start_task_soon(self._do, work)
        except RuntimeError as error:  # the portal is not running any more
            raise EngineError(f"{self._name!r} was closed before the call started") from error

    def close(self) -> None:
        """Cancel what runs, unload the expert and end the thread. Not from its own thread."""
        self._open.close()

    async def _cancel_work(self) -> None:
        for task in self._working:
            task.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)

    async def _do(self, work: Callable[[AskText], Coroutine[Any, Any, _T]]) -> _T:
        async def ask(request: GenerateRequest) -> str:
            async with aclosing(self._host.ask(self._name, request)) as chunks:
                return "".join([chunk.text async for chunk in chunks])

        task = asyncio.current_task()
        assert task is not None  # the portal runs this in a task
        self._working.add(task)
        try:
            return await work(ask)
        finally:
            self._working.discard(task)


def _end(worker: _Worker) -> None:
    """Close a worker without waiting, in whatever thread the last reference was dropped, also the worker's own."""
    if threading.main_thread().is_alive():
        threading.Thread(target=worker.close, name=f"expert:{worker._name}:close", daemon=True).start()
    else:
        with suppress(
            RuntimeError
        ):  # at interpreter exit, no thread starts that could unload weights: the exit frees them
            worker.close()
