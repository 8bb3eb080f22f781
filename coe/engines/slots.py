"""Slots of engines that load and unload: one expert a slot, so that the Host has one way for all engines."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from coe.engines.base import Capabilities, Engine, Expert, LoadingEngine, ShapeKey, Slot, SlotEngine
from registry.spec import ExpertSpec


def with_slots(engine: Engine) -> SlotEngine:
    """The engine itself if it has slots, else a view of it in which each expert has a slot of its own."""
    return engine if isinstance(engine, SlotEngine) else _OneExpertASlot(cast(LoadingEngine, engine))


class _OneExpertASlot:
    """A `LoadingEngine` as a `SlotEngine`."""

    slots_per_shape = 1

    def __init__(self, engine: LoadingEngine) -> None:
        self._engine = engine

    @property
    def capabilities(self) -> Capabilities:
        return self._engine.capabilities

    def footprint(self, spec: ExpertSpec) -> int:
        return self._engine.footprint(spec)

    def shape(self, spec: ExpertSpec) -> ShapeKey:
        return ShapeKey.only(spec)

    def slot_bytes(self, shape: ShapeKey) -> int:
        """None: there is no process, and key-value caches take the memory beside the budget."""
        return 0

    async def open_slot(self, shape: ShapeKey) -> Slot:
        return LoadingSlot(shape, self._engine)


class LoadingSlot:
    """A slot that loads and unloads with its engine. Only weights take memory, so parking it unloads them."""

    def __init__(self, shape: ShapeKey, engine: LoadingEngine) -> None:
        self.shape = shape
        self.expert: Expert | None = None
        self._engine = engine

    async def switch(self, spec: ExpertSpec, path: Path) -> Expert:
        """Unload the former expert, then load; see `Slot.switch`. After an error the slot is empty.

        An engine whose `unload` fails has no expert afterwards either: the former one is not used again.
        """
        await self._unload()
        self.expert = expert = await self._engine.load(spec, path)
        return expert

    async def prefetch(self, spec: ExpertSpec, path: Path) -> int:
        """Nothing: the engine has no place for weights beside those that it serves."""
        return 0

    async def park(self) -> bool:
        """Unload: there is no process that could stay."""
        await self._unload()
        return False

    async def unpark(self) -> None:
        """Nothing: the slot is empty."""

    async def close(self) -> None:
        """Unload."""
        await self._unload()

    async def _unload(self) -> None:
        expert, self.expert = self.expert, None
        if expert is not None:
            await self._engine.unload(expert)
