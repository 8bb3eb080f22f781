"""Supervised: an expert whose vLLM process is watched, and started again when it dies."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import Any, Final, Generic, Protocol, TypeVar

from coe.engines.supervision.core import Core
from coe.engines.supervision.watch import Watch
from coe.engines.vllm.alive import failed_requests, kill, probe
from coe.engines.vllm.options import Options
from coe.engines.vllm.process import stop
from registry.spec import ExpertSpec

ATTEMPTS: Final = 2
"""How often a request is given to an engine process, if the first dies before the first text: a request that ends
every process must not be tried for ever."""


class Engine(Protocol):
    """A started engine. llm: vLLM's AsyncLLM."""

    @property
    def llm(self) -> Any:
        """See above."""


T = TypeVar("T", bound=Engine)


class Supervised(ABC, Generic[T]):
    """What experts on vLLM share. A subclass starts its engine, and frees in `close` what it holds beside it.

    Args:
        spec: the expert.
        options: of the engine.
    """

    def __init__(self, spec: ExpertSpec, options: Options) -> None:
        self.spec = spec
        self.capacity = options.max_num_seqs
        self.core: Core[T] = Core(spec.name, self._start, self._stop)
        self.watch: Watch[T] = Watch(spec.name, self.core, _probe, _kill, hung_s=options.hang_timeout_s)

    async def open(self) -> None:
        """Start the engine process. Raises WeightsError, OutOfMemory or ConfigError."""
        await self.core.open()
        self.watch.start()

    async def close(self) -> None:
        """End the engine process and wait until it is gone; running answers fail."""
        self.watch.stop()
        await self.core.close()

    def unhealthy(self) -> str | None:
        """Why it does not answer now, such as that its engine process starts again; None if it does."""
        return self.watch.problem

    @abstractmethod
    async def _start(self) -> T:
        """A started engine."""

    async def _stop(self, running: T) -> None:
        await failed_requests(running.llm)
        await asyncio.to_thread(stop, running.llm)


async def _probe(running: Engine) -> None:
    await probe(running.llm)


def _kill(running: Engine) -> None:
    kill(running.llm)
