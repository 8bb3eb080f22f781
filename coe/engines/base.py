"""What an engine must offer: load weights, generate, give the memory back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from coe.types import Chunk, GenerateRequest
from registry.spec import ExpertSpec


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter to apply to a resident base: its spec and the folder of its files."""

    spec: ExpertSpec
    path: Path


class Expert(Protocol):
    """Resident weights that generate.

    `capacity` requests are worth having in flight at once: the engine batches them (adapters mixed). Closing the
    iterator (`aclose()`) cancels the generation and frees its place in the batch.
    """

    spec: ExpertSpec
    capacity: int

    def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        """Yield chunks; the last one carries `finish_reason` and `usage`.

        Raises:
            ContextLengthExceeded: prompt and answer do not fit.
            WeightsError: the adapter does not fit this base.
            EngineError: anything that went wrong inside the engine.
        """
        ...


class Engine(Protocol):
    """Turns a spec and its files into a resident Expert."""

    def footprint(self, spec: ExpertSpec) -> int:
        """Bytes the expert takes while resident, an upper estimate known before loading."""
        ...

    async def load(self, spec: ExpertSpec, path: Path) -> Expert:
        """Bring the weights into memory. Raises WeightsError or OutOfMemory."""
        ...

    async def unload(self, expert: Expert) -> None:
        """Give the memory back; never writes anything."""
        ...
