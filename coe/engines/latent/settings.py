"""What a composed expert's settings state about the calls to its peers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import regex  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from coe.errors import ConfigError
from coe.types import MOST_NOTE_LAYERS
from registry.documents import dotted, message_of

QUESTION: Final = "{question}"
MATCH: Final = "{match}"
MOST_CALLS: Final = 64
"""Most calls to one peer for one request."""


class PeerQuestion(BaseModel):
    """What a peer is asked: an expert knows most in the wording that it was trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    template: Annotated[str, Field(max_length=10_000)] = QUESTION
    """The last user message for the peer, with {question} for that of the request or, with a pattern, {match} for what
    it matched."""
    pattern: Annotated[str, Field(min_length=1, max_length=1_000)] | None = None
    """A regular expression: one call for each different match in the last user message; none without a match."""
    limit: Annotated[int, Field(ge=1, le=MOST_CALLS)] = 8
    """Most calls for one request; later matches are left out."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                regex.compile(pattern)
            except regex.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return pattern


class CallSettings(BaseModel):
    """The part of a composition's settings that says how its peers are called; the rest is the engine's."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    reads: Literal["answer", "prompt"] = "answer"
    """"answer": each peer answers, and leaves notes of its answer. "prompt": it reads the prompt only."""
    places: Literal["speaking", "all"] = "speaking"
    """Tokens of the prompt that notes are of: the last one, or all."""
    layers: Mapping[str, Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(max_length=MOST_NOTE_LAYERS)]] = {}
    """Of each peer, the layers that notes are of, counted from 1; none: what its head reads."""
    asks: Mapping[str, PeerQuestion] = {}
    """Of each peer, what it is asked; without an entry, the request as it is."""
    peer_deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds for each call to a peer, loading included; a late peer is left out."""
    max_answer_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most new tokens of a peer; by default the request's."""

    @classmethod
    def of(cls, settings: Mapping[str, Any], expert: str) -> CallSettings:
        """Read from an expert's settings. Raises ConfigError that names the expert and every wrong field."""
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            found = [
                f"{dotted(detail['loc'])}: {message_of(detail)}" for detail in error.errors(include_url=False)[:10]
            ]
            raise ConfigError(f"settings of {expert!r}: {'; '.join(found)}") from None
