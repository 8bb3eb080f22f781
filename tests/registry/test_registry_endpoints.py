"""Remote experts with several endpoints: what is accepted, what they are stored as, and what their identity is."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from registry.describe import describe
from registry.spec import ExpertSpec, Kind

A, B = {"url": "https://a/v1"}, {"url": "https://b/v1"}


def far(*endpoints: dict[str, Any], **fields: Any) -> ExpertSpec:
    return ExpertSpec(name="far", kind=Kind.REMOTE, context_length=100, endpoints=endpoints, **fields)


def test_the_source_is_the_first_endpoint_and_all_survive_json() -> None:
    spec = far({**A, "weight": 3, "key_env": "A_KEY"}, {**B, "model": "m", "max_in_flight": 4})
    assert spec.source == "https://a/v1" and spec.endpoints[0].weight == 3 and spec.endpoints[1].model == "m"
    assert ExpertSpec.model_validate_json(spec.model_dump_json()) == spec
    assert far(A, B).endpoints[1].weight == 1.0 and far(A, B).endpoints[1].max_in_flight is None


@pytest.mark.parametrize(
    ("endpoints", "fields", "match"),
    [
        ([{**A, "weight": 0}], {}, "greater than 0"),
        ([{**A, "weight": float("inf")}], {}, "finite"),
        ([{**A, "weight": "many"}], {}, "valid number"),
        ([{**A, "max_in_flight": 0}], {}, "greater than or equal to 1"),
        ([{**A, "key_env": "sk-1 2"}], {}, "pattern"),
        ([{"url": "ftp://a"}], {}, "not an http"),
        ([{"url": "https://u:hunter22@a/v1"}], {}, "user name or password is not accepted"),
        ([{"url": 5}], {}, "valid string"),
        ([{"weight": 1}], {}, "url"),
        ([{**A, "key": "sk-1"}], {}, "not permitted"),
        ([A, A], {}, "listed twice"),
        ([A] * 65, {}, "at most 64"),
        ([A, B], {"source": "https://c/v1"}, "leave `source` out"),
        ([A], {"kind": Kind.MODEL, "source": "https://a/v1"}, "kind 'remote'"),
    ],
)
def test_bad_endpoints_are_refused(endpoints: list[dict[str, Any]], fields: dict[str, Any], match: str) -> None:
    given = {"name": "far", "kind": Kind.REMOTE, "endpoints": endpoints, **fields}
    with pytest.raises(ValidationError, match=match) as caught:
        ExpertSpec(**given)
    assert "hunter22" not in str(caught.value)


def test_the_same_url_may_have_two_keys() -> None:
    assert len(far({**A, "key_env": "ONE"}, {**A, "key_env": "TWO"}).endpoints) == 2


def test_weights_keys_limits_and_order_are_no_part_of_the_identity() -> None:
    both = describe(far(A, B)).digest
    assert describe(far({**B, "weight": 7, "max_in_flight": 1}, {**A, "key_env": "K"})).digest == both
    assert describe(far(A, {**B, "model": "other"})).digest != both
    one = ExpertSpec(name="far", kind=Kind.REMOTE, context_length=100, source="https://a/v1")
    assert describe(far(A)).digest == describe(one).digest != both
