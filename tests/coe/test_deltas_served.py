"""Experts whose source is a delta: registered, checked, restored once, and served like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from delta_files import compressed
from tuned_experts import answers, save_experts

from coe.config import load_config
from coe.errors import WeightsError
from coe.experts import locate, open_snapshot
from coe.local import open_local
from registry.deltas.writing import Compression, write_delta
from registry.digest import digest_of, hash_files, identity
from registry.documents import load_document
from registry.errors import InvalidSpec, RegistryError, SourceError, UnknownExpert
from registry.reconcile import apply, plan
from registry.spec import ExpertSpec, Kind
from registry.store import Registry

DELTAS = """
experts:
  - {name: tuned, kind: model, source: delta, delta_base: base}
  - {name: base, kind: model, source: base}
  - {name: small, kind: adapter, base: base, source: adapter}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_experts(tmp_path_factory.mktemp("experts"))


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """The experts, with `tuned` as an exact delta."""
    root = Path(shutil.copytree(made, tmp_path / "service"))
    (root / "delta").mkdir()
    digest = digest_of(hash_files(root / "base"))
    write_delta(
        root / "tuned", root / "delta", Compression(), expert=digest_of(hash_files(root / "tuned")),
        base=root / "base", base_digest=digest,
    )  # fmt: skip
    (root / "experts.yaml").write_text(DELTAS)
    return root


async def test_it_answers_as_the_expert_and_is_restored_once(root: Path, made: Path, coe_home: Path) -> None:
    assert await answers(root / "files.yaml", "tuned") == await answers(made / "files.yaml", "tuned")
    [folder] = (coe_home / "restored").iterdir()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert (folder / "model.safetensors").read_bytes() == (root / "tuned" / "model.safetensors").read_bytes()
    await answers(root / "files.yaml", "tuned")
    assert [(folder / "model.safetensors").stat().st_mtime_ns] == [written]
    assert [each.name for each in (coe_home / "restored").iterdir()] == [folder.name]


def test_an_exact_delta_is_the_same_expert(root: Path, made: Path) -> None:
    """Routers and profiles of the expert stay valid, and its facts are those of what is restored."""
    before = open_snapshot(load_config(made / "files.yaml")).experts
    after = open_snapshot(load_config(root / "files.yaml")).experts
    assert identity(after["tuned"], after) == identity(before["tuned"], before)
    assert after["tuned"].digest != before["tuned"].digest == after["tuned"].restores
    facts = ("architecture", "parameters_total", "size_bytes", "context_length", "price")
    assert [getattr(after["tuned"], name) for name in facts] == [getattr(before["tuned"], name) for name in facts]
    assert after["tuned"].references == ("base",) and after["tuned"].residency(after) == "tuned"


def test_a_restored_file_that_is_cut_is_restored_again(root: Path) -> None:
    experts = open_snapshot(load_config(root / "files.yaml")).experts
    file = locate(experts["tuned"], experts) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    assert (locate(experts["tuned"], experts) / "model.safetensors").read_bytes() == whole


def test_a_base_that_is_not_here_is_named(root: Path) -> None:
    spec = open_snapshot(load_config(root / "files.yaml")).get("tuned")
    with pytest.raises(UnknownExpert, match="'base' is not in the experts here"):
        locate(spec)


async def test_a_delta_that_was_altered_is_refused(root: Path) -> None:
    file = root / "delta" / "delta.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    async with open_local(root / "files.yaml") as system:
        file.write_bytes(content)
        with pytest.raises(WeightsError, match=r"delta\.safetensors differs"):
            await system.ask("a", model="tuned")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{name: tuned, kind: model, source: delta}", "difference from another model: `delta_base: base` is"),
        (
            "{name: tuned, kind: model, source: delta, delta_base: other}",
            "other contents than 'other' has now",
        ),
        (
            "{name: tuned, kind: model, source: delta, delta_base: small}",
            "must be a model with its own weights, but",
        ),
        (
            "{name: tuned, kind: model, source: tuned, delta_base: base}",
            "is not a delta: leave `delta_base`",
        ),
        ("{name: tuned, kind: adapter, base: base, source: adapter, delta_base: base}", "`delta_base` is for models"),
        ("{name: tuned, kind: model, source: tuned, restores: 'sha256:0'}", "is assigned by the registry"),
    ],
)
def test_a_wrong_base_is_an_error_in_the_file(root: Path, line: str, message: str) -> None:
    text = DELTAS.replace("{name: tuned, kind: model, source: delta, delta_base: base}", line)
    (root / "experts.yaml").write_text(text + "  - {name: other, kind: model, source: tuned}\n")
    with Registry("sqlite://") as registry:
        if "other" not in line and "small" not in line:
            (root / "first.yaml").write_text("experts: [{name: base, kind: model, source: base}]")
            apply(plan(load_document(root / "first.yaml"), registry), registry)
        with pytest.raises(InvalidSpec, match=message):
            plan(load_document(root / "experts.yaml"), registry)


def test_the_base_of_a_delta_stays(root: Path) -> None:
    with Registry("sqlite://") as registry:
        apply(plan(load_document(root / "experts.yaml"), registry), registry)
        registry.remove("small")
        with pytest.raises(RegistryError, match="'base' cannot be removed: tuned need it"):
            registry.remove("base")
        shutil.rmtree(root / "base")
        shutil.copytree(root / "tuned", root / "base")
        (root / "base.yaml").write_text("experts: [{name: base, kind: model, source: base}]")
        with pytest.raises(InvalidSpec, match="the registered 'tuned' needs 'base': 'tuned' is stored as"):
            plan(load_document(root / "base.yaml"), registry)


def test_deltas_do_not_lead_to_deltas(root: Path) -> None:
    spec = ExpertSpec(name="second", kind=Kind.MODEL, source=str(root / "delta"), delta_base="tuned")
    with Registry("sqlite://") as registry:
        apply(plan(load_document(root / "experts.yaml"), registry), registry)
        with pytest.raises(RegistryError, match="but 'tuned' is a difference from 'base' itself"):
            registry.add(spec)


async def test_an_adapter_as_a_delta(root: Path, made: Path, tmp_path: Path) -> None:
    text = (
        DELTAS.replace("source: adapter", "source: exact")
        + "  - {name: near, kind: adapter, base: base, source: near}\n"
    )
    compressed(root / "adapter", None, root / "exact")
    compressed(root / "adapter", None, root / "near", density=0.5)
    (root / "experts.yaml").write_text(text)
    assert await answers(root / "files.yaml", "small") == await answers(made / "files.yaml", "small")
    experts = open_snapshot(load_config(root / "files.yaml")).experts
    assert experts["near"].base == "base" and experts["near"].references == ("base",)
    assert len(await answers(root / "files.yaml", "near")) > 0
    (root / "near" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 64}')
    with pytest.raises((SourceError, InvalidSpec), match="rank"):
        open_snapshot(load_config(root / "files.yaml"))
