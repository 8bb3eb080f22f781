"""What an aggregator is shown: the request, and what the experts answered it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from coe.errors import ConfigError
from coe.types import GenerateRequest
from routers.base import Message

QUESTION, ANSWERS = "{question}", "{answers}"
TEMPLATE = f"""{QUESTION}

Experts answered:
{ANSWERS}

Some of these answers may be wrong or incomplete. Reply with the one final answer only."""
"""The last user message of what the aggregator is asked. The words are ours; the source (Symbolic-MoE, arXiv
2503.05641) shows the question and the answers in the same order."""
CUT = " [cut]"
"""Marks an answer of which the end is not shown."""
_THOUGHTS_END = "</think>"
_THOUGHTS = re.compile(r"<think>.*\Z", re.DOTALL)


def check_template(template: str) -> None:
    """Raises ConfigError where a template lacks the place of the question or of the answers, or has one twice."""
    for place in (QUESTION, ANSWERS):
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

    def filled(question: str) -> str:
        before, _, after = template.partition(QUESTION)  # what is filled in may hold the other place's name
        first, second = (part.replace(ANSWERS, shown) for part in (before, after))
        return first + question + second

    if request.prompt is not None:
        return replace(request, prompt=filled(request.prompt))
    turns = list(request.messages)
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
    if last is None:
        return replace(request, messages=(*turns, Message("user", filled(""))))
    turns[last] = Message("user", filled(turns[last].content))
    return replace(request, messages=tuple(turns))
