"""The fields of `/v1/responses`: used, refused, or ignored; as `coe.protocol.fields` for the other endpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    WithJsonSchema,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from coe.protocol import fields as f
from coe.protocol.bounds import MOST_CHAT_LOGPROBS
from coe.protocol.response_input import INPUT_MODELS, Input
from coe.protocol.texts import Count, Strict, Text, is_unicode
from coe.protocol.tools import Parameters, SchemaName, SchemaObject, ToolName, mode_or, only_functions

REFUSED: Final[Mapping[str, f.Neutral]] = {
    "access_programs": (None,),
    "background": (None, False),
    "background_options": (None,),
    "context_management": (None, []),
    "conversation": (None,),
    "image": (None,),
    "logprobs": (None, False),
    "max_completion_tokens": (None,),
    "max_tokens": (None,),
    "messages": (None,),
    "moderation": (None,),
    "n": (None, 1),
    "previous_response_id": (None,),
    "prompt": (None,),
    "reasoning_effort": (None,),
    "response_format": (None,),
}
"""Fields that request what is not supported, and those that chat has under these names."""
IGNORED: Final = f.IGNORED_OF_OPENAI | {"max_tool_calls", "truncation"}
"""Fields without effect. `max_tool_calls` counts calls of hosted tools, and there are none."""
IGNORED_VALUES: Final[Mapping[str, f.Neutral]] = {"store": (False,), "truncation": ("disabled",)}
"""Values of ignored fields that request what happens anyway."""
LOGPROBS: Final = "message.output_text.logprobs"
"""The one value of `include` with an effect."""
MOST_METADATA: Final = 16
"""Most entries of `metadata`, as in OpenAI's API."""


class FlatTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: Parameters | None = None
    strict: bool | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    async_: Literal[False] | None = Field(None, alias="async")
    defer_loading: Literal[False] | None = None
    output_schema: object = None

    @property
    def document(self) -> dict[str, Any]:
        """The tool as a response repeats it."""
        return {"type": "function", **{name: getattr(self, name) for name in _OF_TOOL}}

    @property
    def chat(self) -> dict[str, Any]:
        """The tool as a chat request has it."""
        given = {name: getattr(self, name) for name in _OF_TOOL}
        return {"type": "function", "function": {name: value for name, value in given.items() if value is not None}}


_OF_TOOL: Final = ("name", "description", "parameters", "strict")


class FlatChoice(Strict):
    """The `tool_choice` that names a function."""

    type: Literal["function"]
    name: str


FlatToolField = Annotated[FlatTool, BeforeValidator(only_functions)]
if TYPE_CHECKING:
    FlatToolChoice = FlatChoice | Literal["auto", "none", "required"]
else:
    FlatToolChoice = Annotated[
        FlatChoice,
        WrapValidator(
            mode_or('{"type": "function", "name": ...}'),
            json_schema_input_type=FlatChoice | Literal["auto", "none", "required"],
        ),
    ]


class TextFormat(Strict):
    """Text, a JSON object, or one that satisfies a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: SchemaName | None = None
    schema_: SchemaObject | None = Field(None, alias="schema")
    description: Text | None = None
    strict: bool | None = None

    @property
    def chat(self) -> dict[str, Any]:
        """The format as a chat request has it."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "json_schema": self._named()}

    @property
    def document(self) -> dict[str, Any]:
        """The format as a response repeats it."""
        return {"type": self.type} | self._named()

    def _named(self) -> dict[str, Any]:
        given = {"name": self.name, "schema": self.schema_, "description": self.description, "strict": self.strict}
        return {name: value for name, value in given.items() if value is not None}


def _complete(value: object) -> object:
    if isinstance(value, dict):
        of_schema = [name for name in ("name", "schema", "description", "strict") if value.get(name) is not None]
        if of_schema and value.get("type") in ("text", "json_object"):
            raise PydanticCustomError("format", '{name} only goes with "type": "json_schema"', {"name": of_schema[0]})
        if not {"name", "schema"} <= set(of_schema) and value.get("type") == "json_schema":
            raise PydanticCustomError("format", 'of type "json_schema" needs a "name" and a "schema"')
    return value


class TextConfig(Strict):
    """How the text of the answer is."""

    format: Annotated[TextFormat, BeforeValidator(_complete)] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Strict):
    """How much the model reasons. The other fields have no effect."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: Text | None = None


class ResponseStreamOptions(Strict):
    """Options of a stream."""

    include_obfuscation: bool | None = None


def _metadata(value: object) -> object:
    """Entries as OpenAI allows them; one error, however many there are."""
    if not isinstance(value, dict):
        return value
    if len(value) > MOST_METADATA:
        raise PydanticCustomError("too_many", f"has {len(value):,} entries, at most {MOST_METADATA} are read")
    for name, text in value.items():
        if not isinstance(text, str) or len(name) > 64 or len(text) > 512 or not is_unicode(name + text):
            raise PydanticCustomError(
                "format", "should have names of at most 64 characters, and values that are texts of at most 512"
            )
    return value


class ResponseFields(f.EngineFields):
    """Fields of `/v1/responses`."""

    input: Input
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    tools: list[FlatToolField] | None = None
    tool_choice: FlatToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: (
        Annotated[
            list[
                Literal[
                    "message.output_text.logprobs",
                    "reasoning.encrypted_content",
                    "file_search_call.results",
                    "web_search_call.results",
                    "web_search_call.action.sources",
                    "message.input_image.image_url",
                    "computer_call_output.output.image_url",
                    "code_interpreter_call.outputs",
                ]
            ],
            Field(fail_fast=True),
        ]
        | None
    ) = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_CHAT_LOGPROBS)] | None = None
    metadata: (
        Annotated[
            dict[str, str],
            BeforeValidator(_metadata),
            WithJsonSchema(
                {
                    "type": "object",
                    "maxProperties": MOST_METADATA,
                    "propertyNames": {"maxLength": 64},
                    "additionalProperties": {"type": "string", "maxLength": 512},
                }
            ),
        ]
        | None
    ) = None
    stream_options: ResponseStreamOptions | None = None

    inner_models: ClassVar[Mapping[tuple[str, ...], type[BaseModel]]] = {
        **INPUT_MODELS,
        ("tools",): FlatTool,
        ("tool_choice",): FlatChoice,
        ("text",): TextConfig,
        ("text", "format"): TextFormat,
        ("reasoning",): Reasoning,
        ("stream_options",): ResponseStreamOptions,
    }
