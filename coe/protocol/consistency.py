"""Problems between fields of a request that are each valid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from coe.protocol import bounds
from coe.protocol.fields import ChatFields, CompletionFields, GenerateFields
from coe.protocol.problems import Found, cut, wrong
from coe.protocol.tools import NamedChoice
from registry.spelling import did_you_mean
from routers.base import Message

TEMPLATE_NAMES: Final = frozenset(
    {"add_generation_prompt", "chat_template", "continue_final_message", "messages", "tokenize", "tools"}
)
"""Variables of a chat template that a request sets by other fields."""


def chat_problems(chat: ChatFields) -> Iterator[Found]:
    """Those of a chat request."""
    yield from _common(chat)
    limits = {chat.max_tokens, chat.max_completion_tokens} - {None}
    if len(limits) > 1:
        yield wrong("max_tokens", "max_tokens and max_completion_tokens differ: give one")
    if chat.max_tokens == 0:
        yield wrong("max_tokens", "should be greater than or equal to 1, got 0")
    if chat.top_logprobs and not chat.logprobs:
        yield wrong("top_logprobs", 'only goes with "logprobs": true')
    if chat.tools or chat.tool_choice not in (None, "none", "auto"):
        yield from _tool_problems(chat)
    if chat.chat_template_kwargs:
        yield from _template_problems(chat.chat_template_kwargs)


def completion_problems(completion: CompletionFields) -> Iterator[Found]:
    """Those of a completion request."""
    yield from _common(completion)
    n, n_prompts = completion.n or 1, len(completion.prompt)
    if n_prompts > 1 and n * n_prompts > bounds.MOST_ANSWERS:
        text = f"{n} answers to each of {n_prompts} prompts are {n * n_prompts}; a request has at most"
        yield wrong("n", f"{text} {bounds.MOST_ANSWERS}", "too_many")
    if completion.max_tokens == 0 and not completion.echo:
        yield wrong("max_tokens", 'should be greater than or equal to 1, got 0: 0 only goes with "echo": true')
    if completion.best_of not in (None, n):
        yield wrong("best_of", f"{completion.best_of} is not supported here, only n, which is {n}")
    if completion.chat_template_kwargs:
        yield wrong("chat_template_kwargs", "a completion has no chat template: send /v1/chat/completions")


def weight_problems(messages: Sequence[Message]) -> Iterator[Found]:
    """Too many images, or too large ones."""
    urls = [part["image_url"]["url"] for message in messages for part in message.parts if part["type"] == "image_url"]
    if len(urls) > bounds.MOST_IMAGES:
        yield wrong("messages", f"have {len(urls):,} images, at most {bounds.MOST_IMAGES} are read", "too_many")
    n_bytes = sum(len(url.encode()) for url in urls)
    if n_bytes > bounds.MOST_IMAGE_BYTES:
        most = bounds.MOST_IMAGE_BYTES
        yield wrong("messages", f"have images of {n_bytes:,} bytes, at most {most:,} are read", "too_large")


def _common(fields: GenerateFields) -> Iterator[Found]:
    limit = fields.max_tokens
    if fields.min_tokens and limit is not None and fields.min_tokens > limit:
        yield wrong("min_tokens", f"{fields.min_tokens} exceeds max_tokens, which is {limit}")


def _tool_problems(chat: ChatFields) -> Iterator[Found]:
    names = [tool.function.name for tool in chat.tools or ()]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield wrong(f"tools[{i}].function.name", f"{name!r} is the name of tools[{names.index(name)}], too")
    choice = chat.tool_choice
    if isinstance(choice, NamedChoice) and names and choice.function.name not in names:
        named = choice.function.name
        close = did_you_mean(named, names)
        yield wrong("tool_choice.function.name", f"{cut(named)!r} is the name of no tool{close}")
    elif choice not in (None, "none", "auto") and not names:
        yield wrong("tool_choice", "requires a call, but tools is empty")


def _template_problems(variables: dict[str, Any]) -> Iterator[Found]:
    for name in variables:
        if name in TEMPLATE_NAMES or not name.isidentifier() or not name.isascii() or name.startswith("_"):
            why = "is set by the request" if name in TEMPLATE_NAMES else "is no name of a variable"
            yield wrong(f"chat_template_kwargs.{cut(name)}", why)
