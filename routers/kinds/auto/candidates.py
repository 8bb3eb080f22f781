"""The candidates of `auto`, and the rows of its scoreboard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BASELINE_KIND = "best-single"
"""The baseline of every candidate; always tried first."""

SHRINKING_KIND = "quality"
"""Its estimates shrink to the experts' mean scores by a weight from held-out rows: where nothing can be learned, every
query goes to the best single expert."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kind of router with its settings, as `routers.factory.build` takes them.

    encoder: name of the encoder; `None` takes the first, or means that the kind reads no text.
    """

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    encoder: str | None = None

    def __str__(self) -> str:
        shown = [f"{name}={value}" for name, value in self.settings.items()]
        shown += [] if self.encoder is None else [f"encoder={self.encoder}"]
        return f"{self.kind}({', '.join(shown)})" if shown else self.kind


CANDIDATES: tuple[Candidate, ...] = (
    Candidate("category", {"choice": "soft"}),  # all experts stay eligible: for cost weights and k experts
    Candidate("knn", {"k": 40}),
    Candidate("knn"),
    Candidate("cluster"),
    Candidate("quality", {"learners": ["category", "ridge", "knn"]}),
    Candidate("quality"),
)
"""Tried in this order, cheap ones first, so that a small budget covers several.

`quality` without trees is for tables where the categories carry all the information; trees then overfit. The setting
`candidates` replaces the list; it takes every kind but `auto`.
"""


@dataclass(frozen=True, slots=True)
class ScoreboardRow:
    """One candidate's result.

    Attributes:
        score: mean score over held-out inner folds; the selection uses it, so it is biased upwards for the winner.
        gain: over the best single expert, with its 95% paired bootstrap interval.
        seconds: of fitting and scoring on all inner folds.
        skipped: the reason where it was not tried; all figures are then `None`.
    """

    candidate: Candidate
    score: float | None = None
    gain: float | None = None
    gain_ci95_low: float | None = None
    gain_ci95_high: float | None = None
    seconds: float | None = None
    skipped: str | None = None
