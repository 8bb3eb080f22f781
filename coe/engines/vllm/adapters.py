"""LoRA adapters in a running vLLM engine: checked before vLLM reads them, and bounded in number.

vLLM identifies an adapter by an integer: the same integer for other content answers with the old weights. An adapter
that cannot be loaded while a request is scheduled ends the whole engine, and one that vLLM has evicted is read again
from its folder at that time. So each one is checked and added before a request uses it, ids are never used again, and
there are never more adapters than vLLM keeps.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from coe.engines.base import Adapter
from coe.engines.vllm.alive import unless_dead
from coe.errors import EngineError, WeightsError
from coe.seam import text_of
from registry.errors import SourceError
from registry.inspection import Facts, inspect
from registry.lora.check import read_lora
from registry.lora.config import read_lora_config

_IDS: Final = count(1)
"""Ids of adapters; each is used once in this process, whatever the engine."""


@dataclass(slots=True)
class _Added:
    """An adapter in the engine. `request`: vLLM's LoRARequest; `leases`: requests that use it."""

    request: Any
    leases: int = 0


class AdapterChecks:
    """Checks that adapters fit a base and that vLLM can serve them; the results are kept by content.

    Args:
        base: name of the base.
        folder: of its files.
        max_rank: the highest rank that the engine has room for.
    """

    def __init__(self, base: str, folder: Path, max_rank: int) -> None:
        self._base, self._folder, self._max_rank = base, folder, max_rank
        self._facts: Facts | None = None

    def check(self, adapter: Adapter) -> None:
        """Raises WeightsError if the adapter cannot be served. Reads all its weights; blocks."""
        name = f"adapter {adapter.spec.name!r}"
        try:
            if self._facts is None:
                self._facts = inspect(self._folder)
            read_lora(adapter.path, self._base, self._facts)
            if (problem := self._unsupported(adapter.path)) is not None:
                raise WeightsError(f"{name} cannot run on vLLM: {problem}", public=f"{name} cannot run: {problem}")
        except (SourceError, OSError, ValueError) as error:
            raise WeightsError(f"{name} cannot be loaded: {error}", public=f"{name} does not fit its base") from error

    def _unsupported(self, folder: Path) -> str | None:
        config = read_lora_config(folder)
        rank = max([config.r, *config.rank_pattern.values()])
        if rank > self._max_rank:
            return f"its rank is {rank}, more than engines.vllm.max_lora_rank = {self._max_rank}"
        used = {
            "DoRA": config.use_dora,
            "an activated adapter (aLoRA)": bool(config.alora_invocation_tokens),
            "modules_to_save": bool(config.modules_to_save),
            "trainable_token_indices": bool(config.tokens),
            "a bias": config.bias != "none" or config.lora_bias,
        }
        return next((f"it uses {what}, which vLLM does not support" for what, is_used in used.items() if is_used), None)


class Adapters:
    """The adapters of one engine process; the least recently used one that no request uses makes room.

    Args:
        llm: vLLM's engine, with `add_lora` and `remove_lora`.
        most: adapters that vLLM keeps (`max_cpu_loras`).
        check: raises if an adapter cannot be served; blocks.
        request: makes vLLM's LoRARequest of name, id and folder.
    """

    def __init__(
        self, llm: Any, most: int, check: Callable[[Adapter], None], request: Callable[[str, int, str], Any]
    ) -> None:
        self._llm, self._most, self._check, self._request = llm, most, check, request
        self._added: OrderedDict[str, _Added] = OrderedDict()  # by content, least recently used first
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def lease(self, adapter: Adapter) -> AsyncIterator[Any]:
        """vLLM's LoRARequest of the adapter, which stays in the engine inside the block.

        Waits while as many other adapters as the engine keeps are in use.

        Raises:
            WeightsError: the adapter cannot be served; the engine goes on.
        """
        key = await asyncio.to_thread(adapter.key)
        added = await self._acquire(key, adapter)
        try:
            yield added.request
        finally:
            added.leases -= 1
            if not added.leases:
                async with self._changed:
                    self._changed.notify_all()

    async def _acquire(self, key: str, adapter: Adapter) -> _Added:
        if key not in self._added:
            await asyncio.to_thread(self._check, adapter)
        async with self._changed:
            while key not in self._added:
                if len(self._added) < self._most or await self._remove_one():
                    await self._add(key, adapter)
                else:
                    await self._changed.wait()
            added = self._added[key]
            self._added.move_to_end(key)
            added.leases += 1
            return added

    async def _remove_one(self) -> bool:
        """Remove the least recently used adapter without a lease; False if all are in use."""
        key = next((key for key, added in self._added.items() if not added.leases), None)
        if key is None:
            return False
        removed = self._added.pop(key)
        lora_id = removed.request.lora_int_id
        if not await unless_dead(self._llm, self._llm.remove_lora(lora_id)):
            raise EngineError(f"vLLM has no adapter with the id {lora_id}, which was added to it")
        return True

    async def _add(self, key: str, adapter: Adapter) -> None:
        request = self._request(adapter.spec.ref, next(_IDS), str(adapter.path))
        name = f"adapter {adapter.spec.name!r}"
        try:
            added = await unless_dead(self._llm, self._llm.add_lora(request))
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                raise
            raise WeightsError(
                f"{name} cannot be loaded by vLLM: {text_of(error)}", public=f"{name} cannot be loaded"
            ) from error
        if not added:
            raise EngineError(f"{name} was not added: vLLM has an adapter with the id {request.lora_int_id}")
        self._added[key] = _Added(request)
