"""The values that pass through the system: a request in, chunks out, an answer or a failure at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from coe.errors import ContextLengthExceeded, InvalidRequest
from routers.base import Message

FinishReason = Literal["stop", "length", "cancelled"]
Wants = Literal["text", "latent", "scores", "embedding"]
"""What a call returns: text, or data that a composition works with, encoded by the engine (`Answer.value`)."""
DEFAULT_MAX_TOKENS = 512
"""New tokens if a request states no limit: enough for an answer, and it ends one that would never stop."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A request to one expert.

    Attributes:
        messages: the conversation, rendered with the expert's chat template. Empty when `prompt` is given.
        prompt: raw text, continued without a chat template (`/v1/completions`).
        max_tokens: most new tokens; `None` takes what fits the context, up to DEFAULT_MAX_TOKENS.
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1].
        stop: generation ends before the first of these strings.
        seed: the same request with the same seed on the same expert gives the same text, whatever else is in its batch
            (greedy decoding ignores it); `None` draws one.
        deadline_s: seconds after submission at which the request is cancelled; `None` never.
        stream: False if the caller reads only the complete answer: it may then arrive as one chunk, and a request whose
            host dies is sent to another host.
        format: "json" requires a JSON object; only experts with the capability `json` are eligible.
        patient: True if no client waits: an endpoint's rate limit is waited out before the call fails.
        wants: what to return; anything but text needs an engine that can produce it (`Capabilities.serves`).
    """

    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    deadline_s: float | None = None
    stream: bool = True
    format: Literal["text", "json"] = "text"
    id: str = ""
    wants: Wants = "text"
    patient: bool = False

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.prompt is not None):
            raise InvalidRequest("give either messages or prompt, not both and not neither")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 2):
            raise InvalidRequest(f"temperature must lie in [0, 2], got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p must lie in (0, 1], got {self.top_p}")
        if any(not s for s in self.stop):
            raise InvalidRequest("stop strings must not be empty")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise InvalidRequest(f"deadline_s must be positive, got {self.deadline_s}")

    def token_limit(self, prompt_tokens: int, context_length: int, *, expert: str) -> int:
        """The most new tokens for this request after a prompt of that length.

        Raises:
            ContextLengthExceeded: prompt and `max_tokens` together exceed the context.
        """
        wanted = self.max_tokens or min(DEFAULT_MAX_TOKENS, max(1, context_length - prompt_tokens))
        if prompt_tokens + wanted > context_length:
            raise ContextLengthExceeded(
                expert, prompt_tokens=prompt_tokens, max_tokens=wanted, context_length=context_length
            )
        return wanted


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens in and out, special tokens of the chat template included.

    estimated: whether a count is an estimate, since the endpoint reports none.
    """

    prompt_tokens: int
    completion_tokens: int
    estimated: bool = field(default=False, compare=False)

    def document(self) -> dict[str, int]:
        """The counts by name, with `"estimated": true` if one is an estimate."""
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return counts | ({"estimated": True} if self.estimated else {})


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of an answer on its host: waiting for admission, loading weights, generating."""

    queue_s: float
    load_s: float
    engine_s: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. The last one, and only it, has `finish_reason`, `usage` and, from a host, `timing`.

    cost_usd: set by the orchestrator, which has the prices; None if one is unknown. value: in the last chunk of a
    request that wants something else than text: the result, encoded by the engine.
    """

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timing: Timing | None = None
    cost_usd: float | None = None
    value: bytes | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The complete answer of an expert.

    notes: what the caller should know about how it came about: which experts failed, what was cut. value: the result of
    a request that wants something else than text.
    """

    expert: str
    text: str
    finish_reason: FinishReason
    usage: Usage
    cost_usd: float | None = None
    timing: Timing | None = None
    notes: tuple[str, ...] = ()
    value: bytes | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """An expert did not answer; `error` keeps the cause."""

    expert: str
    error: Exception
