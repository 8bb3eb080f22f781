"""The one rule by which experts are ranked: which may be asked, and which of them comes first.

`routers.decision.decide` ranks one set of utilities with it; a cost-quality curve (`routers.evaluation.curves`) takes
the first expert at each of 200 cost weights. A measured decision is therefore the decision that is served.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Floats

TIE_DECIMALS = 12
"""Utilities that agree to this many decimals are equal."""

Columns = NDArray[np.intp]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Ranks m experts for each of n queries by utility.

    Attributes:
        candidates: (n, m) the experts that may be asked.
        overruled: (n,) no permitted expert is eligible, so all permitted ones are candidates.
        tie_order: (n, m) columns in the order that settles equal utilities.
    """

    candidates: Mask
    overruled: Mask
    tie_order: Columns

    @classmethod
    def of(
        cls, permitted: Mask, eligible: Mask | None, costs: Floats | None, rng: np.random.Generator | None = None
    ) -> Self:
        """The candidates are the permitted and eligible experts, or the permitted ones where that leaves none.

        Equal utilities go to the cheaper expert (NaN, an unknown cost, counts as the highest), then to the first
        column; with `rng`, to chance.

        Args:
            permitted: (n, m) allowed by the caller and of known quality.
            eligible: (n, m) allowed by the router; `None` means all.
            costs: (n, m) USD, or `None`.
        """
        candidates = permitted if eligible is None else permitted & eligible
        overruled = np.asarray(~candidates.any(axis=1), dtype=bool)
        if overruled.any():
            candidates = np.where(overruled[:, None], permitted, candidates)
        settled_by = rng.random(permitted.shape) if rng is not None else costs
        if settled_by is None:
            return cls(candidates, overruled, np.broadcast_to(np.arange(permitted.shape[1]), permitted.shape))
        return cls(candidates, overruled, settled_by.argsort(axis=1, kind="stable"))

    def order(self, utilities: Floats) -> Columns:
        """(n, m) columns, the highest utility first; columns that are not candidates come last."""
        rows, arranged = self._arranged(utilities)
        return np.asarray(self.tie_order[rows, (-arranged).argsort(axis=1, kind="stable")], dtype=np.intp)

    def first(self, utilities: Floats) -> Columns:
        """(n,) the first column of `order`, without sorting."""
        rows, arranged = self._arranged(utilities)
        return np.asarray(self.tie_order[rows[:, 0], arranged.argmax(axis=1)], dtype=np.intp)

    def _arranged(self, utilities: Floats) -> tuple[Columns, Floats]:
        """Row numbers (n, 1), and the rounded utilities (n, m) with their columns in tie order; -inf excludes."""
        rows = np.arange(len(utilities))[:, None]
        return rows, np.where(self.candidates, utilities.round(TIE_DECIMALS), -np.inf)[rows, self.tie_order]
