"""TrainingRows: the part of a training table that an updatable router keeps (knn, cluster, category, pilot).

With stored embeddings, a router learns new rows and experts without encoding its training prompts again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from routers.outcomes.reference import Reference, hashed_ids

if TYPE_CHECKING:
    from routers.outcomes.table import OutcomeTable

PREFIX = "rows."
"""Prefix of the array names in a saved state."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class TrainingRows:
    """N training queries and m experts, in the order of the table; no ids, no prompts.

    Attributes:
        ids: (N,) uint64 hashes of the query ids.
        scores: (N, m) in [0, 1].
        costs: (N, m) in USD, or `None`.
        domains: N names, or `None`.
    """

    experts: tuple[str, ...]
    ids: NDArray[np.uint64]
    scores: _Floats
    costs: _Floats | None
    domains: tuple[str, ...] | None

    @classmethod
    def of(cls, table: OutcomeTable) -> Self:
        """The training rows of a table."""
        ids = hashed_ids(table.query_ids)
        return cls(table.experts, ids, *_in_order(table.scores, table.costs_usd), table.domains)

    def __len__(self) -> int:
        return len(self.ids)

    def joined(self, more: TrainingRows) -> Self:
        """These rows followed by others of the same experts; costs and domains are dropped unless both have them."""
        costs = None if self.costs is None or more.costs is None else np.vstack([self.costs, more.costs])
        domains = None if self.domains is None or more.domains is None else self.domains + more.domains
        return replace(
            self,
            ids=np.concatenate([self.ids, more.ids]),
            scores=np.vstack([self.scores, more.scores]),
            costs=costs,
            domains=domains,
        )

    def with_columns(self, experts: tuple[str, ...], scores: _Floats, costs: _Floats | None) -> Self:
        """The same queries with (N, m') scores and costs of other experts."""
        scores, costs = _in_order(scores, costs)
        return replace(self, experts=experts, scores=scores, costs=costs)

    def reference(self) -> Reference:
        """The reference of these rows, for a later evaluation."""
        return Reference.of_scores(self.experts, self.scores, self.domains, self.ids)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays; domains as numbers."""
        kept: dict[str, NDArray[Any] | None] = {"ids": self.ids, "scores": self.scores, "costs": self.costs}
        if self.domains is not None:
            kept["domains"] = np.unique(np.array(self.domains, dtype=object), return_inverse=True)[1].astype(np.int32)
        return {PREFIX + name: array for name, array in kept.items() if array is not None}

    def settings(self) -> dict[str, Any]:
        """All other values, as JSON values."""
        return {"experts": list(self.experts), "domains": None if self.domains is None else sorted(set(self.domains))}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]) -> Self:
        """Inverse of `arrays()` and `settings()`.

        Raises:
            KeyError: an array or a setting is missing.
        """
        names = settings["domains"]
        domains = None if names is None else tuple(names[i] for i in arrays[PREFIX + "domains"])
        experts, scores = tuple(settings["experts"]), arrays[PREFIX + "scores"]
        return cls(experts, arrays[PREFIX + "ids"], scores, arrays.get(PREFIX + "costs"), domains)


def _in_order(scores: _Floats, costs: _Floats | None) -> tuple[_Floats, _Floats | None]:
    """The same in C order, as after loading, so that sums over columns round equally."""
    return np.ascontiguousarray(scores), None if costs is None else np.ascontiguousarray(costs)
