"""A router that uses only the number of words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np

from routers import Encoder, Estimate, OutcomeTable, Query, RouterState


class ByLength:
    """An expert is as good on a query as on the training queries on the same side of `words` words."""

    kind: ClassVar[str] = "by-length"
    requires: frozenset[str] = frozenset()

    def __init__(self, *, words: int = 6) -> None:
        self.words = words
        self.experts: tuple[str, ...] = ()
        self.means = np.zeros((2, 0))  # (short or long, m)

    def fit(self, table: OutcomeTable) -> Self:
        """Learn the m experts' mean scores on short and on long queries."""
        self.experts, side = table.experts, self._sides(table.prompts)
        self.means = np.stack([table.scores[side == long].mean(axis=0) for long in (0, 1)])
        return self

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """The means of each query's side."""
        return Estimate(self.experts, self.means[self._sides([query.text for query in queries])])

    def state(self) -> RouterState:
        """The means, and the setting."""
        return RouterState({"means": self.means}, {"words": self.words, "experts": list(self.experts)})

    @classmethod
    def from_state(cls, state: RouterState, encoder: Encoder | None) -> Self:
        """The router whose `state()` this is."""
        router = cls(words=state.settings["words"])
        router.experts, router.means = tuple(state.settings["experts"]), state.arrays["means"]
        return router

    def _sides(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([len(text.split()) > self.words for text in texts], dtype=int)
