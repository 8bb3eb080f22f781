"""The state of one answer of an endpoint: its text, finish reason and usage, from events in OpenAI's format.

Endpoints differ: null or missing `choices`, `delta`, `content` and `usage`, finish reasons of their own, whole messages
in place of deltas. What is harmless is tolerated; the rest raises MalformedStream or EndpointFailure.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Final

from coe.engines.remote.events import COMPLETE, MalformedStream
from coe.types import DEFAULT_MAX_TOKENS, FinishReason, GenerateRequest, Usage
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
"""Finish reasons of tool calls. Requests to endpoints have no tools, so such an answer counts only if it has text."""
_REASONING: Final = ("reasoning_content", "reasoning", "reasoning_details", "reasoning_text", "thinking", "thoughts")
"""Fields of a message or delta in which servers put reasoning, which is no answer."""
_THINKING_PARTS: Final = frozenset({"thinking", "reasoning", "redacted_thinking"})
"""Types of content parts that hold reasoning."""


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
        events: see `read_events`. most_characters: a longer text is cut, with the finish reason `length`.
    """

    def __init__(self, events: AsyncGenerator[dict[str, Any], None], most_characters: int) -> None:
        self._events = events
        self._most_characters = most_characters
        self._text = self._half = ""
        self._over = self._complete = self._reasons = False
        self._reason: str | None = None
        self._usage: dict[str, Any] = {}
        self._shown: list[str] = []  # the text so far, of which its tokens may have to be estimated
        self._n_characters = 0
        self._tail_ends: float | None = None

    async def read(self) -> None:
        """Read events until there is text, or the answer ends.

        Raises:
            MalformedStream, EndpointFailure: the answer cannot be used.
            StreamCut: the body ended before the answer did.
            OnlyReasoning: `max_tokens` ended it before its text began.
        """
        while not self._text and not self._over:
            event = await anext(self._events, None) if self._reason is None else await self._after_the_reason()
            if event is None or event is COMPLETE:
                self._complete = event is COMPLETE
                self._end()
            else:
                self._note_unless_whole(event)

    def take(self) -> str | None:
        """The text read since the last call; `None` at the end."""
        text, self._text = self._text, ""
        return text if text or not self._over else None

    @property
    def reason(self) -> FinishReason:
        """The finish reason, after the end."""
        return "length" if self._reason in _FULL else "stop"

    def usage(self, request: GenerateRequest) -> Usage:
        """The endpoint's token counts; estimates, marked as such, in place of missing or impossible ones."""
        prompt, completion = (_count(self._usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        if prompt and (completion or not self._n_characters):
            return Usage(prompt, completion or 0)
        text = TokenRange.of_text("".join(self._shown)).likely
        most = request.max_tokens or DEFAULT_MAX_TOKENS
        return Usage(prompt or _prompt_tokens(request), completion or min(text, most), estimated=True)

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
        choices = event.get("choices")
        if not choices:
            return
        if not isinstance(choices, list) or not isinstance(choices[0], dict):
            raise MalformedStream("`choices` of an event is not a list of objects")
        choice = choices[0]
        self._add(_text_of(choice))
        self._reasons = self._reasons or _has_reasoning(choice)
        reason = choice.get("finish_reason")
        if reason and reason != "null":
            self._reason = self._reason or str(reason)[:80]

    def _add(self, text: str) -> None:
        if not text:
            return
        room = self._most_characters - self._n_characters
        self._n_characters += len(text)
        if len(text) > room:
            text, self._reason, self._over = text[:room], "length", True
        self._text = self._joined(text)
        self._shown.append(self._text)

    def _joined(self, text: str) -> str:
        """The text with surrogate pairs joined, which some servers split over two events; lone ones are replaced."""
        if text.isascii() and not self._half:
            return text
        text, self._half = self._half + text, ""
        if "\ud800" <= text[-1] <= "\udbff" and not self._over:
            text, self._half = text[:-1], text[-1]
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _end(self) -> None:
        self._over = True
        if self._half:
            self._half, self._text = "", "\ufffd"
        if self._reason is None and not self._complete:
            raise StreamCut("closed the stream before its end")
        if self._reason is None and not self._n_characters:
            raise MalformedStream("it has neither text nor a finish reason")
        if self._reason is not None and self._reason.lower() in _FAILED:
            raise MalformedStream(f"it ended with finish_reason {self._reason!r}")
        if self._reason in _CALLS and not self._n_characters:
            raise MalformedStream("it has no text and calls a tool, though the request has no tools")
        if self._reasons and not self._n_characters:
            raise OnlyReasoning if self._reason in _FULL else MalformedStream("it has reasoning, but no text")


def _text_of(choice: dict[str, Any]) -> str:
    """The text of a choice: of a delta, a whole message, or a completion."""
    part = choice.get("delta") or choice.get("message")
    if part is None:
        content = choice.get("text")
    elif isinstance(part, dict):
        content = part.get("content") or part.get("refusal")
    else:
        raise MalformedStream("`delta` of a choice is not an object")
    if isinstance(content, list):  # parts, of which only text is an answer
        content = "".join(str(each.get("text") or "") for each in content if isinstance(each, dict))
    if content is None:
        return ""
    if not isinstance(content, str):
        raise MalformedStream(f"the text of a choice is a {type(content).__name__}")
    return content


def _has_reasoning(choice: dict[str, Any]) -> bool:
    part = choice.get("delta") or choice.get("message") or choice
    content = part.get("content")
    parts = content if isinstance(content, list) else []
    return any(part.get(name) for name in _REASONING) or any(
        isinstance(each, dict) and each.get("type") in _THINKING_PARTS for each in parts
    )


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
    messages = request.messages or (Message("user", request.prompt or ""),)
    return estimate_range(Query(messages, raw=request.prompt is not None)).likely
