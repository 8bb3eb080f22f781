"""The values that move through the system: a request in, chunks out, an answer or a failure at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from coe.errors import ContextLengthExceeded, InvalidRequest
from routers.base import Message

FinishReason = Literal["stop", "length", "cancelled"]
Wants = Literal["text", "latent", "scores", "embedding"]
"""What a call returns: text, or data that a composition works with, encoded by the engine (`Answer.value`)."""
DEFAULT_MAX_TOKENS = 512
"""New tokens where a request states no limit: enough for an answer, and the end of one that would never stop."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What an expert is asked to generate.

    Attributes:
        messages: the conversation, rendered with the expert's chat template. Empty when `prompt` is given.
        prompt: raw text, continued without a chat template (`/v1/completions`).
        max_tokens: most new tokens; `None` takes what the context leaves, up to DEFAULT_MAX_TOKENS.
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1].
        stop: generation ends before the first of these strings.
        seed: the same request with the same seed on the same expert gives the same text, whatever shares its batch
            (greedy ignores it); `None` draws one.
        deadline_s: seconds from submission after which the request is given up; `None` waits.
        stream: False when nobody reads before the end: whoever carries the answer may then bring it whole, and ask
            again elsewhere when its host dies on the way.
        format: "json" requires a JSON object; only experts with the capability `json` are eligible.
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
        """The most new tokens that this request may have after a prompt of that length.

        Raises:
            ContextLengthExceeded: the prompt leaves no room, or less than is asked for.
        """
        wanted = self.max_tokens or min(DEFAULT_MAX_TOKENS, max(1, context_length - prompt_tokens))
        if prompt_tokens + wanted > context_length:
            raise ContextLengthExceeded(
                expert, prompt_tokens=prompt_tokens, max_tokens=wanted, context_length=context_length
            )
        return wanted


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens in and out, special tokens of the chat template included."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the seconds of an answer went on its host: waiting to be admitted, loading weights, generating."""

    queue_s: float
    load_s: float
    engine_s: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. The last one, and only it, has `finish_reason`, `usage` and, from a host, `timing`.

    cost_usd: from an orchestrator, which knows the prices; None where one is unknown. value: in the last chunk of a
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
