"""The values that pass through the system: a request in, chunks out, an answer or a failure at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from coe.errors import ContextLengthExceeded, InvalidRequest
from coe.sampling import NO_OPTIONS, SamplingOptions
from coe.telemetry.origin import Origin
from registry.priorities import RequestPriority
from routers.base import EMBEDDING, Message, ToolCall
from routers.constraints import (
    JSON_SCHEMA,
    LOGPROBS,
    PROMPT_LOGPROBS,
    SAMPLING,
    TOKEN_PROMPTS,
    TOOLS,
    VISION,
)

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
Wants = Literal["text", "latent", "scores", "embedding"]
"""What a call returns: text, or data that a composition works with, encoded by the engine (`Answer.value`)."""
MOST_NOTE_LAYERS = 16
"""Most layers whose states one call returns."""
DEFAULT_MAX_TOKENS = 512
"""New tokens if a request states no limit: enough for an answer, and it ends one that would never stop."""


@dataclass(frozen=True, slots=True)
class NotesWanted:
    """The notes that a call with `wants="latent"` returns (`coe.engines.latent.notes`).

    Attributes:
        channel: "states": hidden states of tokens; "cache": key-value entries of the answer's tokens.
        layers: of the states: the decoder layers whose outputs are wanted, counted from 1; () is what the head reads:
            the last layer, normalised.
        places: of the states: "speaking": the last token of the prompt and the tokens of the answer; "all": all tokens
            of the prompt, too.
        answer: False reads the prompt only, and generates no token.
    """

    channel: Literal["states", "cache"] = "states"
    layers: tuple[int, ...] = ()
    places: Literal["speaking", "all"] = "speaking"
    answer: bool = True

    def __post_init__(self) -> None:
        if len(self.layers) > MOST_NOTE_LAYERS or any(layer < 1 for layer in self.layers):
            raise InvalidRequest(f"layers of notes are at most {MOST_NOTE_LAYERS} numbers from 1, got {self.layers}")
        if self.channel == "cache" and (self.layers or self.places != "speaking" or not self.answer):
            raise InvalidRequest("notes of the channel 'cache' are of all layers and of the answer's tokens")


@dataclass(frozen=True, slots=True)
class PeerNotes:
    """Notes for a composed expert (`coe.engines.latent.notes`).

    Attributes:
        peer: name of the member that wrote them.
        data: packed.
        span: characters [start, end) of the user's text that the peer was asked about; `None` is all of it.
    """

    __pydantic_config__: ClassVar[Any] = {"ser_json_bytes": "base64", "val_json_bytes": "base64"}

    peer: str
    data: bytes
    span: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A request to one expert.

    Attributes:
        messages: the conversation, rendered with the expert's chat template. Empty when `prompt` is given.
        prompt: raw text, continued without a chat template (`/v1/completions`).
        prompt_ids: the prompt as token ids of the expert's tokenizer; then `prompt` is empty text.
        max_tokens: most new tokens; `None` takes what fits the context, up to DEFAULT_MAX_TOKENS. 0 only with `echo`.
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1].
        stop: generation ends before the first of these strings.
        seed: the same request with the same seed on the same expert gives the same text, whatever else is in its batch
            (greedy decoding ignores it); `None` draws one.
        deadline_s: seconds after submission at which the request is cancelled; `None` never.
        stream: False if the caller reads only the complete answer: it may then arrive as one chunk, and a request whose
            host dies is sent to another host.
        format: "json" requires a JSON object; only experts that can produce JSON are eligible.
        json_schema: OpenAI's object with the `schema` that the answer must satisfy; `format` is then "json".
        tools: functions that the model may call, in OpenAI's form. tool_choice: "required" demands a call, "none"
            forbids one. tool_name: the function that must be called. parallel_tool_calls: several calls are allowed.
        sampling: penalties, cut-offs and the like beyond `temperature` and `top_p`.
        logprobs: number of most likely tokens to return with the log-probability of each generated token; 0 returns
            that of the generated token only; `None` nothing. prompt_logprobs: the same for the tokens of the prompt.
        echo: the answer starts with the text of the prompt.
        reasoning_effort: how much the model should reason, in the endpoint's words; `None` is the model's default.
        template_kwargs: variables for the chat template.
        priority: which of the requests that wait for a host go first; `None` is "normal". The `priority` of an expert
            is something else: it is about eviction.
        patient: True if no client waits: an endpoint's rate limit is waited out before the call fails.
        wants: what to return; anything but text needs an engine that can produce it (`Capabilities.serves`).
        inputs: texts, or token ids of the expert's tokenizer, whose vectors are wanted; then `prompt` is empty text.
        notes_wanted: which notes a call with `wants="latent"` returns; `None` is `NotesWanted()`.
        notes: of the peers of a composed expert; `None`: its peers are yet to be called; (): no peer has left any.
        origin: the HTTP request and the trace that it belongs to; it changes no answer. `None` where neither traces nor
            JSON logs are on.
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
    priority: RequestPriority | None = None
    prompt_ids: tuple[int, ...] = ()
    json_schema: Mapping[str, Any] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: Literal["auto", "none", "required"] = "auto"
    tool_name: str | None = None
    parallel_tool_calls: bool = True
    sampling: SamplingOptions = NO_OPTIONS
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    reasoning_effort: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str | tuple[int, ...], ...] = ()
    notes_wanted: NotesWanted | None = None
    notes: tuple[PeerNotes, ...] | None = None
    origin: Origin | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.notes_wanted is not None and self.wants != "latent":
            raise InvalidRequest('`notes_wanted` is for a request that wants notes (`wants` is "latent")')
        if self.inputs and self.wants != "embedding":
            raise InvalidRequest("`inputs` are embedded: a request that has some wants an embedding")
        if bool(self.messages) == (self.prompt is not None):
            raise InvalidRequest("give either messages or prompt, not both and not neither")
        least = 0 if self.echo else 1
        if self.max_tokens is not None and self.max_tokens < least:
            raise InvalidRequest(f"max_tokens must be at least {least}, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 2):
            raise InvalidRequest(f"temperature must lie in [0, 2], got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p must lie in (0, 1], got {self.top_p}")
        if any(not s for s in self.stop):
            raise InvalidRequest("stop strings must not be empty")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise InvalidRequest(f"deadline_s must be positive, got {self.deadline_s}")

    @property
    def offered(self) -> tuple[Mapping[str, Any], ...]:
        """The tools that the model may call now."""
        return () if self.tool_choice == "none" else self.tools

    @property
    def read(self) -> tuple[Message, ...]:
        """The messages that a router reads: a raw prompt is one of the user, and so is each text to embed."""
        texts = [each for each in self.inputs if isinstance(each, str)]
        return self.messages or tuple(Message("user", text) for text in texts or [self.prompt or ""])

    @property
    def needs(self) -> frozenset[str]:
        """The capabilities that an expert or its engine must have for this request (`routers.constraints`)."""
        return frozenset(self._needs())

    def _needs(self) -> Iterator[str]:
        if self.wants == "embedding":
            yield EMBEDDING
        if self.offered:
            yield TOOLS
        if any(message.parts for message in self.messages):
            yield VISION
        if self.json_schema is not None:
            yield JSON_SCHEMA
        if self.logprobs is not None:
            yield LOGPROBS
        if self.prompt_logprobs is not None:
            yield PROMPT_LOGPROBS
        if self.prompt_ids or (self.inputs and not isinstance(self.inputs[0], str)):
            yield TOKEN_PROMPTS
        if self.sampling is not NO_OPTIONS and self.sampling != NO_OPTIONS:
            yield SAMPLING

    def token_limit(self, prompt_tokens: int, context_length: int, *, expert: str) -> int:
        """The most new tokens for this request after a prompt of that length.

        Raises:
            ContextLengthExceeded: prompt and `max_tokens` together exceed the context.
        """
        wanted = self.max_tokens
        if wanted is None:
            wanted = min(DEFAULT_MAX_TOKENS, max(1, context_length - prompt_tokens))
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

    @classmethod
    def total(cls, usages: Iterable[Usage]) -> Usage:
        """The tokens of several calls; an estimate if one of them is."""
        counted = list(usages)
        return cls(
            sum(usage.prompt_tokens for usage in counted),
            sum(usage.completion_tokens for usage in counted),
            estimated=any(usage.estimated for usage in counted),
        )

    def document(self) -> dict[str, int]:
        """The counts by name, with `"estimated": true` if one is an estimate."""
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return counts | ({"estimated": True} if self.estimated else {})


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of an answer on its host: waiting for admission, loading weights, generating.

    first_s: of `engine_s`, those until the first text; None if there was none.
    """

    queue_s: float
    load_s: float
    engine_s: float
    first_s: float | None = None


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call: the texts of all pieces with one `index` are joined."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability (natural logarithm).

    Attributes:
        token: its text; a part of a character is shown as `bytes:\\x..`, as OpenAI does.
        logprob: `None` for the first token of a prompt, which nothing precedes.
        data: the bytes of its text, `None` if unknown.
        top: the most likely tokens at this place, most likely first: text, log-probability, bytes.
    """

    token: str
    logprob: float | None
    data: bytes | None = None
    top: tuple[tuple[str, float, bytes | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. The last one, and only it, has `finish_reason`, `usage` and, from a host, `timing`.

    text, reasoning, tool_calls, logprobs: pieces of the answer's text, of the reasoning before it, of tool calls, and
    the log-probabilities of its tokens; each may be empty. prompt_logprobs: of the prompt, in the first chunk only.
    cost_usd: set by the orchestrator, which has the prices; None if one is unknown. value: in the last chunk of a
    request that wants something else than text: the result, encoded by the engine. notes: in the last chunk, what a
    composed expert states of how the answer came about (`Answer.notes`).
    """

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timing: Timing | None = None
    cost_usd: float | None = None
    value: bytes | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing that a client sees."""
        return not (self.text or self.reasoning or self.tool_calls or self.logprobs or self.prompt_logprobs)


@dataclass(frozen=True, slots=True)
class Answer:
    """The complete answer of an expert; the fields of a chunk, whole.

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
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """An expert did not answer; `error` keeps the cause."""

    expert: str
    error: Exception
