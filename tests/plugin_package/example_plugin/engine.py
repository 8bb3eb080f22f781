"""An engine without weights: `source: reverse://words` answers with the words of the question in reverse order."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar

from coe import Adapter, Capabilities, Chunk, Expert, GenerateRequest, Usage
from registry import ExpertSpec


class ReverseExpert:
    """What `ReverseEngine.load` returns."""

    capacity = 8

    def __init__(self, spec: ExpertSpec, suffix: str) -> None:
        self.spec, self.suffix = spec, suffix

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        """The answer in two chunks; the last has the finish reason and the usage."""
        words = (request.messages[-1].content if request.messages else request.prompt or "").split()
        yield Chunk(" ".join(reversed(words)))
        yield Chunk(self.suffix, "stop", Usage(len(words), len(words)))


class ReverseEngine:
    """suffix: appended to every answer (`engines: {reverse: {suffix: "."}}` of a configuration)."""

    capabilities: ClassVar[Capabilities] = Capabilities(streaming=True)

    def __init__(self, *, suffix: str = "") -> None:
        self.suffix = suffix

    def footprint(self, spec: ExpertSpec) -> int:
        """No weights, no bytes."""
        return 0

    async def load(self, spec: ExpertSpec, path: Path) -> Expert:
        """Load nothing: there are no files."""
        return ReverseExpert(spec, self.suffix)

    async def unload(self, expert: Expert) -> None:
        """Free nothing."""
