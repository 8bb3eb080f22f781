"""What an expert is shown that works on the answers of others: the request, and what they answered it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from coe.errors import ConfigError
from coe.types import GenerateRequest
from routers.base import Message

QUESTION, ANSWERS, DRAFT = "{question}", "{answers}", "{draft}"
TEMPLATE = f"""{QUESTION}

Experts answered:
{ANSWERS}

Some of these answers may be wrong or incomplete. Reply with the one final answer only."""
"""The last user message of what the aggregator is asked. The words are ours; the source (Symbolic-MoE, arXiv
2503.05641) shows the question and the answers in the same order."""
REFINE = f"""{QUESTION}

A draft of the answer:
{DRAFT}

It may be wrong or incomplete. Reply with the final answer only."""
"""The same of what an expert is asked that refines a draft; the words are ours."""
CUT = " [cut]"
"""Marks an answer of which the end is not shown."""
_THOUGHTS_END = "</think>"
_THOUGHTS = re.compile(r"<think>.*\Z", re.DOTALL)


def check_template(template: object, *places: str) -> None:
    """Raises ConfigError where a template is no text, lacks a place, or has one twice.

    places: by default those of the question and of the answers.
    """
    if not isinstance(template, str):
        raise ConfigError(f"the template must be a text, got {template!r}")
    for place in places or (QUESTION, ANSWERS):
        if template.count(place) != 1:
            raise ConfigError(f"the template must hold {place} once, it has it {template.count(place)} times")


def without_thoughts(text: str) -> str:
    """What follows the last closing think tag; of thoughts that never end, nothing."""
    _, _, said = text.rpartition(_THOUGHTS_END)
    return _THOUGHTS.sub("", said).strip()


def shortened(text: str, characters: int) -> str:
    """The beginning of a text that is too long, marked as such."""
    return text if len(text) <= characters else text[:characters].rstrip() + CUT


def synthesis(request: GenerateRequest, answers: Sequence[str], template: str = TEMPLATE) -> GenerateRequest:
    """The request of an aggregator: the conversation, its last user message in the template with the answers.

    Args:
        answers: in the order in which they are shown, numbered from 1; their thoughts are taken out before.
    """
    shown = "\n".join(f"{i}. {answer}" for i, answer in enumerate(answers, start=1))
    return _within(request, template, ANSWERS, shown)


def refinement(request: GenerateRequest, draft: str, template: str = REFINE) -> GenerateRequest:
    """The request of an expert that refines a draft: the conversation, its last user message in the template."""
    return _within(request, template, DRAFT, draft)


def _within(request: GenerateRequest, template: str, place: str, shown: str) -> GenerateRequest:
    """The request with its question in the template, and `shown` at its place."""

    def filled(question: str) -> str:
        before, _, after = template.partition(QUESTION)  # what is filled in may hold the other place's name
        first, second = (part.replace(place, shown) for part in (before, after))
        return first + question + second

    if request.prompt is not None:
        return replace(request, prompt=filled(request.prompt))
    turns = list(request.messages)
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
    if last is None:
        return replace(request, messages=(*turns, Message("user", filled(""))))
    turns[last] = Message("user", filled(turns[last].content))
    return replace(request, messages=tuple(turns))
