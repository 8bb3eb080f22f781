"""Errors of the routers.

RouterError
├── InvalidOutcomes      an outcome table is empty, duplicated, has NaN or scores outside [0, 1]; carries every problem
├── InvalidEncoder       an encoder's name, folder or weights cannot be used
├── InvalidArtifact      a saved router is missing, altered, or does not fit the encoder
├── InvalidSettings      a router was given settings that it does not have; names those it has
├── UnknownRouterKind    a kind that does not exist, or whose class cannot be imported or is no router
└── NoEligibleExpert     constraints leave no expert; names the constraint that did

UserWarning
├── StaleArtifactWarning       an expert's files are not those that the router was trained on
├── EvaluatingOnTrainingData   a router is scored on rows that it was trained on
└── BaselineLeftOut            a router to compare with could not be trained on the table
"""

from __future__ import annotations

from collections.abc import Iterable


class RouterError(Exception):
    """Base of every error that the routers raise on purpose."""


class InvalidOutcomes(RouterError):
    """An outcome table cannot be used; `problems` names every row or column at fault, `source` the file."""

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
    """A router was given settings that it does not have or cannot use; the message names those it has."""


class UnknownRouterKind(RouterError):
    """A router kind that does not exist (the message lists those that do), or whose class cannot be used."""


class NoEligibleExpert(RouterError):
    """No expert is left after the constraints; the message names them.

    constraints: the names of those that removed an expert, where it is known: "context length", "json", ...
    """

    def __init__(self, message: str, *, constraints: Iterable[str] = ()) -> None:
        self.constraints = frozenset(constraints)
        super().__init__(message)


class StaleArtifactWarning(UserWarning):
    """An expert's files are not those that the router was trained on: its estimates may be off."""


class EvaluatingOnTrainingData(UserWarning):
    """A router is scored on rows that it was trained on: the figures flatter it."""


class BaselineLeftOut(UserWarning):
    """A router to compare with could not be trained on the table: the comparison is poorer by one line."""
