from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from registry.errors import UnknownExpert
from registry.spec import ExpertSpec, Kind, Price, residency_names


def spec(**fields: Any) -> ExpertSpec:
    return ExpertSpec(**{"name": "a", "kind": "model", "source": "x"} | fields)


@pytest.mark.parametrize("name", ["auto", "coe", "coe/fast"])
def test_reserved_names_address_policies(name: str) -> None:
    with pytest.raises(ValidationError, match=r"is reserved: 'auto' and 'coe/\.\.\.' address routing policies"):
        spec(name=name)


@pytest.mark.parametrize("name", ["", "-a", "a b", "a@1", "a" * 129, "ä"])
def test_names_are_simple(name: str) -> None:
    with pytest.raises(ValidationError, match="is not a name: letters, digits"):
        spec(name=name)


@pytest.mark.parametrize("name", ["a", "org/Model-7B.v2_x", "coex", "automatic"])
def test_good_names(name: str) -> None:
    assert spec(name=name).name == name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "adapter"}, "an adapter needs `base`"),
        ({"base": "b"}, "`base` is for adapters; this expert is of kind 'model'"),
        ({"kind": "composed", "source": "", "members": ["a"]}, "at least two `members`"),
        ({"members": ["a", "b"]}, "`members` is for composed experts"),
        ({"source": ""}, "`source` is required"),
        ({"kind": "composed", "source": "", "members": ["b", "b"]}, "given twice: b"),
        ({"kind": "composed", "source": "https://h/v1", "members": ["b", "c"]}, "`coe latent train` wrote"),
        ({"kind": "composed", "source": "", "members": ["b", "c"], "architecture": "notes"}, "is trained: `source` is"),
        ({"settings": {"top_k": 2}}, "`settings` is for composed experts"),
        ({"kind": "composed", "source": "", "members": ["b", "c"], "settings": {"x": float("nan")}}, "JSON values"),
        ({"kind": "composed", "source": "", "members": ["b", "c"], "settings": {"x": "y" * 65536}}, "at most 65,536"),
        ({"kind": "remote"}, "a remote expert's source is an http(s) URL"),
        ({"source": "https://h/v1"}, "an expert at a URL is of kind 'remote', not 'model'"),
        ({"price": {"input_usd_per_mtok": float("nan"), "output_usd_per_mtok": 0}}, "finite"),
        ({"context_length": 0}, "greater than 0"),
        ({"color": "red"}, "Extra inputs"),
        ({"kind": "adapter", "base": "b", "engine": "x"}, "runs on its base's engine: leave `engine` out"),
        ({"kind": "composed", "source": "", "members": ["b", "c"], "engine": "x"}, "the engines of its members"),
        ({"engine": ""}, "at least 1 character"),
        ({"tool_call_parser": "x" * 65}, "at most 64 characters"),
        ({"kind": "remote", "source": "https://h/v1", "tool_call_parser": "hermes"}, "are for models and adapters"),
        ({"kind": "embedding", "reasoning_parser": "qwen3"}, "are for models and adapters, not kind 'embedding'"),
    ],
)
def test_fields_must_fit_the_kind(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        spec(**fields)


def test_the_parser_auto_is_none() -> None:
    assert spec(tool_call_parser="auto", reasoning_parser="auto") == spec()
    assert spec(tool_call_parser="hermes").tool_call_parser == "hermes"


def test_references_and_residency() -> None:
    adapter = spec(kind=Kind.ADAPTER, base="b", version=3)
    assert (adapter.ref, adapter.residency_keys({}), adapter.references) == ("a@3", ("b",), ("b",))
    composed = spec(kind=Kind.COMPOSED, source="", members=("x", "c", "b", "y"))
    assert (composed.ref, composed.references) == ("a", ("x", "c", "b", "y"))
    x, y = (spec(name=name, kind=Kind.ADAPTER, base="b") for name in "xy")
    experts = {"x": x, "y": y, "b": spec(name="b"), "c": spec(name="c"), "a": composed}
    assert composed.residency_keys(experts) == ("b", "c"), "two adapters need their base once"
    assert composed.residency(experts) == "b+c" and residency_names("b+c") == ("b", "c")
    other = spec(kind=Kind.COMPOSED, source="", members=("c", "x"))
    assert other.residency_keys(experts) == ("c", "b") and other.residency(experts) == "b+c", "the same weights"
    assert x.residency(experts) == spec(name="b").residency(experts) == "b"


def test_specs_are_frozen_and_survive_json() -> None:
    full = spec(price=Price(input_usd_per_mtok=0.1, output_usd_per_mtok=0.3), tags={"x", "y"})
    with pytest.raises(ValidationError, match="frozen"):
        full.name = "b"  # type: ignore[misc]
    assert ExpertSpec.model_validate_json(full.model_dump_json()) == full
    assert full.model_dump(mode="json")["tags"] == ["x", "y"]


def test_unknown_experts_come_with_suggestions() -> None:
    error = UnknownExpert("smoll", ["smol", "gemma"], where="the snapshot")
    assert error.suggestions == ("smol",)
    assert str(error).startswith("'smoll' is not in the snapshot; did you mean 'smol'?")
    assert "did you mean" not in str(UnknownExpert("zzz", ["smol"]))


@pytest.mark.parametrize(
    "fields",
    [
        {"source": "http://user:hunter22@host/v1"},
        {"source": "HTTPS://user:hunter22@host/v1"},
        {"source": "https://hunter22@host/v1"},
        {"source": "https://user:hunter22#?@host/v1"},
        {"source": " https://user:hunter22@host/v1"},
        {"source": "https://host/v1", "model": "https://user:hunter22@host/m"},
        {"kind": Kind.MODEL, "engine": "mine", "source": "grpc://user:hunter22@host"},
    ],
)
def test_no_url_has_a_password(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="user name or password is not accepted") as caught:
        ExpertSpec(**{"name": "far", "kind": Kind.REMOTE, **fields})
    assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize("source", ["hf://org/name@main", "hf://name@v1", "https://host/v1", "fake://echo"])
def test_an_at_sign_elsewhere_is_no_password(source: str) -> None:
    kind = Kind.REMOTE if source.startswith("https") else Kind.MODEL
    assert ExpertSpec(name="x", kind=kind, source=source).source == source
    assert ExpertSpec(name="x", kind=Kind.REMOTE, source="https://host/v1", model="org/m@2").model == "org/m@2"
