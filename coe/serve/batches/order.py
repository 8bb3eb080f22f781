"""What a batch is run by: its file, and the experts and policies at its start, as JSON in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from coe.config import Config, PolicyConfig
from coe.engine_config import EnginesConfig
from registry.spec import ExpertSpec
from registry.store import Snapshot


@dataclass(frozen=True, slots=True)
class Serving:
    """Experts and policies of a service at one moment."""

    snapshot: Snapshot
    policies: Mapping[str, PolicyConfig]
    default_policy: str


@dataclass(frozen=True, slots=True)
class Order:
    """What the child process of a batch gets.

    Attributes:
        batch: its id. endpoint: of its requests.
        source: the input file. folder: of the batch.
        serving: the experts, and the policies that the key may ask.
        visible: the experts that may answer; None: all.
        engines: of the service; routers read signals with them.
        max_rows: of the file. max_line_bytes: of each request.
    """

    batch: str
    endpoint: str
    source: Path
    folder: Path
    serving: Serving
    visible: frozenset[str] | None
    engines: EnginesConfig
    max_rows: int
    max_line_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The order as JSON values."""
        snapshot = self.serving.snapshot
        return {
            "batch": self.batch,
            "endpoint": self.endpoint,
            "source": str(self.source),
            "folder": str(self.folder),
            "version": snapshot.version,
            "experts": [json.loads(spec.model_dump_json(exclude_defaults=True)) for spec in snapshot.experts.values()],
            "tokens_per_s": dict(snapshot.tokens_per_s),
            "policies": {name: json.loads(policy.model_dump_json()) for name, policy in self.serving.policies.items()},
            "default_policy": self.serving.default_policy,
            "visible": None if self.visible is None else sorted(self.visible),
            "engines": json.loads(self.engines.model_dump_json()),
            "max_rows": self.max_rows,
            "max_line_bytes": self.max_line_bytes,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The order that `to_json` wrote."""
        specs = [ExpertSpec.model_validate(value) for value in document["experts"]]
        snapshot = Snapshot(document["version"], {spec.name: spec for spec in specs}, document["tokens_per_s"])
        policies = {name: PolicyConfig.model_validate(value) for name, value in document["policies"].items()}
        return cls(
            document["batch"],
            document["endpoint"],
            Path(document["source"]),
            Path(document["folder"]),
            Serving(snapshot, policies, document["default_policy"]),
            None if document["visible"] is None else frozenset(document["visible"]),
            EnginesConfig.model_validate(document["engines"]),
            document["max_rows"],
            document["max_line_bytes"],
        )

    def config(self, policies: Mapping[str, PolicyConfig]) -> Config:
        """The configuration of a run with these policies; the default one may not be among them."""
        update = {"engines": self.engines, "policies": dict(policies), "default_policy": self.serving.default_policy}
        return Config().model_copy(update=update)
