"""VLLMSlot: one vLLM process that takes the weights of experts of one shape in turn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from coe.engines.base import ShapeKey
from coe.engines.vllm.expert import VLLMExpert
from coe.engines.vllm.process import check_folder
from coe.errors import WeightsError
from registry.errors import SourceError
from registry.headers import Tensor, read_json, read_weights
from registry.spec import ExpertSpec

_NAMES: Final = frozenset({"_name_or_path", "transformers_version"})
"""Keys of config.json that describe where a checkpoint comes from."""
logger = logging.getLogger(__name__)


class VLLMSlot:
    """A process for one expert at a time; see `coe.engines.base.Slot`.

    An expert whose files have the same config, tokenizer and tensors as the former's takes over its process: vLLM reads
    the new weights in place, and the prefix cache stays, since each expert has a cache salt of its own. Any other one
    gets a new process.

    Args:
        shape: the shape that it was opened for.
        make: an expert of spec and folder, without a process.
    """

    def __init__(self, shape: ShapeKey, make: Callable[[ExpertSpec, Path], VLLMExpert]) -> None:
        self.shape = shape
        self.expert: VLLMExpert | None = None
        self._make = make

    async def switch(self, spec: ExpertSpec, path: Path) -> VLLMExpert:
        """Serve another expert; see `Slot.switch`.

        Files that cannot be read leave the former expert in place; after a later error the slot is empty.
        """
        former, expert = self.expert, self._make(spec, path)
        in_place = await asyncio.to_thread(fits_in_place, spec.name, path, former.path if former else None)
        self.expert = None
        if former is None:
            await expert.open()
        elif not in_place or not await expert.take_over(former):
            await former.close()
            await expert.open()
        self.expert = expert
        return expert

    async def prefetch(self, spec: ExpertSpec, path: Path) -> None:
        """Nothing: the files are read from the page cache of the operating system."""

    async def park(self) -> None:
        """End the process: its weights would have to be read again anyway."""
        await self.close()

    async def unpark(self) -> None:
        """Nothing: the slot is empty."""

    async def close(self) -> None:
        """End the process."""
        expert, self.expert = self.expert, None
        if expert is not None:
            await expert.close()


def fits_in_place(name: str, path: Path, former: Path | None) -> bool:
    """Whether a process that serves the folder `former` can take the weights of `path`. Blocks.

    Args:
        name: of the expert in `path`.

    Raises:
        WeightsError: the files in `path` cannot be read, so that no process can serve them.
    """
    check_folder(name, path)
    try:
        wanted = _traits(path)
    except (SourceError, OSError, ValueError) as error:
        raise WeightsError(
            f"{name!r} cannot be loaded: {error}", public=f"expert {name!r} cannot be loaded: its files are damaged"
        ) from error
    if former is None or "quantization_config" in wanted[0]:
        return False  # vLLM repacks quantised weights as it loads them
    try:
        return _traits(former) == wanted
    except (SourceError, OSError, ValueError) as error:  # the files of the former expert were deleted
        logger.info("%s cannot be compared with %s: %s", former, path, error)
        return False


def _traits(folder: Path) -> tuple[dict[str, Any], dict[str, Any], bytes, dict[str, tuple[Tensor, str]]]:
    """What a running process depends on: config, generation config, tokenizer, and the shapes and types of tensors."""
    tensors, _ = read_weights(folder)
    generation = folder / "generation_config.json"
    return (
        _without_names(read_json(folder / "config.json")),
        _without_names(read_json(generation)) if generation.exists() else {},
        (folder / "tokenizer.json").read_bytes(),
        {name: (tensor, tensor.dtype) for name, tensor in tensors.items()},
    )


def _without_names(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in _NAMES}
