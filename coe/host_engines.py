"""The engines of a host: which one serves an expert, what its weights take, their slots, files and compositions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from coe.engines.base import (
    Adapter,
    ComposedEngine,
    CopyingEngine,
    Engine,
    Expert,
    Member,
    ParkingEngine,
    SlotEngine,
)
from coe.engines.checked_slot import CheckedSlot, shape_of
from coe.engines.slots import with_slots
from coe.errors import WeightsError
from coe.memory import Need
from coe.seam import seam
from registry.errors import DigestMismatch, RegistryError
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot


class HostEngines:
    """The engines of one process.

    Args:
        engines: by kind (`coe.engines.engine_kind`).
        locate: local path of an expert's verified files; may block (it runs in a thread).
        kind_of: the kind of engine that serves an expert.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        locate: Callable[[ExpertSpec], Path],
        kind_of: Callable[[ExpertSpec], str],
    ) -> None:
        self.by_kind, self._locate, self.kind_of = engines, locate, kind_of
        self._slot_engines: dict[str, SlotEngine] = {}  # the same, by kind

    def of(self, spec: ExpertSpec) -> Engine:
        """The engine that serves an expert."""
        return self.by_kind[self.kind_of(spec)]

    def _slot_engine(self, spec: ExpertSpec) -> SlotEngine:
        kind = self.kind_of(spec)
        if kind not in self._slot_engines:
            self._slot_engines[kind] = with_slots(self.by_kind[kind])
        return self._slot_engines[kind]

    def need(self, spec: ExpertSpec) -> Need:
        """What the weights take, and which slots they share."""
        with seam(spec.name):
            engine = self._slot_engine(spec)
            shape = shape_of(engine, spec)
            parked_bytes = None
            if engine.capabilities.sleep and isinstance(engine, ParkingEngine):
                parked_bytes = int(engine.parked_bytes(shape))
            return Need(
                (self.kind_of(spec), shape),
                int(engine.footprint(spec)),
                int(engine.slot_bytes(shape)),
                slots=int(engine.slots_per_shape),
                parked_bytes=parked_bytes,
                copy_bytes=int(engine.copy_bytes(spec)) if isinstance(engine, CopyingEngine) else 0,
            )

    def copy_budget_bytes(self) -> int:
        """Most bytes of all copies in host memory, of the engines that were asked for an expert so far."""
        with seam("copies in host memory"):
            engines = [each for each in self._slot_engines.values() if isinstance(each, CopyingEngine)]
            return sum(int(engine.copy_budget_bytes()) for engine in engines)

    def has_copy(self, spec: ExpertSpec) -> bool:
        """Whether there is a copy of these weights in host memory."""
        engine = self._slot_engine(spec)
        with seam(spec.name):
            return isinstance(engine, CopyingEngine) and bool(engine.has_copy(spec))

    def drop_copy(self, spec: ExpertSpec) -> None:
        """Free the copy of these weights in host memory."""
        engine = self._slot_engine(spec)
        if isinstance(engine, CopyingEngine):
            with seam(spec.name):
                engine.drop_copy(spec)

    def new_slot(self, spec: ExpertSpec, spec_of: Callable[[str], ExpertSpec]) -> CheckedSlot:
        """A slot of the shape of these weights.

        Args:
            spec_of: the expert of a `name@version`.
        """
        with seam(spec.name):
            engine = self._slot_engine(spec)
            return CheckedSlot(engine, shape_of(engine, spec), spec_of=spec_of, located=self.path)

    async def path(self, spec: ExpertSpec) -> Path:
        """The verified files of an expert; downloads and hashes off the event loop.

        Raises:
            WeightsError: they are missing, or not the registered ones.
        """
        try:
            return await asyncio.to_thread(self._locate, spec)
        except RegistryError as error:
            raise WeightsError(f"{spec.name!r} cannot be loaded: {error}", public=_for_clients(spec, error)) from error

    async def adapters(self, spec: ExpertSpec, snapshot: Snapshot) -> dict[str, Adapter]:
        """The adapters that a request uses: the expert itself, or members of a composed one."""
        parts = _members_in_memory(spec, snapshot) if spec.kind is Kind.COMPOSED else [spec]
        with seam(spec.name):
            return {part.name: Adapter(part, await self.path(part)) for part in parts if part.kind is Kind.ADAPTER}

    def expert(
        self,
        spec: ExpertSpec,
        snapshot: Snapshot,
        experts: Mapping[str, Expert],
        adapters: Mapping[str, Adapter],
        path: Path | None,
    ) -> tuple[Expert, Adapter | None]:
        """What generates: the leased weights, or for a composed expert what its engine makes of its members.

        Args:
            experts: the leased weights, by `name@version`. adapters: by name. path: folder of a composed expert.
        """
        if spec.kind is not Kind.COMPOSED:
            [expert] = experts.values()
            return expert, adapters.get(spec.name)
        members = {}
        for member in _members_in_memory(spec, snapshot):
            [weights] = needed_weights(member, snapshot)  # a member is a model, an adapter or a remote expert
            members[member.name] = Member(experts[weights.ref], adapters.get(member.name))
        with seam(spec.name):
            return cast(ComposedEngine, self.of(spec)).compose(spec, members, path), None


def needed_weights(spec: ExpertSpec, snapshot: Snapshot) -> tuple[ExpertSpec, ...]:
    """The experts whose weights `spec` needs in memory (itself, its base, or its members'), in order of their names."""
    return tuple(snapshot.experts[name] for name in sorted(spec.residency_keys(snapshot.experts)))


def _members_in_memory(spec: ExpertSpec, snapshot: Snapshot) -> list[ExpertSpec]:
    """The members of a composed expert that are in memory together."""
    return [snapshot.experts[name] for name in spec.resident_members]


def _for_clients(spec: ExpertSpec, error: RegistryError) -> str:
    """Why an expert has no files, without paths of this machine."""
    if isinstance(error, DigestMismatch):
        some = "; ".join(error.differences[:3]) + ("; ..." if len(error.differences) > 3 else "")
        return f"expert {spec.name!r} cannot answer: its files are not the registered ones ({some})"
    return f"expert {spec.name!r} cannot answer: its files are missing or cannot be read"
