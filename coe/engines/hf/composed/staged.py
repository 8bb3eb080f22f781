"""Composed experts whose first member answers with what its peers have left before."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

from coe.engines.base import Adapter, Member
from coe.engines.hf.members import artifact_folder, hf_member
from coe.engines.hf.notes.row_prompt import PeerReading
from coe.engines.latent.artifact import Artifact
from coe.engines.latent.received import max_notes
from coe.engines.latent.settings import CallSettings
from coe.errors import Unsupported
from coe.types import Chunk, GenerateRequest
from registry.spec import ExpertSpec, Kind

T = TypeVar("T")


class StagedExpert(ABC):
    """One request to a composed expert. It is a row in the batch of its first member's model, like any other request.

    Args:
        members: the first member is among them.
        path: folder of the artifact.

    Raises:
        Unsupported: another engine serves the first member.
        WeightsError: there is no artifact.
    """

    def __init__(self, spec: ExpertSpec, members: Mapping[str, Member], path: Path | None) -> None:
        self.spec, self.path = spec, artifact_folder(spec, path)
        first = spec.members[0]
        self.primary = hf_member(spec, first, members[first])
        self.model = self.primary.expert
        self.capacity = self.model.capacity

    @staticmethod
    def check(spec: ExpertSpec) -> None:
        """Raises ConfigError for wrong settings of the calls to the peers, and of the notes that are read."""
        CallSettings.of(spec.settings, spec.name)
        max_notes(spec.settings, spec.name)

    async def generate(self, request: GenerateRequest, adapter: Adapter | None = None) -> AsyncIterator[Chunk]:
        """Yield the answer as it is generated; see `Expert.generate`. Without notes, the first member answers alone.

        Raises:
            Rejected: the notes are not as the artifact was trained with, or do not fit the model.
            Unsupported: the request wants notes of this expert itself.
            WeightsError: the artifact is damaged, or does not fit the model.
        """
        if request.wants == "latent":
            raise Unsupported(f"{self.spec.name!r} is composed of experts, and leaves no notes: ask its members")
        own, reading = await asyncio.to_thread(self.read, request)
        chunks = self.model.generate(replace(request, notes=None), own, reading=reading)
        async with aclosing(cast("AsyncGenerator[Chunk, None]", chunks)):
            async for chunk in chunks:
                yield chunk

    def kept(self, load: Callable[[Artifact], T]) -> T:
        """What `load` makes of the artifact, kept with the model: a request reads no files. Blocks.

        Raises:
            WeightsError: see `Artifact.read`; whatever `load` raises.
        """
        key = self.spec.architecture, self.spec.ref, Adapter(self.spec, self.path).key()
        return self.model.artifacts.get(key, lambda: load(Artifact.read(self.path)))

    @abstractmethod
    def read(self, request: GenerateRequest) -> tuple[Adapter | None, PeerReading]:
        """The adapter to answer with, and the notes of the request. Blocks."""


def own_adapter(artifact: Artifact, spec: ExpertSpec, primary: ExpertSpec, base: ExpertSpec) -> Adapter | None:
    """The adapter that was trained with the composition, if there is one: it takes the place of the first member's.

    Args:
        primary: the first member. base: the model that it runs on.
    """
    if artifact.adapter is None:
        return None
    own = ExpertSpec(
        name=spec.name,
        kind=Kind.ADAPTER,
        source=str(artifact.adapter),
        base=base.name,
        digest=spec.digest,
        context_length=primary.context_length,
    )
    return Adapter(own, artifact.adapter)
