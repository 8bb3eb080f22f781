"""Learn more without encoding anything again: further rows, a further expert, or one expert less.

A router that can do this keeps what it needs of its training table (`TrainingRows`, and embeddings or clusters). Each
function gives a new router and leaves the old one as it is, so that one which is serving can be replaced at once.

What the result equals: `knn` and `category` a router fitted on all the rows, with the same embeddings; `cluster` keeps
its clusters, so that it equals a router with those centres, whereas one fitted anew would find others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from routers.errors import InvalidOutcomes, InvalidSettings, RouterError
from routers.factory import TrainableRouter
from routers.outcomes.table import OutcomeTable
from routers.outcomes.training_rows import TrainingRows

if TYPE_CHECKING:
    from routers.encoders.build import Encoder

SHOWN = 3
"""Query ids and names that a message lists."""


@runtime_checkable
class Updatable(TrainableRouter, Protocol):
    """A router that keeps its training rows: knn, cluster, category."""

    encoder: Encoder
    settings: Any

    @property
    def rows(self) -> TrainingRows:
        """What is kept of the training table."""
        ...

    def extended(self, table: OutcomeTable) -> Self:
        """A router that has also seen the rows of a table; encodes only these."""
        ...

    def with_rows(self, rows: TrainingRows) -> Self:
        """A router that knows other outcomes of the same queries; encodes nothing."""
        ...


R = TypeVar("R", bound=Updatable)


def updatable(router: TrainableRouter) -> Updatable:
    """The router, if it is one that can be updated.

    Raises:
        RouterError: it is not.
    """
    if not isinstance(router, Updatable):
        raise RouterError(
            f"a {router.kind} router keeps nothing of its training table, so it cannot be updated: train it again. "
            "Routers of kind knn, cluster and category can"
        )
    return router


def add_rows(router: R, table: OutcomeTable) -> R:
    """A router that has also learned from the n new rows of a table; only their prompts are encoded.

    Args:
        table: of the router's experts, in any order.

    Raises:
        InvalidOutcomes: an expert of the router is missing or there is one that it does not know, a row was trained on
            before, or there are no costs or domains where the router knows them.
    """
    if problems := list(_problems_of_rows(router.rows, table)):
        raise InvalidOutcomes(*problems)
    return router.extended(table.with_experts(router.rows.experts))


def add_expert(router: R, table: OutcomeTable) -> R:
    """A router that also knows the experts of a table, measured on the training queries; nothing is encoded.

    Args:
        table: a row for every training query, found by its id; other rows are left out. Its experts are the new ones.

    Raises:
        InvalidOutcomes: an expert that is there already, training queries without a row, or no costs where the router
            knows them.
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
        InvalidSettings: the router does not know the expert, knows no other, or has it as its generalist.
    """
    rows = router.rows
    if name not in rows.experts:
        raise InvalidSettings(f"the router does not know {name!r}; its experts are {', '.join(rows.experts)}")
    if len(rows.experts) == 1:
        raise InvalidSettings(f"{name!r} is the router's only expert: there would be nobody left to answer")
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
    if strangers := [name for name in new.experts if name not in rows.experts]:
        yield (
            f"{_listed(strangers)}: not among the router's experts, {', '.join(rows.experts)}; leave them out, or add "
            "them first by their scores on the training queries"
        )
    if missing := [name for name in rows.experts if name not in new.experts]:
        yield f"no scores of {_listed(missing)}: a router needs every expert's score on every query it learns from"
    if (known := np.isin(new.ids, rows.ids)).any():
        ids = _listed([table.query_ids[row] for row in np.flatnonzero(known)])
        yield f"{known.sum()} of {len(new)} rows were trained on before: leave out the query ids {ids}"
    if rows.domains is not None and new.domains is None:
        yield "the router knows the domains of its training queries, the table does not: add a column `domain`"
    yield from _problem_of_costs(rows, new)


def _problems_of_experts(rows: TrainingRows, new: TrainingRows) -> Iterator[str]:
    if there := [name for name in new.experts if name in rows.experts]:
        yield f"among the router's experts already: {_listed(there)}; remove them first, or leave them out"
    if missing := int((~np.isin(rows.ids, new.ids)).sum()):
        yield (
            f"no scores of {_listed(new.experts)} on {missing} of the {len(rows)} training queries: a router needs "
            "every expert's score on every query it learns from"
        )
    yield from _problem_of_costs(rows, new)


def _problem_of_costs(rows: TrainingRows, new: TrainingRows) -> Iterator[str]:
    if rows.costs is not None and new.costs is None:
        yield "the router knows costs, the table does not: add columns `cost::<expert>`, or prices"


def _places(ids: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.intp]:
    """(N,) where each wanted id stands among the ids; all of them do."""
    order = np.argsort(ids)
    return np.asarray(order[np.searchsorted(ids, wanted, sorter=order)])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
