"""Routers that read no text: what every learned router has to beat.

The marks that no router can reach, dataset oracle and oracle, read labels and scores, so they are no routers: see
`routers.evaluation.metrics`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate, Query, RouterState
from routers.errors import InvalidArtifact, InvalidSettings, RouterError

if TYPE_CHECKING:
    from routers.encoders.build import Encoder
    from routers.outcomes.table import OutcomeTable

_Floats = NDArray[np.float64]


class _MeansRouter:
    """Knows each expert's mean score and cost on the training table, and nothing of the query."""

    kind: ClassVar[str]
    requires: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.experts: tuple[str, ...] = ()
        self._scores: _Floats = np.zeros(0)  # (m,)
        self._costs: _Floats | None = None  # (m,)

    def fit(self, table: OutcomeTable) -> Self:
        """Learn the m experts' mean scores and costs."""
        self.experts = table.experts
        self._scores = table.scores.mean(axis=0)
        self._costs = None if table.costs_usd is None else table.costs_usd.mean(axis=0)
        return self

    def state(self) -> RouterState:
        """The means, and the settings."""
        self._check_trained()
        arrays = {"scores": self._scores, "costs": self._costs}
        return RouterState(
            {name: array for name, array in arrays.items() if array is not None},
            {"settings": self._settings(), "experts": list(self.experts)},
        )

    @classmethod
    def from_state(cls, state: RouterState, encoder: Encoder | None = None) -> Self:
        """The router whose `state()` this is; these routers need no encoder.

        Raises:
            InvalidArtifact: something is missing.
        """
        try:
            router = cls(**state.settings["settings"])
            router.experts = tuple(state.settings["experts"])
            router._scores, router._costs = state.arrays["scores"], state.arrays.get("costs")
        except KeyError as error:
            raise InvalidArtifact(f"the saved {cls.kind} router lacks {error}: train it again") from error
        return router

    def _settings(self) -> dict[str, Any]:
        return {}

    def _check_trained(self) -> None:
        if not self.experts:
            raise RouterError(f"this {self.kind} router is not trained: call fit(table), or load a saved one")

    def _means(self, n: int) -> tuple[_Floats, _Floats | None]:
        """(n, m) mean scores and costs, the same for every query."""
        self._check_trained()
        costs = None if self._costs is None else np.tile(self._costs, (n, 1))
        return np.tile(self._scores, (n, 1)), costs


class BestSingleRouter(_MeansRouter):
    """Every query to the expert of best mean score in training; with a cost weight, to that of best utility."""

    kind: ClassVar[str] = "best-single"

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """The same (m,) means for each of the n queries."""
        quality, costs = self._means(len(queries))
        return Estimate(self.experts, quality, costs)


class FixedRouter(_MeansRouter):
    """Every query to one expert, whatever it costs.

    Args:
        expert: its name.
    """

    kind: ClassVar[str] = "fixed"

    def __init__(self, expert: str) -> None:
        super().__init__()
        self.expert = expert

    def fit(self, table: OutcomeTable) -> Self:
        """Learn the means.

        Raises:
            InvalidSettings: the expert is not in the table.
        """
        if self.expert not in table.experts:
            raise InvalidSettings(f"the expert {self.expert!r} is not in the table: {', '.join(table.experts)}")
        return super().fit(table)

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """The same (m,) means for each of the n queries; only the one expert is eligible."""
        quality, costs = self._means(len(queries))
        eligible = np.tile([name == self.expert for name in self.experts], (len(queries), 1))
        return Estimate(self.experts, quality, costs, eligible=eligible)

    def _settings(self) -> dict[str, Any]:
        return {"expert": self.expert}


class RandomRouter(_MeansRouter):
    """A random expert for each query, always the same one for the same text and seed.

    `quality` is a lottery ticket, not an estimate, so that choices of several experts and choices among a few allowed
    ones are random too; a cost weight makes no sense here. The confidence is the mean score of all experts.

    Args:
        seed: another seed draws other experts.
    """

    kind: ClassVar[str] = "random"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """(n, m) uniform draws."""
        n = len(queries)
        _, costs = self._means(n)
        tickets = np.array([self._tickets(query.text) for query in queries]).reshape(n, len(self.experts))
        confidence = np.full(n, self._scores.mean())
        return Estimate(self.experts, tickets, costs, confidence=confidence, reasons=("drawn at random",) * n)

    def _tickets(self, text: str) -> _Floats:
        digest = hashlib.sha256(f"{self.seed}:{text}".encode("utf-8", "surrogatepass")).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little")).random(len(self.experts))

    def _settings(self) -> dict[str, Any]:
        return {"seed": self.seed}
