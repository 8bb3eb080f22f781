"""Answers of fake experts: the behaviour that a source states, and answers with reasoning and tool calls, in steps.

A scripted answer that starts with `@text:`, `@think:` or `@call:` is a list of steps, separated by blanks:

    @think:The user asks for the weather. @call:get_weather:{"city":"Rome"} @call:get_weather:{"city":"Oslo"}
    @text:It is sunny.

A call is made only if the request offers the tool. If the request demands a call (`tool_choice`) and the script has
none, the demanded or first tool is called with the smallest arguments that its schema accepts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from coe.engines.embedding import Vectors
from coe.engines.parsing.ids import call_ids
from coe.errors import WeightsError
from coe.types import Chunk, FinishReason, GenerateRequest, ToolCallDelta

_STEP: Final = re.compile(r"(?:\A|\s)@(text|think|call):")
_MOST_DEPTH: Final = 20
_MOST_ITEMS: Final = 100
SCHEME: Final = "fake"
N_NUMBERS: Final = 16
"""Length of the vectors of fake experts."""
_BEHAVIOURS: Final = ("echo", "upper", "script", "fail")
_FAILS_AT: Final = ("load", "switch")
_MOST_DIGITS: Final = 9


@dataclass(frozen=True, slots=True)
class Behaviour:
    """A parsed `fake://` source."""

    name: str
    options: Mapping[str, str]

    @classmethod
    def of(cls, source: str) -> Behaviour:
        """Parse a source; one that is not `fake://...` (a stand-in for real weights) echoes.

        Raises:
            WeightsError: `fake://` with a behaviour or a setting that does not exist.
        """
        if not source.startswith(f"{SCHEME}://"):
            return cls("echo", {})
        try:
            url = urlsplit(source)
        except ValueError as error:
            raise WeightsError(f"{source!r} is not a fake expert: {error}") from error
        if url.netloc not in _BEHAVIOURS or url.path.strip("/"):
            raise WeightsError(
                f"{source!r} is not a fake expert; there are: {', '.join(f'fake://{b}' for b in _BEHAVIOURS)}"
            )
        options = dict(parse_qsl(url.query, keep_blank_values=True))
        if wrong := _wrong_option(url.netloc, options):
            raise WeightsError(f"{source!r} is not a fake expert: {wrong}")
        return cls(url.netloc, options)

    def answer(self, prompt: str, question: str) -> str:
        """The answer to a prompt whose last user message is `question`."""
        if self.name == "script":
            return script_answer(self.options, prompt, self.options.get("default", question))
        return question.upper() if self.name == "upper" else question


def _wrong_option(name: str, options: Mapping[str, str]) -> str | None:
    """What is wrong with the settings of a behaviour; a script may have any."""
    for key, value in options.items() if name != "script" else ():
        if name != "fail":
            return f"{name} has no settings, and {key!r} is one"
        if key == "at" and value not in _FAILS_AT:
            return f"at must be one of {', '.join(_FAILS_AT)}, got {value!r}"
        if key == "after" and not (value.isascii() and value.isdigit() and len(value) <= _MOST_DIGITS):
            return f"after must be a number of tokens, got {value!r}"
        if key not in ("at", "after"):
            return f"fail has no setting {key!r}; there are: at, after"
    return None


def script_answer(script: Mapping[str, str], prompt: str, default: str) -> str:
    """The answer of the first key found in the prompt, ignoring case."""
    folded = prompt.casefold()
    return next((a for key, a in script.items() if key != "default" and key.casefold() in folded), default)


@dataclass(frozen=True, slots=True)
class Step:
    """A part of an answer; `text` of a call are its arguments."""

    kind: Literal["text", "think", "call"]
    text: str
    tool: str = ""


def steps_of(answer: str, request: GenerateRequest, *, scripted: bool = True) -> list[Step]:
    """The steps of an answer to a request; one that is not scripted, or has no steps, is one text."""
    found = list(_STEP.finditer(answer)) if scripted else []
    if not found or found[0].start():
        steps = [Step("text", answer)]
    else:
        ends = [*(mark.start() for mark in found[1:]), len(answer)]
        steps = [_step(mark[1], answer[mark.end() : end]) for mark, end in zip(found, ends, strict=True)]
    calls = _calls([step for step in steps if step.kind == "call"], request)
    if request.offered and request.tool_choice == "required":
        return [step for step in steps if step.kind == "think"] + (calls or [_demanded(request)])
    return [step for step in steps if step.kind != "call" or any(step is call for call in calls)]


def chunks_of(steps: Sequence[Step], request: GenerateRequest) -> list[Chunk]:
    """One chunk a token, cut at `max_tokens` and at the first stop string in a text; the last has the reason only."""
    chunks: list[Chunk] = []
    reason: FinishReason = "stop"
    n_calls = 0
    for step in steps:
        cut = _stop(step, request.stop)
        match step.kind:
            case "text":
                chunks += [Chunk(token) for token in tokenize(step.text[:cut])]
            case "think":
                chunks += [Chunk("", reasoning=token) for token in tokenize(step.text)]
            case "call":
                chunks += [
                    Chunk("", tool_calls=(piece,)) for piece in _pieces(step, n_calls, call_ids(request)[n_calls])
                ]
                n_calls, reason = n_calls + 1, "tool_calls"
        if cut is not None:
            break
    if request.max_tokens is not None and count(chunks) > request.max_tokens:
        chunks, reason = chunks[: request.max_tokens], "length"
    return [*chunks, Chunk("", reason)]


def count(chunks: Sequence[Chunk]) -> int:
    """Tokens of an answer; one of blanks only does not count."""
    return sum(bool(chunk.text.strip() or chunk.reasoning.strip() or chunk.tool_calls) for chunk in chunks)


def tokenize(text: str) -> list[str]:
    """Whitespace tokens, each with the whitespace before it; joined, they equal the text."""
    return re.findall(r"\s*\S+(?:\s+\Z)?|\s+\Z", text)


def smallest(schema: Any, depth: int = 0) -> Any:
    """A small value that a JSON schema accepts, as far as types, `enum`, `const`, `required` and `minItems` go."""
    if not isinstance(schema, Mapping) or depth == _MOST_DEPTH:
        return None
    if "const" in schema:
        return schema["const"]
    for name in ("enum", "anyOf", "oneOf", "allOf"):
        if isinstance(choices := schema.get(name), list) and choices:
            return choices[0] if name == "enum" else smallest(choices[0], depth + 1)
    kinds = schema.get("type", "object" if "properties" in schema else None)
    match kinds[0] if isinstance(kinds, list) and kinds else kinds:
        case "object":
            return _smallest_object(schema, depth)
        case "array":
            n = schema.get("minItems", 0)
            n = min(n, _MOST_ITEMS) if isinstance(n, int) else 0
            return [smallest(schema.get("items"), depth + 1) for _ in range(n)]
        case "integer" | "number":
            return schema.get("minimum", 0)
        case "string":
            return ""
        case "boolean":
            return False
    return None


def _smallest_object(schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
    properties, required = schema.get("properties"), schema.get("required")
    properties = properties if isinstance(properties, Mapping) else {}
    names = required[:_MOST_ITEMS] if isinstance(required, list) else []
    return {str(name): smallest(properties.get(name), depth + 1) for name in names}


def _step(kind: str, text: str) -> Step:
    if kind != "call":
        return Step("think" if kind == "think" else "text", text)
    name, _, arguments = text.strip().partition(":")
    return Step("call", arguments or "{}", name)


def _calls(steps: Sequence[Step], request: GenerateRequest) -> list[Step]:
    """The calls that the request allows."""
    names = {_name(tool) for tool in request.offered}
    if request.tool_name is not None:
        names &= {request.tool_name}
    allowed = [step for step in steps if step.tool in names]
    return allowed if request.parallel_tool_calls else allowed[:1]


def _demanded(request: GenerateRequest) -> Step:
    tools = {_name(tool): tool["function"].get("parameters") for tool in request.offered}
    name = request.tool_name if request.tool_name in tools else next(iter(tools))
    return Step("call", json.dumps(smallest(tools[name]) or {}, ensure_ascii=False), name)


def _name(tool: Mapping[str, Any]) -> str:
    name: str = tool["function"]["name"]
    return name


def _pieces(step: Step, index: int, call_id: str) -> Iterator[ToolCallDelta]:
    yield ToolCallDelta(index, call_id, step.tool)
    for token in tokenize(step.text):
        yield ToolCallDelta(index, arguments=token)


def _stop(step: Step, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins in a text."""
    places = (step.text.find(s) for s in stop) if step.kind == "text" else ()
    return min((place for place in places if place >= 0), default=None)


def vectors_of(inputs: Sequence[str | tuple[int, ...]]) -> Vectors:
    """(n_inputs, 16) vectors of length 1: equal inputs have equal ones."""
    seeds = [hashlib.sha256(repr(each).encode("utf-8", "surrogatepass")).digest() for each in inputs]
    drawn = [np.random.default_rng(list(seed)).standard_normal(N_NUMBERS) for seed in seeds]
    return np.array([vector / np.linalg.norm(vector) for vector in drawn], np.float32)
