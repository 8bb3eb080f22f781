"""The fields of OpenAI's requests: used, refused, or ignored.

A request may hold any field that OpenAI documents. A field that would change the answer but is not supported is refused
unless it has its default: an answer that silently lacks a requested feature is worse than an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from coe.protocol.bounds import MOST_ANSWERS, MOST_CHAT_LOGPROBS, MOST_LOGPROBS
from coe.protocol.messages import Turn
from coe.protocol.prompts import PromptField
from coe.protocol.texts import Count, Name, Seed, Strict, Text
from coe.protocol.tools import Format, ToolChoice, ToolField
from registry.priorities import RequestPriority

Neutral = tuple[Any, ...]
"""Neutral values of a field: they request nothing."""

REFUSED_IN_CHAT: Final[Mapping[str, Neutral]] = {
    "audio": (None,),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}
REFUSED_IN_COMPLETIONS: Final[Mapping[str, Neutral]] = {"suffix": (None, "")}
OF_ENGINES: Final[Mapping[str, Neutral]] = {
    "add_generation_prompt": (None, True),
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "continue_final_message": (None, False),
    "detokenize": (None, True),
    "include_stop_str_in_output": (None, False),
    "length_penalty": (None, 1, 1.0),
    "priority": (None, 0),
    "prompt_logprobs": (None,),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "stop_token_ids": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
}
"""Fields of both endpoints that OpenAI does not have and vLLM, TGI and their clients send."""
OF_SAMPLING: Final = frozenset({"min_p", "top_k"})
"""Fields that have no effect while the temperature is 0."""
INSTEAD: Final[Mapping[str, str]] = {
    "conversation": "the items of the earlier turns in input: nothing is stored here",
    "function_call": "tool_choice (of a message: tool_calls)",
    "functions": "tools",
    "logprobs": 'include: ["message.output_text.logprobs"]',
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "previous_response_id": "the items of the earlier turns in input: nothing is stored here",
    "prompt": "instructions and input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
"""What to send in place of a refused field."""
REFUSED_IN_MESSAGES: Final[Mapping[str, Neutral]] = {"audio": (None,), "function_call": (None,)}
"""Fields that a message copied from an answer carries, empty."""

IGNORED_OF_OPENAI: Final = frozenset(
    {
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields about OpenAI's own service, of chats and responses."""
IGNORED_IN_CHAT: Final = IGNORED_OF_OPENAI | {"metadata", "verbosity"}
IGNORED_VALUES: Final[Mapping[str, Neutral]] = {"verbosity": ("medium",)}
"""Values of ignored fields that are the default, so that nothing is lost."""
IGNORED_IN_COMPLETIONS: Final = frozenset({"user"})
IGNORED_OF_ENGINES: Final = frozenset({"cache_salt", "request_id"})
"""Fields of other servers, of both endpoints."""
IGNORED_IN_MESSAGES: Final = frozenset(
    {
        "annotations",
        "cache_control",
        "provider_specific_fields",
        "reasoning",
        "reasoning_details",
        "thinking_blocks",
    }
)
IGNORED_IN_PARTS: Final = frozenset({"cache_control", "prompt_cache_breakpoint"})


def is_neutral(value: object, neutral: Neutral) -> bool:
    """Whether `value` is neutral; `0` is not `false`."""
    return any(type(value) is type(default) and value == default for default in neutral)


_OneOrMany = str | list[Annotated[str, Field(min_length=1)]]


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _token(key: str) -> str:
    if not (key.isascii() and key.isdecimal() and len(key) < 10):
        raise PydanticCustomError("token_id", "should be a token id: a whole number of at least 0")
    return key


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class Session(Strict):
    """What a client knows of the conversation. expert: that of the previous turns; without it, it is derived."""

    expert: Name | None = None


class Extension(Strict):
    """The field `coe`: this project's extension of a request.

    experts: names that may answer; exclude: names that may not. cost_weight: quality (score in [0, 1]) given up per
    USD, overriding the policy. seed: breaks ties between experts at random. deadline_s: seconds until the request is
    given up. priority: which waiting requests go first. answers: also return the answer of each called expert. session:
    what the client knows of the conversation.
    """

    experts: Annotated[list[Name], Field(min_length=1, fail_fast=True)] | None = None
    exclude: Annotated[list[Name], Field(fail_fast=True)] | None = None
    cost_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    priority: RequestPriority | None = None
    answers: bool | None = None
    session: Session | None = None


class CommonFields(Strict):
    """Fields of every request for an answer that OpenAI documents, and `coe`."""

    model: Annotated[Name, Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    stop: (
        Annotated[
            list[Annotated[Text, Field(min_length=1)]],
            Field(fail_fast=True),
            BeforeValidator(_one_or_many, json_schema_input_type=_OneOrMany),
        ]
        | None
    ) = None
    seed: Seed | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    logit_bias: (
        dict[
            Annotated[str, AfterValidator(_token)],
            Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)],
        ]
        | None
    ) = None
    stream: bool | None = None
    coe: Extension | None = None


class EngineFields(CommonFields):
    """Fields of every request for an answer that vLLM and TGI have and OpenAI does not."""

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class GenerateFields(EngineFields):
    """Fields of chat and completions that `/v1/responses` lacks, or names otherwise."""

    max_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    stream_options: StreamOptions | None = None


class ChatFields(GenerateFields):
    """Fields of `/v1/chat/completions`."""

    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Count | None = None
    response_format: Format | None = None
    tools: list[ToolField] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_CHAT_LOGPROBS)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class CompletionFields(GenerateFields):
    """Fields of `/v1/completions`."""

    prompt: PromptField
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
