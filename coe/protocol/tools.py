"""Tools of a chat request, and the schema of its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from coe.protocol.texts import Strict, Text

_TOOL_NAME: Final = r"^[A-Za-z0-9_.:/-]{1,128}$"
_SCHEMA_NAME: Final = r"^[A-Za-z0-9_-]{1,64}$"
MODES: Final = ("auto", "none", "required")
"""Values of `tool_choice` that name no function."""


def _parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of named arguments: an object."""
    if schema and schema.get("type", "object") != "object":
        raise PydanticCustomError(
            "schema", 'should be the JSON schema of an object: {"type": "object", "properties": {...}}'
        )
    _check_schema(schema)
    return schema


def _check_schema(schema: Mapping[str, Any]) -> None:
    """Refuse what no JSON schema has; engines that compile it refuse the rest."""
    for name, kind, noun in (("properties", dict, "an object"), ("required", list, "an array of names")):
        if not isinstance(schema.get(name, kind()), kind):
            raise PydanticCustomError("schema", "its {name} should be {noun}", {"name": name, "noun": noun})
    if not all(isinstance(inner, dict | bool) for inner in schema.get("properties", {}).values()):
        raise PydanticCustomError("schema", "each of its properties should have a JSON schema, which is an object")
    if not all(isinstance(name, str) for name in schema.get("required", [])):
        raise PydanticCustomError("schema", "its required should be an array of names")


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    _check_schema(schema)
    return schema


ToolName = Annotated[str, Field(pattern=_TOOL_NAME)]
Parameters = Annotated[dict[str, Any], AfterValidator(_parameters)]
SchemaName = Annotated[str, Field(pattern=_SCHEMA_NAME)]
SchemaObject = Annotated[dict[str, Any], AfterValidator(_schema)]


def only_functions(value: object) -> object:
    """Refuse a tool of another type."""
    if isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] != "function":
        raise PydanticCustomError("unsupported_value", "only tools of type 'function' are supported")
    return value


class Function(Strict):
    """A function that the model may call. parameters: the JSON schema of its arguments."""

    name: ToolName
    description: Text | None = None
    parameters: Parameters | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool: a function."""

    type: Literal["function"]
    function: Function
    cache_control: object = None

    @property
    def document(self) -> dict[str, Any]:
        """The tool in OpenAI's form."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


class NamedFunction(Strict):
    """The function that must be called."""

    name: str


class NamedChoice(Strict):
    """The `tool_choice` that names a function."""

    type: Literal["function"]
    function: NamedFunction


def mode_or(named: str) -> Callable[[object, ValidatorFunctionWrapHandler], object]:
    """The check of a `tool_choice`: a mode, or an object such as `named`, which names a function."""

    def check(value: object, validate: ValidatorFunctionWrapHandler) -> object:
        if isinstance(value, dict):
            if value.get("type") == "allowed_tools":
                raise PydanticCustomError(
                    "unsupported_value", "type 'allowed_tools' is not supported: send only these tools, with a mode"
                )
            return validate(value)
        if not isinstance(value, str) or value not in MODES:
            raise PydanticCustomError("choice", 'should be "auto", "none", "required", or {named}', {"named": named})
        return value

    return check


ToolField = Annotated[Tool, BeforeValidator(only_functions)]
if TYPE_CHECKING:
    ToolChoice = NamedChoice | Literal["auto", "none", "required"]
else:
    ToolChoice = Annotated[
        NamedChoice,
        WrapValidator(
            mode_or('{"type": "function", "function": {"name": ...}}'),
            json_schema_input_type=NamedChoice | Literal["auto", "none", "required"],
        ),
    ]


class JsonSchema(Strict):
    """The schema of the answer, with a name."""

    name: SchemaName
    description: Text | None = None
    schema_: SchemaObject = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """Text, a JSON object, or one that satisfies a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def document(self) -> dict[str, Any] | None:
        """OpenAI's object with the schema; None without one."""
        return self.json_schema.model_dump(by_alias=True, exclude_none=True) if self.json_schema else None


def _complete(value: object) -> object:
    if isinstance(value, dict):
        has_schema = value.get("json_schema") is not None
        if has_schema and value.get("type") in ("text", "json_object"):
            raise PydanticCustomError("format", 'json_schema only goes with "type": "json_schema"')
        if not has_schema and value.get("type") == "json_schema":
            raise PydanticCustomError("format", 'needs "json_schema": {"name": ..., "schema": {...}}')
    return value


Format = Annotated[ResponseFormat, BeforeValidator(_complete)]
