"""VLLMSlot: one vLLM process that takes the weights of experts of one shape in turn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from coe.engines.base import ShapeKey
from coe.engines.page_cache import read_ahead
from coe.engines.vllm.expert import VLLMExpert
from coe.engines.vllm.files import fits_in_place
from coe.seam import text_of
from registry.spec import ExpertSpec

logger = logging.getLogger(__name__)


class VLLMSlot:
    """A process for one expert at a time; see `coe.engines.base.Slot`.

    An expert whose files have the same config, tokenizer and tensors as the former's takes over its process: vLLM reads
    the new weights in place, and the prefix cache stays, since each expert has a cache salt of its own. Any other one
    gets a new process.

    Args:
        shape: the shape that it was opened for.
        make: an expert of spec and folder, without a process.
        sleeps: a parked process sleeps (its weights and its cache leave the device); else it ends.
    """

    def __init__(self, shape: ShapeKey, make: Callable[[ExpertSpec, Path], VLLMExpert], *, sleeps: bool) -> None:
        self.shape = shape
        self.expert: VLLMExpert | None = None
        self._make, self._sleeps = make, sleeps
        self._holder: VLLMExpert | None = None  # whose process it is; its weights are gone unless it is `expert`
        self._asleep = False

    async def switch(self, spec: ExpertSpec, path: Path) -> VLLMExpert:
        """Serve another expert; see `Slot.switch`.

        Files that cannot be read leave the former expert in place; after a later error the slot is empty.
        """
        await self.unpark()
        holder, expert = self._holder, self._make(spec, path)
        in_place = await asyncio.to_thread(fits_in_place, spec.name, path, holder.path if holder else None)
        self.expert = self._holder = None
        if holder is None:
            await expert.open()
        elif not in_place or not await expert.take_over(holder):
            await holder.close()
            await expert.open()
        self.expert = self._holder = expert
        return expert

    async def prefetch(self, spec: ExpertSpec, path: Path) -> int:
        """Have the operating system read the files into its page cache, where vLLM reads them from."""
        await asyncio.to_thread(read_ahead, path)
        return 0

    async def park(self) -> bool:
        """Put the process to sleep, without weights and cache; end it where it cannot sleep, such as on a CPU."""
        self.expert = None
        holder = self._holder
        if holder is None or self._asleep:
            return self._asleep
        try:
            self._asleep = self._sleeps and await holder.sleep()
        except BaseException as error:
            await self._end(holder, "sleep", error)
        if not self._asleep:
            await self.close()
        return self._asleep

    async def unpark(self) -> None:
        """Wake a sleeping process; its weights are read again by the next switch. One that fails to wake ends."""
        holder = self._holder
        if holder is None or not self._asleep:
            return
        self._asleep = False
        try:
            await holder.wake()
        except BaseException as error:
            await self._end(holder, "wake", error)

    async def close(self) -> None:
        """End the process."""
        holder, self._holder, self.expert, self._asleep = self._holder, None, None, False
        if holder is not None:
            await holder.close()

    async def _end(self, holder: VLLMExpert, what: str, error: BaseException) -> None:
        """End a process in a state that is not known. Raises the error again if it is a cancellation."""
        await self.close()
        if not isinstance(error, Exception):
            raise error
        logger.warning("expert %r: its engine process does not %s and ends: %s", holder.spec.name, what, text_of(error))
