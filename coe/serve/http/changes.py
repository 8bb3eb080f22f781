"""Changes of the experts of a running service, as the API sees them, and drains before the catalog has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from coe.errors import InvalidRequest
from coe.orchestrator import Orchestrator

HOLDS_S: Final = 60.0
"""Seconds for which a stated drain holds without a catalog that has it: afterwards the catalog alone decides."""


class ChangeRefused(InvalidRequest, status=409, code="change_refused"):
    """A change of the experts cannot be made as things are; the message says what is in the way."""


class SourceNotAllowed(InvalidRequest, status=403, code="source_not_allowed"):
    """An expert states something that `serve.admin_sources` does not allow over HTTP."""


class ExpertChanges(Protocol):
    """Changes the experts of a service. `by`: who asked for it. Every result is the body of a response.

    Raises:
        ChangeRefused: something is in the way. UnknownExpert: a name is not registered. RegistryError: the registry
            cannot be read or written.
    """

    async def listing(self) -> Mapping[str, Any]:
        """Every expert with what is stated of it, and the aliases."""
        ...

    async def add(self, text: str, by: str, *, dry_run: bool) -> Mapping[str, Any]:
        """Add or change the experts of a YAML or JSON text."""
        ...

    async def remove(self, name: str, by: str, *, wait_s: float) -> Mapping[str, Any]:
        """Drain an expert, wait for its requests, and remove it."""
        ...

    async def drain(self, names: Sequence[str], reason: str | None, by: str, *, wait_s: float) -> Mapping[str, Any]:
        """Let experts take no new requests, for a reason; None undoes it."""
        ...

    async def pin(self, names: Sequence[str], pinned: bool, by: str) -> Mapping[str, Any]:
        """Keep experts in memory, or not."""
        ...

    async def point(self, alias: str, target: str, by: str, *, exists: bool | None) -> Mapping[str, Any]:
        """Move an alias, or create it."""
        ...

    async def roll_back(self, alias: str, by: str) -> Mapping[str, Any]:
        """Undo the last move of an alias."""
        ...

    async def delete(self, alias: str, by: str) -> Mapping[str, Any]:
        """Delete an alias."""
        ...


class Drains:
    """The drained experts that the registry has, until a catalog comes that has them, too."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._version, self._ends = -1, -float("inf")
        self._drained: Mapping[str, str] = {}

    def state(self, version: int, drained: Mapping[str, str]) -> None:
        """Hold what the registry has at a version, unless a later one is held."""
        if version > self._version or self._clock() >= self._ends:
            self._version, self._drained, self._ends = version, dict(drained), self._clock() + HOLDS_S

    def applied(self, orchestrator: Orchestrator) -> Orchestrator:
        """The orchestrator, or one with the drains that are newer than its snapshot."""
        if self._clock() >= self._ends or orchestrator.snapshot.version >= self._version:
            return orchestrator
        return orchestrator.with_drained(self._drained)
