"""Budgets and the experts of a table: their footprints, which experts are kept, and the generalist."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from routers.errors import InvalidSettings
from routers.kinds.category.mapping import Budget, map_categories
from routers.outcomes.training_rows import TrainingRows

_Floats = NDArray[np.float64]


def footprints_of(rows: TrainingRows, given: Mapping[str, float] | None, budget: Budget | None) -> _Floats | None:
    """(K,) parameters or price of each expert: those given, or its mean cost; `None` where neither is known.

    Raises:
        InvalidSettings: an expert has none, or there are none for a budget.
    """
    if given is None:
        if budget is not None and rows.costs is None:
            raise InvalidSettings(
                "a budget needs the footprint of every expert: give `footprints` (parameters or price), or train on a "
                "table with costs"
            )
        return None if rows.costs is None else rows.costs.mean(axis=0)
    missing = [name for name in rows.experts if name not in given]
    if missing:
        raise InvalidSettings(f"no footprint of {', '.join(missing)}: `footprints` must name every expert")
    return np.array([given[name] for name in rows.experts], dtype=np.float64)


def kept_by(budget: Budget | None, expert_of: NDArray[np.intp], n_experts: int) -> NDArray[np.bool_]:
    """(K,) bool: the experts in the map under a cumulative budget; else all."""
    if budget is None or budget.kind != "cumulative":
        return np.ones(n_experts, dtype=bool)
    return np.isin(np.arange(n_experts), expert_of)


def generalist(
    rows: TrainingRows,
    named: str | None,
    kept: NDArray[np.bool_],
    footprints: _Floats | None,
    budget: Budget | None,
) -> int:
    """The column of the expert that answers queries that abstain: the one named, or the best within the budget.

    Raises:
        InvalidSettings: no expert has that name.
    """
    if named is not None:
        if named not in rows.experts:
            raise InvalidSettings(f"the generalist {named!r} is not in the table: {', '.join(rows.experts)}")
        return rows.experts.index(named)
    within = kept
    if budget is not None and footprints is not None and budget.kind == "average-active":
        within = budget.admits(footprints)
    columns = np.flatnonzero(within)
    prices = None if footprints is None else footprints[columns]
    best = map_categories([1.0], rows.scores[:, columns].mean(axis=0, keepdims=True), prices)  # ties: the cheaper
    return int(columns[best[0]])
