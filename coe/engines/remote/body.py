"""The body of a request to an endpoint, as arguments of OpenAI's client.

A field at its neutral value is left out, so that strict endpoints do not reject what has no effect. Fields beyond
OpenAI's API have the names of vLLM, which SGLang, TGI, llama.cpp and LiteLLM know too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final
from urllib.parse import urlsplit

from coe.sampling import SamplingOptions
from coe.types import DEFAULT_MAX_TOKENS, GenerateRequest
from registry.spec import ExpertSpec
from routers.base import Message
from routers.constraints import TOOLS

_NEUTRAL: Final = SamplingOptions()
_SCHEMA_NAME: Final = "answer"
"""Name of a schema that has none: OpenAI's API requires one."""


def token_limit(request: GenerateRequest) -> int:
    """Most new tokens of the answer."""
    return DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens


def arguments(spec: ExpertSpec, request: GenerateRequest) -> dict[str, Any]:
    """The keyword arguments for `completions.create` (a prompt) or `chat.completions.create` (messages)."""
    host = urlsplit(spec.source).hostname or ""
    of_openai = host == "openai.com" or host.endswith(".openai.com")
    stream = not needs_one_object(request)
    extra = _beyond_openai(request)
    given: dict[str, Any] = {
        "model": spec.model or spec.name,
        "stream": stream,
        "stream_options": {"include_usage": True} if stream else None,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "stop": list(request.stop) or None,
        "seed": request.seed,
        **_penalties(request.sampling),
        # Compatible servers accept `max_tokens`; OpenAI's newer models only the new name.
        "max_completion_tokens" if of_openai and request.messages else "max_tokens": token_limit(request),
    }
    if request.messages:
        given |= _of_chat(spec, request, strict=of_openai)
    else:
        given |= _of_completion(request)
        extra |= {"response_format": _response_format(request)}
    given["extra_body"] = _set(extra) or None
    given["extra_headers"] = (request.origin and request.origin.headers) or None  # the trace goes on there
    return _set(given)


def needs_one_object(request: GenerateRequest) -> bool:
    """Whether the answer must come as one JSON object: vLLM does not stream `prompt_logprobs`."""
    return request.prompt_logprobs is not None and not echoes(request)


def echoes(request: GenerateRequest) -> bool:
    """Whether the endpoint repeats the prompt: only completions do."""
    return request.echo and request.prompt is not None


def _set(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _of_chat(spec: ExpertSpec, request: GenerateRequest, *, strict: bool) -> dict[str, Any]:
    return {
        "messages": [_message(message, strict=strict) for message in request.messages],
        "response_format": _response_format(request),
        "reasoning_effort": request.reasoning_effort,
        "logprobs": True if request.logprobs is not None else None,
        "top_logprobs": request.logprobs or None,
        **_of_tools(spec, request),
    }


def _of_completion(request: GenerateRequest) -> dict[str, Any]:
    return {
        "prompt": list(request.prompt_ids) or request.prompt,
        "logprobs": request.prompt_logprobs if request.logprobs is None and echoes(request) else request.logprobs,
        "echo": True if request.echo else None,
    }


def _message(message: Message, *, strict: bool) -> dict[str, Any]:
    """The message in OpenAI's form; without its reasoning where an endpoint rejects fields that it does not know."""
    document = message.document()
    if strict:
        document.pop("reasoning_content", None)
    return document


def _response_format(request: GenerateRequest) -> dict[str, Any] | None:
    if request.json_schema is not None:
        return {"type": "json_schema", "json_schema": {"name": _SCHEMA_NAME, **request.json_schema}}
    return {"type": "json_object"} if request.format == "json" else None


def _of_tools(spec: ExpertSpec, request: GenerateRequest) -> dict[str, Any]:
    """The tools, and how they may be called.

    Tools that must not be called go to experts that know tools only: their endpoints may need them to read the calls of
    earlier messages.
    """
    if not request.tools or (not request.offered and TOOLS not in spec.capabilities):
        return {}
    choice: Any = None if request.tool_choice == "auto" else request.tool_choice
    if request.tool_name is not None and request.offered:
        choice = {"type": "function", "function": {"name": request.tool_name}}
    several = None if request.parallel_tool_calls or not request.offered else False
    return {"tools": [dict(tool) for tool in request.tools], "tool_choice": choice, "parallel_tool_calls": several}


def _penalties(sampling: SamplingOptions) -> dict[str, Any]:
    """The options of OpenAI's API that differ from their defaults."""
    bias = {str(token): value for token, value in sampling.logit_bias.items()}
    return {
        "frequency_penalty": sampling.frequency_penalty or None,
        "presence_penalty": sampling.presence_penalty or None,
        "logit_bias": bias or None,
    }


def _beyond_openai(request: GenerateRequest) -> dict[str, Any]:
    """The options that OpenAI's API does not have and that differ from their defaults."""
    of_openai = _penalties(_NEUTRAL).keys()
    names = [each.name for each in fields(SamplingOptions) if each.name not in of_openai]
    values = {name: getattr(request.sampling, name) for name in names}
    extra = {name: value for name, value in values.items() if value != getattr(_NEUTRAL, name)}
    if request.messages and request.template_kwargs:
        extra["chat_template_kwargs"] = dict(request.template_kwargs)
    if needs_one_object(request):
        extra["prompt_logprobs"] = request.prompt_logprobs
    return extra
