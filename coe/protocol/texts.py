"""Types of single fields that the models of requests share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from coe.protocol.bounds import MOST_NAME


class Strict(BaseModel):
    """An object of a request: its types are exact, and it has no other fields."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    inner_models: ClassVar[Mapping[tuple[str, ...], type[BaseModel]]] = {}
    """Of a whole request: the models of inner objects by their place without indices, for the names in its errors."""


def is_unicode(text: str) -> bool:
    """Whether a string can be written as UTF-8: it has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("unicode", "is not text: {reason}", {"reason": error.reason}) from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Name = Annotated[str, Field(max_length=MOST_NAME), AfterValidator(_unicode)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
