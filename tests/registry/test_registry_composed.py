from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.composed import FILE, Composed, changed_member, read_composed
from registry.describe import describe
from registry.digest import check_files, identity
from registry.errors import DigestMismatch, SourceError
from registry.spec import ExpertSpec, Kind, Price

BASE = ExpertSpec(
    name="base", kind=Kind.MODEL, source="fake://echo", parameters_total=100, parameters_active=100, context_length=64,
    digest="sha256:b", price=Price(input_usd_per_mtok=1, output_usd_per_mtok=5),
)  # fmt: skip
TUNED = ExpertSpec(
    name="tuned", kind=Kind.ADAPTER, base="base", source="fake://echo", parameters_total=5, parameters_active=105,
    context_length=32, digest="sha256:t", price=Price(input_usd_per_mtok=2, output_usd_per_mtok=3),
)  # fmt: skip
EXPERTS = {"base": BASE, "tuned": TUNED}


def artifact(folder: Path, **changes: Any) -> Path:
    members = {name: identity(EXPERTS[name], EXPERTS) for name in ("base", "tuned")}
    folder.mkdir()
    (folder / FILE).write_text(json.dumps(Composed("notes", members, {"reads": "answer"}).document() | changes))
    (folder / "weights.safetensors").write_bytes(b"weights")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"lora")
    return folder


def draft(source: object, **fields: Any) -> ExpertSpec:
    return ExpertSpec(
        **{"name": "both", "kind": "composed", "source": str(source), "members": ("base", "tuned")} | fields
    )


def test_an_artifact_states_how_members_are_combined(tmp_path: Path) -> None:
    spec = describe(draft(artifact(tmp_path / "a"), architecture="notes"), experts=EXPERTS)
    assert spec.settings == {"reads": "answer"} and spec.is_staged
    assert spec.trained_with == {"base": "sha256:b", "tuned": "sha256:t on sha256:b"}
    assert [record.name for record in spec.files] == [
        "adapter/adapter_model.safetensors", FILE, "weights.safetensors",
    ]  # fmt: skip
    assert ExpertSpec.model_validate_json(spec.model_dump_json()) == spec
    check_files(spec, tmp_path / "a")
    (tmp_path / "a" / "adapter" / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(DigestMismatch, match=r"adapter/adapter_model.safetensors"):
        check_files(spec, tmp_path / "a", fresh=True)


def test_members_give_size_context_and_price(tmp_path: Path) -> None:
    spec = describe(draft(artifact(tmp_path / "a"), architecture="notes"), experts=EXPERTS)
    assert (spec.parameters_total, spec.parameters_active, spec.context_length) == (105, 205, 32)
    assert spec.price == Price(input_usd_per_mtok=2, output_usd_per_mtok=5), "the highest of each"
    able = {**EXPERTS, "base": BASE.model_copy(update={"capabilities": frozenset({"chat", "tools"})})}
    assert describe(draft(tmp_path / "a"), experts=able).capabilities == {"chat", "tools"}, "as its first member"
    one_pass = draft("", members=("tuned", "other"), architecture="lora-mix")
    both = {**EXPERTS, "other": TUNED.model_copy(update={"name": "other", "parameters_total": 7})}
    assert describe(one_pass, experts=both).parameters_active == 112, "the base once"
    stated = draft("", architecture="logits", context_length=16, settings={"mode": "mean"})
    assert describe(stated, experts=EXPERTS).context_length == 16
    other = describe(stated.model_copy(update={"settings": {"mode": "proxy"}}), experts=EXPERTS)
    assert other.digest != describe(stated, experts=EXPERTS).digest


def test_only_the_first_member_of_a_staged_expert_is_in_memory_with_it(tmp_path: Path) -> None:
    other = {**EXPERTS, "far": ExpertSpec(name="far", kind=Kind.MODEL, source="fake://echo")}
    staged = draft("s", members=("tuned", "far"), architecture="notes")
    assert staged.residency_keys(other) == ("base",)
    assert draft("s", members=("tuned", "far"), architecture="mot").residency_keys(other) == ("base", "far")


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({"format": 2}, {}, "format 2; this version reads 1"),
        ({"members": []}, {}, "members are 1 to 64"),
        ({"members": [{"name": "base", "digest": 3}]}, {}, "members are 1 to 64"),
        ({"members": [{"name": "base", "digest": "d"}] * 2}, {}, "given twice"),
        ({"settings": None}, {}, "needs `architecture`"),
        ({}, {"architecture": "cache"}, "is of the architecture 'notes', not 'cache'"),
        ({}, {"members": ("tuned", "base")}, "trained with the members base, tuned, in this order"),
        ({}, {"settings": {"reads": "prompt"}}, "leave `settings` out"),
    ],
)
def test_an_artifact_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        describe(draft(artifact(tmp_path / "a", **changes), **fields), experts=EXPERTS)


def test_other_contents_of_a_member_are_refused(tmp_path: Path) -> None:
    changed = {**EXPERTS, "tuned": TUNED.model_copy(update={"digest": "sha256:new"})}
    with pytest.raises(SourceError, match="trained with another 'tuned'.*now sha256:new on sha256:b"):
        describe(draft(artifact(tmp_path / "a"), architecture="notes"), experts=changed)
    trained = read_composed(tmp_path / "a").members
    assert changed_member(trained, EXPERTS) is None
    assert "restore that version" in str(
        changed_member(trained, {**EXPERTS, "base": BASE.model_copy(update={"digest": "x"})})
    )


def test_a_changed_member_is_named_with_the_first_digits_of_the_digests(tmp_path: Path) -> None:
    long = {name: f"sha256:{letter * 64}" for name, letter in (("base", "b"), ("tuned", "c"))}
    experts = {name: EXPERTS[name].model_copy(update={"digest": digest}) for name, digest in long.items()}
    trained = {name: identity(spec, experts) for name, spec in experts.items()}
    other = {**experts, "base": BASE.model_copy(update={"digest": f"sha256:{'d' * 64}"})}
    assert changed_member({"tuned": trained["tuned"]}, other) == (
        "it was trained with another 'tuned' (sha256:cccccccccccc on sha256:bbbbbbbbbbbb; now sha256:cccccccccccc on "
        "sha256:dddddddddddd): restore that version, or train the composition again"
    )


def test_a_missing_or_damaged_artifact(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no folder"):
        describe(draft(tmp_path / "none", architecture="notes"), experts=EXPERTS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"has no composed\.json"):
        describe(draft(tmp_path / "empty", architecture="notes"), experts=EXPERTS)
    (tmp_path / "empty" / FILE).write_text("[" * 100_000)
    with pytest.raises(SourceError, match="cannot be read as JSON"):
        describe(draft(tmp_path / "empty", architecture="notes"), experts=EXPERTS)
