"""The seam of slots: opened when first needed, switched to verified files, closed without raising.

Whatever an engine raises becomes an error of the expert (`coe.seam`), and an expert whose files change while they are
read is not served.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from coe.engines.base import Expert, ShapeKey, Slot, SlotEngine
from coe.engines.checked import checked_expert
from coe.errors import EngineError
from coe.seam import is_interrupt, seam, text_of
from registry.spec import ExpertSpec

logger = logging.getLogger(__name__)


def shape_of(engine: SlotEngine, spec: ExpertSpec) -> ShapeKey:
    """The shape that the engine states. Raises EngineError if it is none."""
    shape = engine.shape(spec)
    if not isinstance(shape, ShapeKey):
        raise EngineError(f"{spec.name!r} cannot be loaded: its engine states no ShapeKey, but {type(shape).__name__}")
    return shape


class CheckedSlot:
    """A slot of an engine, for the experts of one shape.

    Args:
        spec_of: the spec of a `name@version`.
        located: its verified files; raises if they are missing or not the registered ones.

    Attributes:
        expert: what it serves; None if the engine serves nothing, or what was not verified.
    """

    def __init__(
        self,
        engine: SlotEngine,
        shape: ShapeKey,
        *,
        spec_of: Callable[[str], ExpertSpec],
        located: Callable[[ExpertSpec], Awaitable[Path]],
    ) -> None:
        self.expert: Expert | None = None
        self._engine, self._shape = engine, shape
        self._spec_of, self._located = spec_of, located
        self._slot: Slot | None = None

    async def switch(self, ref: str) -> Expert:
        """Serve the expert of that `name@version`; see `Slot.switch`. Wrong files leave the former expert."""
        spec, former = self._spec_of(ref), self.expert
        with seam(spec.name):
            path = await self._located(spec)
            try:
                expert = await self._switched(spec, path)
                await self._located(spec)  # again: the files may have changed while they were read
            except BaseException:
                self.expert = former if self._serves(former) else None
                raise
        self.expert = expert
        return expert

    async def _switched(self, spec: ExpertSpec, path: Path) -> Expert:
        if self._slot is None:
            self._slot = await self._engine.open_slot(self._shape)
        return checked_expert(spec, await self._slot.switch(spec, path))

    def _serves(self, former: Expert | None) -> bool:
        """Whether the slot still has the former expert; an engine that fails to state it does not."""
        try:
            return former is not None and self._slot is not None and self._slot.expert is former
        except BaseException as error:  # third-party code may raise anything
            if is_interrupt(error):
                raise
            return False

    async def prefetch(self, ref: str) -> int:
        """Bring the weights of `name@version` closer; see `Slot.prefetch`. A failure is logged: its load has the error.

        Nothing happens while the slot has not been opened.
        """
        spec = self._spec_of(ref)
        try:
            if self._slot is not None:
                return int(await self._slot.prefetch(spec, await self._located(spec)) or 0)
        except BaseException as error:
            if is_interrupt(error):
                raise
            logger.info("%s is not read ahead: %s", spec.name, text_of(error))
        return 0

    async def park(self) -> bool:
        """Free the weights; see `Slot.park`. A slot that fails to is closed: its state is not known."""
        self.expert = None
        try:
            if self._slot is not None and await self._slot.park() is True:
                return True
        except BaseException as error:
            if is_interrupt(error):
                raise
            logger.error("a slot of %s: parking failed: %s", self._shape, text_of(error), exc_info=error)
        await self.close()
        return False

    async def close(self) -> None:
        """Free everything. A failure is logged: it must not fail the expert that loads in this room."""
        slot, self._slot, self.expert = self._slot, None, None
        try:
            if slot is not None:
                await slot.close()
        except BaseException as error:
            if is_interrupt(error):
                raise
            logger.error("a slot of %s: closing failed: %s", self._shape, text_of(error), exc_info=error)
