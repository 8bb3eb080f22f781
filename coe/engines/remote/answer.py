"""The state of one answer of an endpoint: its pieces, finish reason and usage, from events in OpenAI's format.

Endpoints differ: null or missing `choices`, `delta`, `content` and `usage`, finish reasons of their own, whole messages
in place of deltas. What is harmless is tolerated; the rest raises MalformedStream or EndpointFailure.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

from coe.engines.remote.body import echoes, needs_one_object, token_limit
from coe.engines.remote.calls import Calls
from coe.engines.remote.choices import calls_of, first_choice, reasoning_of, text_of
from coe.engines.remote.events import COMPLETE, MalformedStream
from coe.engines.remote.limits import Limits
from coe.engines.remote.logprobs import logprobs_of, prompt_logprobs_of
from coe.engines.remote.surrogates import Surrogates
from coe.types import Chunk, FinishReason, GenerateRequest, TokenLogprob, Usage
from routers.base import Message, Query
from routers.tokens import TokenRange, estimate_range

_MOST_TOKENS: Final = 10**9
_TAIL_S: Final = 5.0
"""Seconds that usage may take after the finish reason."""
_FULL: Final = frozenset({"length", "max_tokens", "max_length", "max_output_tokens", "model_length", "token_limit"})
_FAILED: Final = frozenset(
    {"content_filter", "error", "abort", "aborted", "cancelled", "canceled", "safety", "recitation", "blocklist"}
)
"""Finish reasons of answers that are not whole. All others end one: `stop`, and those of other servers (`eos`)."""
_CALLS: Final = frozenset({"tool_calls", "function_call", "tool_use"})
"""Finish reasons of tool calls. Without offered tools such an answer counts only if it has text."""


class StreamCut(Exception):
    """The body ended before the answer did."""


class OnlyReasoning(Exception):
    """The answer reached `max_tokens` within its reasoning, so that it has no text."""


class EndpointFailure(Exception):
    """The endpoint reports an error inside an answer that it began with status 200.

    Attributes:
        message: the endpoint's words. status: an HTTP status, if the error states one. code: its code or type.
    """

    def __init__(self, message: str, status: int | None, code: str | None) -> None:
        super().__init__(message)
        self.message, self.status, self.code = message, status, code


class EndpointAnswer:
    """One answer, read event by event.

    Args:
        events: see `read_events`.
        request: what was asked: offered tools, and whether log-probabilities are wanted.
        limits: a longer text, and longer arguments of tool calls, are cut, with the finish reason `length`.
    """

    def __init__(self, events: AsyncGenerator[dict[str, Any], None], request: GenerateRequest, limits: Limits) -> None:
        self._events, self._request, self._limits = events, request, limits
        self._text, self._reasoning = _Channel(), _Channel()
        self._offered = frozenset(_name(tool) for tool in request.offered)
        self._calls = Calls(self._offered, limits.characters)
        self._scores = _Scores(request, limits.entries)
        self._over = self._complete = self._reasons = self._calls_without_tools = False
        # With log-probabilities of the prompt an answer is one piece: what belongs to the prompt shows only at its end.
        self._is_held = self._scores.of_prompt
        self._reason: str | None = None
        self._usage: dict[str, Any] = {}
        self._tail_ends: float | None = None

    async def read(self) -> None:
        """Read events until there is a piece to take, or the answer ends.

        Raises:
            MalformedStream, EndpointFailure: the answer cannot be used.
            StreamCut: the body ended before the answer did.
            OnlyReasoning: `max_tokens` ended it before its text began.
        """
        while not self._over and (self._is_held or not self._has_piece):
            event = await anext(self._events, None) if self._reason is None else await self._after_the_reason()
            if event is None or event is COMPLETE:
                self._complete = event is COMPLETE
                self._end()
            else:
                self._note_unless_whole(event)

    def take(self) -> Chunk | None:
        """What was read since the last call, which may be an empty chunk; `None` at the end."""
        if self._over and not self._has_piece:
            return None
        if self._is_held and not self._over:
            return Chunk("")
        logprobs, prompt_logprobs = self._scores.take()
        return Chunk(
            self._text.take(),
            reasoning=self._reasoning.take(),
            tool_calls=self._calls.take(),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    @property
    def reason(self) -> FinishReason:
        """The finish reason, after the end."""
        if self._reason in _FULL:
            return "length"
        return "tool_calls" if len(self._calls) else "stop"

    def usage(self, request: GenerateRequest) -> Usage:
        """The endpoint's token counts; estimates, marked as such, in place of missing or impossible ones."""
        prompt, completion = (_count(self._usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        if prompt and (completion or not self._has_content):
            return Usage(prompt, completion or 0)
        text = self._text.whole.removeprefix(request.prompt or "") if echoes(request) else self._text.whole
        likely = TokenRange.of_text(self._reasoning.whole + text + self._calls.text).likely
        most = token_limit(request)
        return Usage(prompt or _prompt_tokens(request), completion or min(likely, most), estimated=True)

    @property
    def reported(self) -> tuple[int, int] | None:
        """Tokens read and generated that the endpoint has counted so far; None if it has counted none."""
        counts = [_count(self._usage.get(name)) or 0 for name in ("prompt_tokens", "completion_tokens")]
        return (counts[0], counts[1]) if any(counts) else None

    @property
    def _has_piece(self) -> bool:
        return bool(self._text.new or self._reasoning.new or self._calls.has_pieces or self._scores.has_entries)

    @property
    def _has_content(self) -> bool:
        """Whether there is an answer: text, or a tool call."""
        return bool(self._text.n_characters or len(self._calls))

    async def _after_the_reason(self) -> dict[str, Any] | None:
        """The next event after the finish reason. Only usage may follow: nothing more can spoil the answer."""
        self._tail_ends = self._tail_ends or asyncio.get_running_loop().time() + _TAIL_S
        try:
            async with asyncio.timeout_at(self._tail_ends):
                return await anext(self._events, None)
        except Exception:  # a lost connection, an invalid event, or silence
            return None

    def _note_unless_whole(self, event: dict[str, Any]) -> None:
        """Note an event. After the finish reason an error changes nothing: the answer is whole."""
        try:
            self._note(event)
        except (MalformedStream, EndpointFailure):
            if self._reason is None:
                raise

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("error"):
            raise _failure(event["error"])
        if isinstance(event.get("usage"), dict):
            self._usage = event["usage"]
        if (choice := first_choice(event)) is None:
            return
        thought, has_reasoning = reasoning_of(choice)
        self._reasons = self._reasons or has_reasoning
        self._reasoning.add(thought)
        if not self._text.add(text_of(choice), self._limits.characters):
            self._cut()
        self._note_calls(calls_of(choice))
        self._scores.note(event, choice)
        reason = choice.get("finish_reason")
        if reason and reason != "null":
            self._reason = self._reason or str(reason)[:80]

    def _note_calls(self, pieces: list[Any]) -> None:
        if pieces and not self._offered:
            self._calls_without_tools = True
        elif pieces and not self._calls.add(pieces):
            self._cut()

    def _cut(self) -> None:
        """End the answer at its limit of characters."""
        self._reason, self._over = "length", True
        self._finish()

    def _finish(self) -> None:
        for channel in (self._text, self._reasoning):
            channel.end()
        self._calls.end(cut=self._reason in _FULL)
        self._scores.end(self._text.whole, _count(self._usage.get("prompt_tokens")))

    def _end(self) -> None:
        self._over = True
        if self._reason is None and not self._complete:
            raise StreamCut("closed the stream before its end")
        if self._reason is not None and self._reason.lower() in _FAILED:
            raise MalformedStream(f"it ended with finish_reason {self._reason!r}")
        if not self._has_content:
            self._require_content()
        self._finish()

    def _require_content(self) -> None:
        """Raise the error of an answer without text and tool call; one that just ended is an empty answer."""
        if self._calls_without_tools or (self._reason in _CALLS and not self._offered):
            raise MalformedStream("it has no text and calls a tool, though the request has no tools")
        if self._reason in _CALLS:
            raise MalformedStream(f"it ended with finish_reason {self._reason!r}, and has no tool call")
        if self._reasons:
            raise OnlyReasoning if self._reason in _FULL else MalformedStream("it has reasoning, but no text")
        if self._reason is None:
            raise MalformedStream("it has neither text nor a finish reason")


class _Channel:
    """A text that comes in pieces: what is new, and how much there was."""

    def __init__(self) -> None:
        self.new = ""
        self.n_characters = 0
        self._pieces: list[str] = []  # the whole, of which its tokens may have to be estimated
        self._surrogates = Surrogates()

    @property
    def whole(self) -> str:
        return "".join(self._pieces)

    def add(self, text: str, most: int | None = None) -> bool:
        """Add a piece; returns False if the text would exceed `most` characters, and is cut."""
        room = len(text) if most is None else most - self.n_characters
        self.n_characters += len(text)
        self._keep(self._surrogates.joined(text[:room]))
        return len(text) <= room

    def end(self) -> None:
        """No piece follows."""
        self._keep(self._surrogates.end())

    def take(self) -> str:
        new, self.new = self.new, ""
        return new

    def _keep(self, text: str) -> None:
        if text:
            self.new += text
            self._pieces.append(text)


class _Scores:
    """The log-probabilities of an answer, and those of the prompt that an endpoint echoes before them.

    Args:
        most: most entries of either.
    """

    def __init__(self, request: GenerateRequest, most: int) -> None:
        self._request, self._most = request, most
        wanted = request.logprobs is not None or request.prompt_logprobs is not None
        self._is_wanted, self._is_echo = wanted, wanted and echoes(request)
        self.of_prompt = self._is_echo or needs_one_object(request)
        self._entries: list[TokenLogprob] = []
        self._prompt: list[TokenLogprob] = []

    @property
    def has_entries(self) -> bool:
        return bool(self._entries or self._prompt)

    def note(self, event: dict[str, Any], choice: dict[str, Any]) -> None:
        """Add the entries of an event."""
        if self._is_wanted:
            self._entries += logprobs_of(choice, self._most - len(self._entries))
        if needs_one_object(self._request):
            self._prompt += prompt_logprobs_of(event, choice, self._most - len(self._prompt))

    def end(self, text: str, prompt_tokens: int | None) -> None:
        """Separate the prompt's entries. Raises MalformedStream if they are wanted and missing."""
        if self._is_echo and self._entries:
            n = self._n_of_prompt(text, prompt_tokens)
            self._prompt, self._entries = self._entries[:n], self._entries[n:]
        if self._request.prompt_logprobs is None:
            self._prompt = []
        elif not self._prompt:
            raise MalformedStream("it has no log-probabilities of the prompt")
        if self._request.logprobs is None:
            self._entries = []

    def take(self) -> tuple[tuple[TokenLogprob, ...], tuple[TokenLogprob, ...]]:
        """The entries of the answer and of the prompt since the last call."""
        taken = tuple(self._entries), tuple(self._prompt)
        self._entries, self._prompt = [], []
        return taken

    def _n_of_prompt(self, text: str, prompt_tokens: int | None) -> int:
        """The number of leading entries that are of the prompt."""
        prompt = self._request.prompt or ""
        if self._entries[0].logprob is not None and not (prompt and text.startswith(prompt)):
            return 0  # nothing precedes the first token of a prompt
        stated = prompt_tokens or len(self._request.prompt_ids)
        if 0 < stated <= len(self._entries):
            return stated
        n, characters = 0, 0
        while n < len(self._entries) and characters < len(prompt):
            characters += len(self._entries[n].token)
            n += 1
        return n


def _failure(error: Any) -> EndpointFailure:
    fields: dict[str, Any] = error if isinstance(error, dict) else {"message": error}
    codes = [fields.get(name) for name in ("code", "status", "type")]
    status = next((n for n in codes if type(n) is int and 400 <= n < 600), None)
    code = next((name for name in codes if isinstance(name, str)), None)
    return EndpointFailure(str(fields.get("message") or fields.get("type") or "no message"), status, code)


def _count(value: Any) -> int | None:
    """A token count, or None if it is no count."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST_TOKENS:
        return None
    return int(value)


def _prompt_tokens(request: GenerateRequest) -> int:
    if request.prompt_ids:
        return len(request.prompt_ids)
    messages = request.messages or (Message("user", request.prompt or ""),)
    return estimate_range(Query(messages, raw=request.prompt is not None)).likely


def _name(tool: Mapping[str, Any]) -> str:
    """The name of a function that a request offers."""
    function = tool.get("function")
    return str((function if isinstance(function, Mapping) else tool).get("name"))
