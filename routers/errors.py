"""Errors of the routers.

    RouterError
    ├── InvalidOutcomes      an outcome table is empty, duplicated, has NaN or scores outside [0, 1]
    ├── InvalidArtifact      a saved router is missing, altered, or does not fit the encoder
    ├── UnknownRouterKind    a kind that is not in `routers.build.KINDS`
    └── NoEligibleExpert     constraints leave no expert; names the constraint that did
"""

from __future__ import annotations


class RouterError(Exception):
    """Base of every error that the routers raise on purpose."""


class InvalidOutcomes(RouterError):
    """An outcome table cannot be used; the message names the rows or columns."""


class InvalidArtifact(RouterError):
    """A saved router cannot be used; the message says which file and what to do."""


class UnknownRouterKind(RouterError):
    """A router kind that does not exist; the message lists those that do."""


class NoEligibleExpert(RouterError):
    """No expert is left after the constraints; the message names them."""
