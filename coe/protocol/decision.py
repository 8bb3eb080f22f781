"""A routing decision as a JSON document: in the decision log, in HTTP responses and in the part files of a batch.

Equal documents are decisions that are equal bit by bit. JSON has no NaN and no infinity; they are written as strings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from routers.base import RoutingDecision

_T = TypeVar("_T")


def decision_document(decision: RoutingDecision) -> dict[str, Any]:
    """The decision as JSON values, one field for each field of `RoutingDecision`."""
    return {
        "experts": list(decision.experts),
        "weights": json_numbers(decision.weights),
        "scores": json_numbers(decision.scores),
        "quality": json_numbers(decision.quality),
        "confidence": json_number(decision.confidence),
        "label": decision.label,
        "abstained": decision.abstained,
        "reason": decision.reason,
        "truncated": decision.truncated,
        "fallback": decision.fallback,
    }


def decision_from(document: Mapping[str, Any]) -> RoutingDecision:
    """The decision of a document; documents of earlier versions may lack `quality`, `truncated` and `fallback`.

    Raises:
        KeyError: a field is missing.
        TypeError: a field has another type, such as a string in place of a list.
        ValueError: a string is no number, or a list has not one element for each expert.
    """
    experts = [_typed("experts", name, str) for name in _typed("experts", document["experts"], list)]
    return RoutingDecision(
        experts=tuple(experts),
        weights=_numbers("weights", document["weights"], len(experts)),
        scores=_numbers("scores", document["scores"], len(experts)),
        quality=_numbers("quality", document.get("quality", []), len(experts), may_be_empty=True),
        confidence=_number("confidence", document["confidence"]),
        label=None if document["label"] is None else _typed("label", document["label"], str),
        abstained=_typed("abstained", document["abstained"], bool),
        reason=_typed("reason", document["reason"], str),
        truncated=_typed("truncated", document.get("truncated", False), bool),
        fallback=_typed("fallback", document.get("fallback", False), bool),
    )


def _typed(name: str, value: Any, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {kind.__name__}, found {type(value).__name__}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"{name}: expected a number, found {type(value).__name__}")
    return float(value)


def _numbers(name: str, values: Any, length: int, *, may_be_empty: bool = False) -> tuple[float, ...]:
    numbers = tuple(_number(name, value) for value in _typed(name, values, list))
    if len(numbers) != length and not (may_be_empty and not numbers):
        raise ValueError(f"{name}: expected {length} numbers, one for each expert, found {len(numbers)}")
    return numbers


def json_numbers(values: Iterable[float]) -> list[float | str | None]:
    """`json_number` of each value."""
    return [json_number(value) for value in values]


def json_number(value: float | None) -> float | str | None:
    """A number as JSON: NaN and infinities as strings, all digits of others. `float()` reads every form back."""
    if value is None:
        return None
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
