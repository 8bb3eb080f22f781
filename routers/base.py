"""The vocabulary of routing: Query -> Router.estimate -> Estimate -> decide (`routers.decision`) -> RoutingDecision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from routers.errors import RouterError

Floats = NDArray[np.floating[Any]]
Words = tuple[str, ...]
GENERAL = "general"
"""Label of a query that fits no category: it goes to the generalist."""
EMBEDDING: Final = "embedding"
"""What a query needs whose texts are embedded, and the capability of the experts that do it."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call that a model requests.

    arguments: JSON text as the model wrote it; it may be invalid.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation, as in the OpenAI chat format.

    Attributes:
        content: the text of all parts; the only field that routers read.
        tool_calls: calls that an assistant message requests. tool_call_id: the call whose result a tool message holds.
        name: the name of the author.
        reasoning: the reasoning text of an assistant message; only some chat templates render it.
        parts: the content parts in OpenAI's form, if there are others than text (images); empty otherwise.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str = ""
    parts: tuple[Mapping[str, Any], ...] = ()

    def document(self) -> dict[str, Any]:
        """The message in OpenAI's form; fields that are not set are left out."""
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.tool_calls
        ]
        rest = {
            "tool_calls": calls,
            "tool_call_id": self.tool_call_id,
            "name": self.name,
            "reasoning_content": self.reasoning,
        }
        content = [dict(part) for part in self.parts] or self.content
        return {"role": self.role, "content": content} | {name: value for name, value in rest.items() if value}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """The message of a document that `document` wrote."""
        content = document["content"]
        parts = tuple(content) if isinstance(content, list) else ()
        calls = document.get("tool_calls", ())
        return cls(
            document["role"],
            "".join(part.get("text", "") for part in parts) if parts else content,
            tuple(ToolCall(call["id"], **call["function"]) for call in calls),
            document.get("tool_call_id"),
            document.get("name"),
            document.get("reasoning_content", ""),
            parts,
        )


@dataclass(frozen=True, slots=True)
class Query:
    """A query: what a router reads, and the caller's limits (`allowed`, `max_tokens`, `cost_weight`, `seed`).

    Attributes:
        allowed: names of the experts that the caller permits; `None` permits all.
        cost_weight: quality given up per USD in this request (utility = quality - cost_weight * cost); `None` means
            that of the policy.
        seed: breaks ties between experts at random, reproducibly; `None` means the cheaper expert, then the first.
        max_tokens: most new tokens; an expert needs room for them in its context. `None` if the caller states no limit.
        raw: the text is continued without a chat template.
        needs: further capabilities that the request requires of an expert or its engine (`routers.constraints`), such
            as `vision` or `logprobs`.
        previous: the expert of the previous turns, where the caller states it; `None` derives it from the messages.
        features: name -> signal, numbers or words. The caller fills in what `Router.requires` names.
    """

    messages: tuple[Message, ...]
    id: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    format: Literal["text", "json"] = "text"
    allowed: frozenset[str] | None = None
    cost_weight: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    raw: bool = False
    needs: frozenset[str] = frozenset()
    previous: str | None = None
    features: Mapping[str, Floats | Words] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str, **kwargs: Any) -> Self:
        """A query with a single user message."""
        return cls(messages=(Message("user", text),), **kwargs)

    @property
    def text(self) -> str:
        """The last user message; empty if there is none."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")

    @property
    def embeds(self) -> bool:
        """Whether vectors are wanted: each user message is then an input of its own, not a turn of a conversation."""
        return EMBEDDING in self.needs


@dataclass(frozen=True, slots=True)
class Estimate:
    """Predictions of a router for n queries and m experts.

    Attributes:
        experts: m names, the columns of the arrays.
        quality: (n, m) expected score in [0, 1].
        cost_usd: (n, m) expected cost in USD, or `None` if unknown.
        ood: (n,) how far the query is out of distribution of the training data, in [0, 1].
        labels: n category names, or `None`.
        eligible: (n, m) bool: the experts that this router lets answer; `None` means all. `decide` leaves this set only
            if the caller's constraints empty it.
        abstained: (n,) bool: the router is unsure and sends the query to its generalist or, if no expert is eligible,
            refuses it; `None` means never.
        confidence: (n,) probability that the decision is right; `None` means the quality of the chosen expert.
        reasons: n short explanations, or `None`.
        truncated: (n,) bool: the encoder did not read the end of the query; `None` if queries are read whole.
        weights: (n, m) >= 0: share of each expert in the answer, as the router sees it; the selector `recruit` ranks by
            it. `None` means shares by utility.
    """

    # `eligible` exists because a category map under a budget may send a category to a cheaper expert than the one of
    # highest quality, which an argmax over qualities cannot express. `weights` exists because recruiting (Symbolic-MoE)
    # ranks by suitability x competency, which is no expected score; cost weights, votes and confidence still need the
    # calibrated quality. The router decides on abstention, since it knows its thresholds and its generalist. `quality`
    # is a probability: votes weigh by its log-odds, the dynamic selector multiplies its complements, a cascade stops by
    # it; so routers calibrate on held-out rows.

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
        """The estimate of the i-th query."""
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "experts"}
        rows: dict[str, Any] = {name: part if part is None else part[i : i + 1] for name, part in parts.items()}
        return Estimate(self.experts, **rows)


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """The experts that answer a query, in the order of their calls: best first, or cheapest first in a cascade.

    An expert that the selector `recruit` draws several times is listed as often.

    Attributes:
        experts: empty only if the router abstained and has no generalist.
        weights: share of each expert in a composition, summing to 1 (equal utilities give equal shares).
        scores: utility of each expert in `experts`.
        truncated: the query is longer than the router reads, so the decision rests on its beginning.
        quality: estimated quality of each expert in `experts`; empty if nothing was estimated.
        fallback: no expert that the router knows can take the query; `experts` is the policy's fallback.
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
    fallback: bool = False


@runtime_checkable
class Router(Protocol):
    """Scores experts for queries: pure, synchronous, seeded, batch-first."""

    requires: frozenset[str]
    """Names of the `Query.features` that `estimate` needs."""

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """Expected scores of the experts on n queries; never reads labels of these queries."""
        ...


@dataclass(frozen=True, slots=True)
class RouterState:
    """A trained router as data: arrays are saved as safetensors, settings as JSON. No pickle."""

    arrays: Mapping[str, NDArray[Any]]
    settings: Mapping[str, Any]
