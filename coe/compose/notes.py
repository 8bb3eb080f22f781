"""Notes: what the caller should know about how an answer came about, in the order of the calls."""

from __future__ import annotations

from collections.abc import Iterator

from coe.answers.refusals import refuses
from coe.answers.thinking import without_thoughts
from coe.compose.base import Done
from coe.seam import public_text
from coe.types import Answer, Failure


def failures(done: Done) -> tuple[str, ...]:
    """`b failed: DeadlineExceeded: ...` for each failure, without repetitions."""
    lines = (f"{o.expert} failed: {public_text(o.error)}" for _, o in in_order(done) if isinstance(o, Failure))
    return tuple(dict.fromkeys(lines))


def has_refused(answer: Answer) -> bool:
    """Whether an answer refuses or says that it does not know, after its thinking text."""
    return not answer.tool_calls and refuses(without_thoughts(answer.text))


def refusals(done: Done) -> tuple[str, ...]:
    """`b gave no answer (refusal)` for each expert that refused or does not know, without repetitions."""
    refused = (o.expert for _, o in in_order(done) if isinstance(o, Answer) and has_refused(o))
    return tuple(f"{expert} gave no answer (refusal)" for expert in dict.fromkeys(refused))


def emptiness(answer: Answer) -> tuple[str, ...]:
    """`b gave an empty answer`, if a final answer is blank and calls no tools."""
    empty = not (answer.text.strip() or answer.tool_calls or answer.value is not None)
    return (f"{answer.expert} gave an empty answer",) if empty else ()


def in_order(done: Done) -> Iterator[tuple[str, Answer | Failure]]:
    """The outcomes by round and position: they complete in a different order online and in a batch."""
    return iter(sorted(done.items(), key=lambda named: _place(named[0])))


def _place(call: str) -> list[tuple[bool, int, str]]:
    """Numbers by value, before words."""
    return [(False, int(part), "") if part.isdecimal() else (True, 0, part) for part in call.split(".")]
