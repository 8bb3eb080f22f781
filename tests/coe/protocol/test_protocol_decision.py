"""A decision as JSON and back, with numbers that JSON lacks."""

from __future__ import annotations

import json
import math
import struct

import pytest

from coe.protocol.decision import decision_document, decision_from, json_number
from routers.base import RoutingDecision

DECISION = RoutingDecision(
    ("sql", "base"),
    weights=(0.7, 0.1 + 0.2),
    scores=(1 / 3, -math.inf),
    confidence=0.9,
    label="code",
    abstained=True,
    reason="no expert is confident",
    truncated=True,
    quality=(5e-324, math.nan),
)


def test_a_decision_survives_json_bit_by_bit() -> None:
    text = json.dumps(decision_document(DECISION), allow_nan=False)
    read = decision_from(json.loads(text))
    assert decision_document(read) == decision_document(DECISION)
    assert (read.experts, read.weights, read.scores) == (DECISION.experts, DECISION.weights, DECISION.scores)
    assert read.quality[0] == 5e-324 and math.isnan(read.quality[1])
    assert (read.label, read.abstained, read.reason, read.truncated) == ("code", True, "no expert is confident", True)


def test_every_field_is_in_the_document() -> None:
    assert decision_document(DECISION).keys() == set(RoutingDecision.__dataclass_fields__)


def test_documents_of_earlier_versions_lack_what_came_later() -> None:
    document = decision_document(DECISION)
    del document["quality"], document["truncated"]
    read = decision_from(document)
    assert read.quality == () and read.truncated is False


@pytest.mark.parametrize("field", ["experts", "weights", "scores", "confidence"])
def test_a_damaged_document_is_refused(field: str) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        decision_from({**decision_document(DECISION), field: None})


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("experts", "sql", TypeError),
        ("experts", ["sql", 3], TypeError),
        ("weights", "12", TypeError),
        ("weights", [True, 1.0], TypeError),
        ("weights", [1.0], ValueError),
        ("scores", [0.1, 0.2, 0.3], ValueError),
        ("scores", ["much", 0.1], ValueError),
        ("quality", [0.5], ValueError),
        ("quality", "0.5", TypeError),
        ("confidence", [0.9], TypeError),
        ("label", 3, TypeError),
        ("abstained", "no", TypeError),
        ("reason", None, TypeError),
        ("truncated", 1, TypeError),
    ],
)
def test_a_field_of_a_wrong_type_or_length_is_named(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="much" if value == ["much", 0.1] else field):
        decision_from({**decision_document(DECISION), field: value})


@pytest.mark.parametrize("value", [0.1, -0.0, 1e308, math.inf, -math.inf, math.nan])
def test_float_of_a_number_is_the_number(value: float) -> None:
    written = json_number(value)
    assert written is not None and struct.pack("d", float(written)) == struct.pack("d", value)
    assert json_number(None) is None
