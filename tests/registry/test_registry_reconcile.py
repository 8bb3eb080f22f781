from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from model_files import HIDDEN, llama_tensors, write_adapter, write_gguf, write_model

from registry.documents import parse_document
from registry.errors import InvalidSpec, RegistryError
from registry.reconcile import RegistryPlan, apply, plan
from registry.spec import COMPOSED_ARCHITECTURES, ExpertSpec, Kind
from registry.store import Registry


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as opened:
        yield opened


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    write_model(tmp_path / "base")
    for name in ("sql", "dates"):
        write_adapter(tmp_path / name)


GOOD = """\
experts:
  - {name: sql, kind: adapter, base: smol, source: sql}
  - {name: smol, kind: model, source: base}
  - {name: dates, kind: adapter, base: smol, source: dates, tags: [a]}
"""


def plan_of(text: str, registry: Registry, folder: Path, **options: Any) -> RegistryPlan:
    return plan(parse_document(text, folder / "e.yaml"), registry, **options)


def actions(planned: RegistryPlan) -> list[str]:
    return [f"{step.action} {step.name}" for step in planned.steps]


def problems_of(text: str, registry: Registry, folder: Path, **options: Any) -> list[str]:
    with pytest.raises(InvalidSpec) as caught:
        plan_of(text, registry, folder, **options)
    return [str(problem).removeprefix(f"{folder}/") for problem in caught.value.problems]


def test_adapters_follow_their_bases_whatever_the_order(registry: Registry, tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    planned = plan_of(GOOD, registry, tmp_path, on_expert=lambda *args: told.append(args))
    assert told == [("smol", 3), ("sql", 3), ("dates", 3)]
    assert actions(planned) == ["add sql", "add smol", "add dates"]
    assert registry.list() == []  # planning changes nothing
    assert [spec.ref for spec in apply(planned, registry)] == ["sql@1", "smol@1", "dates@1"]
    sql = registry.get("sql")
    assert (sql.source, sql.context_length) == (str(tmp_path / "sql"), 64)
    assert sql.digest is not None and sql.price is not None


def test_capabilities_of_a_file_add_to_those_of_the_kind(registry: Registry, tmp_path: Path) -> None:
    text = """\
experts:
  - {name: plain, kind: model, source: base}
  - {name: caller, kind: model, source: base, capabilities: [tools]}
  - {name: both, kind: model, source: base, capabilities: [chat, tools]}
  - {name: vectors, kind: embedding, source: base}
  - {name: more, kind: embedding, source: base, capabilities: [multilingual]}
"""
    apply(plan_of(text, registry, tmp_path), registry)
    assert {spec.name: set(spec.capabilities) for spec in registry.list()} == {
        "plain": {"chat"},
        "caller": {"chat", "tools"},
        "both": {"chat", "tools"},
        "vectors": {"embedding"},
        "more": {"embedding", "multilingual"},
    }
    again = plan_of(text, registry, tmp_path)
    assert {step.action for step in again.steps} == {"unchanged"}


def test_a_registered_spec_keeps_the_capabilities_that_it_was_registered_with(registry: Registry) -> None:
    spec = ExpertSpec(name="old", kind=Kind.REMOTE, source="https://host/v1", capabilities=frozenset({"tools"}))
    registry.add(spec)
    assert registry.get("old").capabilities == {"tools"}


def test_applying_again_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    apply(plan_of(GOOD, registry, tmp_path), registry)
    again = plan_of(GOOD, registry, tmp_path)
    assert actions(again) == ["unchanged sql", "unchanged smol", "unchanged dates"]
    assert [spec.version for spec in apply(again, registry)] == [1, 1, 1]
    assert registry.snapshot().version == 1


def test_updates_name_the_fields(registry: Registry, tmp_path: Path) -> None:
    apply(plan_of(GOOD, registry, tmp_path), registry)
    write_adapter(tmp_path / "sql", rank=1)
    planned = plan_of(GOOD.replace("tags: [a]", "tags: [b]"), registry, tmp_path)
    assert actions(planned) == ["update sql", "unchanged smol", "update dates"]
    assert planned.steps[2].changes == ("tags",)
    assert set(planned.steps[0].changes) == {
        "parameters_total", "parameters_active", "size_bytes", "price", "digest", "files",
    }  # fmt: skip
    assert [spec.ref for spec in apply(planned, registry)] == ["sql@2", "smol@1", "dates@2"]


def test_removal_only_with_prune(registry: Registry, tmp_path: Path) -> None:
    apply(plan_of(GOOD, registry, tmp_path), registry)
    only_base = "experts:\n- {name: smol, kind: model, source: base}\n"
    assert actions(plan_of(only_base, registry, tmp_path)) == ["unchanged smol"]
    planned = plan_of(only_base, registry, tmp_path, prune=True)
    assert actions(planned) == ["unchanged smol", "remove dates", "remove sql"]
    apply(planned, registry)
    assert [spec.name for spec in registry.list()] == ["smol"]


def test_pruning_a_base_that_the_file_needs_is_a_problem(registry: Registry, tmp_path: Path) -> None:
    apply(plan_of(GOOD, registry, tmp_path), registry)
    only_sql = "experts:\n- {name: sql, kind: adapter, base: smol, source: sql}\n"
    assert actions(plan_of(only_sql, registry, tmp_path)) == ["unchanged sql"]
    (problem,) = problems_of(only_sql, registry, tmp_path, prune=True)
    assert problem.startswith("e.yaml:2: experts[0].base: 'smol' is not in ")


def test_every_problem_of_a_file_is_reported_at_once(registry: Registry, tmp_path: Path) -> None:
    registry.add(ExpertSpec(name="gemma", kind=Kind.MODEL, source="fake://echo"))
    write_adapter(tmp_path / "wide", {"model.layers.0.self_attn.q_proj": (99, HIDDEN)})
    write_gguf(tmp_path / "odd.gguf", "rwkv7")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    truncated = write_model(tmp_path / "truncated") / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-1])
    text = """\
experts:
  - {name: on-broken, kind: adapter, base: truncated, source: sql}
  - {name: smol, kind: model, source: base}
  - {name: auto, kind: modle, source: base}
  - {name: wide, kind: adapter, base: smol, source: wide}
  - {name: lost, kind: adapter, base: gema, source: sql}
  - name: smol
    kind: model
    source: base
  - {name: absent, kind: model, source: nowhere}
  - {name: odd, kind: model, source: odd.gguf}
  - {name: pickled, kind: model, source: pickled}
  - name: truncated
    kind: model
    source: truncated
  - {name: gpt, kind: remote, source: "https://host/v1"}
  - {name: pair, kind: composed, members: [smol, gma]}
  - {name: smol2, kind: model, source: base, version: 3, colour: red}
  - {name: smol3, kind: model, source: base, version: 3}
  - {name: on-auto, kind: adapter, base: auto, source: sql}
  - just a string
  - {name: scheme, kind: model, source: "s3://bucket/x"}
"""
    expected = [
        ("e.yaml:4: experts[2].name", "'auto' is reserved"),
        (
            "e.yaml:4: experts[2].kind",
            "input should be 'model', 'adapter', 'remote', 'embedding' or 'composed', got",
        ),
        ("e.yaml:5: experts[3].source", "module model.layers.0.self_attn.q_proj needs a weight of shape (99, 8)"),
        ("e.yaml:6: experts[4].base", "'gema' is not in this file or the registry; did you mean 'gemma'?"),
        ("e.yaml:7: experts[5].name", "'smol' is given twice; the first is on line 3"),
        ("e.yaml:10: experts[6].source", "there is no folder"),
        ("e.yaml:11: experts[7].source", "is of architecture 'rwkv7', which transformers cannot load"),
        ("e.yaml:12: experts[8].source", "pickles can run any code"),
        ("e.yaml:15: experts[9].source", "is truncated"),
        ("e.yaml:16: experts[10].source", "a remote expert needs `context_length`"),
        ("e.yaml:17: experts[11].members", "'gma' is not in this file or the registry; did you mean 'gemma'?"),
        ("e.yaml:18: experts[12].colour", "is not a known field"),
        ("e.yaml:19: experts[13].version", "is assigned by the registry; leave it out"),
        ("e.yaml:21: experts[15]", "should be a mapping of fields, got 'just a string'"),
        ("e.yaml:22: experts[16].source", "s3:// is not a source"),
    ]
    found = problems_of(text, registry, tmp_path)
    for problem, (place, message) in zip(found, expected, strict=True):
        assert problem.startswith(f"{place}: ") and message in problem


def test_an_adapter_of_a_broken_base_is_still_looked_for(registry: Registry, tmp_path: Path) -> None:
    text = """\
experts:
  - {name: a, kind: adapter, base: smol, source: nowhere}
  - {name: smol, kind: model, source: nowhere-either}
"""
    found = problems_of(text, registry, tmp_path)
    assert [problem[:28] for problem in found] == ["e.yaml:2: experts[0].source:", "e.yaml:3: experts[1].source:"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "e.yaml:1: is empty; expected experts"),
        ("experts: []", "e.yaml:1: experts: list should have at least 1 item after validation, not 0, got []"),
        ("experts: 3", "e.yaml:1: experts: should be a list, got 3"),
        ("expert: []", "e.yaml:1: experts: is required"),
        ("- a", "e.yaml:1: should be a mapping of fields, got ['a']"),
    ],
)
def test_files_of_another_form(registry: Registry, tmp_path: Path, text: str, problem: str) -> None:
    assert problems_of(text, registry, tmp_path)[0] == problem


def test_a_base_in_the_registry_will_do(registry: Registry, tmp_path: Path) -> None:
    apply(plan_of(GOOD, registry, tmp_path), registry)
    planned = plan_of("experts:\n- {name: new, kind: adapter, base: smol, source: sql}\n", registry, tmp_path)
    assert actions(planned) == ["add new"]


def test_a_base_must_be_a_model(registry: Registry, tmp_path: Path) -> None:
    (problem,) = problems_of(GOOD + "  - {name: odd, kind: adapter, base: sql, source: dates}\n", registry, tmp_path)
    assert problem.startswith("e.yaml:5: experts[3].base: the base of 'odd' must be a model, but 'sql' is of kind 'ad")


def test_a_changed_base_must_still_fit_what_is_registered_on_it(registry: Registry, tmp_path: Path) -> None:
    apply(plan_of(GOOD, registry, tmp_path), registry)
    registry.add(ExpertSpec(name="fake", kind=Kind.ADAPTER, base="smol", source="fake://echo"))
    base = "experts:\n- {name: smol, kind: model, source: base}\n"
    tensors = llama_tensors()
    write_model(tmp_path / "base", {name: tensor * 2 for name, tensor in tensors.items()})
    assert actions(plan_of(base, registry, tmp_path)) == ["update smol"]
    write_model(tmp_path / "base", {name: tensor[:, :4] for name, tensor in tensors.items()})
    found = problems_of(base, registry, tmp_path)
    assert len(found) == 2
    assert all(problem.startswith("e.yaml:2: experts[0].source: the registered '") for problem in found)
    assert "needs 'smol'" in found[0] and "does not fit its base" in found[0]


def test_remote_and_composed_experts(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """\
experts:
  - {name: pair, kind: composed, architecture: pairs, members: [gpt, paid]}
  - {name: gpt, kind: remote, source: "https://host/v1", context_length: 1000}
  - name: paid
    kind: remote
    source: https://host/v1
    context_length: 1000
    price: {input_usd_per_mtok: 1, output_usd_per_mtok: 2}
"""
    [refused] = problems_of(text, registry, tmp_path)
    assert refused.startswith("e.yaml:2: experts[0].kind: no engine serves the composed expert 'pair'")
    monkeypatch.setitem(COMPOSED_ARCHITECTURES, "pairs", "fake")
    planned = plan_of(text, registry, tmp_path)
    assert planned.warnings == ("gpt: has no price, so routing cannot weigh its cost; add `price`",)
    assert [spec.name for spec in apply(planned, registry)] == ["pair", "gpt", "paid"]


def test_a_registry_that_changed_meanwhile(registry: Registry, tmp_path: Path) -> None:
    apply(plan_of(GOOD, registry, tmp_path), registry)
    planned = plan_of("experts:\n- {name: x, kind: model, source: base}\n", registry, tmp_path, prune=True)
    registry.add(ExpertSpec(name="late", kind=Kind.ADAPTER, base="smol", source="fake://echo"))
    with pytest.raises(RegistryError, match="'smol' cannot be removed: late need it"):
        apply(planned, registry)
    assert len(registry.list()) == 4
