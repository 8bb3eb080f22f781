"""An expert on a host of its own, for callers that are no coroutines: a router's features, a script.

The host lives on an event loop in a background thread, so that many requests are in flight at once and its engine
batches them, while the caller, in whatever thread and inside or outside a loop of its own, waits for all of them.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import aclosing, suppress
from typing import Any, Final, TypeVar

from coe.config import Config, EnginesConfig
from coe.errors import EngineError
from coe.host import Host, open_host
from coe.types import GenerateRequest
from registry.store import Snapshot

_T = TypeVar("_T")
_EXIT_S: Final = 10.0
"""Most seconds that the end of the interpreter waits for a thread."""

Ask = Callable[[GenerateRequest], Awaitable[str]]
"""The whole text of one answer. Raises as `Host.ask` does."""


class HostedExpert:
    """One expert, loaded when it is first asked; safe to share between threads.

    Its host holds that expert and its base only, within what memory is free then. `close` unloads it, and ends the
    thread; dropping the last reference does so without waiting, and so does the end of the interpreter.

    Args:
        name: the expert.
        engines: their settings.
    """

    def __init__(self, name: str, snapshot: Snapshot, engines: EnginesConfig | None = None) -> None:
        spec = snapshot.get(name)
        needed = {spec.name, *spec.references, *spec.residency_keys(snapshot.experts)}
        self.name = spec.name
        self._alone = Snapshot(snapshot.version, {one: snapshot.experts[one] for one in sorted(needed)})
        self._config = Config(engines=engines or EnginesConfig())
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._finalizer: weakref.finalize[..., HostedExpert] | None = None

    def run(self, work: Callable[[Ask], Coroutine[Any, Any, _T]]) -> _T:
        """What `work(ask)` returns. It is cancelled where the caller is interrupted.

        Raises:
            ConfigError: the engine cannot be made. EngineError: closed meanwhile. Whatever `work` raises.
        """
        running = self._started().submit(work)
        try:
            return running.result()
        except CancelledError:
            raise EngineError(f"{self.name!r} was closed while it was asked") from None
        finally:
            running.cancel()

    def close(self) -> None:
        """Unload the expert and end the thread; what is being asked then fails. A later `run` begins anew."""
        with self._lock:
            worker, self._worker = self._worker, None
            self._forget()
        if worker is not None:
            worker.stop()
            worker.thread.join()

    def _started(self) -> _Worker:
        with self._lock:
            if self._worker is None or not self._worker.thread.is_alive():
                self._forget()
                self._worker = _Worker(self.name, self._alone, self._config)
                self._finalizer = weakref.finalize(self, _end, self._worker)
                self._worker.thread.start()
            return self._worker

    def _forget(self) -> None:
        """A worker that has ended, and its host, need not be kept for the end of the interpreter."""
        if self._finalizer is not None:
            self._finalizer.detach()


class _Worker:
    """The thread and its loop. It knows nothing of the HostedExpert, which may thus be dropped."""

    def __init__(self, name: str, snapshot: Snapshot, config: Config) -> None:
        self._name, self._snapshot, self._config = name, snapshot, config
        self._opened: Future[tuple[asyncio.AbstractEventLoop, Host]] = Future()
        self._stopped = asyncio.Event()
        self._working: set[asyncio.Task[Any]] = set()
        self.thread = threading.Thread(target=self._main, name=f"expert:{name}", daemon=True)

    def submit(self, work: Callable[[Ask], Coroutine[Any, Any, _T]]) -> Future[_T]:
        """Begin some work on the loop, once the host is open."""
        loop, host = self._opened.result()
        coroutine = self._do(work, host)
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, loop)
        except RuntimeError as error:  # the loop is closed
            coroutine.close()
            raise EngineError(f"{self._name!r} was closed before it was asked") from error

    def stop(self) -> None:
        """Say that the thread is to end, as soon as it can. Does not wait."""
        self._opened.add_done_callback(self._stop)

    def _stop(self, opened: Future[tuple[asyncio.AbstractEventLoop, Host]]) -> None:
        if opened.exception() is None:
            with suppress(RuntimeError):  # it has ended
                opened.result()[0].call_soon_threadsafe(self._stopped.set)

    async def _do(self, work: Callable[[Ask], Coroutine[Any, Any, _T]], host: Host) -> _T:
        async def ask(request: GenerateRequest) -> str:
            async with aclosing(host.ask(self._name, request)) as chunks:
                return "".join([chunk.text async for chunk in chunks])

        task = asyncio.current_task()
        assert task is not None  # `run_coroutine_threadsafe` makes one
        self._working.add(task)
        try:
            return await work(ask)
        finally:
            self._working.discard(task)

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if not self._opened.done():
                self._opened.set_exception(error)
            elif threading.main_thread().is_alive():
                raise
            # Else the interpreter ends: nothing more can be run in threads, as unloading is, and its end frees all.

    async def _serve(self) -> None:
        async with open_host(self._config, self._snapshot) as host:
            self._opened.set_result((asyncio.get_running_loop(), host))
            await self._stopped.wait()
            for task in self._working:
                task.cancel()
            await asyncio.gather(*self._working, return_exceptions=True)  # a host is closed when nobody is asked


def _end(worker: _Worker) -> None:
    """May be called in any thread, the worker's own too."""
    worker.stop()
    if not threading.main_thread().is_alive():
        worker.thread.join(_EXIT_S)
