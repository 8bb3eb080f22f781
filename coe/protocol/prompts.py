"""Prompts of a completion request, or inputs of an embedding: a text or token ids, or an array of either."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

from coe.protocol.bounds import MOST_ANSWERS, MOST_INPUTS, MOST_PROMPT_IDS
from coe.protocol.texts import is_unicode

Prompt = str | tuple[int, ...]
"""A text, or token ids of the expert's tokenizer."""
_MOST_ID = 2**31 - 1
_Ids = Annotated[list[Annotated[int, Field(ge=0, le=_MOST_ID)]], Field(min_length=1)]
_Input = str | Annotated[list[str], Field(min_length=1)] | _Ids | Annotated[list[_Ids], Field(min_length=1)]


def _prompts(value: object) -> tuple[Prompt, ...]:
    """The prompts of a request, at least one.

    Raises:
        PydanticCustomError: with the index of a wrong prompt.
    """
    return _read(value, MOST_ANSWERS, "prompt")


def _inputs(value: object) -> tuple[Prompt, ...]:
    """The inputs of an embedding, at least one. A text that is empty has no vector."""
    inputs = _read(value, MOST_INPUTS, "input")
    empty = next((i for i, one in enumerate(inputs) if not one), None)
    if empty is not None:
        raise _wrong("" if isinstance(value, str) else f"[{empty}]", "must not be empty")
    return inputs


def _read(value: object, most: int, noun: str) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (_text(value, ""),)
    if not isinstance(value, list) or not value:
        raise PydanticCustomError(
            "prompt", "Input should be a string, an array of strings, of token ids, or of arrays of token ids"
        )
    if _are_ids(value):
        return (_ids(value, ""),)
    if len(value) > most:
        raise PydanticCustomError("too_many", f"has {len(value):,} {noun}s, at most {most:,} are read")
    if isinstance(value[0], str):
        return tuple(_text(one, f"[{i}]", noun) for i, one in enumerate(value))
    prompts = tuple(_ids(one, f"[{i}]") for i, one in enumerate(value))
    count = sum(map(len, prompts))
    if count > MOST_PROMPT_IDS:
        raise PydanticCustomError("too_many", f"has {count:,} token ids, at most {MOST_PROMPT_IDS:,} are read")
    return prompts


def _are_ids(value: Sequence[object]) -> bool:
    return isinstance(value[0], int | float)


def _text(value: object, place: str, noun: str = "prompt") -> str:
    if not isinstance(value, str):
        raise _wrong(place, f"should be a string, as the first {noun} is")
    if not is_unicode(value):
        raise _wrong(place, "is not text: surrogates not allowed")
    return value


def _ids(value: object, place: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise _wrong(place, "should be a string, or an array of token ids")
    if not value:
        raise _wrong(place, "must not be empty: at least one token id is needed")
    wrong = next((i for i, one in enumerate(value) if not _is_id(one)), None)
    if wrong is not None:
        raise _wrong(f"{place}[{wrong}]", f"should be a token id: a whole number from 0 to {_MOST_ID:,}")
    return tuple(value)


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST_ID


def _wrong(place: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("prompt_element", "{place}: {message}", {"place": place, "message": message})


def texts(prompts: Iterable[Prompt]) -> list[str]:
    """The text of each prompt; empty for token ids."""
    return [prompt if isinstance(prompt, str) else "" for prompt in prompts]


if TYPE_CHECKING:
    PromptField = tuple[Prompt, ...]
    InputField = tuple[Prompt, ...]
else:
    PromptField = Annotated[object, PlainValidator(_prompts, json_schema_input_type=_Input)]
    InputField = Annotated[object, PlainValidator(_inputs, json_schema_input_type=_Input)]
