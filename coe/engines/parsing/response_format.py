"""The response format of a model: a response template of transformers, with limits.

A checkpoint may ship a template of its own (`response_template` in tokenizer_config.json), with regular expressions.
They run in the process that generates, so every search has a limit of time. The regions of an answer are found by
transformers; the content of each is read afterwards (`coe.engines.parsing.calls`), where what is wrong with one call
costs no other.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from coe.engines.parsing.formats import (
    CONTENT,
    PLAIN_CALL,
    THINKING,
    TOOL_CALLS,
    Format,
    calls_of,
    detected,
    response_template,
)
from coe.errors import TemplateError
from coe.seam import one_line

MOST_SECONDS: Final = 1.0
"""Time for all searches of one answer; an ordinary one takes less than 0.01."""
_MOST_SEARCHES: Final = 256
"""Searches of one text from one place; more do not advance."""
_MOST_PATTERN_CHARACTERS: Final = 2_000
_MOST_FIELDS: Final = 20
_MOST_REPEATS: Final = 1_000
"""Product of the counts of a pattern, such as 3 of `a{3}`: counted repeats are unrolled when compiled."""
_COUNT: Final = re.compile(r"\{(\d*),?(\d*)\}")
_ROLES: Final = {CONTENT: CONTENT, THINKING: THINKING, "reasoning": THINKING, TOOL_CALLS: TOOL_CALLS}
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Budget:
    """What the searches of one answer may still take. `spend` raises TemplateError if it is exceeded."""

    expert: str
    left_s: float = MOST_SECONDS
    _place: tuple[int, int] = (-1, -1)
    _n_here: int = 0

    def spend(self, seconds: float, place: tuple[int, int] = (-1, -1)) -> None:
        """Count a search; `place` is the length of the text, and where the search began."""
        self._n_here = self._n_here + 1 if place == self._place else 0
        self._place = place
        self.left_s -= seconds
        if self.left_s <= 0 or self._n_here > _MOST_SEARCHES:
            raise self.exceeded()

    def exceeded(self) -> TemplateError:
        """The error."""
        return TemplateError(
            f"the response template of {self.expert!r} takes more than {MOST_SECONDS:g} s for one answer: simplify the "
            "patterns of `response_template` in its tokenizer_config.json"
        )


@dataclass(frozen=True, slots=True)
class _Found:
    """A match; its groups also hold the whole text of the match and the groups of the pattern as one value."""

    match: Any

    @property
    def partial(self) -> bool:
        return bool(self.match.partial)

    def start(self) -> int:
        return int(self.match.start())

    def end(self) -> int:
        return int(self.match.end())

    def groupdict(self) -> dict[str, Any]:
        groups = {name: value for name, value in self.match.groupdict().items() if value is not None}
        return {"opening": self.match.group(), "groups": groups}


@dataclass(slots=True)
class _Timed:
    """A compiled pattern whose searches count against a budget.

    A result is kept while the text is the same: transformers searches for every pattern again after each region.
    """

    pattern: Any
    budget: Budget
    _known: tuple[int, bool, int] = (-1, False, -1)
    _found: _Found | None = None

    def search(self, text: str, place: int, partial: bool = False) -> _Found | None:
        length, was_partial, begin = self._known
        same = length == len(text) and was_partial == partial and begin <= place
        if same and (self._found is None or self._found.start() >= place):
            self.budget.spend(0.0, (len(text), place))
            return self._found
        began = time.thread_time()
        try:
            found = self.pattern.search(text, place, partial=partial, timeout=max(self.budget.left_s, 1e-3))
        except TimeoutError:
            raise self.budget.exceeded() from None
        self.budget.spend(time.thread_time() - began, (len(text), place))
        self._known, self._found = (len(text), partial, place), None if found is None else _Found(found)
        return self._found

    def finditer(self, text: str) -> Iterator[Any]:
        try:
            yield from self.pattern.finditer(text, timeout=max(self.budget.left_s, 1e-3))
        except TimeoutError:
            raise self.budget.exceeded() from None


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """How a model writes its answers.

    Attributes:
        template: transformers' `ResponseTemplate`.
        own: whether it is the checkpoint's, which expects the end of the prompt, too.
        calls: the format of tool calls, if it is one of `coe.engines.parsing.formats`.
    """

    template: Any
    own: bool = False
    calls: Format | None = None

    @classmethod
    def of(cls, chat_template: str | None, own: Any = None, *, expert: str = "") -> ResponseFormat | None:
        """The format of a checkpoint; `None` if its answers are text only.

        A response template that cannot be used is logged, and the format follows from the chat template.
        """
        if own is not None:
            try:
                return cls(_checked(own), own=True)
            except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
                logger.warning(
                    "the response template of %r cannot be used, its chat template decides: %s",
                    expert,
                    one_line(str(error), 300),
                )
        found = detected(chat_template or "")
        if found is None:
            return None
        return cls(load_template(found), calls=calls_of(chat_template or ""))

    @classmethod
    def plain_call(cls) -> ResponseFormat:
        """The format of answers that are one call as JSON."""
        return cls(load_template(response_template(PLAIN_CALL.fields)), calls=PLAIN_CALL)

    @property
    def delimiters(self) -> tuple[str, ...]:
        """The texts between regions; of a pattern, its source without backslashes."""
        fields = self.template.fields.values()
        patterns = [each.pattern for f in fields for each in (f.open_re, f.close_re) if each is not None]
        return tuple(_ESCAPE.sub(r"\1", pattern) for pattern in patterns)

    def parser(self, prompt: str, budget: Budget, *, calls: bool) -> Any:
        """A parser of transformers for one answer, whose regions hold their plain text.

        Args:
            prompt: the rendered prompt; its end may have begun the answer.
            calls: False if the model was offered no tools: then what looks like a call is text.
        """
        from transformers.utils.chat_parsing import ResponseParser

        kept = {n: f for n, f in self.template.fields.items() if calls or role(n) != TOOL_CALLS}
        fields = {name: _plain(each, budget) for name, each in kept.items()}
        anchor = _Timed(self.template.start_anchor_re, budget)
        template = replace(self.template, fields=fields, start_anchor_re=anchor, defaults={})
        if not self.own:
            return ResponseParser(template, prefix=self.begun(prompt))
        # Without the anchor, transformers takes the whole prompt as the beginning of the answer.
        return ResponseParser(template, prefix=prompt if anchor.search(prompt, 0) else "")

    def begun(self, prompt: str) -> str:
        """The end of the prompt if it opens a region of reasoning, such as the `<think>` of Qwen3 and DeepSeek-R1."""
        end = prompt[-256:].rstrip()
        fields = self.template.fields
        opens = [fields[name].open_re for name in fields if role(name) == THINKING]
        matches = (found for each in opens for found in each.finditer(end, timeout=MOST_SECONDS))
        return next((found.group() for found in matches if found.end() == len(end)), "")

    def closing(self, prompt: str) -> str:
        """The text that ends the reasoning which a prompt has opened."""
        if not self.begun(prompt):
            return ""
        fields = self.template.fields
        literals = next((fields[n].close_literals for n in fields if role(n) == THINKING), None)
        return f"{literals[0]}\n\n" if literals else ""


def role(name: str) -> str | None:
    """What a field holds: content, thinking or tool calls; `None` is neither shown nor parsed."""
    return next((kind for start, kind in _ROLES.items() if name.startswith(start)), None)


def _plain(each: Any, budget: Budget) -> Any:
    """The field with its patterns timed; its value is the text of the region, and what its opening matched."""
    timed = {n: p and _Timed(p, budget) for n, p in (("open_re", each.open_re), ("close_re", each.close_re))}
    opening = {"opening": "{opening}", "groups": "{groups}"} if each.open_re is not None else {}
    settings = {"content": "text", "content_args": {"strip": False}, "optional": True, "repeats": True}
    return replace(
        each, **timed, **settings, join=None, transform={"body": "{content}", **opening}, transform_each=False
    )


def load_template(template: Any) -> Any:
    """The `ResponseTemplate` of a template as JSON."""
    from transformers.utils.chat_parsing.response_templates import load_response_template

    return load_response_template(template)


def _checked(template: Any) -> Any:
    """The template of a checkpoint. Raises ValueError, or what transformers raises for one that is malformed."""
    fields = template.get("fields") if isinstance(template, Mapping) else None
    if isinstance(fields, Mapping) and len(fields) > _MOST_FIELDS:
        raise ValueError(f"it has {len(fields)} fields; the most is {_MOST_FIELDS}")
    for text in _texts(template, 0):
        if len(text) > _MOST_PATTERN_CHARACTERS:
            raise ValueError(f"a text has {len(text):,} characters; the most is {_MOST_PATTERN_CHARACTERS:,}")
        counts = [max(int(n or 1) for n in found.groups()) for found in _COUNT.finditer(text)]
        if math.prod(max(count, 1) for count in counts) > _MOST_REPEATS:
            raise ValueError(f"a pattern repeats more than {_MOST_REPEATS:,} times: use + or *")
    return load_template(template)


def _texts(value: Any, depth: int) -> Iterator[str]:
    if depth > 10:
        raise ValueError("it is nested more than 10 deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each, depth + 1)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, depth + 1)
