"""Endpoints of a remote expert that has several: equal servers of one model, among which its requests are spread.

experts:
  - name: big
    kind: remote
    context_length: 32768
    endpoints:
      - {url: https://a.example/v1, weight: 3, key_env: A_KEY}
      - {url: https://b.example/v1, model: big-fp8, max_in_flight: 16}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from registry.errors import without_userinfo

MOST_ENDPOINTS = 64


class RemoteEndpoint(BaseModel):
    """One of the `endpoints` of a remote expert: an OpenAI-compatible server of the same model."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    url: Annotated[str, Field(min_length=1, max_length=2048)]
    """Base URL, ending in /v1, without user name and password."""
    weight: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    """Its share of the requests, in proportion to the weights of the others."""
    key_env: Annotated[str, Field(max_length=256, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable with its key; null takes `api_key_env` of the expert."""
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Name of the model there; null takes `model` of the expert."""
    max_in_flight: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Most requests at once from one host process; null takes 64."""

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        shown = without_userinfo(url)
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{shown[:200]!r} is not an http(s) URL ending in /v1")
        if shown != url:
            raise ValueError(
                "a URL with a user name or password is not accepted: leave out what is before '@', and name the "
                "environment variable with the key as `key_env`"
            )
        return url


def repeated(endpoints: Sequence[RemoteEndpoint]) -> str | None:
    """The URL of an endpoint that is listed twice, with the same model and key; None if there is none."""
    seen: set[tuple[str, str | None, str | None]] = set()
    for each in endpoints:
        place = (each.url, each.model, each.key_env)
        if place in seen:
            return each.url
        seen.add(place)
    return None


def places(endpoints: Sequence[RemoteEndpoint], model: str) -> list[tuple[str, str]]:
    """URL and model of all endpoints, each once and in order: what the identity of the expert is made of.

    Weights, keys and limits are no part of it: they do not change an answer.
    """
    return sorted({(each.url, each.model or model) for each in endpoints})
