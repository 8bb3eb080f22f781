"""The chat messages that the items of a response request are.

An assistant's reasoning, text and function calls are items of their own there, and one message in a chat.
"""

from __future__ import annotations

from typing import Any

from coe.protocol.response_input import (
    Content,
    FunctionCallItem,
    FunctionResultItem,
    InputImage,
    InputText,
    Item,
    Part,
    ReasoningItem,
    Refusal,
)


class Messages:
    """The chat messages of items. Use `add` for each item in order.

    Attributes:
        messages: as a chat request has them.
        places: where each of them comes from, such as `input[2]`.
        ignored: fields of the items without effect.
    """

    def __init__(self, instructions: str | None) -> None:
        self.messages: list[dict[str, Any]] = []
        self.places: list[str] = []
        self.ignored: set[str] = set()
        self._assistant: dict[str, Any] | None = None
        if instructions is not None:
            self._append("instructions", {"role": "system", "content": instructions})

    def add(self, item: Item, place: str) -> None:
        """Add the next item. Reasoning, a text and calls that follow each other are one message of the assistant."""
        if isinstance(item, ReasoningItem):
            if item.encrypted_content is not None:
                self.ignored.add("input[].encrypted_content")
            if text := "".join(part.text for part in item.content or ()):
                message = self._of_assistant(place)
                message["reasoning_content"] = message.get("reasoning_content", "") + text
        elif isinstance(item, FunctionCallItem):
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            self._of_assistant(place).setdefault("tool_calls", []).append(call)
        elif isinstance(item, FunctionResultItem):
            self._append(place, {"role": "tool", "tool_call_id": item.call_id, "content": self._chat(item.output)})
        elif item.role != "assistant":
            self._append(place, {"role": item.role, "content": self._chat(item.content)})
        else:
            if self._assistant is not None and "content" in self._assistant:
                self._assistant = None  # two texts are two messages
            self._of_assistant(place)["content"] = self._chat(item.content)

    def _of_assistant(self, place: str) -> dict[str, Any]:
        """The message of the assistant that the items before began, or a new one."""
        if self._assistant is None:
            message: dict[str, Any] = {"role": "assistant"}
            self._append(place, message)
            self._assistant = message
        return self._assistant

    def _append(self, place: str, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self.places.append(place)
        self._assistant = None

    def _chat(self, content: Content) -> object:
        return content if isinstance(content, str) else [self._chat_part(part) for part in content]

    def _chat_part(self, part: Part) -> dict[str, Any]:
        if isinstance(part, InputText | InputImage) and part.prompt_cache_breakpoint is not None:
            self.ignored.add("input[].content[].prompt_cache_breakpoint")
        if isinstance(part, Refusal):
            return {"type": "refusal", "refusal": part.refusal}
        if not isinstance(part, InputImage):
            return {"type": "text", "text": part.text}
        detail = "high" if part.detail == "original" else part.detail
        return {"type": "image_url", "image_url": {"url": part.image_url, "detail": detail}}
