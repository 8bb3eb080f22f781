"""Where `coe profile` knows experts from and keeps what it learns, and how it asks them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coe.cli.runs import run_in

if TYPE_CHECKING:
    from coe.config import Config
    from coe.evaluation.plan import EvaluationPlan
    from coe.evaluation.report import Report
    from coe.evaluation.tasks import Task
    from registry.profiles import ProfileRow
    from registry.store import Registry, Snapshot


@dataclass(frozen=True)
class Place:
    """Where experts are known and profiles are kept. keeps: False for a registry in memory."""

    config: Config | None
    url: str | None
    keeps: bool
    snapshot: Snapshot

    @classmethod
    def of(cls, config: Path | None, url: str | None, *, with_output: bool, otherwise: str = "") -> Place:
        """Of a configuration, or of a registry's URL.

        Args:
            with_output: the result is also written elsewhere.
            otherwise: what else a user can do where the result would be lost.

        Raises:
            ConfigError: the result would be lost.
        """
        from coe.config import Config, load_config
        from coe.errors import ConfigError
        from coe.experts import open_snapshot

        loaded = None if config is None else load_config(config)
        if loaded is not None and loaded.experts and not with_output:
            raise ConfigError(
                f"{config} names `experts` files, so that its registry is in memory and keeps nothing. Register them "
                f"(`coe registry apply FILE`) and replace `experts` by `registry: null`{otherwise}"
            )
        known = open_snapshot(Config(registry=url) if loaded is None else loaded)
        return cls(loaded, url if loaded is None else loaded.registry, loaded is None or not loaded.experts, known)

    def open(self) -> Registry:
        """The registry that keeps."""
        from registry.store import Registry

        return Registry(self.url)

    def store(self, rows: Sequence[ProfileRow]) -> str | None:
        """Keep them, where they can be kept; says where, without a password."""
        if not self.keeps:
            return None
        with self.open() as registry:
            registry.record(rows)
            return registry.url

    def recorded(self) -> Sequence[ProfileRow]:
        """The counts in the registry."""
        if not self.keeps:
            return ()
        with self.open() as registry:
            return registry.recorded()


@dataclass(frozen=True)
class Asking:
    """How experts are asked."""

    place: Place
    output: Path | None
    task_folders: tuple[Path, ...]
    resume: bool
    fresh: bool
    concurrency: int

    def run(self, plan: EvaluationPlan, part: str = "") -> Report:
        """Carry out a plan in `part` of the output; without an output, in a cache, named by the plan's content."""
        from registry.storage import coe_home

        assert self.place.config is not None  # _check_flags
        running = run_in(
            self.output / part if self.output else coe_home() / "profiles" / plan.fingerprint,
            plan,
            self.place.config,
            self.place.snapshot,
            resume=self.resume or not self.output,
            discard=self.fresh and not self.resume,
            concurrency=self.concurrency,
        )
        return asyncio.run(running)

    def find(self, tasks: str) -> list[Task]:
        """The tasks of a flag."""
        from coe.evaluation.tasks import find_tasks

        return find_tasks(tasks, self.task_folders)
