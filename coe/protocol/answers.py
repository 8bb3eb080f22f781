"""OpenAI's bodies of answers: whole ones, and chunks of a stream.

Bodies are plain dicts, not the models of `openai.types`: those cost 12.5 us per chunk instead of 5.9 us, and 0.9 s of
import in every gateway (docs/results.md). The tests read them with the official client.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, ClassVar

from coe.protocol.logprobs import TextLogprobs, chat_logprobs
from coe.types import Answer, Chunk, FinishReason, ToolCallDelta, Usage
from routers.base import ToolCall


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """Bodies of one choice of an answer of `/v1/chat/completions`.

    Attributes:
        id: id of the decision. created: seconds since the epoch. model: the answering expert.
        include_usage: every chunk has a `usage`, null except in the last.
        index: of the choice.
    """

    id: str
    created: int
    model: str
    include_usage: bool = False
    index: int = 0
    whole_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"
    prefix: ClassVar[str] = "chatcmpl-"

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The whole answer in one body."""
        return whole_body(self, [self.choice(answer)], answer.usage)

    def choice(self, answer: Answer) -> dict[str, Any]:
        """The choice of a whole body. A message that only calls tools has no content."""
        content = answer.text if answer.text or not answer.tool_calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.tool_calls:
            message["tool_calls"] = [_call(call) for call in answer.tool_calls]
        logprobs = chat_logprobs(answer.logprobs)
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first text: the role."""
        return [self._chunk({"role": "assistant", "content": "", "refusal": None})]

    def pieces(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Chunks with a piece of reasoning, text, or one tool call: clients read only the first call of a chunk."""
        if not (chunk.reasoning or chunk.tool_calls or chunk.logprobs):
            return [self._chunk({"content": chunk.text})]
        first, *others = _deltas(chunk)
        return [self._chunk(first, logprobs=chat_logprobs(chunk.logprobs)), *map(self._chunk, others)]

    def ending(self, reason: FinishReason) -> dict[str, Any]:
        """The chunk with the finish reason."""
        return self._chunk({}, reason)

    def _chunk(
        self, delta: dict[str, Any], reason: FinishReason | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return _chunk(self, {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """Bodies of one choice of an answer of `/v1/completions`; attributes as in ChatAnswer."""

    id: str
    created: int
    model: str
    include_usage: bool = False
    index: int = 0
    _logprobs: TextLogprobs = field(default_factory=TextLogprobs, init=False, repr=False, compare=False)
    whole_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"
    prefix: ClassVar[str] = "cmpl-"

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The whole answer in one body."""
        return whole_body(self, [self.choice(answer)], answer.usage)

    def choice(self, answer: Answer) -> dict[str, Any]:
        """The choice of a whole body. Log-probabilities of the prompt, if requested, come before the answer's."""
        logprobs = TextLogprobs().body(answer.prompt_logprobs + answer.logprobs)
        return self._choice(answer.text, logprobs, answer.finish_reason)

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first text: none."""
        return []

    def pieces(self, chunk: Chunk) -> list[dict[str, Any]]:
        """A chunk with a piece of text or log-probabilities; call in the order of the chunks."""
        tokens = chunk.prompt_logprobs + chunk.logprobs
        return [_chunk(self, self._choice(chunk.text, self._logprobs.body(tokens) if tokens else None))]

    def ending(self, reason: FinishReason) -> dict[str, Any]:
        """The chunk with the finish reason."""
        return _chunk(self, self._choice("", reason=reason))

    def _choice(
        self, text: str, logprobs: dict[str, Any] | None = None, reason: FinishReason | None = None
    ) -> dict[str, Any]:
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}


AnswerBodies = ChatAnswer | TextAnswer


def whole_body(bodies: AnswerBodies, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    """A whole answer of one or several choices."""
    return _body(bodies, bodies.whole_object, choices) | {"usage": usage_body(usage)}


def usage_chunk(bodies: AnswerBodies, usage: Usage) -> dict[str, Any]:
    """The last chunk of a stream with usage; it has no choices."""
    return _body(bodies, bodies.chunk_object, []) | {"usage": usage_body(usage)}


def usage_body(usage: Usage) -> dict[str, int]:
    """OpenAI's `usage`, with `"estimated": true` if a count is an estimate."""
    return usage.document() | {"total_tokens": usage.prompt_tokens + usage.completion_tokens}


def total_usage(usages: Sequence[Usage]) -> Usage:
    """The usage of several answers to one prompt: its tokens count once."""
    if len(usages) == 1:
        return usages[0]
    completion = sum(usage.completion_tokens for usage in usages)
    return Usage(usages[0].prompt_tokens, completion, estimated=any(usage.estimated for usage in usages))


def summed_usage(usages: Iterable[Usage]) -> Usage:
    """The usage of several prompts."""
    first, *others = usages
    for usage in others:
        first = Usage(
            first.prompt_tokens + usage.prompt_tokens,
            first.completion_tokens + usage.completion_tokens,
            estimated=first.estimated or usage.estimated,
        )
    return first


def tool_calls_body(calls: Iterable[ToolCall]) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form."""
    return [_call(call) for call in calls]


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _deltas(chunk: Chunk) -> list[dict[str, Any]]:
    """Reasoning and text, then each tool call: at least one."""
    delta: dict[str, Any] = {}
    if chunk.reasoning:
        delta["reasoning_content"] = chunk.reasoning
    if chunk.text or not (chunk.reasoning or chunk.tool_calls):
        delta["content"] = chunk.text
    calls = [{"tool_calls": [_call_delta(piece)]} for piece in _joined(chunk.tool_calls)]
    return [delta, *calls] if delta else calls


def _joined(pieces: Iterable[ToolCallDelta]) -> list[ToolCallDelta]:
    """One piece a call: clients add up pieces over chunks, not within one."""
    joined: list[ToolCallDelta] = []
    for _, of_call in groupby(pieces, key=lambda piece: piece.index):
        first, *others = of_call
        joined.append(replace(first, arguments=first.arguments + "".join(piece.arguments for piece in others)))
    return joined


def _call_delta(piece: ToolCallDelta) -> dict[str, Any]:
    """A piece of a tool call; the first one, and only it, has id, type and name."""
    if not (piece.id or piece.name):
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}


def _chunk(bodies: AnswerBodies, choice: dict[str, Any]) -> dict[str, Any]:
    body = _body(bodies, bodies.chunk_object, [choice])
    return body | {"usage": None} if bodies.include_usage else body


def _body(bodies: AnswerBodies, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": bodies.prefix + bodies.id,
        "object": kind,
        "created": bodies.created,
        "model": bodies.model,
        "choices": choices,
    }
