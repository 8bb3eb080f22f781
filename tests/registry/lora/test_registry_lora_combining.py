"""Adapters that a composed expert cannot use are refused when it is registered or checked, with the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from model_files import write_adapter, write_model

from registry.composed import FILE, Composed
from registry.digest import identity
from registry.documents import parse_document
from registry.errors import InvalidSpec
from registry.lora.combining import OWN_ADAPTER
from registry.reconcile import apply, check, plan
from registry.spec import ExpertSpec
from registry.store import Registry

ALORA = {"alora_invocation_tokens": [3, 4]}
MEMBERS = """\
experts:
  - {name: smol, kind: model, source: base}
  - {name: plain, kind: adapter, base: smol, source: plain}
  - {name: other, kind: adapter, base: smol, source: other}
  - {name: activated, kind: adapter, base: smol, source: activated}
"""
REASON = r"the adapter 'activated': it acts from its invocation tokens on \(aLoRA\)"


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    write_model(tmp_path / "base")
    write_adapter(tmp_path / "plain", rank=2)
    write_adapter(tmp_path / "other", rank=3)
    write_adapter(tmp_path / "activated", **ALORA)


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as opened:
        yield opened


def problems_of(text: str, folder: Path) -> list[str]:
    """What `coe config check` finds."""
    return [problem.message for problem in check(parse_document(text, folder / "e.yaml"), {}).problems]


def artifact(folder: Path, architecture: str, *members: str, own: dict[str, Any] | None = None) -> None:
    """A trained composition; `own` is the config of its own adapter."""
    found = check(parse_document(MEMBERS, folder / "e.yaml"), {}).experts
    known = {name: identity(found[name], found) for name in members}
    (folder / "trained").mkdir()
    (folder / "trained" / FILE).write_text(json.dumps(Composed(architecture, known, {}).document()))
    if own is not None:
        write_adapter(folder / "trained" / OWN_ADAPTER, **own)


def entry(architecture: str, *members: str, **fields: Any) -> str:
    stated = {"name": "it", "kind": "composed", "architecture": architecture, "members": [*members], **fields}
    return f"{MEMBERS}  - {json.dumps(stated)}\n"


@pytest.mark.parametrize("members", [("activated", "plain"), ("plain", "activated")])
@pytest.mark.parametrize("architecture", ["logits", "lora-mix"])
def test_members_in_one_loop_are_no_alora(tmp_path: Path, architecture: str, members: tuple[str, ...]) -> None:
    [problem] = problems_of(entry(architecture, *members), tmp_path)
    assert problem.startswith(f"'it': '{architecture}' cannot use the adapter 'activated': it acts from its invocation")
    assert problems_of(entry(architecture, "plain", "other"), tmp_path) == []  # of different ranks


@pytest.mark.parametrize(
    ("architecture", "members", "own", "refused"),
    [
        ("mot", ("plain", "activated"), None, "adapter 'activated'"),
        ("cache", ("activated", "plain"), None, "adapter 'activated'"),
        ("cache", ("activated", "plain"), {}, None),
        ("cache", ("plain", "other"), ALORA, "adapter in .*trained/adapter"),
        ("cache", ("plain", "activated"), None, None),
        ("notes", ("activated", "plain"), None, None),
        ("notes", ("plain", "activated"), None, None),
    ],
    ids=["mot", "cache", "own", "own alora", "cache peer", "notes", "notes peer"],
)
def test_an_alora_where_it_cannot_act(
    tmp_path: Path, architecture: str, members: tuple[str, ...], own: dict[str, Any] | None, refused: str | None
) -> None:
    artifact(tmp_path, architecture, *members, own=own)
    problems = problems_of(entry(architecture, *members, source="trained"), tmp_path)
    assert len(problems) == (0 if refused is None else 1)
    for problem in problems:
        assert problem.startswith(f"'it': '{architecture}' cannot use the ") and "(aLoRA)" in problem
        assert re.search(refused or "", problem)


def test_a_registered_composition_is_checked_when_a_member_changes(registry: Registry, tmp_path: Path) -> None:
    mixed = entry("lora-mix", "plain", "other", settings={"gate": "arrow"})
    apply(plan(parse_document(mixed, tmp_path / "e.yaml"), registry), registry)
    member = parse_document(
        "experts:\n- {name: other, kind: adapter, base: smol, source: other}\n", tmp_path / "e.yaml"
    )
    write_adapter(tmp_path / "other", rank=4)
    assert [step.action for step in plan(member, registry).steps] == ["update"]
    write_adapter(tmp_path / "other", **ALORA)
    with pytest.raises(InvalidSpec, match="the registered 'it' needs 'other': 'it': 'lora-mix' cannot use the adapter"):
        plan(member, registry)


def test_a_trained_composition_needs_the_contents_it_was_trained_with(registry: Registry, tmp_path: Path) -> None:
    artifact(tmp_path, "notes", "smol", "other")
    text = entry("notes", "smol", "other", source="trained")
    apply(plan(parse_document(text, tmp_path / "e.yaml"), registry), registry)
    member = parse_document(
        "experts:\n- {name: other, kind: adapter, base: smol, source: other}\n", tmp_path / "e.yaml"
    )
    write_adapter(tmp_path / "other", rank=4)
    with pytest.raises(InvalidSpec, match="the registered 'it' needs 'other': it was trained with another 'other'"):
        plan(member, registry)


def test_files_that_are_not_here_are_not_checked(registry: Registry, tmp_path: Path) -> None:
    apply(plan(parse_document(MEMBERS, tmp_path / "e.yaml"), registry), registry)
    (tmp_path / "activated").rename(tmp_path / "away")
    text = "experts:\n- {name: it, kind: composed, architecture: logits, members: [plain, activated]}\n"
    [described] = [step.spec for step in plan(parse_document(text, tmp_path / "e.yaml"), registry).steps]
    assert isinstance(described, ExpertSpec) and described.members == ("plain", "activated")
    (tmp_path / "away").rename(tmp_path / "activated")
    with pytest.raises(InvalidSpec, match=REASON):
        plan(parse_document(text, tmp_path / "e.yaml"), registry)
