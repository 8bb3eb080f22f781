"""The vocabulary of routing: Query -> Router.estimate -> Estimate -> decide (`routers.decision`) -> RoutingDecision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from routers.errors import RouterError

Floats = NDArray[np.floating[Any]]
Words = tuple[str, ...]
GENERAL = "general"
"""Label of a query that no category claims: it goes to the generalist."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, as in the OpenAI chat format (text content only)."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True, slots=True)
class Query:
    """What a router may look at.

    Attributes:
        allowed: names the caller permits; `None` permits all.
        cost_weight: USD-to-quality exchange rate of this request (utility = quality - cost_weight * cost); `None` takes
        the policy's. seed: breaks ties between experts by chance, the same one every time; `None` takes the cheaper,
        then the first. features: signals by name, numbers or words, filled by the caller because `Router.requires`
        asked for them.
    """

    messages: tuple[Message, ...]
    id: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    format: Literal["text", "json"] = "text"
    allowed: frozenset[str] | None = None
    cost_weight: float | None = None
    seed: int | None = None
    features: Mapping[str, Floats | Words] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str, **kwargs: Any) -> Self:
        """A query of a single user message."""
        return cls(messages=(Message("user", text),), **kwargs)

    @property
    def text(self) -> str:
        """The last user message; an empty string where there is none."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a router predicts for n queries and m experts.

    Attributes:
        experts: m names, the columns below.
        quality: (n, m) expected score in [0, 1].
        cost_usd: (n, m) expected cost in USD, or `None` where unknown.
        ood: (n,) how foreign the query is to the training data, in [0, 1].
        labels: n category names, or `None`.
        eligible: (n, m) bool: the experts this router would let answer, e.g. the mapped one of a category map under a
            budget; `None` means all. `decide` leaves this set only where the caller's constraints empty it.
        abstained: (n,) bool: the router is unsure and sends the query to its generalist, or, where it holds nobody
            eligible, wants it refused; `None` means never.
        confidence: (n,) probability that the decision is right; `None` takes the chosen expert's quality.
        reasons: n short sentences for people, or `None`.
        truncated: (n,) bool: the encoder did not read the end of the query; `None` where queries are read whole.
        weights: (n, m) >= 0: how much of a say each expert should have, by the router's own account. What the selector
            `recruit` goes by; `None`: by utility.
    """

    experts: tuple[str, ...]
    quality: Floats
    cost_usd: Floats | None = None
    ood: Floats | None = None
    labels: tuple[str, ...] | None = None
    eligible: NDArray[np.bool_] | None = None
    abstained: NDArray[np.bool_] | None = None
    confidence: Floats | None = None
    reasons: tuple[str, ...] | None = None
    truncated: NDArray[np.bool_] | None = None
    weights: Floats | None = None

    def __post_init__(self) -> None:
        n, m = self.quality.shape
        if m != len(self.experts):
            raise RouterError(f"quality has {m} columns for {len(self.experts)} experts")
        for name in ("cost_usd", "eligible", "weights"):
            array = getattr(self, name)
            if array is not None and array.shape != (n, m):
                raise RouterError(f"Estimate.{name} has shape {array.shape}, expected {(n, m)}")
        for name in ("ood", "labels", "abstained", "confidence", "reasons", "truncated"):
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise RouterError(f"Estimate.{name} has {len(value)} entries for {n} queries")

    def __len__(self) -> int:
        return int(self.quality.shape[0])

    def row(self, i: int) -> Estimate:
        """The estimate of the i-th query alone."""
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "experts"}
        rows: dict[str, Any] = {name: part if part is None else part[i : i + 1] for name, part in parts.items()}
        return Estimate(self.experts, **rows)


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """Who answers a query, in the order in which they are asked: best first, or cheap first in a cascade.

    An expert that was drawn several times (selector `recruit`) stands there as often.

    Attributes:
        weights: share of each expert in a composition, summing to 1 (equal utilities give equal shares).
        scores: utility of each expert in `experts`.
        experts: may be empty only when `abstained` and there is no generalist.
        truncated: the query was longer than the router reads; it was judged by its beginning.
        quality: estimated quality of each expert in `experts`; empty where nothing was estimated.
    """

    experts: tuple[str, ...]
    weights: tuple[float, ...]
    scores: tuple[float, ...]
    confidence: float
    label: str | None = None
    abstained: bool = False
    reason: str = ""
    truncated: bool = False
    quality: tuple[float, ...] = ()


@runtime_checkable
class Router(Protocol):
    """Scores experts for queries: pure, synchronous, seeded, batch-first."""

    requires: frozenset[str]
    """Names of `Query.features` that must be filled before `estimate`."""

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """What each expert would score on each of the n queries; never reads a query's own label."""
        ...


@dataclass(frozen=True, slots=True)
class RouterState:
    """A trained router as data: arrays go to safetensors, settings to JSON. No pickle."""

    arrays: Mapping[str, NDArray[Any]]
    settings: Mapping[str, Any]
