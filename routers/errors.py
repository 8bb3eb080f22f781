"""Errors of the routers.

RouterError
├── InvalidOutcomes      an outcome table is empty, or has duplicates, NaN or scores outside [0, 1]; lists all problems
├── InvalidEncoder       an encoder's name, folder or weights cannot be used
├── InvalidArtifact      a saved router is missing, altered, or does not fit the encoder
├── InvalidSettings      unknown or unusable settings of a router or selector; lists the known ones
├── UnknownRouterKind    a kind that does not exist, or whose class cannot be imported or is no router
└── NoEligibleExpert     the constraints exclude every expert; names the constraints

UserWarning
├── StaleArtifactWarning       the files of an expert changed since the router was trained
├── EvaluatingOnTrainingData   a router is scored on rows that it was trained on
└── BaselineLeftOut            a baseline could not be trained on the table
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class RouterError(Exception):
    """Base of all errors that `routers` raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:  # errors travel between processes; constructors take other arguments
        return Exception.__new__, (type(self), *self.args), self.__dict__


class InvalidOutcomes(RouterError):
    """An outcome table cannot be used; `problems` lists every faulty row or column, `source` is the file."""

    def __init__(self, *problems: str, source: str = "") -> None:
        self.problems = problems
        self.source = source
        place = f"{source}: " if source else ""
        if len(problems) == 1:
            super().__init__(place + problems[0])
        else:
            super().__init__(f"{place}{len(problems)} problems\n" + "\n".join(f"  - {p}" for p in problems))


class InvalidEncoder(RouterError):
    """An encoder's name, folder or weights cannot be used; the message says which and what to do."""


class InvalidArtifact(RouterError):
    """A saved router cannot be used; the message says which file and what to do."""


class InvalidSettings(RouterError):
    """Settings that a router or selector does not have or cannot use; the message lists the known ones."""


class UnknownRouterKind(RouterError):
    """A router kind that does not exist (the message lists the known ones), or whose class cannot be used."""


class NoEligibleExpert(RouterError):
    """The constraints exclude every expert; the message names them.

    constraints: names of the constraints that excluded an expert, if known: "context length", "json", ...
    """

    def __init__(self, message: str, *, constraints: Iterable[str] = ()) -> None:
        self.constraints = frozenset(constraints)
        super().__init__(message)


class StaleArtifactWarning(UserWarning):
    """The files of an expert changed since the router was trained: its estimates may be wrong."""


class EvaluatingOnTrainingData(UserWarning):
    """A router is scored on rows that it was trained on: its figures are too high."""


class BaselineLeftOut(UserWarning):
    """A baseline could not be trained on the table: the report lacks its row."""
