"""Updates of a router without encoding its training prompts again: new rows, new experts, or fewer experts.

A router that can be updated keeps its training rows (`TrainingRows`, and embeddings or clusters). Each function returns
a new router and leaves the old one unchanged, so that a serving router can be replaced at once.

An updated `knn`, `category` or `pilot` router equals one fitted on all rows with the same embeddings. A `cluster`
router keeps its centres; one fitted from scratch would find others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from routers.errors import InvalidOutcomes, InvalidSettings, RouterError
from routers.factory import TrainableRouter
from routers.kind_list import UPDATABLE
from routers.outcomes.table import OutcomeTable
from routers.outcomes.training_rows import TrainingRows

if TYPE_CHECKING:
    from routers.encoders.build import Encoder

SHOWN = 3
"""The most query ids or names that a message lists."""


@runtime_checkable
class Updatable(TrainableRouter, Protocol):
    """A router that keeps its training rows: `routers.kind_list.UPDATABLE`, or a plug-in's."""

    encoder: Encoder
    settings: Any

    @property
    def rows(self) -> TrainingRows:
        """The training rows that the router keeps."""
        ...

    def extended(self, table: OutcomeTable) -> Self:
        """A router that has also seen the rows of a table; encodes only their prompts."""
        ...

    def with_rows(self, rows: TrainingRows) -> Self:
        """A router with other outcomes of the same queries; encodes nothing."""
        ...


R = TypeVar("R", bound=Updatable)


def updatable(router: TrainableRouter) -> Updatable:
    """The router, if it can be updated.

    Raises:
        RouterError: it cannot.
    """
    if not isinstance(router, Updatable):
        raise RouterError(
            f"a {router.kind} router keeps no training rows, so it cannot be updated: train it again. "
            f"Routers of kind {', '.join(UPDATABLE)} can be updated"
        )
    return router


def add_rows(router: R, table: OutcomeTable) -> R:
    """A router that has also learned from the new rows of a table; only their prompts are encoded.

    Args:
        table: with the experts of the router, in any order.

    Raises:
        InvalidOutcomes: an expert is missing or unknown, a row was trained on before, or costs or domains are missing
            that the router has.
    """
    if problems := list(_problems_of_rows(router.rows, table)):
        raise InvalidOutcomes(*problems)
    return router.extended(table.with_experts(router.rows.experts))


def add_expert(router: R, table: OutcomeTable) -> R:
    """A router that also knows the experts of a table, measured on the training queries; nothing is encoded.

    Args:
        table: the new experts, with a row for every training query, matched by id; other rows are ignored.

    Raises:
        InvalidOutcomes: an expert is already known, a training query has no row, or costs are missing that the router
            has.
    """
    rows, new = router.rows, TrainingRows.of(table)
    if problems := list(_problems_of_experts(rows, new)):
        raise InvalidOutcomes(*problems)
    place = _places(new.ids, rows.ids)
    costs = None if rows.costs is None or new.costs is None else np.hstack([rows.costs, new.costs[place]])
    scores = np.hstack([rows.scores, new.scores[place]])
    return router.with_rows(rows.with_columns((*rows.experts, *table.experts), scores, costs))


def remove_expert(router: R, name: str) -> R:
    """A router without one of its experts; nothing is encoded.

    Raises:
        InvalidSettings: the expert is unknown, the only one, or the generalist of the router.
    """
    rows = router.rows
    if name not in rows.experts:
        raise InvalidSettings(f"the router does not know {name!r}; its experts are {', '.join(rows.experts)}")
    if len(rows.experts) == 1:
        raise InvalidSettings(f"{name!r} is the only expert of the router: no expert would be left to answer")
    if name == getattr(router.settings, "general", None):
        raise InvalidSettings(
            f"{name!r} is the router's generalist (its setting general): train a router with another generalist"
        )
    keep = [column for column, expert in enumerate(rows.experts) if expert != name]
    costs = None if rows.costs is None else rows.costs[:, keep]
    experts = tuple(rows.experts[column] for column in keep)
    return router.with_rows(rows.with_columns(experts, rows.scores[:, keep], costs))


def _problems_of_rows(rows: TrainingRows, table: OutcomeTable) -> Iterator[str]:
    new = TrainingRows.of(table)
    if unknown := [name for name in new.experts if name not in rows.experts]:
        yield (
            f"{_listed(unknown)}: not among the experts of the router ({', '.join(rows.experts)}): leave them out, or "
            "add them first, with their scores on the training queries"
        )
    if missing := [name for name in rows.experts if name not in new.experts]:
        yield f"no scores of {_listed(missing)}: a router needs the score of every expert on every training query"
    if (known := np.isin(new.ids, rows.ids)).any():
        ids = _listed([table.query_ids[row] for row in np.flatnonzero(known)])
        yield f"{known.sum()} of {len(new)} rows were trained on before: leave out the query ids {ids}"
    if rows.domains is not None and new.domains is None:
        yield "the router has the domains of its training queries, but the table has none: add a column `domain`"
    yield from _problem_of_costs(rows, new)


def _problems_of_experts(rows: TrainingRows, new: TrainingRows) -> Iterator[str]:
    if there := [name for name in new.experts if name in rows.experts]:
        yield f"already experts of the router: {_listed(there)}; remove them first, or leave them out"
    if missing := int((~np.isin(rows.ids, new.ids)).sum()):
        yield (
            f"no scores of {_listed(new.experts)} on {missing} of the {len(rows)} training queries: a router needs "
            "the score of every expert on every training query"
        )
    yield from _problem_of_costs(rows, new)


def _problem_of_costs(rows: TrainingRows, new: TrainingRows) -> Iterator[str]:
    if rows.costs is not None and new.costs is None:
        yield "the router has costs, but the table has none: add columns `cost::<expert>`, or give --prices"


def _places(ids: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.intp]:
    """(N,) the position of each wanted id in `ids`; all of them are present."""
    order = np.argsort(ids)
    return np.asarray(order[np.searchsorted(ids, wanted, sorter=order)])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
