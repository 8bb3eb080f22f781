"""The response object of `/v1/responses`, and its output items: reasoning, the message, function calls.

As for the other endpoints, bodies are plain dicts. Ids are made of the id of the decision, so that items of different
responses differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from coe.protocol.logprobs import LEAST
from coe.types import Answer, FinishReason, TokenLogprob, Usage

Status = Literal["in_progress", "completed", "incomplete", "failed"]
CONTENT_FILTER: Final = "content_filter"
_REASONS: Final[Mapping[FinishReason, str | None]] = {"length": "max_output_tokens", "cancelled": None}
"""Finish reasons of answers that are not complete -> OpenAI's reason."""
_ERROR_CODES: Final[Mapping[int, str]] = {429: "rate_limit_exceeded"}


@dataclass(frozen=True, slots=True)
class ResponseObject:
    """Bodies of one response.

    Attributes:
        id: id of the decision. created: seconds since the epoch. model: the answering expert.
        echo: what the response repeats of its request (`ParsedResponse.echo`).
    """

    id: str
    created: int
    model: str
    echo: Mapping[str, Any]

    def body(
        self,
        status: Status,
        output: Sequence[Mapping[str, Any]] = (),
        *,
        usage: Usage | None = None,
        incomplete: str | None = None,
        error: Mapping[str, Any] | None = None,
        ended: float | None = None,
    ) -> dict[str, Any]:
        """A response.

        Args:
            incomplete: the reason why it is incomplete.
            error: OpenAI's `code` and `message`.
            ended: seconds since the epoch.
        """
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "completed_at": None if ended is None or status != "completed" else int(ended),
            "status": status,
            "error": error,
            "incomplete_details": {"reason": incomplete} if status == "incomplete" else None,
            "model": self.model,
            "output": list(output),
            "usage": None if usage is None else usage_details(usage),
            **self.echo,
        }

    def ended(self, answer: Answer, output: Sequence[Mapping[str, Any]], ended: float) -> dict[str, Any]:
        """The response of a whole answer with these items."""
        return self.body(
            status_of(answer.finish_reason),
            output,
            usage=answer.usage,
            incomplete=_REASONS.get(answer.finish_reason),
            ended=ended,
        )

    def whole(self, answer: Answer, ended: float) -> dict[str, Any]:
        """The response with all items of an answer."""
        return self.ended(answer, self._items(answer), ended)

    def item_id(self, kind: str, index: int) -> str:
        """The id of an output item. kind: `msg`, `fc` or `rs`."""
        return f"{kind}_{self.id}_{index}"

    def _items(self, answer: Answer) -> list[dict[str, Any]]:
        status = status_of(answer.finish_reason)
        items: list[dict[str, Any]] = []
        if answer.reasoning:
            items.append(reasoning_item(self.item_id("rs", 0), [reasoning_part(answer.reasoning)], "completed"))
        if answer.text or needs_message(bool(items), bool(answer.tool_calls), status):
            part = text_part(answer.text, token_logprobs(answer.logprobs))
            items.append(message_item(self.item_id("msg", len(items)), [part], "completed"))
        for call in answer.tool_calls:
            name = self.item_id("fc", len(items))
            items.append(call_item(name, call.id, call.name, call.arguments, "completed"))
        items[-1]["status"] = status  # what a limit cuts is the last item
        return items


def needs_message(has_reasoning: bool, has_calls: bool, status: Status) -> bool:
    """Whether an answer without text has a message all the same: unless it only calls, or was cut while it reasoned."""
    return not has_calls and not (has_reasoning and status == "incomplete")


def status_of(reason: FinishReason) -> Literal["completed", "incomplete"]:
    """The status of an answer and of its last item."""
    return "incomplete" if reason in _REASONS else "completed"


def reasoning_item(id: str, content: list[dict[str, Any]], status: Status) -> dict[str, Any]:  # noqa: A002
    """Reasoning, as the model wrote it: there is no summary."""
    return {"id": id, "type": "reasoning", "summary": [], "content": content, "status": status}


def message_item(id: str, content: list[dict[str, Any]], status: Status) -> dict[str, Any]:  # noqa: A002
    """The message."""
    return {"id": id, "type": "message", "role": "assistant", "content": content, "status": status}


def call_item(id: str, call_id: str, name: str, arguments: str, status: Status) -> dict[str, Any]:  # noqa: A002
    """A function call. call_id: its id in the expert's answer, which its result names."""
    return {
        "id": id,
        "type": "function_call",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": status,
    }


def reasoning_part(text: str) -> dict[str, Any]:
    """The content of a reasoning item."""
    return {"type": "reasoning_text", "text": text}


def text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def token_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Log-probabilities of tokens; OpenAI's types here have no nulls."""
    return [
        _token(each.token, each.logprob, each.data) | {"top_logprobs": [_token(*top) for top in each.top]}
        for each in tokens
    ]


def _token(text: str, logprob: float | None, data: bytes | None) -> dict[str, Any]:
    number = LEAST if logprob is None or math.isnan(logprob) else max(logprob, LEAST)
    return {"token": text, "logprob": number, "bytes": list(data or b"")}


def usage_details(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage`. Engines count no cached tokens, and no tokens of reasoning apart from those of the answer."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    } | ({"estimated": True} if usage.estimated else {})


def response_error(status: int, error: Mapping[str, Any]) -> dict[str, Any]:
    """The `error` of a failed response. Its codes are OpenAI's few; the event `error` has the code of the endpoint."""
    code = _ERROR_CODES.get(status, "server_error" if status >= 500 else "invalid_prompt")
    return {"code": code, "message": error["message"]}
