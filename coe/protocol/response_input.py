"""`input` of `/v1/responses`: a text or items. `coe.protocol.response_messages` makes chat messages of them.

What OpenAI's items have and this service does not read (ids, annotations, states) is accepted, so that the items of an
answer can be sent back as they are.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from coe.protocol.bounds import MOST_FIELDS, MOST_ITEMS
from coe.protocol.messages import image_address
from coe.protocol.texts import Name, Strict, Text

_ITEMS: Final = ("message", "function_call", "function_call_output", "reasoning")
_OF_ANSWER: Final = frozenset({"type", "text", "annotations", "logprobs"})
_PARTS: Final = ("input_text", "output_text", "input_image", "refusal")


class InputText(Strict):
    """A part with text of the user."""

    type: Literal["input_text"]
    text: Text
    prompt_cache_breakpoint: object = None


class OutputText(Strict):
    """A part with text of an answer."""

    type: Literal["output_text"]
    text: Text
    annotations: object = None
    logprobs: object = None
    parsed: object = None


class InputImage(Strict):
    """A part with an image: its address, or the image itself as a data URL. `original` is read as `high`."""

    type: Literal["input_image"]
    image_url: Annotated[Text, AfterValidator(image_address)]
    detail: Literal["auto", "low", "high", "original"] | None = None
    file_id: None = None
    prompt_cache_breakpoint: object = None


class Refusal(Strict):
    """A part with the text of a refusal."""

    type: Literal["refusal"]
    refusal: Text


def _kind_of(value: object, kinds: Sequence[str], absent: str, what: str) -> object:
    """The value, if it is one of the kinds and has few fields: there is an error for each wrong field."""
    if not isinstance(value, dict):
        return value
    if len(value) > MOST_FIELDS:
        raise PydanticCustomError("too_many", f"has {len(value):,} fields, at most {MOST_FIELDS} are read")
    kind = value.get("type", absent)
    if (absent if kind is None else kind) == "item_reference":
        raise PydanticCustomError(
            "unsupported_value",
            'nothing is stored here: send the item itself, not its id (some clients do with "store": false)',
        )
    if isinstance(kind, str) and kind not in kinds:
        raise PydanticCustomError(
            "unsupported_value",
            "{what} of type {kind} are not supported, only {kinds}",
            {"what": what, "kind": reprlib.repr(kind), "kinds": ", ".join(kinds)},
        )
    return value


def _part(value: object) -> object:
    return _kind_of(value, _PARTS, "input_text", "parts")


def _part_tag(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if isinstance(kind, str) and kind in _PARTS else "<input_text>"


def _content(value: object, validate: ValidatorFunctionWrapHandler) -> object:
    """The text of a message, or its parts. Plain text parts are not worth a model of each: there may be thousands."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("content", "Input should be a string or an array of parts with text or images")
    text = value if isinstance(value, str) else _joined(value)
    return validate(value) if text is None else _TEXT.validate_python(text)


def _joined(parts: list[Any]) -> str | None:
    """The text of plain text parts; None if there are others."""
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, dict)
        and part.get("type") in ("input_text", "output_text")
        and isinstance(part.get("text"), str)
        and part.keys() <= _OF_ANSWER
    ]
    return "".join(texts) if len(texts) == len(parts) else None


_TEXT: Final[TypeAdapter[str]] = TypeAdapter(Text)
if TYPE_CHECKING:
    Part = InputText | OutputText | InputImage | Refusal
    Content = str | list[Part]
else:
    Part = Annotated[
        Annotated[InputText, Tag("<input_text>")]
        | Annotated[OutputText, Tag("<output_text>")]
        | Annotated[InputImage, Tag("<input_image>")]
        | Annotated[Refusal, Tag("<refusal>")],
        Discriminator(_part_tag),
        BeforeValidator(_part),
    ]
    Content = Annotated[
        list[Part], Field(fail_fast=True), WrapValidator(_content, json_schema_input_type=str | list[Part])
    ]


class MessageItem(Strict):
    """A message."""

    type: Literal["message"] | None = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: object = None
    status: object = None
    phase: object = None


class FunctionCallItem(Strict):
    """A call of a function by the assistant. arguments: JSON text."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: Text
    id: object = None
    status: object = None
    caller: object = None
    namespace: None = None
    async_: object = Field(None, alias="async")
    parsed_arguments: object = None


class FunctionResultItem(Strict):
    """The result of a function call: text, or parts with text and images."""

    type: Literal["function_call_output"]
    call_id: Name
    output: Content
    id: object = None
    status: object = None
    caller: object = None
    name: object = None
    namespace: None = None


class ReasoningText(Strict):
    """A part of reasoning."""

    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(Strict):
    """Reasoning of the assistant. `content` alone is read; encrypted reasoning of another service is not."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None
    id: object = None
    summary: object = None
    encrypted_content: object = None
    status: object = None


def _item(value: object) -> object:
    is_reference = isinstance(value, dict) and "role" not in value and "id" in value
    return _kind_of(value, _ITEMS, "item_reference" if is_reference else "message", "items")


def _item_tag(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if isinstance(kind, str) and kind in _ITEMS else "<message>"


def _input(value: object, validate: ValidatorFunctionWrapHandler) -> object:
    if not isinstance(value, str | list):
        raise PydanticCustomError("content", "Input should be a string or an array of items")
    if isinstance(value, str):
        return _TEXT.validate_python(value)
    if len(value) > MOST_ITEMS:
        raise PydanticCustomError("too_many", f"has {len(value):,} items, at most {MOST_ITEMS:,} are read")
    return validate(value)


if TYPE_CHECKING:
    Item = MessageItem | FunctionCallItem | FunctionResultItem | ReasoningItem
    Input = str | list[Item]
else:
    Item = Annotated[
        Annotated[MessageItem, Tag("<message>")]
        | Annotated[FunctionCallItem, Tag("<function_call>")]
        | Annotated[FunctionResultItem, Tag("<function_call_output>")]
        | Annotated[ReasoningItem, Tag("<reasoning>")],
        Discriminator(_item_tag),
        BeforeValidator(_item),
    ]
    Input = Annotated[
        list[Item],
        Field(min_length=1, fail_fast=True),
        WrapValidator(_input, json_schema_input_type=str | Annotated[list[Item], Field(min_length=1)]),
    ]

ITEM: Final[TypeAdapter[Item]] = TypeAdapter(Item)
_CONTENT_MODELS: Final[Sequence[type[BaseModel]]] = (InputText, OutputText, InputImage, Refusal)
INPUT_MODELS: Final[dict[tuple[str, ...], type[BaseModel]]] = {
    ("input", "<message>"): MessageItem,
    ("input", "<function_call>"): FunctionCallItem,
    ("input", "<function_call_output>"): FunctionResultItem,
    ("input", "<reasoning>"): ReasoningItem,
    ("input", "<reasoning>", "content"): ReasoningText,
    **{
        ("input", f"<{item}>", field, f"<{part}>"): model
        for item, field in (("message", "content"), ("function_call_output", "output"))
        for part, model in zip(_PARTS, _CONTENT_MODELS, strict=True)
    },
}
"""The models of inner objects of `input`, by their place without indices."""
