"""What `auto` tries, and the scoreboard it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BASELINE_KIND = "best-single"
"""What every candidate has to beat; it always stands first."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kind of router with its settings, as `routers.factory.build` takes them.

    encoder: name of the encoder, `None` where the kind reads no text, or the first one is meant.
    """

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    encoder: str | None = None

    def __str__(self) -> str:
        told = [f"{name}={value}" for name, value in self.settings.items()]
        told += [] if self.encoder is None else [f"encoder={self.encoder}"]
        return f"{self.kind}({', '.join(told)})" if told else self.kind


CANDIDATES: tuple[Candidate, ...] = (
    Candidate(
        "category", {"choice": "soft"}
    ),  # every expert stays eligible: for cost weights, and several experts a query
    Candidate("knn", {"k": 40}),
    Candidate("knn", {"k": 100}),
    Candidate("cluster"),
    Candidate("quality", {"learners": ["category", "ridge", "knn"]}),
    Candidate("quality"),
)
"""Tried in this order, the cheap ones first, so that a small budget still buys a choice.

`quality` without trees is for tables where categories say all there is to say; trees then find patterns that are none.
The setting `candidates` takes any other list, of every kind there is.
"""


@dataclass(frozen=True, slots=True)
class ScoreboardRow:
    """A line of the scoreboard.

    Attributes:
        score: mean score over held-out inner folds; the figure that is selected on, so it flatters the winner.
        gain: over the best single expert, with its 95% paired bootstrap interval.
        seconds: what fitting and scoring took, all inner folds together.
        skipped: why it was not tried; all figures are `None` then.
    """

    candidate: Candidate
    score: float | None = None
    gain: float | None = None
    gain_ci95_low: float | None = None
    gain_ci95_high: float | None = None
    seconds: float | None = None
    skipped: str | None = None
