"""Bounds on the elements of a request: what is counted and measured before it is validated."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

MOST_FIELDS: Final = 100
"""Most fields of one object of a request."""
MOST_MESSAGES: Final = 4096
"""Most messages of a request."""
MOST_ITEMS: Final = 8192
"""Most items in the `input` of a response: messages, tool calls, their results and reasoning."""
MOST_PARTS: Final = 8192
"""Most parts of all messages together."""
MOST_CALLS: Final = 4096
"""Most tool calls of all messages together."""
MOST_IMAGES: Final = 128
"""Most images of all messages together."""
MOST_IMAGE_BYTES: Final = 8 * 2**20
"""Most bytes of the URLs of all images together, those with the image inside included."""
MOST_URL: Final = 8192
"""Most characters of the address of an image."""
MOST_STOPS: Final = 64
"""Most stop strings."""
MOST_EXPERTS: Final = 10_000
"""Most names in `coe.experts`, and in `coe.exclude`."""
MOST_NAME: Final = 512
"""Most characters of `model` and of the name of an expert."""
MOST_TOOLS: Final = 512
"""Most tools of a request."""
MOST_TOOL_BYTES: Final = 2**20
"""Most bytes of all tools together, as JSON."""
MOST_SCHEMA_BYTES: Final = 2**18
"""Most bytes of a JSON schema for the answer."""
MOST_LEVELS: Final = 64
"""Most levels of arrays and objects in tools, in a JSON schema, and in variables for the chat template."""
MOST_TEMPLATE_BYTES: Final = 2**16
"""Most bytes of the variables for the chat template, as JSON."""
MOST_BIASES: Final = 1024
"""Most tokens in `logit_bias`."""
MOST_ANSWERS: Final = 128
"""Most answers to one request: `n` for each prompt."""
MOST_PROMPT_IDS: Final = 131_072
"""Most token ids of all prompts, or of all inputs of an embedding, together."""
MOST_INPUTS: Final = 2048
"""Most inputs of an embedding request, as in OpenAI's API."""
MOST_CHAT_LOGPROBS: Final = 20
"""Most likely tokens that a chat request may have listed for each token."""
MOST_LOGPROBS: Final = 5
"""The same for a completion request."""

Place = tuple[str, ...]

COUNTED: Final[Mapping[Place, tuple[type, int, str]]] = {
    (): (dict, MOST_FIELDS, "fields"),
    ("messages",): (list, MOST_MESSAGES, "messages"),
    ("prompt",): (list, MOST_PROMPT_IDS, "elements"),
    ("input",): (list, MOST_PROMPT_IDS, "elements"),
    ("stop",): (list, MOST_STOPS, "strings"),
    ("tools",): (list, MOST_TOOLS, "tools"),
    ("tool_choice",): (dict, MOST_FIELDS, "fields"),
    ("logit_bias",): (dict, MOST_BIASES, "tokens"),
    ("chat_template_kwargs",): (dict, MOST_FIELDS, "fields"),
    ("stream_options",): (dict, MOST_FIELDS, "fields"),
    ("response_format",): (dict, MOST_FIELDS, "fields"),
    ("response_format", "json_schema"): (dict, MOST_FIELDS, "fields"),
    ("text",): (dict, MOST_FIELDS, "fields"),
    ("text", "format"): (dict, MOST_FIELDS, "fields"),
    ("reasoning",): (dict, MOST_FIELDS, "fields"),
    ("include",): (list, MOST_FIELDS, "values"),
    ("coe",): (dict, MOST_FIELDS, "fields"),
    ("coe", "session"): (dict, MOST_FIELDS, "fields"),
    ("coe", "experts"): (list, MOST_EXPERTS, "names"),
    ("coe", "exclude"): (list, MOST_EXPERTS, "names"),
}
"""What is counted before a request is validated: place -> type, most elements, what they are."""
MEASURED: Final[Mapping[Place, int]] = {
    ("tools",): MOST_TOOL_BYTES,
    ("response_format", "json_schema"): MOST_SCHEMA_BYTES,
    ("chat_template_kwargs",): MOST_TEMPLATE_BYTES,
}
"""Values that are passed on as they are: place -> most bytes as JSON. They have at most MOST_LEVELS levels."""
_COUNTED_IN: Final[Mapping[str, Sequence[Place]]] = {
    field: [place for place in COUNTED if place[:1] == (field,)] for (field, *_) in filter(None, COUNTED)
}
"""The places of COUNTED by their field of the body."""
_MEASURED_FIELDS: Final = frozenset(place[0] for place in MEASURED)


def too_many(body: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """The places of a body with too many elements, each with the count and the limit."""
    if len(body) > MOST_FIELDS:
        yield (), f"has {len(body):,} fields, at most {MOST_FIELDS:,} are read"
        return
    for field in body:
        for place in _COUNTED_IN.get(field, ()):
            kind, most, noun = COUNTED[place]
            value = _at(body, place)
            if isinstance(value, kind) and len(value) > most:  # type: ignore[arg-type]
                yield place, f"has {len(value):,} {noun}, at most {most:,} are read"  # type: ignore[arg-type]


def too_large(body: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """The places of a body whose value is too large, too deep, or cannot be written as JSON."""
    if _MEASURED_FIELDS.isdisjoint(body):
        return
    for place, most in MEASURED.items():
        if place[0] in body and (value := _at(body, place)):
            wrong = _excess(value, most)
            if wrong:
                yield place, wrong


def _at(body: Mapping[str, Any], place: Place) -> Any:
    value: Any = body
    for name in place:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _excess(value: object, most_bytes: int) -> str | None:
    inner, level = [value], 0
    while inner := [one for one in inner if isinstance(one, dict | list)]:
        level += 1
        if level > MOST_LEVELS:
            return f"has more than {MOST_LEVELS} levels of arrays and objects"
        inner = [child for one in inner for child in (one.values() if isinstance(one, dict) else one)]
    try:
        n_bytes = len(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode())
    except UnicodeEncodeError as error:
        return f"holds a string that is not text: {error.reason}"
    except (TypeError, ValueError) as error:
        return f"is not JSON: {error}"
    return f"has {n_bytes:,} bytes, at most {most_bytes:,} are read" if n_bytes > most_bytes else None
