"""Errors of the registry.

RegistryError
├── InvalidSpec          a spec or a file of specs is invalid; lists all problems
├── UnknownExpert        a name that is not registered; carries close matches
├── SourceError          a source cannot be read: missing, truncated, unsupported
├── DigestMismatch       the files are not the ones that were registered
├── StoreError           the registry's database cannot be read or written
├── StaleChange          the registry changed since the change was planned
├── TargetError          a file cannot be written: a device, a FIFO, a socket or a loop of symbolic links
├── PluginError          a plug-in cannot be imported, is not allowed here, or is not what it should be
│   └── UnknownPlugin    a name that is neither built in nor installed; carries close matches
└── DiskFull             no space left; the partial file is removed, the previous one is unchanged
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.spelling import close_matches, did_you_mean


class RegistryError(Exception):
    """Base of all errors that the registry raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:  # errors travel between processes; constructors take other arguments
        return Exception.__new__, (type(self), *self.args), self.__dict__


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a document.

    Attributes:
        file: the document, as its reader named it, or its substitute, such as a flag of a command.
        line: from 1; 0 if unknown.
        field: `experts[3].base`; empty if the problem concerns the whole document.
    """

    file: str
    message: str
    line: int = 0
    field: str = ""

    @property
    def place(self) -> str:
        """`file.yaml:12: experts[3].base`."""
        return self.file + (f":{self.line}" if self.line else "") + (f": {self.field}" if self.field else "")

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


_USERINFO = re.compile(r"(://)[^/\s]*@")


def without_userinfo(text: str) -> str:
    """The text with `user:password@` of every URL replaced by `***@`, for messages."""
    return _USERINFO.sub(r"\1***@", text)


class InvalidSpec(RegistryError):
    """All problems of a document at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


_MOST_LISTED = 8


class UnknownExpert(RegistryError):
    """An unknown name; the message has close matches, or else the known names."""

    def __init__(self, name: str, known: Iterable[str], *, where: str = "the registry") -> None:
        self.name = name
        names = list(known)
        self.suggestions = close_matches(name, names, most=3)
        if self.suggestions:
            hint = did_you_mean(name, names, most=3)
        elif names:
            more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
            hint = f"; known: {', '.join(names[:_MOST_LISTED])}{more}"
        else:
            hint = ", which is empty"
        super().__init__(f"{name!r} is not in {where}{hint}")


class SourceError(RegistryError):
    """A source cannot be read: missing, truncated, or of an unsupported format."""


class DigestMismatch(RegistryError):
    """The files of an expert are not the registered ones.

    Attributes:
        differences: one text for each file that is missing, altered or new; file names without their folder.
    """

    def __init__(self, message: str, differences: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


class StoreError(RegistryError):
    """The registry's database cannot be opened, read or written."""


class StaleChange(RegistryError):
    """Another writer changed the registry since this change was planned: it is to be planned again."""


class TargetError(RegistryError):
    """A path cannot be written as a file: a device, a FIFO, a socket or a loop of symbolic links."""


class PluginError(RegistryError):
    """A plug-in cannot be imported, is not allowed here, lacks a method, or shares its name with another one."""


class UnknownPlugin(PluginError):
    """A name that is neither built in nor an installed entry point; the message lists those that are."""


class DiskFull(RegistryError):
    """No space left to write `path`."""

    def __init__(self, path: Path, *, free_bytes: int | None = None, needed_bytes: int | None = None) -> None:
        self.path, self.free_bytes, self.needed_bytes = path, free_bytes, needed_bytes
        needed = "" if needed_bytes is None else f" {needed_bytes / 1e6:,.1f} MB are needed and"
        free = "" if free_bytes is None else f" {free_bytes / 1e6:,.1f} MB are free:"
        super().__init__(
            f"no space left to write {path.name!r} in {path.parent}:{needed}{free} free some, "
            f"or set COE_HOME to a larger disk (no partial file was kept)"
        )
