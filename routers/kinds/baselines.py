"""Routers that read no text: the baselines that every learned router has to beat.

The dataset oracle and the oracle read labels and scores, so they are no routers: see `routers.evaluation.metrics`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate, Query
from routers.errors import InvalidSettings
from routers.fitted import FittedRouter, NoSettings

if TYPE_CHECKING:
    from routers.outcomes.table import OutcomeTable

_Floats = NDArray[np.float64]
_S = TypeVar("_S")


@dataclass(frozen=True, slots=True, eq=False)
class Means:
    """Mean scores and USD of m experts on the training table, (m,) each; costs are `None` where unknown."""

    experts: tuple[str, ...]
    scores: _Floats
    costs: _Floats | None

    def repeated(self, n: int) -> tuple[_Floats, _Floats | None]:
        """(n, m) scores and costs, the same for every query."""
        return np.tile(self.scores, (n, 1)), None if self.costs is None else np.tile(self.costs, (n, 1))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Scores, and costs where known."""
        return {"scores": self.scores} | ({} if self.costs is None else {"costs": self.costs})

    def values(self) -> dict[str, Any]:
        """Experts."""
        return {"experts": list(self.experts)}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any], settings: object) -> Self:
        """The means of `arrays()` and `values()`."""
        return cls(tuple(values["experts"]), arrays["scores"], arrays.get("costs"))


class _MeansRouter(FittedRouter[_S, Means]):
    """Keeps each expert's mean score and cost, and reads nothing of the query."""

    Model = Means

    def fit(self, table: OutcomeTable) -> Self:
        """Average the m experts' scores and costs."""
        costs = None if table.costs_usd is None else table.costs_usd.mean(axis=0)
        self._model = Means(table.experts, table.scores.mean(axis=0), costs)
        return self


class BestSingleRouter(_MeansRouter[NoSettings]):
    """Every query to the expert of best mean score in training; with a cost weight, to that of best utility."""

    kind: ClassVar[str] = "best-single"

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """The same (m,) means for each of the n queries."""
        return Estimate(self.model.experts, *self.model.repeated(len(queries)))


@dataclass(frozen=True, slots=True)
class FixedSettings:
    """Settings of `FixedRouter`: expert, the name of the expert that answers every query."""

    expert: str


class FixedRouter(_MeansRouter[FixedSettings]):
    """Every query to one expert, whatever it costs."""

    kind: ClassVar[str] = "fixed"
    Settings = FixedSettings

    def fit(self, table: OutcomeTable) -> Self:
        """Average the m experts' scores and costs.

        Raises:
            InvalidSettings: the expert is not in the table.
        """
        if self.settings.expert not in table.experts:
            known = ", ".join(table.experts)
            raise InvalidSettings(f"the expert {self.settings.expert!r} is not in the table: {known}")
        return super().fit(table)

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """The same (m,) means for each of the n queries; only the one expert is eligible."""
        experts = self.model.experts
        eligible = np.tile([name == self.settings.expert for name in experts], (len(queries), 1))
        return Estimate(experts, *self.model.repeated(len(queries)), eligible=eligible)


@dataclass(frozen=True, slots=True)
class RandomSettings:
    """Settings of `RandomRouter`: another seed draws other experts."""

    seed: int = 0


class RandomRouter(_MeansRouter[RandomSettings]):
    """A random expert for each query, the same one for the same text and seed.

    `quality` is a uniform draw, not an estimate, so that choices of several experts and among few allowed ones are
    random too; a cost weight has no meaning here. The confidence is the mean score of all experts.
    """

    kind: ClassVar[str] = "random"
    Settings = RandomSettings

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """(n, m) uniform draws."""
        n, means = len(queries), self.model
        draws = np.array([self._drawn(query.text) for query in queries]).reshape(n, len(means.experts))
        confidence = np.full(n, means.scores.mean())
        reasons = ("drawn at random",) * n
        return Estimate(means.experts, draws, means.repeated(n)[1], confidence=confidence, reasons=reasons)

    def _drawn(self, text: str) -> _Floats:
        digest = hashlib.sha256(f"{self.settings.seed}:{text}".encode("utf-8", "surrogatepass")).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little")).random(len(self.experts))
