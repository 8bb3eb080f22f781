"""What makes a batch the same run: its input, policies, engines and experts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from coe.batch.budget import Budget
from coe.batch.parts import PARTS
from coe.batch.source import Source
from coe.config import Config
from coe.local import describe_policy
from coe.policy import Policy
from coe.runs.folder import Manifest, RunFolder, open_run_folder
from coe.runs.storage import Folder
from coe.version import __version__
from registry.spec import ExpertSpec
from registry.store import Snapshot


def manifest(
    config: Config,
    snapshot: Snapshot,
    policies: Mapping[str, Policy],
    source: Source,
    model: str,
    budget: Budget | None = None,
) -> Manifest:
    """Everything that the results of a batch depend on."""
    described = {name: describe_policy(policy, policies[name]) for name, policy in config.policies.items()}
    return {
        "coe": __version__,
        "input": {"sha256": source.sha256, "rows": source.rows, "parts": len(source.splits)},
        "model": model,
        "budget": budget and budget.manifest(),
        "policies": described,
        "default_policy": config.default_policy,
        "engines": config.engines.model_dump(mode="json"),
        "experts": {name: _identity(spec) for name, spec in sorted(snapshot.experts.items())},
    }


def open_batch_folder(folder: Folder, manifest: Manifest, *, resume: bool) -> AbstractContextManager[RunFolder]:
    """The folder of a batch; see `open_run_folder`. Experts that were registered since make no other run of it."""
    return open_run_folder(folder, manifest, command="coe batch", data=[PARTS], resume=resume, may_grow=["experts"])


def known_experts(snapshot: Snapshot, run: Mapping[str, Any]) -> Snapshot:
    """The snapshot without experts that were registered after the run began: no row of it may name them."""
    names = run["manifest"]["experts"]
    return replace(snapshot, experts={name: spec for name, spec in snapshot.experts.items() if name in names})


def _identity(spec: ExpertSpec) -> str:
    """A hash of what an expert answers and charges: its content where that is known, and its spec."""
    irrelevant = {"version", "tags", "description", "licence", "files", "endpoints"}  # the digest has their URLs
    described = spec.model_dump_json(exclude=irrelevant if spec.engine else irrelevant | {"engine"})
    return hashlib.sha256(described.encode()).hexdigest()[:16]
