"""Errors of the registry.

RegistryError
├── InvalidSpec          a spec or a file of specs is wrong; carries every problem found
├── UnknownExpert        a name that is not registered; carries close matches
├── SourceError          a source cannot be read: missing, truncated, unsupported
├── DigestMismatch       the files are not the ones that were registered
├── StoreError           the registry's database cannot be read or written
└── DiskFull             no space left; what was being written is gone, what was there is untouched
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path


class RegistryError(Exception):
    """Base of every error that the registry raises on purpose."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a document, and where: `place` is `file.yaml:12: experts[3].base`, `line` its line (or 0)."""

    place: str
    message: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


class InvalidSpec(RegistryError):
    """Every problem of a document at once, so that a user mends a file in one go."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class UnknownExpert(RegistryError):
    """A name that is not registered."""

    def __init__(self, name: str, known: Iterable[str], *, where: str = "the registry") -> None:
        self.name = name
        self.suggestions = tuple(get_close_matches(name, list(known), n=3))
        hint = f"; did you mean {' or '.join(map(repr, self.suggestions))}?" if self.suggestions else ""
        super().__init__(f"{name!r} is not in {where}{hint} (`coe registry list` shows what is)")


class SourceError(RegistryError):
    """A source cannot be read: missing, truncated, or of a format that is not supported."""


class DigestMismatch(RegistryError):
    """The files of an expert are not the ones that were registered."""


class StoreError(RegistryError):
    """The registry's database cannot be opened, read or written."""


class DiskFull(RegistryError):
    """No space left where `path` was to be written."""

    def __init__(self, path: Path, *, free_bytes: int | None = None, needed_bytes: int | None = None) -> None:
        self.path, self.free_bytes, self.needed_bytes = path, free_bytes, needed_bytes
        needed = "" if needed_bytes is None else f" {needed_bytes / 1e6:,.1f} MB are needed and"
        free = "" if free_bytes is None else f" {free_bytes / 1e6:,.1f} MB are free:"
        super().__init__(
            f"no space left to write {path.name!r} in {path.parent}:{needed}{free} free some, "
            f"or set COE_HOME to a larger disk (nothing half-written was kept)"
        )
