"""An answer that an endpoint streams to `coe chat --url`: bounded in bytes, lines, characters and time."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final

from coe.cli.chat.answering import Answering
from coe.engines.remote.answer import EndpointAnswer, EndpointFailure, OnlyReasoning, StreamCut
from coe.engines.remote.events import COMPLETE, PAGE, MalformedStream, read_events
from coe.engines.remote.limits import MOST_LINE_BYTES, MOST_STREAM_BYTES, Limits
from coe.errors import RemoteError
from coe.seam import one_line
from coe.types import GenerateRequest

MOST_S: Final = 3600.0
"""Seconds that one answer may take, however steadily its events come."""
_UNSTATED_TOKENS: Final = 2**16
"""New tokens that the limits allow if the user states no `--max-tokens`: then the endpoint decides."""
_MOST_NAME: Final = 256
"""Characters of a model's name that are shown."""
_MOST_SHOWN: Final = 500
"""Characters of an endpoint's error that are shown."""


def limits_of(max_tokens: int | None, silence_s: float) -> Limits:
    """The limits of an answer; a service's explanation (`x-coe-debug`) makes one line longer than its text needs."""
    limits = Limits.of(max_tokens or _UNSTATED_TOKENS, silence_s=silence_s)
    stream_bytes = min(limits.stream_bytes + MOST_LINE_BYTES, MOST_STREAM_BYTES)
    return replace(limits, stream_bytes=stream_bytes, line_bytes=MOST_LINE_BYTES)


async def read_answer(
    pieces: AsyncIterator[bytes],
    limits: Limits,
    request: GenerateRequest,
    answering: Answering,
    model: str,
    url: str,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncGenerator[str, None]:
    """The texts of a streamed body; the model that answers, and why, goes into `answering`.

    Raises:
        RemoteError: the body is not an answer, exceeds a limit, ends early, or reports an error.
    """
    noted, ends = _Noted(answering, model), clock() + MOST_S
    async with aclosing(noted.of(read_events(pieces, limits))) as events:
        answer = EndpointAnswer(events, request, limits)
        try:
            while (chunk := answer.take()) is not None:
                answering.text += chunk.text
                if chunk.text:
                    yield chunk.text
                if clock() > ends:
                    raise MalformedStream(f"it takes more than {MOST_S:g} s")
                await answer.read()
        except (MalformedStream, StreamCut, OnlyReasoning, EndpointFailure) as error:
            raise _error(error, url, noted) from error


class _Noted:
    """Notes what events state beside the text.

    Attributes:
        chunks: whether an event had a choice. ended: whether the body ended as a stream of events may.
    """

    def __init__(self, answering: Answering, model: str) -> None:
        self._answering, self._model = answering, model
        self.chunks = self.ended = False

    async def of(self, events: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[dict[str, Any], None]:
        """The events, unchanged."""
        async with aclosing(events):
            async for event in events:
                self._note(event)
                yield event
        self.ended = True

    def _note(self, event: dict[str, Any]) -> None:
        answering, named, usage = self._answering, event.get("model"), event.get("usage")
        self.ended = self.ended or event is COMPLETE
        if event.get("choices"):
            self.chunks = True
            answering.expert = one_line(named, _MOST_NAME) if named and isinstance(named, str) else self._model
        if isinstance(event.get("coe"), dict):
            answering.why |= event["coe"]
        if isinstance(usage, dict):
            answering.why["tokens"] = usage.get("completion_tokens")


def _error(error: Exception, url: str, noted: _Noted) -> RemoteError:
    """The error for the person at the terminal."""
    match error:
        case EndpointFailure():
            return RemoteError(f"{url}: {one_line(error.message, _MOST_SHOWN)}")
        case OnlyReasoning():
            return RemoteError(f"{url} spent max_tokens on reasoning and gave no answer: raise --max-tokens")
        case _ if not noted.chunks and (noted.ended or str(error) == PAGE):
            return RemoteError(f"{url} ended the answer without a chunk: does the endpoint support streaming?")
        case StreamCut():
            return RemoteError(f"{url} broke off the answer", retryable=True)
        case _ if noted.ended:
            return RemoteError(f"the answer of {url} cannot be used: {error}")
    return RemoteError(f"{url} sends a stream that is not in the format of OpenAI: {error}")
