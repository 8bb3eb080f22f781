"""The server-sent events of a streamed response, in OpenAI's order.

    response.created, response.in_progress
    of each item: response.output_item.added, its parts and deltas, response.output_item.done
    response.completed, response.incomplete, or error and response.failed

Reasoning and text are one open item at a time, in the order of the chunks. Calls stay open until the end, since pieces
of several calls may alternate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coe.protocol.response_output import (
    CONTENT_FILTER,
    ResponseObject,
    Status,
    call_item,
    message_item,
    needs_message,
    reasoning_item,
    reasoning_part,
    response_error,
    status_of,
    text_part,
    token_logprobs,
)
from coe.types import Answer, Chunk, TokenLogprob, ToolCallDelta

Event = dict[str, Any]


@dataclass(slots=True)
class _Open:
    """An item that is being streamed. place: its index in the output; kind: `msg`, `rs` or `fc`."""

    kind: str
    id: str
    place: int
    call_id: str = ""
    name: str = ""
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def item(self, status: Status, *, empty: bool = False) -> Event:
        """The item so far. empty: as it is added, without content."""
        text = "".join(self.texts)
        if self.kind == "fc":
            return call_item(self.id, self.call_id, self.name, "" if empty else text, status)
        content = [] if empty else [self.part()]
        return (message_item if self.kind == "msg" else reasoning_item)(self.id, content, status)

    def part(self) -> Event:
        """The content so far."""
        text = "".join(self.texts)
        return text_part(text, [*self.logprobs]) if self.kind == "msg" else reasoning_part(text)


class ResponseEvents:
    """The events of one response. Use `chunk` for each chunk in order, then `ending` or `failed`."""

    def __init__(self, response: ResponseObject) -> None:
        self._response = response
        self._count = 0
        self._items: dict[int, Event] = {}
        self._open: _Open | None = None
        self._calls: dict[int, _Open] = {}
        self._kinds: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._begun = False

    def chunk(self, chunk: Chunk) -> list[Event]:
        """The events of a chunk; those of the first one begin the stream."""
        events: list[Event] = []
        if not self._begun:
            self._begun = True
            body = self._response.body("in_progress")
            events += [self._event("response.created", response=body)]
            events += [self._event("response.in_progress", response=body)]
        if chunk.reasoning:
            events += self._added("rs")
            events.append(self._delta("response.reasoning_text.delta", chunk.reasoning))
        self._logprobs += chunk.logprobs
        if chunk.text or (self._logprobs and self._open is not None and self._open.kind == "msg"):
            events += self._text(chunk.text)
        for piece in chunk.tool_calls:
            events += self._call(piece)
        return events

    def ending(self, answer: Answer, ended: float, more: Mapping[str, Any]) -> list[Event]:
        """The last events of a whole answer; `more` are further fields of the response."""
        status = status_of(answer.finish_reason)
        events: list[Event] = []
        if "msg" not in self._kinds and needs_message("rs" in self._kinds, "fc" in self._kinds, status):
            events += self._text("")
        events += self._closed(status)
        body = {**self._response.ended(answer, self._output, ended), **more}
        return [*events, self._event(f"response.{status}", response=body)]

    def failed(self, status: int, error: Mapping[str, Any]) -> list[Event]:
        """The last events after an error: one that clients raise, and the response as far as it came.

        A content filter of an endpoint that stops an answer makes it incomplete, as it does at OpenAI.

        Args:
            status: HTTP status of the error. error: OpenAI's, with message, type, param and code.
        """
        events = self._closed("incomplete")
        if error["code"] == CONTENT_FILTER:
            body = self._response.body("incomplete", self._output, incomplete=CONTENT_FILTER)
            return [*events, self._event("response.incomplete", response=body)]
        body = self._response.body("failed", self._output, error=response_error(status, error))
        flat = {name: error[name] for name in ("code", "message", "param")}
        return [
            *events,
            self._event("error", **flat, error=dict(error)),
            self._event("response.failed", response=body),
        ]

    @property
    def _output(self) -> list[Event]:
        return [self._items[place] for place in sorted(self._items)]

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._count, **fields}
        self._count += 1
        return event

    def _of(self, kind: str, item: _Open, **fields: Any) -> Event:
        return self._event(kind, item_id=item.id, output_index=item.place, **fields)

    def _is_open(self, kind: str) -> bool:
        return self._open is not None and self._open.kind == kind

    def _new(self, kind: str, call_id: str = "", name: str = "") -> _Open:
        place = len(self._kinds)
        self._kinds.append(kind)
        return _Open(kind, self._response.item_id(kind, place), place, call_id, name)

    def _added(self, kind: str) -> list[Event]:
        """The events before the first piece of reasoning or text; none if such an item is open."""
        if self._is_open(kind):
            return []
        events = self._done("completed")
        self._open = item = self._new(kind)
        opening = item.item("in_progress", empty=True)
        return [
            *events,
            self._event("response.output_item.added", output_index=item.place, item=opening),
            self._of("response.content_part.added", item, content_index=0, part=item.part()),
        ]

    def _delta(self, kind: str, text: str, **fields: Any) -> Event:
        assert self._open is not None
        self._open.texts.append(text)
        return self._of(kind, self._open, content_index=0, delta=text, **fields)

    def _text(self, text: str) -> list[Event]:
        events = self._added("msg")
        logprobs, self._logprobs = token_logprobs(self._logprobs), []
        assert self._open is not None
        self._open.logprobs += logprobs
        if text or logprobs:
            events.append(self._delta("response.output_text.delta", text, logprobs=logprobs))
        return events

    def _call(self, piece: ToolCallDelta) -> list[Event]:
        """The events of a piece of a call; the first one has its id and name."""
        events: list[Event] = []
        call = self._calls.get(piece.index)
        if call is None:
            events += self._done("completed")
            call = self._calls[piece.index] = self._new("fc", piece.id, piece.name)
            opening = call.item("in_progress", empty=True)
            events.append(self._event("response.output_item.added", output_index=call.place, item=opening))
        if piece.arguments:
            call.texts.append(piece.arguments)
            events.append(self._of("response.function_call_arguments.delta", call, delta=piece.arguments))
        return events

    def _done(self, status: Status) -> list[Event]:
        """The events after the last piece of the open reasoning or text."""
        item = self._open
        if item is None:
            return []
        self._open = None
        part = item.part()
        text = {name: part[name] for name in ("text", "logprobs") if name in part}
        kind = "response.output_text.done" if item.kind == "msg" else "response.reasoning_text.done"
        self._items[item.place] = item.item(status)
        return [
            self._of(kind, item, content_index=0, **text),
            self._of("response.content_part.done", item, content_index=0, part=part),
            self._event("response.output_item.done", output_index=item.place, item=self._items[item.place]),
        ]

    def _closed(self, status: Status) -> list[Event]:
        """The events that close every item; the last one has the status, the others are complete."""
        last = len(self._kinds) - 1
        open_item = self._open
        events = self._done(status if open_item is not None and open_item.place == last else "completed")
        for call in self._calls.values():
            text = "".join(call.texts)
            self._items[call.place] = call.item(status if call.place == last else "completed")
            events += [
                self._of("response.function_call_arguments.done", call, name=call.name, arguments=text),
                self._event("response.output_item.done", output_index=call.place, item=self._items[call.place]),
            ]
        self._calls = {}
        return events
