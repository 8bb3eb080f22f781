"""Prompts for an expert that works on the answers of others: the request, and these answers."""

from __future__ import annotations

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
"""The last user message to the aggregator. The wording is ours; the paper (Symbolic-MoE, arXiv 2503.05641) has the
question and the answers in the same order."""
REFINE = f"""{QUESTION}

A draft of the answer:
{DRAFT}

It may be wrong or incomplete. Reply with the final answer only."""
"""The last user message to an expert that refines a draft; the wording is ours."""
CUT = " [cut]"
"""Marks a cut answer."""


def check_template(template: object, *places: str) -> None:
    """Raises ConfigError if a template is not a text, or does not contain each placeholder exactly once.

    places: by default {question} and {answers}.
    """
    if not isinstance(template, str):
        raise ConfigError(f"the template must be a text, got {template!r}")
    for place in places or (QUESTION, ANSWERS):
        if template.count(place) != 1:
            raise ConfigError(f"the template must contain {place} exactly once, not {template.count(place)} times")


def shortened(text: str, characters: int) -> str:
    """The text, or its first characters and a mark."""
    return text if len(text) <= characters else text[:characters].rstrip() + CUT


def synthesis(request: GenerateRequest, answers: Sequence[str], template: str = TEMPLATE) -> GenerateRequest:
    """The request to an aggregator: the conversation, its last user message wrapped by the template with the answers.

    Args:
        answers: in the order shown, numbered from 1; without their thoughts.
    """
    shown = "\n".join(f"{i}. {answer}" for i, answer in enumerate(answers, start=1))
    return _within(request, template, ANSWERS, shown)


def refinement(request: GenerateRequest, draft: str, template: str = REFINE) -> GenerateRequest:
    """The request to an expert that refines a draft: the conversation, its last user message in the template."""
    return _within(request, template, DRAFT, draft)


def _within(request: GenerateRequest, template: str, place: str, shown: str) -> GenerateRequest:
    """The request with its question in the template, and `shown` in place of `place`."""

    def filled(question: str) -> str:
        before, _, after = template.partition(QUESTION)  # inserted text may contain the other placeholder
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
