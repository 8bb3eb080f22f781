"""HFSlot: one model in memory that takes the weights of experts of its shape in turn."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from coe.engines.base import ShapeKey
from coe.engines.hf.embedder import HFEmbedder
from coe.engines.hf.expert import HFExpert, off_the_loop
from coe.engines.hf.load import LoadedModel, translate
from coe.engines.hf.weights.files import WeightFiles
from coe.engines.hf.weights.host_copies import HostCopies
from coe.engines.hf.weights.in_place import InPlace
from coe.engines.page_cache import read_ahead
from coe.errors import WeightsError
from registry.errors import SourceError
from registry.spec import ExpertSpec

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Models(Protocol):
    """What loads and frees the models of slots (`coe.engines.hf.engine.HFEngine`)."""

    @property
    def copies(self) -> HostCopies:
        """Copies of weights in host memory."""
        ...

    async def load(self, spec: ExpertSpec, path: Path) -> HFExpert | HFEmbedder:
        """Load a model. Raises WeightsError or OutOfMemory."""
        ...

    async def unload(self, expert: HFExpert | HFEmbedder) -> None:
        """Drain and free a model."""
        ...

    def serve(self, spec: ExpertSpec, loaded: LoadedModel) -> HFExpert:
        """An expert that answers with a model in memory."""
        ...

    def described(self, model: Any, path: Path) -> LoadedModel:
        """A model that has taken the weights of the folder in place. Blocks; raises what transformers does."""
        ...

    def free_memory(self) -> None:
        """Return the memory of models that are not used any more. Blocks."""
        ...


class HFSlot:
    """A model for one expert at a time; see `coe.engines.base.Slot`.

    An expert whose config equals the former's, and whose tensors are the model's parameters one by one, takes over its
    model: its weights are copied into the same memory. Any other one is loaded by transformers after the former one is
    freed. The answers are the same either way.

    Args:
        shape: the shape that it was opened for.
        engine: loads and frees models, and keeps copies of weights in host memory.
    """

    def __init__(self, shape: ShapeKey, engine: Models) -> None:
        self.shape = shape
        self.expert: HFExpert | HFEmbedder | None = None
        self._engine = engine
        self._in_place: InPlace | None = None  # the model of `expert`, if its weights can be replaced

    async def switch(self, spec: ExpertSpec, path: Path) -> HFExpert | HFEmbedder:
        """Serve another expert; see `Slot.switch`.

        Files that cannot be read leave the former expert in place; after a later error the slot is empty.
        """
        former = self.expert
        if isinstance(former, HFExpert) and self._in_place is not None:
            files = await asyncio.to_thread(_fitting, self._in_place, spec.name, path)
            if files is not None:
                self.expert = await self._replace(former, self._in_place, spec, files)
                return self.expert
        await self.close()
        expert = await self._engine.load(spec, path)
        if isinstance(expert, HFExpert):
            self._in_place = await asyncio.to_thread(_in_place, expert.loaded.model, path)
        self.expert = expert
        return expert

    async def _replace(self, former: HFExpert, model: InPlace, spec: ExpertSpec, files: WeightFiles) -> HFExpert:
        """Drain the former expert and overwrite its weights. After an error, the model is freed."""
        self.expert = self._in_place = None
        try:
            await former.close()
            loaded = await _stoppable(lambda stop: self._overwrite(model, spec, files, stop))
        except BaseException:
            del model
            await off_the_loop(self._engine.free_memory)
            raise
        self._in_place = model
        return self._engine.serve(spec, loaded)

    def _overwrite(self, model: InPlace, spec: ExpertSpec, files: WeightFiles, stop: threading.Event) -> LoadedModel:
        with translate(f"{spec.name!r} cannot be loaded from {files.folder}", WeightsError):
            copy = self._engine.copies.get(spec.ref, files, stop)
            model.copy(copy.tensors.items() if copy is not None else files.tensors(stop), stop)
            return self._engine.described(model.model, files.folder)

    async def prefetch(self, spec: ExpertSpec, path: Path) -> int:
        """Read the weights into a copy in host memory; see `Slot.prefetch`.

        Without room for one, or where the model here could not take it, into the system's page cache.
        """
        return await _stoppable(lambda stop: self._read_ahead(spec, path, stop))

    def _read_ahead(self, spec: ExpertSpec, path: Path, stop: threading.Event) -> int:
        copies, model = self._engine.copies, self._in_place
        if copies.budget_bytes:
            files = WeightFiles(path)
            if (model is None or model.takes(files)) and (n_bytes := copies.read(spec.ref, files, stop)):
                return n_bytes
        read_ahead(path)
        return 0

    async def park(self) -> bool:
        """Free the model: it is all that a slot has in memory."""
        await self.close()
        return False

    async def unpark(self) -> None:
        """Nothing: the slot is empty."""

    async def close(self) -> None:
        """Drain and free the model."""
        expert, self.expert, self._in_place = self.expert, None, None
        if expert is not None:
            await self._engine.unload(expert)


def _fitting(model: InPlace, name: str, path: Path) -> WeightFiles | None:
    """The files in `path`, if the model can take their weights in place. Blocks.

    Raises:
        WeightsError: the files cannot be read.
    """
    if (path / "adapter_config.json").exists():
        return None  # the load refuses it, with the reason
    try:
        files = WeightFiles(path)
        return files if model.takes(files) else None
    except (SourceError, OSError) as error:
        raise WeightsError(
            f"{name!r} cannot be loaded: {error}", public=f"expert {name!r} cannot be loaded: its files are damaged"
        ) from error


def _in_place(model: Any, path: Path) -> InPlace | None:
    """The model, just loaded from `path`, if weights of others can replace its own in place. Blocks."""
    try:
        return InPlace.of(model, WeightFiles(path))
    except (SourceError, OSError, WeightsError) as error:
        logger.info("%s: the next expert in its slot is loaded by transformers: %s", path, error)
        return None


async def _stoppable(work: Callable[[threading.Event], T]) -> T:
    """Run `work` in a thread. If the caller is cancelled, `work` is asked to stop, and has ended before this raises."""
    stop = threading.Event()
    running = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # it was asked to stop
        raise
