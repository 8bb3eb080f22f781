"""Every file in configs/ loads with today's code: an example that no longer works is worse than none."""

from pathlib import Path

import pytest

from coe.compose import COMPOSITIONS, build_composition
from coe.config import load_config
from coe.evaluation.tasks import load_task
from coe.latent.config import read_train_file
from registry.documents import load_document, validate
from registry.sources import absolute_source, source_kind
from registry.spec import ExpertSpec
from routers.encoders.build import HashingEncoder, build_encoder
from routers.factory import build
from routers.selectors import SELECTORS

CONFIGS = Path(__file__).parent.parent / "configs"


def files(folder: str) -> list[Path]:
    found = sorted((CONFIGS / folder).glob("*.yaml"))
    assert found, f"configs/{folder} has no files"
    return found


def name(path: Path) -> str:
    return path.stem


def test_no_folder_is_forgotten() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == {"coe", "grafana", "latent", "registry", "routers", "tasks"}


@pytest.mark.parametrize("path", files("coe"), ids=name)
def test_services(path: Path) -> None:
    for policy in load_config(path).policies.values():
        build_composition(policy.composition.kind, policy.composition.settings)


def test_every_composition_and_selector_has_an_example() -> None:
    policies = [policy for path in files("coe") for policy in load_config(path).policies.values()]
    assert {policy.composition.kind for policy in policies} == set(COMPOSITIONS)
    assert {policy.selector.kind for policy in policies} == set(SELECTORS)


@pytest.mark.parametrize("path", files("latent"), ids=name)
def test_trainings_of_compositions(path: Path) -> None:
    file = read_train_file(path)
    assert file.config.preset == path.stem
    assert file.config.config.is_file()


@pytest.mark.parametrize("path", files("registry"), ids=name)
def test_experts(path: Path) -> None:
    document = load_document(path)
    specs = [validate(document, ExpertSpec, ("experts", i)) for i in range(len(document.value["experts"]))]
    assert len({spec.name for spec in specs}) == len(specs) > 0
    for spec in specs:
        source_kind(absolute_source(spec.source, document.folder))


@pytest.mark.parametrize("path", files("routers"), ids=name)
def test_routers(path: Path) -> None:
    config = load_document(path).value
    assert set(config) <= {"kind", "encoder", "settings"}
    if "encoder" in config:
        assert build_encoder(config["encoder"]).name
    router = build(config["kind"], HashingEncoder(), config.get("settings"))
    assert router.kind == config["kind"]


@pytest.mark.parametrize("path", files("tasks"), ids=name)
def test_tasks(path: Path) -> None:
    task = load_task(path)
    assert task.name == path.stem and len(task.rows) >= 10
