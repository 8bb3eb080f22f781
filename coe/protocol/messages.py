"""Messages of a chat request: text, images, tool calls and their results, reasoning.

A result without its call and a call without its result pass, as in other servers: a client may have cut its history.
What a chat template or an endpoint cannot render, it rejects itself, and another expert answers.
"""

from __future__ import annotations

import json
import reprlib
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from coe.protocol.bounds import MOST_FIELDS, MOST_URL
from coe.protocol.texts import Name, Strict, Text, is_unicode
from routers.base import Message, ToolCall

_TEXT_PART: Final = frozenset(("type", "text"))
_PARTS: Final = ("text", "image_url", "refusal", "thinking")


class Mixed(NamedTuple):
    """The content of a message with other parts than text.

    parts: all parts in OpenAI's form, if one is an image. reasoning: the text of `thinking` parts.
    """

    text: str
    parts: tuple[dict[str, Any], ...] = ()
    reasoning: str = ""


class TextPart(Strict):
    """A part with text."""

    type: Literal["text"]
    text: Text
    cache_control: object = None
    prompt_cache_breakpoint: object = None


class RefusalPart(Strict):
    """A part of an assistant message: the text of a refusal."""

    type: Literal["refusal"]
    refusal: Text


class ThinkingPart(Strict):
    """A part of an assistant message: reasoning text."""

    type: Literal["thinking"]
    thinking: Text
    signature: object = None
    cache_control: object = None


def image_address(url: str) -> str:
    """The address of an image: an http(s) URL of a bounded length, or a data URL; else a PydanticCustomError."""
    if url.startswith("data:"):
        kind, comma, _ = url[:256].partition(",")
        if comma and kind.startswith("data:image/") and kind.endswith(";base64"):
            return url
    elif url.startswith(("https://", "http://")):
        if len(url) <= MOST_URL:
            return url
        raise PydanticCustomError("too_many", f"has {len(url):,} characters, at most {MOST_URL:,} are read")
    raise PydanticCustomError("url", "should be an http(s) URL, or data:image/...;base64,...")


class ImageUrl(Strict):
    """The address of an image, or the image itself as a data URL."""

    url: Annotated[Text, AfterValidator(image_address)]
    detail: Literal["auto", "low", "high"] | None = None


def _bare_url(value: object) -> object:
    return {"url": value} if isinstance(value, str) else value


class ImagePart(Strict):
    """A part with an image; `image_url` may be the bare URL."""

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_bare_url, json_schema_input_type=str | ImageUrl)]
    cache_control: object = None

    @property
    def document(self) -> dict[str, Any]:
        """The part in OpenAI's form."""
        return {"type": "image_url", "image_url": self.image_url.model_dump(exclude_none=True)}


def _part(value: object) -> object:
    if isinstance(value, dict) and len(value) > MOST_FIELDS:
        raise PydanticCustomError("too_many", f"has {len(value):,} fields, at most {MOST_FIELDS} are read")
    if isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] not in _PARTS:
        raise PydanticCustomError(
            "unsupported_value",
            "parts of type {type} are not supported, only text and image_url",
            {"type": reprlib.repr(value["type"])},
        )
    return value


def _kind(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in _PARTS else "<text>"


def _content(value: object, validate: ValidatorFunctionWrapHandler) -> object:
    """The text of a message. A string, and plain text parts, are not worth a model of each: there may be thousands."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("content", "Input should be a string or an array of parts with text or images")
    text = value if isinstance(value, str) else _joined(value)
    if text is not None and is_unicode(text):
        return text
    return _mixed(validate([{"type": "text", "text": value}] if isinstance(value, str) else value))


def _joined(parts: list[Any]) -> str | None:
    """The text of plain text parts; None if there are others."""
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, dict) and part.keys() == _TEXT_PART and part["type"] == "text"
    ]
    return "".join(texts) if len(texts) == len(parts) and all(isinstance(text, str) for text in texts) else None


def _mixed(parts: list[TextPart | ImagePart | RefusalPart | ThinkingPart]) -> str | Mixed:
    text, reasoning, documents = [], [], []
    for part in parts:
        if isinstance(part, ThinkingPart):
            reasoning.append(part.thinking)
        elif isinstance(part, ImagePart):
            documents.append(part.document)
        else:
            text.append(part.text if isinstance(part, TextPart) else part.refusal)
            documents.append({"type": "text", "text": text[-1]})
    has_images = any(isinstance(part, ImagePart) for part in parts)
    joined = "".join(text)
    if not has_images and not reasoning:
        return joined
    return Mixed(joined, tuple(documents) if has_images else (), "".join(reasoning))


def _arguments(value: object) -> object:
    """Arguments that a client has parsed are written as JSON again; null is none."""
    if not isinstance(value, dict):
        return "" if value is None else value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise PydanticCustomError("unsupported_value", "hold a number that is too large for JSON") from None


def _function(value: object) -> object:
    """The type of a call, which clients that join chunks leave null."""
    return "function" if value is None else value


class CalledFunction(Strict):
    """The function of a tool call. arguments: JSON text, or the object."""

    name: Name
    arguments: Annotated[Text, BeforeValidator(_arguments, json_schema_input_type=str | dict[str, Any])] = ""


class Call(Strict):
    """A tool call of an assistant message."""

    id: Name
    type: Annotated[Literal["function"], BeforeValidator(_function)] = "function"
    function: CalledFunction
    index: object = None

    @property
    def tool_call(self) -> ToolCall:
        """The call as a value of the system."""
        return ToolCall(self.id, self.function.name, self.function.arguments)


if TYPE_CHECKING:
    Content = str | Mixed
else:
    _Part = Annotated[
        Annotated[TextPart, Tag("<text>")]
        | Annotated[ImagePart, Tag("<image_url>")]
        | Annotated[RefusalPart, Tag("<refusal>")]
        | Annotated[ThinkingPart, Tag("<thinking>")],
        Discriminator(_kind),
        BeforeValidator(_part),
    ]
    Content = Annotated[
        list[_Part], Field(fail_fast=True), WrapValidator(_content, json_schema_input_type=str | list[_Part])
    ]


class Turn(Strict):
    """A message of a conversation; `content` is the text of all parts."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: Name | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: Name | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None

    @property
    def message(self) -> Message:
        """The message as a value of the system."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str) and len(self.model_fields_set) == 2:  # most messages
            return Message(role, self.content)
        mixed = Mixed(self.content) if isinstance(self.content, str) else self.content
        return Message(
            role,
            mixed.text or self.refusal or "",
            tuple(call.tool_call for call in self.tool_calls or ()),
            self.tool_call_id if role == "tool" else None,
            self.name,
            self.reasoning_content or mixed.reasoning,
            mixed.parts,
        )
