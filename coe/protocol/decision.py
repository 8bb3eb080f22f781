"""A routing decision as a JSON document: in the decision log, in HTTP responses and in the part files of a batch.

Equal documents are decisions that are equal bit by bit. JSON has no NaN and no infinity; they are written as strings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from routers.base import RoutingDecision


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
    }


def decision_from(document: Mapping[str, Any]) -> RoutingDecision:
    """The decision of a document; documents of earlier versions may lack `quality` and `truncated`.

    Raises:
        KeyError, TypeError, ValueError: the document is damaged.
    """
    return RoutingDecision(
        experts=tuple(document["experts"]),
        weights=tuple(map(float, document["weights"])),
        scores=tuple(map(float, document["scores"])),
        quality=tuple(map(float, document.get("quality", ()))),
        confidence=float(document["confidence"]),
        label=document["label"],
        abstained=document["abstained"],
        reason=document["reason"],
        truncated=document.get("truncated", False),
    )


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
