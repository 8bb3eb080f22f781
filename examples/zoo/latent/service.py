"""The experts of a run: the zoo's, and the one that the run trained or composed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from coe.config import Config, load_config
from examples.zoo.fetch import BASES
from examples.zoo.plan import KNOWLEDGE
from examples.zoo.train import ZOO
from registry.storage import atomic_path

TRAINED, COMPOSED = "trained", "composed"
"""Names of the adapter and of the composed expert of a run."""


def write_service(folder: Path, members: Iterable[str], *experts: Mapping[str, Any]) -> Path:
    """Write `service.yaml`, and `experts.yaml` with what the run adds to the zoo; returns the first.

    Args:
        members: of the bench; the zoo's own file lists all but `codes`.
    """
    files = [str(ZOO / "experts.yaml")]
    if KNOWLEDGE.name in members:
        files.append(str(ZOO / "latent_experts.yaml"))
    if experts:
        _write(folder / "experts.yaml", {"experts": [dict(expert) for expert in experts]})
        files.append("experts.yaml")
    service = {
        "experts": files,
        "engines": {"hf": {"threads": int(os.environ.get("OMP_NUM_THREADS", "1"))}},
        "host": {"budget": "4GiB"},
        "policies": {"default": {"expert": "smollm2"}},
    }
    return _write(folder / "service.yaml", service)


def service(folder: Path, members: Iterable[str], *experts: Mapping[str, Any]) -> Config:
    """The configuration of `write_service`."""
    return load_config(write_service(folder, members, *experts))


def adapter(base: str, source: Path) -> dict[str, Any]:
    """The entry of an adapter that a run trained."""
    return {"name": TRAINED, "kind": "adapter", "base": base, "source": str(source.resolve())}


def composed(
    architecture: str,
    members: tuple[str, ...],
    artifact: Path | None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The entry of a composed expert: with the folder that training wrote, or else with its settings."""
    entry = {"name": COMPOSED, "kind": "composed", "architecture": architecture, "members": list(members)}
    return entry | ({"settings": dict(settings)} if artifact is None else {"source": str(artifact.resolve())})


def again(name: str) -> dict[str, Any]:
    """The entry of SmolLM2 under another name."""
    return {"name": name, "kind": "model", "source": f"home://models/{BASES['smollm2'].folder}"}


def _write(path: Path, document: Mapping[str, Any]) -> Path:
    with atomic_path(path) as out:
        out.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path
